"""Verified completions → figures with intervals.

Every figure is a fraction, the mean over *problems*, and so is its `n`: the samples of a prompt and the prompts of a
problem (a right and a wrong answer, both orders) are not independent, and counting them as if they were would make the
intervals too narrow. Where a problem has several, its value is their mean. `pointwise_own` alone is the mean of two
such means, over the problems with a right answer and over those with a wrong one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import NormalDist, fmean

from spark_vl.records import PromptRecord, RecycledRecord, RolloutGroup

Estimate = dict[str, float]
"""`value`, the bounds `low` and `high` of its 95 % interval, and `n`."""

Measure = Callable[[Sequence[RolloutGroup]], float]
"""The groups of one problem → a value in [0, 1]."""


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share `value` among `n` (E. B. Wilson, JASA 22, 1927).

    For a mean of `n` values in [0, 1] it is conservative: no such mean varies more than a share does.
    """
    z = NormalDist().inv_cdf(0.975)
    center = value + z * z / (2 * n)
    half = z * sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # It always holds `value`; rounding would have it miss 0 and 1.
    return max(0.0, min(value, (center - half) / scale)), min(1.0, max(value, (center + half) / scale))


def estimate(value: float, n: int) -> Estimate:
    """A share or mean with its interval."""
    low, high = wilson(value, n)
    return {"value": value, "low": low, "high": high, "n": n}


def score(groups: Mapping[str, Sequence[RolloutGroup]]) -> dict[str, Estimate]:
    """The figures of one evaluation.

    With several recipes a plain name is their macro mean, and `recipe/name` the figure of one; a figure for which a
    recipe has no prompts is left out. All but the `_sampled` ones are of greedy completions. The prompts of a judgment
    dataset are what they are: its pointwise accuracy is balanced as far as its labels are.

    | name | |
    |---|---|
    | `reasoning_greedy`, `reasoning_sampled` | accuracy on problems |
    | `reasoning_unparsable` | share of problems in whose completion no answer is found (which is wrong, too) |
    | `reasoning_truncated` | share of problems whose completion was cut off; left out where none was |
    | `reasoning_failed` | share of problems whose verifier timed out or raised; left out where none did |
    | `pointwise_greedy`, `pointwise_sampled` | balanced accuracy: of each problem's gold and one wrong answer |
    | `pointwise_says_correct` | share of those verdicts that call the answer correct; .5 is right |
    | `pointwise_own` | balanced accuracy on the model's own sampled answers; left out if none is right, or none wrong |
    | `pointwise_own_pairs` | share judged right on both, of problems with a right and a wrong one; a coin has .25 |
    | `pairwise_greedy`, `pairwise_sampled` | accuracy, for each problem in both orders |
    | `pairwise_consistency` | share of problems with the same answer picked in both orders, of pairs asked in both |
    | `reflection_greedy`, `reflection_sampled` | accuracy where the prompt quotes a wrong answer: repairs |
    | `reflection_keeps` | accuracy where it quotes a right one |
    | `test_time_reflection` | accuracy on problems after the model has judged, and may have revised, its own answer |
    | `test_time_majority` | accuracy of the majority among as many samples as that took new tokens |

    Args:
        groups: verified groups by mode: `greedy`, `sampled`, `own_answers`, `test_time_reflection` and
            `test_time_majority`; those without any may be left out.
    """
    recipes = dict.fromkeys(group.record.recipe for mode in groups.values() for group in mode)
    by_recipe = {
        recipe: figures_of(
            {mode: [g for g in of_mode if g.record.recipe == recipe] for mode, of_mode in groups.items()}
        )
        for recipe in recipes
    }
    return joined(by_recipe)


def joined(by_recipe: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """The figures of several recipes: a plain name is the macro mean over those that have it, `recipe/name` the figure
    of one. Those of one recipe are what they are."""
    if len(by_recipe) == 1:
        found = dict(next(iter(by_recipe.values())))
    else:
        names = dict.fromkeys(name for figures in by_recipe.values() for name in figures)
        found = {name: macro_mean([f[name] for f in by_recipe.values() if name in f]) for name in names}
        found |= {f"{recipe}/{name}": figures[name] for recipe, figures in by_recipe.items() for name in figures}
    return {
        name: figure
        for name, figure in found.items()
        if figure["value"] > 0 or name.rpartition("/")[2] not in ("reasoning_truncated", "reasoning_failed")
    }


def figures_of(groups: Mapping[str, Sequence[RolloutGroup]]) -> dict[str, Estimate]:
    """The figures of one recipe, see `score`."""
    results: dict[str, Estimate] = {}
    groups = {**groups, "greedy, both orders": _both_orders(groups.get("greedy", ()))}

    def add(name: str, measure: Measure, mode: str, kind: str, quoted_correct: bool | None = None) -> None:
        problems = defaultdict(list)
        for group in groups.get(mode, ()):
            record = group.record
            if record.kind == kind and (quoted_correct is None or _quoted_correct(record) is quoted_correct):
                problems[record.parent_id].append(group)
        if problems:
            results[name] = estimate(fmean(map(measure, problems.values())), len(problems))

    add("reasoning_greedy", _accuracy, "greedy", "problem")
    add("reasoning_sampled", _accuracy, "sampled", "problem")
    add("reasoning_unparsable", _unparsable, "greedy", "problem")
    add("reasoning_truncated", _truncated, "greedy", "problem")
    add("reasoning_failed", _failed, "greedy", "problem")
    add("pointwise_greedy", _accuracy, "greedy", "pointwise")
    add("pointwise_sampled", _accuracy, "sampled", "pointwise")
    add("pointwise_says_correct", _says_correct, "greedy", "pointwise")
    results |= _own_answers(groups.get("own_answers", ()))
    add("pairwise_greedy", _accuracy, "greedy", "pairwise")
    add("pairwise_sampled", _accuracy, "sampled", "pairwise")
    add("pairwise_consistency", _consistency, "greedy, both orders", "pairwise")
    add("reflection_greedy", _accuracy, "greedy", "reflection", quoted_correct=False)
    add("reflection_sampled", _accuracy, "sampled", "reflection", quoted_correct=False)
    add("reflection_keeps", _accuracy, "greedy", "reflection", quoted_correct=True)
    add("test_time_reflection", _accuracy, "test_time_reflection", "problem")
    add("test_time_majority", _accuracy, "test_time_majority", "problem")
    return results


def _own_answers(judgments: Sequence[RolloutGroup]) -> dict[str, Estimate]:
    """`pointwise_own` and `pointwise_own_pairs`, of judgments of one right answer to a problem, one wrong, or both."""
    right, wrong = (
        {group.record.parent_id: _accuracy([group]) for group in judgments if _quoted_correct(group.record) is side}
        for side in (True, False)
    )
    results: dict[str, Estimate] = {}
    if right and wrong:
        sides = [estimate(fmean(side.values()), len(side)) for side in (right, wrong)]
        # The sides share problems. The mean of their bounds is wide enough however strongly they are correlated.
        results["pointwise_own"] = {bound: fmean(side[bound] for side in sides) for bound in ("value", "low", "high")}
        results["pointwise_own"]["n"] = len(right | wrong)
    if both := right.keys() & wrong.keys():
        results["pointwise_own_pairs"] = estimate(fmean(min(right[id], wrong[id]) for id in both), len(both))
    return results


def _both_orders(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The judgments of those pairs that are asked in both orders; those of a published dataset come in one."""
    pairs = defaultdict(list)
    for group in groups:
        record = group.record
        if isinstance(record, RecycledRecord) and record.kind == "pairwise":
            pairs[record.parent_id, record.origin.template, *sorted(record.origin.completions)].append(group)
    return [group for pair in pairs.values() if len({g.record.gold for g in pair}) == 2 for group in pair]


def _accuracy(groups: Sequence[RolloutGroup]) -> float:
    return fmean(score for group in groups for score in group.scores)


def _failed(groups: Sequence[RolloutGroup]) -> float:
    return fmean(verdict.status in ("timeout", "error") for group in groups for verdict in group.verdicts)


def _truncated(groups: Sequence[RolloutGroup]) -> float:
    return fmean(rollout.finish_reason == "length" for group in groups for rollout in group.rollouts)


def _unparsable(groups: Sequence[RolloutGroup]) -> float:
    return fmean(verdict.status == "unparsable" for group in groups for verdict in group.verdicts)


def _says_correct(groups: Sequence[RolloutGroup]) -> float:
    return fmean(
        verdict.parsed is not None and (verdict.score == 1) == _quoted_correct(group.record)
        for group in groups
        for verdict in group.verdicts
    )


def _quoted_correct(record: PromptRecord) -> bool | None:
    return record.origin.quoted_correct if isinstance(record, RecycledRecord) else None


def _consistency(groups: Sequence[RolloutGroup]) -> float:
    picks = {None if v.parsed is None else v.score for group in groups for v in group.verdicts}
    return float(len(picks) == 1 and None not in picks)


def macro_mean(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates. The distances to their bounds add up as standard errors do."""
    m, value = len(estimates), fmean(e["value"] for e in estimates)
    return {
        "value": value,
        "low": value - sqrt(sum((e["value"] - e["low"]) ** 2 for e in estimates)) / m,
        "high": value + sqrt(sum((e["high"] - e["value"]) ** 2 for e in estimates)) / m,
        "n": sum(e["n"] for e in estimates),
    }
