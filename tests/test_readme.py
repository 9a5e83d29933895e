"""What the README says of publishing is typed here, against a Hub on the loopback."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import sys
from typing import get_args

import pytest
import yaml
from PIL import Image

from spark_vl.data.problems import check, open_recipe
from spark_vl.data.recipes import Columns, Recipe, load_recipe
from spark_vl.data.sources import SourceType
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, PromptRecord
from spark_vl.verifiers import VERIFIERS, get_verifier, verify
from spark_vl.verifiers.shaping import SHAPING
from tests.hub.fixtures import ROOT

FREE = ("LOG.md",)


def test_train_publish_and_load(hub, spark_vl, forked, finished_run):
    section = re.search(r"^## Publish\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    section = section.replace("runs/digits", str(finished_run)).replace("ORG/NAME", "org/tiny")
    typed = re.findall(r"^    (spark-vl .*)$", section, flags=re.MULTILINE)
    train, *publish = (shlex.split(line, comments=True)[1:] for line in typed)
    # The run of the first command is there already: a short one, by the same function.
    assert train[:2] == ["train", "--config"]
    assert (ROOT / train[2]).is_file()
    assert [command[1] for command in publish] == ["model", "model", "judgments", "space"]
    for command in publish:
        done = spark_vl(*command)
        assert done.returncode == 0, done.stderr
        if "--dry-run" in command:
            assert not hub.repos
    assert set(hub.repos) == {("model", "org/tiny"), ("dataset", "org/tiny-judgments"), ("space", "org/tiny-demo")}
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    done = forked.python(ROOT, "-c", code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(Which digit is \w+|By how much).*\?.* [AB] \[<PIL\.", done.stdout)


def test_lines_break_at_120_characters():
    """Except tables, commands that a test types, the log and the design."""
    long = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        if page.name not in FREE:
            lines = enumerate(page.read_text().splitlines(), 1)
            long += [(page.name, n) for n, line in lines if len(line) > 120 and not line.startswith(("|", "spark-vl "))]
    assert long == []


def test_the_page_of_verifiers_lists_every_kind_setting_and_term_and_its_examples_hold():
    page = (ROOT / "docs" / "verifiers.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    kinds = {row[0].strip("`"): row[2] for row in rows if len(row) == 3}
    assert kinds.pop("module:function") == ""
    assert kinds.keys() == VERIFIERS.keys()
    for kind, settings in kinds.items():
        get_verifier(kind)
        known = vars(sys.modules[VERIFIERS[kind].partition(":")[0]]).get("SETTINGS", {})
        named = set(re.findall(r"`(\w+)`(?= \(|,|$)", settings))
        assert named <= known.keys(), kind
        if kind not in ("iou", "point", "detection"):  # which share a module
            assert named == known.keys(), kind
    assert {row[0].strip("`") for row in rows if len(row) == 2} == SHAPING.keys()
    calls = re.findall(r"^    (verify\(.*?\)(?:\.score)?)(?: +#.*)?$", page, flags=re.MULTILINE)
    assert len(calls) == 2
    scores = [eval(call, {"verify": verify}) for call in calls]  # the page's own text
    assert scores[0] == 1
    assert scores[1].score == 1


# ── docs/your_data.md, and one's own verifier ──


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )


@pytest.fixture
def data(tmp_path):
    """The files of the page, and the images that its rows name."""
    for folder in ("data", "pictures/train"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("bars", "map"):
            Image.new("RGB", (100, 100), "white").save(tmp_path / folder / f"{name}.png")
    recipe, derived = blocks("your_data.md", "yaml")
    lines, metadata = blocks("your_data.md", "json")
    [table] = blocks("your_data.md", "csv")
    (tmp_path / "my_data.yaml").write_text(recipe)
    (tmp_path / "derived.yaml").write_text(derived)
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    (tmp_path / "data" / "train.csv").write_text(table)
    (tmp_path / "pictures" / "train" / "metadata.jsonl").write_text(metadata)
    return tmp_path


def checked(pool, name, **overrides) -> list[PromptRecord | BadRecordError]:
    return list(check(open_recipe(load_recipe(name, **overrides), "train", Templater.load()), pool))


def test_every_row_of_the_page_can_be_used_as_it_says(data, pool, monkeypatch):
    monkeypatch.chdir(data)
    rows = checked(pool, "my_data.yaml")
    assert [row.verifier for row in rows] == [
        *("number", "number", "choice", "choice", "text", "text", "iou", "text", "math", "number"),
    ]
    assert [row.gold for row in rows[:7]] == ["104", "56", "B", "B", "yes", "true", "[10, 20, 60, 90]"]
    assert [len(row.images) for row in rows] == [1, 0, 1, 1, 1, 1, 1, 1, 0, 2]
    assert [dict(rows[i].settings) for i in (0, 6, 7)] == [{"relative": 0.05}, {"threshold": 0.7}, {}]
    assert (rows[0].id, rows[9].id) == ("my_data/train/#0", "my_data/train/two")
    right = [r"\boxed{100}", r"\boxed{56}", r"\boxed{B}", r"\boxed{6 cm}", r"\boxed{Yes}", r"\boxed{True}"]
    assert [pool.verify([(said, row)])[0].score for said, row in zip(right, rows, strict=False)] == [1, 1, 1, 0, 1, 1]

    columns = {name: name for name in ("question", "answer", "images", "choices", "verifier")}
    from_csv = checked(pool, "my_data.yaml", source={"csv": "data"}, splits={"train": "train.csv"}, columns=columns)
    assert [(row.gold, row.verifier, len(row.images)) for row in from_csv] == [
        ("104", "number", 1),
        ("B", "choice", 1),
        ("[10, 20, 60, 90]", "iou", 1),
        ("5", "number", 2),
    ]
    columns = {name: name for name in ("question", "answer", "images")}
    settings = {"number": {}}
    place = {"source": {"folder": "pictures"}, "splits": {"train": "train"}}
    assert [row.gold for row in checked(pool, "my_data.yaml", **place, columns=columns, settings=settings)] == ["104"]
    assert [row.id for row in checked(pool, "derived.yaml")] == [
        f"my_numbers/train/{name}" for name in ("#0", "#1", "two")
    ]


def test_the_page_names_every_field_column_and_source():
    page = (ROOT / "docs" / "your_data.md").read_text()
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    fields = {each.name for cls in (Recipe, Columns) for each in dataclasses.fields(cls)}
    # Weights are written in place of the verifier's name, and behind the recipe's.
    assert fields - {"weights", "per_epoch"} | {"base", "parameters"} == named
    sources = re.findall(r"^\| `{(\w+): .*?}` \|", page, flags=re.MULTILINE)
    assert sorted(sources) == sorted(get_args(SourceType))


def test_the_verifier_of_the_page_is_the_example():
    example = ast.parse((ROOT / "scripts" / "examples" / "own_verifier.py").read_text())
    for node in ast.walk(example):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    python = blocks("verifiers.md", "python")[0]
    assert ast.unparse(ast.parse(python)) == ast.unparse(example)
    recipe = yaml.safe_load((ROOT / "scripts" / "examples" / "own_verifier.yaml").read_text())
    named = yaml.safe_load(blocks("verifiers.md", "yaml")[1])
    assert named["verifier"] == recipe["verifier"]
    assert named["settings"].keys() == recipe["settings"].keys()
