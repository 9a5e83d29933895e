"""Reads the boxes or points of an answer, and compares boxes. Images do not occur here.

Every function here runs in time linear in the length of its text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from spark_vl.answers import last_boxed

MAX_SHAPES = 1000
"""An answer with more boxes or points is unreadable: it enumerates places instead of locating something."""

MAX_CHARS = 64_000
"""Limit for an answer, which leaves room for `MAX_SHAPES` boxes with short labels."""

Key = Literal["bbox_2d", "point_2d"]
"""What a box and a point are called in JSON."""

_COUNTS = {"bbox_2d": 4, "point_2d": 2}
_POINT = "coordinate"
"""What a point to click on is called."""


class UnreadableError(ValueError):
    """A text cannot be read as an answer; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A box or a point."""

    coordinates: tuple[float, ...]
    """`[x1, y1, x2, y2]` with the upper left corner first, or `[x, y]`."""
    label: str | None = None
    """What is there; None if the answer does not say."""


_NUMBER = re.compile(r"-?[0-9]++(?:\.[0-9]++)?+")
_PAIR = rf"\(\s*+{_NUMBER.pattern}\s*+,\s*+{_NUMBER.pattern}\s*+\)"
_PAIRS = re.compile(rf"{_PAIR}(?:\s*+,?+\s*+{_PAIR})*+")
_NUMBERS = rf"{_NUMBER.pattern}(?:\s*+,\s*+{_NUMBER.pattern})++"
_FLAT = re.compile(rf"{_NUMBERS}|\(\s*+{_NUMBERS}\s*+\)")
_LATEX = re.compile(r"\\(?:left|right|q?quad)(?![A-Za-z])|\\[ ,;:!]|[$~]")
_FENCED = re.compile(r"\A```(?:json)?\s++(.*?)\s*```\Z", re.DOTALL)
_BRACKET = re.compile(rf"(?P<open>[\[{{])|(?P<close>[\]}}])|{_PAIRS.pattern}")


def find_answer(reply: str) -> str:
    r"""The part of `reply` that holds its boxes or points, without white space around it.

    It is the first of these that the reply has, whether or not that can be read:

    1. the content of its last `\boxed{...}` (see `last_boxed`), without a fence around it or backslashes before braces;
    2. the content of its last fenced block that opens with three backticks and `json`, and closes;
    3. the last of its outermost `[...]`, `{...}` and runs of `(x, y)` pairs. Brackets that do not close, as in a reply
       that was cut off, hold no answer, nor do brackets inside them. Brackets in quotes count as brackets.

    Raises:
        UnreadableError: the reply has none of them.
    """
    if (boxed := last_boxed(reply)) is not None:
        return _FENCED.sub(r"\1", boxed).replace(r"\{", "{").replace(r"\}", "}")
    for fenced in reversed(reply.split("```")[1:-1:2]):
        if fenced.startswith("json"):
            return fenced.removeprefix("json").strip()
    answer, depth, start = None, 0, 0
    for match in _BRACKET.finditer(reply):
        if match["open"]:
            start = start if depth else match.start()
            depth += 1
        elif match["close"]:
            if depth == 1:
                answer = reply[start : match.end()]
            depth = max(depth - 1, 0)
        elif not depth:
            answer = match.group()
    if answer is None:
        raise UnreadableError("no box, no JSON block, no brackets that close")
    return answer


def read_shapes(answer: str, key: Key, *, corners: bool = True) -> list[Shape]:
    r"""The boxes (`bbox_2d`) or points (`point_2d`) of `answer`, which must hold nothing else, in its own coordinates.

    Accepted: an object `{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}`, whose label may be missing and whose other keys
    are ignored; plain numbers `[x1, y1, x2, y2]`; a list of either; pairs `(x1, y1), (x2, y2)`, two for a box. Points
    are written likewise, and their key may be `coordinate`. A single box or point may also be bare numbers, in
    parentheses or not, two pairs `[[x1, y1], [x2, y2]]`, or `"bbox_2d": [...]` without braces. Dollar signs, `\left`
    and LaTeX spaces are ignored. Numbers may have decimals, but no quotes. Coordinates are not checked.

    Args:
        corners: whether `[[x1, y1], [x2, y2]]` is a box; else it is two points.

    Raises:
        UnreadableError: the answer is anything else: not JSON, a key given twice, another count of numbers, more than
            `MAX_CHARS` or `MAX_SHAPES`.
    """
    if len(answer) > MAX_CHARS:
        raise UnreadableError(f"the answer has {len(answer)} characters, more than {MAX_CHARS}")
    count = _COUNTS[key]
    answer = answer.strip("$ \n") if '"' in answer else _LATEX.sub(" ", answer).strip()  # labels are not changed
    if answer.startswith('"'):
        answer = f"{{{answer}}}"
    if answer.startswith(("[", "{")):
        try:
            value = json.loads(answer, parse_int=float, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"the answer is not JSON: {error}") from None
        if isinstance(value, dict) or _is_flat(value) or (corners and _is_corners(value, key)):
            value = [value]
        shapes = [_shape(item, key) for item in value]
    elif _PAIRS.fullmatch(answer):
        numbers = [float(number) for number in _NUMBER.findall(answer)]
        if len(numbers) % count:
            raise UnreadableError(f"the answer has {len(numbers)} numbers, not {count} for each {key}")
        shapes = [Shape(tuple(numbers[i : i + count])) for i in range(0, len(numbers), count)]
    elif _FLAT.fullmatch(answer):
        shapes = [_shape([float(number) for number in _NUMBER.findall(answer)], key)]
    else:
        raise UnreadableError("the answer is neither JSON nor numbers")
    if len(shapes) > MAX_SHAPES:
        raise UnreadableError(f"the answer has {len(shapes)} of {key}, more than {MAX_SHAPES}")
    return shapes


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):  # two answers, of which JSON would take the second
        raise ValueError("an object has a key twice")
    return items


def _shape(item: Any, key: Key) -> Shape:
    label = None
    if isinstance(item, dict):
        named = [name for name in (key, _POINT) if name in item] if key == "point_2d" else [key]
        item, label = item.get(*named) if len(named) == 1 else None, item.get("label")
    if _is_corners(item, key):
        item = [*item[0], *item[1]]
    count = _COUNTS[key]
    if not (_is_flat(item) and len(item) == count):
        raise UnreadableError(f"{key}: found {item!r:.80}; allowed: a list of {count} numbers")
    if not isinstance(label, str | None):
        raise UnreadableError(f"label: found {label!r:.80}; allowed: a text")
    return Shape(tuple(item), label)


def _is_flat(item: Any) -> bool:
    """Whether it is a list of numbers that is not empty."""
    return isinstance(item, list) and item != [] and all(isinstance(number, float) for number in item)


def _is_corners(item: Any, key: Key) -> bool:
    """Whether it is a box as a list of its two corners."""
    return (
        key == "bbox_2d"
        and isinstance(item, list)
        and len(item) == 2
        and all(_is_flat(corner) and len(corner) == 2 for corner in item)
    )


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes `[x1, y1, x2, y2]` of positive area; coordinates are continuous, so a
    box is `x2 - x1` wide."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
