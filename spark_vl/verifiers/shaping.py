"""Shaping terms: what is added to a reward for how a completion is written. None of them says whether it is right.

A recipe gives each its weight beside that of the verifier: `verifier: {math: 1.0, format: 0.1, overlong: 0.5}`. The
score of a verdict, by which answers are recycled and evaluated, is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spark_vl.answers import last_boxed
from spark_vl.records import PromptRecord, Rollout

Term = Callable[[Rollout, PromptRecord], float]


def format_term(rollout: Rollout, record: PromptRecord) -> float:
    """1 where the completion ended by itself and holds a final answer in a box, else 0."""
    return float(rollout.finish == "stop" and last_boxed(rollout.text) is not None)


SHAPING: Mapping[str, Term] = {"format": format_term}
"""By name."""
