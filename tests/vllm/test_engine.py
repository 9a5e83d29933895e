"""vLLM samples what the transformers engine samples, from whatever weights the policy has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spark_vl.config import LoraConfig
from spark_vl.policy.packing import PackItem, make_pack
from spark_vl.policy.policy import load_policy
from spark_vl.policy.update import load_updater
from spark_vl.policy.weights import weight_buckets
from spark_vl.records import RolloutGroup
from spark_vl.rollout import EngineError, PromptsRefusedError, Sampling, TransformersEngine, load_engine
from spark_vl.rollout.vllm_engine import VLLMEngine
from tests.conftest import make_image, make_record
from tests.vllm.conftest import run_config

pytestmark = pytest.mark.vllm

GREEDY = Sampling(0.0, 1.0, 24, 0)
DRAWN = Sampling(1.0, 1.0, 24, 7)


@pytest.fixture(scope="module")
def updater(run_accelerator, run_processor):
    return load_updater(run_config(), run_accelerator, run_processor, updates=10)


@pytest.fixture(scope="module")
def engines(server, run_accelerator, run_processor, updater):
    """One engine of either mode, on one policy."""
    colocated = load_engine(run_config(), run_accelerator, updater, run_processor)
    served = run_config(mode="server", servers=[server()], retries=0)
    engines = {"colocate": colocated, "server": load_engine(served, run_accelerator, updater, run_processor)}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=["colocate", "server"])
def engine(request, engines) -> VLLMEngine:
    return engines[request.param]


@pytest.fixture(scope="module")
def prompts(run_processor):
    small, wide, tall = make_image(1), make_image(2, (200, 90)), make_image(3, (84, 140))
    return [
        run_processor.process(record)
        for record in (
            make_record("text", "What is 3 plus 4?"),
            make_record("one", wide, "Which digit is this?"),
            make_record("two", small, "and", tall, "Add the two digits."),
        )
    ]


@pytest.fixture
def policy(updater, run_accelerator, engines):
    """The policy, which a test may change; engines get its weights before their next completion."""
    policy = run_accelerator.unwrap_model(updater.policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    yield policy
    policy.load_state_dict(before)
    for engine in engines.values():
        engine.sync_weights(policy)


def shake(policy, size: float = 0.02) -> None:
    """Move all weights, those of the vision tower too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def assert_equal(found: list[RolloutGroup], wanted: list[RolloutGroup]) -> None:
    for a, b in zip(found, wanted, strict=True):
        for one, other in zip(a.rollouts, b.rollouts, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_greedy_tokens_are_those_of_the_transformers_engine_before_and_after_an_update(
    engine, policy, prompts, run_processor
):
    plain = TransformersEngine(policy, run_processor, decode_batch_size=8)
    first = plain.generate(prompts, 1, GREEDY)
    assert_equal(engine.generate(prompts, 1, GREEDY), first)
    shake(policy)
    second = plain.generate(prompts, 1, GREEDY)
    assert [group.rollouts[0].token_ids for group in second] != [group.rollouts[0].token_ids for group in first]
    engine.sync_weights(policy)
    assert_equal(engine.generate(prompts, 1, GREEDY), second)


def test_a_repetition_penalty_is_that_of_the_transformers_engine(engine, policy, prompts, run_processor):
    penalized = replace(GREEDY, repetition_penalty=1.3)
    plain = TransformersEngine(policy, run_processor, decode_batch_size=8)
    expected = plain.generate(prompts, 1, penalized)
    assert_equal(engine.generate(prompts, 1, penalized), expected)
    without = plain.generate(prompts, 1, GREEDY)
    assert [group.rollouts[0].token_ids for group in without] != [group.rollouts[0].token_ids for group in expected]


def test_log_probabilities_of_drawn_tokens_are_the_policys_own(engine, prompts, updater, run_processor):
    """Also in the server, whose checkpoint asks for a repetition penalty, top_k 1 and a temperature of 1e-6."""
    groups = engine.generate(prompts, 8, DRAWN)
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({rollout.token_ids for rollout in group.rollouts}) > 1
        completions = [rollout.token_ids for rollout in group.rollouts]
        pack = make_pack([PackItem(prompt, completions, range(8))], padding=run_processor.padding)
        [own] = updater.score([pack])
        assert own.tolist() == pytest.approx([p for rollout in group.rollouts for p in rollout.logprobs], abs=1e-4)


def test_a_seed_gives_the_same_completions_and_another_seed_others(engine, prompts):
    once = engine.generate(prompts, 4, DRAWN)
    assert engine.generate(prompts, 4, DRAWN) == once
    assert engine.generate(prompts, 4, replace(DRAWN, seed=8)) != once
    # Neighbors do not share a stream: the same prompt twice is drawn independently.
    twice = engine.generate([prompts[1], prompts[1]], 8, DRAWN)
    assert twice[0].rollouts[1:] != twice[1].rollouts[:-1]


def test_shares_of_drawn_tokens_follow_their_probabilities(engine, prompts):
    """512 first tokens: each share within 4 standard deviations of the probability that the engine reports."""
    groups = engine.generate([prompts[1]] * 2, 256, replace(DRAWN, max_new_tokens=1))
    drawn = [rollout for group in groups for rollout in group.rollouts]
    said = {rollout.token_ids[0]: rollout.logprobs[0] for rollout in drawn}
    for token, logprob in said.items():
        p = float(torch.tensor(logprob).exp())
        share = sum(rollout.token_ids[0] == token for rollout in drawn) / 512
        assert abs(share - p) < 4 * (p * (1 - p) / 512) ** 0.5 + 1 / 512


def test_groups_come_as_they_are_complete_and_completions_are_counted(engine, prompts):
    heard, counted = {}, []
    groups = engine.generate(prompts, 3, DRAWN, counted.append, lambda i, group: heard.update({i: group}))
    assert sum(counted) == 9
    assert [heard[i] for i in range(3)] == groups


def test_suppressed_tokens_are_never_sampled(engine, policy, prompts, run_processor, monkeypatch):
    free = engine.generate(prompts, 1, GREEDY)
    favorite = free[0].rollouts[0].token_ids[0]
    suppressed = (*run_processor.suppressed_token_ids, favorite)
    monkeypatch.setattr(run_processor, "suppressed_token_ids", suppressed)
    monkeypatch.setitem(policy._buffers, "suppressed", torch.tensor(suppressed))
    plain = TransformersEngine(policy, run_processor, decode_batch_size=8)
    found = engine.generate(prompts, 1, GREEDY)
    assert all(favorite not in group.rollouts[0].token_ids for group in found)
    assert_equal(found, plain.generate(prompts, 1, GREEDY))


def test_adapters_arrive_merged(engine, engines, updater, run_accelerator, run_processor, prompts, policy):
    config = run_config()
    config.model.lora = LoraConfig(rank=4, alpha=8.0)
    settings = {"temperature": 1.0, "suppressed_token_ids": run_processor.suppressed_token_ids}
    adapted = load_policy(config.model, dtype=torch.float32, trained=torch.float32, **settings).eval()
    shake(adapted, 0.05)
    plain = TransformersEngine(adapted, run_processor, decode_batch_size=8)
    wanted = plain.generate(prompts, 1, GREEDY)
    engine.sync_weights(adapted)
    score = engine.score
    try:
        engine.score = lambda packs: [adapted(pack).logprobs for pack in packs]
        assert_equal(engine.generate(prompts, 1, GREEDY), wanted)
    finally:
        engine.score = score


def test_weights_that_arrive_damaged_stop_the_run(engine, policy, monkeypatch, prompts):
    load = engine.backend.load

    def damaged(buckets, version):
        load(
            [
                [(name, value * 1.5 if "visual.merger.mlp.2.weight" in name else value) for name, value in bucket]
                for bucket in buckets
            ],
            version,
        )

    monkeypatch.setattr(engine.backend, "load", damaged)
    engine.sync_weights(policy)
    # Only the prompt with an image shows it.
    with pytest.raises(EngineError, match=r"canary/image at \S+: [\d.]+ nats .*max_canary_gap") as raised:
        engine.generate(prompts, 1, GREEDY)
    assert "canary/text" not in str(raised.value)


def test_weights_that_do_not_arrive_stop_the_run(engine, policy, monkeypatch, prompts):
    load = engine.backend.load
    old = list(weight_buckets(engine.accelerator, policy, dtype=torch.float32, bucket_bytes=2**20))
    assert len(old) > 1
    shake(policy)
    # The old ones under the new version.
    monkeypatch.setattr(engine.backend, "load", lambda buckets, version: (list(buckets), load(old, version)))
    engine.sync_weights(policy)
    with pytest.raises(EngineError, match="Some weights have not arrived"):
        engine.generate(prompts, 1, GREEDY)
    # Under the old version.
    monkeypatch.setattr(engine.backend, "load", lambda buckets, version: list(buckets))
    with pytest.raises(EngineError, match=r"sampled from weights of version .*; the policy's are"):
        engine.generate(prompts, 1, GREEDY)


def test_a_prompt_that_expands_otherwise_is_refused_by_name_and_the_others_are_sampled(engine, prompts):
    images = prompts[1].images
    # As if the trainer had one feature less for its image than vLLM makes of it.
    odd = replace(prompts[1], images=(replace(images[0], resized=images[0].resized.resize((168, 84))),))
    too_long = replace(prompts[0], input_ids=prompts[0].input_ids.repeat(100))
    with pytest.raises(PromptsRefusedError) as raised:
        engine.generate([prompts[0], odd, prompts[2], too_long], 2, DRAWN)
    assert [group and group.record.id for group in raised.value.groups] == ["text", None, "two", None]
    assert set(raised.value.reasons) == {1, 3}
    assert "one: vLLM expands the prompt to" in str(raised.value.reasons[1])
    assert "refuses the prompt" in str(raised.value.reasons[3])
