"""A record's own gold, checked by its verifier in this process: what `check_golds` does in a pool."""

from __future__ import annotations

from spark_vl.records import PromptRecord
from spark_vl.verifiers.base import boxed_gold, get_verifier
from spark_vl.verifiers.golds import gold_fault


def check_gold(record: PromptRecord) -> None:
    """Raises `BadRecordError` unless the record's verifier gives the record's own gold full marks."""
    if fault := gold_fault(record, get_verifier(record.verifier)(boxed_gold(record), record)):
        raise fault
