"""The policy update: batches → gradients → optimizer steps.

Shapes: R completions of an optimizer step on this process, N completion tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from spark_vl.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from spark_vl.distributed.launch import check_launch, strategy
from spark_vl.distributed.step import GradientStep
from spark_vl.families.base import Processor
from spark_vl.policy.batch import Batch
from spark_vl.policy.losses import policy_loss
from spark_vl.policy.packing import Pack, PackItem, make_pack
from spark_vl.policy.policy import load_policy

GAP = "rollout/sampler_logprob_gap"
"""The metric that compares the update's log-probabilities with the sampler's: mean absolute difference per token."""

Add = Callable[[str, float, float], None]
"""Adds to a mean: (name, sum, number of observations in it), as `Means.add`."""
Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a progress bar: (what is counted, how many there are) → advance(how many more are done)."""


class NonFiniteUpdateError(ArithmeticError):
    """The loss or the gradient of so many updates in a row was not finite that something is wrong."""


def load_updater(config: TrainConfig, accelerator: Accelerator, processor: Processor, *, updates: int) -> Updater:
    """Load the policy, its reference if `objective.beta` asks for one, and an AdamW for `updates` optimizer updates.

    Raises:
        LaunchError: what runs is not what the launch asked for.
    """
    sampled_from = {
        "temperature": config.rollout.temperature,
        "suppressed_token_ids": processor.suppressed_token_ids,
    }
    low = getattr(torch, config.model.dtype)
    # DeepSpeed keeps float32 weights of its own; elsewhere what is trained has to be float32.
    trained = low if strategy(accelerator).startswith("zero") else torch.float32
    policy = load_policy(config.model, dtype=low if config.model.lora else trained, trained=trained, **sampled_from)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    check_launch(accelerator, policy)
    # Made now, for DeepSpeed may have put another optimizer into its place. It is not prepared: Accelerate's would step
    # once for each process.
    scheduler = get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=settings.warmup_updates, num_training_steps=updates
    )
    accelerator.register_for_checkpointing(scheduler)
    reference = None
    if config.objective.beta > 0 and not config.model.lora:
        reference = _frozen(accelerator, load_policy(config.model, dtype=low, **sampled_from).eval())
    return Updater(
        accelerator,
        policy,
        reference,
        optimizer,
        scheduler,
        processor,
        config.objective,
        settings,
    )


def _frozen(accelerator: Accelerator, reference: torch.nn.Module) -> torch.nn.Module:
    """`reference` on this device, sharded if the policy is."""
    reference.requires_grad_(False)
    match strategy(accelerator):
        case "zero3":
            import deepspeed

            config = deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
            config["zero_optimization"].pop("offload_optimizer", None)
            return deepspeed.initialize(model=reference, config=config)[0]
        case "fsdp2":
            return accelerator.prepare_model(reference, evaluation_mode=True)
        case _:
            return reference.to(accelerator.device)


class Updater:
    """Moves the policy's weights.

    Args:
        accelerator: wraps `policy` and `optimizer`, which it has prepared.
        policy: as prepared, so maybe wrapped.
        reference: the frozen policy of the KL penalty; None: the policy without its adapters, if `objective.beta` asks
            for one.
        processor: knows the padding.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        reference: torch.nn.Module | None,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        processor: Processor,
        objective: ObjectiveConfig,
        settings: OptimizerConfig,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.processor = processor
        self.objective = objective
        self.settings = settings
        self.skipped_in_a_row = 0
        self._step = GradientStep(accelerator, policy, optimizer, max_grad_norm=settings.max_grad_norm)
        # One token, at weight 0.
        padding = PackItem(processor.padding, [processor.stop_token_ids[:1]], [0])
        self._padding = make_pack([padding], padding=processor.padding)

    def use_settings(self) -> None:
        """Take learning rate, betas and weight decay from the settings, where a checkpoint has brought its own."""
        settings = self.settings
        self.scheduler.base_lrs = [settings.lr] * len(self.scheduler.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group |= {
                "lr": settings.lr * factor(self.scheduler.last_epoch),
                "initial_lr": settings.lr,
                "betas": tuple(settings.betas),
                "weight_decay": settings.weight_decay,
            }

    def update(
        self,
        batches: Sequence[Batch],
        *,
        add: Add,
        progress: Progress = lambda name, total: lambda finished: None,
    ) -> None:
        """Take one optimizer step on each of `batches`, in order. Collective.

        Args:
            batches: of one `BatchMaker` call, so as many on each process.
            add: takes the metrics.
            progress: counts forward passes.

        Raises:
            NonFiniteUpdateError: `max_skipped_updates` updates in a row were skipped.
        """
        # The first step is on-policy: its ratio is 1 by definition. The later ones need the policy that sampled.
        old = [None if i == 0 else self.score(batch.passes) for i, batch in enumerate(batches)]
        advance = progress("updating", sum(len(batch.passes) for batch in batches))
        for batch, old_logprobs in zip(batches, old, strict=True):
            moved = self._optimizer_step(batch, old_logprobs, add, advance)
            self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.settings.max_skipped_updates:
                raise NonFiniteUpdateError(
                    f"the loss or the gradient of {self.skipped_in_a_row} updates in a row was not finite "
                    "(optimizer.max_skipped_updates)"
                )

    @torch.no_grad()
    def score(self, passes: Sequence[Pack | None]) -> list[torch.Tensor]:
        """[N] log-probabilities under the policy as it is now, for each pass; padding (None) is run too. Collective:
        as many passes on each process."""
        return [self.policy((pack or self._padding).to(self.accelerator.device)).logprobs for pack in passes]

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's own state lacks."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made."""
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _optimizer_step(
        self, batch: Batch, old_logprobs: list[torch.Tensor] | None, add: Add, advance: Callable[[int], None]
    ) -> bool:
        """Returns whether the weights were moved; they are not where the gradient is not finite."""
        step_loss = 0.0
        nothing = torch.zeros(1, device=self.accelerator.device)
        for i, real in enumerate(batch.passes):
            # Padding runs through the same code: under ZeRO-3 every module must be called in the same order on all
            # processes, in the backward pass too.
            pack = (real or self._padding).to(self.accelerator.device)
            reference = self._reference_score(pack)
            with self._step.micro_batch(last=i + 1 == len(batch.passes)):
                scores = self.policy(pack)
                loss, row_sums = policy_loss(
                    self.objective.loss,
                    scores.logprobs,
                    batch.advantages if real else nothing,
                    pack.row_N,
                    batch.weights if real else nothing,
                    batch.totals,
                    clip_low=self.objective.clip_low,
                    clip_high=self.objective.clip_high,
                    old_logprobs=None if old_logprobs is None else old_logprobs[i],
                    ref_logprobs=reference,
                    beta=self.objective.beta,
                    entropies=scores.entropy,
                    entropy_bonus=self.objective.entropy_bonus,
                )
                self._step.backward(loss)
            if real:
                step_loss += float(loss.detach())
                _report(batch, row_sums, add)
                if old_logprobs is None:  # the policy has not moved since the engine sampled: both should agree
                    gap = scores.logprobs.detach() - batch.sampler_logprobs_of(pack)
                    add(GAP, float(gap.abs().sum()), len(gap))
                    add("rollout/sampler_ratio", float(gap.exp().sum()), len(gap))
            advance(1)
        lr = self.optimizer.param_groups[0]["lr"]
        norm, moved = self._step.step()
        if moved:
            self.scheduler.step()
        # The loss is a sum over processes, each of which has its part of it.
        add("update/loss", step_loss, 1 / self.accelerator.num_processes)
        add("update/grad_norm", norm, 1.0)
        add("update/lr", lr, 1.0)
        add("update/skipped", float(not moved), 1.0)
        return moved

    @torch.no_grad()
    def _reference_score(self, pack: Pack) -> torch.Tensor | None:
        if self.objective.beta == 0:
            return None
        if self.reference is None:
            return self.policy(pack, adapters=False).logprobs
        return self.reference(pack).logprobs


def _report(batch: Batch, row_sums: Mapping[str, torch.Tensor], add: Add) -> None:
    """The metrics of one pack, from its sums over the tokens of each completion; KL also for each kind of prompt."""
    lengths = row_sums["tokens"].tolist()
    for name, values in row_sums.items():
        if name != "tokens":
            add(f"update/{name}", float(values.sum()), sum(lengths))
    if "kl" in row_sums:
        for kind, value, length in zip(batch.kinds, row_sums["kl"].tolist(), lengths, strict=True):
            add(f"{kind}/kl", value, length)
