"""One optimizer step over many passes, the same for plain PyTorch, DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from spark_vl.distributed.launch import deepspeed_engine


class GradientStep:
    """Accumulates the gradients of several passes and takes one optimizer step.

        for pack in packs:
            with step.micro_batch(last=pack is packs[-1]):
                step.backward(loss(policy(pack)))
        norm = step.step()

    The loss is a part of a sum over all passes and processes: gradients, which the libraries average over processes,
    are multiplied back.

    Args:
        accelerator: has prepared both.
        policy: as prepared.
        optimizer: as prepared.
        max_grad_norm: to which the gradient is clipped. DeepSpeed has it from `start_accelerator`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
    ) -> None:
        self.accelerator, self.policy, self.optimizer = accelerator, policy, optimizer
        self.max_grad_norm = max_grad_norm
        self.engine = deepspeed_engine(policy)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one pass; gradients are reduced over the processes with the last one."""
        if self.engine:
            self.engine.set_gradient_accumulation_boundary(last)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.policy):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`."""
        loss = loss * self.accelerator.num_processes
        if self.engine:
            self.engine.backward(loss)
        else:
            self.accelerator.backward(loss)

    def step(self) -> tuple[float, bool]:
        """Update the weights, unless the gradient is not finite. Gradients are zero afterwards.

        Returns:
            The norm of the gradient over all processes before clipping, and whether the weights were updated.
        """
        if self.engine:
            self.engine.step()
            moved = self.engine.was_step_applied()
            return (float(self.engine.get_global_grad_norm()) if moved else float("nan")), moved
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm))
        moved = norm < float("inf")  # False for NaN
        if moved:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, moved
