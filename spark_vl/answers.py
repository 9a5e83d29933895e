"""Finds the answer in a model's reply: boxed text, a label, choices, numbers, items, intervals, JSON.

Everything that reads an answer (verifiers, recycling, judges) starts from `last_boxed`, so that the text that a judge
is shown is the text that was scored. Every function here runs in time linear in the length of its text.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

# `\\` before `boxed` is a doubled escape (as in JSON), not a line break: such a box counts too.
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?:[{}]|\\(?!boxed))|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    r"""The content, stripped, of the last `\boxed{...}` in `text`; None if there is none.

    "Last" is the one that starts last, so of nested boxes it is the innermost. A box whose braces do not close (a
    reply that was cut off) and a blank one (`\boxed{}`, an echo of the instruction) hold no answer and are passed over.
    """
    stack: list[tuple[bool, int, int]] = []  # (is a box, where it starts, where its content starts)
    last, content = -1, None
    for match in _BRACE.finditer(text):
        if match["close"]:
            if stack:
                is_box, start, inside = stack.pop()
                if is_box and start > last and (found := text[inside : match.start()].strip()):
                    last, content = start, found
        elif match["box"] or match["open"]:
            stack.append((match["box"] is not None, match.start(), match.end()))
    return content


_STYLE = re.compile(
    r"(?P<style>\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mbox)\s*\{)"
    r"|\\[{}\\]|(?P<open>\{)|(?P<close>\})"
)
_SPACE = re.compile(r"\\[ ,;:!]|\\q?quad(?![A-Za-z])|~|\s")


def _unstyled(text: str) -> str:
    r"""`text` without `\text{...}` and its like, whose content stays."""
    cuts: list[tuple[int, int]] = []
    stack: list[tuple[int, int] | None] = []  # where each open style command stands; None: another brace
    for match in _STYLE.finditer(text):
        if match["style"] or match["open"]:
            stack.append(match.span() if match["style"] else None)
        elif match["close"] and stack and (style := stack.pop()):
            cuts += [style, match.span()]
    pieces, end = [], 0
    for start, stop in sorted(cuts):
        pieces.append(text[end:start])
        end = stop
    return "".join([*pieces, text[end:]])


def _one_line(text: str) -> str:
    return " ".join(_SPACE.sub(" ", _unstyled(text)).split())


_ESCAPED = re.compile(r"\\([%&#_$])")
_STRAIGHT = str.maketrans("‘’′“”″", "'''\"\"\"")
_MATH_MARKS = "$*`"
_MARKS = _MATH_MARKS + "_'\"("


def _bare(text: str, marks: str) -> str:
    """`text` without those of `marks` that stand in pairs around all of it, and without periods at its end.

    One that stands on one side only, or also within, is a part of the text: "$5", "5'", "A*", "(a) and (b)".
    """
    closes: dict[int, int] = {}
    opened: list[int] = []
    for i, mark in enumerate(text):
        if mark == "(":
            opened.append(i)
        elif mark == ")" and opened:
            closes[opened.pop()] = i
    start, end = 0, len(text)
    while True:
        while start < end and text[end - 1] in " \n.":
            end -= 1
        while start < end and text[start] in " \n":
            start += 1
        if end - start < 2 or (first := text[start]) not in marks:
            return text[start:end]
        if first == "(":
            paired = closes.get(start) == end - 1
        else:  # of several, "**A**" or "$ $A$ $", the outer ones first
            within = text[start + 1 : start + 3].lstrip()[:1] + text[end - 3 : end - 1].rstrip()[-1:]
            several = end - start > 3 and within == first * 2
            paired = first == text[end - 1] and (several or text.find(first, start + 1, end - 1) < 0)
        if not paired:
            return text[start:end]
        start, end = start + 1, end - 1


def plain(text: str) -> str:
    r"""`text` as it reads: `\text{...}` and `\%` undone, white space collapsed, quotes straight, accents composed.

    Quotes, parentheses, asterisks, underscores, backticks and dollar signs are left out where they stand in pairs
    around all of it, periods at its end.
    """
    text = _ESCAPED.sub(r"\1", _one_line(unicodedata.normalize("NFC", text)))
    return _bare(text.translate(_STRAIGHT), _MARKS)


def normalized(text: str) -> str:
    """`plain(text)` in lower case."""
    return plain(text).casefold()


_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_TYPESET = [
    (_SIZES, ""),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<=\\frac|\\sqrt) (?=[0-9{])"), ""),
    (re.compile(r"\{([A-Za-z0-9])\}"), r"\1"),
    (re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) "), ""),
]


def compact(text: str) -> str:
    r"""`normalized(text)`, one spelling for formulas: "(2,1)" as "(2, 1)", `\dfrac{\sqrt3}{2}` as `\frac{\sqrt{3}}{2}`.

    Spaces between letters and digits stay: "1 1/2" is not "11/2".
    """
    text = normalized(text)
    for spelling, standard in _TYPESET:
        text = spelling.sub(standard, text)
    return _bare(text, _MARKS)  # also those that stood within `\left(...\right)`


def match_label(reply: str, labels: tuple[str, ...]) -> str | None:
    r"""The one of `labels` that the last box of `reply` says; None if it says none, or anything besides.

    Case, `\text{...}`, `**...**`, parentheses and a trailing period do not count: `\boxed{(a).}` says "A". Whole
    labels only: neither "Yesterday" nor "Yes and No" says "Yes".
    """
    boxed = last_boxed(reply)
    if boxed is None:
        return None
    return {plain(label).lower(): label for label in labels}.get(plain(boxed).lower())  # casefolded, `yeſ` is "yes"


_MAX_CHARS = 10_000
"""Longer contents of a box name no choices, items or intervals."""
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*)?\(?([a-z])\s*(?:$|\)?\s*(?:\.|:(?=\s|$))|\))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(\*\*?|__?)([^*_]{1,20})\1(?!\w)")
_CHOICE_AND_TEXT = re.compile(r"([a-z])(?=\W)\s*([-–—,，、:：．]?\s*(.+))", re.DOTALL | re.IGNORECASE)
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z])[A-Z](?=[.):])|(?:\band\b|\bor\b|[,;/&])\s*\(?[A-Z](?![A-Za-z])|^[A-Z]$")
_LETTER = re.compile(r"\b[A-Z]\b")
_COMBINATION = re.compile(r"(?:(?i:both|all of) )?[A-Z](?:(?:, | & |(?:,)? and )[A-Z]){1,9}")


def match_choice(text: str, choices: tuple[str, ...] = (), *, letter_first: bool = False) -> str | None:
    """The letter ("A", "B", ...) of the choice that `text`, the content of a box, names; None if none or several.

    Accepted: the letter ("B", "(b)", "B.", "Option B"), the letter with a text ("B. 5 cm") and, where `choices` holds
    the options in order, an option's own text or, if the text is no option's, its number ("0.5" for "1/2"). Where
    letter and text name different options, or a bare letter is also another option's text, the answer is ambiguous.
    Without `choices`, every letter is a choice; "D. Both A and B" names D.

    Args:
        letter_first: a bare capital names its choice even if it is another option's text.
    """
    letters = ascii_uppercase[: len(choices)] if choices else ascii_uppercase

    def saying(words: str) -> set[str]:
        for form in (normalized, compact):
            said = form(words)
            if same := {letter for letter, choice in zip(letters, choices, strict=False) if form(choice) == said}:
                return same
        if (number := parse_quantity(words)) is None:
            return set()
        numbers = zip(letters, map(parse_quantity, choices), strict=False)
        return {letter for letter, value in numbers if value is not None and agrees(number, value)}

    if len(text) > _MAX_CHARS:
        return None
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
    elif not named and (match := _CHOICE_AND_TEXT.fullmatch(words)) and (letter := match[1].upper()) in letters:
        return letter if saying(match[2]) | saying(match[3]) == {letter} else None  # a dash may be a minus sign
    return named.pop() if len(named) == 1 else None


_BEFORE_CHOICES = re.compile(r"(?:both )?(?:(?:options|choices|answers)\b ?:? ?)?", re.IGNORECASE)
_MARK = re.compile(r" ?[,;&，；、] ?(?:and\b ?)?", re.IGNORECASE)
_AND = re.compile(r" ?\band\b ?", re.IGNORECASE)
_RUN_OF_CHOICES = re.compile(r"[A-J]{2,10}")


def match_choices(text: str, choices: tuple[str, ...] = (), *, letter_first: bool = True) -> tuple[str, ...]:
    """The letters of the choices that `text`, a right answer or the content of a box, names, sorted; () if none.

    One as `match_choice` has it, or several, each of which it has: "A, C", "A; C", "A and C", "Options A & C", "AC",
    "red, blue". "A or C" names none.

    Args:
        letter_first: as in `match_choice`; for right answers, which data sets give as letters. Of a reply it is not
            known which of the two it means.
    """

    def named(part: str) -> str | None:
        return match_choice(part, choices, letter_first=letter_first)

    if len(text) > _MAX_CHARS:
        return ()
    if (letter := named(text)) is not None:
        return (letter,)
    words = plain(text)
    words = words[_BEFORE_CHOICES.match(words).end() :]
    letters: set[str | None] = set()
    for part in words if _RUN_OF_CHOICES.fullmatch(words) else _MARK.split(words, maxsplit=26):
        letter = named(part)
        letters |= set(map(named, _AND.split(part, maxsplit=26))) if letter is None else {letter}
    return () if None in letters else tuple(sorted(letters))


_METRIC = {  # symbol → names
    "m": "meter metre",
    "g": "gram",
    "L": "liter litre",
    "s": "second",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "Hz": "hertz",
    "Pa": "pascal",
    "V": "volt",
    "A": "ampere amp",
    "Ω": "ohm",
    "mol": "mole",
}
_PREFIXES = {"": "", "M": "mega", "k": "kilo", "d": "deci", "c": "centi", "m": "milli", "μ": "micro", "n": "nano"}
_SPELLED_UNITS = {  # unit → other spellings, words in any case
    "": "unit units",
    "$": "dollar dollars usd",
    "€": "euro euros eur",
    "£": "gbp",
    "¥": "yen yuan",
    "cent": "cents ¢",
    "°": "degree degrees",
    "°C": "℃",
    "°F": "℉",
    "%": "percent pct",
    "K": "kelvin kelvins",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mi/h": "mph",
    "oz": "ounce ounces",
    "lb": "lbs",
    "pound": "pounds",
    "ton": "tons tonne tonnes",
    "min": "minute minutes",
    "h": "hr hrs hs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years",
    "am": "",
    "pm": "",
    "mL": "ml",
    "L": "l",
    "s": "sec secs",
}
_VAGUE = {"°": {"°C", "°F"}, "pound": {"lb", "£"}}
_SYMBOLS = {f"{prefix}{symbol}": f"{prefix}{symbol}" for symbol in _METRIC for prefix in _PREFIXES}
_NAMES = {
    f"{prefix}{name}{plural}": f"{short}{symbol}"
    for symbol, names in _METRIC.items()
    for short, prefix in _PREFIXES.items()
    for name in names.split()
    for plural in ("", "s")
}
for _known, _spellings in _SPELLED_UNITS.items():
    for _spelling in filter(None, (_known, *_spellings.split())):
        (_NAMES if len(_spelling) > 2 else _SYMBOLS)[_spelling] = _known  # of symbols case counts: mW is not MW


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


_NAME = rf"(?:{_any_of(_SYMBOLS)}|(?i:{_any_of(_NAMES)}))"
_UNIT = rf"(?:(?:square|cubic|sq|cu)\.? )?{_NAME}(?:(?:\s?\^\s?)?[23]|²|³)?"
_UNIT_PARTS = re.compile(
    rf"(?:(?P<square>square|sq)|(?P<cubic>cubic|cu))?\.? ?(?P<name>{_NAME})(?:(?:\s?\^\s?)?(?P<power>[23²³]))?"
)
_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_NO_NOUN = (  # after a number: another one, a multiple or a part of it, or more than one answer
    rf"(?:{'|'.join(_WORDS)}|(?:thir|for|fif|six|seven|eigh|nine)ty|halves|half|quarters?|dozens?|pi|infinity"
    r"|(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?|lakhs?|crores?|mil|mn|bn"
    r"|(?:thir|four|fif|six|seven|eigh|nin|ten|eleven|twelf)(?:d|th)s?|or|and|nor|to|not|no|none|but|than|least|most"
    r"|versus|vs|maybe|perhaps|possibly|if|unless|plus|minus|negative|below|above|times|over|by|divided|multiplied"
    r"|squared|cubed|factorial|mod(?:ulo)?|root|sqrt|sin|cos|tan|log|ln|tens|thou|mill|gross|scores?|couples?)\b"
)
_NOUN = rf"(?:a|(?!{_NO_NOUN})[A-Za-z]{{2,}}(?:[-'](?!{_NO_NOUN})[A-Za-z]+)*+)(?![A-Za-z])"
_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥])?\s?"
    rf"(?:(?:(?P<whole>[0-9]++) )?(?P<num>{_UNSIGNED})\s?/\s?(?P<den>-?(?:{_UNSIGNED}))"
    rf"|(?P<value>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?[0-9]+))?)"
    rf"(?:\s?(?P<unit>{_UNIT}))?(?:\s?(?:/|\bper\b)\s?(?P<per>{_UNIT}))?(?P<nouns>(?: (?i:{_NOUN}))*+)"
)
_ARGUMENT = rf"\s?(?:([0-9])|\{{\s?([-+]?(?:{_UNSIGNED}))\s?\}})"
_TEN = r"10\s?\^\s?(\{)?([-+]?[0-9]+)(?(1)\})(?![0-9.])"
_FORMULA = [  # before `\text{...}` is undone, which may end a command: `^\circ\text{C}`
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|×"), "*"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\mu(?![A-Za-z])\s*|µ"), "μ"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    (re.compile(r"[¼-¾⅐-⅞]"), lambda match: f" {unicodedata.normalize('NFKC', match[0]).replace('⁄', '/')} "),
]
_SPELLINGS = [  # after it
    (re.compile(rf"\\[dt]?frac(?![A-Za-z]){_ARGUMENT}{_ARGUMENT}"), r" \1\2/\3\4 "),
    (re.compile(rf"(?<=[0-9.])\s?\*\s?{_TEN}"), r"e\2"),
    (re.compile(rf"(?<![0-9.,/^*] )(?<![0-9.,/^*]){_TEN}"), r"1e\2"),
    (re.compile(r"\^\{\s*([23])\s*\}"), r"^\1"),
    (re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?! ?/|[0-9])"), lambda match: match[0].replace(" ", "")),
    (re.compile(r"(?i:\bdegrees? celsius|\bcelsius)\b|(?:\bdegrees?|°) C\b"), "°C"),
    (re.compile(r"(?i:\bdegrees? fahrenheit|\bfahrenheit)\b|(?:\bdegrees?|°) F\b"), "°F"),
    (re.compile(r"\bUS ?(?=\\?\$|[dD]ollar)"), ""),
    (re.compile(r"(?i:\bper cent)\b|\\%"), "%"),
]
_EQUALS = re.compile(
    r"(?:(?:[A-Za-z]{1,2}|\\[a-z]+)(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?\s?)?(?:=|≈|\\approx(?![A-Za-z]))"
)
_DOLLAR = re.compile(r"(?<!\\)\$")


def _unit(text: str) -> str:
    """One spelling for each unit: "square centimeters" is "cm^2"."""
    match = _UNIT_PARTS.fullmatch(text)
    name = match["name"]
    unit = _SYMBOLS[name] if name in _SYMBOLS else _NAMES[name.casefold()]
    power = "2" if match["square"] else "3" if match["cubic"] else match["power"]
    return f"{unit}^{power}".translate({ord("²"): "2", ord("³"): "3"}) if power else unit


@dataclass(frozen=True)
class Quantity:
    """A number as it is written in an answer."""

    value: float
    """Finite; of "50%" it is 50."""
    unit: str
    """In one spelling ("cm", "m/s^2", "%", "°", "$"), or the words after the number in lower case ("people")."""


def parse_quantity(text: str, *, nouns: bool = False) -> Quantity | None:
    r"""The finite number, with its unit, that `text`, the content of a box, is; None if it is none, or holds a second.

    Accepted: a sign, thousands separators ("1,234.5", "1 234"), currency signs, a percent sign ("50%" is 50), degrees,
    a unit ("3 cm", `3\ \text{m/s}^2`), fractions ("1/2", `\frac{1}{2}`, "1 1/2", "½"), "1.5e3" and
    `1.5 \times 10^{3}`, "=" or a variable with it before ("x = 5"), and the words of `parse_word`.

    Args:
        nouns: whether other words may follow the number and its unit ("5 people", "12 years old"). Those that change
            the number ("3 million", "5 or more", "5 and a half") may not.
    """
    if len(text) > 200:  # no number is that long
        return None
    if (word := parse_word(text)) is not None:
        return Quantity(word, "")
    for spelling, standard in _FORMULA:
        text = spelling.sub(standard, text)
    if len(_DOLLAR.findall(text)) % 2 == 0:  # those of math mode; a single one is a currency
        text = _DOLLAR.sub(" ", text)
    text = _one_line(unicodedata.normalize("NFC", text))
    for spelling, standard in _SPELLINGS:
        text = spelling.sub(standard, text)
    text = _bare(" ".join(text.replace(r"\$", "$").split()), "*`(").strip()
    text = _bare(text[match.end() :], "*`(") if (match := _EQUALS.match(text)) else text
    match = _NUMBER.fullmatch(text)
    return None if match is None or (match["nouns"] and not nouns) else _quantity(match)


def _quantity(match: re.Match[str]) -> Quantity | None:
    """That of a match of `_NUMBER`."""

    def read(number: str) -> float:
        return float(number.replace(",", ""))

    if match["value"]:
        value = float(f"{match['value'].replace(',', '')}e{match['exponent'] or 0}")
    elif (divisor := read(match["den"])) == 0:
        return None
    else:
        value = read(match["num"]) / divisor
        if match["whole"]:
            if not 0 < value < 1:  # no mixed number, but two numbers
                return None
            value += read(match["whole"])
    units = [_unit(match[name]) for name in ("unit", "per") if match[name]]
    if match["currency"]:
        if match["unit"] and units[0] != match["currency"]:
            return None
        units = [match["currency"], *units[match["unit"] is not None :]]
    unit = "/".join(["", *units] if match["per"] and len(units) == 1 else units) or match["nouns"].strip().casefold()
    return Quantity(-value if match["sign"] == "-" else value, unit) if math.isfinite(value) else None


def same_unit(a: str, b: str) -> bool:
    """Whether two units of a `Quantity` are the same, or do not contradict: one is missing, or degrees without C or F,
    or pounds, which may be of weight or money."""
    return not (a and b) or a == b or b in _VAGUE.get(a, ()) or a in _VAGUE.get(b, ())


TOLERANCE = 1e-6
"""Relative to the gold: room for rounding in the last printed digits, not for another answer."""


def agrees(answer: Quantity, gold: Quantity, relative: float = TOLERANCE, absolute: float = 0.0) -> bool:
    """Whether the values differ by at most `relative` times that of `gold`, or `absolute`, and no units contradict.

    See `same_unit` for units; nothing is converted: "1 m" contradicts "100 cm".
    """
    if not same_unit(answer.unit, gold.unit):
        return False
    slack = 1e-12 * abs(gold.value)  # 1.155 is 5% above 1.1, though not in binary fractions
    return abs(answer.value - gold.value) <= max(relative * abs(gold.value), absolute) + slack


_WORD_VALUES = {"none": 0} | {word: value for value, word in enumerate(_WORDS)}


def parse_word(text: str) -> int | None:
    """The number that `text`, the content of a box, is in English: "none" (0), "zero" to "twenty"; else None."""
    return _WORD_VALUES.get(normalized(text))


_COUNT = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.0*)?")


def parse_count(text: str) -> int | None:
    """The integer from 0 that `text`, the content of a box, is: digits ("1,234", "5.0") or a word as in `parse_word`.

    None for all else: signs, fractions, units, nouns ("5 dogs"), "about 5", "5 or 6", "no" and "a".
    """
    if len(text) > 200:
        return None
    match = _COUNT.fullmatch(plain(text.replace("{,}", ",")))
    return int(match[1].replace(",", "")) if match else parse_word(text)


# ── several ──

MAX_ITEMS = 256
"""More are no answer."""
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_NOTHING = re.compile(r"\\(?:emptyset|varnothing)|∅")
_LAST_AND = re.compile(r"(?:^| )and ")


def parse_items(text: str, conjunction: bool = True) -> tuple[str, ...] | None:
    r"""The items that `text`, the content of a box, lists; None if it lists none, or more than `MAX_ITEMS`.

    A JSON array of texts, numbers and truth values; or items between semicolons or, if there is none, between commas
    or, if there is none either, on lines of their own, with or without brackets around all of them: "1, 2",
    `\{1, 2\}`, "[a; b]". Separators within brackets belong to an item. "[]", `\{\}` and `\emptyset` list nothing: ().

    Args:
        conjunction: whether "and" separates the last items ("a, b and c").
    """
    if len(text) > _MAX_CHARS:
        return None
    lines = filter(None, map(_one_line, _unstyled(_SIZES.sub("", text)).splitlines()))
    words = _bare("\n".join(lines).replace(r"\{", "{").replace(r"\}", "}"), _MATH_MARKS)
    if words.startswith("["):
        try:
            values = parse_json(words)
        except ValueError:
            pass  # not JSON, but perhaps "[a, b]"
        else:
            scalar = all(isinstance(value, str | int | float) for value in values)
            items = tuple(value if isinstance(value, str) else json.dumps(value) for value in values) if scalar else ()
            return items if scalar and len(items) <= MAX_ITEMS else None
    close, separators = _top_level(words)
    if close is not None and close == len(words) - 1:
        words = words[1:-1].strip()
        _, separators = _top_level(words)
        if not words:
            return ()
    if _NOTHING.fullmatch(words):
        return ()
    marks = next(filter(None, ([i for i in separators if words[i] == mark] for mark in ";,\n")), [])
    starts, ends = [0, *(i + 1 for i in marks)], [*marks, len(words)]
    items = [words[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    if conjunction:
        first, *more = _LAST_AND.split(items[-1])
        items[-1:] = [first, *more] if first or len(items) == 1 else more
    return tuple(items) if len(items) <= MAX_ITEMS and all(map(plain, items)) else None


def _top_level(text: str) -> tuple[int | None, list[int]]:
    """Where a bracket that `text` starts with closes, and where its separators outside of brackets are."""
    stack: list[str] = []
    first, separators = None, []
    for i, mark in enumerate(text):
        if mark in _BRACKETS:
            stack.append(_BRACKETS[mark])
        elif stack and mark == stack[-1]:
            stack.pop()
            if not stack and first is None and text[0] in _BRACKETS:
                first = i
        elif not stack and mark in ";,\n":
            separators.append(i)
    return first, separators


@dataclass(frozen=True, order=True)
class Interval:
    """From `low` to `high`, with or without its ends. Infinite ends are open."""

    low: float
    low_open: bool
    high: float
    high_closed: bool
    unit: str = ""
    """Of both ends, as that of a `Quantity`."""


_PIECE = re.compile(r"([\[(]) ?([^,;()\[\]]+)[,;] ?([^,;()\[\]]+)([\])])")
_UNION = re.compile(r" ?(?:\\cup(?![A-Za-z])|∪|\bU\b) ?")
_ELEMENT = re.compile(r"[A-Za-z] ?(?:\\in(?![A-Za-z])|∈) ?")
_INFINITY = re.compile(r"([-+]?) ?(?:\\infty|∞|inf(?:inity)?)", re.IGNORECASE)


def parse_intervals(text: str) -> tuple[Interval, ...] | None:
    r"""The disjoint intervals, from low to high, whose union `text`, the content of a box, is; None if it is none.

    Accepted: "(1, 2]", `x \in [0, \infty)`, `(-\infty; 0) \cup (1, 2)`. Ends are numbers as in `parse_quantity`, all of
    them with one unit or without. Those that overlap or touch are one interval. An empty one, and one that is closed
    at infinity, is no answer.
    """
    if len(text) > _MAX_CHARS:
        return None
    words = _bare(_SIZES.sub("", _one_line(text)).replace("{,}", ""), _MATH_MARKS)
    words = _UNION.split(words[match.end() :] if (match := _ELEMENT.match(words)) else words)
    if len(words) > MAX_ITEMS or None in (pieces := [_interval(_bare(piece, _MATH_MARKS)) for piece in words]):
        return None
    if len(units := {piece.unit for piece in pieces if piece.unit}) > 1:
        return None
    unit = "".join(units)
    union: list[Interval] = []
    for piece in sorted(replace(piece, unit=unit) for piece in pieces):
        last = union[-1] if union else None
        if last and (piece.low < last.high or (piece.low == last.high and (last.high_closed or not piece.low_open))):
            high, closed = max((last.high, last.high_closed), (piece.high, piece.high_closed))
            union[-1] = replace(last, high=high, high_closed=closed)
        else:
            union.append(piece)
    return tuple(union)


def _interval(text: str) -> Interval | None:
    match = _PIECE.fullmatch(text)
    if match is None or None in (ends := [_end(match[2]), _end(match[3])]):
        return None
    (low, high), closed = [end.value for end in ends], [match[1] == "[", match[4] == "]"]
    if any(math.isinf(end.value) and shut for end, shut in zip(ends, closed, strict=True)):
        return None
    if len(units := {end.unit for end in ends if end.unit}) > 1 or not (low < high or (low == high and all(closed))):
        return None
    return Interval(low, not closed[0], high, closed[1], "".join(units))


def _end(text: str) -> Quantity | None:
    if match := _INFINITY.fullmatch(text.strip().replace("−", "-")):
        return Quantity(-math.inf if match[1] == "-" else math.inf, "")
    return parse_quantity(text)


# ── JSON ──


def parse_json(text: str) -> Any:
    """The value of a JSON text, more strictly than `json.loads`.

    Raises:
        ValueError: it is none, a key stands twice in an object, it nests too deep for Python, or it holds NaN or
            Infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nests too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_BLOCK = re.compile(r"```json\b(.*?)```", re.DOTALL | re.IGNORECASE)


def last_json_object(reply: str) -> dict[str, Any] | None:
    r"""The JSON object in the last box of `reply` or, if it has no box, in its last closed block after "```json".

    None if that is no JSON object (see `parse_json`). `\text{...}` or dollar signs around it and `\{` for `{` do not
    count.
    """
    text = last_boxed(reply)
    if text is None:
        blocks = _BLOCK.findall(reply)
        text = blocks[-1] if blocks else ""
    text = _unstyled(text).strip(" $\n\t")
    if text.startswith(r"\{"):
        text = text.replace(r"\{", "{").replace(r"\}", "}")
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
