"""Evaluations as tables, for a terminal and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from spark_vl.evaluation.compare import Comparison, Difference
from spark_vl.report import LABELS, cell, print_table, sections

_MORE_LABELS = {
    "tokens_greedy": "tokens of a greedy answer",
    "tokens_sampled": "tokens of a sampled answer",
    "tokens_test_time_reflection": "tokens of test-time reflection",
    "tokens_test_time_majority": "tokens of the majority",
    "reward_accuracy": "preferred answer, of a pair",
    "reward_macro": "  mean over categories",
    "reward_consistency": "  same in both orders",
    "reward_all_orders": "  right in both orders",
    "reward_first_place": "  picks the first",
    "reward_unparsable": "  no verdict",
    "reward_truncated": "  cut off",
    "reward_official_overall": "  official rule",
    "reward_official_macro": "  official rule, categories",
    "reward_official_dropped": "  left out by it",
    "reward_pointwise": "preferred answer, each alone",
    "reward_pointwise_tied": "  as good as another",
    "reward_brier": "  Brier score",
    "reward_pointwise_unparsable": "  no verdict",
    "reward_pointwise_truncated": "  cut off",
}
_LABELS = LABELS | _MORE_LABELS


def print_results(results: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print one evaluation: name → `value`, `low`, `high`, `n`."""
    sizes = {name: e["n"] for name, e in results.items()}
    print_table(console, sizes, ["result"], lambda name: [_result(name, results[name])], _LABELS)


def results_page(results: Mapping[str, Mapping[str, float]], title: str) -> str:
    """The same as a table in Markdown, below `title`."""
    lines = [f"# {title}", "", "Figures in %, with 95 % intervals; tokens as they are.", ""]
    lines += ["| | n | result |", "|---|---:|---:|"]
    for recipe, names in sections(results, _LABELS):
        lines += [f"| **{recipe}** | | |"] if recipe else []
        for name in names:
            estimate = results[f"{recipe}/{name}" if recipe else name]
            lines.append(f"| {_LABELS.get(name, name).strip()} | {estimate['n']:.0f} | {_result(name, estimate)} |")
    return "\n".join(lines) + "\n"


def write_results(results: Mapping[str, Mapping[str, float]], folder: Path, title: str) -> None:
    """Write `results.json`, and `results.md` for people."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "results.md").write_text(results_page(results, title), encoding="utf-8")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print how much better the second of two evaluations, B, is than the first, A."""
    table = Table(box=box.SIMPLE, title="Accuracy, % (95 % interval of the difference), n items", title_justify="left")
    for header in ("", "n", "A", "B", "B - A", "p", "gained", "lost"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)

    def row(name: str, of: Difference) -> None:
        values = (f"{100 * of.a:.1f}", f"{100 * of.b:.1f}", f"{100 * of.difference:+.1f}")
        interval = f"({100 * of.low:+.1f} to {100 * of.high:+.1f})"
        counts = (str(len(of.gained)), str(len(of.lost)))
        table.add_row(name, str(of.n), *values[:2], f"{values[2]} {interval}", f"{of.p:.3f}", *counts)

    for name, of in comparison.recipes.items():
        row(name, of)
    if len(comparison.recipes) > 1:
        table.add_section()
        row("macro mean", comparison.macro)
    console.print(table)
    alone = {name: (of.only_a, of.only_b) for name, of in comparison.recipes.items() if of.only_a or of.only_b}
    for name, (only_a, only_b) in (alone | dict(comparison.apart)).items():
        console.print(f"{name}: {only_a} items are in A alone, {only_b} in B", markup=False)


def _result(name: str, estimate: Mapping[str, float]) -> str:
    bounds = [estimate[key] for key in ("value", "low", "high")]
    if name.rpartition("/")[2].startswith("tokens_"):
        return "{:.0f} ({:.0f}-{:.0f})".format(*bounds)
    return cell(*bounds)
