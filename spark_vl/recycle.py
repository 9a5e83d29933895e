"""Verified groups → judge and reflection prompts (arXiv 2509.22624, §3).

What is made from a group depends on its *evidence*: the rollouts that the model finished and that a verifier found
right (score 1) or wrong (score 0).

| evidence in the group | judge prompt | reflection prompt |
|---|---|---|
| only right answers | pointwise, gold "correct" | none, or one that quotes a right answer (below) |
| only wrong answers | pointwise, gold "incorrect" | quotes a wrong answer |
| both | `pairwise_share`: pairwise; the rest: pointwise, either side | quotes a wrong answer, or a right one (below) |

`correct_reflection_share` of the reflections quote a right answer, so that "change it" is not always right. With
`judge_reflections` the group of a reflection prompt also gives a pointwise prompt (on either side, if it has both).
Judge prompts are never recycled, and nothing is reflected on twice.

With `balance_labels` the gold labels "correct" and "incorrect" of a step's pointwise prompts differ by one at most:
groups with both sides take the side that is missing, and what is still in excess of one label is left out. Otherwise a
policy that solves most problems would teach its judge to say "correct".

Not evidence, but counted: rollouts cut off by the length limit (unless `recycle_truncated`), rollouts whose
verification timed out or failed, and rollouts with a partial score. A finished rollout in which no answer was found is
evidence of a wrong answer; without a box it has no final answer to quote, so only prompts that show the whole
completion can use it.

All random draws depend on (seed, step, id of the record) alone: the order of the groups does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

from spark_vl.answers import last_boxed
from spark_vl.config import RecycleConfig
from spark_vl.prompts.templater import Rendered, Templater
from spark_vl.records import Kind, PromptRecord, RecycledKind, RecycledRecord, RolloutGroup

_EPS = 1e-6
_COT_SHARE = {"answer": 0.0, "mixed": 0.5, "cot": 1.0}
_OUTCOMES = {  # (any right evidence, any wrong evidence)
    (True, True): "groups_mixed",
    (True, False): "groups_correct",
    (False, True): "groups_wrong",
    (False, False): "groups_without_evidence",
}
_COUNTS = (
    *_OUTCOMES.values(),
    "groups_repeated",
    "rollouts_truncated",
    "rollouts_unverified",
    "rollouts_partial",
    "pointwise_correct",
    "pointwise_incorrect",
    "pairwise",
    "reflection_correct",
    "reflection_incorrect",
)


@dataclass(frozen=True)
class Recycled:
    """The prompts made from one step's groups. No id occurs twice."""

    judge: list[RecycledRecord]
    """At most `max_judge`."""
    reflection: list[RecycledRecord]
    """At most `max_reflection`."""
    judge_surplus: list[RecycledRecord]
    """First the prompts over the cap, then those in excess of one label. Dynamic sampling refills in this order."""
    reflection_surplus: list[RecycledRecord]
    """The prompts over the cap. Dynamic sampling refills in this order."""
    counts: dict[str, int]
    """For metrics; every key is always there. Groups that could be recycled, by their evidence:
    `groups_correct`, `groups_wrong`, `groups_mixed`, `groups_without_evidence`, and `groups_repeated` (see `recycle`).
    Rollouts of these groups that are not evidence: `rollouts_truncated`, `rollouts_unverified`, `rollouts_partial`.
    Prompts, without the surplus: `pointwise_correct`, `pointwise_incorrect`, `pairwise`, `reflection_correct`,
    `reflection_incorrect`."""


Shows = Literal["answer", "cot"]
"""What a prompt quotes: the final answer, or the whole completion."""


@dataclass(frozen=True)
class _Quote:
    """A rollout that may be quoted."""

    index: int
    """Of the rollout in its group."""
    text: str
    """What the prompt shows of it."""
    completion: str
    """Its whole text."""


@dataclass(frozen=True, eq=False)
class _Source:
    """What judge prompts, or reflections, can quote from one group."""

    record: PromptRecord
    correct: list[_Quote]
    wrong: list[_Quote]
    shows: Shows
    rng: random.Random
    """For all further draws for this group."""


def recycle(
    groups: Sequence[RolloutGroup], templater: Templater, config: RecycleConfig, *, step: int, seed: int
) -> Recycled:
    """The judge and reflection prompts made from the verified `groups` of one step, by the rules of this module.

    Of several groups of one record only the first is recycled, because all would give the same ids.

    Raises:
        ValueError: a group has not been verified.
    """
    counts = dict.fromkeys(_COUNTS, 0)
    evidence: dict[str, tuple[RolloutGroup, dict[int, bool]]] = {}
    for group in groups:
        record = group.record
        if record.kind == "problem" or (record.kind == "reflection" and config.judge_reflections):
            if record.id in evidence:
                counts["groups_repeated"] += 1
            else:
                evidence[record.id] = group, _evidence(group, config, counts)

    def sources(purpose: str, cot_share: float, kinds: tuple[Kind, ...]) -> list[_Source]:
        """The groups with something to quote, in an order drawn for this step."""
        drawn = []
        for group, correct in evidence.values():
            if group.record.kind in kinds:
                rng = random.Random(f"{seed}:{step}:{group.record.id}:{purpose}")
                place = rng.random()
                source = _source(group, correct, "cot" if rng.random() < cot_share else "answer", rng)
                if source.correct or source.wrong:
                    drawn.append((place, source))
        return [source for _, source in sorted(drawn, key=lambda pair: (pair[0], pair[1].record.id))]

    coin = random.Random(f"{seed}:{step}").random()
    judge, excess = _judge(
        sources("judge", _COT_SHARE[config.judge_sees], ("problem", "reflection")), templater, config, step, coin
    )
    reflection = _reflect(
        sources("reflection", config.reflection_cot_share, ("problem",)), templater, config, step, coin
    )
    recycled = Recycled(
        judge=judge[: config.max_judge],
        reflection=reflection[: config.max_reflection],
        judge_surplus=judge[config.max_judge :] + excess,
        reflection_surplus=reflection[config.max_reflection :],
        counts=counts,
    )
    for record in recycled.judge + recycled.reflection:
        side = {True: "_correct", False: "_incorrect", None: ""}[record.origin.quoted_correct]
        counts[record.kind + side] += 1
    return recycled


def _evidence(group: RolloutGroup, config: RecycleConfig, counts: dict[str, int]) -> dict[int, bool]:
    """Index of each rollout that is evidence → whether it is right. The other rollouts are counted."""
    if len(group.verdicts) != len(group.rollouts):
        raise ValueError(
            f"{group.record.id}: {len(group.verdicts)} verdicts for {len(group.rollouts)} rollouts; "
            "a group must be verified before it is recycled"
        )
    correct: dict[int, bool] = {}
    for index, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
        if rollout.finish_reason == "length" and not config.recycle_truncated:
            counts["rollouts_truncated"] += 1
        elif verdict.status not in ("ok", "unparsable"):
            counts["rollouts_unverified"] += 1
        elif _EPS < verdict.score < 1 - _EPS:
            counts["rollouts_partial"] += 1
        else:
            correct[index] = verdict.score > 0.5
    counts[_OUTCOMES[True in correct.values(), False in correct.values()]] += 1
    return correct


def _source(group: RolloutGroup, correct: dict[int, bool], shows: Shows, rng: random.Random) -> _Source:
    """The evidence of `group` that can be quoted in the way of `shows`."""
    quotes: dict[bool, list[_Quote]] = {True: [], False: []}
    for index, is_correct in correct.items():
        completion = group.rollouts[index].text
        # Some verifiers read answers outside boxes: then quote what they found and scored.
        text = completion if shows == "cot" else last_boxed(completion) or group.verdicts[index].parsed or ""
        if text.strip():
            quotes[is_correct].append(_Quote(index, text, completion))
    return _Source(group.record, quotes[True], quotes[False], shows, rng)


def _judge(
    sources: list[_Source], templater: Templater, config: RecycleConfig, step: int, coin: float
) -> tuple[list[RecycledRecord], list[RecycledRecord]]:
    """One judge prompt per source, and separately those whose label is in excess (see `_balanced`).

    Pointwise prompts from groups with both sides balance those from unanimous groups.
    """
    excess = sum(bool(source.correct) - bool(source.wrong) for source in sources)
    records = []
    for source in sources:
        question, rng = source.record.question, source.rng
        pairs = [(c, w) for c in source.correct for w in source.wrong if c.text.strip() != w.text.strip()]
        if source.record.kind == "problem" and pairs and rng.random() < config.pairwise_share:
            correct, wrong = rng.choice(pairs)
            rendered = templater.pairwise(question, correct=correct.text, wrong=wrong.text, rng=rng)
            shown = (correct, wrong) if rendered.gold == rendered.labels[0] else (wrong, correct)
            records.append(_record(source.record, "pairwise", rendered, shown, None, step))
            continue
        is_correct = bool(source.correct)
        if source.correct and source.wrong:
            is_correct = rng.random() < 0.5
            if config.balance_labels and excess:
                is_correct = excess < 0
            excess += 1 if is_correct else -1
        quote = rng.choice(source.correct if is_correct else source.wrong)
        rendered = templater.pointwise(question, quote.text, correct=is_correct, rng=rng)
        records.append(_record(source.record, "pointwise", rendered, (quote,), is_correct, step))
    return _balanced(records, correct_first=coin < 0.5) if config.balance_labels else (records, [])


def _balanced(
    records: list[RecycledRecord], *, correct_first: bool
) -> tuple[list[RecycledRecord], list[RecycledRecord]]:
    """`records` with their pointwise labels alternating, and separately what is in excess of one label.

    Wherever the first list is cut, its labels are balanced or differ by one.
    """
    sides = [
        [r for r in records if r.kind == "pointwise" and r.origin.quoted_correct is side]
        for side in (correct_first, not correct_first)
    ]
    if len(sides[0]) < len(sides[1]):
        sides.reverse()  # the more frequent label comes first, so that it keeps one more than the other
    even = len(sides[1])
    alternating = [record for pair in zip(*sides, strict=False) for record in pair] + sides[0][even : even + 1]
    excess = sides[0][even + 1 :]
    excess_ids = {record.id for record in excess}
    next_pointwise = iter(alternating)
    kept = [record for record in records if record.id not in excess_ids]
    return [next(next_pointwise) if record.kind == "pointwise" else record for record in kept], excess


def _reflect(
    sources: list[_Source], templater: Templater, config: RecycleConfig, step: int, coin: float
) -> list[RecycledRecord]:
    """Reflections on wrong answers, one per source that has any, of which `correct_reflection_share` quote a right
    answer instead.

    First the sources that quote a right answer are chosen, in their order, as many as the share asks for; `coin`,
    uniform in [0, 1), rounds that number. Then both sides are merged so that any cap keeps the share.
    """
    share = config.correct_reflection_share
    correct: list[_Source] = []
    n_wrong = sum(bool(source.wrong) for source in sources)
    for source in sources if n_wrong else ():
        if source.correct:
            n_wrong_then = n_wrong - bool(source.wrong)
            if len(correct) + 1 > share * (len(correct) + 1 + n_wrong_then) + coin:
                break
            correct.append(source)
            n_wrong = n_wrong_then
    wrong = [source for source in sources if source.wrong and source not in correct]

    def n_correct(n: int) -> int:
        """How many of the first `n` reflections quote a right answer."""
        return max(min(len(correct), floor(share * n + coin)), n - len(wrong))

    records = []
    for n in range(len(correct) + len(wrong)):
        is_correct = n_correct(n + 1) > n_correct(n)
        source = correct[n_correct(n)] if is_correct else wrong[n - n_correct(n)]
        quote = source.rng.choice(source.correct if is_correct else source.wrong)
        rendered = templater.reflection(
            source.record.question, quote.text, correct=is_correct, shows=source.shows, rng=source.rng
        )
        records.append(_record(source.record, "reflection", rendered, (quote,), is_correct, step))
    return records


def _record(
    parent: PromptRecord,
    kind: RecycledKind,
    rendered: Rendered,
    quotes: tuple[_Quote, ...],
    quoted_correct: bool | None,
    step: int,
) -> RecycledRecord:
    """The record of a rendered prompt that quotes `quotes`."""
    return rendered.record(
        parent,
        kind,
        id=f"{parent.id}@{step}#{kind}",
        step=step,
        rollouts=tuple(quote.index for quote in quotes),
        quoted_correct=quoted_correct,
        completions=tuple(quote.completion for quote in quotes),
    )
