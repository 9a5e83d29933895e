"""Every completion of every evaluation of a run, one group a line, to read and to score again without the model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spark_vl.evaluation.figures import Estimate, score
from spark_vl.records import ImageSize, Origin, PromptRecord, Rollout, RolloutGroup, group_to_json, plain_text
from spark_vl.verifiers import VerifierPool, verify_groups


def append_samples(file: Path, groups: Mapping[str, Sequence[RolloutGroup]]) -> None:
    """Append one evaluation, numbered after the last one in `file`, of which an unfinished last line is dropped."""
    number = 1
    if file.exists():
        text = file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            file.write_bytes(whole)
        if whole:
            number += json.loads(whole.splitlines()[-1])["evaluation"]
    with file.open("a", encoding="utf-8") as lines:
        for mode, of_mode in groups.items():
            for group in of_mode:
                line = {"evaluation": number, "mode": mode, **_to_json(group)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def rescore(file: Path, verifiers: VerifierPool) -> list[dict[str, Estimate]]:
    """The figures (see `score`) of every evaluation in `file`, oldest first, with all completions verified anew.

    Which answers were revised or in the majority stays as it was. A verifier sees questions as plain text. Shaping
    terms say nothing of correctness and are left out.
    """
    evaluations: dict[int, dict[str, list[RolloutGroup]]] = defaultdict(lambda: defaultdict(list))
    with file.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            evaluations[line["evaluation"]][line["mode"]].append(_from_json(line))
    return [
        score({mode: verify_groups(verifiers, groups) for mode, groups in evaluation.items()})
        for evaluation in evaluations.values()
    ]


def _to_json(group: RolloutGroup) -> dict[str, Any]:
    record = group.record
    return {
        "recipe": record.recipe,
        "question": plain_text(record.question),
        "verifier": record.verifier,
        "choices": record.choices,
        "settings": dict(record.settings),
        "image_sizes": [asdict(size) for size in record.image_sizes],
        "coordinates": record.coordinates,
        **group_to_json(group),
    }


def _from_json(line: Mapping[str, Any]) -> RolloutGroup:
    """The group, unverified, as far as the line holds it."""
    record = PromptRecord(
        id=line["id"],
        kind=line["kind"],
        messages=(),
        question=(line["question"],),
        gold=line["gold"],
        verifier=line["verifier"],
        recipe=line["recipe"],
        choices=tuple(line["choices"]),
        settings=tuple(line["settings"].items()),
        image_sizes=tuple(ImageSize(tuple(s["original"]), tuple(s["processed"])) for s in line["image_sizes"]),
        coordinates=line["coordinates"],
        origin=None if line["origin"] is None else Origin(**line["origin"]),
    )
    return RolloutGroup(record, tuple(Rollout((), (), c["text"], c["finish_reason"]) for c in line["completions"]))
