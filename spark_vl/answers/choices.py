"""Labels and choices: which of the given options an answer names."""

from __future__ import annotations

import re
from functools import lru_cache
from string import ascii_uppercase

from spark_vl.answers.boxed import MAX_CHARS, compact, last_boxed, normalized, plain, unstyled
from spark_vl.answers.latex import spelled
from spark_vl.answers.quantities import Quantity, agrees, parse_quantity


def match_label(reply: str, labels: tuple[str, ...]) -> str | None:
    r"""The label that the last box of `reply` says; None if it says none of `labels`, or says more than a label.

    Case, `\text{...}`, `**...**`, parentheses, a trailing period and "Answer" before the label do not matter:
    `\boxed{(a).}` says "A". Only whole labels count: neither "Yesterday" nor "Yes and No" says "Yes".
    """
    boxed = last_boxed(reply)
    if boxed is None:
        return None
    known = {plain(label).lower(): label for label in labels}  # casefolded, `yeſ` is "yes"
    said = plain(boxed).lower()
    return known.get(said) or known.get(plain(_BEFORE_LABEL.sub("", said, count=1)))


_BEFORE_LABEL = re.compile(r"^(?:the |final |correct )*(?:answer|option|choice)(?: is)?(?: ?: ?| )", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:(?:the|final|correct)\s+)*(?:option|choice|answer)\b(?:\s+is\b)?\s*:?\s*)?\(?([a-z])\s*(?:$|\)?\s*(?:\.|:(?=\s|$))|\))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(\*\*?|__?)([^*_]{1,20})\1(?!\w)")
_CHOICE_AND_TEXT = re.compile(r"([a-z])(?=\W)\s*([-–—,，、:：．]?\s*(.+))", re.DOTALL | re.IGNORECASE)
_LISTED = re.compile(r"\(?[A-H]\)?(?:\s*[,、，．]|\s+[-–—]\s)\s*(?!\(?[A-Z](?![A-Za-z]))\S.*", re.DOTALL)
"""A letter with its text where the options are not known."""
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z])[A-Z](?=[.):])|(?:\band\b|\bor\b|[,;/&])\s*\(?[A-Z](?![A-Za-z])|^[A-Z]$")
_LETTER = re.compile(r"\b[A-Z]\b")
_COMBINATION = re.compile(r"(?:(?i:both|all of) )?[A-Z](?:(?:, | & |(?:,)? and )[A-Z]){1,9}")


def match_choice(text: str, choices: tuple[str, ...] = (), *, letter_first: bool = False) -> str | None:
    """The letter ("A", "B", ...) of the choice that `text`, the content of a box, names; None for none or several.

    Accepted: the letter ("B", "(b)", "[B]", "B.", "Option B", "The answer is B"), the letter with a text ("B. 5 cm",
    "B, 5 cm", "B - 5 cm") and, where `choices` holds the options in order, the text of an option, in any spelling of
    its formulas, or, if no option has that text, its number ("0.5" for "1/2"). The answer is ambiguous, and None, if
    letter and text name different options, or if a bare letter is also the text of another option. Without `choices`,
    every letter is a choice; "D. Both A and B" names D.

    Args:
        letter_first: a bare capital names its choice even if it is the text of another option.
    """
    if len(text) > MAX_CHARS:
        return None
    letter = _match(text, choices, letter_first)
    return letter if letter or (tidy := _tidy(text)) == text else _match(tidy, choices, letter_first)


def _tidy(text: str) -> str:
    """`text` spelled in one way, without braces or brackets around all of it."""
    text = unstyled(spelled(text)).strip()
    while text[:1] + text[-1:] in ("{}", "[]"):
        text = text[1:-1].strip()
    return text


def _formula(text: str) -> str:
    """`text` spelled in one way and without spaces, but for those between two numbers."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", unstyled(spelled(text)).replace(r"\cdot ", ""))


def _match(text: str, choices: tuple[str, ...], letter_first: bool) -> str | None:
    letters = ascii_uppercase[: len(choices)] if choices else ascii_uppercase

    def saying(words: str) -> set[str]:
        """The letters of the options with this text or, if there are none, with this number."""
        texts, quantities = _readings(choices)
        for form, forms in zip(_FORMS, texts, strict=True):
            said = form(words)
            if same := {letter for letter, choice in zip(letters, forms, strict=False) if choice == said}:
                return same
        if (number := parse_quantity(words)) is None:
            return set()
        numbers = zip(letters, quantities, strict=False)
        return {letter for letter, value in numbers if value is not None and agrees(number, value)}

    words = plain(text)
    if letter_first and words in tuple(letters):
        return words
    if match := _EMPHASIS.match(words):  # "**B.** 5 cm"
        words = match[2] + words[match.end() :]
    named = saying(text)
    if (match := _CHOICE.fullmatch(words)) and (letter := match[1].upper()) in letters:
        words = plain(match[2])
        if not words:
            named.add(letter)
        elif not named:
            second = {found[-1] for found in _SECOND_CHOICE.findall(words)} & set(letters) - {letter}
            if _COMBINATION.fullmatch(words) and letter not in _LETTER.findall(words):
                second = set()
            named = saying(words) or ({letter} if not second else set())
            return letter if letter in named else None
    elif not choices and _LISTED.fullmatch(words) and not set(_SECOND_CHOICE.findall(words[1:])):
        return words.lstrip("(")[0]
    elif not named and (match := _CHOICE_AND_TEXT.fullmatch(words)) and (letter := match[1].upper()) in letters:
        return letter if saying(match[2]) | saying(match[3]) == {letter} else None  # a dash may be a minus sign
    return named.pop() if len(named) == 1 else None


_FORMS = (normalized, compact, _formula)


@lru_cache(maxsize=64)  # an answer may have hundreds of parts, and each is compared with all options
def _readings(choices: tuple[str, ...]) -> tuple[list[list[str]], list[Quantity | None]]:
    """The options in each of `_FORMS`, and as numbers."""
    return [[*map(form, choices)] for form in _FORMS], [*map(parse_quantity, choices)]


_BEFORE_CHOICES = re.compile(r"(?:both )?(?:(?:options|choices|answers)\b ?:? ?)?", re.IGNORECASE)
_MARK = re.compile(r" ?[,;&，；、] ?(?:and\b ?)?", re.IGNORECASE)
_AND = re.compile(r" ?\band\b ?", re.IGNORECASE)
_RUN_OF_CHOICES = re.compile(r"[A-J]{2,10}")


def match_choices(text: str, choices: tuple[str, ...] = (), *, letter_first: bool = True) -> tuple[str, ...]:
    """The letters, sorted, of the choices that `text`, a right answer or the content of a box, names; () if none.

    One choice as in `match_choice`, or several of them: "A, C", "A; C", "A and C", "Options A & C", "AC", "red, blue".
    "A or C" names none.

    Args:
        letter_first: as in `match_choice`. True fits right answers, which datasets give as letters; a reply may mean
            either the letter or the text.
    """

    def named(part: str) -> str | None:
        return match_choice(part, choices, letter_first=letter_first)

    if len(text) > MAX_CHARS:
        return ()
    if (letter := named(text)) is not None:
        return (letter,)
    words = plain(text)
    if before := _BEFORE_CHOICES.match(words):
        words = words[before.end() :]
    letters: set[str] = set()
    for part in words if _RUN_OF_CHOICES.fullmatch(words) else _MARK.split(words, maxsplit=26):
        letter = named(part)
        found = [named(piece) for piece in _AND.split(part, maxsplit=26)] if letter is None else [letter]
        if None in found:
            return ()
        letters.update(filter(None, found))
    return tuple(sorted(letters))
