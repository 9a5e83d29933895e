"""Every completion of an evaluation, one problem per line, to read and to score again without the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spark_vl.records import RolloutGroup, plain_text
from spark_vl.run.codec import group_from_json, group_to_json
from spark_vl.verifiers import VERIFIERS, VerifierPool, verify_groups

Groups = dict[str, list[RolloutGroup]]
"""Mode (see `figures.score`) → verified groups."""


def groups_to_json(groups: Mapping[str, Sequence[RolloutGroup]]) -> dict[str, Any]:
    """Groups by mode, with their tokens only counted, and records that have their question as plain text and no
    messages."""
    return {mode: [group_to_json(_readable(group)) for group in of_mode] for mode, of_mode in groups.items()}


def groups_from_json(data: Mapping[str, Any], verifiers: Collection[str] = VERIFIERS.keys()) -> Groups:
    """What `groups_to_json` was given.

    Args:
        verifiers: that records may name.

    Raises:
        ValueError: a record names another verifier.
    """
    return {mode: [group_from_json(dict(group), verifiers) for group in of_mode] for mode, of_mode in data.items()}


def by_problem(groups: Mapping[str, Sequence[RolloutGroup]], problems: Iterable[str]) -> dict[str, Groups]:
    """Id of each of `problems` → the groups of it and about it; those that are about none of them are left out."""
    found: dict[str, Groups] = {problem: {mode: [] for mode in groups} for problem in problems}
    for mode, of_mode in groups.items():
        for group in of_mode:
            own = group.record.id if group.record.id in found else group.record.parent_id
            if own in found:
                found[own][mode].append(group)
    return found


def merged(all_groups: Iterable[Mapping[str, Sequence[RolloutGroup]]]) -> Groups:
    """The groups of many problems, by mode."""
    result: Groups = defaultdict(list)
    for groups in all_groups:
        for mode, of_mode in groups.items():
            result[mode] += of_mode
    return dict(result)


def verified_again(groups: Mapping[str, Sequence[RolloutGroup]], verifiers: VerifierPool) -> Groups:
    """`groups` with new verdicts on all completions. Which answers were revised or in the majority does not change.
    Verifiers see questions as plain text. Shaping terms do not depend on correctness and are left out."""
    modes = [(mode, group) for mode, of_mode in groups.items() for group in of_mode]
    unverified = [RolloutGroup(replace(group.record, shaping=()), group.rollouts) for _, group in modes]
    result: Groups = {mode: [] for mode in groups}
    for (mode, _), group in zip(modes, verify_groups(verifiers, unverified), strict=True):
        result[mode].append(group)
    return result


def _readable(group: RolloutGroup) -> RolloutGroup:
    record = replace(group.record, messages=(), question=(plain_text(group.record.question),))
    rollouts = (replace(each, token_ids=(), logprobs=(), counted=each.tokens) for each in group.rollouts)
    return replace(group, record=record, rollouts=tuple(rollouts))
