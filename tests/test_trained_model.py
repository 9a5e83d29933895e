"""A model that a run has trained is found, and evaluated within the limits of the run, wherever it is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from spark_vl import cli
from spark_vl.config import ConfigError
from spark_vl.run.jsonl import read_lines
from spark_vl.run.paths import TRAINING_FILE, model_folder
from spark_vl.run.trained import saved_limits


def test_a_model_is_found_in_the_folders_of_a_run(finished_run):
    model = str(finished_run / "model")
    checkpoint = finished_run / "checkpoints" / "step-000004"
    (finished_run / "checkpoints" / "best").write_text("step-000004")
    found = [model_folder(str(path)) for path in (finished_run, model, checkpoint, checkpoint.parent / "best")]
    (checkpoint.parent / "best").unlink()
    assert found == [model, model, str(checkpoint / "model"), str(checkpoint / "model")]
    assert model_folder("ORG/a-model") == "ORG/a-model"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "{} has no weights (*.safetensors)"),
        ("model.safetensors", "{} holds no model: there is no config.json in it or in its model/"),
    ],
)
def test_a_folder_without_a_model_is_named(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=re.escape("model.path: " + message.format(tmp_path))):
        model_folder(str(tmp_path))


def evaluate(run: Path, output: Path, *settings: str) -> tuple[dict, dict]:
    """The results of `spark-vl eval`, and its resolved configuration."""
    cli.main(["eval", *settings, f"--model.path={run}", f"--output={output}"])
    return json.loads((output / "results.json").read_text()), yaml.safe_load((output / "config.yaml").read_text())


def finish_reasons(folder: Path) -> set[str]:
    return {
        completion["finish_reason"]
        for line in read_lines(folder / "samples.jsonl")
        for groups in line["groups"].values()
        for group in groups
        for completion in group["completions"]
    }


def test_an_evaluation_under_the_settings_of_a_run_gives_its_figures(finished_run, tmp_path, capsys):
    """Of the model that it has trained, which nobody has to name."""
    cli.main(["eval", f"--config={finished_run / 'config.yaml'}", f"--output={tmp_path / 'out'}"])
    assert f"evaluates {finished_run / 'model'}\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    asked = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    expected = read_lines(finished_run / "evaluations.jsonl")[-1]["results"]
    assert {name: results[name] for name in expected} == expected
    run = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert asked["max_prompt_tokens"] == run["data"]["max_prompt_tokens"] != 8192
    assert asked["model"] == run["model"] | {"path": str(finished_run / "model")}
    assert all(asked[group] == run[group] for group in ("rollout", "evaluation", "prompts", "verifier"))


def test_the_folder_of_a_run_brings_its_limits_and_options_go_first(finished_run, tmp_path):
    few = ("--evaluation.recipes=[digits]", "--evaluation.problems=1", "--evaluation.samples=1")
    results, asked = evaluate(finished_run, tmp_path / "out", *few, "--rollout.max_new_tokens=3")
    assert (asked["max_prompt_tokens"], asked["model"]["dtype"]) == (512, "float32")
    assert asked["rollout"]["max_new_tokens"] == 3
    assert finish_reasons(tmp_path / "out") == {"length"}
    with pytest.raises(SystemExit, match="2"):
        evaluate(finished_run, tmp_path / "out", *few)  # under other settings: of the run, 24 new tokens
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    _, asked = evaluate(finished_run, tmp_path / "out", *few, "--evaluation.max_new_tokens=2", "--overwrite")
    assert asked["rollout"]["max_new_tokens"] == 24
    assert finish_reasons(tmp_path / "out") == {"length"}


@pytest.mark.parametrize("text", ['{"limits": {"model.path": "other"}}', '{"limits": 3}', "[", "7"])
def test_limits_that_no_run_has_saved_are_refused(tmp_path, text):
    (tmp_path / TRAINING_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"model.path: .*{TRAINING_FILE}: "):
        saved_limits(str(tmp_path), None)
