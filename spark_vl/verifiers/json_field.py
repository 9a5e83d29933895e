"""JSON: the reply's last box, or its last block of JSON, holds an object with the right value in one field.

Settings: `field`, its name, or names joined by dots for a field of a nested object; `verifier`, which compares its
value with that in the gold, also a JSON object. That verifier has its default settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spark_vl.answers import last_boxed, last_json_object
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import boxed_gold, get_verifier, settings_of

SETTINGS: dict[str, Any] = {
    "field": "answer",
    "verifier": ("text", "number", "count", "choice", "list", "set", "interval"),
}


def verify_json_field(completion: str, record: PromptRecord) -> Verdict:
    """The verdict of `verifier` on the field; other fields are ignored.

    The value must be a text, a number, a truth value or an array of these. Anything else is unparsable, and so are an
    object that `parse_json` refuses (a key twice, NaN, too deep) and a text whose braces do not balance.
    """
    settings = settings_of(record)
    field, verifier = settings["field"], settings["verifier"]
    if verifier not in SETTINGS["verifier"]:  # whatever a record's file says, it names no code
        raise BadRecordError(
            record.id, f"settings: verifier: found {verifier!r:.200}; allowed: {', '.join(SETTINGS['verifier'])}"
        )
    gold = _value(last_json_object(boxed_gold(record)), field)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not a JSON object with a value in {field!r}")
    answer, fault = _value(last_json_object(completion), field), ""
    if answer is None:
        fault = f"no JSON object with a value in {field!r}"
    elif last_boxed(box := rf"\boxed{{{answer}}}") != answer.strip():  # a part of the value would be the answer
        fault = f"the value in {field!r} is blank, or has braces that do not close"
    verdict = get_verifier(verifier)("" if fault else box, replace(record, gold=gold, verifier=verifier, settings=()))
    return replace(verdict, detail=fault) if fault else verdict


def _value(found: Mapping[str, Any] | None, field: str) -> str | None:
    value: Any = found
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    if not all(isinstance(item, str | int | float) for item in (value if isinstance(value, list) else [value])):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return None if any("\ud800" <= character <= "\udfff" for character in text) else text  # cannot be written to a file
