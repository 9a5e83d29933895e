"""The learning rate over the optimizer updates of a run."""

from __future__ import annotations

from math import ceil, cos, pi

from spark_vl.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, update: int, updates: int) -> float:
    """The learning rate of one optimizer update: a linear warm-up from 0, then `settings.schedule`.

    The curves are those of transformers' `get_scheduler`. There is no counter: an update that is left out because there
    are no completions for it, or skipped because it is not finite, delays nothing.

    Args:
        settings: `lr`, `warmup_updates`, `schedule` and `min_lr_ratio`.
        update: its place in the plan of the run, from 0. `updates` gives the end of the curve.
        updates: how many optimizer updates the run plans.
    """
    share = settings.warmup_updates
    warmup = ceil(share * updates) if share < 1 else int(share)
    if update < warmup:
        return settings.lr * update / warmup
    done = (update - warmup) / max(1, updates - warmup)
    match settings.schedule:
        case "constant":
            return settings.lr
        case "linear":
            return settings.lr * (1 - done)
        case "cosine":
            floor = settings.min_lr_ratio
            return settings.lr * (floor + (1 - floor) * (1 + cos(pi * done)) / 2)
