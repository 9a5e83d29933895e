"""Verdicts for whole groups, with their shaping terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from spark_vl.records import Rollout, RolloutGroup, Verdict
from spark_vl.verifiers.pool import VerifierPool
from spark_vl.verifiers.shaping import SHAPING


def verify_groups(
    pool: VerifierPool, groups: Sequence[RolloutGroup], max_new_tokens: int | None = None
) -> list[RolloutGroup]:
    """`groups` with their verdicts, in order.

    Args:
        max_new_tokens: the limit under which the completions were sampled, for the shaping terms.

    Raises:
        ValueError: a shaping term needs the limit, and it is None.
    """
    verdicts = iter(
        pool.verify([(rollout.answer_text, group.record) for group in groups for rollout in group.rollouts])
    )
    return [shaped(group, list(islice(verdicts, len(group.rollouts))), max_new_tokens) for group in groups]


def shaped(group: RolloutGroup, verdicts: Sequence[Verdict], max_new_tokens: int | None = None) -> RolloutGroup:
    """`group` with its verdicts, which get the values of the record's shaping terms. See `verify_groups`."""

    def terms(rollout: Rollout, verdict: Verdict) -> tuple[tuple[str, float], ...]:
        return tuple((name, SHAPING[name](rollout, verdict, max_new_tokens)) for name, _ in group.record.shaping)

    both = zip(group.rollouts, verdicts, strict=True)
    return group.verified(tuple(replace(verdict, shaping=terms(rollout, verdict)) for rollout, verdict in both))
