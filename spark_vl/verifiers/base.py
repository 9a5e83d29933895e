"""What a verifier is, and how one is found by its name."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from math import inf
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any, Protocol, SupportsFloat, cast

from spark_vl.answers import last_boxed
from spark_vl.records import BadRecordError, PromptRecord, Status, Verdict, writable


class Verifier(Protocol):
    """Scores one completion. Raises `BadRecordError` if it cannot use the record's own gold. A user's own may return
    the score alone: a bool, a number in [0, 1], of NumPy too, or a tensor with one element."""

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


SELF_JUDGE = "self_judge"
"""In place of a verifier's name: there is no right answer, and the policy itself judges its completions, in training
alone (`SelfJudgeConfig`). No pool runs it."""


class UnknownVerifierError(ValueError):
    """There is no verifier of that name; the message says what is allowed."""


@cache
def get_verifier(name: str) -> Verifier:
    """The verifier called `name`: a key of `VERIFIERS`, `module:function`, or `folder/file.py:function`.

    A class is instantiated once in each process, without arguments, and its instance is called.

    Raises:
        UnknownVerifierError: `name` is none of them. An exception that the user's module raises on import is not
            caught.
    """
    place, colon, function = VERIFIERS.get(name, name).rpartition(":")
    if not (place and colon and function):
        allowed = f"{', '.join(sorted(VERIFIERS))}, 'module:function', or './file.py:function'"
        raise UnknownVerifierError(f"unknown verifier {name!r}; allowed: {allowed}")
    try:
        verifier = vars(_import(place))[function]
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UnknownVerifierError(f"verifier {name!r}: there is no module {error.name!r} on sys.path") from None
    except KeyError:
        kind = "module" if file_of(name) is None else "file"
        raise UnknownVerifierError(f"verifier {name!r}: {kind} {place!r} has no {function!r}") from None
    if isinstance(verifier, type):
        verifier = verifier()
    if not callable(verifier):
        raise UnknownVerifierError(f"verifier {name!r}: {function!r} is not callable but {verifier!r}")
    return verifier


def file_of(verifier: str) -> Path | None:
    """The file of a verifier `folder/file.py:function`; None for any other."""
    place = verifier.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


def absolute_name(verifier: str, folder: Path) -> str:
    """`verifier`; where it is in a file, with the file's absolute path, which it gives from `folder`."""
    file = file_of(verifier)
    return verifier if file is None else f"{(folder / file.expanduser()).resolve()}:{verifier.rpartition(':')[2]}"


def public_name(verifier: str) -> str:
    """`verifier`; where it is in a file, without the file's folder, which means nothing on another machine."""
    file = file_of(verifier)
    return verifier if file is None else f"{file.name}:{verifier.rpartition(':')[2]}"


def one_of(verifier: str, allowed: Collection[str]) -> str | None:
    """The one of `allowed` that `verifier`, a name from a row or a checkpoint, means; None if it means none. The folder
    of a file does not count, since rows and checkpoints come from other machines, unless two files have one name."""
    if verifier in allowed:
        return verifier
    alike = [name for name in allowed if file_of(name) and public_name(name) == public_name(verifier)]
    return alike[0] if len(alike) == 1 else None


def check_own_verifier(name: str) -> None:
    """Import the verifier `name`, a user's own, and look whether it can be called with a completion and a record.

    Raises:
        ValueError: it cannot be imported, is not there, or takes other arguments; says why, and in which line.
    """
    try:
        verifier = get_verifier(name)
    except UnknownVerifierError:
        raise
    except (Exception, SystemExit) as error:  # whatever a module does when it is run
        raise ValueError(f"verifier {name!r}: cannot be loaded: {_with_line(error)}") from error
    try:
        signature = inspect.signature(verifier)
    except ValueError:  # of some functions that are written in C
        return
    try:
        signature.bind("", None)
    except TypeError as error:
        found = f"{name.rpartition(':')[2]}{signature}"
        raise ValueError(f"verifier {name!r}: found {found}; it is called with (completion, record)") from error


def _with_line(error: BaseException, *, folder: bool = True) -> str:
    """What was raised, and in which line of which file outside of the kit.

    Args:
        folder: whether that of the file is named; what is published names none.
    """
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    file, line = frames[-1].filename, frames[-1].lineno
    if isinstance(error, SyntaxError):
        file, line = error.filename or file, error.lineno
    named = file if folder else Path(file).name
    return f"{type(error).__name__}: {error}" + (f" ({named}, line {line})" if file != __file__ else "")


def run_verifier(completion: str, record: PromptRecord) -> Verdict:
    """The verdict of the record's verifier, in this process and without a deadline; its values are plain Python types.

    A verifier that returns a score alone has read the last box. An exception (a bug in the verifier, a bad gold, a
    result that is neither) becomes status `error`, score 0.
    """
    name = public_name(record.verifier)
    try:
        verdict: Any = get_verifier(record.verifier)(completion, record)
        if not isinstance(verdict, Verdict):
            if not isinstance(verdict, SupportsFloat):  # a text, which `float` would read, is not one
                raise TypeError(f"verifier {name!r}: found {verdict!r:.200}; allowed: a Verdict, or a score in [0, 1]")
            verdict = Verdict(float(verdict), last_boxed(completion))
        score, parsed, status, detail = verdict.score, verdict.parsed, verdict.status, verdict.detail
        statuses = ("ok", "unparsable", "timeout", "error")
        for field, value, fits, allowed in (
            # A score may be a NumPy number or a tensor with one element.
            ("score", score, isinstance(score, SupportsFloat) and 0 <= float(score) <= 1, "a number in [0, 1]"),
            ("parsed", parsed, parsed is None or isinstance(parsed, str), "a text or None"),
            ("status", status, isinstance(status, str) and status in statuses, ", ".join(statuses)),
            ("detail", detail, isinstance(detail, str), "a text"),
        ):
            if not fits:
                raise TypeError(f"verifier {name!r}: {field}: found {value!r:.200}; allowed: {allowed}")
        # A user's function may return a subclass of str, and what no file can hold.
        parsed = None if parsed is None else writable(parsed)
        return Verdict(float(score), parsed, cast(Status, writable(status)), writable(detail[:500]), verdict.shaping)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if record.verifier not in VERIFIERS and not isinstance(error, BadRecordError):
            said = _with_line(error, folder=False)  # of one's own, a person wants to know the line
        return Verdict(0.0, None, "error", writable(said[:500]))


def bad_record_of(verdict: Verdict, record: PromptRecord) -> str | None:
    """Why the verifier cannot use the record itself, such as its gold; None: it can, or it failed otherwise."""
    start = f"{BadRecordError.__name__}: {record.id}: "  # as `run_verifier` writes it
    is_bad = verdict.status == "error" and verdict.detail.startswith(start)
    return verdict.detail.removeprefix(start) if is_bad else None


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
    return _import(VERIFIERS.get(verifier, verifier).rpartition(":")[0])


@cache
def _import(place: str) -> ModuleType:
    """The module of that name, or the file `….py`, run under a name of its own: its folder, which may hold a `json.py`,
    does not join `sys.path`."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place).resolve()
    if not file.is_file():
        raise UnknownVerifierError(f"verifier: there is no file {str(file)!r}")
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    spec = spec_from_file_location(name, file)
    assert spec is not None  # of a file that ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # there dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def boxed_gold(record: PromptRecord) -> str:
    r"""The shortest right completion: the record's gold in `\boxed{}`, unchanged if it holds a box already.

    A verifier whose answers are written differently from its golds has a `boxed_gold` of its own in its module. For
    coordinates the record must have been processed.
    """
    own = vars(_module(record.verifier)).get("boxed_gold", boxed_gold)
    if own is not boxed_gold:  # a module may also have imported this one
        return own(record)
    return record.gold if last_boxed(record.gold) is not None else rf"\boxed{{{record.gold}}}"
