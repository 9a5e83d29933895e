"""What came of a run: a table, a summary file and a picture, from the files that the run wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from spark_vl.records import KINDS

LABELS = {
    "reasoning_greedy": "reasoning, greedy",
    "reasoning_sampled": "reasoning, sampled",
    "reasoning_unparsable": "  no answer found",
    "test_time_reflection": "  + test-time reflection",
    "test_time_majority": "  + majority, same tokens",
    "pointwise_greedy": "pointwise judge, greedy",
    "pointwise_sampled": "pointwise judge, sampled",
    "pointwise_says_correct": '  says "correct"',
    "pairwise_greedy": "pairwise judge, greedy",
    "pairwise_sampled": "pairwise judge, sampled",
    "pairwise_consistency": "  same in both orders",
    "reflection_greedy": "reflection repairs, greedy",
    "reflection_sampled": "reflection repairs, sampled",
    "reflection_keeps": "  keeps right answers",
    "unusable": "rows left out",
}
"""How each figure of an evaluation is called, in the order of the table."""

_BARS = {
    "reasoning_greedy": "reasoning, greedy",
    "test_time_reflection": "with test-time reflection",
    "reasoning_sampled": "reasoning, sampled",
    "pointwise_sampled": "pointwise judge, sampled",
    "pairwise_sampled": "pairwise judge, sampled",
    "reflection_sampled": "reflection repairs, sampled",
}
# Okabe and Ito's palette, which people with any kind of colour vision tell apart.
_COLOURS = {"problem": "#0072B2", "pointwise": "#D55E00", "pairwise": "#009E73", "reflection": "#CC79A7"}
_BEFORE, _AFTER, _INK = "#BDBDBD", "#0072B2", "#404040"


def summarise(run: Path) -> dict[str, Any]:
    """The first and the last evaluation of the run, also written to its `summary.json`.

    `before` and `after`: name → value; `n`: name → how many problems; `intervals`: `before` and `after`, each name →
    [low, high]; `steps`: of the two evaluations.

    Raises:
        ValueError: the run has no evaluation.
    """
    evaluations = _read(run / "evaluations.jsonl")
    if not evaluations:
        raise ValueError(
            f"{run / 'evaluations.jsonl'}: holds no evaluation; a run that names evaluation.recipes has two"
        )
    sides = {"before": evaluations[0]["results"], "after": evaluations[-1]["results"]}
    summary = {
        **{side: {name: e["value"] for name, e in results.items()} for side, results in sides.items()},
        "n": {name: e["n"] for name, e in sides["after"].items()},
        "intervals": {
            side: {name: [e["low"], e["high"]] for name, e in results.items()} for side, results in sides.items()
        },
        "steps": [evaluations[0]["step"], evaluations[-1]["step"]],
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(run: Path, console: Console) -> None:
    """Print the evaluation before and after the run, in percent, and where its files are.

    Raises:
        ValueError: the run has no evaluation.
    """
    summary = summarise(run)
    steps = [f"step {step}" for step in summary["steps"]]
    _print_table(console, summary["n"], [*steps, "change"], lambda name: _cells(summary, name))
    for name in ("model/", "checkpoints/", "summary.json", "metrics.jsonl", "rollouts.jsonl", "curves.png"):
        if (run / name).exists():
            console.print(f"{name.rstrip('/'):<16}{run / name}", soft_wrap=True, markup=False, highlight=False)


def print_results(results: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print one evaluation: name → `value`, `low`, `high`, `n`."""
    sizes = {name: e["n"] for name, e in results.items()}
    _print_table(
        console, sizes, ["result"], lambda name: [_cell(*(results[name][key] for key in ("value", "low", "high")))]
    )


def _print_table(
    console: Console, sizes: Mapping[str, float], headers: Sequence[str], cells: Callable[[str], Iterable[str]]
) -> None:
    """Figures in rows: label, n (`sizes`), and the `cells` of the figure under `headers`."""
    table = Table(box=box.SIMPLE, title="Held-out evaluation, % (95 % interval), n problems", title_justify="left")
    table.add_column("", no_wrap=True)
    for header in ("n", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for recipe, names in _sections(sizes):
        if recipe:
            table.add_section()
            table.add_row(recipe)
        for name in names:
            key = f"{recipe}/{name}" if recipe else name
            table.add_row(LABELS.get(name, name), str(sizes[key]), *cells(key))
    console.print(table)


def _cell(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _sections(figures: Mapping[str, float]) -> Iterator[tuple[str, list[str]]]:
    """("", names of the figures over all recipes), then (recipe, names of its own), each in the order of `LABELS`."""
    order = list(LABELS)
    by_recipe: dict[str, list[str]] = {}
    for key in figures:
        recipe, _, name = key.rpartition("/")
        by_recipe.setdefault(recipe, []).append(name)
    for recipe in sorted(by_recipe):
        yield recipe, sorted(by_recipe[recipe], key=lambda name: order.index(name) if name in order else len(order))


def _cells(summary: Mapping[str, Any], name: str) -> Iterator[str]:
    """before, after, change; a figure that the first evaluation lacks has neither before nor change."""
    for side in ("before", "after"):
        if name in summary[side]:
            yield _cell(summary[side][name], *summary["intervals"][side][name])
        else:
            yield ""
    yield f"{100 * (summary['after'][name] - summary['before'][name]):+.1f}" if name in summary["before"] else ""


def plot_curves(run: Path) -> Path:
    """Draw `curves.png`: the reward of each kind of prompt over the steps and, where the run was evaluated, the figures
    before and after it.

    Raises:
        ValueError: the run has no metrics.
    """
    metrics = _read(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{run / 'metrics.jsonl'}: holds no step")
    summary = summarise(run) if _read(run / "evaluations.jsonl") else None
    figure = Figure(figsize=(10 if summary else 5.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if summary else 1, squeeze=False, width_ratios=[1, 1] if summary else [1])[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=_INK)
    _plot_rewards(axes[0], metrics)
    if summary:
        _plot_bars(axes[1], summary)
    path = run / "curves.png"
    figure.savefig(path, dpi=120, pil_kwargs={"optimize": True})
    return path


def _plot_rewards(ax: Axes, metrics: list[dict[str, float]]) -> None:
    for kind in KINDS:
        points = [(line["step"], line[f"{kind}/reward"]) for line in metrics if f"{kind}/reward" in line]
        if points:
            steps, rewards = np.array(points).T
            ax.plot(steps, rewards, color=_COLOURS[kind], linewidth=0.8, alpha=0.25)
            ax.plot(steps, _smoothed(rewards), color=_COLOURS[kind], linewidth=1.6, label=kind)
    ax.set_title("Reward over the training steps, by kind of prompt", fontsize=10, loc="left", color=_INK)
    ax.set_ylim(0, 1.02)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    _legend_below(ax)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The centred moving mean over about a twelfth of the values; at the ends, over those that are there."""
    window = np.ones(2 * (len(values) // 24) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _plot_bars(ax: Axes, summary: Mapping[str, Any]) -> None:
    names = [name for name in _BARS if name in summary["before"] and name in summary["after"]]
    rows = np.arange(len(names))
    for side, colour, offset in (("before", _BEFORE, -0.2), ("after", _AFTER, 0.2)):
        values = np.array([summary[side][name] for name in names])
        low, high = np.array([summary["intervals"][side][name] for name in names]).T
        label = f"{side} (step {summary['steps'][side == 'after']})"
        ax.barh(rows + offset, values, 0.38, color=colour, label=label)
        whiskers = np.clip([values - low, high - values], 0, None)
        ax.errorbar(values, rows + offset, xerr=whiskers, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
        for row, value, end in zip(rows, values, high, strict=True):
            ax.text(end + 0.015, row + offset, f"{100 * value:.0f}", va="center", fontsize=8, color=_INK)
    ax.set_yticks(rows, [_BARS[name] for name in names])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.08)
    ax.set_xticks(np.linspace(0, 1, 5), ["0", "25", "50", "75", "100 %"])
    n = max(summary["n"][name] for name in names)
    ax.set_title(f"Held out (n = {n}, 95 % intervals)", fontsize=10, loc="left", color=_INK)
    _legend_below(ax)


def _legend_below(ax: Axes) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 4}
    ax.legend(**place, frameon=False, fontsize=9, labelcolor=_INK, columnspacing=1.2, handlelength=1.4)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
