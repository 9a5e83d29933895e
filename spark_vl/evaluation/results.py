"""The lines of `samples.jsonl` → the figures of an evaluation."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import comb, inf, sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

from spark_vl.evaluation import benchmarks, preferences
from spark_vl.evaluation.evaluator import majority, tokens_spent, voters
from spark_vl.evaluation.figures import Estimate, estimate, figures_of, joined
from spark_vl.evaluation.samples import Groups, groups_from_json, merged
from spark_vl.records import RolloutGroup
from spark_vl.verifiers import VERIFIERS

logger = logging.getLogger(__name__)

Line = dict[str, Any]
"""Of `samples.jsonl`: `recipe` and `row`, `id`, and `groups` (a problem), `ask` with replies (answers to compare), or
`unusable`, the reason why it could not be asked."""


def key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    """What was asked: no two lines of an evaluation have the same."""
    return line["recipe"], line["row"], line.get("ask", "")


def unique(lines: Iterable[Line]) -> list[Line]:
    """The first line of each `key`: a kill while files are put together leaves some twice."""
    return list({key(line): line for line in reversed(list(lines))}.values())[::-1]


def results(lines: Sequence[Line], own: Collection[str] = ()) -> dict[str, Estimate]:
    """The figures of an evaluation: with several recipes as `joined` says.

    Of problems those of `figures.score`, `benchmarks.figures` and `sample_figures`; of answers to compare those of
    `preferences.figures`; `unusable`, the share of rows that could not be asked. Official figures, those of single
    categories, and tokens are of one recipe and have no macro mean.

    Args:
        own: verifiers of the user's that lines may name, as `module:function`.
    """
    by_recipe: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_recipe[line["recipe"]].append(line)
    shared: dict[str, dict[str, Estimate]] = {}
    single: dict[str, dict[str, Estimate]] = {}
    for recipe, of_recipe in by_recipe.items():
        used = [line for line in of_recipe if "unusable" not in line]
        asked = [line for line in used if "ask" in line]
        groups = merged(groups_from_json(line["groups"], {*VERIFIERS, *own}) for line in used if "groups" in line)
        found = figures_of(groups) | (preferences.figures(recipe, asked) if asked else {})
        unusable = {key(line)[:2] for line in of_recipe if "unusable" in line or "error" in line}
        rows = {key(line)[:2] for line in of_recipe}
        found["unusable"] = estimate(len(unusable) / len(rows), len(rows))
        shared[recipe] = {name: figure for name, figure in found.items() if not _is_single(name)}
        single[recipe] = {name: figure for name, figure in found.items() if _is_single(name)}
        single[recipe] |= official(recipe, groups) | sample_figures(groups)
    one = len(by_recipe) == 1
    rest = {name if one else f"{recipe}/{name}": figure for recipe, of in single.items() for name, figure in of.items()}
    return joined(shared) | rest if shared else {}


def _is_single(name: str) -> bool:
    """Whether a figure of a judge is of this recipe alone: of a category, or the official one."""
    return "=" in name or "official" in name


def official(recipe: str, groups: Groups) -> dict[str, Estimate]:
    """`benchmarks.figures` of the greedy answers; without, and a warning, where rows are missing that they need."""
    scored = [(g.record, g.scores[0]) for g in groups.get("greedy", ()) if g.record.kind == "problem"]
    try:
        return benchmarks.figures(recipe, scored) if scored else {}
    except ValueError as error:
        logger.warning("%s: no official figure: %s", recipe, error)
        return {}


def sample_figures(groups: Groups) -> dict[str, Estimate]:
    """Figures of what was sampled for each problem.

    | name | |
    |---|---|
    | `pass@k` | share of problems that one of k samples solves: the mean over all choices of k (arXiv 2107.03374) |
    | `majority@k` | accuracy of the answer that most of all k samples give |
    | `tokens_greedy`, `tokens_sampled` | new tokens of a completion |
    | `tokens_test_time_reflection` | new tokens of a problem: answer, judgments and revisions |
    | `tokens_test_time_majority` | new tokens of the samples that vote with as many tokens |
    """

    def problems(mode: str) -> list[RolloutGroup]:
        return [group for group in groups.get(mode, ()) if group.record.kind == "problem"]

    found: dict[str, Estimate] = {}
    greedy, sampled = problems("greedy"), problems("sampled")
    if sampled:
        n = max(len(group.rollouts) for group in sampled)
        for k in sorted({2**power for power in range(1, n.bit_length())} | {n} - {1}):
            found[f"pass@{k}"] = estimate(fmean(pass_at(k, group) for group in sampled), len(sampled))
        right = [majority(group, inf).scores[0] for group in sampled]
        found[f"majority@{n}"] = estimate(fmean(right), len(sampled))
    for mode, of_mode in (("greedy", greedy), ("sampled", sampled)):
        if of_mode:
            lengths = [fmean(rollout.tokens for rollout in group.rollouts) for group in of_mode]
            found[f"tokens_{mode}"] = mean(lengths)
    if "test_time_steps" in groups and greedy:
        budget = [*greedy, *groups["test_time_steps"]]
        found["tokens_test_time_reflection"] = mean(tokens_spent(greedy, budget))
        votes = [
            sum(rollout.tokens for rollout in group.rollouts[: voters(group, spent)])
            for group, spent in zip(sampled, tokens_spent(sampled, budget), strict=True)
        ]
        if votes:
            found["tokens_test_time_majority"] = mean(votes)
    return found


def pass_at(k: int, group: RolloutGroup) -> float:
    """The chance that k of the group's n samples, drawn without replacement, hold a right one."""
    n, wrong = len(group.scores), sum(not benchmarks.is_right(score) for score in group.scores)
    return 1 - comb(wrong, k) / comb(n, k) if k <= n else float(wrong < n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of numbers of any size, with the 95 % interval of a normal distribution."""
    value = fmean(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return {"value": value, "low": value - half, "high": value + half, "n": len(values)}
