"""`spark-vl`, and Python programs, in processes of their own, each forked off one that has imported the command line.

A process that is forked is as fresh as one that is started, without the seconds that each start takes to import. What
the import alone loads counts as loaded, too.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "sympy", "sklearn"}
STREAMS = ("stdin", "stdout", "stderr")


class Ended(NamedTuple):
    """What is left of a process: exit status, what it printed, and those of `HEAVY` that it had loaded."""

    returncode: int
    stdout: str
    stderr: str
    loaded: set[str]


class Command:
    """Runs `spark-vl *arguments` in `folder`, with `environment` added to that of the process. Variables that a library
    reads when it is imported belong to `command` instead."""

    def __init__(self, process: subprocess.Popen[str], files: Path) -> None:
        self.process, self.files = process, files

    def __call__(self, folder: Path, *arguments: str, **environment: str) -> Ended:
        return self._run("spark-vl", folder, arguments, environment)

    def python(self, folder: Path, *arguments: str, **environment: str) -> Ended:
        """As `__call__`, of `python *arguments`: the path of a program, or -c and its text, and its own arguments."""
        return self._run("python", folder, arguments, environment)

    def _run(self, program: str, folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> Ended:
        call = [program, str(self.files), str(folder), arguments, environment]
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        stdout, stderr, loaded = ((self.files / name).read_text() for name in (*STREAMS[1:], "loaded"))
        return Ended(status, stdout, stderr, HEAVY & set(loaded.split()))


@contextmanager
def command(*modules: str, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """The process that has imported the command line, and `modules`.

    Args:
        environment: of the process; None: this one's.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    start = [sys.executable, "-m", "tests.command", *modules]
    with (
        TemporaryDirectory() as files,
        subprocess.Popen(start, cwd=ROOT, env=environment, **pipes) as process,
    ):
        yield Command(process, Path(files))
        process.stdin.close()


def serve() -> None:
    """Run the command or a program once for each line of stdin, in a child, and print the child's exit status."""
    import docstring_parser

    from spark_vl.cli import main
    from spark_vl.config import EvalConfig, JudgeConfig, OfflineConfig, TrainConfig
    from spark_vl.config_cli import Parser, add_config_arguments

    # The help of all settings is read from their source once, not in each child.
    docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)
    for config_class in (TrainConfig, EvalConfig, JudgeConfig, OfflineConfig):
        add_config_arguments(Parser(), config_class)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # else each child goes through all that was imported, which copies it
    for line in sys.stdin:
        program, files, folder, arguments, environment = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for number, name in enumerate(STREAMS):
            os.dup2(os.open(f"{files}/{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        os.environ.update(environment)
        try:
            main(arguments) if program == "spark-vl" else run_python(*arguments)
        finally:
            Path(files, "loaded").write_text("\n".join(sys.modules))
        return


def run_python(what: str, *arguments: str) -> None:
    """As `python what *arguments` does."""
    if what == "-c":
        [text, *arguments] = arguments
        sys.argv, sys.path[:0] = ["-c", *arguments], [""]
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[:0] = [what, *arguments], [str(Path(what).resolve().parent)]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve()
