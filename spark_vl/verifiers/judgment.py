"""Judgments: the reply's last box says one of the record's labels."""

from __future__ import annotations

from spark_vl.answers import match_label
from spark_vl.records import BadRecordError, PromptRecord, Verdict


def verify_judgment(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion says the label `record.gold`; `parsed` is the label that it says, spelled as in `choices`."""
    if record.gold not in record.choices:
        raise BadRecordError(
            record.id, f"gold {record.gold!r:.100} is not one of the labels {list(record.choices)!r:.200}"
        )
    label = match_label(completion, record.choices)
    if label is None:
        return Verdict(0.0, None, "unparsable", f"the last box says none of {list(record.choices)}")
    return Verdict(float(label == record.gold), label)
