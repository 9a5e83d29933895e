"""Answers of several parts: items, intervals, JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from spark_vl.answers.boxed import MATH_MARKS, MAX_CHARS, SIZES, last_boxed, one_line, plain, unmarked, unstyled
from spark_vl.answers.quantities import Quantity, parse_quantity

T = TypeVar("T")

# ── items ──

MAX_ITEMS = 256
"""A longer list, and a union of more intervals, is not read."""
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_NOTHING = re.compile(r"\\(?:emptyset|varnothing)|∅")
_LAST_AND = re.compile(r"(?:^| )and ")


def parse_items(text: str, conjunction: bool = True) -> tuple[str, ...] | None:
    r"""The items that `text`, the content of a box, lists; None if it is not a list of at most `MAX_ITEMS`.

    A list is a JSON array of texts, numbers and truth values, or items with separators, in brackets or not: "1, 2",
    `\{1, 2\}`, "[a; b]". The separators are semicolons; if there are none, commas; if there are none either, line
    breaks. Separators within brackets belong to an item. "[]", `\{\}` and `\emptyset` are the empty list: ().

    Args:
        conjunction: whether "and" separates the last items ("a, b and c").
    """
    if len(text) > MAX_CHARS:
        return None
    lines = filter(None, map(one_line, unstyled(SIZES.sub("", text)).splitlines()))
    words = unmarked("\n".join(lines).replace(r"\{", "{").replace(r"\}", "}"), MATH_MARKS)
    if words.startswith("["):
        try:
            values = parse_json(words)
        except ValueError:
            pass  # not JSON, but perhaps "[a, b]"
        else:
            scalar = all(isinstance(value, str | int | float) for value in values)
            items = tuple(value if isinstance(value, str) else json.dumps(value) for value in values) if scalar else ()
            return items if scalar and len(items) <= MAX_ITEMS else None
    close, separators = _top_level(words)
    if close is not None and close == len(words) - 1:
        words = words[1:-1].strip()
        _, separators = _top_level(words)
        if not words:
            return ()
    if _NOTHING.fullmatch(words):
        return ()
    marks = next(filter(None, ([i for i in separators if words[i] == mark] for mark in ";,\n")), [])
    starts, ends = [0, *(i + 1 for i in marks)], [*marks, len(words)]
    parts = [words[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    if conjunction:
        first, *more = _LAST_AND.split(parts[-1])
        parts[-1:] = [first, *more] if first or len(parts) == 1 else more
    return tuple(parts) if len(parts) <= MAX_ITEMS and all(map(plain, parts)) else None


def _top_level(text: str) -> tuple[int | None, list[int]]:
    """The index at which a bracket that opens `text` closes (or None), and those of the separators outside brackets."""
    stack: list[str] = []
    first, separators = None, []
    for i, mark in enumerate(text):
        if mark in _BRACKETS:
            stack.append(_BRACKETS[mark])
        elif stack and mark == stack[-1]:
            stack.pop()
            if not stack and first is None and text[0] in _BRACKETS:
                first = i
        elif not stack and mark in ";,\n":
            separators.append(i)
    return first, separators


# ── intervals ──


@dataclass(frozen=True, order=True)
class Interval:
    """The numbers from `low` to `high`. Infinite ends are open."""

    low: float
    low_open: bool
    high: float
    high_closed: bool
    unit: str = ""
    """Unit of both ends, as in `Quantity`."""


_PIECE = re.compile(r"([\[(]) ?([^,;()\[\]]+)[,;] ?([^,;()\[\]]+)([\])])")
_UNION = re.compile(r" ?(?:\\cup(?![A-Za-z])|∪|\bU\b) ?")
_ELEMENT = re.compile(r"[A-Za-z] ?(?:\\in(?![A-Za-z])|∈) ?")
_INFINITY = re.compile(r"([-+]?) ?(?:\\infty|∞|inf(?:inity)?)", re.IGNORECASE)


def parse_intervals(text: str) -> tuple[Interval, ...] | None:
    r"""Reads `text`, the content of a box, as an interval or a union of intervals: disjoint ones, from low to high.

    Accepted: "(1, 2]", `x \in [0, \infty)`, `(-\infty; 0) \cup (1, 2)`. Ends are numbers as in `parse_quantity`; they
    may have one unit. Intervals that overlap or touch are merged. None for anything else, also for an interval that is
    empty or closed at infinity.
    """
    if len(text) > MAX_CHARS:
        return None
    words = unmarked(SIZES.sub("", one_line(text)).replace("{,}", ""), MATH_MARKS)
    parts = _UNION.split(words[match.end() :] if (match := _ELEMENT.match(words)) else words)
    if len(parts) > MAX_ITEMS:
        return None
    pieces = [interval for part in parts if (interval := _interval(unmarked(part, MATH_MARKS)))]
    if len(pieces) < len(parts):
        return None
    if len(units := {piece.unit for piece in pieces if piece.unit}) > 1:
        return None
    unit = "".join(units)
    union: list[Interval] = []
    for piece in sorted(replace(piece, unit=unit) for piece in pieces):
        last = union[-1] if union else None
        if last and (piece.low < last.high or (piece.low == last.high and (last.high_closed or not piece.low_open))):
            high, closed = max((last.high, last.high_closed), (piece.high, piece.high_closed))
            union[-1] = replace(last, high=high, high_closed=closed)
        else:
            union.append(piece)
    return tuple(union)


def _interval(text: str) -> Interval | None:
    match = _PIECE.fullmatch(text)
    if match is None:
        return None
    ends = [end for text in (match[2], match[3]) if (end := _end(text))]
    if len(ends) < 2:
        return None
    (low, high), closed = [end.value for end in ends], [match[1] == "[", match[4] == "]"]
    if any(math.isinf(end.value) and shut for end, shut in zip(ends, closed, strict=True)):
        return None
    if len(units := {end.unit for end in ends if end.unit}) > 1 or not (low < high or (low == high and all(closed))):
        return None
    return Interval(low, not closed[0], high, closed[1], "".join(units))


def _end(text: str) -> Quantity | None:
    """A number or plus or minus infinity."""
    if match := _INFINITY.fullmatch(text.strip().replace("−", "-")):
        return Quantity(-math.inf if match[1] == "-" else math.inf, "")
    return parse_quantity(text)


# ── JSON ──


def parse_json(text: str) -> Any:
    """The value of a JSON text, read more strictly than by `json.loads`.

    Raises:
        ValueError: it is not JSON, an object has a key twice, it nests too deep, or it holds NaN or Infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nests too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_BLOCK = re.compile(r"```json\b(.*?)```", re.DOTALL | re.IGNORECASE)


def last_json_object(reply: str) -> dict[str, Any] | None:
    r"""The JSON object in the last box of `reply` or, if it has no box, in its last closed block after "```json".

    None if that is not a JSON object (see `parse_json`). `\text{...}` and dollar signs around it are removed, and `\{`
    is read as `{`.
    """
    text = last_boxed(reply)
    if text is None:
        blocks = _BLOCK.findall(reply)
        text = blocks[-1] if blocks else ""
    text = unstyled(text).strip(" $\n\t")
    if text.startswith(r"\{"):
        text = text.replace(r"\{", "{").replace(r"\}", "}")
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def distinct(items: Iterable[T], same: Callable[[T, T], bool]) -> list[T]:
    """`items` without those that are the same as an earlier one."""
    found: list[T] = []
    for item in items:
        if not any(same(item, other) for other in found):
            found.append(item)
    return found
