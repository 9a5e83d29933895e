"""What a check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report, with what follows from it below."""

    mark: Literal["ok", "warning", "problem"]
    """`problem`: training, or a part that is installed for it, does not work. `warning`: something that training can do
    without does not work, or it is slow."""
    subject: str
    found: str
    follows: str = ""
    """What will not work, or not as one might think."""
    fix: str = ""
    """What to do about it: a command where there is one."""


def ok(subject: str, found: str) -> Finding:
    """A line that asks for nothing."""
    return Finding("ok", subject, found)


def warning(subject: str, found: str, *, follows: str, fix: str = "") -> Finding:
    """A line that does not count for the exit status."""
    return Finding("warning", subject, found, follows, fix)


def problem(subject: str, found: str, *, follows: str, fix: str = "") -> Finding:
    """A line that makes the exit status 1."""
    return Finding("problem", subject, found, follows, fix)
