"""Golds that mean nothing to their own verifier, found before anything is sampled for them."""

from __future__ import annotations

from collections.abc import Sequence

from spark_vl.records import BadRecordError, PromptRecord
from spark_vl.verifiers.base import boxed_gold, gold_fault
from spark_vl.verifiers.pool import VerifierPool


def check_golds(pool: VerifierPool, records: Sequence[PromptRecord]) -> list[BadRecordError | None]:
    """For each record, in order, why its verifier does not give its own gold (`boxed_gold`) full marks. None: it does.

    Records with coordinates need the sizes of their images.
    """
    faults: list[BadRecordError | None] = [None] * len(records)
    asked: list[int] = []
    completions: list[tuple[str, PromptRecord]] = []
    for i, record in enumerate(records):
        try:
            completions.append((boxed_gold(record), record))
            asked.append(i)
        except BadRecordError as error:
            faults[i] = error
    for i, verdict in zip(asked, pool.verify(completions), strict=True):
        faults[i] = gold_fault(records[i], verdict)
    return faults
