"""Numbers: the reply's last box holds the right one."""

from __future__ import annotations

import math

from spark_vl.answers import last_boxed, parse_number
from spark_vl.records import BadRecordError, PromptRecord, Verdict

TOLERANCE = 1e-6
"""Relative to the larger of the two numbers: room for rounding in the last printed digits, not for another answer."""


def verify_number(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's number equals `record.gold` within `TOLERANCE`; `parsed` is the number as written."""
    gold = parse_number(last_boxed(record.gold) or record.gold)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r} is not one finite number")
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    value = parse_number(boxed)
    if value is None:
        return Verdict(0.0, None, "unparsable", "the last box is not one finite number")
    return Verdict(float(math.isclose(value, gold, rel_tol=TOLERANCE)), boxed)
