"""Lists: the reply's last box holds the right items in the right order."""

from __future__ import annotations

from spark_vl.answers import Quantity, agrees, compact, last_boxed, normalized, parse_items, parse_quantity
from spark_vl.records import BadRecordError, PromptRecord, Verdict

Item = tuple[Quantity | None, str]
"""An item as a number (None if it is not one) and as compact text."""


def verify_list(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion lists the items of `record.gold` in its order, else 0; `parsed` is the list as written.

    See `parse_items` for how a list is written. Two numbers are the same item if the `number` verifier, with default
    settings, finds them equal; other items if their compact texts are equal. "and" separates the last items ("a, b and
    c") unless an item of the gold, then a JSON array, contains it.
    """
    gold, answer, boxed = read_items(completion, record)
    if answer is None:
        return Verdict(0.0, None, "unparsable", "no box" if boxed is None else "the last box is not a list")
    return Verdict(float(len(answer) == len(gold) and all(map(same_item, answer, gold))), boxed)


def read_items(completion: str, record: PromptRecord) -> tuple[list[Item], list[Item] | None, str | None]:
    """The items of the gold, those of the completion (None if it has no list), and the content of the last box.

    Raises:
        BadRecordError: the gold is not a list.
    """
    gold = parse_items(last_boxed(record.gold) or record.gold)
    if gold is None:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not a list of items")
    boxed = last_boxed(completion)
    conjunction = not any(" and " in normalized(item) for item in gold)
    answer = None if boxed is None else parse_items(boxed, conjunction)
    return list(map(_item, gold)), None if answer is None else list(map(_item, answer)), boxed


def _item(text: str) -> Item:
    return parse_quantity(text), compact(text)


def same_item(answer: Item, gold: Item) -> bool:
    """Whether two items are equal: as numbers if both are numbers, else as texts."""
    if answer[0] is not None and gold[0] is not None:
        return agrees(answer[0], gold[0])
    return answer[1] == gold[1]
