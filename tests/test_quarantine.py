"""Bad rows are listed once with their reasons, also across runs, and too many of them stop the run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.records import BadRecordError
from spark_vl.run.quarantine import Quarantine, TooManyBadRowsError
from tests.groups import TEMPLATER, recycled, sampled


def listed(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def test_bad_rows_are_listed_once_each(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl", 0.5)
    assert not (tmp_path / "run").exists()
    for record_id, reason in (("a/train/1", "no\nwords"), ("a/train/2", "größer"), ("a/train/1", "no\nwords")):
        quarantine.add(BadRecordError(record_id, reason))
    assert listed(quarantine.path) == [
        {"id": "a/train/1", "source": "a/train", "reason": "no\nwords"},
        {"id": "a/train/2", "source": "a/train", "reason": "größer"},
    ]
    assert quarantine.rows_bad == 3


@pytest.mark.parametrize(
    ("record_id", "source"),
    [
        ("geometry3k/train/#17", "geometry3k/train"),
        ("mine/test/folder/7", "mine/test"),  # the row's own id has a slash
        ("geometry3k/train/17@3#pairwise", "geometry3k/train"),  # recycled, and once more
        ("geometry3k/train/17@3#reflection@4#pointwise", "geometry3k/train"),
        (
            "judgments/train/geometry3k/train/17@3#pairwise",
            "judgments/train",
        ),  # a row, with the id of a recycled prompt
    ],
)
def test_each_line_says_which_recipe_and_split(tmp_path: Path, record_id: str, source: str) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5)
    quarantine.add(BadRecordError(record_id, "empty"))
    assert listed(quarantine.path) == [{"id": record_id, "source": source, "reason": "empty"}]


def test_the_sources_are_those_of_real_records(tmp_path: Path) -> None:
    """Ids are made elsewhere: of drawn rows by `ProblemSet`, of recycled prompts by `recycle`."""
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.5)
    drawn = open_recipe(load_recipe("digits"), "validation", TEMPLATER)[0]
    group = sampled(drawn, (0, 1))
    made = recycled([group], step=3, seed=0)
    for record in (drawn, *made.judge, *made.reflection):
        quarantine.add(BadRecordError(record.id, "too long"))
    lines = listed(quarantine.path)
    assert len(lines) >= 3
    assert {line["source"] for line in lines} == {"digits/validation"}


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"id": "a/0", "reason": "x"}\n')  # by a version that named no sources
    Quarantine(file, 0).add(BadRecordError("a/1", "x"))
    with file.open("a") as lines:
        lines.write('\n{"id": "a/2", "rea')  # killed while writing
    resumed = Quarantine(file, 0)
    for n in (0, 1, 2, 3):
        resumed.add(BadRecordError(f"a/{n}", "x"))
    assert [row["id"] for row in listed(file)] == ["a/0", "a/1", "a/2", "a/3"]
    assert resumed.rows_bad == 4
    assert resumed.first == "a/0: x"


# Expectation and four standard deviations of a binomial distribution: 0.1 · 100 + 4 · √(100 · 0.1 · 0.9) = 22.
@pytest.mark.parametrize(("fraction", "bad_allowed"), [(0.0, 0), (0.1, 22), (0.05, 13), (1.0, 100)])
def test_too_many_bad_rows_stop_the_run(tmp_path: Path, fraction: float, bad_allowed: int) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", fraction)
    quarantine.seen(100)
    for n in range(bad_allowed):
        quarantine.add(BadRecordError(f"a/{n}", "empty"))
    if fraction == 1.0:
        return
    with pytest.raises(
        TooManyBadRowsError, match=rf"{bad_allowed + 1} of 100 rows .* {fraction:g} .*q\.jsonl.*a/x: empty"
    ):
        quarantine.add(BadRecordError("a/x", "empty"))
    assert listed(quarantine.path)[-1]["id"] == "a/x"


@pytest.mark.parametrize(("share", "stops"), [(0.02, False), (0.04, False), (0.1, True), (0.5, True)])
def test_chance_stops_no_run_that_has_fewer_bad_rows_than_are_allowed(tmp_path: Path, share: float, stops: bool):
    """As it is used: judged after each row of thousands."""
    stopped = 0
    for seed in range(50):
        rng = random.Random(seed)
        quarantine = Quarantine(tmp_path / f"{seed}.jsonl", 0.05)
        try:
            for _ in range(2000):
                quarantine.seen(1)
                if rng.random() < share:
                    quarantine.add(BadRecordError("a/train/1", "empty"))
        except TooManyBadRowsError:
            stopped += 1
    assert stopped >= 49 if stops else stopped <= 1


def test_prompts_that_a_run_made_itself_are_listed_and_stop_nothing(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.0)
    quarantine.seen(30)
    quarantine.add_prompt(BadRecordError("a/train/1@3#pairwise", "too long"))
    assert (quarantine.rows_bad, quarantine.prompts_bad) == (0, 1)
    assert [line["id"] for line in listed(quarantine.path)] == ["a/train/1@3#pairwise"]


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
