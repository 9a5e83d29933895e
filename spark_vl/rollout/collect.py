"""Sampling and verifying: processed prompts → prompts with their verified groups."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from accelerate import Accelerator

from spark_vl.config import ConfigError
from spark_vl.distributed.gather import any_process
from spark_vl.families.base import ProcessedPrompt
from spark_vl.log import RunLog
from spark_vl.policy.batch import Scored
from spark_vl.records import KINDS, BadRecordError, Kind, PromptRecord, RecycledRecord, RolloutGroup
from spark_vl.rollout.engine import PromptsRefusedError, RolloutEngine, Sampling
from spark_vl.verifiers.base import SELF_JUDGE
from spark_vl.verifiers.groups import verify_groups
from spark_vl.verifiers.pool import VerifierPool


class SelfJudging(Protocol):
    """Rewards completions of prompts without a right answer."""

    def is_allowed(self) -> bool:
        """Whether such prompts are sampled now. Collective."""

    def verified(self, groups: Sequence[RolloutGroup], *, seed: str) -> list[RolloutGroup]:
        """`groups` with verdicts of the policy's own. Collective."""


@dataclass(kw_only=True)
class Collector:
    """Samples the completions that a step learns from, and has them verified."""

    engine: RolloutEngine
    verifiers: VerifierPool
    accelerator: Accelerator
    log: RunLog
    """Is told of progress, times, and verifiers that fail."""
    sampling: Sampling
    """Temperature, top-p and length; each call has a seed of its own."""
    n: int
    """Completions per prompt, G."""
    refill_rounds: Mapping[str, int]
    """See `ObjectiveConfig`."""
    refused: Callable[[PromptRecord, BadRecordError], None]
    """Is told of each prompt that the engine refuses."""
    self_judge: SelfJudging | None = None
    """For prompts whose verifier is `SELF_JUDGE`; None: there are none."""

    def sample_and_verify(self, prompts: Sequence[ProcessedPrompt], *, seed: str) -> list[Scored]:
        """Each prompt with its group of G completions and their verdicts; without those that the engine refuses. Groups
        are verified while others are being sampled. Collective.

        Prompts that the policy judges itself are left out while it is not allowed to.

        Raises:
            ConfigError: there are such prompts, and nothing that judges them.
            EngineError: the engine cannot go on.
            TooManyBadRowsError: it refuses too many.
        """
        if self.self_judge is None:
            if lost := [prompt.record.id for prompt in prompts if _is_self_judged(prompt)]:
                raise ConfigError(
                    f"self_judge.recipes: is empty, and {lost[0]} has the verifier {SELF_JUDGE}; name a recipe of "
                    "verified problems, which tell how well the policy judges"
                )
        elif not self.self_judge.is_allowed():
            left = [prompt for prompt in prompts if not _is_self_judged(prompt)]
            self.log.count("self_judge", {"left_out": len(prompts) - len(left)})
            prompts = left
        sampling = replace(self.sampling, seed=zlib.crc32(seed.encode()))
        own: dict[int, RolloutGroup] = {}
        others: dict[int, Future[list[RolloutGroup]]] = {}
        # One thread, since the pool does one thing at a time. Most of the work is in its processes.
        with ThreadPoolExecutor(1, thread_name_prefix="verify") as thread:

            def verify(i: int, group: RolloutGroup) -> None:
                if _is_self_judged(group):
                    own[i] = group
                else:
                    others[i] = thread.submit(verify_groups, self.verifiers, [group], sampling.max_new_tokens)

            with self.log.timed("generate"), self.accelerator.autocast():
                advance = self.log.progress("sampling", len(prompts) * self.n)
                try:
                    self.engine.generate(prompts, self.n, sampling, advance, verify)
                except PromptsRefusedError as error:
                    for i, reason in error.reasons.items():
                        self.refused(prompts[i].record, reason)
            with self.log.timed("verify"):  # what is left of it
                self.log.phase("verifying")
                verified = {i: group.result()[0] for i, group in others.items()}
        if self.self_judge:
            with self.log.timed("self_judge"), self.accelerator.autocast():
                own = dict(sorted(own.items()))  # groups are complete in any order
                verified |= zip(own, self.self_judge.verified(list(own.values()), seed=seed), strict=True)
        scored = [(prompts[i], verified[i]) for i in sorted(verified)]
        self.log.verified([group for _, group in scored])
        return scored

    def refill(
        self, scored: Sequence[Scored], more: Callable[[Kind, int], list[ProcessedPrompt]], *, seed: str
    ) -> tuple[list[Scored], list[Scored]]:
        """Dynamic sampling: replace groups whose rewards are all equal, which have no gradient, by fresh ones that
        vary, for as many rounds as `refill_rounds` allows for their kind of prompt. A pair is replaced as a whole, by
        one of which more groups vary. Collective.

        Args:
            more: gives up to so many more prompts of a kind (`PromptFeed.more`).

        Returns:
            All that was sampled, and what is trained on, which is as long as `scored`.
        """
        sampled, chosen = list(scored), list(scored)
        for kind in KINDS:
            for turn in range(1, self.refill_rounds.get(kind, 0) + 1):
                poor = [unit for unit in _units(chosen, kind) if _varied(chosen, unit) < len(unit)]
                with self.log.timed("load"):
                    prompts = more(kind, sum(map(len, poor)))
                if not any_process(self.accelerator, bool(prompts)):
                    break
                fresh = self.sample_and_verify(prompts, seed=f"{seed}/{kind}/{turn}")
                sampled += fresh
                poor.sort(key=lambda unit: _varied(chosen, unit))
                best = sorted(_units(fresh, kind), key=lambda unit: -_varied(fresh, unit))
                for old, new in zip(poor, best, strict=False):
                    if len(old) == len(new) and _varied(fresh, new) > _varied(chosen, old):
                        for i, j in zip(old, new, strict=True):
                            chosen[i] = fresh[j]
        return sampled, chosen


def _is_self_judged(of: ProcessedPrompt | RolloutGroup) -> bool:
    return of.record.verifier == SELF_JUDGE


def _units(scored: Sequence[Scored], kind: Kind) -> list[list[int]]:
    """Indices of the groups of `kind` in `scored`, those of a pair together."""
    units: dict[str, list[int]] = {}
    for i, (_, group) in enumerate(scored):
        record = group.record
        if record.kind == kind:
            pair = record.origin.pair if isinstance(record, RecycledRecord) else ""
            units.setdefault(pair or str(i), []).append(i)
    return list(units.values())


def _varied(scored: Sequence[Scored], unit: Sequence[int]) -> int:
    """How many groups of `unit` have a gradient."""
    return sum(not scored[i][1].zero_variance for i in unit)
