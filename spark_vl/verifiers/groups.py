"""Verdicts for whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from spark_vl.records import RolloutGroup
from spark_vl.verifiers.pool import VerifierPool


def verify_groups(pool: VerifierPool, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """`groups` with their verdicts, in order."""
    verdicts = iter(pool.verify([(rollout.text, group.record) for group in groups for rollout in group.rollouts]))
    return [group.verified(tuple(islice(verdicts, len(group.rollouts)))) for group in groups]
