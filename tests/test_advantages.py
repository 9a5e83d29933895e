from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from spark_vl.advantages import group_advantages


def test_by_hand():
    # mean 1/4, deviations 3/4 and three times -1/4: sample variance (9 + 3)/16/3 = 1/4
    assert group_advantages([1, 0, 0, 0], [1, 0, 0, 0], normalize=False) == [0.75, -0.25, -0.25, -0.25]
    expected = [a / (0.5 + 1e-4) for a in (0.75, -0.25, -0.25, -0.25)]
    assert group_advantages([1, 0, 0, 0], [1, 0, 0, 0], normalize=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [0.0] * 7, [0.3], []])
def test_equal_rewards_give_exact_zeros(rewards, normalize):
    assert group_advantages(rewards, rewards, normalize=normalize) == [0.0] * len(rewards)


@given(st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), min_size=2, max_size=64))
def test_is_what_trl_computes(rewards):
    tensor = torch.tensor(rewards, dtype=torch.float64)
    expected = (tensor - tensor.mean()) / (nanstd(tensor) + 1e-4)
    found = group_advantages(rewards, rewards, normalize=True)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)  # TRL's own correction is in float32
    assert math.isclose(sum(found), 0, abs_tol=1e-9)


def test_shaping_is_divided_by_the_deviation_of_the_correctness():
    # The mean of 1.1, 0.1, 0 and 0 is 0.3; the deviation of 1, 0, 0, 0 is 1/2, as above.
    expected = [a / (0.5 + 1e-4) for a in (0.8, -0.2, -0.3, -0.3)]
    assert group_advantages([1.1, 0.1, 0, 0], [1, 0, 0, 0], normalize=True) == pytest.approx(expected, rel=1e-12)
    assert group_advantages([1.1, 0.1, 0, 0], [1, 0, 0, 0], normalize=False) == pytest.approx([0.8, -0.2, -0.3, -0.3])
    weighted = [a / (1.0 + 1e-4) for a in (1.6, -0.4, -0.6, -0.6)]  # all twice as large
    assert group_advantages([2.2, 0.2, 0, 0], [2, 0, 0, 0], normalize=True) == pytest.approx(weighted, rel=1e-12)


same = st.lists(st.sampled_from([0.0, 0.002, 0.005, 0.01]), min_size=2, max_size=16)


@given(same, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_where_all_are_right_or_wrong_shaping_counts_as_it_is(shaping, score, normalize):
    rewards = [score + value for value in shaping]
    found = group_advantages(rewards, [score] * len(rewards), normalize=normalize)
    mean = sum(shaping) / len(shaping)
    assert found == pytest.approx([value - mean for value in shaping], abs=1e-12)
    assert max(map(abs, found)) <= 0.01


@given(same, st.randoms())
def test_scores_that_hardly_differ_do_not_blow_shaping_up(shaping, rng):
    """Such as the IoU of boxes that are all nearly right."""
    scores = [0.9 + 1e-6 * rng.random() for _ in shaping]
    rewards = [score + value for score, value in zip(scores, shaping, strict=True)]
    if len(set(shaping)) > 1:
        assert max(map(abs, group_advantages(rewards, scores, normalize=True))) <= 0.0101


@given(st.lists(st.integers(0, 1), min_size=2, max_size=16), st.randoms())
def test_follows_its_reward_wherever_it_stands(rewards, rng):
    order = rng.sample(range(len(rewards)), len(rewards))
    for normalize in (True, False):
        advantages = group_advantages(rewards, rewards, normalize=normalize)
        moved = [rewards[i] for i in order]
        shuffled = group_advantages(moved, moved, normalize=normalize)
        assert shuffled == pytest.approx([advantages[i] for i in order], abs=1e-12)
