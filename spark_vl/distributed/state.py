"""Weights, optimizer and random generators on disk.

What is written here is safetensors and JSON, which hold no code. DeepSpeed and PyTorch's distributed checkpoints
(FSDP2) have formats of their own, and read them by pickle: whoever wrote such a file decides what runs (`UNPICKLED`).
Accelerate's `save_state` is not used: it pickles optimizer and random generators, and only logs where it cannot restore
the latter.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model

from spark_vl.distributed.launch import deepspeed_engine, strategy

UNPICKLED = {"fsdp2", "zero1", "zero2", "zero3"}
"""Ways of holding weights whose libraries read their checkpoints by pickle."""
_WEIGHTS, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_ENGINE = "pytorch_model"
"""Folder of what DeepSpeed writes."""


def save_state(
    accelerator: Accelerator, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Write weights and optimizer, both as prepared, into `folder`, each process its part. Collective."""
    if engine := deepspeed_engine(policy):
        engine.save_checkpoint(str(folder), _ENGINE)
    elif strategy(accelerator) == "fsdp2":
        plugin = accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, accelerator, policy, folder)
        save_fsdp_optimizer(plugin, accelerator, optimizer, policy, folder)
    elif accelerator.is_main_process:
        save_model(accelerator.unwrap_model(policy), str(folder / _WEIGHTS))
        _save_optimizer(optimizer, folder / _OPTIMIZER)


def load_state(
    accelerator: Accelerator, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Read what `save_state` has written into `folder`. Runs what its maker wants under `UNPICKLED`. Collective."""
    if engine := deepspeed_engine(policy):
        engine.load_checkpoint(str(folder), _ENGINE)
    elif strategy(accelerator) == "fsdp2":
        plugin = accelerator.state.fsdp_plugin
        load_fsdp_model(plugin, accelerator, policy, folder)
        load_fsdp_optimizer(plugin, accelerator, optimizer, policy, folder)
    else:
        load_model(accelerator.unwrap_model(policy), folder / _WEIGHTS)
        _load_optimizer(optimizer, folder / _OPTIMIZER)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators, on a GPU also that of `device`, as JSON values."""
    version, words, spare = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    numpy = numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}}
    state = {"python": [version, list(words), spare], "numpy": numpy, "torch": _to_text(torch.get_rng_state())}
    return state | ({"cuda": _to_text(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let the generators go on where `random_state` was called; one that it lacks stays as it is."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_from_text(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]), device)


def _save_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """The tensors of each parameter as `0.exp_avg`, and the groups, which are plain values, as JSON beside them."""
    state = optimizer.state_dict()
    tensors = {
        f"{parameter}.{name}": tensor.contiguous()
        for parameter, of_parameter in state["state"].items()
        for name, tensor in of_parameter.items()
    }
    save_file(tensors, file, metadata={"param_groups": json.dumps(state["param_groups"])})


def _load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Only the tensors are restored; the settings of the groups are those of the run's configuration.

    Raises:
        ValueError: the groups have other parameters.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    groups = optimizer.state_dict()["param_groups"]
    with safe_open(file, framework="pt") as saved:
        held = [group["params"] for group in json.loads(saved.metadata()["param_groups"])]
        if held != (here := [group["params"] for group in groups]):
            raise ValueError(f"{file.name}: found groups of the parameters {held!r:.80}; allowed: {here!r:.80}")
        for key in saved.keys():  # noqa: SIM118 - it is not a mapping
            parameter, _, name = key.partition(".")
            # Without a copy it would be the file in memory, which kept a checkpoint's disk space after it is deleted.
            state.setdefault(int(parameter), {})[name] = saved.get_tensor(key).clone()
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    shapes = {number: parameter.shape for number, parameter in enumerate(parameters)}
    for number, tensors in state.items():
        for name, tensor in tensors.items():
            if tensor.dim() and tensor.shape != shapes.get(number):
                found, allowed = tuple(tensor.shape), tuple(shapes.get(number, ()))
                raise ValueError(f"{file.name}: {number}.{name}: found the shape {found}; allowed: {allowed}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
