"""A verifier of one's own: where it may be, what it may return, who may name it, and how a mistake in it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spark_vl.data.judgments import row_of
from spark_vl.data.problems import ProblemSet, check, open_recipe
from spark_vl.data.recipes import load_recipe, load_recipes
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, PromptRecord, Rollout, RolloutGroup, Verdict
from spark_vl.run.codec import record_from_json, record_to_json
from spark_vl.verifiers import as_trl_reward, verify
from spark_vl.verifiers.base import run_verifier
from tests.conftest import make_record

TEMPLATER = Templater.load()

CHECK = r'''
from dataclasses import dataclass  # which looks its module up in sys.modules

from spark_vl import PromptRecord, Verdict, last_boxed

SETTINGS = {"within": 0.0}

@dataclass
class Answer:
    value: float

def near(completion: str, record: PromptRecord):
    """A score alone."""
    answer, within = Answer(float(last_boxed(completion))), dict(record.settings).get("within", 0)
    return abs(answer.value - float(record.gold)) <= within

def far(completion, record):
    return Verdict(1.0 - near(completion, record), "far")
'''


@pytest.fixture
def recipe_of(tmp_path: Path):
    """Writes verifiers into `mine/check.py`, rows, and a recipe beside it; returns the recipe's path."""

    def write(code: str = CHECK, rows: Any = ({},), **fields: Any) -> Path:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "check.py").write_text(code)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"q": "?", "a": 5} | row) + "\n" for row in rows))
        recipe = {
            "name": "mine",
            "description": "a test",
            "license": "MIT",
            "source": {"jsonl": "."},
            "splits": {"train": "rows.jsonl"},
            "columns": {"question": "q", "answer": "a"},
            "verifier": "./check.py:near",
        }
        file = folder / "mine.yaml"
        file.write_text(json.dumps({name: value for name, value in (recipe | fields).items() if value is not ...}))
        return file

    return write


def opened(file: Path) -> ProblemSet:
    return open_recipe(load_recipe(file), "train", TEMPLATER)


# ── where it may be ──


def test_a_file_beside_the_recipe_is_loaded_here_and_in_the_workers(recipe_of, pool, tmp_path, monkeypatch) -> None:
    """Without its folder on `sys.path`, where its `json.py` would be everybody's; from a recipe that starts from it in
    another folder, too."""
    file = recipe_of()
    (file.parent / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "other.yaml").write_text("{base: mine/mine.yaml, name: other}")
    monkeypatch.chdir("/")
    before = list(sys.path)
    for path in (file, tmp_path / "other.yaml"):
        [record] = opened(path)
        assert record.verifier == f"{file.parent / 'check.py'}:near"
        right, wrong = pool.verify([(rf"\boxed{{{answer}}}", record) for answer in (5, 6)])
        assert (right, wrong) == (Verdict(1.0, "5"), Verdict(0.0, "6"))
    assert [type(row) for row in check(opened(file), pool)] == [PromptRecord]
    assert sys.path == before


def test_a_notebook_names_a_file_from_its_folder(recipe_of, monkeypatch) -> None:
    monkeypatch.chdir(recipe_of().parent)
    assert verify("./check.py:near", r"\boxed{5}", 5).score == 1
    assert verify("check.py:near", r"\boxed{6}", 5, within=1.0).score == 1
    assert as_trl_reward("./check.py:far")([r"\boxed{5}", r"\boxed{6}"], [5, 5]) == [0.0, 1.0]


def test_two_files_of_one_name_are_two_modules(recipe_of, tmp_path) -> None:
    (tmp_path / "check.py").write_text("def near(completion, record): return 0.25")
    for name, score in ((f"{recipe_of().parent}/check.py:near", 1.0), (f"{tmp_path}/check.py:near", 0.25)):
        assert run_verifier(r"\boxed{5}", make_record("r", "?", verifier=name)).score == score


# ── what it may return ──


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        ("True", 1.0),
        ("False", 0.0),
        ("1", 1.0),
        ("0.25", 0.25),
        ("numpy.float32(0.5)", 0.5),
        ("numpy.bool_(True)", 1.0),
        ("numpy.array(0.5)", 0.5),
        ("torch.tensor(0.5)", 0.5),
        ("torch.tensor(True)", 1.0),
    ],
)
def test_a_score_alone_goes_with_the_last_box(returned: str, score: float, monkeypatch) -> None:
    value = eval(returned, {"numpy": np, "torch": torch})
    monkeypatch.setattr("spark_vl.verifiers.base.get_verifier", lambda name: lambda completion, record: value)
    verdict = run_verifier(r"so \boxed{4}", make_record("r", "?"))
    assert verdict == Verdict(score, "4")
    assert type(verdict.score) is float


@pytest.mark.parametrize("value", [None, "1", {"score": 1}, (1.0, "yes"), 1.5, -0.1, float("nan"), 1j, [1.0]])
def test_anything_else_is_an_error_that_says_what_was_found(value: Any, monkeypatch) -> None:
    monkeypatch.setattr("spark_vl.verifiers.base.get_verifier", lambda name: lambda completion, record: value)
    verdict = run_verifier("4", make_record("r", "?", verifier="/some/where/check.py:near"))
    assert (verdict.score, verdict.status) == (0.0, "error")
    assert "verifier 'check.py:near': " in verdict.detail
    assert repr(value) in verdict.detail
    assert "in [0, 1]" in verdict.detail


# ── mistakes in it ──

MISTAKES = [
    ("def nearly(completion, record): return 1", r"file '.*check\.py' has no 'near'"),
    ("near = 5", "'near' is not callable but 5"),
    ("def near(completion): return 1", r"found near\(completion\); it is called with \(completion, record\)"),
    ("def near(completion, record, more): return 1", r"found near\(completion, record, more\)"),
    ("def near(*, completion, record): return 1", r"found near\(\*, completion, record\)"),
    ("class near:\n    def __call__(self, completion): return 1", r"found near\(completion\)"),
    ("class near:\n    def __init__(self, size): ...", "cannot be loaded: TypeError: .*'size'$"),
    ("\nimport no_such_module", r"cannot be loaded: ModuleNotFoundError: .*no_such_module.*check\.py, line 2\)"),
    ("\n\ndef near(:", r"cannot be loaded: SyntaxError: .*check\.py, line 3\)"),
    ("raise ValueError('mine')", r"cannot be loaded: ValueError: mine \(.*check\.py, line 1\)"),
    ("import sys\nsys.exit('usage')", "cannot be loaded: SystemExit: usage"),
    ("\x00", "cannot be loaded: "),
]


@pytest.mark.parametrize(("code", "message"), MISTAKES)
def test_a_mistake_is_said_with_the_recipe_and_the_line(recipe_of, code: str, message: str) -> None:
    file = recipe_of(code)
    for start in (lambda: load_recipes([str(file)]), lambda: opened(file)):
        with pytest.raises(ValueError, match=rf"^recipe mine: verifier '.*check\.py:near': {message}"):
            start()


@pytest.mark.parametrize(
    "code",
    [
        "class near:\n    def __call__(self, completion, record): return 1",
        "def near(text, problem, strict=False): return 1",
        "def near(*anything): return 1",
        "near = max",
    ],
)
def test_whatever_can_be_called_is_a_verifier(recipe_of, code: str) -> None:
    load_recipes([str(recipe_of(code))])


@pytest.mark.parametrize("code", ["def near(completion): return 1", "import no_such_module"])
def test_training_says_so_before_anything_heavy_is_loaded(recipe_of, tmp_path: Path, code: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "spark_vl", "train", "--model.path", str(CHECKPOINT)]
    command += ["--data.recipes", f"[{recipe_of(code)}]", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert done.returncode == 2
    assert said.startswith("spark-vl train: error: data.recipes: recipe mine: verifier ")
    assert "Traceback" not in said
    assert " torch\n" not in done.stderr
    assert not (tmp_path / "run").exists()


# ── settings, and verifiers of single rows ──


def test_each_verifier_has_settings_of_its_own(recipe_of, pool) -> None:
    rows = [{}, {"v": "number"}, {"v": "text"}, {"v": "check.py:far"}, {"v": "./check.py:far"}]
    columns = {"question": "q", "answer": "a", "verifier": "v"}
    settings = {"./check.py:near": {"within": 1.0}, "number": {"relative": 0.5}, "./check.py:far": {}}
    file = recipe_of(rows=rows, columns=columns, settings=settings)
    records = list(opened(file))
    assert [Path(record.verifier).name for record in records] == [
        "check.py:near",
        "number",
        "text",
        "check.py:far",
        "check.py:far",
    ]
    assert [dict(record.settings) for record in records] == [{"within": 1.0}, {"relative": 0.5}, {}, {}, {}]
    verdicts = pool.verify([(r"\boxed{6}", record) for record in records])
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_settings_of_ones_own_verifier_are_checked(recipe_of) -> None:
    for settings, message in (({"with": 1}, "'with' is not a setting; allowed: within"), ({"within": "x"}, "within: ")):
        file = recipe_of(settings={"./check.py:near": settings})
        with pytest.raises(ValueError, match=rf"^recipe mine: .*check\.py:near: {message}"):
            load_recipes([str(file)])
    file = recipe_of(settings={"./any.py:near": {"any": [1]}}, verifier="./any.py:near")
    (file.parent / "any.py").write_text("def near(completion, record): return 1")
    load_recipes([str(file)])


def test_a_recipe_whose_rows_all_name_theirs_needs_no_verifier(recipe_of) -> None:
    rows = [{"v": "number"}, {}, {"c": ["5", "6"], "a": "5"}]
    columns = {"question": "q", "answer": "a", "verifier": "v", "choices": "c"}
    problems = opened(recipe_of(rows=rows, columns=columns, verifier=...))
    assert (problems[0].verifier, problems[2].verifier) == ("number", "choice")
    with pytest.raises(BadRecordError, match="'v' is null, and the recipe has no verifier"):
        problems[1]


def test_a_row_names_no_file_but_those_of_its_recipe(recipe_of, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rows = [{"v": name} for name in ("./evil.py:near", f"{tmp_path}/mine/evil.py:near", "check.py:far", "check:near")]
    problems = opened(recipe_of(rows=rows, columns={"question": "q", "answer": "a", "verifier": "v"}))
    for index in range(len(rows)):
        with pytest.raises(BadRecordError, match=r"'v' is '.*'; allowed: null, check\.py:near, choice"):
            problems[index]
    assert not (tmp_path / "ran").exists()


# ── what is written down ──


def test_what_is_published_does_not_name_the_folder(recipe_of) -> None:
    [record] = opened(recipe_of())
    group = RolloutGroup(record, (Rollout((1,), (0.0,), "5", "stop"),), (Verdict(1.0, "5"),))
    row = row_of(group, 1, model="m", model_revision=None, image_bytes=lambda ref: b"")
    assert row["verifier"] == "check.py:near"
    assert str(recipe_of().parent) not in json.dumps(row)


def test_a_checkpoint_that_was_moved_finds_the_recipes_verifier(recipe_of, tmp_path: Path) -> None:
    """And no other: not another function, nor a file of another name, nor one of two that have the same name."""
    problems = opened(recipe_of())
    [record] = problems
    for there in ("/another/machine/check.py:near", "check.py:near", record.verifier):
        saved = record_to_json(replace(record, verifier=there))
        assert record_from_json(json.loads(json.dumps(saved)), problems.verifiers) == record
    for there in ("/another/machine/check.py:far", f"{tmp_path}/mine/other.py:near", "check:near"):
        with pytest.raises(ValueError, match="verifier: found "):
            record_from_json(record_to_json(replace(record, verifier=there)), problems.verifiers)
    both = {*problems.verifiers, "/other/check.py:near"}
    assert record_from_json(record_to_json(record), both).verifier == record.verifier
    with pytest.raises(ValueError, match="verifier: found "):
        record_from_json(record_to_json(replace(record, verifier="/third/check.py:near")), both)


def test_an_error_in_it_names_its_line_but_no_folder(tmp_path):
    """What it says is kept with the rollouts, which may be published."""
    file = tmp_path / "mine.py"
    file.write_text("def near(completion, record):\n    return 1 / len(record.choices)\n")
    verdict = run_verifier(r"\boxed{5}", make_record("r", "?", verifier=f"{file}:near"))
    assert verdict.detail == "ZeroDivisionError: division by zero (mine.py, line 2)"
