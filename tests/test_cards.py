"""The model card: valid metadata, only the run's own numbers, a snippet that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from spark_vl import cli
from spark_vl.data.images import load_image
from spark_vl.hub.cards import write_model_card
from tests.conftest import make_image
from tests.test_trainer import make_config, metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run, evaluated, through the command's own function."""
    folder = tmp_path_factory.mktemp("card") / "run"
    config = make_config(folder, "--steps=2", "--evaluation.recipes=[digits]", "--evaluation.problems=6")
    cli.train(config, "none")
    return folder


def test_metadata_is_what_the_hub_reads(run):
    data = ModelCard.load(run / "model" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.base_model is None, "the tiny checkpoint is a folder, no model of the Hub"
    assert data.datasets is None


def test_a_base_model_and_datasets_of_the_hub_are_named(run):
    config = run / "config.yaml"
    original = config.read_text()
    config.write_text(yaml.safe_dump(yaml.safe_load(original) | {"model": {"path": "Qwen/Qwen2.5-VL-7B-Instruct"}}))
    try:
        data = ModelCard.load(write_model_card(run)).data
    finally:
        config.write_text(original)
        write_model_card(run)
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen2.5-VL-7B-Instruct", "finetune")


def test_every_number_of_the_evaluation_is_the_runs_own(run):
    card = (run / "model" / "README.md").read_text()
    summary = yaml.safe_load((run / "summary.json").read_text())
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card, flags=re.MULTILINE))
    assert rows.keys() == summary["after"].keys()
    for name, row in rows.items():
        n, before, after = row.split(" | ")
        assert int(n) == summary["n"][name]
        assert float(before.split(" ")[0]) == pytest.approx(100 * summary["before"][name], abs=0.051)
        assert float(after.split(" ")[0]) == pytest.approx(100 * summary["after"][name], abs=0.051)
    lines = metrics(run)
    names = ("pointwise_correct", "pointwise_incorrect", "pairwise")
    judge = round(sum(line[f"recycle/{name}"] for line in lines for name in names))
    assert f"2 steps; {judge} judge prompts" in card
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1]) == yaml.safe_load(
        (run / "config.yaml").read_text()
    )
    assert "`digits`: CC-BY-4.0" in card


def test_the_snippet_runs(run, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (run / "model" / "README.md").read_text(), flags=re.DOTALL)
    load_image(make_image(1)).save(tmp_path / "picture.png")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
