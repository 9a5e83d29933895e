"""Files of somebody hostile: a checkpoint, a run's folder, a model's folder. None of them runs code here.

Whoever changes a checkpoint can write its manifest anew, so each attack signs what it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from spark_vl import checkpoint as checkpoint_module
from spark_vl.checkpoint import CheckpointError, claim_folder, find_checkpoint
from spark_vl.config import ConfigError, ModelConfig, dump_config, read_config
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.distributed.state import load_state, random_state, save_state, set_random_state
from spark_vl.evaluation import rescore
from spark_vl.evaluation.samples import groups_to_json
from spark_vl.families.registry import find_family, load_part
from spark_vl.policy.policy import load_policy
from spark_vl.records import BadRecordError, Rollout, RolloutGroup, Verdict
from spark_vl.run.codec import record_from_json, record_to_json
from spark_vl.run.jsonl import append_lines
from spark_vl.run.manifest import find_damage, read_manifest, write_manifest
from spark_vl.run.paths import LATEST, pointed
from spark_vl.setup import load_trainer
from spark_vl.verifiers import VerifierPool, get_verifier
from spark_vl.verifiers.base import run_verifier
from tests.conftest import make_image, make_record
from tests.test_trainer import make_config

SETTINGS = ("--steps=2", "--checkpoint.every=2")


class Bomb:
    """Its pickle, when it is read, makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker, 0o777, True, True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    load_trainer(make_config(folder, *SETTINGS)).train()
    return folder


@pytest.fixture
def theirs(whole, tmp_path) -> Path:
    """A copy of its checkpoint, outside the run that is to resume from it."""
    return Path(shutil.copytree(whole / "checkpoints" / "step-000002", tmp_path / "theirs" / "step-000002"))


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Iterator[Callable[[], bool]]:
    """A module `planted` that anyone can import, which notes that it was; says whether that happened."""
    marker = tmp_path / "imported"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w')\ndef verify(completion, record): ...\n")
    monkeypatch.syspath_prepend(folder)
    yield marker.exists
    sys.modules.pop("planted", None)
    get_verifier.cache_clear()


def header(text: bytes) -> bytes:
    """A safetensors file that is nothing but its header."""
    return struct.pack("<Q", len(text)) + text


def sign(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest anew."""
    old = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {name: old[name] for name in old if name not in ("files", "sha256")} | facts)
    assert read_manifest(checkpoint)


def resume(folder: Path, checkpoint: Path | str, **settings: Any):
    return load_trainer(make_config(folder, *SETTINGS), resume=str(checkpoint), **settings)


# ── pickles ──


def test_nothing_that_one_process_writes_is_a_pickle(whole):
    files = [path for path in (whole / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert not zipfile.is_zipfile(path), f"{path}: as torch.save writes"
        assert path.read_bytes()[:1] != b"\x80", f"{path}: as pickle writes"


@pytest.mark.parametrize("how", [pickle.dump, torch.save])
def test_a_pickle_in_a_checkpoint_is_not_read(theirs, tmp_path, how):
    marker = tmp_path / "marker"
    names = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin", "model.bin"]
    for name in (*names, "scheduler.bin", "sampler.bin", "scaler.pt", "pytorch_model_fsdp.bin", "latest"):
        with (theirs / name).open("wb") as file:
            how(Bomb(marker), file)
    sign(theirs)
    assert resume(tmp_path / "run", theirs).step == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    "facts",
    [{"step": "../x"}, {"step": -1}, {"step": True}, {"step": 10**40}, {"processes": 0}, {"processes": 2.0}],
)
def test_nonsense_that_is_signed_is_an_error_in_words(theirs, tmp_path, facts):
    sign(theirs, **facts)
    [name] = facts
    with pytest.raises(CheckpointError, match=rf"manifest.json: {name}: found .*; allowed: "):
        resume(tmp_path / "run", theirs)


def test_more_processes_than_there_are_files_for(theirs, tmp_path):
    sign(theirs, processes=10**9)
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: FileNotFoundError: .*trainer\.rank1\.json"):
        resume(tmp_path / "run", theirs)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "{}", '{"files": [], "sha256": 3}', "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(theirs, tmp_path, text):
    (theirs / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json has changed"):
        resume(tmp_path / "run", theirs)


def test_a_manifest_reads_no_file_elsewhere(theirs, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    manifest = read_manifest(theirs)
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    manifest["files"] |= {"../../secret": entry, str(secret): entry}
    assert find_damage(theirs, manifest) == ["../../secret is missing", f"{secret} is missing"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.rank0.json", "config.yaml"])
def test_a_pickle_in_place_of_a_file_is_not_read(theirs, tmp_path, name):
    (theirs / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    sign(theirs)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the reader says
        resume(tmp_path / "run", theirs)
    assert not (tmp_path / "marker").exists()
    with (theirs / name).open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "marker").exists(), "the bomb is a dud"


def test_the_random_generators_go_on_where_they_were():
    def draw() -> list[float]:
        return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.randn(()))]

    for generator in (random, np.random):
        generator.seed(3)
    random.gauss(), np.random.randn()  # each keeps the second of a pair
    device = torch.device("cpu")
    saved = json.loads(json.dumps(random_state(device)))
    expected = [draw() for _ in range(400)]  # beyond the block of 624 words
    for generator in (random, np.random):
        generator.seed(4)
    torch.manual_seed(4)
    assert draw() != expected[0]
    set_random_state(saved, device)
    assert [draw() for _ in range(400)] == expected


def test_weights_and_optimizer_come_back_to_the_last_bit(tmp_path):
    accelerator = Accelerator(cpu=True)

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained[:1], "weight_decay": 0.1}, {"params": trained[1:], "lr": 1e-7 / 3}]
        return model, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95))

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()

    model, optimizer = make()
    save_state(accelerator, model, optimizer, tmp_path)  # before the first step there are no moments
    load_state(accelerator, *make(), tmp_path)
    for _ in range(3):
        step(model, optimizer)
    save_state(accelerator, model, optimizer, tmp_path)
    model_2, optimizer_2 = make()
    load_state(accelerator, model_2, optimizer_2, tmp_path)
    for _ in range(2):
        step(model, optimizer), step(model_2, optimizer_2)
        assert all(torch.equal(model.state_dict()[name], each) for name, each in model_2.state_dict().items())
    state, state_2 = optimizer.state_dict(), optimizer_2.state_dict()
    assert json.dumps(state_2["param_groups"]) == json.dumps(state["param_groups"])
    torch.testing.assert_close(state_2["state"], state["state"], rtol=0, atol=0)


# ── where libraries unpickle ──


@pytest.fixture
def sharded(monkeypatch, theirs) -> None:
    """Their checkpoint says that it is one of ZeRO-3, and the run believes to be one."""
    monkeypatch.setattr(checkpoint_module, "strategy", lambda accelerator: "zero3")
    sign(theirs, strategy="zero3")


def test_a_checkpoint_that_can_hold_code_is_refused_outside_of_the_run(sharded, theirs, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=rf"found {theirs}, allowed: files below .*{run}\).*--trust-ch"):
        resume(run, theirs)
    assert resume(run, theirs, trust_checkpoint=True).step == 2


def test_a_checkpoint_that_can_hold_code_is_its_own_runs(sharded, theirs, tmp_path):
    run = tmp_path / "run"
    inside = run / "checkpoints" / theirs.name
    shutil.copytree(theirs, inside)
    assert resume(run, inside).step == 2


@pytest.mark.parametrize("linked", ["the checkpoint", "a folder in it", "a file in it", "checkpoints"])
def test_links_out_of_the_run_are_followed_before_it_is_trusted(sharded, theirs, tmp_path, linked):
    run = tmp_path / "run"
    inside = run / "checkpoints" / theirs.name
    inside.parent.mkdir(parents=True)
    match linked:
        case "the checkpoint":
            inside.symlink_to(theirs)
        case "checkpoints":
            inside.parent.rmdir()
            inside.parent.symlink_to(theirs.parent)
        case _:
            shutil.copytree(theirs, inside)
            part = inside / ("model" if "folder" in linked else "optimizer.safetensors")
            part.rename(tmp_path / "part")
            part.symlink_to(tmp_path / "part")
    (run / "checkpoints" / LATEST).write_text(theirs.name)
    for name in ("auto", inside):
        with pytest.raises(CheckpointError, match="--trust-checkpoint"):
            resume(run, name)


@pytest.mark.parametrize("name", ["../../theirs/step-000002", "{theirs}", "..", "", "step-1", "step-000002/../x", "/"])
def test_a_pointer_names_a_checkpoint_beside_it(theirs, tmp_path, name):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / LATEST).write_text(name.format(theirs=theirs))
    with pytest.raises(ConfigError, match=rf"^{folder / LATEST}: found .*; allowed: .*step-000120"):
        find_checkpoint(folder, "auto")
    (folder / LATEST).write_text("step-1000000\n")
    assert pointed(folder, LATEST) == folder / "step-1000000"


# ── what records name ──


def with_waiting(checkpoint: Path, where: str, **fields: Any) -> str:
    """Change the first prompt of their checkpoint that waits; returns its id."""
    file = checkpoint / "trainer.rank0.json"
    state = json.loads(file.read_text())
    feed = state["feed"]
    if where == "surplus":
        feed["surplus"], feed["waiting"] = feed["waiting"], []
    record = feed[where][0]["records"][0]
    record |= fields
    file.write_text(json.dumps(state))
    sign(checkpoint)
    return record["id"]


@pytest.mark.parametrize("where", ["waiting", "surplus"])
@pytest.mark.parametrize("name", ["planted:verify", "os:system", "__main__:verify", "no such", ""])
def test_a_restored_record_names_no_code(theirs, tmp_path, planted, where, name):
    record_id = with_waiting(theirs, where, verifier=name)
    with pytest.raises(CheckpointError, match=rf"record {record_id}: verifier: found '{name}'; allowed: .*judgment"):
        resume(tmp_path / "run", theirs)
    assert not planted()


def test_nor_do_its_settings(theirs, tmp_path, planted):
    record_id = with_waiting(theirs, "waiting", verifier="json_field", settings={"verifier": "planted:verify"})
    with pytest.raises(CheckpointError, match=rf"record {record_id}: settings: json_field: verifier: found 'planted:"):
        resume(tmp_path / "run", theirs)
    assert not planted()


def test_json_field_runs_no_other_verifier_whoever_asks(planted):
    settings = (("verifier", "planted:verify"),)
    record = make_record("r", verifier="json_field", gold='{"answer": 1}', settings=settings)
    verdict = run_verifier('\\boxed{{"answer": 1}}', record)
    assert verdict.status == "error"
    assert "settings: verifier: found 'planted:verify'; allowed: text" in verdict.detail
    assert not planted()


def test_a_record_of_the_runs_own_verifier_comes_back():
    own = make_record("r", verifier="tests.misbehaving:verify")
    assert record_from_json(json.loads(json.dumps(record_to_json(own))), {own.verifier}) == own
    with pytest.raises(ValueError, match="record r: verifier: found 'tests"):
        record_from_json(json.loads(json.dumps(record_to_json(own))))


def test_a_sample_names_no_code(tmp_path, planted):
    record = make_record("r", verifier="planted:verify")
    group = RolloutGroup(record, (Rollout((), (), "5", "stop"),), (Verdict(1.0, "5"),))
    line = {"recipe": "r", "row": 0, "id": "r", "groups": groups_to_json({"greedy": [group]})}
    append_lines(tmp_path / "samples.jsonl", [line])
    with VerifierPool(1) as pool, pytest.raises(ValueError, match="record r: verifier: found 'planted:verify'"):
        rescore(tmp_path / "samples.jsonl", pool)
    assert not planted()


@pytest.mark.parametrize("where", ["messages", "question"])
def test_a_restored_record_opens_no_image_outside_the_data(theirs, tmp_path, where):
    (tmp_path / "private.png").write_bytes(make_image(3).data)
    image = {"path": "private.png", "root": str(tmp_path)}
    content = [image, "What is it?"]
    fields: dict[str, Any] = {where: [{"role": "user", "content": content}] if where == "messages" else content}
    record_id = with_waiting(theirs, "waiting", **fields)
    feed = resume(tmp_path / "run", theirs).feed
    assert record_id not in [prompt.record.id for prompt in feed.next("recycled")]
    assert feed.quarantine.prompts_bad > 0
    said = (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert f"is below {str(tmp_path)!r}; allowed: none" in said


# ── links in a run's folder ──


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml", "quarantine.jsonl"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_does_not_write_through_links(tmp_path, name, there):
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    (folder / name).symlink_to(target)
    if there:
        target.write_text("precious")
    with pytest.raises(ConfigError, match=rf"^output_dir: {folder / name} is a symbolic link, .*; allowed: "):
        claim_folder(folder)
    assert target.read_text() == "precious" if there else not target.exists()


def test_nor_through_a_link_that_is_made_meanwhile(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.write_text("precious")
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(ConfigError, match=r"cannot be written to.*\.lock"):
        claim_folder(tmp_path)
    assert target.read_text() == "precious"


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    claim_folder(tmp_path / "run").close()


# ── a model's folder ──


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


@pytest.fixture
def own_code(model, monkeypatch) -> Path:
    """All parts of the model ask for code in its folder, and somebody at the terminal says yes. The code's marker."""
    marker = model.parent / "ran"
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n")
    parts = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoVideoProcessor", "AutoModel")
    for name in ("config", "processor_config", "tokenizer_config", "preprocessor_config", "generation_config"):
        file = model / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        mapped = {part: ["own.Own", "own.Own"] if part == "AutoTokenizer" else "own.Own" for part in parts}
        for kind in ("processor_class", "tokenizer_class", "image_processor_type", "video_processor_type"):
            found.pop(kind, None)
        file.write_text(json.dumps(found | {"auto_map": mapped}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return marker


@pytest.mark.parametrize("part", [AutoConfig, AutoProcessor, GenerationConfig])
def test_a_models_folder_runs_no_code(model, own_code, part):
    config = ModelConfig(path=str(model))
    if part is not AutoConfig:
        shutil.copy(CHECKPOINT / "config.json", model / "config.json")
    if part is AutoConfig:
        with pytest.raises(ConfigError, match=rf"(?s)^model\.path: {model} cannot be loaded .*trust_remote_code"):
            load_part(part, config)
    else:
        load_part(part, config)  # without the folder's own
    assert not own_code.exists()
    if part is AutoConfig:
        with pytest.raises(Exception):  # noqa: B017, PT011 - Own is not a configuration
            AutoConfig.from_pretrained(model)
        assert own_code.exists(), "the attack is a dud"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{% for m in messages %}", "fails with TemplateSyntaxError"),
        ("{{ raise_exception('only for friends') }}", "fails with TemplateError: only for friends"),
        ("{{ messages[0].content[9].text.x }}", "fails with UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails with SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}", "fails with"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
        ("hello", "shows a question 0 times"),
        ("{{ messages[0].content[1].text }}", r"and the <\|image_pad\|> of its image 0 times"),
        ("{% for i in 'ab' %}<|image_pad|>{{ messages[0].content[1].text }}{% endfor %}", "shows a question 2 times"),
        (None, "fails with ValueError: .*chat template"),
    ],
)
def test_a_bad_chat_template_is_an_error_in_words(model, template, said):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    if template is not None:
        (model / "chat_template.jinja").write_text(template.replace("MARKER", str(model / "marker")))
    config = ModelConfig(path=str(model))
    with pytest.raises(ConfigError, match=rf"(?s)^model\.path: {model}: chat_template: .*{said}"):
        find_family(config).load_processor(config, max_prompt_tokens=60)
    assert not (model / "marker").exists()


def test_a_chat_template_that_fails_on_one_prompt_costs_that_prompt(model):
    file = model / "chat_template.jinja"
    file.write_text("{% if 'seven' in messages[0].content[0].text %}{{ 1 / 0 }}{% endif %}" + file.read_text())
    config = ModelConfig(path=str(model))
    processor = find_family(config).load_processor(config, max_prompt_tokens=600)
    with pytest.raises(BadRecordError, match=r"^r: chat_template: fails with ZeroDivisionError"):
        processor.process(make_record("r", "Is it seven?"))
    assert len(processor.process(make_record("r", "Is it six?")).input_ids) > 3


@pytest.mark.parametrize("field", ["vision_config", "text_config", "rope_scaling", "image_token_id"])
@pytest.mark.parametrize("value", [3, "x", [], [[]]])
def test_nonsense_in_a_configuration_is_an_error_in_words_or_harmless(model, field, value):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    config = ModelConfig(path=str(model))
    with suppress(ConfigError):
        find_family(config).load_processor(config, max_prompt_tokens=60)


@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        *(("config.json", ["image_token_id"], value, "image_token_id: found") for value in (10**9, -1)),
        *(
            ("generation_config.json", ["eos_token_id"], value, "eos_token_id: found")
            for value in (["x"], "x", [[1]], -1, 10**30, {"a": 1}, True, 1.5)
        ),
        ("tokenizer_config.json", ["pad_token"], None, "pad_token: found"),
        ("config.json", ["text_config", "hidden_act"], "__import__", "KeyError"),
        *(("processor_config.json", ["image_processor", "merge_size"], value, "Error") for value in (10**6, "x", [])),
    ],
)
def test_numbers_that_are_none_are_an_error_in_words(model, file, path, value, said):
    content = part = json.loads((model / file).read_text())
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (model / file).write_text(json.dumps(content))
    config = ModelConfig(path=str(model))
    with pytest.raises(ConfigError, match=rf"^model\.path: {model}: .*{said}"):
        find_family(config).load_processor(config, max_prompt_tokens=60)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("part", ["text_config", "vision_config", None])
def test_a_configuration_names_no_code_of_the_hub(model, name, part):
    """Where the package `kernels` is installed, transformers fetches the attention `owner/name`, and runs it;
    elsewhere it fails."""

    file = model / "config.json"
    content = json.loads(file.read_text())
    (content[part] if part else content)[name] = "evil/kernel"
    file.write_text(json.dumps(content))
    config = ModelConfig(path=str(model))
    find_family(config).load_processor(config, max_prompt_tokens=60)
    load_policy(config, dtype=torch.float32, temperature=1.0, suppressed_token_ids=())


@pytest.mark.parametrize("data", [None, b"", b"x" * 100, header(b'{"a":' * 10_000)])
def test_a_model_whose_weights_are_none_is_an_error_in_words(model, data):
    (model / "model.safetensors").unlink()
    if data is not None:
        (model / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^model\.path: {model} cannot be loaded"):
        load_policy(ModelConfig(path=str(model)), dtype=torch.float32, temperature=1.0, suppressed_token_ids=())


def test_a_model_that_lacks_a_weight_is_refused(model):
    """transformers would go on with random numbers in its place, and a line in the log."""
    file = model / "model.safetensors"
    with safe_open(file, "pt") as saved:
        weights = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    lacking = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file({name: tensor for name, tensor in weights.items() if name != lacking}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"^model\.path: {model}: the weights lack 1 of .*layers\.0\.mlp\.up_proj"):
        load_policy(ModelConfig(path=str(model)), dtype=torch.float32, temperature=1.0, suppressed_token_ids=())


def test_a_model_names_no_other_model(model, tmp_path):
    """transformers would load the base of adapters, from wherever they say, in place of the folder's own weights."""
    private = shutil.copytree(model, tmp_path / "private")
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(private), "r": 1, "target_modules": ["q_proj"]})
    )
    with pytest.raises(ConfigError, match=rf"^model\.path: {model}: holds adapters"):
        load_policy(ModelConfig(path=str(model)), dtype=torch.float32, temperature=1.0, suppressed_token_ids=())


# ── files that no reader gets to the end of, or understands ──


def replace_by(what: str, file: Path) -> None:
    """Put in the place of `file` something that has its name."""
    file.unlink()
    match what:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "loop":
            file.symlink_to(file.name)


PARTS = ["trainer.rank0.json", "config.yaml", "model.safetensors", "optimizer.safetensors", "model/config.json"]


@pytest.mark.parametrize("what", ["pipe", "device", "loop"])
@pytest.mark.parametrize("name", PARTS)
def test_what_is_no_file_is_damage(theirs, what, name):
    """Also where the manifest does not list it."""
    manifest = read_manifest(theirs)
    del manifest["files"][name]
    replace_by(what, theirs / name)
    assert find_damage(theirs, manifest) == [f"{name} is not a regular file"]


def test_a_checkpoint_is_not_read_before_its_damage_is_known(theirs, tmp_path):
    (theirs / "trainer.rank0.json").unlink()
    sign(theirs)
    os.mkfifo(theirs / "trainer.rank0.json")
    with pytest.raises(CheckpointError, match=r"is damaged: trainer\.rank0\.json is not a regular file"):
        resume(tmp_path / "run", theirs)


def test_a_name_that_no_file_can_have_is_missing(theirs):
    manifest = read_manifest(theirs)
    manifest["files"] |= {"a" * 5000: {}, "a\0b": {}}
    assert find_damage(theirs, manifest) == [f"{'a' * 5000} is missing", "a\0b is missing"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("data", [b"", b"x" * 100, header(b'{"a":' * 10_000), header(b"{}"), struct.pack("<Q", 2**62)])
def test_weights_that_are_none_are_an_error_in_words(theirs, tmp_path, name, data):
    (theirs / name).write_bytes(data)
    sign(theirs)
    with pytest.raises(CheckpointError, match=f"^{theirs}: cannot be resumed from: "):
        resume(tmp_path / "run", theirs)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("feed", "sampler", "epoch"), value) for value in (INFINITE, -5, 2.5, 10**4000, None)),
        *((("feed", "sampler", "position"), value) for value in (10**9, -1, True)),
        *((("feed", "quarantine", name), -1) for name in ("rows_seen", "rows_bad", "prompts_bad")),
        (("feed", "recycled"), float("nan")),
        *((("feed", "difficulty", "steps"), [[1, labels]]) for labels in ([[2.0, True]], [[0.5, 1]], [[None, True]])),
        (("updater", "skipped_in_a_row"), -1),
        (("best", "value"), float("nan")),
        (("best", "value"), "9"),
        (("best", "step"), -1),
    ],
)
def test_nonsense_numbers_in_a_state_are_an_error_in_words(theirs, tmp_path, path, value):
    file = theirs / "trainer.rank0.json"
    states = part = json.loads(file.read_text())
    for name in path[:-1]:
        part = part[name]
    assert path[-1] in part
    part[path[-1]] = value
    sys.set_int_max_str_digits(0)
    file.write_text(json.dumps(states))
    sys.set_int_max_str_digits(4300)
    sign(theirs)
    with pytest.raises(CheckpointError, match=f"^{theirs}: cannot be resumed from: "):
        resume(tmp_path / "run", theirs)


def test_the_optimizers_settings_are_those_of_the_configuration(theirs, tmp_path):
    file = theirs / "optimizer.safetensors"
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        groups = json.loads(saved.metadata()["param_groups"])
    spoiled = [group | {"lr": float("nan"), "betas": [2, -1], "eps": INFINITE, "maximize": True} for group in groups]
    save_file(tensors, file, {"param_groups": json.dumps(spoiled)})
    sign(theirs)
    trainer = resume(tmp_path / "run", theirs)
    optimizer = trainer.updater.optimizer
    assert [{k: g[k] for k in ("betas", "eps", "maximize")} for g in optimizer.param_groups] == [
        {"betas": (0.9, 0.999), "eps": 1e-8, "maximize": False} for _ in groups
    ]
    some = next(name for name, tensor in tensors.items() if tensor.dim())
    for i, change in enumerate((tensors | {some: torch.zeros(3, 5)}, tensors | {"999.exp_avg": torch.zeros(2)})):
        save_file(change, file, {"param_groups": json.dumps(groups)})
        sign(theirs)
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: .*found the shape .*; allowed: "):
            resume(tmp_path / f"run{i}", theirs)


@pytest.mark.parametrize(
    ("part", "state"),
    [
        ("python", [3, [2**70] * 625, None]),
        ("torch", "AAAA"),
        ("torch", []),
        ("numpy", {"bit_generator": "MT19937", "state": {"key": [2**70] * 624, "pos": 0}}),
    ],
)
def test_nonsense_in_a_state_is_an_error_in_words(theirs, tmp_path, part, state):
    file = theirs / "trainer.rank0.json"
    states = json.loads(file.read_text())
    states["random"][part] = state
    file.write_text(json.dumps(states))
    sign(theirs)
    with pytest.raises(CheckpointError, match=f"^{theirs}: cannot be resumed from: "):
        resume(tmp_path / "run", theirs)


def test_deep_nesting_is_an_error_in_words(theirs, tmp_path):
    (theirs / "trainer.rank0.json").write_text("[" * 100_000)
    sign(theirs)
    with pytest.raises(CheckpointError, match="cannot be resumed from: RecursionError"):
        resume(tmp_path / "run", theirs)


def aliases(row: str, first: str) -> str:
    """YAML of some hundred bytes for 9¹⁰ values."""
    return "\n".join([f"a0: &a0 {first}", *(f"a{i}: &a{i} " + row.replace("?", f"*a{i - 1}") for i in range(1, 11))])


CONFIGURATIONS = {
    "lists": (aliases("[" + "?," * 9 + "]", "[x]"), "has aliases"),
    "mappings": (aliases("{" + "".join(f"k{i}: ?, " for i in range(9)) + "}", "{x: 1}"), "has aliases"),
    "merges": (aliases("{<<: [" + "?," * 9 + "]}", "{x: 1}"), "has aliases"),
    "itself": ("a: &a {b: *a}", "has aliases"),
    "numbers to the base of 60": ("a: 1" + ":59" * 200_000, "bytes; 262144 are allowed"),
    "long numbers": ("a: " + "9" * 100_000, "Exceeds the limit"),
    "deep": ("[" * 20_000, "RecursionError"),
    "code": ("!!python/object/apply:os.system ['true']", "ConstructorError"),
    "a list": ("- 1", "found list; allowed: a mapping"),
}


@pytest.mark.parametrize(("text", "said"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_of_somebody_else_is_read_or_refused_at_once(theirs, tmp_path, text, said):
    (theirs / "config.yaml").write_text(text)
    sign(theirs)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"(?s)config\.yaml: cannot be read: .*{said}"):
        resume(tmp_path / "run", theirs)
    assert time.process_time() - start < 20


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    twice = ["a\u0301", "1e3", "190:20:30", None, 0.1]
    settings = {"a": {"b": twice, "c": twice}, "d": 2**70}
    (tmp_path / "config.yaml").write_text(dump_config(settings))
    assert read_config(tmp_path / "config.yaml") == settings
