"""Choice questions: the reply's last box names the right option, or all the right ones, by letter, text or value.

Settings: with `letter_first`, a bare letter is the option of that letter, even if it is the text of another. With
`nearest`, a box that names no option counts as the one whose text takes the fewest edits, as in MathVista, where no
reply is unreadable: not for training, since any box then has a chance of being right.
"""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from spark_vl.answers import last_boxed, match_choice, match_choices, plain
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of
from spark_vl.verifiers.text import edit_distance

SETTINGS: dict[str, Any] = {"letter_first": False, "nearest": False}
_MAX_NEAREST = 1000
"""Characters of a box that is compared with the options."""


def verify_choice(completion: str, record: PromptRecord) -> Verdict:
    """1 if the completion names the option that `record.gold` names; `parsed` is its letter.

    If the gold names several options ("A, C"), the completion must name all of them and no others. If it names one, a
    completion that names several is unparsable. A gold with a text ("B. 5 cm") is named by that, too.
    """
    gold = _gold(record)
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    settings = settings_of(record)
    letter_first = settings["letter_first"]
    if len(gold) > 1:
        letters = match_choices(boxed, record.choices, letter_first=letter_first)
    else:
        letters = tuple(filter(None, [match_choice(boxed, record.choices, letter_first=letter_first)]))
        if not (letters or record.choices) and (words := _text(record)) and match_choice(boxed, (words,)):
            letters = gold
    if not letters and record.choices and len(boxed) <= _MAX_NEAREST and settings["nearest"]:
        letters = (_nearest(plain(boxed), record.choices),)
    if not letters:
        return Verdict(0.0, None, "unparsable", f"the last box names no {'single ' if len(gold) == 1 else ''}choice")
    return Verdict(float(letters == gold), ", ".join(letters))


def _nearest(words: str, choices: tuple[str, ...]) -> str:
    """The letter of the option that takes the fewest edits to become `words`; of several, the first."""
    distances = [edit_distance(option[:_MAX_NEAREST], words) for option in choices]
    return ascii_uppercase[distances.index(min(distances))]


def boxed_gold(record: PromptRecord) -> str:
    r"""A right completion: the gold's letters in `\boxed{}`, with texts if a letter is the text of another option."""
    gold = _gold(record)
    if record.choices and match_choices(", ".join(gold), record.choices, letter_first=False) != gold:
        gold = tuple(f"{letter}. {record.choices[ascii_uppercase.index(letter)]}" for letter in gold)
    return rf"\boxed{{{', '.join(gold)}}}"


def _gold(record: PromptRecord) -> tuple[str, ...]:
    """The letters that the gold names."""
    letters = match_choices(last_boxed(record.gold) or record.gold, record.choices)
    if not letters:
        raise BadRecordError(record.id, f"gold {record.gold!r} names no choice of {list(record.choices)}")
    return letters


def _text(record: PromptRecord) -> str:
    """What stands behind the letter in the gold; empty: nothing."""
    return plain(last_boxed(record.gold) or record.gold).partition(" ")[2]
