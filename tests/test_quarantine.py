"""Bad rows are listed once with their reasons, also across runs, and too many of them stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_vl.data.quarantine import Quarantine, TooManyBadRowsError
from spark_vl.records import BadRecordError


def listed(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_bad_rows_are_listed_once_each(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl", 0.5)
    assert not (tmp_path / "run").exists()
    for record_id, reason in (("a/1", "no\nwords"), ("a/2", "größer"), ("a/1", "no\nwords")):
        quarantine.add(BadRecordError(record_id, reason))
    assert listed(quarantine.path) == [{"id": "a/1", "reason": "no\nwords"}, {"id": "a/2", "reason": "größer"}]
    assert quarantine.rows_bad == 3


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file, 0).add(BadRecordError("a/1", "x"))
    with file.open("a") as lines:
        lines.write('{"id": "a/2", "rea')  # killed while writing
    resumed = Quarantine(file, 0)
    for n in (1, 2, 3):
        resumed.add(BadRecordError(f"a/{n}", "x"))
    assert [row["id"] for row in listed(file)] == ["a/1", "a/2", "a/3"]
    assert resumed.rows_bad == 3


@pytest.mark.parametrize(("fraction", "bad_allowed"), [(0.0, 0), (0.1, 2), (0.05, 1), (1.0, 20)])
def test_too_many_bad_rows_stop_the_run(tmp_path: Path, fraction: float, bad_allowed: int) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", fraction)
    quarantine.seen(20)
    for n in range(bad_allowed):
        quarantine.add(BadRecordError(f"a/{n}", "empty"))
    if fraction == 1.0:
        return
    with pytest.raises(
        TooManyBadRowsError, match=rf"{bad_allowed + 1} of 20 rows .* {fraction:g} .*q\.jsonl.*a/x: empty"
    ):
        quarantine.add(BadRecordError("a/x", "empty"))
    assert listed(quarantine.path)[-1]["id"] == "a/x"


def test_the_first_rows_are_not_judged(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    for n in range(19):
        quarantine.seen(1)
        quarantine.add(BadRecordError(f"a/{n}", "empty"))
    with pytest.raises(TooManyBadRowsError, match="19 of 20"):
        quarantine.seen(1)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_between_0_and_1(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="0 to 1 are allowed"):
        Quarantine(tmp_path / "q.jsonl", fraction)
