"""The estimate of memory, against transformers' own models, what torch allocates, and what it says of itself."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING

from spark_vl.cli import main
from spark_vl.config import LoraConfig, ModelConfig, TrainConfig
from spark_vl.demo.tiny import build_model
from spark_vl.estimate import activations, weights
from spark_vl.estimate.memory import estimate
from spark_vl.estimate.shape import load_shape, shapes
from spark_vl.families import read_facts
from spark_vl.families.base import Processor
from spark_vl.families.registry import FAMILIES, get_family
from spark_vl.policy import head
from spark_vl.policy.packing import PackItem, make_pack
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.policy.update import cast_ahead
from spark_vl.records import PromptRecord
from spark_vl.rollout import Sampling, TransformersEngine
from tests.conftest import make_image, make_record
from tests.tiny_families import tiny_family

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "memory.md").read_text()
# As the Hub states them, from the index of the checkpoints.
PUBLISHED = {
    **{"3b": 3_754_622_976, "7b": 8_292_166_656, "32b": 33_452_718_336, "72b": 73_410_777_344},
    **{"qwen3-vl-2b": 2_127_532_032, "qwen3-vl-4b": 4_437_815_808},
    **{"qwen3-vl-8b": 8_767_123_696, "qwen3-vl-32b": 33_357_390_064},
    # Of these, too, tied embeddings count once.
    **{"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688},
    **{"qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352},
    **{"qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976},
    **{"qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200},
    "qwen3-32b": 32_762_123_264,
}
FACTS = {name: (family, facts) for family in FAMILIES for name, facts in read_facts(family)["shapes"].items()}
# What is computed with (type of the weights, autocast) → `model.dtype`.
TYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


# ── weights ──


def test_the_shipped_shapes_have_the_published_numbers_of_weights():
    found = shapes()
    assert {name: found[name].parameters for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_transformers(name, tmp_path):
    shape, (family, facts) = load_shape(name), FACTS[name]
    text = {key: facts[key] for key in facts.keys() - {"hub", "vision_config", "tie_word_embeddings"}}
    if "vision_config" in facts:
        text = {"text_config": text, "vision_config": facts["vision_config"]}
    config = CONFIG_MAPPING[family](**text, tie_word_embeddings=facts["tie_word_embeddings"])
    with torch.device("meta"):
        model = get_family(family).model_class.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    parts = {model.get_decoder().layers[0]: shape.layer, model.get_input_embeddings(): shape.embedding}
    if "vision_config" in facts:
        tower = model.model.visual
        parts |= {tower: shape.vision.parameters, tower.blocks[0]: shape.vision.block}
        tower.requires_grad_(False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert weights.trained_parameters(shape, ModelConfig(freeze=["vision"])) == trained
    for part, size in parts.items():
        assert size == sum(p.numel() for p in part.parameters())

    config.save_pretrained(tmp_path)
    assert replace(load_shape(str(tmp_path)), name=name) == shape


@pytest.mark.parametrize("settings", [{}, {"freeze": ["vision"]}, {"lora": LoraConfig(rank=4)}])
def test_what_is_trained_is_what_the_policy_trains(settings, tiny, tmp_path):
    if "lora" in settings:
        pytest.importorskip("peft")
    tiny[0].save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), **settings)
    policy = load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert weights.trained_parameters(load_shape(str(tmp_path)), config) == trained


def test_a_config_as_on_the_hub_is_read(tmp_path):
    """There the numbers of the language model stand at the top, and the vision tower calls its channels otherwise."""
    config = {
        **{"model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28},
        **{"num_hidden_layers": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064},
        "vision_config": {
            **{"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
            **{"in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112},
            **{"spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_shape(str(tmp_path)).parameters == PUBLISHED["7b"]
    assert load_shape("Qwen/Qwen2.5-VL-7B-Instruct") == load_shape("7b")


def changed(**settings: Any) -> str:
    """The configuration of a shipped shape as a file of somebody else."""
    return json.dumps({"model_type": "qwen3_vl", **read_facts("qwen3_vl")["shapes"]["qwen3-vl-2b"], **settings})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "model_type is 'llama'; allowed: 'qwen2', 'qwen2_5_vl'"),
        ('{"model_type": "qwen2_5_vl"}', "hidden_size is missing"),
        ("{", "Expecting property name"),
        ("[]", "the file: found []; allowed: of type object"),
        (changed(hidden_size="64"), "hidden_size: found '64'; allowed: a whole number from 1"),
        (changed(num_attention_heads=0), "num_attention_heads: found 0; allowed: a whole number from 1"),
        (changed(num_hidden_layers=10**300), "num_hidden_layers: found 1000"),
        (changed(vocab_size=-1), "vocab_size: found -1; allowed: a whole number from 0"),
        (changed(vision_config=None), "vision_config: found None; allowed: of type object"),
        (changed(vision_config={"deepstack_visual_indexes": 3}), "deepstack_visual_indexes: found 3; allowed: of type"),
        (changed(text_config=[1]), "text_config: found [1]; allowed: of type object"),
        (None, "is not a shape; allowed are qwen2.5-0.5b"),
    ],
)
def test_a_folder_that_is_no_model_is_named(config, message, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_shape(str(tmp_path))


def test_numbers_of_other_files_are_the_same():
    assert activations.LOGITS_AT_ONCE == head.LOGITS_AT_ONCE
    stages = {stage: json.loads((ROOT / f"scripts/deepspeed/zero{stage}.json").read_text()) for stage in (2, 3)}
    assert all(stage["data_types"]["grad_accum_dtype"] == "fp32" for stage in stages.values())
    zero2, zero3 = (stage["zero_optimization"] for stage in stages.values())
    assert (zero2["overlap_comm"], zero2["reduce_bucket_size"]) == (True, weights.ZERO2_BUCKET)
    assert zero3["reduce_bucket_size"] == weights.ZERO3_BUCKET
    assert zero3["stage3_prefetch_bucket_size"] == weights.ZERO3_PREFETCH
    assert zero3["stage3_max_live_parameters"] == weights.ZERO3_LIVE


# ── what torch allocates ──


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at once while `run` runs, over what it had before."""
    run()  # what is made once and kept is made now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory) -> str:
    """The folder of a model that is wide enough for its tensors to matter."""
    folder = tmp_path_factory.mktemp("wide")
    model = build_model(tiny[1].tokenizer, hidden=256, layers=4, heads=8, vision_hidden=128, window=112, std=0.02)
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str, kind: str, **settings: Any) -> tuple[Policy, ModelConfig]:
    """A policy of a type in `TYPES`, as it is trained."""
    dtype, _ = TYPES[kind]
    config = ModelConfig(path=folder, dtype="float32" if kind == "float32" else "bfloat16", **settings)
    return load_policy(config, dtype=dtype, trained=dtype, temperature=1.0, suppressed_token_ids=()), config


def compare_activations(
    policy: Policy, config: ModelConfig, processor: Processor, record: PromptRecord, patches: int, cast: bool = False
) -> None:
    """Of a forward and a backward pass over a group of four."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    item = PackItem(processor.process(record), [[40] * 48] * 4, range(4))

    def run() -> None:
        pack = make_pack([item], padding=processor.padding)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            scores = policy(pack)
        (scores.logprobs.sum() + 0 * scores.entropy.sum()).backward()

    shape = load_shape(config.path)
    estimated = activations.activation_bytes(shape, config, tokens=item.tokens, patches=patches, cast=cast)
    assert 0.93 < estimated / allocated(run) < 1.25


@pytest.mark.parametrize("settings", [{}, {"freeze": ["vision"]}, {"gradient_checkpointing": False}])
@pytest.mark.parametrize("images", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TYPES)
def test_activations_are_what_a_pass_allocates(wide, processor, kind, images, settings):
    policy, config = load(wide, kind, **settings)
    record = make_record("r", *[make_image(i, (224, 224)) for i in range(images)], "Which digit is larger? " * 20)
    compare_activations(policy, config, processor, record, 256 * images, cast=TYPES[kind][1])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("family", "settings", "images"),
    [
        # Heads that are together twice as wide as the hidden states, and norms of queries and keys.
        ("qwen3", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}, 0),
        # Most of it is the vision tower's, whose MLPs have no gate.
        ("qwen3_vl", {"hidden": 256, "heads": 8, "head_dim": 64, "vision": 512}, 4),
    ],
)
def test_activations_of_other_families(tmp_path, family, settings, images, checkpointing):
    row = tiny_family(family)
    saved = replace(row, make=partial(row.make, **settings)).save(tmp_path)
    policy, config = load(saved.path, "float32", gradient_checkpointing=checkpointing)
    record = make_record("r", *[make_image(i, (224, 224)) for i in range(images)], "Which digit is larger? " * 20)
    compare_activations(policy, config, row.load_processor(saved), record, 14 * 14 * images)


def test_the_reference_under_autocast_has_the_bytes_that_are_held(wide):
    policy, config = load(wide, "autocast")
    cast_ahead(policy, torch.bfloat16)
    held = sum(parameter.nbytes for parameter in policy.parameters())
    estimated = weights.reference(load_shape(wide), config, 0.1, weights.Setup())
    assert estimated.update == pytest.approx(held, rel=0.005)  # norms are not counted
    assert estimated.update > 1.01 * 2 * load_shape(wide).parameters, "the embedding would not be seen"


@pytest.mark.parametrize(("n", "new"), [(1, 4), (8, 4), (8, 12)])
@pytest.mark.parametrize("kind", TYPES)
def test_the_rollout_is_what_the_engine_allocates(wide, processor, kind, n, new, monkeypatch):
    policy, config = load(wide, kind)
    records = [make_record(f"r{i}", make_image(i, (112, 112)), "Which digit is larger? " * (20 + i)) for i in range(4)]
    prompts = [processor.process(record) for record in records]
    # Never sampled: all completions have the full length.
    monkeypatch.setattr(processor, "stop_token_ids", (-1,))
    engine = TransformersEngine(policy, processor, decode_batch_size=4 * n)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=TYPES[kind][1]):
            engine.generate(prompts, n, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=new, seed=0))

    shape, longest = load_shape(wide), max(len(prompt.input_ids) for prompt in prompts)
    cache, working = activations.rollout_bytes(
        shape, config, prompts=4, n=n, prompt=longest, image=16, new=new, cast=kind == "autocast"
    )
    copies = weights.cast_bytes(shape, config) if kind == "autocast" else 0
    # A CPU without bfloat16 instructions computes in buffers of float32, which no GPU needs: they are not estimated.
    least = 0.8 if kind == "bfloat16" else 0.93
    # From 5.24 on transformers copies less of the cache when it grows; the estimate is an upper bound there.
    most = 1.1 if Version(transformers.__version__) < Version("5.24") else 1.8
    assert least < (cache + working + copies) / allocated(run) < most


# ── the command ──


def run_command(arguments: str | list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and output of `spark-vl …`, without the blanks that fill lines."""
    arguments = arguments.split()[1:] if isinstance(arguments, str) else arguments
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()).strip()


def table(output: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose first header is `first`: name → cells."""
    lines = output[output.index(f"| {first}") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: cells for name, *cells in rows}


def test_what_fits_exits_with_0(capsys):
    status, output = run_command("spark-vl estimate --model 7b --gpus 8 --zero 3", capsys)
    assert status == 0
    assert "7b: 8,292,166,656 weights, all trained, on 8 GPUs with ZeRO-3, bfloat16." in output
    assert "It fits: at most" in output
    rows = table(output, "GiB on each GPU")
    for column in range(3):
        column_sum = sum(0 if cells[column] == "-" else float(cells[column]) for cells in rows.values())
        assert column_sum - float(rows["sum"][column]) == pytest.approx(float(rows["sum"][column]), abs=0.6)


@pytest.mark.parametrize("base", ["--model=32b --gpus=8 --zero=3", "--model=3b --gpus=1 --model.dtype=float32"])
def test_each_change_saves_what_it_promises(base, capsys):
    arguments = ["estimate", *base.split()]
    status, output = run_command(arguments, capsys)
    assert status == 1
    assert "It does not fit: the update needs" in output
    before = table(output, "GiB on each GPU")["sum"]
    changes = table(output, "alone saves, GiB")
    assert len(changes) > 6
    for change, (*promised, fits) in changes.items():
        status, changed = run_command([*arguments, *shlex.split(change)], capsys)
        after = table(changed, "GiB on each GPU")["sum"]
        assert status == (0 if fits == "yes" else 1)
        for was, saved, now in zip(before, promised, after, strict=True):
            assert float(was) - (0 if saved == "-" else float(saved)) == pytest.approx(float(now), abs=0.16), change


def test_what_is_enough_together_is_enough(capsys):
    arguments = ["estimate", "--model=32b", "--gpus=8", "--zero=3"]
    _, output = run_command(arguments, capsys)
    together = re.search("^Together enough: (.+)$", output, re.MULTILINE)[1]
    assert run_command([*arguments, *shlex.split(together)], capsys)[0] == 0


def test_the_shape_is_that_of_the_configured_model_unless_one_is_named(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: Qwen/Qwen2.5-VL-3B-Instruct, freeze: [vision]}")
    named = run_command(["estimate", f"--config={config}", "--model=32b"], capsys)[1]
    assert named.startswith("32b: 33,452,718,336 weights, 32,763,876,352 trained")
    configured = run_command(["estimate", f"--config={config}"], capsys)[1]
    assert configured.startswith("3b: 3,754,622,976 weights, 3,085,938,688 trained")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model=8b", "--model: '8b' is not a shape; allowed are qwen2.5-0.5b"),
        ("--model.path=me/mine", "model.path: 'me/mine' is not a shape"),
        ("--model=7b --fsdp --zero=2", "zero: found 2 together with fsdp"),
        ("--model=7b --offload=optimizer", "offload: found 'optimizer', which needs ZeRO or FSDP2"),
        ("--model=7b --fsdp --offload=optimizer", "found 'optimizer' with FSDP2; allowed: 'none', 'optimizer+weights'"),
        ("--model=7b --zero=2 --offload=optimizer+weights", "with ZeRO-2; allowed: 'none', 'optimizer'"),
        ("--model=7b --gpus=0", 'Parser key "gpus"'),
    ],
)
def test_a_mistake_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["estimate", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_host_memory_can_be_what_lacks(capsys):
    arguments = "spark-vl estimate --model 7b --gpus 8 --zero 3 --offload optimizer"
    needed = float(re.search(r"Host memory of a machine: ([\d.]+) GiB", run_command(arguments, capsys)[1])[1])
    assert run_command(f"{arguments} --host_memory {needed + 1}", capsys)[0] == 0
    status, output = run_command(f"{arguments} --host_memory {needed - 1}", capsys)
    assert status == 1
    assert "of host memory" in output


VLLM = "spark-vl estimate --gpus 8 --zero 3 --gpu_memory 80 --rollout.engine vllm"


@pytest.mark.parametrize(
    ("model", "tensor_parallel", "held", "tokens"),
    [
        # 28 GiB are 30,064,771,072 bytes. A token: layers · (keys and values) · heads of them · width · 2 bytes.
        ("7b", 1, "15.4", (30_064_771_072 - 2 * 8_292_166_656) // (28 * 2 * 4 * 128 * 2)),
        ("3b", 1, "7.0", (30_064_771_072 - 2 * 3_754_622_976) // (36 * 2 * 2 * 128 * 2)),
        ("3b", 4, "1.7", (30_064_771_072 - 2 * 3_754_622_976 // 4) // (36 * 2 * 1 * 128 * 2)),  # of two heads
    ],
)
def test_vllm_takes_its_share_to_sample_and_host_memory_to_sleep(model, tensor_parallel, held, tokens, capsys):
    arguments = f"{VLLM} --model {model} --rollout.vllm.tensor_parallel {tensor_parallel}"
    status, output = run_command(arguments, capsys)
    assert status == 0
    assert f"its share holds {held} GiB of weights and the keys and values of at most {tokens:,} tokens" in output
    rows = table(output, "GiB on each GPU")
    assert rows["vLLM's share"] == ["-", "-", "28.0"]  # 0.35 · 80
    assert "key-value cache" not in rows
    assert f"vLLM's weights while it sleeps {held}" in output
    # The embedding is larger than a bucket of 512 MiB: it and its copy, 2 bytes a number.
    embedding = {"7b": 152_064 * 3584, "3b": 151_936 * 2048}[model] * 2 * 2 / 2**30
    assert rows["weights gathered or cast"][2] == f"{embedding:.1f}"


@pytest.mark.parametrize(("share", "lacking"), [(0.201, None), (0.199, "0.01"), (0.15, "3.9")])
def test_vllms_share_has_to_hold_its_weights_and_a_completion(share, lacking):
    """7B: 15.445 GiB, and 8192 + 768 tokens of 56 KiB, 0.479 GiB: 15.923 of 80, which is a share of 0.19904."""
    config, setup = TrainConfig(), weights.Setup(gpus=8, zero=3, gpu_memory=80)
    config.data.max_prompt_tokens, config.rollout.max_new_tokens = 8192, 768
    config.rollout.engine, config.rollout.vllm.memory_share = "vllm", share
    needed = estimate(load_shape("7b"), config, setup)
    assert needed.share_lacks / 2**30 == pytest.approx(float(lacking or 0), abs=0.03)
    assert (needed.share_lacks > 0) == bool(lacking)


def test_a_share_that_is_too_small_does_not_fit(capsys):
    status, output = run_command(f"{VLLM} --model 32b --offload optimizer+weights", capsys)
    assert status == 1
    # 62.312 and, at 8960 tokens of 256 KiB, 2.188 GiB, of 28.
    assert "It does not fit: rollout.vllm.memory_share lacks 36.5 GiB for the weights and one completion" in output


def test_servers_are_not_counted(capsys):
    servers = "--rollout.vllm.mode server --rollout.vllm.servers [http://node7:8000]"
    status, output = run_command(f"{VLLM} --model 7b {servers}", capsys)
    assert status == 0
    assert "sampled by servers on other GPUs, which are not counted" in output
    assert not {"vLLM's share", "key-value cache"} & set(table(output, "GiB on each GPU"))


def test_a_phase_never_needs_less_with_more_in_it():
    """More tokens, rows and pixels never need less, and more GPUs never more."""
    shape = load_shape("7b")
    base = weights.Setup(gpus=8, zero=3)
    before = estimate(shape, TrainConfig(), base).total
    for setup in (weights.Setup(gpus=16, zero=3), weights.Setup(gpus=64, zero=3)):
        assert all(now <= was for now, was in zip(estimate(shape, TrainConfig(), setup).total, before, strict=True))
    larger = TrainConfig(model=ModelConfig(max_pixels=2 * 1048576))
    larger.optimizer.tokens_per_pack *= 2
    larger.rollout.decode_batch_size *= 2
    assert all(now >= was for now, was in zip(estimate(shape, larger, base).total, before, strict=True))


COMMANDS = re.findall(r"```sh\n(spark-vl estimate .*)\n```", DOCS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_shows_what_the_command_prints(command, capsys):
    assert run_command(command, capsys)[1] in DOCS


@pytest.mark.parametrize(
    ("way", "setup"),
    [
        ("one process, DDP", {}),
        *((f"ZeRO-{stage}", {"zero": stage}) for stage in (1, 2, 3)),
        ("FSDP2", {"fsdp": True}),
    ],
)
def test_the_page_has_the_figures_of_7b(way, setup):
    rows = weights.held(load_shape("7b"), ModelConfig(), weights.Setup(gpus=8, **setup))
    [line] = [line for line in DOCS.splitlines() if line.startswith(f"| {way} |")]
    assert line.endswith(f"| {sum(row.update for row in rows.values()) / 2**30:.1f} |")


def test_the_page_has_the_three_models():
    assert {re.search("--model (\\S+)", command)[1] for command in COMMANDS} == {"3b", "7b", "32b"}
