"""Stopping on a signal: SIGTERM and SIGINT, and SIGUSR1, which SLURM is told to send some minutes before the end."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Records the first signal, and ends the process at the second, unless that is SIGUSR1. A context manager, to be
    entered in the main thread."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that has come."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGUSR1:
                return  # SLURM may send it twice, directly and through the launcher: not a request to stop at once
            # No clean-up: two signals mean "now". The last checkpoint is whole.
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # Not print(): the handler may have interrupted another one.
        os.write(
            sys.stderr.fileno(),
            f"\n{self.signal.name}: saving, then stopping; a second signal stops at once\n".encode(),
        )
