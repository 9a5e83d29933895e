"""What a check of the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report, with what follows from it below."""

    mark: Literal["ok", "warning", "error"]
    """`error`: training, or a part that is installed for it, does not work. `warning`: something optional does not
    work, or is slow."""
    subject: str
    found: str
    follows: str = ""
    """What will not work, or will work differently than expected."""
    fix: str = ""
    """What to do about it: a command where there is one."""


def ok(subject: str, found: str) -> Finding:
    """A line that needs no action."""
    return Finding("ok", subject, found)


def warning(subject: str, found: str, *, follows: str, fix: str = "") -> Finding:
    """A line that does not count for the exit status."""
    return Finding("warning", subject, found, follows, fix)


def fault(subject: str, found: str, *, follows: str, fix: str = "") -> Finding:
    """A line that makes the exit status 1."""
    return Finding("error", subject, found, follows, fix)
