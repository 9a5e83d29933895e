"""A process that publishes for the tests, because huggingface_hub reads its settings when it is imported.

One call a line comes in as JSON, `[function of spark_vl.hub, arguments]`, and one line goes out: what came of it.
The argument `timeout_s` is this process's own: how long a silent Hub is waited for. It tries again ten times as soon.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Refused(Exception):
    """The call raised `HubError` or `ReleaseError`; `kind` is its name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Driver:
    """The process, seen from the test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, function: str, **arguments: Any) -> dict[str, Any]:
        """Call it there.

        Raises:
            Refused: see there.
        """
        self.process.stdin.write(json.dumps([function, arguments], default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the publishing process died calling {function}"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer


@contextmanager
def driver(environment: dict[str, str]) -> Iterator[Driver]:
    """A process with that environment."""
    command = [sys.executable, "-m", "tests.hub.driver"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Driver(process)
        process.stdin.close()


def drawing_once(draw: Callable[..., None]) -> Callable[..., None]:
    """`draw`, but a run whose files have not changed since they were drawn has the same curves, without the time."""
    drawn: dict[tuple, bytes] = {}

    def plot(run: Path, path: Path, step: int | None = None) -> None:
        read = (step, *(file.read_bytes() for file in sorted(run.glob("*.jsonl"))))
        if read not in drawn:
            draw(run, path, step)
            drawn[read] = path.read_bytes()
        path.write_bytes(drawn[read])

    return plot


def main() -> None:
    """Answer calls until there are no more."""
    from spark_vl import hub
    from spark_vl.hub import client, publish

    publish.plot_diagnostics = drawing_once(publish.plot_diagnostics)
    client._WAITS_S = tuple(wait / 10 for wait in client._WAITS_S)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        client.TIMEOUT_S = arguments.pop("timeout_s", 20.0)
        try:
            answer = asdict(vars(hub)[function](**arguments))
        except (hub.HubError, hub.ReleaseError) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
