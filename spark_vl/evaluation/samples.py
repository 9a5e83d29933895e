"""Every completion of every evaluation of a run, one group per line, to read and to score again without the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spark_vl.evaluation.figures import Estimate, score
from spark_vl.records import RolloutGroup, plain_text
from spark_vl.run.codec import group_from_json, group_to_json
from spark_vl.run.jsonl import append_lines, read_lines
from spark_vl.verifiers import VERIFIERS, VerifierPool, verify_groups


def append_samples(file: Path, groups: Mapping[str, Sequence[RolloutGroup]]) -> None:
    """Append one evaluation, numbered after the last one in `file`: groups without their tokens, whose records have
    the question as plain text and no messages."""
    before = read_lines(file)
    number = before[-1]["evaluation"] + 1 if before else 1
    append_lines(
        file,
        (
            {"evaluation": number, "mode": mode} | group_to_json(_readable(group))
            for mode, of_mode in groups.items()
            for group in of_mode
        ),
    )


def rescore(file: Path, verifiers: VerifierPool, own: Collection[str] = ()) -> list[dict[str, Estimate]]:
    """The figures (see `score`) of every evaluation in `file`, oldest first, with all completions verified again.

    Which answers were revised or in the majority does not change. Verifiers see questions as plain text. Shaping terms
    do not depend on correctness and are left out.

    Args:
        own: `module:function` of verifiers that samples may name besides `VERIFIERS`.

    Raises:
        ValueError: a sample names another verifier.
    """
    allowed = {*VERIFIERS, *own}
    evaluations: dict[int, dict[str, list[RolloutGroup]]] = defaultdict(lambda: defaultdict(list))
    for line in read_lines(file):
        number, mode = line.pop("evaluation"), line.pop("mode")
        group = group_from_json(line, allowed)
        unverified = RolloutGroup(replace(group.record, shaping=()), group.rollouts)
        evaluations[number][mode].append(unverified)
    return [
        score({mode: verify_groups(verifiers, groups) for mode, groups in evaluation.items()})
        for evaluation in evaluations.values()
    ]


def _readable(group: RolloutGroup) -> RolloutGroup:
    record = replace(group.record, messages=(), question=(plain_text(group.record.question),))
    return replace(
        group,
        record=record,
        rollouts=tuple(replace(rollout, token_ids=(), logprobs=()) for rollout in group.rollouts),
    )
