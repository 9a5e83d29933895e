"""How the rows of an evaluation are shared out over processes, and written down so that none is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spark_vl.data.preferences import PreferenceSet
from spark_vl.data.problems import ProblemSet
from spark_vl.distributed.gather import any_process
from spark_vl.evaluation.prompts import row_order
from spark_vl.evaluation.results import Line, key, unique
from spark_vl.log import Pace
from spark_vl.run.jsonl import append_lines, read_lines

SAMPLES = "samples.jsonl"
"""All that was asked and answered. While several processes evaluate, each has a file `samples-N.jsonl` of its own."""


class Shares:
    """The rows that are this process's, its file, and what it tells the person who waits.

    Args:
        folder: with the files of earlier processes, if there are any.
        problems: rows of each recipe that are drawn; None: all.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, problems: int | None) -> None:
        self.accelerator, self.folder, self.problems = accelerator, folder, problems
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.file = folder / (SAMPLES if self.processes == 1 else f"samples-{self.rank}.jsonl")
        accelerator.wait_for_everyone()  # nobody reads what another one writes already
        self._done = {key(line) for line in self._read()}
        accelerator.wait_for_everyone()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not accelerator.is_main_process)
        self._pace = Pace()

    def __enter__(self) -> Shares:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def rows(self, rows: ProblemSet | PreferenceSet, ask: str = "") -> list[int]:
        """Those of the drawn rows that this process has to ask, in the order in which they were drawn."""
        drawn = self.drawn(rows)[self.rank :: self.processes]
        left = [row for row in drawn if (rows.recipe.name, row, ask) not in self._done]
        self._task = self._bar.add_task(f"{rows.recipe.name} {ask}".rstrip(), total=len(drawn))
        self._bar.advance(self._task, len(drawn) - len(left))
        if len(left) < len(drawn):
            self.say(f"{rows.recipe.name}: {len(drawn) - len(left)} of {len(drawn)} rows have been asked before")
        return left

    def drawn(self, rows: ProblemSet | PreferenceSet) -> list[int]:
        """The rows that are evaluated on, of all processes."""
        return row_order(rows)[: self.problems]

    def together(self, chunks: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """`chunks`, and empty ones after the last until no process has any: some engines are called by all at once."""
        while any_process(self.accelerator, (chunk := next(chunks, None)) is not None):
            yield chunk or []

    def progress(self, phase: str, total: int) -> Callable[[int], None]:
        """See `evaluator.Progress`: what happens to the chunk at hand."""
        name = self._bar.tasks[self._task].description.partition(":")[0]
        done = 0

        def advance(finished: int) -> None:
            nonlocal done
            done += finished
            self._bar.update(self._task, description=f"{name}: {phase.removeprefix('evaluating, ')} {done}/{total}")
            self._print_line()

        return advance

    def add(self, lines: Sequence[Line]) -> None:
        """Write the `lines` of rows that are finished."""
        append_lines(self.file, lines)
        self._bar.advance(self._task, len(lines))
        self._print_line()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.accelerator.is_main_process:
            self._bar.console.print(text, markup=False, highlight=False)

    def all_lines(self) -> list[Line]:
        """Those of all processes, together in one file. Collective."""
        self.accelerator.wait_for_everyone()
        lines = self._read()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and (parts := [file for file in self._files() if file.name != SAMPLES]):
            whole = self.folder / f"{SAMPLES}.new"
            whole.unlink(missing_ok=True)
            append_lines(whole, lines)
            whole.replace(self.folder / SAMPLES)  # before the parts go: a kill here leaves lines twice, and none lost
            for part in parts:
                part.unlink()
        return lines

    def _read(self) -> list[Line]:
        return unique(line for file in self._files() for line in read_lines(file))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("samples*.jsonl"))

    def _print_line(self) -> None:
        if not self._bar.console.is_terminal and self._pace.is_due():
            task = self._bar.tasks[self._task]
            self.say(f"{task.description}, {task.completed:.0f}/{task.total} rows")
