"""Figures of benchmarks that group their problems: by version or category, steps of one problem, variants of one.

All take pairs of a record and the score of its completion, in [0, 1], one completion a record. A score counts as right
if it is 1. Records say by their tags what belongs together (`Recipe.tags`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from spark_vl.evaluation.bootstrap import bootstrap_figures
from spark_vl.evaluation.figures import Estimate, estimate, macro_mean
from spark_vl.records import PromptRecord

Scored = tuple[PromptRecord, float]
"""A record, and the score of the completion to it."""

CLUSTERS = ("problem", "seed")
"""Tags of problems that are asked several times: in parts, in versions, as variants."""

MOST_VALUES = 50
"""A tag with more values names single problems; its accuracies are not listed."""


def by_tag(scored: Iterable[Scored], tag: str) -> dict[str, Estimate]:
    """The mean score for each value of a tag, in the order in which they first occur; of records that have it."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record, score in scored:
        if (value := dict(record.tags).get(tag)) is not None:
            groups[value].append(score)
    return {value: estimate(fmean(scores), len(scores)) for value, scores in groups.items()}


def wemath(scored: Iterable[Scored]) -> dict[str, Estimate]:
    """The scores of We-Math (arXiv 2407.01284, and its `evaluation/four_dimensional_metrics.py`).

    A composed problem, whose steps are asked as well, is one of these, by which of them are answered right:

    | itself | steps | |
    |---|---|---|
    | right | all right; loose: one right | complete mastery, 1 point |
    | right | one wrong; loose: all wrong | rote memorization, 0 points |
    | wrong | all right | inadequate generalization, half a point |
    | wrong | one wrong | insufficient knowledge, 0 points |

    `strict` and `loose` are the mean points, officially (525 − 0.5·IG − RM − IK) / 525; the same where all 525
    problems are there. Beside them are the shares of the four, and the accuracies `one_step`, `two_steps` and
    `three_steps`. A problem of which a row is missing is left out of all but these, and counts in `incomplete`.

    Args:
        scored: records with the tags `problem`, and `step`: `2steps_1`, …, `3steps_multi`.

    Raises:
        ValueError: a record has other tags, or there is no complete problem.
    """
    problems: dict[str, dict[str, bool]] = defaultdict(dict)
    steps: dict[str, list[float]] = defaultdict(list)
    for record, score in scored:
        tags = dict(record.tags)
        problem, step = tags.get("problem"), tags.get("step", "")
        if problem is None or step not in _STEPS:
            raise ValueError(f"{record.id}: tags: found {tags}; allowed: problem, and step with {', '.join(_STEPS)}")
        if step in problems[problem]:
            raise ValueError(f"{record.id}: problem {problem} has two rows {step}")
        problems[problem][step] = is_right(score)
        steps[_STEPS[step]].append(score)
    kinds: Counter[str] = Counter()
    points: dict[str, list[float]] = {"strict": [], "loose": []}
    for answers in problems.values():
        parts = next(iter(answers)).partition("_")[0]
        expected = {step for step in _STEPS if step.startswith(f"{parts}_")}
        if set(answers) != expected:
            continue
        whole = answers.pop(f"{parts}_multi")
        every, some = all(answers.values()), any(answers.values())
        if whole:
            kinds["complete_mastery_strict" if every else "rote_memorization_strict"] += 1
            kinds["complete_mastery_loose" if some else "rote_memorization_loose"] += 1
        else:
            kinds["inadequate_generalization" if every else "insufficient_knowledge"] += 1
        points["strict"].append(every * (1.0 if whole else 0.5))
        points["loose"].append(float(some) if whole else every * 0.5)
    complete = len(points["strict"])
    if not complete:
        raise ValueError("no problem of We-Math has all its rows")
    return {
        **{rule: estimate(fmean(each), complete) for rule, each in points.items()},
        **{name: estimate(kinds[name] / complete, complete) for name in _KINDS},
        **{
            name: estimate(fmean(steps[name]), len(steps[name]))
            for name in dict.fromkeys(_STEPS.values())
            if steps[name]
        },
        "incomplete": estimate(1 - complete / len(problems), len(problems)),
    }


_STEPS = {
    **{f"{parts}steps_{step}": "one_step" for parts in (2, 3) for step in range(1, parts + 1)},
    "2steps_multi": "two_steps",
    "3steps_multi": "three_steps",
}
_KINDS = (
    *("insufficient_knowledge", "inadequate_generalization", "complete_mastery_strict", "complete_mastery_loose"),
    *("rote_memorization_strict", "rote_memorization_loose"),
)

VARIANTS = 10
"""Of each seed question of DynaMath."""


def dynamath(scored: Iterable[Scored], variants: int = VARIANTS) -> dict[str, Estimate]:
    """`average`, the accuracy over all rows, and `worst`, the share of seed questions all of whose variants are right
    (arXiv 2411.00836). The interval of `average` counts seeds, since variants of one are not independent. A seed with
    another number of variants is left out of `worst`, and is counted in `incomplete`.

    Args:
        scored: records with the tag `seed`.
        variants: of each seed.

    Raises:
        ValueError: a record has no such tag, or there is no complete seed.
    """
    seeds: dict[str, list[float]] = defaultdict(list)
    for record, score in scored:
        if (seed := dict(record.tags).get("seed")) is None:
            raise ValueError(f"{record.id}: tags: found {dict(record.tags)}; allowed: seed")
        seeds[seed].append(score)
    complete = [scores for scores in seeds.values() if len(scores) == variants]
    if not complete:
        raise ValueError(f"no seed of DynaMath has {variants} variants")
    return {
        "average": estimate(fmean(score for scores in seeds.values() for score in scores), len(seeds)),
        "worst": estimate(fmean(all(map(is_right, scores)) for scores in complete), len(complete)),
        "incomplete": estimate(1 - len(complete) / len(seeds), len(seeds)),
    }


def mathverse(scored: Iterable[Scored]) -> dict[str, Estimate]:
    """`versions`, the mean of the accuracies by version, each with the same weight: the overall accuracy of MathVerse
    (arXiv 2403.14624). Where all rows are asked it is the accuracy over all of them."""
    return {"versions": macro_mean(list(by_tag(scored, "version").values()))}


def mmbench(scored: Iterable[Scored]) -> dict[str, Estimate]:
    """`circular`, the share of questions that are answered right in each order of their options, which is the official
    figure (arXiv 2307.06281), and `vanilla`, the accuracy in the first order. A question has as many rows as options;
    one with fewer is left out of `circular`, and is counted in `incomplete`.

    Args:
        scored: records with the tags `question` and `rotation`, and their choices.

    Raises:
        ValueError: a record has no such tags, or there is no complete question.
    """
    questions: dict[str, list[Scored]] = defaultdict(list)
    first: list[float] = []
    for record, score in scored:
        question, rotation = _tags(record, "question", "rotation")
        questions[question].append((record, score))
        if rotation == "0":
            first.append(score)
    complete = [of for of in questions.values() if len(of) == len(of[0][0].choices)]
    if not complete:
        raise ValueError("no question of MMBench has a row for each order of its options")
    right = [all(is_right(score) for _, score in of) for of in complete]
    return {
        "circular": estimate(fmean(right), len(right)),
        **({"vanilla": estimate(fmean(first), len(first))} if first else {}),
        "incomplete": estimate(1 - len(complete) / len(questions), len(questions)),
    }


def pope(scored: Iterable[Scored]) -> dict[str, Estimate]:
    """`precision`, `recall` and `f1` of the answer yes, and the share of `yes` (arXiv 2305.10355). A reply that cannot
    be read counts as the wrong answer; the authors' script takes it for yes. A figure whose denominator is 0 is left
    out. Intervals are bootstrapped.

    Args:
        scored: records whose gold is yes or no.

    Raises:
        ValueError: a gold is another, or there are no records.
    """
    items: dict[str, tuple[bool, bool]] = {}
    for record, score in scored:
        if record.gold not in ("yes", "no"):
            raise ValueError(f"{record.id}: gold: found {record.gold!r:.80}; allowed: yes, no")
        gold = record.gold == "yes"
        items[f"{len(items)}"] = gold, gold == is_right(score)
    return bootstrap_figures(items, _yes_no)


def _yes_no(answers: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Of pairs: whether yes is right, whether it was said."""
    counts = Counter(answers)
    both = counts[True, True]
    said, right = both + counts[False, True], both + counts[True, False]
    figures = {"yes": said / len(answers)}
    if said:
        figures["precision"] = both / said
    if right:
        figures["recall"] = both / right
    if said + right:
        figures["f1"] = 2 * both / (said + right)
    return figures


def hallusionbench(scored: Iterable[Scored]) -> dict[str, Estimate]:
    """The accuracies of HallusionBench (arXiv 2310.14566): `all` (aAcc), `figures` (fAcc) and `questions` (qAcc), the
    shares of figures, and of questions of a set, all of whose rows are right, and `average`, the mean of the three.

    Args:
        scored: records with the tags `figure` and `question`.

    Raises:
        ValueError: a record has no such tags, or there are no records.
    """
    groups: dict[str, dict[str, list[bool]]] = {"figures": defaultdict(list), "questions": defaultdict(list)}
    rights: list[bool] = []
    for record, score in scored:
        rights.append(is_right(score))
        for group, name in zip(groups.values(), _tags(record, "figure", "question"), strict=True):
            group[name].append(rights[-1])
    if not rights:
        raise ValueError("there are no records")
    found = {"all": estimate(fmean(rights), len(rights))}
    found |= {name: estimate(fmean(map(all, group.values())), len(group)) for name, group in groups.items()}
    # They share their rows. The mean of their bounds is wide enough however strongly they are correlated.
    average = {bound: fmean(each[bound] for each in found.values()) for bound in ("value", "low", "high")}
    return found | {"average": average | {"n": len(rights)}}


def _tags(record: PromptRecord, *names: str) -> list[str]:
    tags = dict(record.tags)
    if missing := [name for name in names if name not in tags]:
        raise ValueError(f"{record.id}: tags: found {tags}; {', '.join(missing)} is missing")
    return [tags[name] for name in names]


OFFICIAL: Mapping[str, Callable[[Sequence[Scored]], dict[str, Estimate]]] = {
    "wemath": wemath,
    "dynamath": dynamath,
    "mathverse": mathverse,
    "mmbench": mmbench,
    "pope": pope,
    "hallusionbench": hallusionbench,
}
"""Recipe → its official figures, where they are not the accuracy over all rows."""


def figures(recipe: str, scored: Sequence[Scored]) -> dict[str, Estimate]:
    """The official figures of a recipe, if it has any of its own, and the accuracy for each value of each tag, as
    `version=Vision Only`; tags with more than `MOST_VALUES` values are left out, and so are `CLUSTERS`.

    Args:
        recipe: its name.
        scored: of that recipe alone.

    Raises:
        ValueError: the figures of the recipe are not defined for these (see `OFFICIAL`).
    """
    found = OFFICIAL[recipe](scored) if recipe in OFFICIAL else {}
    for tag in dict.fromkeys(name for record, _ in scored for name, _ in record.tags):
        values = by_tag(scored, tag)
        if tag not in CLUSTERS and len(values) <= MOST_VALUES:
            found |= {f"{tag}={value}": accuracy for value, accuracy in values.items()}
    return found


def is_right(score: float) -> bool:
    """Whether a score says right, to 1e-6 (see `Verdict.is_correct`)."""
    return score > 1 - 1e-6
