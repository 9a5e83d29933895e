"""Counts: the reply's last box holds the exact number."""

from __future__ import annotations

from spark_vl.answers import last_boxed, parse_count
from spark_vl.records import BadRecordError, PromptRecord, Verdict


def verify_count(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's count equals `record.gold`; `parsed` is its digits.

    A count is a whole number from 0 in digits ("1,234", "5.0") or one of the words "none" and "zero" to "twenty".
    "about 5", "5 or 6", "5 dogs", "no" and "a" are not counts.
    """
    gold = parse_count(last_boxed(record.gold) or record.gold)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not a whole number from 0")
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    count = parse_count(boxed)
    if count is None:
        return Verdict(0.0, None, "unparsable", "the last box is not one whole number from 0")
    return Verdict(float(count == gold), str(count))
