"""Recipes are read strictly; rows become problems or reasons; every shipped recipe runs on a fixture in its schema."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, List, Value
from PIL import Image

from spark_vl.data.images import load_image
from spark_vl.data.problems import FilteredRowError, ProblemSet, check, open_recipe
from spark_vl.data.recipes import load_recipe, load_recipes, recipes, usage
from spark_vl.data.sources import Source, open_rows, read_column
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef, PromptRecord, plain_text
from spark_vl.verifiers.base import VERIFIERS, run_verifier
from tests.golds import check_gold
from tests.test_benchmarks import SCHEMAS

TEMPLATER = Templater.load()


def png(color: Any = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


FIELDS = {
    "name": "mine",
    "description": "a test",
    "license": "MIT",
    "source": {"jsonl": "data"},
    "splits": {"train": "train.jsonl"},
    "columns": {"question": "q", "answer": "a", "images": "images", "choices": "choices", "verifier": "v"},
    "verifier": "math",
}
PLAIN = {"question": "q", "answer": "a", "images": "image"}
ROW = {"q": "What is shown?", "a": "5", "images": [], "choices": None, "v": None}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def recipe_file(tmp_path: Path):
    """Writes a recipe, and returns its path."""

    def write(**fields: Any) -> Path:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in (FIELDS | fields).items() if v is not ...}))
        return file

    return write


@pytest.fixture
def problems(tmp_path: Path, recipe_file):
    """Opens rows, given as what differs from `ROW`, as the train split of a recipe."""

    def opened(*rows: Any, **fields: Any) -> ProblemSet:
        lines(tmp_path / "data" / "train.jsonl", [ROW | row if isinstance(row, dict) else row for row in rows])
        return open_recipe(load_recipe(recipe_file(**fields)), "train", TEMPLATER)

    return opened


def reason(problems: ProblemSet, index: int = 0) -> str:
    """Why a row cannot be used, without the place that a person finds it at (see tests/test_cli.py)."""
    with pytest.raises(BadRecordError) as caught:
        problems[index]
    return re.sub(r" \(train\.jsonl, line \d+\)$", "", caught.value.reason)


# ── the recipe file ──


def test_a_recipe_file_is_read_with_paths_relative_to_it(recipe_file, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    recipe = load_recipe(recipe_file(media_root="pictures"))
    assert (recipe.name, recipe.license, recipe.verifier_of("train")) == ("mine", "MIT", "math")
    assert recipe.source.location == str(tmp_path / "data")
    assert recipe.media_root == str(tmp_path / "pictures")
    assert recipe.columns.used == ("q", "a", "images", "choices", "v")


def test_overrides_replace_fields_with_paths_relative_to_the_working_directory(
    recipe_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(recipe_file(), source={"parquet": "p"}, splits={"test": "x.parquet"})
    assert (recipe.source.type, recipe.source.location) == ("parquet", str(tmp_path / "elsewhere" / "p"))
    assert recipe.splits == {"test": "x.parquet"}
    assert recipe.name == "mine"


def test_a_recipe_may_start_from_another(tmp_path: Path, recipe_file) -> None:
    recipe_file()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("{base: ../mine.yaml, media_root: pictures, license: CC0-1.0}")
    recipe = load_recipe(tmp_path / "sub" / "b.yaml")
    assert recipe.media_root == str(tmp_path / "sub" / "pictures")
    assert recipe.source.location == str(tmp_path / "data")
    assert (recipe.name, recipe.license) == ("mine", "CC0-1.0")
    (tmp_path / "c.yaml").write_text("{base: virl39k, media_root: x}")
    assert load_recipe(tmp_path / "c.yaml").source == load_recipe("virl39k").source


def test_a_circle_of_bases_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a base of itself.*a\.yaml → .*b\.yaml → "):
        load_recipe("a.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"licence": "MIT"}, "licence: is not a field; allowed: name, description, license, source"),
        ({"license": ...}, "license: is missing"),
        ({"license": ""}, "license: found ''"),
        ({"name": "a/b"}, "name: found 'a/b'; allowed: letters"),
        ({"name": 5}, "name: found 5"),
        ({"source": "data"}, "source: found 'data'; allowed: one of hub, jsonl, csv, parquet, folder, factory"),
        ({"source": {"jsonl": "a", "hub": {"id": "b"}}}, "allowed: one of hub, jsonl"),
        ({"source": {"xlsx": "a"}}, "source: found {'xlsx': 'a'}"),
        ({"source": {"jsonl": __file__}}, r"is a file; .*source: {jsonl: .*tests}, splits: {train: test_recipes\.py}"),
        ({"source": {"hub": "x/y"}}, "source.hub: found 'x/y'; allowed: a mapping"),
        ({"source": {"hub": {"name": "x/y"}}}, "source.hub: found .*; allowed: id, and optionally config, revision"),
        ({"source": {"hub": {"id": "x/y", "revision": 1}}}, "source.hub.revision: found 1"),
        ({"source": {"factory": "os.system"}}, "source.factory: found 'os.system'; allowed: module:function"),
        ({"splits": {}}, "splits: found {}; allowed: one or more of train, validation, test"),
        ({"splits": {"dev": "dev.jsonl"}}, "splits: found .*dev.*; allowed: one or more of train"),
        ({"splits": ["train"]}, "splits: found .*; allowed: a mapping"),
        ({"columns": {"question": "q"}}, "columns.answer: is missing"),
        (
            {"columns": {"question": "q", "answer": "a", "picture": "p"}},
            "columns.picture: is not a field; allowed: question",
        ),
        ({"columns": {"question": "q", "answer": 3}}, "columns.answer: found 3"),
        ({"verifier": {"test": "math"}}, "verifier: found .*; allowed: a name, or one for each of train"),
        ({"verifier": 5}, "verifier: found 5"),
        ({"image_placeholder": " "}, "image_placeholder: found ' '"),
        ({"media_root": 3}, "media_root: found 3"),
        ({"verifier": ..., "columns": PLAIN}, "verifier: is missing, and so is columns.verifier"),
        ({"settings": {"relative": 0.05}}, r"settings\.relative: found 0\.05; .* settings: {math: {relative: 0\.05}}"),
        ({"filter": ["k"]}, "filter: found .*; allowed: a mapping of columns to values"),
        ({"filter": {"k": []}}, r"filter\.k: found \[\]; allowed: a text, a number"),
        ({"filter": {"k": {"a": 1}}}, r"filter\.k: found {'a': 1}; allowed: a text, a number"),
        ({"filter": {"k": {"min": "1"}}}, r"filter\.k: found {'min': '1'}; allowed: a text, a number, .* or a range"),
        ({"columns": {"judgments": "pairwise"}, "filter": {"k": 1}}, "filter: does not apply to a judgment dataset"),
        ({"settings": []}, "settings: found .*; allowed: a mapping of verifiers to their settings"),
        ({"settings": {"numbr": {}}}, "settings: found 'numbr'; allowed: math, choice"),
        ({"settings": {"number": {"relativ": 1}}}, "settings: number: 'relativ' is not a setting"),
        ({"settings": {"number": {}}, "columns": PLAIN}, "settings: no row has the verifier 'number'"),
        ({"columns": {"judgments": "pairwise"}, "settings": {"number": {}}}, "settings: does not apply to a judgment"),
        ({"columns": {"judgments": "pairs"}}, "columns.judgments: found 'pairs'; allowed: pointwise, pairwise, refl"),
        ({"columns": {"judgments": "pairwise", "id": "x"}}, "columns: found .*; allowed beside judgments: nothing"),
        ({"columns": {"judgments": "pairwise"}, "media_root": "x"}, "media_root: does not apply to a judgment dataset"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(recipe_file, fields: dict[str, Any], message: str) -> None:
    file = recipe_file(**fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- a", "5", ""])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml: (is not YAML|found)"):
        load_recipe(tmp_path / "bad.yaml")


def test_an_unknown_recipe_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'geometry' \(did you mean geometry3k\?\); allowed: ai2d, chartqa, countbenchqa"
    ):
        load_recipe("geometry")
    with pytest.raises(ValueError, match="this recipe file does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="limit: is not a field"):
        load_recipe("digits", limit=5)


# ── parameters ──

PARAMETERS = {"name": "mine-${kind}", "license": "${kind}-${repo}", "parameters": {"repo": None, "kind": "a"}}


def test_parameters_stand_where_the_file_has_them(recipe_file) -> None:
    file = recipe_file(**PARAMETERS, source={"hub": {"id": "${repo}", "config": "${kind}"}})
    recipe = load_recipe(f"{file}?repo=org/name")
    assert (recipe.name, recipe.license) == ("mine-a", "a-org/name")
    assert (recipe.source.location, recipe.source.config) == ("org/name", "a")
    assert load_recipe(f"{file}?kind=b&repo=x%26y%20z").license == "b-x&y z"


def test_what_is_filled_in_is_not_filled_again(recipe_file) -> None:
    assert load_recipe(f"{recipe_file(**PARAMETERS, description='${repo}')}?repo=$%7Bkind}}").description == "${kind}"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", r"parameter repo: is missing; write mine\?repo=…"),
        ("?", "parameter repo: is missing"),
        ("?kind=b", "parameter repo: is missing"),
        ("?repo=", "parameter repo: is missing"),
        ("?repo=x&kind=", "parameter kind: is missing"),
        ("?repo=x&split=b", "'split' is not a parameter; allowed: kind, repo"),
        ("?repo=x&repo=y", "found 'repo=x&repo=y'; allowed: each parameter once"),
        ("?repo", "found 'repo'; allowed: parameters as name=value&name=value"),
    ],
)
def test_parameters_are_checked(recipe_file, query: str, message: str) -> None:
    file = recipe_file(**PARAMETERS)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(f"{file}{query}")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": ["repo"]}, "parameters: found .*; allowed: a mapping of names to texts or null"),
        ({"parameters": {"repo": 3}}, "parameters: found .*; allowed: a mapping"),
        ({"parameters": {"repo": "x"}, "license": "${rep}"}, r"\$\{rep\}: is not a parameter; allowed: repo"),
        ({"parameters": {"repo": "x"}, "license": "${}"}, r"\$\{\}: is not a parameter; allowed: repo"),
    ],
)
def test_parameters_of_a_file_are_checked(recipe_file, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(**fields))


def test_without_parameters_texts_are_left_alone_and_none_are_allowed(recipe_file) -> None:
    file = recipe_file(description="costs ${5}")
    assert load_recipe(file).description == "costs ${5}"
    with pytest.raises(ValueError, match="'repo' is not a parameter; allowed: none"):
        load_recipe(f"{file}?repo=x")
    with pytest.raises(ValueError, match=r"digits\.yaml: 'kind' is not a parameter; allowed: none"):
        load_recipe("digits?kind=x")


def test_a_base_gets_its_parameters_from_the_file_that_starts_from_it(recipe_file, tmp_path: Path) -> None:
    recipe_file(**PARAMETERS)
    (tmp_path / "b.yaml").write_text("{base: 'mine.yaml?repo=${to}&kind=c', parameters: {to: null}, name: b}")
    recipe = load_recipe(f"{tmp_path / 'b.yaml'}?to=org/name")
    assert (recipe.name, recipe.license, recipe.source.location) == ("b", "c-org/name", str(tmp_path / "data"))
    (tmp_path / "c.yaml").write_text(
        "{base: 'judgments?repo=org/name&kind=rollouts', verifier: 'spark_vl.verifiers.number:verify_number'}"
    )
    assert load_recipe(tmp_path / "c.yaml").columns.judgments == "rollouts"


@pytest.mark.parametrize(
    ("verifier", "why"),
    [
        ("numbr", "this is none of them"),
        ("no.such.module:check", "there is no module 'no.such.module' on sys.path"),
        ("./no_such_file.py:check", "there is no file .*no_such_file.py"),
        ("no_such_file.py:", "this is none of them"),
        ("nothing:", "this is none of them"),
        ({"train": "math", "test": "numbr"}, "this is none of them"),
    ],
)
def test_a_verifier_that_is_none_is_found_when_the_recipe_is_read(recipe_file, verifier, why: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"verifier: found '.*'; allowed: math, choice, .*, module:function, or ./file.py:function \({why}",
    ):
        load_recipe(recipe_file(verifier=verifier))


def test_whether_a_verifier_is_there_is_found_out_without_running_anything(recipe_file, tmp_path, monkeypatch) -> None:
    """Not even the packages that contain it."""
    (tmp_path / "loud" / "inner").mkdir(parents=True)
    (tmp_path / "quiet" / "deep").mkdir(parents=True)  # namespaces
    (tmp_path / "quiet" / "deep" / "file.py").write_text("")
    for file in ("loud/__init__.py", "loud/inner/__init__.py", "loud/inner/leaf.py"):
        (tmp_path / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("loud", "loud.inner", "loud.inner.leaf", "quiet.deep.file", "tests.misbehaving", "json"):
        load_recipe(recipe_file(verifier=f"{module}:check"))
    for module in (
        "loud.nothing",
        "loud.inner.leaf.nothing",
        "quiet.file",
        "loud.sys",
        ".loud",
        "loud.",
        "loud..inner",
        "../loud",
    ):
        with pytest.raises(ValueError, match=f"there is no module '{re.escape(module)}' on sys.path"):
            load_recipe(recipe_file(verifier=f"{module}:check"))
    assert not (tmp_path / "ran").exists()
    assert not {"loud", "quiet"} & sys.modules.keys()


def test_a_gold_that_means_nothing_to_its_verifier_is_a_bad_row(problems, pool) -> None:
    opened = problems({"a": "5"}, {"a": "blue"}, {"a": "six"}, verifier="number")
    good, bad, word = check(opened, pool)
    assert isinstance(good, PromptRecord)
    assert isinstance(word, PromptRecord)
    assert bad.record_id == "mine/train/#1"
    assert "the number verifier gives its own gold 'blue' 0 of 1" in bad.reason


def test_a_gold_outside_of_its_image_is_a_bad_row(problems, tmp_path: Path, pool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    rows = [{"images": ["a.png"], "a": [0, 0, 5, 5]}, {"images": ["a.png"], "a": [0, 0, 500, 5]}, {"a": [0, 0, 5, 5]}]
    good, outside, nowhere = check(problems(*rows, verifier="iou"), pool)
    assert isinstance(good, PromptRecord)
    assert "outside the image" in outside.reason
    assert "the size of image 0 is missing" in nowhere.reason


def test_recipes_that_are_used_together_have_different_names() -> None:
    first, second = "judgments?repo=org/a", "judgments?repo=org/b"
    with pytest.raises(ValueError, match=r"^more than one is named judgments-pairwise; names are unique$"):
        load_recipes([first, "digits", second])
    assert [recipe.name for recipe in load_recipes([first, f"{second}&name=other"])] == [
        "judgments-pairwise",
        "other-pairwise",
    ]


def test_a_name_may_have_a_weight(recipe_file, tmp_path: Path) -> None:
    file = recipe_file(**PARAMETERS)
    for written in (f"{file}?repo=x&weight=2.5", f"{file}?weight=2.5&repo=x"):
        recipe = load_recipe(written)
        assert (recipe.per_epoch, recipe.license) == (2.5, "a-x")
    assert load_recipe("digits?weight=.5").per_epoch == 0.5
    assert load_recipe("digits").per_epoch == 1
    assert load_recipe("digits?weight=2").name == "digits"
    with pytest.raises(ValueError, match="more than one is named digits"):
        load_recipes(["digits", "digits?weight=2"])
    (tmp_path / "b.yaml").write_text("{base: 'digits?weight=2', name: b}")
    with pytest.raises(ValueError, match="'weight' is not a parameter; allowed: none"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="parameters: weight has a meaning in every recipe"):
        load_recipe(recipe_file(parameters={"weight": "1"}))
    with pytest.raises(ValueError, match=r"mine\.yaml: per_epoch: is not a field"):
        load_recipe(recipe_file(per_epoch=2))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "", "two", "1&weight=2"])
def test_a_weight_is_a_number_above_0(weight: str) -> None:
    with pytest.raises(ValueError, match=r"^digits\?weight=.*: weight: found .*; allowed: one number above 0"):
        load_recipe(f"digits?weight={weight}")


def test_a_weight_is_refused_where_rows_are_not_drawn_over_epochs() -> None:
    recipe = load_recipe("digits?weight=2")
    assert len(open_recipe(recipe, "validation", TEMPLATER, weighted=True))
    with pytest.raises(ValueError, match=r"recipe digits: weight: .* is allowed in data\.recipes only"):
        open_recipe(recipe, "validation", TEMPLATER)


def test_how_recipes_are_written() -> None:
    assert (usage("digits"), usage("judgments")) == ("digits", "judgments?repo=REPO")


def test_what_a_recipe_names_must_be_there(recipe_file, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe mine: splits: found 'test'; allowed: train"):
        open_recipe(load_recipe(recipe_file()), "test", TEMPLATER)
    with pytest.raises(ValueError, match=r"recipe mine: source: no file 'train\.jsonl'"):
        open_recipe(load_recipe(recipe_file()), "train", TEMPLATER)
    lines(tmp_path / "data" / "train.jsonl", [ROW])
    with pytest.raises(ValueError, match=r"recipe mine: media_root: found .*nowhere"):
        open_recipe(load_recipe(recipe_file(media_root="nowhere")), "train", TEMPLATER)
    Dataset.from_dict({"q": ["?"], "x": ["1"]}).to_parquet(tmp_path / "data" / "t.parquet")
    with pytest.raises(ValueError, match="no column a, choices, images, v; the columns are q, x"):
        open_recipe(
            load_recipe(recipe_file(source={"parquet": "data"}, splits={"train": "*.parquet"})), "train", TEMPLATER
        )


# ── good rows ──


def test_a_row_becomes_a_problem(problems, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png("red"))
    (tmp_path / "data" / "b.png").write_bytes(png("blue"))
    row = {"q": " Is <image> larger than <image>? \n", "images": ["a.png", "b.png"], "a": " yes "}
    record = problems(row)[0]
    root = str(tmp_path / "data")
    first, second = ImageRef(path="a.png", root=root), ImageRef(path="b.png", root=root)
    assert record.question == ("Is ", first, " larger than ", second, "?")
    assert record.messages == TEMPLATER.problem(record.question)
    assert (record.id, record.kind, record.gold, record.recipe) == ("mine/train/#0", "problem", "yes", "mine")
    assert (type(record), record.verifier, record.choices) == (PromptRecord, "math", ())


def test_without_placeholders_images_go_first(problems, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    opened = problems({"images": "a.png"}, {"images": ["a.png", "a.png"]}, {"images": None})
    assert [plain_text(record.question) for record in opened] == [
        "<image>What is shown?",
        "<image><image>What is shown?",
        "What is shown?",
    ]


def test_a_placeholder_of_its_own(problems, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    record = problems({"q": "See <image1> (not <image>).", "images": "a.png"}, image_placeholder="<image1>")[0]
    assert record.question == ("See ", record.images[0], " (not <image>).")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"First \boxed{3}, no: \boxed{ 4 }.", "4"),
        ("  12 cm ", "12 cm"),
        (5, "5"),
        (-0.25, "-0.25"),
        (True, "true"),
        ([10, 20.5, 30, 40], "[10, 20.5, 30, 40]"),
        (["café", "coffee shop"], '["café", "coffee shop"]'),
        ([10, 20, None, None], "[10, 20]"),
        ([{"bbox_2d": [1, 2, 3, 4], "label": "cat"}], '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]'),
    ],
)
def test_gold_is_the_last_box_or_the_whole_answer(problems, answer: Any, gold: str) -> None:
    assert problems({"a": answer})[0].gold == gold


def test_choices_are_shown_and_the_gold_is_a_letter(problems) -> None:
    opened = problems(
        {"q": "How long?", "choices": ["5 cm", "6 cm"], "a": "B"},
        {"q": "How long?", "choices": ["5 cm", "6 cm"], "a": "6 cm"},
        {"q": "How long?\nChoices:\n(A) 5 cm\n(B) 6 cm", "choices": ["5 cm", "6 cm"], "a": r"\boxed{5 cm}"},
        {"q": "Which figure?", "choices": ["A", "B", "C"], "a": "C"},
        {"q": "How long?", "choices": [], "a": "5 cm"},
        {"q": "How long?", "choices": ["5 cm", "6 cm", None, None], "a": "B"},
    )
    assert [plain_text(record.question) for record in opened] == [
        "How long?\nA. 5 cm\nB. 6 cm",
        "How long?\nA. 5 cm\nB. 6 cm",
        "How long?\nChoices:\n(A) 5 cm\n(B) 6 cm",
        "Which figure?",
        "How long?",
        "How long?\nA. 5 cm\nB. 6 cm",
    ]
    assert [record.gold for record in opened] == ["B", "B", "A", "C", "5 cm", "B"]
    assert [record.verifier for record in opened] == ["choice"] * 4 + ["math", "choice"]
    assert opened[0].choices == ("5 cm", "6 cm")


def test_choices_may_hold_images(problems, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    row = {"q": "Which?", "choices": ["<image>", "<image>"], "images": ["a.png", "a.png"], "a": "A"}
    assert plain_text(problems(row)[0].question) == "Which?\nA. <image>\nB. <image>"


@pytest.mark.parametrize(
    ("question", "answer", "verifier"),
    [
        ("How long is it?\nA. 5\nB. 6\nC. 7", "B", "choice"),
        ("How long is it? (A) 5 (B) 6", r"\boxed{A}", "choice"),
        ("长度是多少？A、5 B、6", "B", "choice"),
        ("Which?\nA. 3 cm\nB. 5 cm\nC. 7 cm", r"\boxed{(B)}", "choice"),
        ("Which?\nA. 3 cm\nB. 5 cm\nC. 7 cm", r"\boxed{\text{B. 5 cm}}", "choice"),
        ("Which?\nA. 3 cm\nB. 5 cm\nC. 7 cm", "AC", "choice"),
        ("Which?\nA. 3 cm\nB. 5 cm\nC. 7 cm", "A, C", "choice"),
        ("Which?\nA. 3 cm\nB. 5 cm\nC. 7 cm", "AD", "math"),  # a line: there is no option D
        ("Which line of B, A. and C. is it?", "AB", "math"),
        ("How long is it? (A) 5 (B) 6", "6", "math"),
        ("How long is it? (A) 5 (B) 6", "D", "math"),  # no option of that letter
        ("Which variable is the area?", "A", "math"),
        ("What is USA. and LAB. here?", "A", "math"),
    ],
)
def test_a_letter_to_a_lettered_question_is_a_choice(problems, question: str, answer: str, verifier: str) -> None:
    assert problems({"q": question, "a": answer})[0].verifier == verifier


def test_a_row_may_name_its_verifier(problems) -> None:
    opened = problems({"v": "number"}, {"v": None}, {"v": "number", "choices": ["5", "6"]})
    assert [record.verifier for record in opened] == ["number", "math", "number"]


def test_a_row_names_no_code_but_that_of_its_recipe(problems) -> None:
    rows = [{"v": "spark_vl.verifiers.number:verify_number"}, {"v": "os:system"}, {"v": "number"}]
    opened = problems(*rows, verifier="spark_vl.verifiers.number:verify_number")
    assert [opened[0].verifier, opened[2].verifier] == ["spark_vl.verifiers.number:verify_number", "number"]
    allowed = ", ".join(sorted({*VERIFIERS, "self_judge", "spark_vl.verifiers.number:verify_number"}))
    assert reason(opened, 1).startswith(f"'v' is 'os:system'; allowed: null, {allowed}")
    assert reason(problems(*rows)).endswith(f"allowed: null, {', '.join(sorted({*VERIFIERS, 'self_judge'}))}")


# ── bad and hostile rows ──


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"q": ""}, "'q' is empty"),
        ({"q": " \n"}, "'q' is empty"),
        ({"q": None}, "'q' is null; text is allowed"),
        ({"q": 5}, "'q' is int 5; text is allowed"),
        ({"q": ["?"]}, "'q' is list"),
        ({"q": "\ud800 half of a pair"}, "'q' is not valid Unicode"),
        ({"a": ""}, "'a' is empty"),
        ({"a": None}, "'a' is null"),
        (
            {"a": {}},
            "'a' is a mapping of nothing; a text, a finite number, true, false, a list or a mapping is allowed",
        ),
        ({"a": float("nan")}, "'a' is float nan"),
        ({"a": []}, r"'a' is list \[\]"),
        ({"a": ["\ud800"]}, "'a' is not valid Unicode"),
        ({"a": [float("inf")]}, "'a' is list .* which is not JSON"),
        ({"a": 1, "choices": ["5", "6"]}, "'a' is int 1; text is allowed"),
        ({"a": r"\boxed{}"}, "box is empty or does not close"),
        ({"a": r"\boxed{5"}, "box is empty or does not close"),
        ({"q": "<image> and <image>", "images": []}, "2 placeholders '<image>' for 0 images"),
        ({"q": "<image>?", "images": []}, "1 placeholders '<image>' for 0 images"),
        ({"q": "<image> ", "images": []}, "no words"),
        ({"choices": "A, B"}, "'choices' is 'A, B'; a list of texts"),
        ({"choices": [1, 2]}, r"'choices' is \[1, 2\]; a list of texts"),
        ({"choices": ["5", ""]}, "a list of texts that are not empty"),
        ({"choices": ["5"]}, "'choices' has 1 options; 2 to 26"),
        ({"choices": ["5", "\ud800"]}, "'choices' is not valid Unicode"),
        ({"choices": ["x"] * 27}, "'choices' has 27 options; 2 to 26"),
        ({"choices": ["6", "7"]}, "the answer '5' does not name any option"),
        ({"choices": ["5", "5"]}, "the answer '5' does not name any option"),
        ({"choices": ["B", "A"], "a": "A"}, "the answer 'A' does not name any option"),
        ({"v": "choice", "a": "A or C"}, "the answer 'A or C' does not name any option"),
        ({"v": ""}, "'v' is empty"),
        ({"v": 3}, "'v' is int 3"),
        ({"v": "maths"}, "'v' is 'maths'; allowed: null, choice"),
        ({"v": "os:system"}, "'v' is 'os:system'; allowed: null, choice"),
        ({"images": [None]}, "an image is null"),
        ({"images": [3]}, "an image is int 3"),
        ({"images": [["a.png"]]}, "an image is list"),
        ({"images": {}}, "an image is a mapping of nothing"),
        ({"images": {"bytes": None, "path": None}}, "an image is a mapping of 'bytes': NoneType, 'path': NoneType"),
        (
            {"images": {"bytes": "a text", "path": "a.png"}},
            "an image are the text 'a text', which is not base64",
        ),
        ({"images": ["data:image/svg+xml,<svg/>"]}, "is a data URL without base64, which alone is read"),
        ({"images": ["data:image/png;base64"]}, "is a data URL without base64"),
        ({"images": ["data:image/png;base64,iVBÖ"]}, "is not base64"),
        ({"images": ["iVBORw0KGgo" + "!" * 5000]}, "is not base64"),
        ({"images": ["x" * 5000]}, r"has 5000 characters, and is neither a path nor the base64 of an image \(PNG"),
        ({"images": ["x" * 3000]}, "cannot be followed: File name too long"),
        (
            {"images": [{"url": "https://x.org/a.png"}]},
            "an image is a mapping of 'url': str; allowed are bytes, a",
        ),
        ({"images": ["\udc80.png"]}, "'images' is not valid Unicode"),
        ({"a": [1, None, 2]}, "'a' has null as item 2; nulls are allowed at its end"),
        ({"a": [None]}, r"'a' is list \[\]"),
        ({"choices": ["5", None, "6"]}, "'choices' is .*; a list of texts"),
        ({"images": {"bytes": None, "path": "/etc/hostname"}}, "'/etc/hostname', which is not below the media root"),
        ({"images": ["/etc/hostname"]}, "'/etc/hostname', which is not below the media root"),
        ({"images": ["../mine.yaml"]}, "'../mine.yaml' must be relative"),
        ({"images": ["link.png"]}, "'link.png' leads out of the media root"),
        ({"images": ["http://127.0.0.1:1/a.png"]}, "is a URL"),
        ({"images": ["file:///etc/hostname"]}, "is a URL"),
        ({"images": ["missing.png"]}, "'missing.png' is not a file"),
        ([1], "the line is a JSON list; an object is allowed"),
        (None, "the line is a JSON NoneType"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(problems, tmp_path: Path, row: Any, expected: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to("/etc/hostname")
    opened = problems({}, row, {})
    with pytest.raises(BadRecordError, match=expected) as caught:
        opened[1]
    assert caught.value.record_id == "mine/train/#1"
    assert len(str(caught.value)) < 300
    assert [opened[0].gold, opened[2].gold] == ["5", "5"]  # its neighbours are well


def test_broken_lines_are_bad_rows(tmp_path: Path, recipe_file, pool) -> None:
    (tmp_path / "data").mkdir()
    good = json.dumps(ROW).encode()
    (tmp_path / "data" / "train.jsonl").write_bytes(
        b"\n".join(
            [good, b'{"q": "cut o', b"", b'{"q": "\xff\xfe"}', b"[" * 100_000, b"   ", good]
        )  # no newline at the end
    )
    opened = open_recipe(load_recipe(recipe_file()), "train", TEMPLATER)
    assert len(opened) == 5
    assert [isinstance(row, PromptRecord) for row in check(opened, pool)] == [True, False, False, False, True]
    assert all("not JSON" in reason(opened, index) for index in (1, 2, 3))


def test_a_row_may_leave_out_what_is_optional(problems, tmp_path: Path) -> None:
    """But a column that no row has is a mistake in the recipe, and the first rows may be broken."""
    opened = problems({"n": "x"}, columns=FIELDS["columns"] | {"id": "n"})
    file = tmp_path / "data" / "train.jsonl"
    (tmp_path / "data" / "a.png").write_bytes(png())
    rows = [{"q": "Short?", "a": "5"}, ROW | {"n": "x", "images": ["a.png"]}, {"q": "No answer?"}, {"q": "?", "a": 1}]
    lines(file, [5, *rows])
    opened = open_recipe(opened.recipe, "train", TEMPLATER)
    assert [(opened[i].id, len(opened[i].images)) for i in (1, 2, 4)] == [
        ("mine/train/#1", 0),
        ("mine/train/x", 1),
        ("mine/train/#4", 0),
    ]
    assert reason(opened, 3) == "no column 'a'; the row has 'q'"
    lines(file, [5, rows[0], rows[2]])
    with pytest.raises(ValueError, match="no row has a column choices, images, n, v; the columns are q, a"):
        open_recipe(opened.recipe, "train", TEMPLATER)
    lines(file, [5, "x"])
    assert len(open_recipe(opened.recipe, "train", TEMPLATER)) == 2


def test_ids_are_checked(problems, pool) -> None:
    columns = {"question": "q", "answer": "a", "id": "n"}
    opened = problems(*({"n": n} for n in ("x-1", 7, "x-1", "", None, True, "a\nb", 1.5)), columns=columns)
    assert [opened[0].id, opened[1].id] == ["mine/train/x-1", "mine/train/7"]
    assert opened[4].id == "mine/train/#4"
    for index, expected in ((3, "is empty"), (5, "is bool"), (6, "printable"), (7, "is float")):
        assert expected in reason(opened, index)
    checked = list(check(opened, pool))
    assert [isinstance(row, PromptRecord) for row in checked] == [True] * 3 + [False, True] + [False] * 3
    assert checked[2].id == "mine/train/x-1#2"
    assert checked[3].record_id == "mine/train/#3"


IDS = ["x", "x", "x#1", "7", 7, None, "x", "x#6", "x#6", True, "7#4", "#5", "#12", None]
OWN = ["x", "x#1#1", "x#1", "7", "7#4#4", "#5", "x#6#6", "x#6", "x#6#8", None, "7#4", "#5#11", "#12", "#13"]


def test_rows_that_share_an_id_get_one_of_their_own_in_any_order(problems, caplog) -> None:
    columns = {"question": "q", "answer": "a", "id": "n"}
    opened = problems(*({"n": n} for n in IDS), columns=columns)
    expected = {i: f"mine/train/{name}" for i, name in enumerate(OWN) if name is not None}
    assert len(set(expected.values())) == len(expected)
    assert {i: opened[i].id for i in reversed(expected)} == expected
    assert reason(opened, 9) == "'n' is bool True; text is allowed"
    [said] = caplog.messages
    assert said.startswith("mine/train: 5 of 14 rows have the id of an earlier row")
    assert said.endswith("such as 'x#1#1' in row 1")
    problems(*({"n": n} for n in range(11)), columns=columns)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("rows", [ROW, "not an object", ["nor this"]])
def test_every_source_reads_one_column_of_the_rows_that_can_be_read(tmp_path: Path, rows, monkeypatch) -> None:
    cells = [{"n": "a"}, {"n": "a"}, {"other": 1}, {"n": None}]
    table = [{"n": cell.get("n"), "image": b"not an image"} for cell in cells]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet")
    lines(tmp_path / "t.jsonl", [*cells, rows])
    (tmp_path / "listed_rows.py").write_text(f"def make(split):\n    return {cells!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = ["a", "a", None, None]
    for source, split in (
        (Source("parquet", str(tmp_path)), "t.parquet"),
        (Source("factory", "listed_rows:make"), "t"),
    ):
        assert list(read_column(open_rows(source, split, ("n",))[0], "n")) == expected
    assert list(read_column(open_rows(Source("jsonl", str(tmp_path)), "t.jsonl", ())[0], "n")) == [*expected, None]
    digits = open_rows(Source("factory", "spark_vl.demo.digits:rows"), "validation", ())[0]
    assert list(read_column(digits, "id")) == [digits[i]["id"] for i in range(400)]


def test_rows_out_of_range_are_index_errors(problems) -> None:
    opened = problems({}, {})
    for index in (2, -1):
        with pytest.raises(IndexError):
            opened[index]


def test_check_opens_the_images(problems, tmp_path: Path, pool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.png").write_bytes(png())
    (tmp_path / "data" / "cut.png").write_bytes(png(size=(64, 64))[:60])
    (tmp_path / "data" / "text.png").write_text("hello")
    checked = list(check(problems(*({"images": [f"{name}.png"]} for name in ("good", "cut", "text"))), pool))
    assert isinstance(checked[0], PromptRecord)
    assert "broken image" in checked[1].reason
    assert "not an image in one of the formats" in checked[2].reason


def test_a_bad_row_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRecordError("a/b", "because")))
    assert (error.record_id, error.reason) == ("a/b", "because")


# ── sources ──

IMAGE = datasets.Image()


def test_parquet_shards_are_read_without_decoding(tmp_path: Path, recipe_file) -> None:
    for shard in range(2):
        rows = {"q": [f"row {shard}"], "a": ["1"], "image": [{"bytes": b"not an image", "path": "x.png"}]}
        features = Features({"q": Value("string"), "a": Value("string"), "image": IMAGE})
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"train-{shard}.parquet")
    recipe = load_recipe(recipe_file(source={"parquet": "data"}, splits={"train": "train-*.parquet"}, columns=PLAIN))
    opened = open_recipe(recipe, "train", TEMPLATER)
    assert [record.question for record in opened] == [
        (ImageRef(data=b"not an image"), "row 0"),
        (ImageRef(data=b"not an image"), "row 1"),
    ]


def test_a_parquet_row_that_names_a_readable_file_is_refused(tmp_path: Path, recipe_file, pool) -> None:
    paths = ["/etc/hostname", "../secret.png", "good.png", "link.png"]
    rows = [{"q": "?", "a": "1", "image": {"bytes": None, "path": path}} for path in paths]
    features = Features({"q": Value("string"), "a": Value("string"), "image": IMAGE})
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data" / "good.png").write_bytes(png())
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), tmp_path / "data" / "t.parquet")
    recipe = load_recipe(recipe_file(source={"parquet": "data"}, splits={"train": "t.parquet"}, columns=PLAIN))
    checked = list(check(open_recipe(recipe, "train", TEMPLATER), pool))
    assert isinstance(checked[2], PromptRecord)
    assert [re.split("',? ", error.reason)[1].split(" ")[0] for i, error in enumerate(checked) if i != 2] == [
        "which",
        "must",
        "leads",
    ]


def test_a_folder_of_images_with_metadata(tmp_path: Path, recipe_file) -> None:
    folder = tmp_path / "data" / "training"
    lines(folder / "metadata.jsonl", [{"file_name": "img/a.png", "q": "Color?", "a": "red"}])
    (folder / "img").mkdir()
    (folder / "img" / "a.png").write_bytes(png())
    columns = {"question": "q", "answer": "a", "images": "file_name"}
    recipe = load_recipe(recipe_file(source={"folder": "data"}, splits={"train": "training"}, columns=columns))
    record = open_recipe(recipe, "train", TEMPLATER)[0]
    assert load_image(record.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_a_factory_makes_rows(tmp_path: Path, recipe_file, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text(
        "class Rows(list):\n"
        "    def __getitem__(self, index):\n"
        "        if index == 1:\n"
        "            raise ValueError('row 1 is out')\n"
        "        return {'q': f'{self.split} {index}', 'a': '1', 'image': {'bytes': b'png'}}\n"
        "def make(split):\n"
        "    rows = Rows(range(2))\n"
        "    rows.split = split\n"
        "    return rows\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe(recipe_file(source={"factory": "my_rows:make"}, splits={"train": "easy"}, columns=PLAIN))
    opened = open_recipe(recipe, "train", TEMPLATER)
    assert opened[0].question == (ImageRef(data=b"png"), "easy 0")
    assert reason(opened, 1) == "row 1 is out"


def test_a_first_row_that_cannot_be_made_is_an_error_of_that_row(
    tmp_path: Path, recipe_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_rows.py").write_text(
        "class Rows(list):\n"
        "    def __getitem__(self, index):\n"
        "        if index == 0:\n"
        "            raise ValueError('row 0 is out')\n"
        "        return {'q': 'Easy?', 'a': '1'}\n"
        "def make(split):\n"
        "    return Rows(range(2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe(
        recipe_file(
            source={"factory": "late_rows:make"}, splits={"train": "easy"}, columns={"question": "q", "answer": "a"}
        )
    )
    opened = open_recipe(recipe, "train", TEMPLATER)
    assert reason(opened, 0) == "row 0 is out"


def test_parquet_may_hold_paths_of_images_as_texts(tmp_path: Path, recipe_file) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    table = {"q": ["one", "two", "none"], "a": [1, 2, 3], "image": ["a.png", str(tmp_path / "data" / "a.png"), None]}
    pq.write_table(pa.table(table), tmp_path / "data" / "t.parquet")
    recipe = load_recipe(recipe_file(source={"parquet": "data"}, splits={"train": "t.parquet"}, columns=PLAIN))
    opened = open_recipe(recipe, "train", TEMPLATER)
    ref = ImageRef(path="a.png", root=str(tmp_path / "data"))
    assert [record.question for record in opened] == [(ref, "one"), (ref, "two"), ("none",)]


def test_absolute_paths_of_images_may_be_used_below_the_media_root(problems, tmp_path: Path) -> None:
    """Also where either is called by a link to it; never outside, whatever they look like."""
    for folder in ("pictures/deep", "pictures2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(png())
    (tmp_path / "link").symlink_to("pictures")
    (tmp_path / "pictures" / "out").symlink_to(tmp_path / "pictures2")
    names = ["pictures/deep", "link/deep", "pictures2", "pictures/deep/../../pictures2", "pictures/out", "."]
    rows = [{"images": f"{tmp_path}/{name}/a.png"} for name in names]
    opened = problems(*rows, media_root="pictures")
    assert opened[0].images == (ImageRef(path="deep/a.png", root=str(tmp_path / "pictures")),)
    for index in (1, 2, 5):
        expected = (
            rf"path '{tmp_path}/.*a\.png', which is not below the media root '{tmp_path}/pictures'; set media_root"
        )
        assert re.search(expected, reason(opened, index))
    assert "'..'" in reason(opened, 3)
    assert "leads out of the media root" in reason(opened, 4)
    opened = problems(*rows[:2], media_root="link")
    assert [load_image(record.images[0]).size for record in opened] == [(8, 6)] * 2


CSV = """q,a,images,choices,v,n
"What is shown,
here?",5,a.png,,,x
Which?,B,"[""a.png"", ""a.png""]","[""5 cm"", ""6, or 7""]",,
Box?,"[1, 2, 3, 4]",,,number,07
,1,,,,
"""


def test_a_csv_file_holds_texts_and_lists_as_json(tmp_path: Path, recipe_file) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    file = tmp_path / "data" / "t.csv"
    columns = FIELDS["columns"] | {"id": "n"}
    recipe = load_recipe(recipe_file(source={"csv": "data"}, splits={"train": "t.csv"}, columns=columns))
    for prefix in ("", "\ufeff"):  # which Excel writes
        file.write_text(prefix + CSV, encoding="utf-8")
        opened = open_recipe(recipe, "train", TEMPLATER)
        first, second, third = (opened[i] for i in range(3))
        assert (first.id, first.gold, plain_text(first.question)) == (
            "mine/train/x",
            "5",
            "<image>What is shown,\nhere?",
        )
        assert (second.id, second.gold, second.verifier) == ("mine/train/#1", "B", "choice")
        assert (second.choices, len(second.images)) == (("5 cm", "6, or 7"), 2)
        assert (third.id, third.gold, third.verifier, third.images) == ("mine/train/07", "[1, 2, 3, 4]", "number", ())
        assert reason(opened, 3) == "'q' is null; text is allowed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not a CSV file, with commas .*: Empty CSV"),
        (b"q,a\n1,2\n1,2,3\n", "is not a CSV file, with commas .*: .*Row #3: Expected 2 columns, got 3"),
        (b"q,a\n\xff,2\n", "is not a CSV file, with commas .*: .*invalid UTF8"),
        (b"q,a,q\n1,2,3\n", "two columns have the same name; the columns are q, a, q"),
        (b"q;a\n1;2\n", "no column a, q; the columns are q;a"),
    ],
)
def test_a_file_that_is_no_csv_is_an_error_in_words(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_rows(Source("csv", str(tmp_path)), "t.csv", ("q", "a"))


def test_lists_that_are_texts_of_json_have_the_limits_of_lists(problems) -> None:
    opened = problems({"images": json.dumps(["a.png"] * 257)}, {"choices": '["A", 5]'}, {"choices": "[A"})
    assert reason(opened, 0).startswith("'images' holds 257 images; 256 are allowed")
    assert (
        reason(opened, 1)
        == "'choices' is ['A', 5]; a list of texts that are not empty is allowed, with nulls at its end"
    )
    assert (
        reason(opened, 2) == "'choices' is '[A'; a list of texts that are not empty is allowed, with nulls at its end"
    )


# ── some of the rows ──

KINDS = [{"k": "chart", "n": 1}, {"k": "map", "n": 2}, 5, {"k": "chart", "n": None}, {"n": 1}, {"k": ["chart"], "n": 3}]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"k": "chart"}, [0, 2, 3]),
        ({"k": ["map", "chart"]}, [0, 1, 2, 3]),
        ({"k": "chart", "n": [1, 3]}, [0, 2]),
        ({"n": None}, [2, 3]),
        ({"k": None}, [2, 4]),
        ({"n": 2.0}, [1, 2]),
        ({"n": {"min": 2}}, [1, 2, 5]),
        ({"n": {"min": 1, "max": 2}}, [0, 1, 2, 4]),
        ({"k": {"max": 4}}, [1, 2, 5]),  # characters, or items
        ({"k": "chart", "n": {"max": 9.5}}, [0, 2]),
    ],
)
def test_a_filter_keeps_rows_by_their_values(problems, wanted, rows: list[int]) -> None:
    """A row that cannot be read stays, as a bad row: nobody knows what is in it. Ids count all rows."""
    opened = problems(*KINDS, filter=wanted)
    assert len(opened) == len(rows)
    for place, row in enumerate(rows):
        if row == 2:
            assert reason(opened, place) == "the line is a JSON int; an object is allowed"
        else:
            assert opened[place].id == f"mine/train/#{row}"


def test_a_filter_reads_columns_that_nothing_else_does(tmp_path: Path, recipe_file) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"q": ["x", "y"], "a": [1, 2], "k": [True, False]}), tmp_path / "data" / "t.parquet")
    fields = {"source": {"parquet": "data"}, "splits": {"train": "t.parquet"}, "filter": {"k": False}}
    columns = {"question": "q", "answer": "a"}
    [record] = open_recipe(load_recipe(recipe_file(**fields, columns=columns)), "train", TEMPLATER)
    assert record.id == "mine/train/#1"


def test_a_filter_that_leaves_nothing_says_what_there_is(problems) -> None:
    with pytest.raises(
        ValueError, match=r"^recipe mine: filter: none of 2 rows has in 'k' one of \['graph'\]; found: 'ch"
    ):
        problems(KINDS[0], KINDS[1], filter={"k": "graph"})
    with pytest.raises(ValueError, match=r"none of 2 rows has in 'n' a value in Range\(min=3, max=inf\); found: 1, 2"):
        problems(KINDS[0], KINDS[1], filter={"n": {"min": 3}})
    with pytest.raises(ValueError, match=r"source: no row has a column kind; the columns are q, a"):
        problems(KINDS[0], filter={"kind": "graph"})


def test_pixels_leave_out_rows_that_are_not_bad(problems, tmp_path: Path, pool) -> None:
    """They are looked up when a row is asked for; bad rows, and rows without images, stay."""
    (tmp_path / "data").mkdir()
    for name, size in (("small", (10, 10)), ("wide", (40, 5)), ("large", (50, 50))):
        Image.new("RGB", size).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "broken.png").write_bytes(b"GIF89a")
    rows = [{"images": each} for each in ([], ["small.png"], ["wide.png"], ["wide.png", "large.png"], ["broken.png"])]
    opened = problems(*rows, pixels={"min": 101, "max": 2499})
    assert len(opened) == 5
    found = list(check(opened, pool))
    kinds = [FilteredRowError if isinstance(each, FilteredRowError) else type(each) for each in found]
    assert kinds == [PromptRecord, FilteredRowError, PromptRecord, FilteredRowError, BadRecordError]
    assert "an image has 100 pixels, not in Range(min=101, max=2499)" in str(found[1])
    assert "an image has 2500 pixels" in str(found[3])
    assert problems(*rows, pixels={"min": 100}).fingerprint["pixels"] != opened.fingerprint["pixels"]
    assert [type(each) for each in check(problems(*rows[:4], pixels={"max": 2500}), pool)] == [PromptRecord] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixels": 5}, r"mine\.yaml: pixels: found 5; allowed: a range \{min: 784, max: 1048576\}"),
        ({"pixels": {"least": 5}}, "pixels: found {'least': 5}; allowed: a range"),
        ({"pixels": {"min": True}}, "pixels: found {'min': True}; allowed: a range"),
        ({"pixels": {"min": 5}, "columns": {"question": "q", "answer": "a"}}, "pixels: does not apply, since columns"),
        ({"pixels": {"min": 5}, "columns": {"judgments": "pairwise"}}, "pixels: does not apply"),
    ],
)
def test_pixels_are_a_range(recipe_file, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(**fields))


def test_json_lines_are_not_held_in_memory(tmp_path: Path, recipe_file) -> None:
    lines(tmp_path / "data" / "train.jsonl", [ROW | {"q": f"{n} {'x' * 10_000}"} for n in range(300)])
    rows, root = open_rows(load_recipe(recipe_file()).source, "train.jsonl", ())
    assert len(pickle.dumps(rows)) < 10_000 < os.path.getsize(tmp_path / "data" / "train.jsonl") / 100
    assert root == tmp_path / "data"
    assert [rows[n]["q"].split()[0] for n in (299, 0, 150)] == ["299", "0", "150"]


# ── the shipped recipes, each on a copy of its dataset's repository in its schema ──

TEXT, TEXTS = Value("string"), List(Value("string"))
FIXTURES: dict[str, tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]] = {
    "virl39k": (
        {
            "question": TEXT,
            "answer": TEXT,
            "PassRate_32BTrained": Value("float64"),
            "PassRate_7BBase": Value("float64"),
            "category": TEXT,
            "source": TEXT,
            "qid": TEXT,
            "image": TEXTS,
        },
        {
            "train": [
                {
                    "question": "<image>\nFind x.",
                    "answer": r"\boxed{\frac{1}{2}}",
                    "qid": "Geo-1",
                    "image": ["images/1.png"],
                },
                {
                    "question": "<image>What? (A) 3 (B) 4",
                    "answer": r"\boxed{B}",
                    "qid": "Geo-2",
                    "image": ["images/1.png"],
                },
            ]
        },
    ),
    "geometry3k": (
        {"images": List(IMAGE), "problem": TEXT, "answer": TEXT},
        {
            split: [{"images": [{"bytes": png()}], "problem": "<image>Find x.", "answer": r"3 \sqrt { 2 }"}]
            for split in ("train", "validation", "test")
        },
    ),
    "mmk12": (
        {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": IMAGE},
        {
            "train": [{"id": "1", "question": "As shown <image>, find x.", "answer": "$2$", "image": {"bytes": png()}}],
            "test": [{"id": "2", "question": "<image>Which?\nA. 1\nB. 2", "answer": "B", "image": {"bytes": png()}}],
        },
    ),
    "mathvision": (
        {
            "id": TEXT,
            "question": TEXT,
            "options": TEXTS,
            "image": TEXT,
            "decoded_image": IMAGE,
            "answer": TEXT,
            "level": Value("int64"),
            "subject": TEXT,
        },
        {
            split: [
                {
                    "id": "4",
                    "question": "Which figure is cut?\n<image1>",
                    "options": ["A", "B", "C", "D", "E"],
                    "decoded_image": {"bytes": png()},
                    "answer": "E",
                },
                {
                    "id": "5",
                    "question": "<image1>\nHow many?",
                    "options": [],
                    "decoded_image": {"bytes": png()},
                    "answer": "7",
                },
            ]
            for split in ("testmini", "test")
        },
    ),
    "logicvista": (
        {"question": TEXT, "answer": TEXT, "reasoning": TEXT, "image": IMAGE},
        {
            "test": [
                {"question": "Which comes next? Options: A, B, C, D.", "answer": "C", "image": {"bytes": png()}},
                {"question": "Which two fit? Options: A, B, C, D.", "answer": "A, C", "image": {"bytes": png()}},
            ]
        },
    ),
    "gsm8k": (
        {"question": TEXT, "answer": TEXT},
        {
            split: [
                {"question": "Tom has 3 bags of 4 apples. How many?", "answer": "3*4=<<3*4=12>>12 apples.\n#### 12"},
                {"question": "What do 5 cost at $250 each?", "answer": "5 * $250 = $<<5*250=1250>>1,250\n#### 1,250"},
                {"question": "It was 3 degrees and fell by 8. What now?", "answer": "#### is a mark. 3-8=-5\n#### -5"},
            ]
            for split in ("train", "test")
        },
    ),
}


@pytest.fixture
def repository(tmp_path: Path):
    """Writes a copy of a dataset's repository, and returns the recipe of the dataset that reads the copy."""

    def written(name: str):
        columns, splits = FIXTURES[name]
        for split, rows in splits.items():
            table = {column: [row.get(column) for row in rows] for column in columns}
            file = tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(table, features=Features(columns)).to_parquet(file)
        media = {}
        if name == "virl39k":
            (tmp_path / "images").mkdir()
            (tmp_path / "images" / "1.png").write_bytes(png())
            media = {"media_root": str(tmp_path)}
        return load_recipe(name, source={"hub": {"id": str(tmp_path / "repo")}}, **media)

    return written


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_shipped_recipe_reads_its_schema(name: str, repository, pool) -> None:
    recipe = repository(name)
    assert sorted(recipe.splits.values()) == sorted(FIXTURES[name][1])
    for split, source_split in recipe.splits.items():
        opened = open_recipe(recipe, split, TEMPLATER)
        assert len(opened) == len(FIXTURES[name][1][source_split])
        for row in check(opened, pool):
            assert isinstance(row, PromptRecord), row
            check_gold(row)  # its verifier gives its own gold full marks,
            assert run_verifier(r"\boxed{no such answer}", row).score == 0  # and nothing to another
            assert row.id.startswith(f"{name}/{split}/")
            assert len(row.images) == (recipe.columns.images is not None)
            assert "<image1>" not in plain_text(row.question)


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        (
            "virl39k",
            "train",
            [(r"\frac{1}{2}", "math", "<image>\nFind x."), ("B", "choice", "<image>What? (A) 3 (B) 4")],
        ),
        ("geometry3k", "validation", [(r"3 \sqrt { 2 }", "math", "<image>Find x.")]),
        ("mmk12", "train", [("$2$", "math", "As shown <image>, find x.")]),
        ("mmk12", "test", [("B", "choice", "<image>Which?\nA. 1\nB. 2")]),
        (
            "mathvision",
            "validation",
            [("E", "choice", "Which figure is cut?\n<image>"), ("7", "math", "<image>\nHow many?")],
        ),
        (
            "logicvista",
            "test",
            [
                ("C", "choice", "<image>Which comes next? Options: A, B, C, D."),
                ("A, C", "choice", "<image>Which two fit? Options: A, B, C, D."),
            ],
        ),
        (
            "gsm8k",
            "test",
            [
                ("12", "number", "Tom has 3 bags of 4 apples. How many?"),
                ("1,250", "number", "What do 5 cost at $250 each?"),
                ("-5", "number", "It was 3 degrees and fell by 8. What now?"),
            ],
        ),
    ],
)
def test_rows_of_shipped_recipes(name: str, split: str, expected: list[tuple[str, str, str]], repository, pool) -> None:
    checked = check(open_recipe(repository(name), split, TEMPLATER), pool)
    found = [(r.gold, r.verifier, plain_text(r.question)) for r in checked if isinstance(r, PromptRecord)]
    assert found == expected


def test_image_paths_without_a_media_root_are_told_at_once(repository) -> None:
    recipe = load_recipe("virl39k", source={"hub": {"id": repository("virl39k").source.location}})
    with pytest.raises(ValueError, match="recipe virl39k: media_root: is missing, and the column 'image' holds paths"):
        open_recipe(recipe, "train", TEMPLATER)


@pytest.mark.parametrize("solution", ["It is 5.", "It is 5 #### ", ["#### 5", 5]])
def test_a_solution_without_its_mark_is_bad(problems, solution) -> None:
    opened = problems({"a": solution}, {"a": "4 + 1 #### \\boxed{5}"}, answer_after="####")
    if isinstance(solution, list):  # as JSON, the mark stands in it: what is behind is no number
        assert opened[0].gold == '5", 5]'
    else:
        assert "nothing stands behind '####' in the answer" in reason(opened)
    assert opened[1].gold == "5"


def test_an_unknown_split_of_a_hub_dataset_is_named(repository) -> None:
    recipe = load_recipe(
        "mmk12", source={"hub": {"id": repository("mmk12").source.location}}, splits={"train": "training"}
    )
    with pytest.raises(ValueError, match=r"recipe mmk12: source: .*training"):
        open_recipe(recipe, "train", TEMPLATER)


def test_digits_run_out_of_the_box() -> None:
    for split in load_recipe("digits").splits:
        opened = open_recipe(load_recipe("digits"), split, TEMPLATER)
        for index in range(0, len(opened), len(opened) // 20):
            record = opened[index]
            assert load_image(record.images[0]).size == (56, 56)
            check_gold(record)


def test_every_shipped_recipe_is_exercised_here() -> None:
    # judgments: tests/test_judgments.py; the released training sets: tests/test_spark_data.py; DAPO: tests/test_dapo.py
    # The schemas of benchmarks, some of which are above, too: tests/test_benchmarks.py
    elsewhere = {"judgments", "spark_virl_19k", "spark_virl_hard_24k", "dapo_math_17k"}
    assert recipes() == sorted({*FIXTURES, "digits", *elsewhere, *SCHEMAS})
    for name in recipes():
        recipe = load_recipe(usage(name))
        assert recipe.name == (name if name != "judgments" else "judgments-pairwise")
        assert recipe.source.type in ("hub", "factory")  # no path of ours
        assert recipe.license


ODD_DATA_FILES = [
    None,
    [],
    5,
    [5],
    {"train": 5},
    [{"split": 5, "path": "a.jsonl"}],
    [{"split": "train", "path": "**a"}],
]
ODD_CARDS = [
    "configs: 5",
    "configs: [5]",
    "configs: [{config_name: 5}]",
    "configs: [{config_name: a, data_dir: /etc}]",
    "[",
]


@pytest.fixture
def odd_repository(tmp_path) -> Path:
    """A local copy of a dataset's repository, beside a private file."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "private.jsonl").write_text('{"a": 2}\n')
    return tmp_path / "repo"


def opened_with(repository: Path, card: str):
    (repository / "README.md").write_text(f"---\n{card}\n---\n")
    return open_rows(Source("hub", str(repository)), "train", ["a"])[0]


@pytest.mark.parametrize("data_files", ODD_DATA_FILES, ids=str)
def test_odd_data_files_are_said_to_be(odd_repository, data_files):
    with pytest.raises((ValueError, OSError)):
        opened_with(odd_repository, yaml.safe_dump({"configs": [{"config_name": "default", "data_files": data_files}]}))


@pytest.mark.parametrize("card", ODD_CARDS)
def test_odd_cards_are_said_to_be(odd_repository, card):
    with pytest.raises((ValueError, OSError)):
        opened_with(odd_repository, card)


@pytest.mark.parametrize(
    "path",
    [
        "file://{private}",
        "local://{private}",
        "{private}",
        "../private.jsonl",
        "link.jsonl",
        "dir://private.jsonl::{up}",
    ],
)
def test_a_dataset_reads_only_files_of_its_own_repository(odd_repository, path):
    private = odd_repository.parent / "private.jsonl"
    (odd_repository / "link.jsonl").symlink_to(private)
    path = path.format(private=private, up=odd_repository.parent)
    card = "configs: [{{config_name: default, data_files: [{{split: train, path: '{}'}}]}}]"
    assert list(read_column(opened_with(odd_repository, card.format("a.jsonl")), "a")) == [1]
    with pytest.raises((ValueError, OSError), match=r"data_files in its README\.md: found .*; allowed: files of"):
        opened_with(odd_repository, card.format(path))


def test_a_snapshot_in_the_cache_of_the_hub_is_a_repository(odd_repository):
    snapshot = odd_repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (odd_repository / "blobs").mkdir()
    (odd_repository / "a.jsonl").rename(odd_repository / "blobs" / "1")
    (snapshot / "a.jsonl").symlink_to("../../blobs/1")
    rows, _ = open_rows(Source("hub", str(snapshot)), "train", ["a"])
    assert rows[0] == {"a": 1}


@pytest.mark.parametrize("type", ["jsonl", "parquet"])
@pytest.mark.parametrize("pattern", ["/etc/*", "**a", ""])
def test_odd_patterns_are_said_to_be(tmp_path, type, pattern):
    with pytest.raises(ValueError, match=r"allowed: a file or a pattern below|no file"):
        open_rows(Source(type, str(tmp_path)), pattern, ["a"])
