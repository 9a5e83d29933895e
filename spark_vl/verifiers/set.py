"""Sets: the reply's last box holds the right items, in any order.

Setting `partial`: `none`, all or nothing; or `f1`, the harmonic mean of precision and recall. Listing everything does
not pay: wrong items cost precision, and repeated ones count once. An item matches one item of the gold at most: "1" is
not both "1 cm" and "1 m".
"""

from __future__ import annotations

from typing import Any

from spark_vl.answers import distinct
from spark_vl.records import PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of
from spark_vl.verifiers.detection import matching_size
from spark_vl.verifiers.list import read_items, same_item

SETTINGS: dict[str, Any] = {"partial": ("none", "f1")}


def verify_set(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion lists the items of `record.gold` and no others; `parsed` is the list as written.

    `verify_list` says how a list is written, and which items are the same.
    """
    gold, answer, boxed = read_items(completion, record)
    if answer is None:
        return Verdict(0.0, None, "unparsable", "no box" if boxed is None else "the last box is not a list")
    gold, answer = distinct(gold, same_item), distinct(answer, same_item)
    found = matching_size([[j for j, item in enumerate(answer) if same_item(item, wanted)] for wanted in gold])
    if found == len(gold) == len(answer):
        return Verdict(1.0, boxed)
    f1 = 2 * found / (len(gold) + len(answer))
    return Verdict(min(f1, 1.0) if settings_of(record)["partial"] == "f1" else 0.0, boxed)
