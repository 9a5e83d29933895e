"""Reads the cells of an untrusted row, and numbers from other files that are not trusted.

Every function raises ValueError, which names the column, what was found and what is allowed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from spark_vl.data.sources import Row


def cell(row: Row, column: str) -> Any:
    """The value of `column`, of any type."""
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {', '.join(map(repr, row)) or 'none':.300}")
    return row[column]


def optional(row: Row, column: str | None) -> Any:
    """The value of `column`, of any type; None where there is no such column, or the row leaves it out."""
    return None if column is None else row.get(column)


def text(row: Row, column: str) -> str:
    """A text that is not blank, unchanged."""
    value = unicode(cell(row, column), column)
    if not value.strip():
        raise ValueError(f"{column!r} is empty")
    return value


def answer(row: Row, column: str) -> str:
    """A text unchanged; a number, true or false, or a list (without nulls at its end) or mapping that is not empty, as
    JSON."""
    value = cell(row, column)
    if isinstance(value, str):
        return text(row, column)
    if isinstance(value, list | tuple):
        value = without_padding(value)
        if None in value:
            raise ValueError(f"{column!r} has null as item {value.index(None) + 1}; nulls are allowed at its end")
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ([], {}):
        allowed = "a text, a finite number, true, false, a list or a mapping is allowed"
        raise ValueError(f"{column!r} is {type_name(value)}; {allowed}")
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{column!r} is {type_name(value)}, which is not JSON: {error}") from error
    return unicode(written, column)


def unicode(value: Any, column: str) -> str:
    """`value`, which `column` holds, as a text that can be encoded; it may be blank."""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type_name(value)}; text is allowed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column!r} is not valid Unicode: {error}") from error
    return value


def identifier(row: Row, column: str, longest: int = 1000) -> str:
    """An integer, or a printable text of at most `longest` characters that is not blank."""
    value = cell(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    value = text(row, column)
    if len(value) > longest:  # the ids of all rows are held in memory
        raise ValueError(f"{column!r} has {len(value)} characters; {longest} are allowed")
    if not value.isprintable():
        raise ValueError(f"{column!r} is {value!r:.100}; printable text is allowed")
    return value


def count(facts: Mapping[str, Any], name: str, *, least: int = 0, below: int = 2**53) -> int:
    """A number of things, such as one of a saved state; 2⁵³ is more than a run has time for."""
    value = facts[name]
    if type(value) is not int or not least <= value < below:
        raise ValueError(f"{name}: found {value!r:.80}; allowed: a whole number from {least}")
    return value


def items(value: Any) -> list[Any]:
    """The items of a list, which may also be written as JSON; null is an empty list; anything else is one item."""
    value = _listed(value)
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def without_padding(found: Sequence[Any]) -> list[Any]:
    """A list without the nulls at its end: tables of fixed width fill a short list up with them."""
    filled = list(found)
    while filled and filled[-1] is None:
        filled.pop()
    return filled


def options(row: Row, column: str) -> tuple[str, ...]:
    """2 to 26 texts that are not blank, or none. They may also be written as JSON."""
    found = _listed(cell(row, column))
    if isinstance(found, list | tuple):
        found = without_padding(found)
    if found is None or found == []:
        return ()
    if not isinstance(found, list) or not all(isinstance(item, str) and item.strip() for item in found):
        raise ValueError(
            f"{column!r} is {found!r:.80}; a list of texts that are not empty is allowed, with nulls at its end"
        )
    if not 2 <= len(found) <= len(ascii_uppercase):
        raise ValueError(f"{column!r} has {len(found)} options; 2 to {len(ascii_uppercase)} are allowed")
    return tuple(unicode(item.strip(), column) for item in found)


def _listed(value: Any) -> Any:
    """`value`, or where it is the text of a JSON list, as all are in CSV, that list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def type_name(value: Any) -> str:
    """A value's type, for messages; never the bytes of an image."""
    if isinstance(value, dict):
        held = ", ".join(f"{key!r:.40}: {type(item).__name__}" for key, item in value.items())
        return f"a mapping of {held or 'nothing':.200}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
