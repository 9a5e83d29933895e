"""Finds golds that their own verifier cannot use, before anything is sampled for them."""

from __future__ import annotations

from collections.abc import Sequence

from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import SELF_JUDGE, bad_record_of, boxed_gold, public_name
from spark_vl.verifiers.pool import VerifierPool


def check_golds(pool: VerifierPool, records: Sequence[PromptRecord]) -> list[BadRecordError | None]:
    """For each record, in order, why its verifier does not give its own gold (`boxed_gold`) full marks, or None.

    Records with coordinates must have the sizes of their images.
    """
    faults: list[BadRecordError | None] = [None] * len(records)
    asked: list[int] = []
    completions: list[tuple[str, PromptRecord]] = []
    for i, record in enumerate(records):
        if record.verifier == SELF_JUDGE:
            faults[i] = BadRecordError(record.id, "it has no right answer (verifier: self_judge)")
            continue
        try:
            completions.append((boxed_gold(record), record))
            asked.append(i)
        except BadRecordError as error:
            faults[i] = error
    for i, verdict in zip(asked, pool.verify(completions), strict=True):
        faults[i] = gold_fault(records[i], verdict)
    return faults


def gold_fault(record: PromptRecord, verdict: Verdict) -> BadRecordError | None:
    """The error in the record's own gold, on which its verifier gave `verdict`. None: full marks."""
    if verdict.score == 1:
        return None
    reason = (
        f"the {public_name(record.verifier)} verifier gives its own gold {record.gold!r:.200} {verdict.score:g} of 1"
    )
    why = bad_record_of(verdict, record) or verdict.detail
    why = why or ("no answer is found in it" if verdict.parsed is None else f"it reads {verdict.parsed!r:.80}")
    return BadRecordError(record.id, f"{reason} ({verdict.status}: {why})")
