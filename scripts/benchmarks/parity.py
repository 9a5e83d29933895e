"""A verdict without meaning that differs between completions, so that every group has a gradient."""

from __future__ import annotations

from spark_vl.records import PromptRecord, Verdict


def verify(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's characters add up to an even number."""
    return Verdict(float(sum(map(ord, completion)) % 2 == 0), completion[:10])
