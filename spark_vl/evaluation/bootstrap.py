"""Intervals of any figure, by drawing its items again (B. Efron, Annals of Statistics 7, 1979)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spark_vl.evaluation.figures import Estimate

Figures = Callable[[Sequence[Any]], Mapping[str, float]]
"""Items → figures of them by name. One that some items do not define is left out."""


def bootstrap(
    items: Mapping[str, Any],
    statistic: Callable[[Sequence[Any]], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`statistic` of the items, with the 95 % percentile interval of its values on items drawn with replacement.

    With fewer than about 30 items the interval is too narrow.

    Args:
        items: id → what `statistic` takes of it: a value, a list of judgments, all variants of a problem, … It is drawn
            as a whole. Ids do not matter.
        statistic: takes a list, in which an item may stand several times.
        seed: of the draws.

    Raises:
        ValueError: there are no items, or whatever `statistic` raises.
    """
    return bootstrap_figures(items, lambda drawn: {"": statistic(drawn)}, resamples=resamples, seed=seed)[""]


def bootstrap_figures(
    items: Mapping[str, Any], statistic: Figures, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """As `bootstrap`, of several figures on the same draws. An interval counts the draws that define its figure."""
    held = list(items.values())
    if not held:
        raise ValueError("there are no items to draw from")
    values = statistic(held)
    drawn: dict[str, list[float]] = defaultdict(list)
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        for name, value in statistic([held[place] for place in rng.integers(len(held), size=len(held))]).items():
            drawn[name].append(value)
    return {name: _estimate(value, drawn[name], len(held)) for name, value in values.items()}


def _estimate(value: float, drawn: Sequence[float], n: int) -> Estimate:
    low, high = interval(np.array(drawn)) if drawn else (value, value)
    return {"value": value, "low": low, "high": high, "n": n}


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a figure's values `drawn`, [R]."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)
