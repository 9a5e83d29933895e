"""Prints the groups that a run has stored as a person reads them: prompt, completions, verdicts, what was recycled."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from spark_vl.data.judgments import completions_column
from spark_vl.data.sources import Row
from spark_vl.records import KINDS, Kind, visible
from spark_vl.run.reader import find_stored, recycled_in_step, rows_of_step
from spark_vl.run.shards import Shard


def show_groups(
    run: Path,
    *,
    step: int | None = None,
    kind: Kind | None = None,
    wrong: bool = False,
    images: Path | None = None,
    limit: int = 0,
) -> Iterator[str]:
    """The stored groups of one step as texts, problems first. Reads only whole files, so the run may be going on.

    Args:
        run: folder of a run, or its `judgments/`.
        step: in which they were sampled. None: the latest that is stored.
        kind: of the prompts. None: all kinds.
        wrong: leave out groups whose completions are all right.
        images: folder to write the images of these groups to, each once.
        limit: how many groups at most. 0: all.

    Raises:
        ValueError: nothing (of this kind) is stored, or not of this step; or a file cannot be read.
    """
    shards = find_stored(run)
    chosen = sorted(
        (shard for shard in shards if kind in (None, _kind(shard))), key=lambda shard: KINDS.index(_kind(shard))
    )
    groups = "groups" if kind is None else f"groups of kind {kind}"
    if not chosen:
        raise ValueError(f"{run}: holds no {groups}; a run stores them unless logging.judgments is off")
    first, last = min(shard.first_step for shard in chosen), max(shard.last_step for shard in chosen)
    step = last if step is None else step
    recycled = recycled_in_step(shards, step)
    seen = shown = 0
    for shard, row in rows_of_step(chosen, step, images=images is not None):
        seen += 1
        if wrong and all(score == 1 for score in row["reward"]):
            continue
        if limit and shown == limit:
            yield f"Stopped after {limit}; --limit 0 shows all."
            return
        shown += 1
        text = _group_text(shard, row, recycled.get(_record_id(row), ()))
        if images is not None:
            stored = ((image or {}).get("bytes") for image in row["images"])
            text += "".join(f"\nimage: {_write_image(images, data) if data else 'missing'}" for data in stored)
        yield visible(text)
    if not seen:
        raise ValueError(f"{run}: holds no {groups} of step {step}; it holds steps {first} to {last}")
    if not shown:
        yield f"Step {step}: none of the {groups} has a wrong completion ({seen} read)."


def _kind(shard: Shard) -> Kind:
    return "problem" if shard.config == "rollouts" else shard.config


def _record_id(row: Row) -> str:
    """The id that the row's record had in the run (see `row_of`)."""
    return row["id"].removesuffix(f"@{row['step']}")


def _group_text(shard: Shard, row: Row, recycled: Sequence[tuple[Shard, Row]]) -> str:
    template = f" · template {row['template']}" if "template" in row else ""
    lines = [f"══ step {row['step']} · {_kind(shard)} · {_record_id(row)} · recipe {row['recipe']}{template}"]
    for message in row["messages"]:
        parts = ("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
        lines.append(f"{message['role']}: {''.join(parts)}")
    lines.append(f"gold: {row['label']} (verifier {row['verifier']})")
    columns = (completions_column(shard.config), "reward", "parsed", "status", "finish_reason")
    for i, (text, score, parsed, status, finish_reason) in enumerate(zip(*(row[c] for c in columns), strict=True), 1):
        answer = "no answer" if parsed is None else f"answer {parsed}"
        lines += [f"── {i}: score {score:g} · {answer} · {status} · finished by {finish_reason}", text]
    for other, made in recycled:
        replies = Counter("no answer" if parsed is None else parsed for parsed in made["parsed"]).most_common()
        said = "not sampled"
        if replies:
            said = f"in step {made['step']} the model said {', '.join(f'{answer} × {n}' for answer, n in replies)}"
            said += f"; mean score {fmean(made['reward']):.2f}"
        lines.append(f"recycled: {other.config} · template {made['template']} · gold {made['label']} · {said}")
    return "\n".join(lines)


def _write_image(folder: Path, data: bytes) -> Path:
    """The file of an image, named by its content, so that an image that recurs is one file."""
    suffix = "png" if data.startswith(b"\x89PNG") else "jpg"  # the only formats that are stored
    file = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file
