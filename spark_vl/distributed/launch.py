"""Starting under `accelerate launch`, and the check that what runs is what was asked for.

Accelerate 1.15 falls back in silence in some combinations: `--cpu --num_processes 2` starts one process (without MPI),
and on a machine without a GPU a launched group of processes stays apart, each believing to be alone, unless
`PartialState(cpu=True)` is made first. It takes FSDP for CPUs only when it is told that they are GPUs.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spark_vl.config import ConfigError, TrainConfig

_COLLECTIVE_GRACE_S = 120.0
"""How much later than the watch, which names the process that is missing, the communication library gives up."""


class LaunchError(ConfigError):
    """What runs is not what was asked for."""


def start_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Join the other processes of the launch, on CPU where there is no accelerator.

    Args:
        config: of the run.
        folder: of the run, where trackers write.

    Raises:
        LaunchError: the launch asked for several processes and started one.
    """
    state = _join(config.distributed.timeout_s)
    if _launched() and not torch.accelerator.is_available() and _asked_for("FSDP"):
        # Opens the branch of Accelerate that knows FSDP; torch's `fully_shard` itself runs on CPUs over gloo.
        state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no",
        log_with=config.logging.trackers or None,
        project_dir=folder,
    )
    if accelerator.mixed_precision != "no" and strategy(accelerator) == "fsdp2":
        # Accelerate's policy would round what leaves the outermost module, the log-probabilities, to bfloat16.
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Packs are the micro-batches, and how many an update has differs from one to the next.
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.max_grad_norm,
        }
        accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"][
            "stage3_gather_16bit_weights_on_model_save"
        ] = True
    return accelerator


def start_replicas(timeout_s: float) -> Accelerator:
    """Join the other processes of the launch, each of which holds a whole model: to share out an evaluation.

    Args:
        timeout_s: seconds that a process waits for the others.

    Raises:
        LaunchError: as `start_accelerator`, or the launch asks for sharded weights.
    """
    for name in ("DEEPSPEED", "FSDP"):
        if _asked_for(name):
            raise LaunchError(f"launch: {name} shards weights; an evaluation takes scripts/accelerate/ddp.yaml")
    _join(timeout_s)
    return Accelerator(cpu=_launched() and not torch.accelerator.is_available())


def _launched() -> bool:
    return "WORLD_SIZE" in os.environ


def _join(timeout_s: float) -> PartialState:
    if "MASTER_ADDR" in os.environ and not _launched():
        raise LaunchError(
            "launch: several processes were asked for (MASTER_ADDR is set), but one was started. `accelerate launch "
            "--cpu` and `distributed_type: MULTI_CPU` do that silently unless MPI is used; use a file of "
            "scripts/accelerate/, or torchrun"
        )
    on_cpu = _launched() and not torch.accelerator.is_available()
    # Before `Accelerator()`: see the top of the module.
    return PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s + _COLLECTIVE_GRACE_S))


def strategy(accelerator: Accelerator) -> str:
    """How the weights are held: `single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
    match accelerator.distributed_type:
        case DistributedType.NO:
            return "single"
        case DistributedType.DEEPSPEED:
            return f"zero{accelerator.deepspeed_plugin.zero_stage}"
        case DistributedType.FSDP:
            return "fsdp2"
        case _:
            return "ddp"


def describe_launch(accelerator: Accelerator) -> dict[str, Any]:
    """`processes`, `device` (its name), `strategy` and `precision` of what runs."""
    device = accelerator.device
    return {
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {device.type.upper()} with {os.cpu_count()} cores",
        "strategy": strategy(accelerator),
        "precision": accelerator.mixed_precision,
    }


def check_launch(accelerator: Accelerator, policy: torch.nn.Module) -> None:
    """Compare what runs with what the launch asked for.

    Args:
        policy: as prepared.

    Raises:
        LaunchError: the number of processes or the way in which the weights are held is another one.
    """
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise LaunchError(f"launch: {asked} processes were asked for, {accelerator.num_processes} run together")
    for name in ("DEEPSPEED", "FSDP"):
        if _asked_for(name) and accelerator.distributed_type != DistributedType[name]:
            raise LaunchError(f"launch: {name} was asked for, {accelerator.distributed_type.value} runs")
    runs = strategy(accelerator)
    found = _held(policy)
    if found != runs:
        raise LaunchError(f"launch: {runs} was asked for, but the policy is held as {found} ({type(policy).__name__})")


def _asked_for(plugin: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"


def _held(policy: torch.nn.Module) -> str:
    """How the weights of the prepared policy are held, as in `strategy`, read from the policy itself."""
    if isinstance(policy, DistributedDataParallel):
        return "ddp"
    if all(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        return "fsdp2"
    if engine := deepspeed_engine(policy):
        return f"zero{engine.zero_optimization_stage()}"
    return "single"


def deepspeed_engine(policy: torch.nn.Module) -> Any | None:
    """`policy`, as prepared, if it is a DeepSpeed engine."""
    # Not imported here: that takes seconds, and where DeepSpeed is not loaded there cannot be an engine.
    deepspeed = sys.modules.get("deepspeed")
    return policy if deepspeed and isinstance(policy, deepspeed.DeepSpeedEngine) else None
