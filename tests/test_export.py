"""What a run exports: one copy of tied weights, loadable, and the adapters beside the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from spark_vl.checkpoint import export_model
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.hub.cards import write_model_card
from spark_vl.hub.publish import _OF_MODELS
from spark_vl.hub.run import find_model
from spark_vl.setup import load_trainer
from tests.test_trainer import make_config

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """The tiny model with tied embeddings, as the 3B model has them."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("tied") / "base"))
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", [False, True], ids=["one-process", "copies"])
def test_tied_embeddings_are_written_once(tied, tmp_path, monkeypatch, dtype, copies):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = load_trainer(make_config(tmp_path / "run", f"--model.path={tied}", f"--model.dtype={dtype}"))
    policy, processor = trainer.updater.policy, trainer.updater.processor
    if copies:  # as ZeRO and FSDP2 gather them

        def gathered(self, model):
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

        monkeypatch.setattr(Accelerator, "get_state_dict", gathered)
    export_model(trainer.accelerator, policy, processor, tmp_path / "model", dtype=getattr(torch, dtype))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == load_file(tied / "model.safetensors").keys()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = AutoModelForImageTextToText.from_pretrained(tied, dtype=getattr(torch, dtype)).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The trainer of a finished run with adapters, in bfloat16, whose updates are small."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("adapted") / "run"
    config = make_config(folder, "--model.lora.rank=4", "--model.dtype=bfloat16", "--steps=2", "--optimizer.lr=1e-5")
    trainer = load_trainer(config)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
    return trainer


def deltas(state: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> torch.Tensor:
    """What training changed of the weights that have adapters, all in one row."""
    names = [name for name in base if name.endswith("_proj.weight") and ".language_model." in name]
    return torch.cat([(state[name].double() - base[name].double()).flatten() for name in names])


def test_the_adapters_lie_beside_the_merged_model_as_they_were_trained(adapted):
    folder = adapted.log.folder / "model"
    base = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).float()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    by_peft = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().state_dict()
    # The truth: base and adapters as they are in the policy, in float64.
    state = adapted.updater.policy.state_dict()
    exact = dict(before)
    for name in state:
        if name.endswith(".lora_A.default.weight"):
            layer = name.removesuffix(".lora_A.default.weight")
            down, up = (state[f"{layer}.lora_{side}.default.weight"].double() for side in "AB")
            of_model = f"{layer.removeprefix('model.')}.weight"
            scaling = adapted.updater.policy.model.get_submodule(layer.removeprefix("model.")).scaling["default"]
            exact[of_model] = before[of_model].double() + scaling * up @ down
    true = deltas(exact, before)
    assert true.norm() > 0
    error = (deltas(by_peft, before) - true).norm() / true.norm()
    merged = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()
    lost = (deltas(merged, before) - true).norm() / true.norm()
    assert error < 0.02  # peft adds in float32
    assert lost > 0.3, "the merged model holds the change; the adapters need not lie beside it"
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == CHECKPOINT.name, "no path of this machine"
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert len(saved) == sum(".lora_" in name for name in state)


def test_the_card_says_what_the_files_need_and_what_merging_costs(adapted, tmp_path, finished_run):
    for folder, has_adapters in ((adapted.log.folder, True), (finished_run, False)):
        write_model_card(find_model(folder), tmp_path / "README.md", model_id="o/n", name="n")
        text = (tmp_path / "README.md").read_text()
        assert "transformers>=5" in text
        assert ("rounded to bfloat16" in text) == has_adapters
        assert ('subfolder="adapter"' in text) == has_adapters
        assert (folder / "model" / "adapter").exists() == has_adapters


def test_a_release_replaces_the_adapters_of_the_last_one():
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model.safetensors"):
        assert _OF_MODELS.fullmatch(name)
    for name in ("adapter_model.safetensors", "adapters/adapter_model.safetensors", "adapter/notes.md"):
        assert not _OF_MODELS.fullmatch(name)
