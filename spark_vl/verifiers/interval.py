"""Intervals: the reply's last box holds the right one, or the right union of several."""

from __future__ import annotations

import math

from spark_vl.answers import TOLERANCE, Interval, last_boxed, parse_intervals, same_unit
from spark_vl.records import BadRecordError, PromptRecord, Verdict


def verify_interval(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's intervals have the same union as those of `record.gold`; `parsed` is the answer as written.

    Ends are compared as numbers with units; both must be open, or both closed. See `parse_intervals` for how intervals
    are written.
    """
    gold = parse_intervals(last_boxed(record.gold) or record.gold)
    if gold is None:
        raise BadRecordError(
            record.id, f"gold {record.gold!r:.200} is not an interval with numbers or infinity as its ends"
        )
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    answer = parse_intervals(boxed)
    if answer is None:
        return Verdict(0.0, None, "unparsable", "the last box is not an interval")
    return Verdict(float(len(answer) == len(gold) and all(map(_same, answer, gold))), boxed)


def _same(answer: Interval, gold: Interval) -> bool:
    return (
        (answer.low_open, answer.high_closed) == (gold.low_open, gold.high_closed)
        and same_unit(answer.unit, gold.unit)
        and math.isclose(answer.low, gold.low, rel_tol=TOLERANCE)
        and math.isclose(answer.high, gold.high, rel_tol=TOLERANCE)
    )
