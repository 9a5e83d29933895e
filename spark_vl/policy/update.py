"""The policy update: verified groups → packs → gradients → optimizer steps.

Shapes: R completions of the step on this process, N completion tokens of a pack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from spark_vl.advantages import group_advantages
from spark_vl.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from spark_vl.policy.losses import StepTotals, policy_loss
from spark_vl.policy.packing import Pack, PackItem, pack_items
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.processors import ProcessedPrompt, Processor
from spark_vl.records import RolloutGroup

Add = Callable[[str, float, float], None]
"""(name, sum, number of observations in it): as `Means.add`."""
Counting = Callable[[str, int], Callable[[int], None]]
"""(what is counted, how many there are) → a callable that hears of finished ones."""


def load_updater(config: TrainConfig, accelerator: Accelerator, processor: Processor, *, updates: int) -> Updater:
    """Load the policy, its reference if `objective.beta` asks for one, and an AdamW for `updates` optimizer updates."""
    sampled_from = {
        "temperature": config.rollout.temperature,
        "suppressed_token_ids": processor.suppressed_token_ids,
    }
    policy = load_policy(config.model, dtype=torch.float32, **sampled_from)
    reference = None
    if config.objective.beta > 0:
        dtype = getattr(torch, config.model.dtype)
        reference = load_policy(config.model, dtype=dtype, frozen=True, **sampled_from).to(accelerator.device)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay
    )
    scheduler = get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=settings.warmup_updates, num_training_steps=updates
    )
    # The scheduler is not prepared: Accelerate's would step once for each process.
    policy, optimizer = accelerator.prepare(policy, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    return Updater(
        accelerator,
        policy,
        reference,
        optimizer,
        scheduler,
        processor,
        config.objective,
        settings,
        max_new_tokens=config.rollout.max_new_tokens,
    )


class Updater:
    """Moves the policy's weights.

    Args:
        accelerator: wraps `policy` and `optimizer`, which it has prepared.
        policy: as prepared, so maybe wrapped.
        reference: the frozen policy of the KL penalty; None where `objective.beta` is 0.
        processor: knows the image token and the dummy image of a pack without images.
        max_new_tokens: normaliser of Dr. GRPO.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        reference: Policy | None,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        processor: Processor,
        objective: ObjectiveConfig,
        settings: OptimizerConfig,
        *,
        max_new_tokens: int,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.processor = processor
        self.objective = objective
        self.settings = settings
        self.max_new_tokens = max_new_tokens

    def update(
        self,
        groups: Sequence[RolloutGroup],
        prompts: Mapping[str, ProcessedPrompt],
        *,
        seed: str,
        add: Add,
        counting: Counting = lambda name, total: lambda finished: None,
    ) -> None:
        """Take `updates_per_batch` optimizer steps on verified `groups`, each on its own part of them.

        Args:
            groups: of this process. None of them may be empty of rollouts.
            prompts: the processed prompt of each group, by record id.
            seed: fixes which groups make up which part.
            add: takes the metrics.
            counting: hears of the progress, as `RunLog.counting`.
        """
        groups = list(groups)
        random.Random(seed).shuffle(groups)
        parts = [groups[i :: self.settings.updates_per_batch] for i in range(self.settings.updates_per_batch)]
        batches = [self._pack(part, prompts) for part in parts if part]
        # The first update is on-policy: its ratio is 1 by definition. The later ones need the policy that sampled.
        old = [None if i == 0 else self._scores(self.policy, batch) for i, batch in enumerate(batches)]
        advance = counting("updating", sum(len(batch.packs) for batch in batches))
        for batch, old_logprobs in zip(batches, old, strict=True):
            self._optimizer_step(batch, old_logprobs, add, advance)

    def _pack(self, groups: Sequence[RolloutGroup], prompts: Mapping[str, ProcessedPrompt]) -> _Batch:
        """Lay `groups` out in packs, with the advantages of their completions."""
        # Without a KL term or an entropy bonus, equal rewards mean no gradient at all. One pass is made in any case.
        skip_flat = self.objective.beta == 0 and self.objective.entropy_bonus == 0
        skip_flat = skip_flat and not all(group.zero_variance for group in groups)
        items, advantages, weights, kinds, engine_logprobs = [], [], [], [], []
        for group in groups:
            rows = range(len(advantages), len(advantages) + len(group.rollouts))
            advantages += group_advantages(group.rewards, normalise=self.objective.loss != "dr_grpo")
            weights += [self.objective.weights[group.record.kind]] * len(rows)
            kinds += [group.record.kind] * len(rows)
            engine_logprobs += [rollout.logprobs for rollout in group.rollouts]
            if not (skip_flat and group.zero_variance):
                completions = [rollout.token_ids for rollout in group.rollouts]
                items.append(PackItem(prompts[group.record.id], completions, rows))
        packs = pack_items(
            items,
            tokens_per_pack=self.settings.tokens_per_pack,
            dummy_image=self.processor.dummy_image,
            image_token_id=self.processor.image_token_id,
        )
        return _Batch(packs, torch.tensor(advantages), torch.tensor(weights), kinds, engine_logprobs)

    def _optimizer_step(
        self, batch: _Batch, old_logprobs: list[torch.Tensor] | None, add: Add, advance: Callable[[int], None]
    ) -> None:
        device = self.accelerator.device
        advantages, weights = batch.advantages.to(device), batch.weights.to(device)
        completions, tokens = self.accelerator.reduce(
            torch.tensor([len(batch.kinds), sum(map(len, batch.engine_logprobs))], device=device)
        ).tolist()
        totals = StepTotals(completions, tokens, self.max_new_tokens)
        # Every process makes the same number of passes: a process that has fewer packs repeats its last, at weight 0.
        n_packs = int(self.accelerator.gather(torch.tensor([len(batch.packs)], device=device)).max())
        step_loss = 0.0
        for turn in range(n_packs):
            padding = turn >= len(batch.packs)
            i = min(turn, len(batch.packs) - 1)
            pack = batch.packs[i].to(device)
            reference = None if self.reference is None else self._score(self.reference, pack)
            with nullcontext() if turn == n_packs - 1 else self.accelerator.no_sync(self.policy):
                scores = self.policy(pack)
                loss, row_sums = policy_loss(
                    self.objective.loss,
                    scores.logprobs,
                    advantages,
                    pack.row_N,
                    torch.zeros_like(weights) if padding else weights,
                    totals,
                    clip_low=self.objective.clip_low,
                    clip_high=self.objective.clip_high,
                    old_logprobs=None if old_logprobs is None else old_logprobs[i],
                    ref_logprobs=reference,
                    beta=self.objective.beta,
                    entropies=scores.entropy,
                    entropy_bonus=self.objective.entropy_bonus,
                )
                # Gradients are averaged over processes; the loss is a part of a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            if not padding:
                step_loss += float(loss.detach())
                _report(batch, row_sums, add)
                if old_logprobs is None:  # the policy has not moved since the engine sampled: both should say the same
                    gap = scores.logprobs.detach() - batch.engine_logprobs_of(pack)
                    add("engine/gap", float(gap.abs().sum()), len(gap))
                    add("engine/ratio", float(gap.exp().sum()), len(gap))
                advance(1)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        add("update/loss", step_loss, 1.0)
        add("update/grad_norm", float(norm), 1.0)
        add("update/lr", self.scheduler.get_last_lr()[0], 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def _scores(self, policy: torch.nn.Module, batch: _Batch) -> list[torch.Tensor]:
        return [self._score(policy, pack.to(self.accelerator.device)) for pack in batch.packs]

    @staticmethod
    @torch.no_grad()
    def _score(policy: torch.nn.Module, pack: Pack) -> torch.Tensor:
        return policy(pack).logprobs


def _report(batch: _Batch, row_sums: Mapping[str, torch.Tensor], add: Add) -> None:
    """The metrics of one pack, from its sums over the tokens of each completion; KL also for each kind of prompt."""
    lengths = row_sums["tokens"].tolist()
    for name, values in row_sums.items():
        if name != "tokens":
            add(f"update/{name}", float(values.sum()), sum(lengths))
    if "kl" in row_sums:
        for kind, value, length in zip(batch.kinds, row_sums["kl"].tolist(), lengths, strict=True):
            add(f"{kind}/kl", value, length)


@dataclass(frozen=True)
class _Batch:
    """What one optimizer step is made of, on this process."""

    packs: list[Pack]
    advantages: torch.Tensor
    """[R]"""
    weights: torch.Tensor
    """[R] of the kind of prompt."""
    kinds: list[str]
    """[R]"""
    engine_logprobs: list[tuple[float, ...]]
    """[R] ragged: what the rollout engine said of each token."""

    def engine_logprobs_of(self, pack: Pack) -> torch.Tensor:
        """[N] what the rollout engine said of the tokens of `pack`."""
        rows = torch.unique_consecutive(pack.row_N).tolist()
        flat = [value for row in rows for value in self.engine_logprobs[row]]
        return torch.tensor(flat, device=pack.row_N.device)
