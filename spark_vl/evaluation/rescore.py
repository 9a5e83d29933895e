"""The figures of an evaluation from what was answered, without a model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from spark_vl.config import VerifierConfig
from spark_vl.evaluation import preferences
from spark_vl.evaluation.figures import Estimate
from spark_vl.evaluation.results import Line, results
from spark_vl.evaluation.samples import groups_from_json, groups_to_json, verified_again
from spark_vl.run.jsonl import read_lines
from spark_vl.verifiers import VERIFIERS, VerifierPool


def rescore(file: Path, verifiers: VerifierPool, own: Collection[str] = ()) -> dict[str, Estimate]:
    """The figures (see `results`) of `file` (`samples.jsonl`), with all completions verified, and all verdicts of
    judges read, again.

    Args:
        own: `module:function` of verifiers that samples may name besides `VERIFIERS`. A file does not choose which
            code is imported.

    Raises:
        ValueError: a sample names another verifier.
    """
    allowed = {*VERIFIERS, *own}

    def again(line: Line) -> Line:
        if "groups" in line:
            groups = verified_again(groups_from_json(line["groups"], allowed), verifiers)
            return line | {"groups": groups_to_json(groups)}
        return preferences.rescored(line) if "ask" in line and "unusable" not in line else line

    return results([again(line) for line in read_lines(file)], own)


def rescore_folder(
    folder: Path, config: VerifierConfig, own: Collection[str] = ()
) -> tuple[dict[str, Estimate], list[str]]:
    """The figures of the answers in the folder of an evaluation, and how they differ from those in its `results.json`:
    a line for each.

    Args:
        own: see `rescore`.

    Raises:
        ValueError: see `rescore`; the folder has no evaluation that was finished.
    """
    for name in ("samples.jsonl", "results.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; the evaluation was not finished")
    with VerifierPool(config.workers, config.timeout_s, config.memory_mb) as verifiers:
        now = rescore(folder / "samples.jsonl", verifiers, own)
    was = json.loads((folder / "results.json").read_text())
    differences = [
        f"{name}: {was.get(name, {}).get('value')} → {now.get(name, {}).get('value')}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    return now, differences
