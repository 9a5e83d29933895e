"""Splits work on the same items over the processes, and sends items from one to another."""

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


def send(accelerator: Accelerator, parcels: Sequence[tuple[int, Item]]) -> list[Item]:
    """What all processes send to this one, in the order of the senders. Collective.

    Args:
        parcels: the process that gets an item, and the item. What a process sends to itself is not copied.
    """
    here = accelerator.process_index
    leaving = [parcel for parcel in parcels if parcel[0] != here]
    arrived: list[Item] = []
    for sender, sent in enumerate(gather_object([leaving])):
        arrived += [item for to, item in (parcels if sender == here else sent) if to == here]
    return arrived
