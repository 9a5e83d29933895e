"""Verdicts for whole groups, with their shaping terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from spark_vl.records import PromptRecord, Rollout, RolloutGroup
from spark_vl.verifiers.pool import VerifierPool
from spark_vl.verifiers.shaping import SHAPING


def verify_groups(pool: VerifierPool, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """`groups` with their verdicts, in order."""
    verdicts = iter(pool.verify([(rollout.text, group.record) for group in groups for rollout in group.rollouts]))
    return [
        group.verified(
            tuple(
                replace(verdict, shaping=_shaping(rollout, group.record))
                for rollout, verdict in zip(group.rollouts, islice(verdicts, len(group.rollouts)), strict=True)
            )
        )
        for group in groups
    ]


def _shaping(rollout: Rollout, record: PromptRecord) -> tuple[tuple[str, float], ...]:
    return tuple((name, SHAPING[name](rollout, record)) for name, _ in record.shaping)
