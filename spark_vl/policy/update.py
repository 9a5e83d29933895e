"""The policy update: batches → gradients → optimizer steps.

Shapes: R completions of an optimizer step on this process, N completion tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model, gather_object

from spark_vl.config import ModelConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from spark_vl.data.cells import count
from spark_vl.distributed.launch import check_launch, strategy
from spark_vl.distributed.step import GradientStep
from spark_vl.families.base import Processor
from spark_vl.policy.batch import Batch
from spark_vl.policy.head import TokenScores
from spark_vl.policy.losses import importance_weights, policy_loss
from spark_vl.policy.packing import Pack, PackItem, make_pack
from spark_vl.policy.policy import load_policy
from spark_vl.policy.schedule import learning_rate

GAP = "rollout/sampler_logprob_gap"
"""The metric that compares the update's log-probabilities with the sampler's: mean absolute difference per token."""
MAX_GAP = "rollout/sampler_logprob_gap_max"
"""The largest difference of a token, over all processes."""

Add = Callable[[str, float, float], None]
"""Adds to a mean: (name, sum, number of observations in it), as `Means.add`."""
Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a progress bar: (what is counted, how many there are) → advance(how many more are done)."""


class NonFiniteUpdateError(ArithmeticError):
    """The loss or the gradient of so many updates in a row was not finite that something is wrong."""


def load_updater(config: TrainConfig, accelerator: Accelerator, processor: Processor, *, updates: int) -> Updater:
    """Load the policy, its reference if `objective.beta` asks for one, and an AdamW.

    Args:
        updates: how many optimizer updates the run plans.

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
        parameter_groups(policy, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    check_launch(accelerator, policy)
    reference = None
    if config.objective.beta > 0 and not config.model.lora:
        reference = _load_reference(config.model, accelerator, low, sampled_from)
    return Updater(
        accelerator,
        policy,
        reference,
        optimizer,
        processor,
        config.objective,
        settings,
        updates=updates,
        importance_clip=config.rollout.vllm.importance_clip if config.rollout.engine == "vllm" else None,
    )


def parameter_groups(policy: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, for an optimizer: first what decays (matrices, embeddings, kernels), then, if any, what does not
    (norms, biases)."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in policy.parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor where it has taken a parameter away, and notes its shape.
            shape = vars(parameter).get("ds_shape", parameter.shape)
            groups[len(shape) < 2]["params"].append(parameter)
    return [group for group in groups if group["params"]]  # adapters have neither norms nor biases


def _load_reference(
    config: ModelConfig, accelerator: Accelerator, low: torch.dtype, sampled_from: Mapping[str, Any]
) -> Callable[[Pack], TokenScores]:
    """The policy that the run begins with, frozen, on this device, sharded if the policy is.

    It computes in the policy's own numerics, so that their divergence begins at 0: of weights of type `low`, or under
    autocast where the policy's are float32 and whole.
    """
    held = strategy(accelerator)
    whole = held in ("single", "ddp")
    reference = load_policy(config, dtype=torch.float32 if whole else low, **sampled_from)
    reference.eval().requires_grad_(False)
    match held:
        case "zero3":
            import deepspeed

            settings = deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
            settings["zero_optimization"].pop("offload_optimizer", None)
            return deepspeed.initialize(model=reference, config=settings)[0]
        case "fsdp2":
            # Not Accelerate's `prepare_model`, which would leave it whole, and write it into each checkpoint.
            return fsdp2_prepare_model(accelerator, reference)
        case "single" | "ddp":
            cast_ahead(reference, low)
    reference.to(accelerator.device)

    def score(pack: Pack) -> TokenScores:
        with accelerator.autocast():  # does nothing under DeepSpeed
            return reference(pack)

    return score


def cast_ahead(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Hold in `dtype` what autocast casts to it in each pass: the weights of linear layers and convolutions. Norms and
    embeddings, also where the head is tied to them, stay as they are. Under autocast no result changes."""
    cast = (torch.nn.Linear, torch.nn.Conv3d)
    others = {
        parameter
        for module in model.modules()
        if not isinstance(module, cast)
        for parameter in module.parameters(recurse=False)
    }
    for parameter in set(model.parameters()) - others:
        parameter.data = parameter.data.to(dtype)


class Updater:
    """Moves the policy's weights.

    Args:
        accelerator: wraps `policy` and `optimizer`, which it has prepared.
        policy: as prepared, so maybe wrapped.
        reference: scores with the frozen policy of the KL penalty; None: the policy without its adapters does, if
            `objective.beta` asks for one.
        processor: knows the padding.
        updates: how many optimizer updates the run plans; the learning rate follows the plan.
        importance_clip: see `VLLMConfig`; None: tokens are not weighted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        reference: Callable[[Pack], TokenScores] | None,
        optimizer: torch.optim.Optimizer,
        processor: Processor,
        objective: ObjectiveConfig,
        settings: OptimizerConfig,
        *,
        updates: int,
        importance_clip: float | None = None,
    ) -> None:
        self.importance_clip = importance_clip
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.processor = processor
        self.objective = objective
        self.settings = settings
        self.updates = updates
        self.skipped_in_a_row = 0
        self._step = GradientStep(accelerator, policy, optimizer, max_grad_norm=settings.max_grad_norm)
        # One token, at weight 0.
        padding = PackItem(processor.padding, [processor.stop_token_ids[:1]], [0])
        self._padding = make_pack([padding], padding=processor.padding)

    def use_settings(self) -> None:
        """Take betas and weight decay from the settings, where a checkpoint has brought its own."""
        for group in self.optimizer.param_groups:
            group["betas"] = tuple(self.settings.betas)
        self.optimizer.param_groups[0]["weight_decay"] = self.settings.weight_decay  # the other, if any, never decays

    def update(
        self,
        batches: Sequence[Batch],
        *,
        first: int,
        add: Add,
        progress: Progress = lambda name, total: lambda finished: None,
    ) -> None:
        """Take one optimizer step on each of `batches`, in order. Collective.

        Args:
            batches: of one `BatchMaker` call, so as many on each process.
            first: place of the first one in the plan of the run, from 0 to `updates` - 1.
            add: takes the metrics.
            progress: counts forward passes.

        Raises:
            NonFiniteUpdateError: `max_skipped_updates` updates in a row were skipped.
        """
        # The first step is on-policy: its ratio is 1 by definition. The later ones need the policy that sampled.
        old = [None if i == 0 else self.score(batch.passes) for i, batch in enumerate(batches)]
        advance = progress("updating", sum(len(batch.passes) for batch in batches))
        for i, (batch, old_logprobs) in enumerate(zip(batches, old, strict=True)):
            lr = learning_rate(self.settings, first + i, self.updates)
            moved = self._optimizer_step(batch, old_logprobs, lr, add, advance)
            self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.settings.max_skipped_updates:
                raise NonFiniteUpdateError(
                    f"the loss or the gradient of {self.skipped_in_a_row} updates in a row was not finite "
                    "(optimizer.max_skipped_updates)"
                )

    @torch.no_grad()
    def score(self, passes: Sequence[Pack | None]) -> list[torch.Tensor]:
        """[N] log-probabilities under the policy as it is now, without dropout, for each pass; padding (None) is run
        too. Collective: as many passes on each process."""
        with self._as_sampled():
            return [self.policy((pack or self._padding).to(self.accelerator.device)).logprobs for pack in passes]

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's own state lacks."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made."""
        self.skipped_in_a_row = count(state, "skipped_in_a_row")

    def _optimizer_step(
        self,
        batch: Batch,
        old_logprobs: list[torch.Tensor] | None,
        lr: float,
        add: Add,
        advance: Callable[[int], None],
    ) -> bool:
        """Returns whether the weights were moved; they are not where the gradient is not finite."""
        step_loss = 0.0
        largest = 0.0
        nothing = torch.zeros(1, device=self.accelerator.device)
        for i, real in enumerate(batch.passes):
            # Padding runs through the same code: under ZeRO-3 every module must be called in the same order on all
            # processes, in the backward pass too.
            pack = (real or self._padding).to(self.accelerator.device)
            reference = self._reference_score(pack)
            sampled = batch.sampler_logprobs_of(pack) if real else None
            with self._step.micro_batch(last=i + 1 == len(batch.passes)):
                scores = self.policy(pack)
                importance = None
                if self.importance_clip is not None and sampled is not None:
                    behavior = scores.logprobs if old_logprobs is None else old_logprobs[i]
                    importance = importance_weights(behavior, sampled, self.importance_clip)
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
                    importance=importance,
                )
                self._step.backward(loss)
            if sampled is not None:
                step_loss += float(loss.detach())
                _report(batch, row_sums, add)
                if old_logprobs is None:  # the policy has not moved since the engine sampled: both should agree
                    gap = scores.logprobs.detach() - sampled
                    add(GAP, float(gap.abs().sum()), len(gap))
                    largest = max(largest, float(gap.abs().max()))
                    add("rollout/sampler_ratio", float(gap.exp().sum()), len(gap))
                if importance is not None:
                    add("update/importance_weight", float(importance.sum()), len(importance))
                    clipped = importance >= cast(float, self.importance_clip)
                    add("update/importance_clipped", float(clipped.sum()), len(importance))
            advance(1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm, moved = self._step.step()
        if old_logprobs is None:
            add(MAX_GAP, max(gather_object([largest])), 1.0)
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
            with self._as_sampled():
                return self.policy(pack, adapters=False).logprobs
        return self.reference(pack).logprobs

    @contextmanager
    def _as_sampled(self) -> Iterator[None]:
        """Without dropout, as the engine samples."""
        was_training = self.policy.training
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train(was_training)


def _report(batch: Batch, row_sums: Mapping[str, torch.Tensor], add: Add) -> None:
    """The metrics of one pack, from its sums over the tokens of each completion; KL also for each kind of prompt."""
    lengths = row_sums["tokens"].tolist()
    for name, values in row_sums.items():
        if name != "tokens":
            add(f"update/{name}", float(values.sum()), sum(lengths))
    if "kl" in row_sums:
        for kind, value, length in zip(batch.kinds, row_sums["kl"].tolist(), lengths, strict=True):
            add(f"{kind}/kl", value, length)
