"""What two real processes hold for the weights, against the estimate: DDP, FSDP2 and DeepSpeed's stages, over gloo.

This file is also what each of the processes runs: it takes steps in one way of holding weights after the other, counts
the bytes of the tensors that are there when gradients are, and prints them.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spark_vl.config import ModelConfig
from spark_vl.demo.tiny import random_tiny
from spark_vl.estimate.shape import load_shape
from spark_vl.estimate.weights import Setup, held

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300
"""It takes half a minute, but DeepSpeed compiles its communication first where it has not yet."""
# (ZeRO stage, or how else; type; what is frozen)
CASES: list[tuple[int | str, str, list[str]]] = [
    ("ddp", "float32", []),
    ("fsdp", "float32", []),
    (1, "bfloat16", []),
    (2, "float32", []),
    (2, "bfloat16", ["vision"]),
    (3, "float32", []),
    (3, "bfloat16", ["vision"]),
]


@pytest.fixture(scope="module")
def measured() -> list[int]:
    """Bytes that a process holds, for each of `CASES`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stdout + run.stderr
    [line] = [line for line in run.stdout.splitlines() if line.startswith("HELD ")]
    return json.loads(line.removeprefix("HELD "))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_what_is_held_is_what_is_estimated(case, measured, tiny, tmp_path):
    how, dtype, freeze = CASES[case]
    tiny[0].config.save_pretrained(tmp_path)
    shape, model = load_shape(str(tmp_path)), ModelConfig(dtype=dtype, freeze=freeze)
    zero = how if isinstance(how, int) else 0
    rows = held(shape, model, Setup(gpus=2, zero=zero, fsdp=how == "fsdp"))
    # DeepSpeed's buckets were made small for the measurement.
    buffers = rows["communication buffers"].update if how == "ddp" else 0
    expected = sum(rows[name].update for name in ("weights", "gradients", "optimizer")) + buffers
    # DeepSpeed pads each tensor to equal parts, and ZeRO-2 keeps the gradient of the tensor at the border whole.
    assert measured[case] == pytest.approx(expected, rel=0.015)


# ── in each process ──


def tensors_held() -> dict[int, int]:
    """Address → bytes of the memory of every tensor that Python knows."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [
        tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu" and not is_wrapper(tensor)
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it is an FSDP2 tensor, which holds another one."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def measure(how: int | str, dtype: str, freeze: list[str]) -> int:
    """Bytes held by this process after a step and the next backward pass."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    before = tensors_held()
    model, _ = random_tiny(dtype=getattr(torch, dtype))
    if "vision" in freeze:
        model.model.visual.requires_grad_(False)
    ids = torch.full((1, 16), 20)
    ids[0, :4] = model.config.image_token_id
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(16).expand(3, 1, 16),
        "pixel_values": torch.randn(16, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    extra = 0
    if how == "fsdp":
        fully_shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-3)
    if isinstance(how, int):
        model = optimizer = deepspeed_engine(how, dtype, model, optimizer)
    elif how == "ddp":
        model = DistributedDataParallel(model)
        # The one thing that Python does not see.
        extra = sum(map(int, model._get_ddp_logging_data()["bucket_sizes"].split(", ")))
    for last in (False, True):
        loss = model(**batch).logits.float().square().mean()
        optimizer.backward(loss) if isinstance(how, int) else loss.backward()
        if not last:
            optimizer.step()
            if not isinstance(how, int):
                optimizer.zero_grad()
    del loss
    now = tensors_held()
    inputs = sum(tensor.nbytes for tensor in batch.values())
    return sum(size for address, size in now.items() if address not in before) + extra - inputs


def deepspeed_engine(stage: int, dtype: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The engine of the shipped configuration, with small buckets and nothing exempt from sharding."""
    import deepspeed

    config = json.loads((ROOT / f"scripts/deepspeed/zero{max(stage, 2)}.json").read_text())
    config |= {"bf16": {"enabled": dtype == "bfloat16"}, "train_micro_batch_size_per_gpu": 1}
    small = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    config["zero_optimization"] |= {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        **dict.fromkeys(small, 256),
    }
    config["zero_allow_untested_optimizer"] = True
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = [measure(*case) for case in CASES]
    if torch.distributed.get_rank() == 0:
        print("HELD", json.dumps(found), flush=True)
