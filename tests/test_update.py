"""The whole update against another library: TRL's `GRPOTrainer` on the same batch."""

from __future__ import annotations

from collections import defaultdict

import datasets
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from spark_vl.config import ObjectiveConfig, OptimizerConfig
from spark_vl.data.images import load_image
from spark_vl.policy.policy import Policy
from spark_vl.policy.update import Updater
from spark_vl.records import Rollout, RolloutGroup, Verdict
from tests.conftest import make_image, make_record
from tests.distributed import updates
from tests.tiny_families import tiny_family

G = 4
QUESTIONS = ["Which digit is larger?", "What is the difference of these two?"]


def tokens_reward(completions, completion_ids, **_):
    """Anything in [0, 1] that differs between completions."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def run_update(updater, groups, prompts):
    """One update, and what it reports: name → [sum, number of observations]."""
    sums = defaultdict(lambda: [0.0, 0.0])

    def add(name, total, weight):
        sums[name][0] += total
        sums[name][1] += weight

    updates.run_update(updater, groups, prompts, add, max_new_tokens=10)
    return sums


class Recorder(TrainerCallback):
    """What TRL put in and got out of its first optimizer step."""

    inputs = None
    loss = 0.0
    gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class RecordingGRPOTrainer(GRPOTrainer):
    """TRL's trainer, unchanged, that remembers the batch of its loss."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.recorder.inputs, self.recorder.loss = inputs, loss.detach().clone()
        return loss


def make_model(family="qwen2_5_vl"):
    """The random tiny model in float64, with a likely stop token so that completions are ragged."""
    model, _ = tiny_family(family).make(dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[model.generation_config.eos_token_id[0]] *= 3
    return model


def shift(model):
    """Move `model` a little away from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("family", "objective", "trl_options", "beta"),
    [
        ("qwen2_5_vl", "grpo", {"loss_type": "grpo"}, 0.04),
        ("qwen2_5_vl", "dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}, 0.0),
        ("qwen2_5_vl", "dapo", {"loss_type": "dapo"}, 0.04),
        ("qwen2_5_vl", "gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, 0.0),
        ("qwen3_vl", "grpo", {"loss_type": "grpo"}, 0.04),
        ("qwen2", "grpo", {"loss_type": "grpo"}, 0.04),
        ("qwen3", "grpo", {"loss_type": "grpo"}, 0.04),
    ],
)
def test_loss_and_gradient_equal_trl(tmp_path, family, objective, trl_options, beta):
    row = tiny_family(family)
    config = row.save(tmp_path / "model")
    make_model(family).save_pretrained(tmp_path / "model")
    processor = row.load_processor(config)
    images = [make_image(i, (row.merged_patch * 2,) * 2) for i in range(2 if row.merged_patch else 0)]
    records = [make_record(f"r{i}", *images[i : i + 1], text) for i, text in enumerate(QUESTIONS)]
    rows = [
        {"prompt": [processor.chat_message(message) for message in record.messages]}
        | ({"image": load_image(record.images[0])} if record.images else {})
        for record in records
    ]
    recorder = Recorder()
    trl = RecordingGRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=tokens_reward,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            num_generations=G,
            per_device_train_batch_size=2 * G,
            gradient_accumulation_steps=1,
            max_completion_length=10,
            max_steps=1,
            beta=beta,
            use_bias_correction_kl=False,  # the plain k3 term
            max_grad_norm=1e9,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": torch.float64},
            report_to=[],
            save_strategy="no",
            seed=0,
            **trl_options,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        # TRL pads on the left but its vision token types on the side that the tokenizer says.
        processing_class=AutoProcessor.from_pretrained(tmp_path / "model", padding_side="left"),
        callbacks=[recorder],
    )
    trl.recorder = recorder
    shift(trl.model)
    trl.train()

    # TRL shuffles the rows of a batch: find the group of each by its prompt.
    prompts = {record.id: processor.process(record) for record in records}
    completions = {record.id: [] for record in records}
    for row in range(2 * G):
        prompt_ids, ids = (
            recorder.inputs[f"{part}_ids"][row][recorder.inputs[f"{part}_mask"][row].bool()].tolist()
            for part in ("prompt", "completion")
        )
        (record_id,) = (name for name, prompt in prompts.items() if prompt.input_ids.tolist() == prompt_ids)
        completions[record_id].append(tuple(ids))
    groups = []
    for record in records:
        rollouts = tuple(Rollout(ids, (0.0,) * len(ids), "", "stop") for ids in completions[record.id])
        verdicts = tuple(Verdict(score, None) for score in tokens_reward(None, completions[record.id]))
        groups.append(RolloutGroup(record, rollouts, verdicts))
    assert [len(group.rollouts) for group in groups] == [G, G]
    lengths = {len(r.token_ids) for g in groups for r in g.rollouts}
    assert len(lengths) > 1, "ragged completions are the point"
    assert all(len(set(each)) > 1 for each in completions.values()), "no advantage would be compared"

    def policy(model):
        return Policy(model, attention="sdpa", temperature=1.0, suppressed_token_ids=())

    ours = policy(shift(make_model(family)))
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)  # so that the step is the gradient
    updater = Updater(
        accelerator,
        ours,
        policy(make_model(family)).eval() if beta else None,
        optimizer,
        processor,
        ObjectiveConfig(loss=objective, beta=beta),
        OptimizerConfig(lr=1.0, max_grad_norm=1e9, tokens_per_pack=60),
        updates=1,
    )
    sums = run_update(updater, groups, prompts)

    # Advantages are float32 in TRL, and that is the tolerance. On-policy a surrogate adds up to about 0.
    assert sums["update/loss"][0] == pytest.approx(float(recorder.loss), rel=1e-5, abs=1e-6)
    if beta:
        assert sums["update/kl"][0] / sums["update/kl"][1] > 1e-4, "the KL term would not be compared"
    compared = 0
    for name, parameter in ours.model.named_parameters():
        expected = recorder.gradients[name]
        gradient = before[name] - parameter.detach()
        assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()), name
        compared += bool(expected.norm() > 0)
    assert compared == len(before)


def make_groups(rewards, processor):
    """A group for each row of `rewards`, with ragged completions, and the prompts."""
    groups = []
    for i, scores in enumerate(rewards):
        rollouts = tuple(
            Rollout(tuple(range(25, 28 + i + g)), (-1.0,) * (3 + i + g), "", "stop") for g in range(len(scores))
        )
        record = make_record(f"g{i}", make_image(i), QUESTIONS[i % 2])
        groups.append(RolloutGroup(record, rollouts, tuple(Verdict(score, None) for score in scores)))
    return groups, {group.record.id: processor.process(group.record) for group in groups}


def sgd_updater(policy, processor, objective, *, lr, **settings):
    """An updater without a reference whose step is `lr` times the gradient."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=lr)
    return Updater(
        Accelerator(cpu=True),
        policy,
        None,
        optimizer,
        processor,
        objective,
        OptimizerConfig(lr=lr, max_grad_norm=1e9, **settings),
        updates=1,
    )


def gradient_of(groups, prompts, processor, make_policy, **settings):
    """What one update with SGD at learning rate 1 takes from the weights, the update's sums, and its forward passes."""
    policy = make_policy(torch.float64)
    passes = []
    policy.register_forward_hook(lambda *_: passes.append(1))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    objective = ObjectiveConfig(beta=0.0, **settings.pop("objective", {}))
    updater = sgd_updater(policy, processor, objective, lr=1.0, **{"tokens_per_pack": 64} | settings)
    sums = run_update(updater, groups, prompts)
    return {name: before[name] - p.detach() for name, p in policy.named_parameters()}, sums, len(passes)


def test_groups_without_variance_cost_no_pass_and_still_count(processor, make_policy):
    groups, prompts = make_groups([[1, 0, 0, 1], [1, 1, 1, 1]], processor)
    both, _, passes = gradient_of(groups, prompts, processor, make_policy)
    alone, _, passes_alone = gradient_of(groups[:1], prompts, processor, make_policy)
    assert passes == passes_alone
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient / 2, rtol=1e-9, atol=1e-15)  # 4 of 8 completions
    nothing, sums, passes = gradient_of(groups[1:], prompts, processor, make_policy)
    assert passes >= 1, "another process may be waiting for this one"
    assert not any(gradient.any() for gradient in nothing.values())
    assert sums["update/grad_norm"][0] == 0


def test_weights_of_kinds_scale_the_gradient(processor, make_policy):
    groups, prompts = make_groups([[1, 0, 0, 1]], processor)
    kinds = dict.fromkeys(("pointwise", "pairwise", "reflection"), 1.0)
    full, *_ = gradient_of(groups, prompts, processor, make_policy, objective={"weights": kinds | {"problem": 1.0}})
    half, *_ = gradient_of(groups, prompts, processor, make_policy, objective={"weights": kinds | {"problem": 0.5}})
    for name, gradient in full.items():
        torch.testing.assert_close(half[name], gradient / 2, rtol=1e-9, atol=1e-15)


def test_where_packs_are_cut_changes_no_gradient(processor, make_policy):
    groups, prompts = make_groups([[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 1]], processor)
    one, _, passes = gradient_of(groups, prompts, processor, make_policy, tokens_per_pack=1000)
    cut, _, more_passes = gradient_of(groups, prompts, processor, make_policy, tokens_per_pack=54)
    assert passes == 1
    assert more_passes == 5
    for name, gradient in one.items():  # Qwen's RMSNorm rounds to float32
        assert float((cut[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


def test_later_updates_on_a_batch_are_off_policy_and_are_corrected(processor, make_policy):
    groups, prompts = make_groups([[1, 0, 0, 1], [0, 0, 1, 0]], processor)
    _, once, _ = gradient_of(groups, prompts, processor, make_policy)
    _, twice, _ = gradient_of(groups, prompts, processor, make_policy, updates_per_batch=2)
    assert once["update/ratio"][0] == once["update/ratio"][1]
    assert twice["update/ratio"][0] != pytest.approx(twice["update/ratio"][1], rel=1e-6)
    assert twice["update/lr"][1] == 2
