"""The table, the summary file and the picture of a run, from files such as a run writes."""

from __future__ import annotations

import io
import json
from math import exp

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from spark_vl.config import ConfigError
from spark_vl.evaluation.figures import estimate
from spark_vl.evaluation.tables import print_results
from spark_vl.report import (
    LABELS,
    _smoothed,
    check_figure,
    plot_curves,
    print_files,
    print_summary,
    summarize,
)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """A run of 60 steps, evaluated three times on 200 problems."""
    results = {
        step: {name: estimate(0.0 if name == "unusable" else value, 200) for name in LABELS}
        for step, value in ((0, 0.405), (30, 0.7), (60, 0.93))
    }
    write_lines(tmp_path / "evaluations.jsonl", [{"step": s, "results": r} for s, r in results.items()])
    rewards = [0.9 - 0.5 * exp(-step / 20) for step in range(1, 61)]
    metrics = [{"step": i, "problem/reward": r, "pairwise/reward": 0.8 * r} for i, r in enumerate(rewards, 1)]
    del metrics[0]["pairwise/reward"]  # nothing is recycled before the first step
    write_lines(tmp_path / "metrics.jsonl", metrics)
    return tmp_path


def printed(run, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_summary(run, console)
    print_files(run, console)
    return console.file.getvalue()


def test_summary_holds_the_first_and_the_last_evaluation(run):
    summary = summarize(run)
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["steps"] == [0, 60]
    assert (summary["before"]["pointwise_greedy"], summary["after"]["pointwise_greedy"]) == (0.405, 0.93)
    assert summary["n"] == dict.fromkeys(LABELS, 200)
    last = estimate(0.93, 200)
    assert summary["intervals"]["after"]["pointwise_greedy"] == [last["low"], last["high"]]
    assert summary["intervals"]["before"]["pointwise_greedy"][1] < 0.5


def test_a_figure_that_no_evaluation_has_is_named_before_any(run):
    for name in (None, *LABELS, "digits/pairwise_sampled"):
        check_figure(name)
    with pytest.raises(ConfigError, match=r"'x/reasoning_gredy' \(did you mean reasoning_greedy\?\); allowed: "):
        check_figure("x/reasoning_gredy")


def test_a_run_without_evaluation_says_so(run):
    (run / "evaluations.jsonl").unlink()
    with pytest.raises(ValueError, match=r"evaluations\.jsonl: holds no evaluation"):
        summarize(run)


def test_table_fits_80_columns_and_names_every_figure(run):
    (run / "model").mkdir()
    table, _, files = printed(run).partition("rows left out")
    assert all(label in printed(run) for label in LABELS.values())
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "…" not in table
    row = next(line for line in table.splitlines() if "reasoning, greedy" in line)
    assert row.split() == ["reasoning,", "greedy", "200", "40.5", "(34-47)", "93.0", "(89-96)", "+52.5"]
    assert "step 0" in table
    assert "step 60" in table
    # only files that are there, on lines that can be copied however long the path is
    assert f"{run / 'model'}\n" in files
    assert f"{run / 'metrics.jsonl'}\n" in files
    assert "curves.png" not in files


def test_table_of_several_recipes_and_of_a_figure_that_came_later(run):
    before = {"reasoning_greedy": estimate(0.25, 300), "a/reasoning_greedy": estimate(0.2, 100)}
    after = {
        **{
            "a/pairwise_greedy": estimate(0.5, 100),
            "my_own": estimate(0.1, 300),
            "a/reasoning_greedy": estimate(0.3, 100),
        },
        "reasoning_greedy": estimate(0.35, 300),
    }
    write_lines(run / "evaluations.jsonl", [{"step": 0, "results": before}, {"step": 1, "results": after}])
    rows = [line.split() for line in printed(run).splitlines()[4:] if line.strip(" ─")]
    assert [row[:2] for row in rows[:5]] == [
        ["reasoning,", "greedy"],
        ["my_own", "300"],
        ["a"],
        ["reasoning,", "greedy"],
        ["pairwise", "judge,"],
    ]
    assert rows[3][2:] == ["100", "20.0", "(13-29)", "30.0", "(22-40)", "+10.0"]
    assert rows[4][3:] == ["100", "50.0", "(40-60)"]


def test_one_evaluation_alone():
    console = Console(file=io.StringIO(), width=80)
    print_results({"test_time_reflection": estimate(0.405, 200), "reasoning_greedy": estimate(1.0, 200)}, console)
    first, second = [line.split() for line in console.file.getvalue().splitlines() if "200" in line]
    assert first == ["reasoning,", "greedy", "200", "100.0", "(98-100)"]
    assert second == ["+", "test-time", "reflection", "200", "40.5", "(34-47)"]


def colors(path):
    """The colors of the picture that fill more than a few pixels, as `#RRGGBB`."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*c) for c, n in zip(found, counts, strict=True) if n > 100}


def test_picture_shows_what_there_is(run):
    path = plot_curves(run)
    assert path == run / "curves.png"
    problem, pointwise, pairwise, before = "#0072B2", "#D55E00", "#009E73", "#BDBDBD"
    assert {problem, pairwise, before} <= colors(path)
    assert pointwise not in colors(path)
    wide, height = Image.open(path).size
    assert path.stat().st_size < 200_000
    (run / "evaluations.jsonl").unlink()
    assert before not in colors(plot_curves(run))
    narrow, same = Image.open(path).size
    assert narrow < wide
    assert same == height


def test_picture_of_a_run_of_one_step(run):
    write_lines(run / "metrics.jsonl", [{"step": 1, "problem/reward": 0.5}])
    assert Image.open(plot_curves(run)).format == "PNG"
    write_lines(run / "metrics.jsonl", [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no step"):
        plot_curves(run)


@pytest.mark.parametrize("n", [1, 5, 24, 60, 121])
def test_smoothing_is_a_centered_mean_of_what_is_there(n):
    values = np.random.default_rng(n).normal(size=n)
    reach = n // 24
    expected = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(n)]
    assert _smoothed(values) == pytest.approx(np.array(expected))
