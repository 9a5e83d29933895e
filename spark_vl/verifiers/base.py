"""What a verifier is, and how one is found by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from math import inf
from types import ModuleType
from typing import Any, Protocol, SupportsFloat

from spark_vl.answers import last_boxed
from spark_vl.records import BadRecordError, ImageSize, PromptRecord, Verdict


class Verifier(Protocol):
    """Scores one completion. Raises `BadRecordError` if the record's own gold means nothing to it."""

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
"""Where each registered name is: `module:function`, imported on first use."""


@cache
def get_verifier(name: str) -> Verifier:
    """The verifier called `name`: a key of `VERIFIERS`, or any `module:function` that can be imported.

    A class in the place of the function is made once in each process, without arguments; its instance is called.

    Raises:
        ValueError: `name` is neither; an exception raised *by* the user's module on import comes through as it is.
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
    """The verdict of the record's verifier, in this process and without a deadline; numbers and texts in it are plain.

    An exception (a bug in the verifier, a bad gold, a verdict that is none) becomes status `error`, score 0.
    """
    try:
        verdict = get_verifier(record.verifier)(completion, record)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"verifier {record.verifier!r} returned {verdict!r:.200}, not a Verdict")
        score, parsed, status, detail = verdict.score, verdict.parsed, verdict.status, verdict.detail
        statuses = ("ok", "unparsable", "timeout", "error")
        for field, value, fits, allowed in (
            # NumPy's numbers and a tensor's only one will do as a score; a text, which float would read, will not.
            ("score", score, isinstance(score, SupportsFloat) and 0 <= float(score) <= 1, "a number in [0, 1]"),
            ("parsed", parsed, parsed is None or isinstance(parsed, str), "a text or None"),
            ("status", status, isinstance(status, str) and status in statuses, ", ".join(statuses)),
            ("detail", detail, isinstance(detail, str), "a text"),
        ):
            if not fits:
                raise TypeError(f"verifier {record.verifier!r}: {field}: found {value!r:.200}; allowed: {allowed}")
        plain = str.__str__  # what a text is, also where its class is not str itself
        parsed = None if parsed is None else plain(parsed)
        return Verdict(float(score), parsed, plain(status), plain(detail), verdict.shaping)
    except Exception as error:
        return Verdict(0.0, None, "error", f"{type(error).__name__}: {error}"[:500])


def verify(
    kind: str,
    completion: str,
    gold: str,
    *,
    choices: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    processed_size: tuple[int, int] | None = None,
    **settings: Any,
) -> Verdict:
    r"""Scores one completion in this process, with no deadline: `verify("number", r"\boxed{5}", "5.0").score == 1`.

    Args:
        kind: name of the verifier.
        completion: the model's whole reply.
        gold: the right answer.
        choices: options of a choice question in order, or the labels of a judgment.
        image_size: [width, height] of the image as it was given, upright.
        processed_size: [width, height] as the model saw it, in whose pixels replies are written unless the setting
            `coordinates` says otherwise. None: as `image_size`.
        settings: of the verifier, such as `relative=0.05`.

    Raises:
        ValueError: unknown verifier, or a setting that it does not have.
        BadRecordError: `gold` means nothing to the verifier.
    """
    check_settings(kind, settings)
    record = bare_record(
        kind, gold, choices=choices, image_size=image_size, processed_size=processed_size, settings=settings
    )
    return get_verifier(kind)(completion, record)


def bare_record(
    kind: str,
    gold: str,
    *,
    choices: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
    processed_size: Sequence[int] | None = None,
    settings: Mapping[str, Any],
) -> PromptRecord:
    """A record of which there is only what a verifier reads. For the arguments see `verify`."""
    sizes = ()
    if image_size is not None:
        sizes = (ImageSize(tuple(image_size), tuple(processed_size or image_size)),)
    return PromptRecord(
        id="verify",
        kind="problem",
        messages=(),
        question=(),
        gold=gold,
        verifier=kind,
        recipe="",
        choices=tuple(choices),
        settings=tuple(settings.items()),
        image_sizes=sizes,
        coordinates="resized",
    )


def check_settings(kind: str, settings: Mapping[str, Any]) -> None:
    """Compares `settings` with those of the verifier: the mapping `SETTINGS` of its module, name → default.

    A value has the type of its default (an integer does for a fraction), or is one of the texts that a tuple lists,
    whose first is the default. A user's own verifier takes any settings if its module has no `SETTINGS`.

    Raises:
        ValueError: one is unknown, or not of the kind that is allowed.
    """
    known = _settings(kind)
    if known is None:
        return
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{kind}: {name!r} is no setting; allowed: {', '.join(known) or 'none'}")
        default = known[name]
        if isinstance(default, tuple):
            if value not in default:
                raise ValueError(f"{kind}: {name}: found {value!r}; allowed: {', '.join(map(repr, default))}")
        elif isinstance(default, bool) is not isinstance(value, bool) or not isinstance(
            value, int | float if isinstance(default, float) else type(default)
        ):
            raise ValueError(f"{kind}: {name}: found {value!r}; allowed: {type(default).__name__}, like {default!r}")
        elif not isinstance(value, str) and not 0 <= value < inf:
            raise ValueError(f"{kind}: {name}: found {value!r}; allowed: a finite number from 0")


def settings_of(record: PromptRecord) -> dict[str, Any]:
    """The settings of the record's verifier, defaults filled in."""
    defaults = {
        name: default[0] if isinstance(default, tuple) else default
        for name, default in (_settings(record.verifier) or {}).items()
    }
    return defaults | dict(record.settings)


def _settings(kind: str) -> Mapping[str, Any] | None:
    return vars(_module(kind)).get("SETTINGS", {} if kind in VERIFIERS else None)


def _module(kind: str) -> ModuleType:
    """The module of the verifier called `kind`."""
    get_verifier(kind)  # says what is wrong with an unknown name
    return sys.modules[VERIFIERS.get(kind, kind).partition(":")[0]]


def boxed_gold(record: PromptRecord) -> str:
    r"""The shortest right completion: the record's gold in `\boxed{}`, as it is if it holds a box already.

    A verifier whose golds are not written as its answers are has a `boxed_gold` of its own in its module. Coordinates
    need a record that has been processed.
    """
    own = vars(_module(record.verifier)).get("boxed_gold", boxed_gold)
    if own is not boxed_gold:  # nor this one, which the module may have imported
        return own(record)
    return record.gold if last_boxed(record.gold) is not None else rf"\boxed{{{record.gold}}}"


def check_gold(record: PromptRecord) -> None:
    """Raises `BadRecordError` unless the record's verifier gives the record's own gold full marks.

    In this process, with no deadline: golds from an untrusted source are for `check_golds`.
    """
    if fault := gold_fault(record, get_verifier(record.verifier)(boxed_gold(record), record)):
        raise fault


def gold_fault(record: PromptRecord, verdict: Verdict) -> BadRecordError | None:
    """What `verdict`, on the record's own gold, says of it. None: full marks."""
    if verdict.score == 1:
        return None
    reason = f"the {record.verifier} verifier gives its own gold {record.gold!r:.200} {verdict.score:g} of 1"
    return BadRecordError(record.id, f"{reason} ({verdict.status}{verdict.detail and ': ' + verdict.detail})")
