"""What the groups of one process prove, and what can be quoted from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from spark_vl.answers import last_boxed
from spark_vl.config import RecycleConfig
from spark_vl.records import Kind, PromptRecord, RolloutGroup, Verdict
from spark_vl.verifiers.base import SELF_JUDGE

_COT_SHARE = {"answer": 0.0, "mixed": 0.5, "cot": 1.0}
_OUTCOMES = {  # (any right evidence, any wrong evidence)
    (True, True): "groups_mixed",
    (True, False): "groups_correct",
    (False, True): "groups_wrong",
    (False, False): "groups_without_evidence",
}

Shows = Literal["answer", "cot"]
"""What a prompt quotes: the final answer, or the whole completion."""
Purpose = Literal["judge", "reflection"]


@dataclass(frozen=True)
class Quote:
    """A rollout that may be quoted."""

    index: int
    """Of the rollout in its group."""
    text: str
    """What the prompt shows of it."""
    completion: str
    """Its whole text."""


@dataclass(frozen=True)
class Quotes:
    """What judge prompts, or reflections, can quote from one group."""

    shows: Shows
    correct: list[Quote]
    wrong: list[Quote]

    @property
    def pairs(self) -> list[tuple[Quote, Quote]]:
        """A right and a wrong answer each, which differ in what is shown."""
        return [(c, w) for c in self.correct for w in self.wrong if c.text.strip() != w.text.strip()]


@dataclass(frozen=True)
class Quotable:
    """What other processes need to know of `Quotes`: no texts."""

    place: float
    """In [0, 1), drawn: groups are taken in this order."""
    correct: bool
    """Whether there is a right answer to quote."""
    wrong: bool
    both: bool
    """Whether there are a right and a wrong answer that differ."""


@dataclass(frozen=True)
class Candidate:
    """A group that may be recycled, as all processes know it."""

    id: str
    """Of its record."""
    kind: Kind
    pass_rate: float
    """Mean score of its rollouts, in [0, 1]: how easy its question is."""
    judge: Quotable
    reflection: Quotable
    prefers_pairwise: bool
    """Drawn with probability `pairwise_share`."""
    prefers_correct: bool
    """Drawn with equal chance: the side that the one pointwise prompt of a mixed group takes, where pairs are not
    matched."""


@dataclass(frozen=True)
class Evidence:
    """A group with what can be quoted from it, on the process that sampled it."""

    record: PromptRecord
    quotes: dict[Purpose, Quotes]
    candidate: Candidate
    key: str
    """Seeds all draws for this group."""

    def rng(self, purpose: str) -> random.Random:
        """The same draws at each call."""
        return random.Random(f"{self.key}:{purpose}")


def find_evidence(
    groups: Sequence[RolloutGroup], config: RecycleConfig, *, step: int, seed: int
) -> tuple[list[Evidence], dict[str, int]]:
    """The groups of this process that may be recycled, in their order, and counts of groups and rollouts
    (`Recycled.counts`). Several groups of one record are all there: `choose` takes the first.

    Raises:
        ValueError: a group has not been verified.
    """
    names = (*_OUTCOMES.values(), "rollouts_truncated", "rollouts_unverified", "rollouts_partial")
    counts = dict.fromkeys(names, 0)
    found = []
    for group in groups:
        record = group.record
        if record.verifier == SELF_JUDGE:  # the model's own verdict proves nothing
            continue
        if record.kind == "problem" or (record.kind == "reflection" and config.judge_reflections):
            found.append(_evidence(group, _sides(group, config, counts), config, f"{seed}:{step}:{record.id}"))
    return found, counts


def _evidence(group: RolloutGroup, sides: dict[int, bool], config: RecycleConfig, key: str) -> Evidence:
    shares: dict[Purpose, float] = {
        "judge": _COT_SHARE[config.judge_sees],
        "reflection": config.reflection_cot_share,
    }
    quotes: dict[Purpose, Quotes] = {}
    quotable: dict[Purpose, Quotable] = {}
    for purpose, cot_share in shares.items():
        rng = random.Random(f"{key}:{purpose}")
        place, shows_cot = rng.random(), rng.random() < cot_share
        of = quotes[purpose] = _quotes(group, sides, "cot" if shows_cot else "answer")
        quotable[purpose] = Quotable(place, bool(of.correct), bool(of.wrong), bool(of.pairs))
    rng = random.Random(f"{key}:side")
    candidate = Candidate(
        id=group.record.id,
        kind=group.record.kind,
        pass_rate=fmean(group.scores) if group.verdicts else 0.0,
        judge=quotable["judge"],
        reflection=quotable["reflection"],
        prefers_pairwise=rng.random() < config.pairwise_share,
        prefers_correct=rng.random() < 0.5,
    )
    return Evidence(group.record, quotes, candidate, key)


def _sides(group: RolloutGroup, config: RecycleConfig, counts: dict[str, int]) -> dict[int, bool]:
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
        elif (is_correct := verdict.is_correct) is None:
            counts["rollouts_partial"] += 1
        else:
            correct[index] = is_correct
    counts[_OUTCOMES[True in correct.values(), False in correct.values()]] += 1
    return correct


def quotable_answer(completion: str, verdict: Verdict) -> str:
    """The final answer of a completion, empty if it has none: that in its last box or, since some verifiers read
    answers outside boxes, what they found and scored."""
    return last_boxed(completion) or verdict.parsed or ""


def _quotes(group: RolloutGroup, sides: dict[int, bool], shows: Shows) -> Quotes:
    """The evidence of `group` that can be quoted in the way of `shows`."""
    quotes: dict[bool, list[Quote]] = {True: [], False: []}
    for index, is_correct in sides.items():
        completion = group.rollouts[index].answer_text
        text = completion if shows == "cot" else quotable_answer(completion, group.verdicts[index])
        if text.strip():
            quotes[is_correct].append(Quote(index, text, completion))
    return Quotes(shows, quotes[True], quotes[False])
