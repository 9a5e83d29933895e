"""Lines and files that a run writes survive its death: what is torn is dropped, what has its name is whole."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_vl.run import jsonl
from spark_vl.run.files import written_whole
from spark_vl.run.jsonl import append_lines, drop_lines_after, read_lines

TEXTS = st.text(st.characters(codec=None, exclude_categories=()))
"""Any characters, lone surrogates too."""


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none())))
def test_lines_come_back_whatever_is_in_them(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    append_lines(file, lines[:1])
    append_lines(file, lines[1:])
    assert read_lines(file) == lines
    # and a reader that knows only JSON and line feeds reads the same
    assert [json.loads(line) for line in file.read_bytes().decode().split("\n")[:-1]] == lines


def test_texts_can_be_read_in_the_file(tmp_path: Path):
    append_lines(tmp_path / "x.jsonl", [{"a": "größer 漢 \u2028 \ud800"}])
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == '{"a": "größer 漢 \u2028 \\ud800"}\n'


@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_a_torn_line_is_not_read_and_is_cut_off_before_the_next_one(tmp_path: Path, monkeypatch, chunk: int):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    file, lines = tmp_path / "x.jsonl", [{"a": "½" * 20}, {"a": "b"}]
    append_lines(file, lines)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        kept = lines[: (end >= first) + (end == len(whole))]
        assert read_lines(file) == kept
        append_lines(file, [{"c": 1}])
        assert read_lines(file) == [*kept, {"c": 1}]
        assert file.read_bytes().count(b"\n") == len(kept) + 1, "something torn is still there"


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path):
    assert read_lines(tmp_path / "x.jsonl") == []
    drop_lines_after(tmp_path / "x.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_later_steps_are_dropped(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    lines = [{"step": step} for step in (1, 1, 2, 4, 4)]
    for step, left in ((9, 5), (4, 5), (3, 3), (1, 2), (0, 0), (-1, 0)):
        file.unlink(missing_ok=True)
        append_lines(file, lines)
        drop_lines_after(file, step)
        assert read_lines(file) == lines[:left]
    append_lines(file, lines)
    file.write_bytes(file.read_bytes()[:-1])
    drop_lines_after(file, 9)
    assert read_lines(file) == lines[:4]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    file, seen = tmp_path / "latest", []
    file.write_text("old")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), seen.append(file.read_text()))[0])
    with suppress(ZeroDivisionError), written_whole(file) as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert (file.read_text(), seen) == ("old", [])
    with written_whole(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
    assert seen == ["old", "new"]  # flushed before it gets its name, and then the folder
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
