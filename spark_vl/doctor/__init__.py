"""Finds what will not work on this machine, and names the fix: `spark-vl doctor`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

from rich.console import Console
from rich.text import Text

from spark_vl.doctor.devices import deepspeed, gpu
from spark_vl.doctor.finding import Finding, fault
from spark_vl.doctor.hub import hub
from spark_vl.doctor.launch import accelerate, environment
from spark_vl.doctor.machine import folders, limits, memory, temporary
from spark_vl.doctor.packages import dependencies, model, optional, python, torchvision

Check = Callable[[], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "Python": python,
    "dependencies": dependencies,
    "torchvision": torchvision,
    "Qwen2.5-VL": model,
    "GPU": gpu,
    "DeepSpeed": deepspeed,
    "accelerate launch": accelerate,
    "environment": environment,
    "memory": memory,
    "folders": folders,
    "temporary files": temporary,
    "open files": limits,
    "Hub": hub,
    "optional parts": optional,
}
"""Subject → its check, in the order of the report. What a check needs is imported inside it: it may be broken."""

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examine() -> int:
    """Print what every check finds. Returns the exit status: 1 if there is an error."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    counts = {"error": 0, "warning": 0, "ok": 0}
    for subject in CHECKS:
        for finding in findings(subject):
            counts[finding.mark] += 1
            _print(finding, console)
    verdict = "does not work as it is" if counts["error"] else "can work"
    console.print(f"errors: {counts['error']}, warnings: {counts['warning']}; training on this machine {verdict}")
    return min(counts["error"], 1)


def findings(subject: str) -> list[Finding]:
    """What the check of `subject` finds. If the check fails, that is the last finding; the other checks still run."""
    found = []
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed prints when it is imported
            for finding in CHECKS[subject]():
                found.append(finding)
    except Exception as error:
        follows = "what needs it does not work, or this check is wrong about this machine"
        found.append(fault(subject, f"the check failed: {type(error).__name__}: {error}", follows=follows))
    finally:
        logging.disable(logging.NOTSET)
    return found


def _print(finding: Finding, console: Console) -> None:
    found = " ".join(finding.found.split())  # messages of exceptions have several lines
    console.print(Text(f"{finding.mark:<8}", _STYLES[finding.mark]), f"{finding.subject:<20} {found}")
    for sign, text in (("→", finding.follows), ("fix:", finding.fix)):
        if text:
            console.print(f"{'':<8} {sign} {text}")
