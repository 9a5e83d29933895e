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
    assert group_advantages([1, 0, 0, 0], normalize=False) == [0.75, -0.25, -0.25, -0.25]
    expected = [a / (0.5 + 1e-4) for a in (0.75, -0.25, -0.25, -0.25)]
    assert group_advantages([1, 0, 0, 0], normalize=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [0.0] * 7, [0.3], []])
def test_equal_rewards_give_exact_zeros(rewards, normalize):
    assert group_advantages(rewards, normalize=normalize) == [0.0] * len(rewards)


@given(st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), min_size=2, max_size=64))
def test_is_what_trl_computes(rewards):
    tensor = torch.tensor(rewards, dtype=torch.float64)
    expected = (tensor - tensor.mean()) / (nanstd(tensor) + 1e-4)
    found = group_advantages(rewards, normalize=True)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)  # TRL's own correction is in float32
    assert math.isclose(sum(found), 0, abs_tol=1e-9)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=16), st.randoms())
def test_follows_its_reward_wherever_it_stands(rewards, rng):
    order = rng.sample(range(len(rewards)), len(rewards))
    for normalize in (True, False):
        advantages = group_advantages(rewards, normalize=normalize)
        shuffled = group_advantages([rewards[i] for i in order], normalize=normalize)
        assert shuffled == pytest.approx([advantages[i] for i in order], abs=1e-12)
