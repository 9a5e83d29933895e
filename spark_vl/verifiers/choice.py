"""Choice questions: the reply's last box names the right option, by its letter or by its text."""

from __future__ import annotations

from spark_vl.answers import last_boxed, match_choice
from spark_vl.records import BadRecordError, PromptRecord, Verdict


def verify_choice(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion names the option that `record.gold` names; `parsed` is its letter."""
    gold = match_choice(last_boxed(record.gold) or record.gold, record.choices)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r} names no single choice of {list(record.choices)}")
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    letter = match_choice(boxed, record.choices)
    if letter is None:
        return Verdict(0.0, None, "unparsable", "the last box names no single choice")
    return Verdict(float(letter == gold), letter)
