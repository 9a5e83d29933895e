"""The checkpoint with the highest figure is kept, whatever comes after it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from spark_vl.checkpoint import BestFigure
from spark_vl.config import ConfigError
from spark_vl.setup import load_trainer
from tests.test_trainer import SMALL, make_config

FIGURES = [0.35, 0.3, 0.5, 0.4, 0.5, 0.45, 0.6]
"""What the evaluation finds after each step, beginning with the untrained model."""
BEST = ["", "", "", "step-000002", "step-000002", "step-000002", "step-000002"]
"""What `checkpoints/best` names by then; step 1 is worse than no training, and step 4 no better than step 2."""
KEEP = (
    *SMALL,
    "--evaluation.recipes=[digits]",
    "--evaluation.every=1",
    "--checkpoint.keep_best=figure",
    "--checkpoint.save_total_limit=1",
)


def run(folder: Path, *overrides: str, stop_at: int | None = None, resume: str = "none") -> list[tuple[str, list[str]]]:
    """Train. Returns, for each evaluation, what `best` names and which checkpoints there are."""
    seen = []

    def evaluate(*args, **kwargs):
        seen.append((best(folder), saved(folder)))
        if trainer.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        value = FIGURES[trainer.step]
        return {"figure": {"value": value, "low": 0.0, "high": 1.0, "n": 9}, "other": {"value": 1 - value}}

    trainer = load_trainer(make_config(folder, *KEEP, *overrides), evaluate=evaluate, resume=resume)
    trainer.train()
    return seen


def best(folder: Path) -> str:
    pointer = folder / "checkpoints" / "best"
    return pointer.read_text() if pointer.exists() else ""


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_the_best_one_is_saved_out_of_turn_and_survives(tmp_path):
    seen = run(tmp_path, "--checkpoint.every=4")
    assert [name for name, _ in seen] == BEST
    second, fourth = "step-000002", "step-000004"
    assert [names for _, names in seen] == [[], [], [], [second], [second], [second, fourth], [second, fourth]]
    assert best(tmp_path) == "step-000006"
    assert saved(tmp_path) == ["step-000006"]  # the limit holds for what is neither the best nor the latest


def test_a_resumed_run_knows_the_best_one(tmp_path):
    before = run(tmp_path, "--checkpoint.every=0", stop_at=4)
    assert saved(tmp_path) == ["step-000002", "step-000004"]  # the best one, and where it was stopped
    after = run(tmp_path, "--checkpoint.every=0", resume="auto")
    assert [name for name, _ in before + after] == BEST
    assert best(tmp_path) == "step-000006"


def test_a_run_that_goes_back_points_to_what_was_the_best_then(tmp_path, monkeypatch):
    limit = "--checkpoint.save_total_limit=9"
    run(tmp_path, "--checkpoint.every=1", limit)
    assert best(tmp_path) == "step-000006"
    # This time the steps after 4 are worse: none of them is the best, whatever lies there from the first time.
    monkeypatch.setattr("tests.test_keep_best.FIGURES", [*FIGURES[:5], 0.1, 0.2])
    checkpoint = tmp_path / "checkpoints" / "step-000004"
    trainer = load_trainer(make_config(tmp_path, *KEEP, "--checkpoint.every=1", limit), resume=str(checkpoint))
    assert best(tmp_path) == "step-000002"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000004"
    trainer.session.__enter__()
    trainer.session.__exit__(None, None, None)  # lets go of the folder
    seen = run(tmp_path, "--checkpoint.every=1", limit, resume=str(checkpoint))
    assert {name for name, _ in seen} == {"step-000002"}
    assert best(tmp_path) == "step-000002"


def test_a_best_one_that_is_gone_is_not_named(tmp_path):
    run(tmp_path, "--checkpoint.every=1", "--checkpoint.save_total_limit=3")
    assert saved(tmp_path) == ["step-000004", "step-000005", "step-000006"]  # 2 was the best until 6 was
    load_trainer(make_config(tmp_path, *KEEP), resume=str(tmp_path / "checkpoints" / "step-000004"))
    assert best(tmp_path) == ""


def test_the_best_of_another_figure_says_nothing(tmp_path):
    run(tmp_path, "--checkpoint.every=1")
    trainer = load_trainer(make_config(tmp_path, *KEEP, "--checkpoint.keep_best=other"), resume="auto")
    assert best(tmp_path) == ""
    assert trainer.best.update(7, {"other": {"value": 0.1}})


def test_a_checkpoint_of_another_run_brings_no_best_one(tmp_path):
    run(tmp_path / "one", "--checkpoint.every=1")
    run(tmp_path / "two", "--checkpoint.every=1")
    elsewhere = tmp_path / "one" / "checkpoints" / "step-000006"
    load_trainer(make_config(tmp_path / "two", *KEEP), resume=str(elsewhere))
    assert best(tmp_path / "two") == ""


def test_what_an_earlier_start_left_behind_is_deleted_first(tmp_path):
    run(tmp_path, "--checkpoint.every=1", "--checkpoint.save_total_limit=9", "--checkpoint.keep_best=null")
    overrides = ("--checkpoint.every=1", "--checkpoint.save_total_limit=2", "--checkpoint.keep_best=null")
    run(tmp_path, *overrides, stop_at=4, resume=str(tmp_path / "checkpoints" / "step-000002"))
    assert saved(tmp_path) == ["step-000003", "step-000004"]


def test_a_figure_that_later_evaluations_lack_stops_nothing():
    best = BestFigure("pointwise_own")
    assert not best.update(0, {"pointwise_own": {"value": 0.5}})
    assert not best.update(1, {"other": {"value": 0.9}})
    assert best.update(2, {"pointwise_own": {"value": 0.6}})


def test_an_unknown_figure_fails_at_the_first_evaluation(tmp_path):
    with pytest.raises(
        ConfigError, match=r"checkpoint\.keep_best: there is no figure 'accuracy'; there are figure, other"
    ):
        run(tmp_path, "--checkpoint.keep_best=accuracy")
    assert not (tmp_path / "metrics.jsonl").exists(), "it trained before it looked"
