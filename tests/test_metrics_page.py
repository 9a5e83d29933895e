"""docs/metrics.md explains every metric that is written, and no other."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from spark_vl.records import KINDS

ROOT = Path(__file__).parents[1]
WRITERS = (
    *("log.py", "feed.py", "policy/update.py", "policy/check.py", "policy/losses.py"),
    *("rollout/vllm_engine.py", "reward/self_judge.py"),
)


def explained() -> set[str]:
    rows = re.findall(r"^\| `([\w/]+)` \| \S", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    return set(rows)


def of_any_kind(name: str) -> str:
    return "/".join("KIND" if part in KINDS else part for part in name.split("/"))


def is_explained(name: str, page: set[str]) -> bool:
    return name in page or of_any_kind(name) in page


def in_code() -> set[str]:
    nodes = (node for file in WRITERS for node in ast.walk(ast.parse((ROOT / "spark_vl" / file).read_text())))
    constants = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    return {text for text in constants if re.fullmatch(r"[a-z]+/[A-Za-z_]+", text)}


def test_every_metric_of_a_run_and_every_name_in_the_code_is_explained(finished_run):
    page = explained()
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    figures = [json.loads(line)["results"] for line in (finished_run / "evaluations.jsonl").read_text().splitlines()]
    written = {name for line in [*lines, *figures] for name in line} - {"step"}
    assert len(written) > 80
    assert {name for name in written if not is_explained(name, page)} == set()
    # Those that this run had no occasion for.
    assert {name for name in in_code() if not is_explained(name, page)} == set()


def test_nothing_is_explained_that_is_not_written(finished_run):
    lines = (finished_run / "metrics.jsonl").read_text() + (finished_run / "evaluations.jsonl").read_text()
    written = set(re.findall(r'"([\w/]+)":', lines))
    written |= {of_any_kind(name) for name in written}
    # Which of the pairwise labels come up is chance; this run has no shaping terms.
    rare = {"KIND/TERM", "pairwise/accuracy_A", "pairwise/accuracy_B", "pairwise/balanced_accuracy"}
    rare |= {"pointwise/accuracy_correct", "pointwise/accuracy_incorrect", "pointwise/balanced_accuracy"}
    rare |= {"pointwise/both_right", "pointwise/difficulty_auc", "pointwise_own", "pointwise_own_pairs"}
    rare |= {"reasoning_failed", "reasoning_truncated", "data/filtered"}
    # Those of vLLM, which say so.
    page = (ROOT / "docs" / "metrics.md").read_text()
    rare |= {name for name in re.findall(r"^\| `([\w/]+)` \| vLLM: ", page, flags=re.MULTILINE) if name in in_code()}
    rare |= {name for name in explained() if "self_judge" in name}  # `test_self_judge.py` has a run that writes them
    assert explained() - written - rare == set()
