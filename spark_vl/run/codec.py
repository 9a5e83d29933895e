"""Records and verified groups as JSON values and back: one form for checkpoints, samples of an evaluation and dumps.

The rows of the published dataset have a form of their own (`data.judgments`), which others read.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from spark_vl.records import (
    Content,
    ImageRef,
    ImageSize,
    Message,
    Origin,
    PromptRecord,
    RecycledRecord,
    Rollout,
    RolloutGroup,
    Verdict,
)
from spark_vl.verifiers.base import VERIFIERS, check_settings, one_of


def record_to_json(record: PromptRecord) -> dict[str, Any]:
    """All of `record`, image bytes in base64. A problem has no `origin`."""
    data = {
        **vars(record),
        "messages": [{"role": m.role, "content": _content_to_json(m.content)} for m in record.messages],
        "question": _content_to_json(record.question),
        "choices": list(record.choices),
        "settings": dict(record.settings),
        "shaping": dict(record.shaping),
        "tags": dict(record.tags),
        "image_sizes": [{name: list(size) for name, size in vars(sizes).items()} for sizes in record.image_sizes],
    }
    if isinstance(record, RecycledRecord):
        origin = record.origin
        data["origin"] = {
            **vars(origin),
            "rollouts": list(origin.rollouts),
            "completions": list(origin.completions),
        }
    return data


def record_from_json(data: dict[str, Any], verifiers: Collection[str] = VERIFIERS.keys()) -> PromptRecord:
    """The record that `record_to_json` was given.

    Args:
        verifiers: that it may name. A file does not choose which code is imported: beside `VERIFIERS`, only those of
            the recipes that are in use belong here.

    Raises:
        ValueError: it names another verifier, or settings that its verifier does not have.
    """
    if (verifier := one_of(data["verifier"], verifiers)) is None:
        allowed = ", ".join(sorted(verifiers))
        raise ValueError(f"record {data['id']}: verifier: found {data['verifier']!r:.200}; allowed: {allowed}")
    if verifier in VERIFIERS:
        try:
            check_settings(verifier, data["settings"])
        except ValueError as error:
            raise ValueError(f"record {data['id']}: settings: {error}") from error
    fields = {
        **data,
        "verifier": verifier,
        "messages": tuple(Message(m["role"], _content_from_json(m["content"])) for m in data["messages"]),
        "question": _content_from_json(data["question"]),
        "choices": tuple(data["choices"]),
        "settings": tuple(data["settings"].items()),
        "shaping": tuple(data["shaping"].items()),
        "tags": tuple(data.get("tags", {}).items()),  # earlier versions wrote none
        "image_sizes": tuple(ImageSize(tuple(s["original"]), tuple(s["processed"])) for s in data["image_sizes"]),
    }
    if "origin" not in data:
        return PromptRecord(**fields)
    lists = {name: tuple(data["origin"][name]) for name in ("rollouts", "completions")}
    return RecycledRecord(**fields | {"origin": Origin(**data["origin"] | lists)})


def group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """The record of a verified `group`, and its `completions`: each with the fields of its rollout and its verdict.
    Empty lists of tokens are left out, and so is an `answer_start` of 0. `tokens` is there where they are only counted.
    """
    completions = []
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        tokens = {"token_ids": list(rollout.token_ids), "logprobs": list(rollout.logprobs)}
        completions.append(
            {
                "text": rollout.text,
                "finish_reason": rollout.finish_reason,
                **({"answer_start": rollout.answer_start} if rollout.answer_start else {}),
                **(tokens if rollout.token_ids else {}),
                **({} if rollout.counted is None else {"tokens": rollout.counted}),
                **asdict(verdict),
                "shaping": dict(verdict.shaping),
            }
        )
    return record_to_json(group.record) | {"completions": completions}


def group_from_json(data: dict[str, Any], verifiers: Collection[str] = VERIFIERS.keys()) -> RolloutGroup:
    """The group that `group_to_json` was given. Other fields of `data` are not allowed.

    Raises:
        ValueError: see `record_from_json`.
    """
    rollouts, verdicts = [], []
    for completion in data["completions"]:
        token_ids, logprobs = (tuple(completion.get(name, ())) for name in ("token_ids", "logprobs"))
        text = (completion["text"], completion["finish_reason"], completion.get("answer_start", 0))
        rollouts.append(Rollout(token_ids, logprobs, *text, counted=completion.get("tokens")))
        said = {name: completion[name] for name in ("score", "parsed", "status", "detail")}
        verdicts.append(Verdict(**said, shaping=tuple(completion["shaping"].items())))
    record = record_from_json({name: value for name, value in data.items() if name != "completions"}, verifiers)
    return RolloutGroup(record, tuple(rollouts), tuple(verdicts))


def _content_to_json(content: Content) -> list[Any]:
    return [part if isinstance(part, str) else _image_to_json(part) for part in content]


def _image_to_json(ref: ImageRef) -> dict[str, str | None]:
    if ref.data is None:
        return {"path": ref.path, "root": ref.root}
    return {"data": base64.b64encode(ref.data).decode()}


def _content_from_json(parts: list[Any]) -> Content:
    return tuple(part if isinstance(part, str) else _image_from_json(part) for part in parts)


def _image_from_json(part: dict[str, Any]) -> ImageRef:
    return ImageRef(data=base64.b64decode(part["data"])) if "data" in part else ImageRef(**part)
