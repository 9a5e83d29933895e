"""Rows that are small where they lie and large in memory, and texts that took quadratic time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_vl.answers import match_choices, normalized, plain
from spark_vl.answers.boxed import composed
from spark_vl.config import DataConfig
from spark_vl.data.problems import ProblemSet, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.data.sources import RowLimits, Source, open_rows
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError
from spark_vl.verifiers.base import get_verifier
from tests.conftest import make_record

TINY = RowLimits(bytes=1000, chars=500, images=3)
RECIPE = """
name: r
description: d
license: MIT
source: {SOURCE: data}
splits: {train: FILE}
columns: {question: q, answer: a, images: i}
verifier: text
"""


def opened(folder: Path, source: str, file: str, limits: RowLimits = TINY) -> ProblemSet:
    (folder / "r.yaml").write_text(RECIPE.replace("SOURCE", source).replace("FILE", file))
    return open_recipe(load_recipe(folder / "r.yaml"), "train", Templater.load(), limits)


def row(**changes: Any) -> dict[str, Any]:
    return {"q": "What?", "a": "x", "i": []} | changes


def test_the_defaults_are_those_of_the_configuration() -> None:
    assert {f"max_row_{each.name}": each.default for each in fields(RowLimits)}.items() <= vars(DataConfig()).items()


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": "x" * 600}, r"\(data.max_row_chars\)"),
        ({"i": ["a.png"] * 4}, r"'i' holds 4 images; 3 are allowed in a row \(data.max_row_images\)"),
    ],
    ids=["chars", "images"],
)
def test_a_large_row_is_quarantined_and_the_others_are_read(
    tmp_path: Path, source: str, changes: Mapping[str, Any], reason: str
) -> None:
    rows = [row(), row(**changes), row()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "t.parquet")
    problems = opened(tmp_path, source, f"t.{source}")
    assert [problems[0].gold, problems[2].gold] == ["x", "x"]
    with pytest.raises(BadRecordError, match=reason):
        problems[1]


def test_a_row_with_many_bytes_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    rows = [row(i=[]), row(i=[bytes(900), bytes(900)]), *[row(i=[])] * 9]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found, _ = open_rows(Source("parquet", str(tmp_path)), "t.parquet", ("q", "i"), TINY)
    assert found[0]["q"] == "What?"
    with pytest.raises(ValueError, match=r"18\d\d bytes or more; 1000 are allowed \(data.max_row_bytes\)"):
        found[1]


@pytest.mark.parametrize(
    "cell",
    [[None] * 2000, [[]] * 2000, [{"x": None}] * 2000, [[None] * 50] * 50],
    ids=["nulls", "empty-lists", "mappings", "lists"],
)
def test_values_without_bytes_count(tmp_path: Path, cell: list[Any]) -> None:
    """A million nulls are eight megabytes in memory, and none in a file."""
    table = pa.table({"a": pa.array([[], *[[]] * 9, cell])})
    pq.write_table(table, tmp_path / "t.parquet")
    found, _ = open_rows(Source("parquet", str(tmp_path)), "t.parquet", ("a",), RowLimits(bytes=10**6, chars=500))
    assert found[0] == {"a": []}
    with pytest.raises(ValueError, match="characters and values or more; 500 are allowed"):
        found[10]


@pytest.mark.parametrize("values", [["x" * 10**6], [[None] * 10**6]], ids=["text", "nulls"])
def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path, values: list[Any], monkeypatch) -> None:
    pq.write_table(
        pa.table({"a": pa.array(values)}), tmp_path / "t.parquet", compression="zstd", write_statistics=False
    )
    assert (tmp_path / "t.parquet").stat().st_size < 20_000
    monkeypatch.setattr("datasets.Dataset.from_parquet", None)  # the file is not expanded
    limits = RowLimits(bytes=10**5, chars=10**5)
    with pytest.raises(ValueError, match=r"t.parquet: on average, the row has 1000"):
        open_rows(Source("parquet", str(tmp_path)), "t.parquet", ("a",), limits)


def test_one_value_that_stands_for_many_is_refused_before_it_is_expanded(tmp_path: Path, monkeypatch) -> None:
    """Five kilobytes in the file, a gigabyte in memory."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["x" * 100_000])
    pq.write_table(pa.table({"a": cells}), tmp_path / "t.parquet", row_group_size=10_000, store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    monkeypatch.setattr("datasets.Dataset.from_parquet", None)  # the file is not expanded
    with pytest.raises(ValueError, match=r"t.parquet: row group 0 has \d+ bytes and expands to more than 536870912"):
        open_rows(Source("parquet", str(tmp_path)), "t.parquet", ("a",))


def test_a_long_line_is_neither_held_nor_read(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "t.jsonl").write_text(
        f"{json.dumps({'a': 1})}\n{json.dumps({'a': 'x' * 20_000_000})}\n\n{json.dumps({'a': 2})}"
    )
    tracemalloc.start()
    found, _ = open_rows(Source("jsonl", str(tmp_path)), "t.jsonl", ("a",), TINY)
    assert (len(found), found[0], found[2], list(found.column("a"))) == (3, {"a": 1}, {"a": 2}, [1, None, 2])
    with pytest.raises(ValueError, match=r"more than 3000 bytes \(4 × data.max_row_chars, and data.max_row_bytes"):
        found[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_line_of_the_largest_length_is_read(tmp_path: Path) -> None:
    for end in ("", "\n", "\r\n"):
        line = json.dumps({"a": "x" * (1990 - len(end))})
        (tmp_path / "t.jsonl").write_text(f"{line}{end}" + '{"a": "y"}' * (end != ""))
        found, _ = open_rows(Source("jsonl", str(tmp_path)), "t.jsonl", ("a",), TINY)
        assert len(line) + len(end) <= 2000
        assert found[0]["a"][:1] == "x"
        assert len(found) == 1 + (end != "")


def test_a_long_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.jsonl").write_text(json.dumps(row(n="x" * 1001)))
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("SOURCE", "jsonl").replace("FILE", "t.jsonl").replace("images: i", "id: n")
    )
    problems = open_recipe(load_recipe(tmp_path / "r.yaml"), "train", Templater.load())
    with pytest.raises(BadRecordError, match="'n' has 1001 characters; 1000 are allowed"):
        problems[0]


# ── texts ──

MARKS = {
    "two-classes": "\u0301\u0323" * 100_000,
    "a-letter-first": "a" + "\u0345\u0323\u0316\u0300" * 50_000,
    "thai": "\u0e38\u0300" * 100_000,
    "marks-of-class-0": "\u0f73\u0f71" * 100_000,  # that stand for two marks
}


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("form", [plain, normalized], ids=["plain", "normalized"])
def test_marks_are_read_in_linear_time(name: str, form: Callable[[str], str]) -> None:
    start = time.process_time()
    form(MARKS[name])
    assert time.process_time() - start < 1


@pytest.mark.parametrize("verifier", ["text", "choice", "judgment"])
def test_marks_cost_no_verifier_seconds(verifier: str) -> None:
    marks = MARKS["two-classes"]
    choices = (marks, marks + "x") if verifier != "text" else ()
    record = make_record("r", "?", gold=marks, verifier=verifier, choices=choices)
    start = time.process_time()
    with contextlib.suppress(BadRecordError):
        get_verifier(verifier)(rf"\boxed{{{marks}}}", record)
    assert time.process_time() - start < 2


def test_texts_as_people_write_them_are_composed() -> None:
    assert composed("e\u0301" * 100) == "é" * 100
    assert composed("q" + "\u0323\u0307" * 10) == composed("q" + "\u0307\u0323" * 10)  # 20 marks are put in order
    assert composed("\u1100\u1161\u11a8" * 100) == "각" * 100  # letters of Korean syllables are not marks


def test_options_are_read_once_whatever_the_answer_has() -> None:
    options = tuple(chr(97 + i) * 9 + "é" * 9000 for i in range(26))
    answer = ",".join([" and ".join(["x"] * 26)] * 26)
    start = time.process_time()
    match_choices(answer, options, letter_first=False)
    assert time.process_time() - start < 5


def test_a_long_gold_of_mathematics_is_refused() -> None:
    with pytest.raises(BadRecordError, match="gold has 1001 characters; math allows 1000"):
        get_verifier("math")(r"\boxed{1}", make_record("r", "?", gold="1" * 1001, verifier="math"))


def test_a_parquet_file_with_odd_metadata_or_many_row_groups_is_read_or_refused_in_words(tmp_path):
    source = Source("parquet", str(tmp_path))
    table = pa.table({"q": ["?"], "a": ["1"]})
    deep = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"q": ' + '{"feature": ' * 3000})
    pq.write_table(deep, tmp_path / "deep.parquet")
    with pytest.raises(ValueError, match=r"cannot be read|JSON"):
        open_rows(source, "deep.parquet", ["q", "a"])
    pq.write_table(pa.table({"q": ["?"] * 4000, "a": ["1"] * 4000}), tmp_path / "many.parquet", row_group_size=1)
    start = time.process_time()
    rows, _ = open_rows(source, "many.parquet", ["q", "a"])
    assert len(rows) == 4000
    assert time.process_time() - start < 20
