"""Numbers: the reply's last box holds the right one.

Settings: `relative` (to the gold) and `absolute` are tolerances from 0, of which one has to hold; ChartQA uses
`relative: 0.05`. `percent`: with `same`, 50% is 50; with `fraction`, 50% is 0.5, and for a gold with a percent sign, an
answer of 50 is right, too. MathVista has two more: with `decimals` above 0, an answer is right if it is the gold once
both are rounded to so many decimals; with `truncate`, if it is the gold once its decimals are cut off (5.9 is 5). Where
either is set, the tolerances do not count.
"""

from __future__ import annotations

from math import trunc
from typing import Any

from spark_vl.answers import TOLERANCE, Quantity, agrees, last_boxed, parse_quantity, same_unit
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of

SETTINGS: dict[str, Any] = {
    "relative": TOLERANCE,
    "absolute": 0.0,
    "percent": ("same", "fraction"),
    "decimals": 0,
    "truncate": False,
}


def verify_number(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion's number equals `record.gold` within the tolerances; `parsed` is the number as written.

    See `parse_quantity` for how numbers are written. A unit or a noun ("5 people") may be missing on either side, but
    if both have one, it must be the same; nothing is converted.
    """
    settings = settings_of(record)
    relative, absolute = settings["relative"], settings["absolute"]
    gold = parse_quantity(last_boxed(record.gold) or record.gold, nouns=True)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not one finite number")
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    answer = parse_quantity(boxed, nouns=True)
    if answer is None:
        return Verdict(0.0, None, "unparsable", "the last box is not one finite number")
    if settings["truncate"] or settings["decimals"]:
        right = same_unit(answer.unit, gold.unit) and (
            trunc(answer.value) == gold.value
            if settings["truncate"]
            else round(answer.value, settings["decimals"]) == round(gold.value, settings["decimals"])
        )
    elif settings["percent"] == "same":
        right = agrees(answer, gold, relative, absolute)
    else:
        right = agrees(_fraction(answer), _fraction(gold), relative, absolute) or (
            gold.unit == "%" and not answer.unit and agrees(answer, gold, relative, absolute)
        )
    return Verdict(float(right), boxed)


def _fraction(number: Quantity) -> Quantity:
    return Quantity(number.value / 100, "") if number.unit == "%" else number
