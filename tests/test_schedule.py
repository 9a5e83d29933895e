"""The learning rate of each planned update, against transformers' schedules and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from spark_vl.config import OptimizerConfig
from spark_vl.policy.schedule import learning_rate

LR = 3e-4


def curve(updates: int, **settings) -> list[float]:
    """The learning rates of a whole run, and the end of the curve."""
    config = OptimizerConfig(lr=LR, **settings)
    return [learning_rate(config, update, updates) for update in range(updates + 1)]


def transformers_curve(name: str, updates: int, warmup: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = get_scheduler(name, optimizer, warmup, updates, settings)
    rates = []
    for _ in range(updates + 1):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 3, 16, 20])
@pytest.mark.parametrize(
    ("settings", "name", "theirs"),
    [
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
def test_curves_are_those_of_transformers(settings, name, theirs, warmup):
    found = curve(17, warmup_updates=warmup, **settings)
    assert found == pytest.approx(transformers_curve(name, 17, warmup, **theirs), rel=1e-12, abs=1e-18)


def test_by_hand():
    rates = [0, LR / 2, LR, LR * 0.55, LR * 0.1]  # 2 of 6 updates warm up; half-way between 1 and 0.1 is 0.55
    found = curve(6, schedule="cosine", min_lr_ratio=0.1, warmup_updates=2)
    assert [found[i] for i in (0, 1, 2, 4, 6)] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize(("share", "updates", "warmup"), [(0.03, 100, 3), (0.03, 101, 4), (0.5, 3, 2), (0.0, 100, 0)])
def test_a_warm_up_below_1_is_a_share_of_the_updates_rounded_up(share, updates, warmup):
    assert curve(updates, warmup_updates=share) == curve(updates, warmup_updates=warmup)
