"""One verdict at a time, under a deadline: for notebooks and scripts, where there is neither a record nor a pool."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from spark_vl.records import BadRecordError, ImageSize, PromptRecord, Verdict
from spark_vl.verifiers.base import absolute_name, bad_record_of, check_settings
from spark_vl.verifiers.pool import VerifierPool


def verify(
    verifier: str,
    /,
    completion: str,
    gold: Any,
    *,
    choices: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
    processed_size: tuple[int, int] | None = None,
    timeout_s: float = 10.0,
    **settings: Any,
) -> Verdict:
    r"""Scores one completion: `verify("number", r"\boxed{5}", "5.0").score == 1`.

    A verifier that may hang runs in a worker process. The first call starts it, and the next one after a timeout (math:
    one to two seconds); a call beyond that costs less than a millisecond. Calls from several threads take turns. Each
    `timeout_s` in use has a worker of its own. For many completions use a `VerifierPool`, which has several workers.

    Args:
        verifier: its name: a key of `VERIFIERS`, `module:function`, or `./file.py:function`.
        completion: the model's whole reply.
        gold: the right answer: a text, or a number, bool, list or mapping, which is taken as JSON.
        choices: options of a choice question in order, or the labels of a judgment.
        image_size: [width, height] of the image as it was given, upright.
        processed_size: [width, height] as the model saw it. None: as `image_size`.
        timeout_s: wall-clock seconds, the verifier's imports not counted, after which the status is `timeout`.
        settings: of the verifier, such as `relative=0.05`.

    Returns:
        The verdict. Its status is `error` if the verifier itself fails; the detail says why.

    Raises:
        ValueError: unknown verifier, a setting that it does not have, or a `timeout_s` that is not allowed.
        BadRecordError: the verifier cannot use `gold`, or a setting.
        RuntimeError: the worker cannot start, or cannot import the verifier.
    """
    verifier = absolute_name(verifier, Path.cwd())
    check_settings(verifier, settings)
    record = bare_record(
        verifier, gold, choices=choices, image_size=image_size, processed_size=processed_size, settings=settings
    )
    (verdict,) = _pool(timeout_s).verify([(completion, record)])
    if (reason := bad_record_of(verdict, record)) is not None:
        raise BadRecordError(record.id, reason)
    return verdict


@cache
def _pool(timeout_s: float) -> VerifierPool:
    pool = VerifierPool(workers=1, timeout_s=timeout_s)
    atexit.register(pool.close)
    return pool


def bare_record(
    verifier: str,
    gold: Any,
    *,
    choices: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
    processed_size: Sequence[int] | None = None,
    settings: Mapping[str, Any],
) -> PromptRecord:
    """A record that holds only what a verifier reads. For the arguments see `verify`."""
    sizes: tuple[ImageSize, ...] = ()
    if image_size is not None:
        (width, height), (seen_width, seen_height) = image_size, processed_size or image_size
        sizes = (ImageSize((width, height), (seen_width, seen_height)),)
    return PromptRecord(
        id="verify",
        kind="problem",
        messages=(),
        question=(),
        gold=json.dumps(gold, ensure_ascii=False) if isinstance(gold, bool | list | tuple | Mapping) else str(gold),
        verifier=verifier,
        recipe="",
        choices=tuple(choices),
        settings=tuple(settings.items()),
        image_sizes=sizes,
        coordinates="resized",
    )
