"""An engine and verifiers that split the same prompts over all processes, as an evaluation needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate import Accelerator

from spark_vl.distributed.spread import spread
from spark_vl.families.base import ProcessedPrompt
from spark_vl.policy.policy import Policy
from spark_vl.records import BadRecordError, PromptRecord, Rollout, RolloutGroup, Verdict
from spark_vl.rollout.engine import EngineError, PromptsRefusedError, RolloutEngine, Sampling, nothing
from spark_vl.verifiers.pool import VerifierPool


class DistributedEngine:
    """`RolloutEngine` for prompts that are the same on all processes."""

    def __init__(self, engine: RolloutEngine, accelerator: Accelerator) -> None:
        self.engine, self.accelerator = engine, accelerator

    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = nothing,
        on_group: Callable[[int, RolloutGroup], None] = nothing,
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. What is drawn at a temperature depends on the number of processes."""
        own = replace(sampling, seed=sampling.seed + self.accelerator.process_index)
        processes = self.accelerator.num_processes

        def sample(mine: Sequence[ProcessedPrompt]) -> list[tuple[Rollout, ...] | BadRecordError]:
            """Without the records: they may hold images, and every process has them."""
            try:
                groups = self.engine.generate(mine, n, own, lambda finished: progress(finished * processes))
            except PromptsRefusedError as error:
                return [group.rollouts if group else error.reasons[i] for i, group in enumerate(error.groups)]
            return [group.rollouts for group in groups]

        groups = []
        for prompt, found in zip(prompts, spread(self.accelerator, prompts, sample), strict=True):
            if isinstance(found, BadRecordError):  # what an evaluation asks is fixed: nothing may be missing from it
                raise EngineError(f"a prompt of the evaluation cannot be sampled: {found}")
            groups.append(RolloutGroup(prompt.record, found))
        for i, group in enumerate(groups):
            on_group(i, group)
        return groups

    def sync_weights(self, policy: Policy) -> None:
        """See `RolloutEngine.sync_weights`."""
        self.engine.sync_weights(policy)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self.engine.close()


class DistributedVerifiers:
    """A `VerifierPool` for items that are the same on all processes. All get the same verdicts, also where a verifier
    met its deadline on one of them."""

    def __init__(self, verifiers: VerifierPool, accelerator: Accelerator) -> None:
        self.verifiers, self.accelerator = verifiers, accelerator

    def verify(self, items: Sequence[tuple[str, PromptRecord]]) -> list[Verdict]:
        """See `VerifierPool.verify`."""
        return spread(self.accelerator, items, self.verifiers.verify)
