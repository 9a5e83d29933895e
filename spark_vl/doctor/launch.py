"""What is set on this machine beside a run's own configuration: Accelerate's default file, environment variables."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from spark_vl.doctor.finding import Finding, fault, ok, warning
from spark_vl.doctor.machine import usable_cores

_MANY_CORES = 8
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "each kernel on the GPU is waited for: several times slower",
    "NCCL_P2P_DISABLE": "GPUs do not talk to each other directly: slow (GeForce RTX 40 cards need it)",
    "NCCL_SHM_DISABLE": "GPUs of one machine talk over the network: slow",
    "NCCL_IB_DISABLE": "machines do not use InfiniBand: slow where there is any",
}
"""Variable → what it does unless it is empty or 0."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


def accelerate() -> Iterator[Finding]:
    """What `accelerate launch` does here when it is not given a configuration file.

    As Accelerate 1.15 does it (commands/launch.py): `NO` and `MULTI_CPU` start one process, whatever `num_processes`
    says, unless MPI is set up; the other types start all of them. Without a GPU it shards nothing under `FSDP`.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.utils import ComputeEnvironment

    subject, gpus, file = "accelerate launch", torch.cuda.device_count(), Path(default_config_file)
    if not file.exists():
        yield ok(subject, f"no default file; processes it starts: {max(1, gpus)}")
        return
    config = load_config_from_file(None)
    other = f"give another with --config_file, or rm {shlex.quote(str(file))}"
    if config.compute_environment != ComputeEnvironment.LOCAL_MACHINE:
        where = config.compute_environment.value
        yield warning(subject, f"{file}", follows=f"it starts runs on {where}, not on this machine", fix=other)
        return
    kind, processes = config.distributed_type.value, config.num_processes // config.num_machines
    found = f"{file} asks for {kind}, processes on this machine: {processes}"
    if config.num_processes < 1:
        yield warning(subject, found, follows="it stops at once", fix="give --num_processes")
    elif kind in ("NO", "MULTI_CPU") and config.num_processes > 1 and "mpirun_hostfile" not in config.mpirun_config:
        yield fault(
            subject,
            found,
            follows="it silently starts one process, and spark-vl train stops",
            fix=f"distributed_type: MULTI_GPU, FSDP and DEEPSPEED start all, also on CPUs; or {other}",
        )
    elif kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"):
        yield warning(subject, found, follows="spark-vl has not been run with that", fix=other)
    elif kind == "FSDP" and int(config.fsdp_config.get("fsdp_version", 1)) != 2:
        yield fault(
            subject,
            found,
            follows="it is FSDP version 1, spark-vl shards with version 2, and train stops",
            fix=f"fsdp_version: 2, below fsdp_config; or {other}",
        )
    elif kind == "FSDP" and not gpus:
        yield warning(
            subject,
            found,
            follows="without a GPU Accelerate shards nothing, and says nothing: each process trains a copy of its own. "
            "spark-vl train makes it shard over gloo; other programs that this file starts do not",
            fix=f"distributed_type: DEEPSPEED shards on CPUs; or {other}",
        )
    elif processes > gpus > 0:
        yield fault(subject, found, follows=f"each needs a GPU of its own, and there are {gpus}", fix=other)
    elif processes < gpus:
        yield warning(subject, found, follows=f"{gpus - processes} of {gpus} GPUs stay idle", fix=other)
    else:
        yield ok(subject, found)


def environment() -> Iterator[Finding]:
    """Variables that change what a run does without its saying so."""
    yield from list(_variables()) or [ok("environment", "no variable that silently changes a run")]


def _variables() -> Iterator[Finding]:
    import torch

    cores, gpus = usable_cores(), torch.cuda.device_count()
    if "OMP_NUM_THREADS" not in os.environ and cores >= _MANY_CORES:
        yield warning(
            "OMP_NUM_THREADS",
            f"unset, with {cores} cores",
            follows="accelerate launch and torchrun set it to 1: images, and an optimizer in CPU memory, get one core",
            fix=f"export OMP_NUM_THREADS={cores // max(gpus, 1)}, which is cores / processes",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        name = "CUDA_VISIBLE_DEVICES"
        yield warning(name, "hides all GPUs", follows="training silently runs on the CPU", fix=f"unset {name}")
    for name, follows in _SLOW.items():
        if os.environ.get(name, "") not in ("", "0"):
            yield warning(name, os.environ[name], follows=follows, fix=f"unset {name}")
    if names := " ".join(name for name in _LAUNCHER if name in os.environ):
        follows = "launchers set them for their processes; left over, a run stops, or waits for others that never come"
        yield warning("environment", f"{names} set", follows=follows, fix=f"unset {names}")
    if names := " ".join(sorted(name for name in os.environ if name.startswith("ACCELERATE_"))):
        follows = "Accelerate obeys them in every run, unless a configuration file or an option says otherwise"
        yield warning("environment", f"{names} set", follows=follows, fix=f"unset {names}")
