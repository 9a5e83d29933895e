"""`spark-vl` in processes of its own, each forked off one that has imported the command line and nothing else.

A process that is forked is as fresh as one that is started, without the second that each start takes to import. What
it has loaded shows in `sys.modules`; what the import alone loads is there, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STREAMS = ("stdin", "stdout", "stderr")


class Ended(NamedTuple):
    """What is left of a process: exit status, what it printed, and the packages that it had loaded."""

    status: int
    stdout: str
    stderr: str
    loaded: set[str]


class Command:
    """Runs `spark-vl *arguments` in `folder`."""

    def __init__(self, process: subprocess.Popen[str], files: Path) -> None:
        self.process, self.files = process, files

    def __call__(self, folder: Path, *arguments: str) -> Ended:
        (self.files / "stdin").touch()
        self.process.stdin.write(json.dumps([str(self.files), str(folder), arguments]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        stdout, stderr, loaded = ((self.files / name).read_text() for name in (*STREAMS[1:], "loaded"))
        return Ended(status, stdout, stderr, set(loaded.split()))


@contextmanager
def command() -> Iterator[Command]:
    """The process that has imported the command line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        TemporaryDirectory() as files,
        subprocess.Popen([sys.executable, "-m", "tests.command"], cwd=ROOT, **pipes) as process,
    ):
        yield Command(process, Path(files))
        process.stdin.close()


def serve() -> None:
    """Run the command once for each line of stdin, in a child, and print the child's exit status."""
    from spark_vl.cli import main

    for line in sys.stdin:
        files, folder, arguments = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for number, name in enumerate(STREAMS):
            os.dup2(os.open(f"{files}/{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        try:
            main(arguments)
        finally:
            Path(files, "loaded").write_text("\n".join(sys.modules))
        return


if __name__ == "__main__":
    serve()
