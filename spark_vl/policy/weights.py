"""The policy's weights as another engine takes them: whole, merged, under the names of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from spark_vl.distributed.launch import strategy
from spark_vl.policy.policy import Policy

Bucket = list[tuple[str, Tensor]]
"""Weights that travel together: name in the Hugging Face model, value."""


@torch.no_grad()
def weight_buckets(
    accelerator: Accelerator, policy: Policy, *, dtype: torch.dtype, bucket_bytes: int
) -> Iterator[Bucket]:
    """All weights of `policy`, adapters merged, tied ones once, on its device. Collective: every process is given every
    bucket, and has to take all of them.

    Never is more whole than what one bucket is made of, which the tensors given away are copies of.

    Args:
        policy: unwrapped; its weights may be sharded.
        dtype: in which they are given.
        bucket_bytes: what a bucket is made of has at most this size, unless it is a single weight (with its adapters).
    """
    for names in _parts(policy, bucket_bytes):
        parameters = [policy.get_parameter(name) for name in names]
        with _whole(accelerator, parameters) as whole:
            state = dict(zip(names, whole, strict=True))
            yield [
                (name, weight.detach().to(dtype, copy=True)) for name, weight in policy.plain_state_dict(state).items()
            ]


def _parts(policy: Policy, bucket_bytes: int) -> list[list[str]]:
    """Names of parameters, in buckets. An adapted layer, whose weights are merged, stays together."""
    layers: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, parameter in policy.named_parameters():
        layer = name.split(".base_layer.")[0].split(".lora_")[0]
        layers.setdefault(layer, []).append(name)
        # ZeRO-3 leaves an empty tensor where it has taken a parameter away, and notes its size.
        elements = vars(parameter).get("ds_numel", parameter.numel())
        sizes[layer] = sizes.get(layer, 0) + elements * parameter.element_size()
    buckets: list[list[str]] = []
    room = 0
    for layer, names in layers.items():
        if not buckets or sizes[layer] > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1] += names
        room -= sizes[layer]
    return buckets


@contextmanager
def _whole(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> Iterator[Sequence[Tensor]]:
    match strategy(accelerator):
        case "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(parameters)):
                yield parameters
        case "fsdp2":
            yield [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
        case _:
            yield parameters


def described(weights: Bucket) -> list[list[object]]:
    """[[name, type, shape]], as JSON values: what a receiver has to know of a bucket before it arrives."""
    return [[name, str(weight.dtype).removeprefix("torch."), list(weight.shape)] for name, weight in weights]
