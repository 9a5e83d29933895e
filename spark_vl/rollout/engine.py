"""What samples completions, whichever library does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from spark_vl.families.base import ProcessedPrompt
from spark_vl.policy.policy import Policy
from spark_vl.records import BadRecordError, RolloutGroup


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """0 is greedy: the most probable token, log-probabilities at temperature 1."""
    top_p: float = 1.0
    max_new_tokens: int = 768
    seed: int = 0
    """Fixes the completions on a given device and engine."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that the prompt or the completion has, and multiplies those below 0, before
    the temperature (arXiv 1909.05858, as transformers and vLLM do: the prompt's image tokens count, too); 1: nothing.
    `Rollout.logprobs` are of the distribution with it. For evaluations: it is not the distribution that is trained."""


class EngineError(RuntimeError):
    """The engine cannot go on sampling; the policy and its checkpoints are not touched by that."""


class PromptsRefusedError(ValueError):
    """The engine cannot sample some of the prompts, for a reason in each of them; it has sampled the others.

    Args:
        groups: [prompts], None for those that were refused.
        reasons: index of each refused prompt → what was found and what is allowed.
    """

    def __init__(
        self,
        groups: Sequence[RolloutGroup | None],
        reasons: Mapping[int, BadRecordError],
    ) -> None:
        super().__init__("; ".join(map(str, reasons.values())))
        self.groups, self.reasons = list(groups), dict(reasons)


def nothing(*_: object) -> None:
    """Who does not want to hear of progress."""


class Sampler(Protocol):
    """Samples groups of completions."""

    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = nothing,
        on_group: Callable[[int, RolloutGroup], None] = nothing,
    ) -> list[RolloutGroup]:
        """`n` completions of each prompt, in the order of `prompts`.

        Args:
            progress: is told how many more completions are done.
            on_group: is given each group as soon as it is complete, with the index of its prompt.

        Raises:
            PromptsRefusedError: some prompts cannot be sampled.
            EngineError: none can.
        """

    def close(self) -> None:
        """Give back what the engine holds."""


class RolloutEngine(Sampler, Protocol):
    """Samples from the policy's current weights."""

    def sync_weights(self, policy: Policy) -> None:
        """Make the engine sample from the weights that `policy` has now."""
