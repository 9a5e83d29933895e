"""The results of a run as a table, a summary file and a picture, from the files that the run wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from spark_vl.config import ConfigError
from spark_vl.records import KINDS, did_you_mean
from spark_vl.run.jsonl import read_lines

LABELS = {
    "reasoning_greedy": "reasoning, greedy",
    "reasoning_sampled": "reasoning, sampled",
    "reasoning_unparsable": "  no answer found",
    "reasoning_truncated": "  cut off",
    "reasoning_failed": "  the verifier failed",
    "test_time_reflection": "  + test-time reflection",
    "test_time_majority": "  + majority, same tokens",
    "pointwise_greedy": "pointwise judge, greedy",
    "pointwise_sampled": "pointwise judge, sampled",
    "pointwise_says_correct": '  says "correct"',
    "pointwise_own": "  own answers",
    "pointwise_own_pairs": "  own answers, both right",
    "pairwise_greedy": "pairwise judge, greedy",
    "pairwise_sampled": "pairwise judge, sampled",
    "pairwise_consistency": "  same in both orders",
    "reflection_greedy": "reflection repairs, greedy",
    "reflection_sampled": "reflection repairs, sampled",
    "reflection_keeps": "  keeps right answers",
    "unusable": "rows left out",
}
"""How each figure of an evaluation is called, in the order of the table. `spark-vl eval` has some more."""


def check_figure(name: str | None) -> None:
    """Check that an evaluation has the figure `name`, of all its recipes or, as `recipe/name`, of one.

    Raises:
        ConfigError: there is none of this name.
    """
    if name is not None and (figure := name.rpartition("/")[2]) not in LABELS:
        raise ConfigError(
            f"checkpoint.keep_best: there is no figure {name!r}{did_you_mean(figure, LABELS)}; allowed: "
            f"{', '.join(LABELS)}"
        )


_BARS = {
    "reasoning_greedy": "reasoning, greedy",
    "test_time_reflection": "with test-time reflection",
    "reasoning_sampled": "reasoning, sampled",
    "pointwise_sampled": "pointwise judge, sampled",
    "pairwise_sampled": "pairwise judge, sampled",
    "reflection_sampled": "reflection repairs, sampled",
}
# Okabe and Ito's palette, which people with any kind of color vision tell apart.
_COLORS = {"problem": "#0072B2", "pointwise": "#D55E00", "pairwise": "#009E73", "reflection": "#CC79A7"}
_BEFORE, _AFTER, _INK = "#BDBDBD", "#0072B2", "#404040"


def comparison(run: Path, step: int | None = None) -> dict[str, Any] | None:
    """The first evaluation of the run, and that of `step` (None: the last one). None: there is none.

    `before` and `after`: name → value; `n`: name → how many problems; `intervals`: `before` and `after`, each name →
    [low, high]; `steps`: of the two evaluations.
    """
    evaluations = read_lines(run / "evaluations.jsonl")
    last = next((e for e in reversed(evaluations) if step is None or e["step"] == step), None)
    if last is None:
        return None
    sides = {"before": evaluations[0]["results"], "after": last["results"]}
    return {
        **{side: {name: e["value"] for name, e in results.items()} for side, results in sides.items()},
        "n": {name: e["n"] for name, e in sides["after"].items()},
        "intervals": {
            side: {name: [e["low"], e["high"]] for name, e in results.items()} for side, results in sides.items()
        },
        "steps": [evaluations[0]["step"], last["step"]],
    }


def summarize(run: Path) -> dict[str, Any]:
    """`comparison` of the first and the last evaluation of the run, also written to its `summary.json`.

    Raises:
        ValueError: the run has no evaluation.
    """
    summary = comparison(run)
    if summary is None:
        raise ValueError(
            f"{run / 'evaluations.jsonl'}: holds no evaluation; a run that names evaluation.recipes has two"
        )
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(run: Path, console: Console) -> None:
    """Print the evaluation before and after the run, in percent.

    Raises:
        ValueError: the run has no evaluation.
    """
    summary = summarize(run)
    steps = [f"step {step}" for step in summary["steps"]]
    print_table(console, summary["n"], [*steps, "change"], lambda name: _cells(summary, name))


def print_files(run: Path, console: Console) -> None:
    """Print where the files of a finished run are."""
    folders, files = ("model/", "judgments/", "checkpoints/"), ("summary.json", "metrics.jsonl")
    for name in (*folders, *files, "curves.png"):
        if (run / name).exists():
            console.print(f"{name.rstrip('/'):<16}{run / name}", soft_wrap=True, markup=False, highlight=False)


def print_table(
    console: Console,
    sizes: Mapping[str, float],
    headers: Sequence[str],
    cells: Callable[[str], Iterable[str]],
    labels: Mapping[str, str] = LABELS,
) -> None:
    """Figures in rows: label, n (`sizes`), and the `cells` of the figure under `headers`."""
    table = Table(box=box.SIMPLE, title="Held-out evaluation, % (95 % interval), n problems", title_justify="left")
    table.add_column("", no_wrap=True)
    for header in ("n", *headers):
        table.add_column(header, justify="right", no_wrap=True)
    for recipe, names in sections(sizes, labels):
        if recipe:
            table.add_section()
            table.add_row(recipe)
        for name in names:
            key = f"{recipe}/{name}" if recipe else name
            table.add_row(labels.get(name, name), str(sizes[key]), *cells(key))
    console.print(table)


def cell(value: float, low: float, high: float) -> str:
    """A share and its interval, in percent."""
    return f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def sections(figures: Iterable[str], labels: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """("", names of the figures over all recipes), then (recipe, names of its own), each in the order of `labels`."""
    order = list(labels)
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
            yield cell(summary[side][name], *summary["intervals"][side][name])
        else:
            yield ""
    yield f"{100 * (summary['after'][name] - summary['before'][name]):+.1f}" if name in summary["before"] else ""


def plot_curves(run: Path) -> Path:
    """Draw `curves.png`: the reward of each kind of prompt over the steps and, where the run was evaluated, the figures
    before and after it.

    Raises:
        ValueError: the run has no metrics.
    """
    metrics = _metrics(run)
    summary = comparison(run)
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


def plot_diagnostics(run: Path, path: Path, step: int | None = None) -> None:
    """Draw what tells a real judge from a lucky one into `path`, a PNG, up to `step` (None: to the end).

    Six panels over the steps: reward, completion length, entropy and KL of each kind of prompt, balanced accuracy of
    the judge, and, of the evaluations, how often it says the same of a pair in both orders. One that the run has no
    figures for says so.

    Raises:
        ValueError: the run has no metrics.
    """
    upto = math.inf if step is None else step
    metrics = [line for line in _metrics(run) if line["step"] <= upto]
    evaluations = [
        {"step": line["step"], **{name: e["value"] for name, e in line["results"].items()}}
        for line in read_lines(run / "evaluations.jsonl")
        if line["step"] <= upto
    ]
    figure = Figure(figsize=(12, 6.4))
    margins = {"left": 0.05, "right": 0.98, "bottom": 0.13, "top": 0.94, "hspace": 0.3, "wspace": 0.2}
    for ax, (title, name, lines, top) in zip(
        figure.subplots(2, 3, gridspec_kw=margins).flat,
        (
            ("Reward", "{}/reward", metrics, 1.02),
            ("Judge, balanced accuracy (0.5 is a coin)", "{}/balanced_accuracy", metrics, 1.02),
            ("Held-out pairs judged the same in both orders", "pairwise_consistency", evaluations, 1.02),
            ("Completion length, tokens", "{}/length", metrics, None),
            ("Entropy, nats per token", "{}/entropy", metrics, None),
            ("KL from the reference, nats per token", "{}/kl", metrics, None),
        ),
        strict=True,
    ):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=_INK)
        ax.set_title(title, fontsize=10, loc="left", color=_INK)
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        if not _plot_kinds(ax, lines, name):
            ax.text(0.5, 0.5, "not measured in this run", ha="center", transform=ax.transAxes, color=_INK, fontsize=9)
            ax.set_yticks([])
        elif top:
            ax.set_ylim(0, top)
    handles = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _metrics(run: Path) -> list[dict[str, float]]:
    """Raises:
    ValueError: see `plot_curves`.
    """
    metrics = read_lines(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{run / 'metrics.jsonl'}: holds no step")
    return metrics


def _plot_kinds(ax: Axes, lines: Sequence[Mapping[str, float]], name: str) -> bool:
    """Draw the figure `name`, in which `{}` is a kind of prompt, of each kind that has it. Returns whether any has."""
    drawn = False
    for kind in KINDS if "{}" in name else ("pairwise",):
        key = name.format(kind)
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            steps, values = np.array(points).T
            marker = "o" if len(points) < 12 else ""
            ax.plot(steps, values, color=_COLORS[kind], linewidth=0.8, alpha=0.25, marker=marker, markersize=3)
            ax.plot(steps, _smoothed(values), color=_COLORS[kind], linewidth=1.6, label=kind)
            drawn = True
    return drawn


def _plot_rewards(ax: Axes, metrics: list[dict[str, float]]) -> None:
    _plot_kinds(ax, metrics, "{}/reward")
    ax.set_title("Reward over the training steps, by kind of prompt", fontsize=10, loc="left", color=_INK)
    ax.set_ylim(0, 1.02)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    _legend_below(ax)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The centered moving mean over about a twelfth of the values; at the ends, over those that are there."""
    window = np.ones(2 * (len(values) // 24) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _plot_bars(ax: Axes, summary: Mapping[str, Any]) -> None:
    names = [name for name in _BARS if name in summary["before"] and name in summary["after"]]
    rows = np.arange(len(names))
    for side, color, offset in (("before", _BEFORE, -0.2), ("after", _AFTER, 0.2)):
        values = np.array([summary[side][name] for name in names])
        low, high = np.array([summary["intervals"][side][name] for name in names]).T
        label = f"{side} (step {summary['steps'][side == 'after']})"
        ax.barh(rows + offset, values, 0.38, color=color, label=label)
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
    style: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 4}
    ax.legend(**style, frameon=False, fontsize=9, labelcolor=_INK, columnspacing=1.2, handlelength=1.4)
