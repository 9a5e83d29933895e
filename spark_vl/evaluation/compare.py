"""Two evaluations on the same items: how far apart they are, whether that may be chance, and which items changed.

Items are paired, since most of the variance is between items: an interval of the difference is much narrower than the
difference of two intervals suggests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from spark_vl.config import differences, flat, read_config
from spark_vl.evaluation import preferences
from spark_vl.evaluation.benchmarks import CLUSTERS
from spark_vl.evaluation.bootstrap import interval
from spark_vl.evaluation.results import Line
from spark_vl.run.jsonl import read_lines
from spark_vl.run.paths import CONFIG

RESAMPLES = 10_000
_AT_ONCE = 2**22
"""Draws that are held in memory at a time."""

Values = Mapping[str, Mapping[str, float]]
"""Recipe → item → its value in [0, 1]."""


@dataclass(frozen=True)
class Difference:
    """How much better B is than A on the items that both have."""

    n: int
    """Items in both."""
    only_a: int
    only_b: int
    """Items that the other evaluation lacks; nothing here counts them."""
    a: float
    b: float
    """The means over the items in both."""
    difference: float
    """b - a."""
    low: float
    high: float
    """Bounds of its 95 % percentile interval over resampled items, pairs kept together."""
    p: float
    """Of `test`, two-sided: how often a difference at least as large comes about if A and B are equally good."""
    test: Literal["mcnemar", "sign_flip"]
    """`mcnemar`: exact (Q. McNemar, Psychometrika 12, 1947), for values of 0 and 1 of independent items. `sign_flip`: a
    permutation test, in which A and B change places at random in each item or cluster."""
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    """Items with a higher, and with a lower value in B."""


@dataclass(frozen=True)
class Comparison:
    """Of two evaluations."""

    recipes: Mapping[str, Difference]
    """Of each recipe that has items in both."""
    macro: Difference
    """Of the means over these recipes, each with the same weight; items and counts are those of all."""
    apart: Mapping[str, tuple[int, int]]
    """Recipes without a common item → their items in A, and in B."""


def compare(
    a: Values, b: Values, clusters: Mapping[str, str] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare evaluation B with A. The same arguments give the same numbers.

    Args:
        clusters: item → its cluster: items of a recipe that are not independent, such as the variants of one problem,
            and are resampled and exchanged as a whole. Items that it does not name stand alone.
        resamples: of the interval and of the permutation test.
        seed: of both.

    Raises:
        ValueError: a value is not in [0, 1], or no recipe has an item in both.
    """
    clusters = clusters or {}
    recipes: dict[str, Difference] = {}
    apart: dict[str, tuple[int, int]] = {}
    drawn: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    for recipe in dict.fromkeys([*a, *b]):
        of_a, of_b = a.get(recipe, {}), b.get(recipe, {})
        for item, value in chain(of_a.items(), of_b.items()):
            if not 0 <= value <= 1:
                raise ValueError(f"{item}: the value is {value}; 0 to 1 is allowed")
        both = [item for item in of_a if item in of_b]
        if not both:
            apart[recipe] = (len(of_a), len(of_b))
            continue
        rng = np.random.default_rng([seed, *recipe.encode()])  # a recipe's numbers do not depend on the others
        sums, sizes = _by_cluster([of_b[item] - of_a[item] for item in both], [clusters.get(i, i) for i in both])
        drawn.append(_resampled(sums, sizes, resamples, rng))
        gains.append(sums / len(both))
        gained = tuple(item for item in both if of_b[item] > of_a[item])
        lost = tuple(item for item in both if of_b[item] < of_a[item])
        is_binary = {*map(of_a.__getitem__, both), *map(of_b.__getitem__, both)} <= {0, 1}
        alone = len(sizes) == len(both)
        low, high = interval(drawn[-1])
        recipes[recipe] = Difference(
            n=len(both),
            only_a=len(of_a) - len(both),
            only_b=len(of_b) - len(both),
            a=fmean(of_a[item] for item in both),
            b=fmean(of_b[item] for item in both),
            difference=float(sums.sum() / len(both)),
            low=low,
            high=high,
            p=mcnemar(len(gained), len(lost)) if is_binary and alone else _sign_flip(gains[-1], resamples, rng),
            test="mcnemar" if is_binary and alone else "sign_flip",
            gained=gained,
            lost=lost,
        )
    if not recipes:
        raise ValueError(f"the evaluations have no item in common: {', '.join(apart) or 'both are empty'}")
    macro = _macro(list(recipes.values()), drawn, gains, resamples, np.random.default_rng(seed))
    return Comparison(recipes, macro, apart)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: of so many items that changed, each direction is a fair coin."""
    changed, term, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):  # term is the binomial coefficient of `changed` and k
        tail += term
        term = term * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2**changed)


def _macro(
    parts: Sequence[Difference],
    drawn: Sequence[np.ndarray],
    gains: Sequence[np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> Difference:
    low, high = interval(np.mean(drawn, axis=0))
    return Difference(
        n=sum(part.n for part in parts),
        only_a=sum(part.only_a for part in parts),
        only_b=sum(part.only_b for part in parts),
        a=fmean(part.a for part in parts),
        b=fmean(part.b for part in parts),
        difference=fmean(part.difference for part in parts),
        low=low,
        high=high,
        p=_sign_flip(np.concatenate(gains) / len(parts), resamples, rng),
        test="sign_flip",
        gained=tuple(chain.from_iterable(part.gained for part in parts)),
        lost=tuple(chain.from_iterable(part.lost for part in parts)),
    )


def _by_cluster(differences: Sequence[float], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each cluster the sum of its items' differences, and how many they are: [C] each."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    which = [places[name] for name in names]
    return np.bincount(which, differences), np.bincount(which)


def _resampled(sums: np.ndarray, sizes: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The mean difference of items in clusters that are drawn with replacement, [R].

    How often clusters that are alike are drawn is all that counts, and scores of 0 and 1 make three kinds of them.
    """
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    drawn = np.concatenate(
        [rng.multinomial(len(sums), counts / len(sums), size=rows) @ kinds for rows in _portions(resamples, len(kinds))]
    )
    return drawn[:, 0] / drawn[:, 1]


def _sign_flip(gains: np.ndarray, resamples: int, rng: np.random.Generator) -> float:
    """The share of random signs of `gains`, [C], with which their sum is at least as far from 0; the signs that they
    have are one of them, so that it is never 0. As above, those of one size are drawn together."""
    sizes, counts = np.unique(np.abs(gains[gains != 0]), return_counts=True)
    least = abs(gains.sum()) - 1e-12  # sums of the same numbers differ by rounding
    as_far = 0
    for rows in _portions(resamples, max(1, len(sizes))):
        positive = rng.binomial(counts, 0.5, size=(rows, len(sizes)))
        as_far += int((np.abs((2 * positive - counts) @ sizes) >= least).sum())
    return (1 + as_far) / (1 + resamples)


def _portions(resamples: int, width: int) -> Iterator[int]:
    """How many resamples, of `width` draws each, are held at a time."""
    while resamples > 0:
        rows = min(resamples, max(1, _AT_ONCE // width))
        yield rows
        resamples -= rows


# ── of what was asked ──


def values_of(lines: Sequence[Line]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """What `compare` takes of the lines of `samples.jsonl`: values, and clusters.

    The value of a problem is the score of its greedy answer; that of two answers to compare is the share of the orders
    in which the better one was picked. Rows that could not be asked have none.
    """
    values: dict[str, dict[str, float]] = defaultdict(dict)
    clusters: dict[str, str] = {}
    for line in lines:
        if "unusable" in line:
            continue
        if line.get("ask") == "pairwise":
            values[line["recipe"]][line["id"]] = preferences.value(line)
        if group := _greedy(line):
            values[line["recipe"]][line["id"]] = fmean(each["score"] for each in group["completions"])
            for name in CLUSTERS:
                if name in group["tags"]:
                    clusters[line["id"]] = f"{line['recipe']}/{group['tags'][name]}"
    return dict(values), clusters


def _greedy(line: Line) -> dict[str, Any]:
    """The greedy answer of the problem itself, not those of the prompts about it; {}: the line is of no problem."""
    groups = line.get("groups", {}).get("greedy", ())
    return next((group for group in groups if group["id"] == line["id"]), {})


def changes(comparison: Comparison, a: Sequence[Line], b: Sequence[Line]) -> list[dict[str, Any]]:
    """The items that changed, as they were answered: `recipe`, `id`, `change`, and of problems `gold`, `a` and `b`."""
    of_a, of_b = ({line["id"]: _greedy(line) for line in lines} for lines in (a, b))

    def changed(recipe: str, item: str, change: str) -> dict[str, Any]:
        found = {"recipe": recipe, "id": item, "change": change}
        if before := of_a[item]:
            answers = [group["completions"][0]["parsed"] for group in (before, of_b[item])]
            found |= {"gold": before["gold"], "a": answers[0], "b": answers[1]}
        return found

    return [
        changed(recipe, item, change)
        for recipe, difference in comparison.recipes.items()
        for change, items in (("gained", difference.gained), ("lost", difference.lost))
        for item in items
    ]


def different_settings(a: Path, b: Path) -> list[str]:
    """How two evaluations in folders were asked otherwise, a line for each setting: what is compared are not the models
    alone then.

    Raises:
        ConfigError: a folder has no configuration.
    """
    changed = differences(*(flat(read_config(folder / CONFIG)) for folder in (a, b)), free=_OF_MODEL)
    return [f"{name}: {of_a!r} in A, {of_b!r} in B" for name, (of_a, of_b) in changed.items()]


_OF_MODEL = (
    *("output", "model.path", "model.revision"),
    *("rollout.openai", "rollout.decode_batch_size", "verifier.workers"),
)
"""Settings that say which model was asked, or change no answer."""


def compare_evaluations(a: Path, b: Path) -> tuple[Comparison, tuple[list[Line], list[Line]]]:
    """The comparison of two evaluations in folders, and the lines of both.

    Raises:
        ValueError: a folder has no answers, or they have no item in common.
    """
    lines = []
    for folder in (a, b):
        if not (file := folder / "samples.jsonl").is_file():
            raise ValueError(f"{folder} has no samples.jsonl; the evaluation was not finished")
        lines.append(read_lines(file))
    (of_a, clusters), (of_b, _) = map(values_of, lines)
    return compare(of_a, of_b, clusters), (lines[0], lines[1])
