"""What a verifier is, and how one is found by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from math import inf
from types import ModuleType
from typing import Any, Protocol, SupportsFloat, cast

from spark_vl.answers import last_boxed
from spark_vl.records import PromptRecord, Status, Verdict, writable


class Verifier(Protocol):
    """Scores one completion. Raises `BadRecordError` if it cannot use the record's own gold."""

    def __call__(self, completion: str, record: PromptRecord) -> Verdict: ...


VERIFIERS: dict[str, str] = {
    "math": "spark_vl.verifiers.math:verify_math",
    "choice": "spark_vl.verifiers.choice:verify_choice",
    "number": "spark_vl.verifiers.number:verify_number",
    "count": "spark_vl.verifiers.count:verify_count",
    "text": "spark_vl.verifiers.text:verify_text",
    "list": "spark_vl.verifiers.list:verify_list",
    "set": "spark_vl.verifiers.set:verify_set",
    "interval": "spark_vl.verifiers.interval:verify_interval",
    "json_field": "spark_vl.verifiers.json_field:verify_json_field",
    "judgment": "spark_vl.verifiers.judgment:verify_judgment",
    "iou": "spark_vl.verifiers.iou:verify_iou",
    "point": "spark_vl.verifiers.point:verify_point",
    "detection": "spark_vl.verifiers.detection:verify_detection",
}
"""Registered name → `module:function`, imported on first use."""


@cache
def get_verifier(name: str) -> Verifier:
    """The verifier called `name`: a key of `VERIFIERS`, or any `module:function` that can be imported.

    A class is instantiated once in each process, without arguments, and its instance is called.

    Raises:
        ValueError: `name` is neither. An exception that the user's module raises on import is not caught.
    """
    module_name, colon, function_name = VERIFIERS.get(name, name).partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"unknown verifier {name!r}; allowed: {', '.join(sorted(VERIFIERS))}, or 'module:function'")
    try:
        verifier = vars(importlib.import_module(module_name))[function_name]
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(f"verifier {name!r}: there is no module {error.name!r} on sys.path") from None
    except KeyError:
        raise ValueError(f"verifier {name!r}: module {module_name!r} has no {function_name!r}") from None
    if isinstance(verifier, type):
        verifier = verifier()
    if not callable(verifier):
        raise ValueError(f"verifier {name!r}: {function_name!r} is not callable but {verifier!r}")
    return verifier


def run_verifier(completion: str, record: PromptRecord) -> Verdict:
    """The verdict of the record's verifier, in this process and without a deadline; its values are plain Python types.

    An exception (a bug in the verifier, a bad gold, a result that is not a verdict) becomes status `error`, score 0.
    """
    try:
        verdict = get_verifier(record.verifier)(completion, record)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"verifier {record.verifier!r} returned {verdict!r:.200}, not a Verdict")
        score, parsed, status, detail = verdict.score, verdict.parsed, verdict.status, verdict.detail
        statuses = ("ok", "unparsable", "timeout", "error")
        for field, value, fits, allowed in (
            # A score may be a NumPy number or a tensor with one element, but not a text, which `float` would read.
            ("score", score, isinstance(score, SupportsFloat) and 0 <= float(score) <= 1, "a number in [0, 1]"),
            ("parsed", parsed, parsed is None or isinstance(parsed, str), "a text or None"),
            ("status", status, isinstance(status, str) and status in statuses, ", ".join(statuses)),
            ("detail", detail, isinstance(detail, str), "a text"),
        ):
            if not fits:
                raise TypeError(f"verifier {record.verifier!r}: {field}: found {value!r:.200}; allowed: {allowed}")
        # A user's function may return a subclass of str, and what no file can hold.
        parsed = None if parsed is None else writable(parsed)
        return Verdict(float(score), parsed, cast(Status, writable(status)), writable(detail[:500]), verdict.shaping)
    except Exception as error:
        return Verdict(0.0, None, "error", writable(f"{type(error).__name__}: {error}"[:500]))


def check_settings(verifier: str, settings: Mapping[str, Any]) -> None:
    """Compares `settings` with those of the verifier: the mapping `SETTINGS` of its module, name → default.

    A value must have the type of its default (an integer is allowed for a float). Where the default is a tuple of
    texts, the value must be one of them, and the first is the default. A user's own verifier takes any settings if its
    module has no `SETTINGS`.

    Raises:
        ValueError: a setting is unknown, or its value is not allowed.
    """
    known = _settings(verifier)
    if known is None:
        return
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{verifier}: {name!r:.100} is not a setting; allowed: {', '.join(known) or 'none'}")
        default = known[name]
        if isinstance(default, tuple):
            if value not in default:
                raise ValueError(f"{verifier}: {name}: found {value!r:.100}; allowed: {', '.join(map(repr, default))}")
        elif isinstance(default, bool) is not isinstance(value, bool) or not isinstance(
            value, int | float if isinstance(default, float) else type(default)
        ):
            found = f"{verifier}: {name}: found {value!r:.100}"
            raise ValueError(f"{found}; allowed: {type(default).__name__}, like {default!r}")
        elif not isinstance(value, str) and not 0 <= value < inf:
            raise ValueError(f"{verifier}: {name}: found {value!r}; allowed: a finite number from 0")


def settings_of(record: PromptRecord) -> dict[str, Any]:
    """The settings of the record's verifier, defaults filled in."""
    defaults = {
        name: default[0] if isinstance(default, tuple) else default
        for name, default in (_settings(record.verifier) or {}).items()
    }
    return defaults | dict(record.settings)


def _settings(verifier: str) -> Mapping[str, Any] | None:
    return vars(_module(verifier)).get("SETTINGS", {} if verifier in VERIFIERS else None)


def _module(verifier: str) -> ModuleType:
    """The module that defines `verifier`."""
    get_verifier(verifier)  # raises on an unknown name
    return sys.modules[VERIFIERS.get(verifier, verifier).partition(":")[0]]


def boxed_gold(record: PromptRecord) -> str:
    r"""The shortest right completion: the record's gold in `\boxed{}`, unchanged if it holds a box already.

    A verifier whose answers are written differently from its golds has a `boxed_gold` of its own in its module. For
    coordinates the record must have been processed.
    """
    own = vars(_module(record.verifier)).get("boxed_gold", boxed_gold)
    if own is not boxed_gold:  # a module may also have imported this one
        return own(record)
    return record.gold if last_boxed(record.gold) is not None else rf"\boxed{{{record.gold}}}"
