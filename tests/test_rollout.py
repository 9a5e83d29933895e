"""How the transformers engine samples. That it samples what the model says: `test_every_family.py`."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.rollout.transformers_engine import nucleus
from tests.conftest import make_image, make_record
from tests.padded_reference import plain_inputs
from tests.test_packing import make_prompts

NEW_TOKENS = 24


@pytest.fixture
def prompts(processor):
    """Ragged prompts with 1, 0, 3 and 1 images; the last shares its image with the first."""
    shared = make_record("shared", make_image(1), "And which one is the smaller of the two digits that you see?")
    return [*make_prompts(processor), processor.process(shared)]


@pytest.fixture
def policy(make_policy):
    return make_policy()


@pytest.fixture
def engine(policy, processor):
    return TransformersEngine(policy, processor, decode_batch_size=256)


def rows(groups):
    return [r for g in groups for r in g.rollouts]


def test_seed_fixes_the_completions_and_restores_the_policy(engine, policy, prompts):
    policy.train()
    sampling = Sampling(max_new_tokens=8, seed=5)
    first, again = (engine.generate(prompts, 4, sampling) for _ in range(2))
    other = engine.generate(prompts, 4, Sampling(max_new_tokens=8, seed=6))
    assert [r.token_ids for r in rows(first)] == [r.token_ids for r in rows(again)]
    assert [r.token_ids for r in rows(first)] != [r.token_ids for r in rows(other)]
    assert policy.training


def test_small_batches_give_the_same_greedy_completions(policy, processor, prompts):
    sampling = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
    together = TransformersEngine(policy, processor, decode_batch_size=256).generate(prompts, 1, sampling)
    one_by_one = TransformersEngine(policy, processor, decode_batch_size=1).generate(prompts, 1, sampling)
    assert [r.token_ids for r in rows(together)] == [r.token_ids for r in rows(one_by_one)]


def test_stop_tokens_end_a_completion_and_the_limit_cuts_it(engine, policy, processor, prompts):
    finished = []
    with torch.no_grad():  # make the stop token likely, so that rows end at different steps
        policy.model.lm_head.weight[processor.stop_token_ids[0]] *= 3
    groups = engine.generate(prompts, 16, Sampling(max_new_tokens=6, seed=1), finished.append)
    assert sum(finished) == 16 * len(prompts)
    lengths = set()
    for rollout in rows(groups):
        stops = [i for i, token in enumerate(rollout.token_ids) if token in processor.stop_token_ids]
        assert len(rollout.token_ids) == len(rollout.logprobs)
        if rollout.finish_reason == "stop":
            assert stops == [len(rollout.token_ids) - 1]
        else:
            assert not stops
            assert len(rollout.token_ids) == 6
        assert "<|im_end|>" not in rollout.text
        lengths.add((rollout.finish_reason, len(rollout.token_ids)))
    assert {finish_reason for finish_reason, _ in lengths} == {"stop", "length"}
    assert len(lengths) > 3


def test_vision_tokens_are_never_sampled(make_policy, processor, prompts):
    sampled = {}
    for suppress in (False, True):
        policy = make_policy(suppress=suppress)
        with torch.no_grad():  # the policy now loves image tokens
            policy.model.lm_head.weight[processor.image_token_id] = 1.0
        engine = TransformersEngine(policy, processor, decode_batch_size=256)
        groups = engine.generate(prompts[:1], 32, Sampling(max_new_tokens=8, seed=0))
        sampled[suppress] = {token for r in rows(groups) for token in r.token_ids}
    assert processor.image_token_id in sampled[False]
    assert not sampled[True] & set(processor.suppressed_token_ids)


def test_each_image_and_prompt_is_processed_once(engine, policy, prompts):
    patches, prompt_tokens = [], []
    visual, language = policy.model.model.visual, policy.model.model.language_model
    hooks = [
        visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0]))),
        language.register_forward_pre_hook(
            lambda module, args, kwargs: prompt_tokens.append(tuple(kwargs["inputs_embeds"].shape[:2])),
            with_kwargs=True,
        ),
    ]
    engine.generate(prompts, 8, Sampling(max_new_tokens=3))
    for hook in hooks:
        hook.remove()
    unique = {image for p in prompts for image in p.images}
    assert len(unique) == 4, "two prompts show the same image"
    assert patches == [sum(len(image.pixel_values) for image in unique)]
    assert prompt_tokens[0] == (len(prompts), max(len(p.input_ids) for p in prompts))
    assert prompt_tokens[1] == (8 * len(prompts), 1)


def test_finished_rows_are_dropped(engine, policy, processor, prompts):
    decoded = []
    with torch.no_grad():
        policy.model.lm_head.weight[processor.stop_token_ids[0]] *= 3
    hook = policy.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: decoded.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    groups = engine.generate(prompts, 16, Sampling(max_new_tokens=6, seed=1))
    hook.remove()
    lengths = [len(r.token_ids) for r in rows(groups)]
    expected = [sum(length > step for length in lengths) for step in range(1, 6)]
    assert decoded[1:] == [n for n in expected if n]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_with_a_repetition_penalty_are_of_the_distribution_sampled_from(
    make_policy, processor, prompts, temperature
):
    """transformers' penalty before the temperature, also once other rows have ended."""
    policy = make_policy(suppress=True)
    with torch.no_grad():
        policy.model.lm_head.weight[processor.stop_token_ids[0]] *= 3
    sampling = Sampling(temperature, max_new_tokens=10, seed=2, repetition_penalty=1.3)
    groups = TransformersEngine(policy, processor, decode_batch_size=256).generate(prompts, 8, sampling)
    if temperature:
        assert len({len(rollout.token_ids) for rollout in rows(groups)}) > 2, "rows end together"
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group.rollouts[:3]:
            with torch.no_grad():
                inputs = plain_inputs(policy.model, prompt, rollout.token_ids)
                logits = policy.model(**inputs).logits[0].float()
            expected = []
            for k, token in enumerate(rollout.token_ids):
                end = len(prompt.input_ids) + k
                [scores] = penalty(inputs["input_ids"][:, :end], logits[None, end - 1])
                scores[list(processor.suppressed_token_ids)] = -torch.inf
                expected.append(float((scores / (temperature or 1.0)).log_softmax(-1)[token]))
            assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_repetition_penalty_of_1_computes_nothing(engine, prompts, monkeypatch):
    plain = engine.generate(prompts, 2, Sampling(max_new_tokens=6, seed=5))
    monkeypatch.setattr("spark_vl.rollout.transformers_engine.penalized", None)
    assert engine.generate(prompts, 2, Sampling(max_new_tokens=6, seed=5, repetition_penalty=1.0)) == plain


def test_nucleus_keeps_the_smallest_set():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert nucleus(probs, 0.7).tolist() == [
        pytest.approx([0, 0.5, 0, 0.25]),
        pytest.approx([0.97, 0, 0, 0]),
    ]
