"""Rows that could not be used: listed with the reason, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spark_vl.records import BadRecordError

_FEWEST_SEEN = 20
"""Rows before whose end no share is judged."""

_DEVIATIONS = 4
"""Standard deviations by which bad rows must be more than the share that is allowed: it is judged after every row, and
by chance a run of rows often has more of them."""


class TooManyBadRowsError(ValueError):
    """So many rows cannot be used that something other than a few rows must be wrong."""


class Quarantine:
    """Takes bad rows in.

    Args:
        path: JSONL file of `{"id", "source", "reason"}`, written by one process; a resumed run goes on with it.
        max_fraction: the largest share of bad rows, in [0, 1], that is put up with. The run stops when there are more
            than chance would give with that share.
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
        """Recycled prompts, and what is written of them, that could not be used: no fault of the data."""
        self._listed = _ids(self.path)

    def seen(self, n: int) -> None:
        """`n` more rows were drawn, good or bad.

        Raises:
            TooManyBadRowsError: see `max_fraction`.
        """
        self.rows_seen += n
        self._check("")

    def add(self, error: BadRecordError) -> None:
        """A row, which `seen` counts too, was bad. Each id is listed once.

        Its `source` is the recipe and split, `recipe/split`, in which every id begins: a recycled prompt's too, whose
        id goes on with its parent's row. A dataset of judgments may use such ids itself, so only the beginning counts.

        Raises:
            TooManyBadRowsError: see `max_fraction`.
        """
        self.rows_bad += 1
        self._list(error)
        self._check(f"; the last one: {error}")

    def add_prompt(self, error: BadRecordError) -> None:
        """Something that is no row was bad. It is listed as rows are, counted apart, and stops no run."""
        self.prompts_bad += 1
        self._list(error)

    def state_dict(self) -> dict[str, int]:
        """The counts of this process."""
        return {"rows_seen": self.rows_seen, "rows_bad": self.rows_bad, "prompts_bad": self.prompts_bad}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting where `state_dict` was made."""
        self.rows_seen, self.rows_bad, self.prompts_bad = state["rows_seen"], state["rows_bad"], state["prompts_bad"]

    @staticmethod
    def merge(states: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """The counts of several processes together; of none, zeros."""
        return {name: sum(state[name] for state in states) for name in ("rows_seen", "rows_bad", "prompts_bad")}

    def _list(self, error: BadRecordError) -> None:
        if error.record_id not in self._listed:
            self._listed.add(error.record_id)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as lines:
                source = "/".join(error.record_id.split("/", 2)[:2])
                line = {"id": error.record_id, "source": source, "reason": error.reason}
                lines.write(json.dumps(line) + "\n")

    def _check(self, example: str) -> None:
        share, n = self.max_fraction, self.rows_seen
        if n >= _FEWEST_SEEN and self.rows_bad > share * n + _DEVIATIONS * math.sqrt(share * (1 - share) * n):
            raise TooManyBadRowsError(
                f"{self.rows_bad} of {self.rows_seen} rows cannot be used, more than the share of "
                f"{self.max_fraction:g} that is allowed; {self.path} lists them with reasons{example}"
            )


def _ids(path: Path) -> set[str]:
    """The ids in the file. A last line that a killed process left unfinished is cut off."""
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return {json.loads(line)["id"] for line in whole.splitlines() if line.strip()}
