"""Verified groups and their advantages → the batches of the optimizer steps, in packs.

Shapes: R completions of an optimizer step on this process, N completion tokens of a pack.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from spark_vl.config import ObjectiveConfig, OptimizerConfig
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.policy.losses import StepTotals
from spark_vl.policy.packing import Pack, PackItem, pack_items
from spark_vl.records import Kind, RolloutGroup

Scored = tuple[ProcessedPrompt, RolloutGroup]
"""A prompt as the model takes it, with its verified completions. The pair stays together from sampling to update."""


@dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from, on this process."""

    passes: list[Pack | None]
    """The packs, and None for the padding that makes their number the same on every process."""
    advantages: torch.Tensor
    """[R]"""
    weights: torch.Tensor
    """[R] weight of the completion's kind of prompt in the loss."""
    kinds: list[Kind]
    """[R]"""
    sampler_logprobs: list[tuple[float, ...]]
    """[R] ragged: log-probability of each token as the rollout engine gave it."""
    totals: StepTotals

    def sampler_logprobs_of(self, pack: Pack) -> torch.Tensor:
        """[N] the rollout engine's log-probabilities of the tokens of `pack`."""
        rows = torch.unique_consecutive(pack.row_N).tolist()
        flat = [value for row in rows for value in self.sampler_logprobs[row]]
        return torch.tensor(flat, device=pack.row_N.device)


@dataclass(kw_only=True)
class BatchMaker:
    """Deals groups out to the optimizer steps of one update phase, and lays each part out in packs."""

    accelerator: Accelerator
    processor: Processor
    """Knows the padding."""
    objective: ObjectiveConfig
    """Weights of the kinds of prompts."""
    optimizer: OptimizerConfig
    """`updates_per_batch` and `tokens_per_pack`."""
    max_new_tokens: int
    """Normalizer of Dr. GRPO."""

    def __call__(self, scored: Sequence[Scored], advantages: Sequence[Sequence[float]], *, seed: str) -> list[Batch]:
        """One batch for each optimizer step that any process has completions for. Collective.

        Args:
            scored: groups of this process, maybe none.
            advantages: [groups][G] of their completions.
            seed: decides which groups make up which batch.
        """
        learned = list(zip(scored, advantages, strict=True))
        random.Random(seed).shuffle(learned)
        steps = self.optimizer.updates_per_batch
        batches = [self._batch(learned[i::steps]) for i in range(steps)]
        return [batch for batch in batches if batch.totals.completions]

    def _batch(self, learned: Sequence[tuple[Scored, Sequence[float]]]) -> Batch:
        """Every process makes the same number of passes, and at least one: some run padding."""
        # Without a KL term or an entropy bonus, equal rewards mean no gradient at all: such a group costs no pass.
        skip_flat = self.objective.beta == 0 and self.objective.entropy_bonus == 0
        items: list[PackItem] = []
        advantages: list[float] = []
        kinds: list[Kind] = []
        sampler_logprobs: list[tuple[float, ...]] = []
        for (prompt, group), of_group in learned:
            rows = range(len(advantages), len(advantages) + len(group.rollouts))
            advantages += of_group
            kinds += [group.record.kind] * len(rows)
            sampler_logprobs += [rollout.logprobs for rollout in group.rollouts]
            if not (skip_flat and group.zero_variance):
                items.append(PackItem(prompt, [rollout.token_ids for rollout in group.rollouts], rows))
        packs = pack_items(items, tokens_per_pack=self.optimizer.tokens_per_pack, padding=self.processor.padding)
        device = self.accelerator.device
        sizes = torch.tensor([len(kinds), sum(map(len, sampler_logprobs)), len(packs)], device=device)
        sizes = self.accelerator.gather(sizes[None])
        completions, tokens, _ = sizes.sum(0).tolist()
        passes = max(1, int(sizes[:, 2].max()))
        return Batch(
            [*packs, *[None] * (passes - len(packs))],
            torch.tensor(advantages, device=device),
            torch.tensor([self.objective.weights[kind] for kind in kinds], device=device),
            kinds,
            sampler_logprobs,
            StepTotals(completions, tokens, self.max_new_tokens),
        )
