"""The released training sets, read from a Hub on the loopback in the form in which they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_vl.data.recipes import load_recipe
from spark_vl.data.spark_data import SparkRows
from tests.conftest import make_image
from tests.hub.server import File

ASKS = "\nPlease first conduct reasoning, then answer."


def chat(*parts, role="user") -> str:
    return json.dumps([{"role": role, "content": list(parts)}])


def image(path: str) -> dict:
    return {"type": "image", "image": path, "max_pixels": 1048576}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


ROWS = [
    {"message": chat(image("/theirs/ViRL39K/images/a-1.png"), text("Find x." + ASKS)), "answer": "$\\frac{1}{2}$"},
    {"message": chat(text("How many? " + ASKS)), "answer": "\\boxed{7}"},
    {"message": chat(image("/theirs/images/b.png"), text("Which?\nA. 3\nB. 4" + ASKS)), "answer": "B"},
]


def test_rows():
    rows = SparkRows(ROWS)
    assert len(rows) == 3
    assert rows[0] == {"question": "<image>Find x.", "images": ["images/a-1.png"], "answer": "$\\frac{1}{2}$"}
    assert rows[1] == {"question": "How many? ", "images": [], "answer": "\\boxed{7}"}


@pytest.mark.parametrize(
    "row",
    [
        {"message": "no JSON", "answer": "1"},
        {"message": chat(text("a")).replace("]", "", 1), "answer": "1"},
        {"message": json.dumps([]), "answer": "1"},
        {"message": chat(text("a"))},
        {"message": chat({"type": "text"}), "answer": "1"},
        {"message": chat(image("/elsewhere/a.png")), "answer": "1"},
        {"message": "[" * 100_000, "answer": "1"},
        "text",
        None,
    ],
)
def test_a_row_of_another_form_is_an_error_of_that_row(row):
    with pytest.raises(ValueError, match="not a chat of one turn"):
        SparkRows([ROWS[0], row])[1]


@pytest.mark.parametrize("name", ["spark_virl_19k", "spark_virl_hard_24k"])
def test_recipes(hub, spark_vl, tmp_path: Path, name: str):
    file = load_recipe(name).splits["train"]
    hub.create("dataset", "internlm/Spark-Data").commit("data", {file: File(json.dumps(ROWS).encode(), lfs=True)})
    (tmp_path / "virl" / "images").mkdir(parents=True)
    for picture in ("a-1.png", "b.png"):
        (tmp_path / "virl" / "images" / picture).write_bytes(make_image(1).data)
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{{base: {name}, media_root: virl}}")
    checked = spark_vl("recipes", mine, "--show=3")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    said = checked.stdout
    assert said.endswith("3 of 3 rows can be used (license of the data: CC-BY-NC-4.0)\n")
    assert "Please first" not in said
    assert "Find x." in said
    without = spark_vl("recipes", name)
    assert without.returncode != 0
    assert "media_root: is missing" in without.stdout + without.stderr


def test_a_file_that_is_not_there_is_named(hub, spark_vl, tmp_path: Path):
    said = spark_vl("recipes", "spark_virl_19k", imported={"HF_HOME": str(tmp_path)})
    assert said.returncode != 0
    assert "infer_data_ViRL_19k_h.json of the dataset internlm/Spark-Data" in said.stdout + said.stderr
