"""What is trained: everything, all but the vision tower, or low-rank adapters; what of it decays; what is exported."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from spark_vl.config import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from spark_vl.demo.tiny import CHECKPOINT, random_tiny
from spark_vl.policy.batch import BatchMaker
from spark_vl.policy.packing import PackItem, make_pack
from spark_vl.policy.policy import load_policy
from spark_vl.policy.update import load_updater, parameter_groups
from spark_vl.records import Verdict
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.setup import load_trainer
from tests.conftest import make_image, make_record
from tests.test_trainer import make_config, metrics, weights
from tests.test_update import make_groups, run_update, sgd_updater


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("model")
    random_tiny()[0].save_pretrained(path)
    return path


def load(folder, **settings):
    config = ModelConfig(path=str(folder), dtype="float32", **({"gradient_checkpointing": False} | settings))
    return load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())


def pack_of(processor):
    prompt = processor.process(make_record("p", make_image(1), "Which digit is larger?"))
    item = PackItem(prompt, [[25, 26, 27], [28, 29]], [0, 1])
    return make_pack([item], padding=processor.padding)


def moved_by_one_update(policy, processor, *, beta=0.0):
    """Names of the parameters that an update with SGD moves, and what the update reports."""
    groups, prompts = make_groups([[1, 0, 0, 1]], processor)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    updater = sgd_updater(policy, processor, ObjectiveConfig(beta=beta), lr=0.1, tokens_per_pack=1000)
    sums = run_update(updater, groups, prompts)
    return {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}, sums


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_frozen_vision_tower_stays_and_runs_without_gradient(folder, processor, gradient_checkpointing):
    whole, frozen = (
        load(folder, freeze=parts, gradient_checkpointing=gradient_checkpointing) for parts in ([], ["vision"])
    )
    outputs = []
    for policy in (whole, frozen):
        policy.model.model.visual.merger.register_forward_hook(lambda *call: outputs.append(call[-1].requires_grad))
    moved, _ = moved_by_one_update(whole, processor)
    assert moved == {name for name, _ in whole.named_parameters()}
    assert any(outputs)
    outputs.clear()
    moved, _ = moved_by_one_update(frozen, processor)
    assert moved == {name for name, _ in frozen.named_parameters() if ".visual." not in name}
    assert outputs
    assert not any(outputs)
    assert all(p.grad is None for p in frozen.model.model.visual.parameters())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_adapters_alone_move_and_the_reference_is_the_model_without_them(folder, processor, gradient_checkpointing):
    lora = LoraConfig(rank=4, alpha=8.0)
    policy = load(folder, lora=lora, gradient_checkpointing=gradient_checkpointing)
    pack = pack_of(processor)
    with torch.no_grad():
        plain = load(folder)(pack).logprobs
        torch.testing.assert_close(policy(pack).logprobs, plain)  # adapters begin at zero

    moved, sums = moved_by_one_update(policy, processor, beta=0.1)
    adapters = {name for name, _ in policy.named_parameters() if ".lora_" in name}
    # q, k, v, o, gate, up and down of each layer; with B = 0 only B has a gradient in the first update.
    assert len(adapters) == 2 * 7 * 2
    assert moved == {name for name in adapters if ".lora_B." in name}
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == adapters
    assert sums["update/kl"][0] == pytest.approx(0.0, abs=1e-6)

    with torch.no_grad():
        torch.testing.assert_close(policy(pack, adapters=False).logprobs, plain)
        adapted = policy(pack).logprobs
    assert float((adapted - plain).abs().max()) > 1e-4, "the adapters do nothing"
    _, sums = moved_by_one_update(policy, processor, beta=0.1)
    assert sums["update/kl"][0] > 0, "the reference moved with the policy"
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == adapters


def test_adapters_merged_by_us_equal_adapters_merged_by_peft(folder, processor):
    policy = load(folder, lora=LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    merged = policy.plain_state_dict(policy.state_dict())
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert merged.keys() == plain.state_dict().keys()

    for module in policy.model.modules():
        if "base_layer" in module._modules:
            module.merge()  # peft's own
    for name, tensor in policy.model.state_dict().items():
        if ".lora_" not in name:
            torch.testing.assert_close(merged[name.replace(".base_layer", "")], tensor, rtol=1e-5, atol=1e-7)


def test_a_run_with_adapters_resumes_and_exports_a_plain_model(tmp_path, monkeypatch):
    lora = "--model.lora={rank: 4, alpha: 16}"
    curve = ("--optimizer.schedule=cosine", "--optimizer.min_lr_ratio=0.1", "--optimizer.warmup_updates=0.25")
    settings = (lora, *curve, "--steps=4", "--checkpoint.every=2")
    load_trainer(make_config(tmp_path / "whole", *settings)).train()
    cut = load_trainer(make_config(tmp_path / "cut", *settings))
    sample = cut.collector.sample_and_verify

    def stop_after_two(prompts, *, seed):
        if cut.step == 2:
            raise KeyboardInterrupt
        return sample(prompts, seed=seed)

    monkeypatch.setattr(cut.collector, "sample_and_verify", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    load_trainer(make_config(tmp_path / "cut", *settings), resume="auto").train()
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")

    whole, cut, start = (
        weights(tmp_path / "whole"),
        weights(tmp_path / "cut"),
        load_file(CHECKPOINT / "model.safetensors"),
    )
    assert whole.keys() == cut.keys() == start.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert changed == {name for name in whole if "_proj.weight" in name and "visual" not in name}


def test_the_scores_of_the_policy_that_sampled_are_without_dropout(folder, processor):
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
    updater = make_updater(folder, processor, lora=lora)
    policy = updater.policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.1)  # they begin at 0, and dropout would not matter
    prompts = [processor.process(make_record(f"p{i}", make_image(i), "Which digit is larger?")) for i in range(3)]
    engine = TransformersEngine(policy, processor, decode_batch_size=32)
    groups = engine.generate(prompts, 2, Sampling(temperature=1.0, max_new_tokens=6, seed=0))
    groups = [group.verified((Verdict(1.0, None), Verdict(0.0, None))) for group in groups]
    make_batches = BatchMaker(
        accelerator=updater.accelerator,
        processor=processor,
        objective=updater.objective,
        optimizer=updater.settings,
        max_new_tokens=6,
    )
    [batch] = make_batches(list(zip(prompts, groups, strict=True)), [[1.0, -1.0]] * 3, seed="0")
    [pack] = batch.passes
    [once], [twice] = updater.score(batch.passes), updater.score(batch.passes)
    assert torch.equal(once, twice)
    torch.testing.assert_close(once, batch.sampler_logprobs_of(pack), rtol=0, atol=1e-5)
    assert all(module.training for module in policy.modules()), "the update itself is with dropout"
    with torch.no_grad():
        assert float((policy(pack).logprobs - once).abs().max()) > 1e-2, "dropout does nothing"


LAYER = [f"self_attn.{side}_proj" for side in "qkvo"] + [f"mlp.{side}_proj" for side in ("gate", "up", "down")]
BLOCK = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MATRICES = {
    *(f"model.language_model.layers.{i}.{name}.weight" for i in range(2) for name in LAYER),
    *(f"model.visual.blocks.{i}.{name}.weight" for i in range(2) for name in BLOCK),
    "model.visual.patch_embed.proj.weight",
    "model.visual.merger.mlp.0.weight",
    "model.visual.merger.mlp.2.weight",
    "model.language_model.embed_tokens.weight",
    "lm_head.weight",
}
"""All of the tiny model that is no norm and no bias."""


def make_updater(folder, processor, *, lora=None):
    """As a run has it, with AdamW."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32", lora=lora),
        objective=ObjectiveConfig(beta=0),
        optimizer=OptimizerConfig(lr=0.1, weight_decay=0.5),
    )
    return load_updater(config, Accelerator(cpu=True), processor, updates=10)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_without_gradients_matrices_alone_decay(folder, processor, lora):
    updater = make_updater(folder, processor, lora=lora)
    with torch.no_grad():
        for parameter in updater.policy.parameters():
            parameter.add_(0.25)  # biases and one side of the adapters begin at 0, which cannot decay
    before = {name: p.detach().clone() for name, p in updater.policy.named_parameters()}
    groups, prompts = make_groups([[1, 1, 1, 1]], processor)
    sums = run_update(updater, groups, prompts)
    assert sums["update/grad_norm"] == [0, 1]
    after = dict(updater.policy.named_parameters())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == ({name for name in before if ".lora_" in name} if lora else {f"model.{name}" for name in MATRICES})
    for name in moved:
        torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))


def test_what_decays_is_known_also_where_weights_were_taken_away(folder):
    """As ZeRO-3 does it when the model is made."""
    policy = load(folder)
    expected = [[id(p) for p in group["params"]] for group in parameter_groups(policy, 0.5)]
    for parameter in policy.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert [[id(p) for p in group["params"]] for group in parameter_groups(policy, 0.5)] == expected


def test_a_resumed_run_takes_the_new_decay_and_spares_norms_and_biases(tmp_path):
    load_trainer(make_config(tmp_path / "run", "--steps=1")).train()
    changed = ("--steps=2", "--optimizer.weight_decay=0.5", "--optimizer.betas=[0.5, 0.6]")
    trainer = load_trainer(make_config(tmp_path / "run", *changed), resume="auto", allow_config_change=True)
    groups = trainer.updater.optimizer.param_groups
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, (0.5, 0.6)), (0.0, (0.5, 0.6))]
    assert sum(len(group["params"]) for group in groups) == len([*trainer.updater.policy.parameters()])
