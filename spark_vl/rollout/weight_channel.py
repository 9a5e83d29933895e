"""How weights get from the first training process to the workers of rollout servers: broadcast, without a disk.

Its process group is apart from those of the trainer and of vLLM, and can be made again while both go on. This file is
imported in vLLM's worker processes and needs nothing but torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

SENDER = 0
"""Rank of the training process; the workers follow."""


class WeightChannel:
    """One end of it. Making one waits until all others have made theirs.

    Args:
        store: through which the ends find each other; the sender's.
        name: of this channel; one that is made anew has another.
        rank: `SENDER`, or from 1.
        size: of the sender and all workers.
        device: of the weights, the same kind on all: NCCL connects CUDA devices, gloo others.
        timeout_s: after which an end that does not answer has failed.
    """

    def __init__(self, store: TCPStore, *, name: str, rank: int, size: int, device: torch.device, timeout_s: float):
        self.device = device
        timeout = timedelta(seconds=timeout_s)
        prefixed = PrefixStore(f"spark_vl/{name}", store)
        if device.type == "cuda":
            options = torch.distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group: Any = torch.distributed.ProcessGroupNCCL(prefixed, rank, size, options)
        else:
            self.group = ProcessGroupGloo(prefixed, rank, size, timeout)

    def send(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Send a bucket to all workers, which have to `receive` it meanwhile."""
        flat = torch.cat([weight.contiguous().view(-1).view(torch.uint8) for _, weight in weights])
        self._broadcast(flat)

    def receive(self, described: Sequence[Sequence[Any]]) -> list[tuple[str, Tensor]]:
        """A bucket, of which the sender has `described` the names, types and shapes."""
        types = [getattr(torch, dtype) for _, dtype, _ in described]
        sizes = [math.prod(shape) * dtype.itemsize for (_, _, shape), dtype in zip(described, types, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        self._broadcast(flat)
        return [
            # A copy is aligned to its type, which a piece of the bucket need not be.
            (name, piece.clone().view(dtype).view(shape))
            for (name, _, shape), dtype, piece in zip(described, types, flat.split(sizes), strict=True)
        ]

    def _broadcast(self, flat: Tensor) -> None:
        self.group.broadcast(flat, SENDER).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
