"""Texts: the reply's last box holds the right words.

Setting `mode`: `normalized`, case does not matter; `exact`, it does; `anls`, a few wrong characters cost a part of the
score, as in DocVQA; `contained`, the answer only has to stand somewhere in the gold, as in DynaMath, which a single
letter may do: not for training. In none of them does it matter how the text is set: see `plain`. A gold that is a JSON
array of texts lists variants, any of which is right.
"""

from __future__ import annotations

from typing import Any

from spark_vl.answers import last_boxed, normalized, parse_json, plain
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of

SETTINGS: dict[str, Any] = {"mode": ("normalized", "exact", "anls", "contained")}

THRESHOLD = 0.5
"""A lower similarity scores 0: it is another text (arXiv 1907.00490)."""
MAX_CHARS = 4000
"""Limit for a gold with all its variants in mode `anls`, which bounds the time that the distances take."""


def verify_text(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's text equals `record.gold` or one of its variants; `parsed` is the text as written.

    In mode `anls` it is the similarity to the nearest variant, 1 - distance / length of the longer text, or 0 if that
    is below `THRESHOLD`.
    """
    mode = settings_of(record)["mode"]
    form = plain if mode == "exact" else normalized
    gold = last_boxed(record.gold) or record.gold
    variants = [form(variant) for variant in _variants(gold)]
    if not variants or not all(variants):
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not a text, or is a list with an empty one")
    if mode == "anls" and len(gold) > MAX_CHARS:
        raise BadRecordError(record.id, f"gold has {len(gold)} characters; allowed: {MAX_CHARS}")
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    answer = form(boxed)
    if not answer:
        return Verdict(0.0, None, "unparsable", "the last box holds no text")
    if answer in variants or answer == form(gold):
        return Verdict(1.0, boxed)
    if mode == "contained":
        return Verdict(float(any(answer in variant for variant in variants)), boxed)
    return Verdict(max(similarity(answer, variant) for variant in variants) if mode == "anls" else 0.0, boxed)


def _variants(gold: str) -> list[str]:
    if not gold.lstrip().startswith("["):
        return [gold]
    try:
        variants = parse_json(gold)
    except ValueError:
        return [gold]  # not a list, but a text that starts with a bracket
    return variants if all(isinstance(variant, str) for variant in variants) else [gold]


def similarity(a: str, b: str) -> float:
    """Normalized Levenshtein similarity in [`THRESHOLD`, 1], or 0; neither text is empty."""
    shorter, longer = sorted((a, b), key=len)
    if len(shorter) < THRESHOLD * len(longer):  # at least the missing characters differ
        return 0.0
    value = 1 - edit_distance(shorter, longer) / len(longer)
    return value if value >= THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, a column of the usual table at a time in the bits of integers (Myers 1999, Hyyrö 2003)."""
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # where a column rises and falls by 1 from row to row, and its last value
    for character in b:
        same = places.get(character, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        right_up = (down | ~(diagonal | up)) & full
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = right_up << 1 | 1, right_down << 1
        up = (right_down | ~(diagonal | right_up)) & full
        down = right_up & diagonal & full
    return distance
