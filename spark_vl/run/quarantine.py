"""Rows that cannot be used are listed with the reason and counted; too many of them stop the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spark_vl.data.cells import count
from spark_vl.records import BadRecordError
from spark_vl.run.jsonl import append_lines, read_lines

_FEWEST_SEEN = 20
"""The share of bad rows is not checked before this many rows were drawn."""

_DEVIATIONS = 4
"""The run stops when the number of bad rows exceeds what the allowed share predicts by this many standard deviations.
The share is checked after every row, and it often exceeds the allowed one by chance."""


class TooManyBadRowsError(ValueError):
    """So many rows cannot be used that something other than a few rows must be wrong."""


class Quarantine:
    """Lists and counts bad rows.

    Args:
        path: JSONL file of `{"id", "source", "reason"}`, written by one process; a resumed run appends to it.
        max_fraction: the largest share of bad rows, in [0, 1], that is tolerated. The run stops when there are more
            than chance explains at that share.

    Raises:
        ValueError: `max_fraction` is not in [0, 1].
    """

    def __init__(self, path: Path | str, max_fraction: float) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_fraction is {max_fraction}; 0 to 1 are allowed")
        self.path, self.max_fraction = Path(path), max_fraction
        self.rows_seen = 0
        """Rows drawn by this process since it started, good and bad."""
        self.rows_bad = 0
        """Those of them that were bad; a row that is drawn again counts again."""
        self.prompts_bad = 0
        """Recycled prompts that could not be used, or not be written down: not a fault of the data."""
        listed = read_lines(self.path)
        self.first = f"{listed[0]['id']}: {listed[0]['reason']}" if listed else ""
        """The first row that was bad since the run began, and why; empty if none was."""
        self._listed = {line["id"] for line in listed}

    def seen(self, n: int) -> None:
        """`n` more rows were drawn, good or bad.

        Raises:
            TooManyBadRowsError: see `max_fraction`.
        """
        self.rows_seen += n
        self._check("")

    def add(self, error: BadRecordError) -> None:
        """A row, which `seen` also counts, was bad. Each id is listed once.

        Its `source` is the recipe and split, `recipe/split`, with which every id begins, also that of a recycled
        prompt. Only the beginning counts: a dataset of judgments may itself use ids of that form.

        Raises:
            TooManyBadRowsError: see `max_fraction`.
        """
        self.rows_bad += 1
        self.first = self.first or str(error)
        self._list(error)
        self._check(f"; the last one: {error}")

    def add_prompt(self, error: BadRecordError) -> None:
        """A prompt that is not a row was bad. It is listed as rows are, counted separately, and never stops the run."""
        self.prompts_bad += 1
        self._list(error)

    def state_dict(self) -> dict[str, int]:
        """The counts of this process."""
        return {"rows_seen": self.rows_seen, "rows_bad": self.rows_bad, "prompts_bad": self.prompts_bad}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting where `state_dict` was made."""
        self.rows_seen, self.rows_bad = count(state, "rows_seen"), count(state, "rows_bad")
        self.prompts_bad = count(state, "prompts_bad")

    @staticmethod
    def merge(states: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """The counts of several processes together; of none, zeros."""
        return {name: sum(state[name] for state in states) for name in ("rows_seen", "rows_bad", "prompts_bad")}

    def _list(self, error: BadRecordError) -> None:
        if error.record_id not in self._listed:
            self._listed.add(error.record_id)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            source = "/".join(error.record_id.split("/", 2)[:2])
            append_lines(self.path, [{"id": error.record_id, "source": source, "reason": error.reason}])

    def _check(self, example: str) -> None:
        share, n = self.max_fraction, self.rows_seen
        if n >= _FEWEST_SEEN and self.rows_bad > share * n + _DEVIATIONS * math.sqrt(share * (1 - share) * n):
            raise TooManyBadRowsError(
                f"{self.rows_bad} of {self.rows_seen} rows cannot be used, more than the share of "
                f"{self.max_fraction:g} that is allowed; {self.path} lists them with reasons{example}"
            )
