"""A run that resumes with other data says which, and goes on only where it is told to."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from spark_vl.checkpoint import CheckpointError
from spark_vl.data.problems import ProblemSet, data_changes, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.prompts import Templater
from spark_vl.setup import load_trainer
from tests.conftest import make_image
from tests.test_trainer import make_config

ROWS = [{"q": f"What is {a}+{b}?", "a": str(a + b)} for a in range(1, 5) for b in range(1, 5)]
OTHER = [row | {"a": row["a"] + "0"} for row in ROWS]
FIELDS = {"description": "d", "license": "mit", "columns": {"question": "q", "answer": "a"}, "verifier": "number"}


def write_recipe(folder: Path, name: str, rows: list[dict], **fields) -> Path:
    """A recipe of JSON lines."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = FIELDS | {"name": name, "source": {"jsonl": "."}, "splits": {"train": f"{name}.jsonl"}} | fields
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `data/one.yaml`, and with a run of two steps on it, which does not change."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "data", "one", ROWS)
    load_trainer(configured(folder / "run", recipe)).train()
    return folder


@pytest.fixture
def data(trained, tmp_path) -> Path:
    """The folder of the recipes, as the run found them; `tmp_path / "run"` is a copy of the run."""
    shutil.copytree(trained / "run", tmp_path / "run")
    write_recipe(trained / "data", "one", ROWS)
    return trained / "data"


def configured(run: Path, *recipes: Path, steps: int = 2, **settings):
    listed = f"--data.recipes=[{','.join(map(str, recipes))}]"
    others = (f"--{name}={value}" for name, value in settings.items())
    return make_config(run, f"--steps={steps}", listed, "--logging.judgments=false", *others)


CHANGES = {
    "a-row-more": (lambda d: [write_recipe(d, "one", [*ROWS, ROWS[0]])], "one: 16 rows → 17 rows"),
    "other-rows": (lambda d: [write_recipe(d, "one", OTHER)], "one: as many rows as before, with other content"),
    "a-recipe-more": (lambda d: [d / "one.yaml", write_recipe(d, "two", OTHER)], "two: is new"),
    "another-recipe": (lambda d: [write_recipe(d, "two", ROWS)], "one: is gone; two: is new"),
    "another-verifier": (
        lambda d: [write_recipe(d, "one", ROWS, verifier="text")],
        "one: verifier: 'number' → 'text'",
    ),
    "another-column": (
        lambda d: [write_recipe(d, "one", ROWS, columns={"question": "a", "answer": "a"})],
        r"one: columns: .*'question': 'q'.* → .*'question': 'a'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_named_and_gone_on_with_where_that_is_allowed(data, tmp_path, capsys, change):
    changed, named = CHANGES[change]
    recipes = changed(data)
    config = configured(tmp_path / "run", *recipes)
    same_names = recipes == [data / "one.yaml"]  # else the setting has changed, too, and is named first
    with pytest.raises(CheckpointError, match=named if same_names else r"data\.recipes") as caught:
        load_trainer(config, resume="auto")
    assert "--allow-config-change" in str(caught.value)
    del caught  # its frames hold the run's folder
    trainer = load_trainer(config, resume="auto", allow_config_change=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other data than before: ")]
    assert len(said) == 1
    assert re.search(named, said[0])
    assert "the epoch that was under way begins again" in said[0]
    assert trainer.feed.sampler.state_dict()["position"] == 0
    noted = [json.loads(line) for line in (tmp_path / "run" / "environment.jsonl").read_text().splitlines()]
    assert any(re.search(named.split("; ")[0], change) for change in noted[-1]["changed"])


def test_a_run_goes_on_with_other_data_and_they_are_its_own_from_then_on(data, tmp_path):
    recipe = write_recipe(data, "one", OTHER)
    config = configured(tmp_path / "run", recipe, steps=4)
    trainer = load_trainer(config, resume="auto", allow_config_change=True)
    trainer.train()
    assert trainer.step == 4
    assert trainer.feed.sampler.epoch == 0.5  # two steps with the new rows
    assert load_trainer(config, resume="auto").checkpoints.data_changes == []


def test_the_same_data_elsewhere_are_the_same(data, tmp_path):
    moved = write_recipe(tmp_path / "moved", "one", ROWS, description="another", license="another")
    trainer = load_trainer(configured(tmp_path / "run", moved), resume="auto", allow_config_change=True)
    assert trainer.checkpoints.data_changes == []
    assert trainer.feed.sampler.epoch == 0.5


def test_another_seed_shuffles_anew(data, tmp_path):
    config = configured(tmp_path / "run", data / "one.yaml", seed=5)
    with pytest.raises(CheckpointError, match=r"seed: 0 → 5.*--allow-config-change"):
        load_trainer(config, resume="auto")
    trainer = load_trainer(config, resume="auto", allow_config_change=True)
    assert trainer.feed.sampler.state_dict() == {"seed": 5, "rows": 16, "epoch": 0, "position": 0}


def test_prompts_that_wait_for_a_recipe_that_is_gone_are_left_out(data, tmp_path):
    own = write_recipe(data, "own", ROWS, verifier="tests.misbehaving:half_a_character")
    trainer = load_trainer(configured(tmp_path / "other", own))
    trainer.train()
    waiting = [record for each in trainer.feed.state_dict()["waiting"] for record in each["records"]]
    assert any(record["verifier"].startswith("tests.") for record in waiting), "the test tests nothing"
    config = configured(tmp_path / "other", data / "one.yaml")
    trainer = load_trainer(config, resume="auto", allow_config_change=True)
    assert trainer.checkpoints.data_changes == ["own: is gone", "one: is new"]
    assert trainer.feed.state_dict()["waiting"] == []


def test_a_checkpoint_without_fingerprints_is_resumed_from(data, tmp_path):
    trainer = load_trainer(configured(tmp_path / "run", data / "one.yaml"), resume="auto")
    state = trainer.feed.state_dict()
    assert trainer.feed.changes_since(state) == []
    del state["data"]
    assert trainer.feed.changes_since(state) == []


# ── fingerprints ──


def of(recipe: Path) -> ProblemSet:
    return open_recipe(load_recipe(recipe), "train", Templater.load())


def parquet(folder: Path, rows: list[dict]) -> ProblemSet:
    file = folder / f"{len(list(folder.iterdir()))}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=700)
    columns = {"question": "q", "answer": "a", "images": "i"}
    source = {"source": {"parquet": "."}, "splits": {"train": file.name}, "columns": columns}
    return of(write_recipe(folder, "r", [], **source))


def test_the_fingerprint_of_a_table_is_that_of_its_content(tmp_path):
    image = make_image(1).data
    rows = [row | {"i": [{"bytes": image, "path": None}], "other": 1} for row in ROWS * 100]
    first = parquet(tmp_path, rows).fingerprint
    assert parquet(tmp_path, [row | {"other": 2} for row in rows]).fingerprint == first, "a column that is not read"
    changes = {
        "text": {"q": "What?"},
        "no-image": {"i": []},
        "another-size": {"i": [{"bytes": image + b"0", "path": None}]},
        "a-path": {"i": [{"bytes": None, "path": "a.png"}]},
    }
    for place in (0, 999, 1000, 1599):
        for change in changes.values():
            changed = list(rows)
            changed[place] = rows[place] | change
            assert parquet(tmp_path, changed).fingerprint != first, (place, change)
    swapped = [*rows[:5], rows[6], rows[5], *rows[7:]]
    assert parquet(tmp_path, swapped).fingerprint != first


def test_the_fingerprint_of_a_factory_reads_a_list_and_samples_what_is_slow(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, rows):
            self.rows, self.made = rows, 0

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            self.made += 1
            if index == 0:
                raise ValueError("cannot be made")
            return self.rows[index] | {"picture": object()}

    def made(rows) -> ProblemSet:
        module = types.ModuleType("somebodys_rows")
        module.make = lambda split: rows
        monkeypatch.setitem(sys.modules, "somebodys_rows", module)
        fields = {"source": {"factory": "somebodys_rows:make"}, "splits": {"train": "x"}}
        fields["columns"] = {"question": "q", "answer": "a", "verifier": "picture"}
        return of(write_recipe(tmp_path, "r", [], **fields))

    many = [row | {"picture": None} for row in ROWS * 100]
    first = made(many).fingerprint
    assert made(list(many)).fingerprint == first
    changed = list(many)
    changed[777] = changed[777] | {"a": "0"}
    assert made(changed).fingerprint != first
    slow = Slow(many)
    opened = made(slow)
    slow.made = 0
    first = opened.fingerprint
    assert slow.made <= 64
    assert made(Slow(many)).fingerprint == first, "rows that are made anew are the same rows"
    assert made(Slow([row | {"a": "0"} for row in many])).fingerprint != first


def test_changes_name_the_recipe_and_nothing_else_is_one():
    one = {"recipe": "one", "rows": 3, "digest": "x", "verifier": "math"}
    two = one | {"recipe": "two"}
    assert data_changes([one, two], [one, two]) == []
    assert data_changes([one, two], [two, one]) == ["the order of the recipes: one, two → two, one"]
    assert data_changes([one], [one | {"verifier": "text", "digest": "y"}]) == [
        "one: as many rows as before, with other content",
        "one: verifier: 'math' → 'text'",
    ]
    assert data_changes([one], [one | {"a field of a later version": 1}]) == []
