"""Sharded weights, whole for as long as a phase of sampling takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from spark_vl.distributed.launch import deepspeed_engine, strategy


@contextmanager
def whole_weights(accelerator: Accelerator, policy: torch.nn.Module) -> Iterator[None]:
    """Hold all weights on every process inside; as they were afterwards, also after an exception. Collective.

    Args:
        policy: as prepared; where its weights are not sharded nothing happens.
    """
    match strategy(accelerator):
        case "zero3":
            with _whole_zero3(deepspeed_engine(policy)):
                yield
        case "fsdp2":
            with _whole_fsdp2(policy, accelerator.state.fsdp_plugin.reshard_after_forward):
                yield
        case _:
            yield


@contextmanager
def _whole_zero3(engine: Any) -> Iterator[None]:
    """As `deepspeed.zero.unwrap_model_for_generation`, which does not restore the hooks after an exception, and leaves
    the hook of the outermost module, a collective call that processes would make as often as they decode."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        # The hooks would release each layer's weights when it has been run.
        for hook in (*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


@contextmanager
def _whole_fsdp2(policy: torch.nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()


def each_process(accelerator: Accelerator, here: int) -> list[int]:
    """What `here` is on each process. Collective."""
    return accelerator.gather(torch.tensor([here], device=accelerator.device)).tolist()


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether `here` is true on any process. Collective."""
    return any(each_process(accelerator, int(here)))
