"""What samples completions, whichever library does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from spark_vl.families.base import ProcessedPrompt
from spark_vl.policy.policy import Policy
from spark_vl.records import RolloutGroup


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """0 is greedy: the most probable token, log-probabilities at temperature 1."""
    top_p: float = 1.0
    max_new_tokens: int = 768
    seed: int = 0
    """Fixes the completions on a given device and engine."""


class RolloutEngine(Protocol):
    """Samples groups of completions from the policy's current weights."""

    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda finished: None,
    ) -> list[RolloutGroup]:
        """`n` completions of each prompt, in the order of `prompts`; `progress` hears how many more completions are
        done.
        """

    def sync_weights(self, policy: Policy) -> None:
        """Make the engine sample from the weights that `policy` has now."""

    def close(self) -> None:
        """Give back what the engine holds."""
