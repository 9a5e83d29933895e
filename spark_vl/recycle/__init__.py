"""Verified groups → judge and reflection prompts (arXiv 2509.22624, §3). A decision about the whole step.

What is made from a group depends on its *evidence*: the rollouts that the model finished and that a verifier found
right (score 1) or wrong (score 0).

| evidence in a problem's group | judge prompts | reflection prompt |
|---|---|---|
| both | by `pairwise_share`, a pairwise one or a matched pair of pointwise ones; then the other | on either side |
| only right answers | one of a couple of pointwise, gold "correct" | none, or one that quotes a right answer |
| only wrong answers | the other of such a couple, gold "incorrect" | quotes a wrong answer |

A *matched pair* asks the same question twice in the same words, with a right answer and with a wrong one, so neither
the question nor its difficulty tells the label. Easy questions are mostly answered right, and hard ones wrong: a judge
that sees one answer to each can do well without looking at it. Unanimous groups teach that shortcut, so they come in
couples, a right answer to one question with a wrong one to another, and make up at most `unanimous_share` of the
pointwise prompts. Pairs and couples are kept or left out as a whole. Where `max_judge` leaves room, mixed groups give
both kinds of judge prompts; where even these are too few, as when nearly everything is solved, the step has fewer
(`judge_unfilled`). With `pointwise: one_per_group`, as in the released code, each group gives one judge
prompt, and nothing is balanced.

`correct_reflection_share` of the reflections quote a right answer, so that "change it" is not always right. With
`judge_reflections` the group of a reflection prompt that has both gives a matched pair, too. Judge prompts are never
recycled, and nothing is reflected on twice.

Not evidence, but counted: rollouts cut off by the length limit (unless `recycle_truncated`), rollouts whose
verification timed out or failed, and rollouts with a partial score. A finished rollout in which no answer was found is
evidence of a wrong answer; without a box it has no final answer to quote, so only prompts that show the whole
completion can use it.

Several processes decide together and do the same as one: each finds the evidence in its own groups (`evidence.py`),
all know all `Candidate`s, which hold no texts, choose the same (`choose.py`), and write what is chosen of their own
groups (`wording.py`). All random draws depend on (seed, step, id of the record) alone: neither the order of the groups
nor the number of processes matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spark_vl.config import RecycleConfig
from spark_vl.prompts.templater import Templater
from spark_vl.records import RecycledRecord, RolloutGroup
from spark_vl.recycle.choose import Choice, Unit, choose, deal
from spark_vl.recycle.difficulty import DifficultyAuc, roc_auc
from spark_vl.recycle.evidence import Candidate, Evidence, find_evidence
from spark_vl.recycle.wording import word


@dataclass(frozen=True)
class Recycled:
    """The prompts made from one step's groups. No id occurs twice."""

    judge: list[RecycledRecord]
    """At most `max_judge`. The two prompts of a pair stand next to each other."""
    reflection: list[RecycledRecord]
    """At most `max_reflection`."""
    counts: dict[str, int]
    """For metrics; every key is always there. Groups that could be recycled, by their evidence:
    `groups_correct`, `groups_wrong`, `groups_mixed`, `groups_without_evidence`, and `groups_repeated` (see `recycle`).
    Rollouts of these groups that are not evidence: `rollouts_truncated`, `rollouts_unverified`, `rollouts_partial`.
    Prompts: `pointwise_correct`, `pointwise_incorrect`, `pairwise`, `reflection_correct`, `reflection_incorrect`.
    Places of `max_judge` that could not be filled: `judge_unfilled`."""


def recycle(
    groups: Sequence[RolloutGroup], templater: Templater, config: RecycleConfig, *, step: int, seed: int
) -> Recycled:
    """The judge and reflection prompts made from the verified `groups` of one step, by the rules of this module.

    Of several groups of one record only the first is recycled, because all would give the same ids.

    Raises:
        ValueError: a group has not been verified.
    """
    evidence, counts = find_evidence(groups, config, step=step, seed=seed)
    choice = choose([[each.candidate for each in evidence]], config, step=step, seed=seed)

    def records(units: list[Unit]) -> list[RecycledRecord]:
        return [word(part, unit, evidence, templater, config, step=step) for unit in units for part in unit.parts]

    return Recycled(records(choice.judge), records(choice.reflection), counts | choice.counts)


__all__ = [
    "Candidate",
    "Choice",
    "DifficultyAuc",
    "Evidence",
    "Recycled",
    "Unit",
    "choose",
    "deal",
    "find_evidence",
    "recycle",
    "roc_auc",
    "word",
]
