"""`spark-vl judge`: rows of JSON lines in, judgments of them out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from spark_vl.config import ConfigError, JudgeConfig, differences, flat
from spark_vl.data.cells import items, optional, text
from spark_vl.data.problems import image_of, place_images
from spark_vl.records import Content
from spark_vl.reward.judge import Asked, GenerativeReward
from spark_vl.reward.judgment import Judgment
from spark_vl.run.jsonl import append_lines, read_lines

_FREE = {"output", "media_root", "rows_at_once", "rollout.decode_batch_size"}
_FREE |= {f"rollout.openai.{name}" for name in ("token_from", "concurrency", "timeout_s", "retries")}
"""Settings that change no judgment."""


def judge_file(
    rows: Path,
    config: JudgeConfig,
    load: Callable[[], GenerativeReward],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Judge each row of the JSON lines in `rows`, and append a line for it to `config.output`.

    A row has a `question`, `images` if it has any, and either an `answer` or `answer_a` and `answer_b`; images of an
    answer stand under its name with `_images` behind it, such as `answer_a_images`. `<image>` in a text stands for one.
    A row that cannot be used gets a line, too, which says why.

    Rows that the output has lines of are not asked again: a run that was killed goes on where it was.

    Args:
        load: makes the judge, which is closed at the end; called only where there is something to judge.
        progress: is told how many more rows have their line.

    Returns:
        How many rows of the whole output are `ok`, `unparsable` and an `error`, how many of the unparsable ones were
        cut off (`truncated`), and how many the output had `before`.

    Raises:
        ConfigError: the output is of other settings or other rows.
    """
    output = Path(config.output)
    settings = {name: value for name, value in flat(asdict(config)).items() if name not in _FREE}
    settings = json.loads(json.dumps(settings))
    lines = read_lines(output)
    if lines:
        _check_settings(lines[0].get("settings"), settings, output)
    else:
        append_lines(output, [{"settings": settings}])
    done = {line["row"]: line["digest"] for line in lines[1:]}
    counts = Counter(_outcome(line) for line in lines[1:])
    counts["truncated"] += sum(line.get("truncated", False) for line in lines[1:])

    root = rows.parent if config.media_root is None else Path(config.media_root)
    left = _left(rows, done, output)
    with ExitStack() as stack:
        judge = None
        while batch := list(islice(left, config.rows_at_once)):
            judge = judge or stack.enter_context(closing(load()))
            written = _judged(judge, batch, root)
            append_lines(output, written)
            for line in written:
                counts[_outcome(line)] += 1
                counts["truncated"] += line.get("truncated", False)
            progress(len(batch))
    return {name: counts[name] for name in ("ok", "unparsable", "truncated", "error")} | {"before": len(done)}


def _judged(judge: GenerativeReward, batch: Sequence[tuple[int, str, bytes]], root: Path) -> list[dict[str, Any]]:
    """The lines of rows."""
    asked: list[Asked] = []
    lines: list[dict[str, Any]] = []
    for number, digest, row_text in batch:
        line: dict[str, Any] = {"row": number, "digest": digest}
        try:
            row = _row(row_text)
            line |= {"id": row["id"]} if "id" in row else {}
            kind, prompts = _ask(judge, row, root)
            asked.append(prompts)
            line |= {"kind": kind}
        except (ValueError, RecursionError) as error:  # a `BadRecordError`, too
            line |= _error(error)
        lines.append(line)
    judged = iter(judge.judge(asked))
    judge.processor.forget_images()
    for line in lines:
        if "kind" in line:
            found = next(judged)
            line |= _facts(found) if isinstance(found, Judgment) else _error(found)
    return lines


def _left(rows: Path, done: Mapping[int, str], output: Path) -> Iterator[tuple[int, str, bytes]]:
    """Number, digest and text of each row that has no line in the output yet."""
    with rows.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            digest = hashlib.sha256(line.strip()).hexdigest()[:16]
            if done.get(number, digest) != digest:
                raise ConfigError(
                    f"output: {output}: line {number} of {rows} is not the row that was judged; name another file, or "
                    "add --overwrite"
                )
            if number not in done:
                yield number, digest, line


def _check_settings(was: Any, now: Mapping[str, Any], output: Path) -> None:
    if not isinstance(was, Mapping):
        raise ConfigError(f"output: {output} is not a file of judgments; name another file")
    if changed := differences(was, now):
        changes = "; ".join(f"{name}: {old!r} → {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(
            f"output: {output} was written under other settings ({changes}); name another file, or add --overwrite"
        )


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}; a mapping is allowed")
    return row


def _ask(judge: GenerativeReward, row: Mapping[str, Any], root: Path) -> tuple[str, Asked]:
    """The kind of judgment that a row asks for, and its prompts."""

    def content(name: str, images: str) -> Content:
        return place_images(text(row, name), [image_of(item, root, images) for item in items(optional(row, images))])

    question = content("question", "images")
    names = [name for name in ("answer", "answer_a", "answer_b") if name in row]
    answers = [content(name, f"{name}_images") for name in names]
    match names:
        case ["answer"]:
            return "pointwise", judge.ask_pointwise(question, None, answers[0])
        case ["answer_a", "answer_b"]:
            return "pairwise", judge.ask_pairwise(question, None, answers[0], answers[1])
    raise ValueError(f"it has {', '.join(names) or 'no answer'}; allowed: answer, or answer_a and answer_b")


def _facts(judgment: Judgment) -> dict[str, Any]:
    replies = [reply for order in judgment.orders for reply in order]
    cut_off = any(reply.label is None and reply.finish_reason == "length" for reply in replies)
    return {
        "status": judgment.status,
        "probability": judgment.probability,
        "probabilities": judgment.probabilities,
        "consistent": judgment.consistent,
        "truncated": judgment.status == "unparsable" and cut_off,
        "orders": [[asdict(reply) for reply in order] for order in judgment.orders],
    }


def _error(error: Exception) -> dict[str, Any]:
    return {"status": "error", "error": f"{error}"[:500]}


def _outcome(line: Mapping[str, Any]) -> str:
    return str(line["status"])
