"""Files that are on the disk, whole, before they get their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Make sure that the file or folder `path` is on the disk, not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The path of a temporary file to write; it takes the place of `path` once it is on the disk.

    A process that is killed, or an error inside, leaves `path` as it was, and maybe the temporary file
    (`unfinished_name`).
    """
    unfinished = path.with_name(unfinished_name(path.name))
    yield unfinished
    flush(unfinished)
    unfinished.replace(path)
    flush(path.parent)


def unfinished_name(name: str) -> str:
    """The name of the temporary file, or in a glob of all of them, for the file `name`."""
    return f".{name}.tmp"
