"""Verified groups → judge and reflection prompts (arXiv 2509.22624, §3).

What a group gives is decided by its *evidence*: the rollouts that the model finished itself and that a verifier found
right (score 1) or wrong (score 0).

| evidence in the group | judge prompt | reflection prompt |
|---|---|---|
| only right answers | pointwise, gold "correct" | none of its own; may lend its right answer (below) |
| only wrong answers | pointwise, gold "incorrect" | quotes a wrong answer |
| both | `pairwise_share`: pairwise; the rest: pointwise, either side | quotes a wrong answer, or a right one (below) |

`correct_reflection_share` of the reflections quote a right answer, so that "change it" is not always right. With
`judge_reflections` the group of a reflection prompt gives a pointwise prompt (either side, where it has both). Judge
prompts are never recycled, and nothing is reflected upon twice.

With `balance_labels` a step's pointwise prompts have the gold "correct" as often as "incorrect", or once more or less:
groups with both sides take the side that is missing, and what one label still has in excess is left out. Otherwise a
policy that gets most problems right would teach its judge to say "correct".

No evidence, and counted: rollouts cut off by the length limit (unless `recycle_truncated`), those whose verification
timed out or failed, those with a partial score. A finished rollout in which no answer was found is evidence of a
wrong one; without a box it has no final answer to quote, so only prompts that show whole completions can use it.

Everything drawn at random depends on (seed, step, id of the record) alone: the order of the groups does not matter.
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
from spark_vl.records import Kind, PromptRecord, RolloutGroup

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
    """The prompts that one step's groups give, each id once."""

    judge: list[PromptRecord]
    """At most `max_judge`."""
    reflection: list[PromptRecord]
    """At most `max_reflection`."""
    judge_surplus: list[PromptRecord]
    """What did not fit, then what would have unbalanced the labels: dynamic sampling refills from it in this order."""
    reflection_surplus: list[PromptRecord]
    """What did not fit, in this order."""
    counts: dict[str, int]
    """For metrics; every key is always there. Groups that could be recycled, by their evidence:
    `groups_correct`, `groups_wrong`, `groups_mixed`, `groups_without_evidence`, and `groups_repeated` (see `recycle`).
    Their rollouts that are no evidence: `rollouts_truncated`, `rollouts_unverified`, `rollouts_partial`. The prompts,
    surplus not counted: `pointwise_correct`, `pointwise_incorrect`, `pairwise`, `reflection_correct`,
    `reflection_incorrect`."""


Shows = Literal["answer", "cot"]
"""What a prompt quotes: the final answer, or the whole completion."""


@dataclass(frozen=True)
class _Quote:
    """A rollout that may be quoted."""

    index: int
    """In its group."""
    text: str
    """As it is quoted."""
    completion: str
    """The whole of it."""


@dataclass(frozen=True, eq=False)
class _Source:
    """What one group offers to one kind of prompt: its right and its wrong quotes."""

    record: PromptRecord
    correct: list[_Quote]
    wrong: list[_Quote]
    shows: Shows
    rng: random.Random
    """The group's own."""


def recycle(
    groups: Sequence[RolloutGroup], templater: Templater, config: RecycleConfig, *, step: int, seed: int
) -> Recycled:
    """The judge and reflection prompts that the verified `groups` of one step give, by the rules of this module.

    Of several groups of the same record only the first is recycled, for each would give the same ids.

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
        """The groups that offer anything, in an order drawn for this step."""
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
    """Index of each rollout that is evidence → whether it is right. What is not is counted."""
    if len(group.verdicts) != len(group.rollouts):
        raise ValueError(
            f"{group.record.id}: {len(group.verdicts)} verdicts for {len(group.rollouts)} rollouts; "
            "verify a group before it is recycled"
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
    """The evidence of `group`, as far as it can be quoted in the way that `shows` says."""
    quotes: dict[bool, list[_Quote]] = {True: [], False: []}
    for index, is_correct in correct.items():
        completion = group.rollouts[index].text
        # Some verifiers read answers that are in no box: what they found is what was scored.
        text = completion if shows == "cot" else last_boxed(completion) or group.verdicts[index].parsed or ""
        if text.strip():
            quotes[is_correct].append(_Quote(index, text, completion))
    return _Source(group.record, quotes[True], quotes[False], shows, rng)


def _judge(
    sources: list[_Source], templater: Templater, config: RecycleConfig, step: int, coin: float
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """One judge prompt for each source, and apart from them those whose label is in excess (see `_balanced`).

    Groups with both sides, where pointwise, make up for the unanimous ones.
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


def _balanced(records: list[PromptRecord], *, correct_first: bool) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """`records` with their pointwise labels alternating, and apart from them what one label has in excess.

    However the first part is cut, its labels are even, or one apart.
    """
    sides = [
        [r for r in records if r.kind == "pointwise" and r.origin.quoted_correct is side]
        for side in (correct_first, not correct_first)
    ]
    if len(sides[0]) < len(sides[1]):
        sides.reverse()  # the more frequent label begins, so that one more of it than of the other stays
    even = len(sides[1])
    alternating = [record for pair in zip(*sides, strict=False) for record in pair] + sides[0][even : even + 1]
    excess = sides[0][even + 1 :]
    excess_ids = {record.id for record in excess}
    next_pointwise = iter(alternating)
    kept = [record for record in records if record.id not in excess_ids]
    return [next(next_pointwise) if record.kind == "pointwise" else record for record in kept], excess


def _reflect(
    sources: list[_Source], templater: Templater, config: RecycleConfig, step: int, coin: float
) -> list[PromptRecord]:
    """One reflection for each source with a wrong answer, `correct_reflection_share` of them on a right one.

    First some of the sources that have a right answer are chosen to quote it (drawn by their order), as many as the
    share asks for and one more or not as `coin`, uniform in [0, 1), rounds it. Then both sides are merged so that a
    cut to any cap keeps the share.
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
    kind: Kind,
    rendered: Rendered,
    quotes: tuple[_Quote, ...],
    quoted_correct: bool | None,
    step: int,
) -> PromptRecord:
    """A rendered prompt that quotes `quotes`, as a record."""
    return rendered.record(
        parent,
        kind,
        id=f"{parent.id}@{step}#{kind}",
        step=step,
        rollouts=tuple(quote.index for quote in quotes),
        quoted_correct=quoted_correct,
        completions=tuple(quote.completion for quote in quotes),
    )
