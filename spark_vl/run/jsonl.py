"""JSON lines: a file that grows by whole lines. A process that is killed while it writes leaves a torn last line, which
is not read, and which is cut off before the next line is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

_CHUNK = 2**16


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append `lines`, without waiting for the disk. Only one process may write to a file."""
    with path.open("ab+") as file:
        _cut_torn_line(file)
        for line in lines:
            # backslashreplace turns a lone surrogate, which UTF-8 cannot hold, into its escape in JSON.
            file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none if there is no such file."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.split(b"\n")[:-1] if line.strip()]


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines whose `step` is after `step`, and a torn last line. They come in the order of their steps."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        kept = 0  # bytes
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut off what stands after the last line break."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        if line_break := file.read(end - start).rfind(b"\n") + 1:
            end = start + line_break
            break
        end = start
    if end < size:
        file.truncate(end)
