"""DAPO-Math-17k in the form in which it is published: rows that repeat, problems within an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, List, Value

from spark_vl.data import dapo
from spark_vl.data.problems import check, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, PromptRecord, plain_text
from tests.golds import check_gold

TEXT = Value("string")
COLUMNS = {
    "data_source": TEXT,
    "prompt": List({"content": TEXT, "role": TEXT}),
    "ability": TEXT,
    "reward_model": {"ground_truth": TEXT, "style": TEXT},
    "extra_info": {"index": TEXT},
}


def row(problem: str, answer: str, *, framed: bool = True, turns: int = 1) -> dict[str, Any]:
    text = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        f'{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text if framed else problem, "role": "user"}] * turns,
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": problem[:4]},
    }


SUM, ROOTS = row("Find $1+2$.\n\nAnswer: with an integer.", "3"), row("How many roots has $x^2 = 4$?", "2")
ROWS = [SUM, ROOTS, SUM, row("Find $m+n$ if $\\frac{m}{n}$ = 3/4.", "7"), ROOTS, SUM, row("Find $-2+1$.", "-1")]


def test_each_problem_is_there_once_in_the_words_of_its_author() -> None:
    rows = dapo.DapoRows(ROWS)
    assert [rows[index] for index in range(len(rows))] == [
        {"question": "Find $1+2$.\n\nAnswer: with an integer.", "answer": "3"},
        {"question": "How many roots has $x^2 = 4$?", "answer": "2"},
        {"question": "Find $m+n$ if $\\frac{m}{n}$ = 3/4.", "answer": "7"},
        {"question": "Find $-2+1$.", "answer": "-1"},
    ]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([SUM, row("Find $1+2$.\n\nAnswer: with an integer.", "4")], "repeat the problem with another answer"),
        ([row("Find $1+2$.", "3", framed=False)], "does not stand in the instruction of the others: 'Find"),
        ([row("Find $1+2$.", "3", turns=2)], "not a chat of one turn"),
        ([row("Find $1+2$.", "3") | {"reward_model": None}], "not a chat of one turn with an answer"),
        ([{"prompt": [{"content": dapo.BEHIND}], "reward_model": {"ground_truth": "1"}}], "instruction of the others"),
    ],
)
def test_a_row_of_another_form_is_an_error_of_that_row(rows, reason) -> None:
    found = dapo.DapoRows([*rows, ROOTS])
    with pytest.raises(ValueError, match=reason):
        found[0]
    assert found[1]["answer"] == "2"


def test_the_recipe_reads_the_repository(tmp_path: Path, monkeypatch, pool) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dapo, "REPO", str(tmp_path / "repo"))
    (tmp_path / "repo" / "data").mkdir(parents=True)
    rows = [*ROWS, row("Find $9-9$.", "0", framed=False)]
    table = {column: [row[column] for row in rows] for column in COLUMNS}
    Dataset.from_dict(table, features=Features(COLUMNS)).to_parquet(
        tmp_path / "repo" / "data" / "dapo-math-17k.parquet"
    )
    opened = open_recipe(load_recipe("dapo_math_17k"), "train", Templater.load())
    *good, bad = check(opened, pool)
    assert isinstance(bad, BadRecordError)
    assert [(record.gold, record.verifier) for record in good] == [(gold, "math") for gold in ("3", "2", "7", "-1")]
    for record in good:
        assert isinstance(record, PromptRecord)
        check_gold(record)
        assert not record.images
        assert "Remember to put" not in plain_text(record.messages[-1].content)
        assert plain_text(record.messages[-1].content).count("boxed") == 1
