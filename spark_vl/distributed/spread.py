"""Splits work on the same items over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    accelerator: Accelerator, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """`work(items)`, one result per item: each process works on its share, and all processes get all results.

    Collective. `items` must be the same on all processes.
    """
    processes = accelerator.num_processes
    parts = gather_object([list(work(items[accelerator.process_index :: processes]))])
    return [parts[i % processes][i // processes] for i in range(len(items))]
