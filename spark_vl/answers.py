"""Finds the answer in a model's reply: boxed text, a label, choices, numbers, items, intervals, JSON.

Everything that reads an answer (verifiers, recycling, judges) starts from `last_boxed`, so that the text that a judge
is shown is the text that was scored. Every function here runs in time linear in the length of its text.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
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


def plain(text: str) -> str:
    """`text` without styling, quotes, outer parentheses and a trailing period, white space collapsed."""
    return _one_line(text).strip(" ().*_$`'\"")


def normalised(text: str) -> str:
    """`plain(text)` in lower case."""
    return plain(text).casefold()


def match_label(reply: str, labels: tuple[str, ...]) -> str | None:
    r"""The one of `labels` that the last box of `reply` says; None if it says none, or anything besides.

    Case, `\text{...}`, `**...**`, parentheses and a trailing period do not count: `\boxed{(a).}` says "A". Whole
    labels only: neither "Yesterday" nor "Yes and No" says "Yes".
    """
    boxed = last_boxed(reply)
    if boxed is None:
        return None
    return {plain(label).lower(): label for label in labels}.get(plain(boxed).lower())  # casefolded, `yeſ` is "yes"


_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*\(?)?([a-z])\s*(?:$|\)?\s*(?:\.|:(?=\s|$))|\))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z])[A-Z](?=[.):])|(?:\band\b|\bor\b|[,;/&])\s*\(?[A-Z](?![A-Za-z])|^[A-Z]$")


def match_choice(text: str, choices: tuple[str, ...] = ()) -> str | None:
    """The letter ("A", "B", ...) of the choice that `text`, the content of a box, names; None if none or several.

    Accepted: the letter ("B", "(b)", "B.", "Option B"), the letter with a text ("B. 5 cm") and, where `choices` holds
    the options in order, an option's own text or, if the text is no option's, its number ("0.5" for "1/2"). Where
    letter and text name different options, or a bare letter is also another option's text, the answer is ambiguous.
    Without `choices`, every letter is a choice.
    """
    letters = ascii_uppercase[: len(choices)] if choices else ascii_uppercase
    options = [normalised(choice) for choice in choices]

    def saying(words: str) -> set[str]:
        said = normalised(words)
        same = {letter for letter, option in zip(letters, options, strict=False) if option == said}
        if same or (number := parse_quantity(words)) is None:
            return same
        numbers = zip(letters, map(parse_quantity, choices), strict=False)
        return {letter for letter, value in numbers if value is not None and agrees(number, value)}

    named = saying(text)
    if (match := _CHOICE.fullmatch(plain(text))) and (letter := match[1].upper()) in letters:
        words = plain(match[2])
        if not words:
            named.add(letter)
        elif not named:
            second = {found[-1] for found in _SECOND_CHOICE.findall(words)} & set(letters) - {letter}
            named = saying(words) or ({letter} if not second else set())
            return letter if letter in named else None
    return named.pop() if len(named) == 1 else None


_BEFORE_CHOICES = re.compile(r"(?:both )?(?:(?:options|choices|answers)\b ?:? ?)?", re.IGNORECASE)
_MARK = re.compile(r" ?[,;&，；、] ?(?:and\b ?)?", re.IGNORECASE)
_AND = re.compile(r" ?\band\b ?", re.IGNORECASE)
_RUN_OF_CHOICES = re.compile(r"[A-J]{2,10}")


def match_choices(text: str, choices: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The letters of the choices that `text`, the content of a box, names, sorted; () if none.

    One as `match_choice` has it, or several, each of which it has: "A, C", "A; C", "A and C", "Options A & C", "AC",
    "red, blue". "A or C" names none.
    """
    if (letter := match_choice(text, choices)) is not None:
        return (letter,)
    words = plain(text)
    words = words[_BEFORE_CHOICES.match(words).end() :]
    letters: set[str | None] = set()
    for part in words if _RUN_OF_CHOICES.fullmatch(words) else _MARK.split(words, maxsplit=26):
        letter = match_choice(part, choices)
        letters |= (
            {match_choice(each, choices) for each in _AND.split(part, maxsplit=26)} if letter is None else {letter}
        )
    return () if None in letters else tuple(sorted(letters))


_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]*)?|\.[0-9]+"
_NAME = (
    r"(?:degrees?|percent|°[CF]?|℃|℉|%|[$€£¥]|[kcmdnμ]?m|inch(?:es)?|in|foot|feet|ft|yards?|yd|miles?|mi|mph"
    r"|(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re))s?|[km]?g|m?[lL]|pounds?|lbs?|oz"
    r"|(?:millisecond|second|minute|hour|day|week|month|year)s?|ms|s|sec|min|hr?s?|[kM]?(?:N|J|W|Hz|Pa|V|A|Ω)|mol|K"
    r"|dollars?|cents?|units?)"
)
_UNIT = rf"(?:(?:square|cubic|sq|cu)\.? )?{_NAME}(?:(?:\s?\^\s?)?[23]|²|³)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥])?\s?"
    rf"(?:\\frac\s?(?P<num>[0-9]|\{{(?:{_UNSIGNED})\}})\s?(?P<den>[0-9]|\{{(?:{_UNSIGNED})\}})|(?P<value>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<over>{_UNSIGNED})"
    rf"|[eE](?P<e>[-+]?[0-9]+)|\s?[*×]\s?10\s?\^\s?(?P<power>[-+]?[0-9]+|\{{[-+]?[0-9]+\}}))?)"
    rf"(?:\s?(?P<unit>{_UNIT}(?:\s?(?:/|per)\s?{_UNIT})?))?"
)
_SPELLINGS = [
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\^\{\s*([23])\s*\}"), r"^\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
]


_SPELT_UNITS = {
    "": "$ dollar dollars unit units",  # a dollar sign may as well be that of math mode
    "°": "degree degrees",
    "%": "percent",
    "°C": "℃",
    "°F": "℉",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mi/h": "mph",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "kg": "kilogram kilograms",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "L": "l liter liters litre litres",
    "mL": "ml milliliter milliliters millilitre millilitres",
    "lb": "lbs pound pounds",
    "ms": "millisecond milliseconds",
    "s": "sec second seconds",
    "min": "minute minutes",
    "h": "hr hrs hs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years",
    "cent": "cents",
}
_UNITS = {spelling: unit for unit, spellings in _SPELT_UNITS.items() for spelling in spellings.split()}
_PER = re.compile(r"\s?(?:/|\bper\b)\s?")
_UNIT_PARTS = re.compile(
    rf"(?:(?P<square>square|sq)|(?P<cubic>cubic|cu))?\.? ?(?P<name>{_NAME})(?:(?:\s?\^\s?)?(?P<power>[23²³]))?"
)


def _unit(text: str) -> str:
    """One spelling for each unit: "square centimeters" is "cm^2"."""
    parts = []
    for match in filter(None, map(_UNIT_PARTS.fullmatch, _PER.split(text))):
        power = "2" if match["square"] else "3" if match["cubic"] else match["power"]
        name = _UNITS.get(match["name"], match["name"])
        parts.append(f"{name}^{power}".translate({ord("²"): "2", ord("³"): "3"}) if power else name)
    return "/".join(parts)


@dataclass(frozen=True)
class Quantity:
    """A number as it is written in an answer."""

    value: float
    """Finite; of "50%" it is 50."""
    unit: str
    """In one spelling ("cm", "m/s^2", "%", "°"); empty without one, and for dollars, whose sign may be math mode's."""


def parse_quantity(text: str) -> Quantity | None:
    r"""The finite number, with its unit, that `text`, the content of a box, is; None if it is none, or holds a second.

    Accepted: a sign, thousands separators ("1,234.5"), currency signs, a percent sign ("50%" is 50), degrees, a unit
    ("3 cm", `3\ \text{m/s}^2`), fractions ("1/2", `\frac{1}{2}`), "1.5e3" and `1.5 \times 10^{3}`. Words of scale
    ("3 million") are not.
    """
    if len(text) > 200:  # no number is that long
        return None
    text = _unstyled(text)
    for spelling, standard in _SPELLINGS:
        text = spelling.sub(standard, text)
    text = " ".join(_SPACE.sub(" ", text).split()).strip(" ()*$").removesuffix(".")
    if (match := _NUMBER.fullmatch(text)) is None:
        return None
    number = (match["num"] or match["value"]).strip("{}").replace(",", "")
    divisor = float((match["den"] or match["over"] or "1").strip("{}").replace(",", ""))
    exponent = match["e"] or (match["power"] or "0").strip("{}")
    value = float(f"{match['sign']}{number}e{exponent}") / divisor if divisor else math.nan
    return Quantity(value, _unit(match["unit"] or match["currency"] or "")) if math.isfinite(value) else None


def parse_number(text: str) -> float | None:
    """The value of `parse_quantity(text)`, None if it has none."""
    quantity = parse_quantity(text)
    return None if quantity is None else quantity.value


TOLERANCE = 1e-6
"""Relative to the gold: room for rounding in the last printed digits, not for another answer."""


def agrees(answer: Quantity, gold: Quantity, relative: float = TOLERANCE, absolute: float = 0.0) -> bool:
    """Whether the values differ by at most `relative` times that of `gold`, or `absolute`, and no units contradict.

    A unit that is missing on one side contradicts nothing, nor do degrees without C or F; nothing is converted: "1 m"
    contradicts "100 cm".
    """
    units = {answer.unit, gold.unit}
    if "" not in units and len(units) > 1 and ("°" not in units or not units <= {"°", "°C", "°F"}):
        return False
    slack = 1e-12 * abs(gold.value)  # 1.155 is 5% above 1.1, though not in binary fractions
    return abs(answer.value - gold.value) <= max(relative * abs(gold.value), absolute) + slack


_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_WORD_VALUES = {"none": 0} | {word: value for value, word in enumerate(_WORDS)}


def parse_word(text: str) -> int | None:
    """The number that `text`, the content of a box, is in English: "none" (0), "zero" to "twenty"; else None."""
    return _WORD_VALUES.get(normalised(text))


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
_MAX_CHARS = 10_000
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_NOTHING = re.compile(r"\\(?:emptyset|varnothing)|∅")
_LAST_AND = re.compile(r"(?:^| )and ")


def parse_items(text: str, conjunction: bool = True) -> tuple[str, ...] | None:
    r"""The items that `text`, the content of a box, lists; None if it lists none, or more than `MAX_ITEMS`.

    A JSON array of texts, numbers and truth values; or items between commas, or between semicolons if there is one,
    with or without brackets around all of them: "1, 2", `\{1, 2\}`, "[a; b]". Separators within brackets belong to an
    item. "[]", `\{\}` and `\emptyset` list nothing: ().

    Args:
        conjunction: whether "and" separates the last items ("a, b and c").
    """
    if len(text) > _MAX_CHARS:
        return None
    words = _SIZES.sub("", _one_line(text)).replace(r"\{", "{").replace(r"\}", "}").strip(" $*`")
    if words.startswith("["):
        try:
            values = parse_json(words)
        except ValueError:
            pass  # not JSON, but perhaps "[a, b]"
        else:
            scalar = all(isinstance(value, str | int | float) for value in values)
            items = tuple(value if isinstance(value, str) else json.dumps(value) for value in values) if scalar else ()
            return items if scalar and len(items) <= MAX_ITEMS else None
    words = words.rstrip(". ")
    close, separators = _top_level(words)
    if close is not None and close == len(words) - 1:
        words = words[1:-1].strip()
        _, separators = _top_level(words)
        if not words:
            return ()
    if _NOTHING.fullmatch(words):
        return ()
    marks = [i for i in separators if words[i] == ";"] or separators
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
        elif not stack and mark in ",;":
            separators.append(i)
    return first, separators


@dataclass(frozen=True, order=True)
class Interval:
    """From `low` to `high`, with or without its ends. Infinite ends are open."""

    low: float
    low_open: bool
    high: float
    high_closed: bool


_PIECE = re.compile(r"([\[(]) ?([^,;()\[\]]+)[,;] ?([^,;()\[\]]+)([\])])")
_UNION = re.compile(r" ?(?:\\cup(?![A-Za-z])|∪|\bU\b) ?")
_ELEMENT = re.compile(r"[A-Za-z] ?(?:\\in(?![A-Za-z])|∈) ?")
_INFINITY = re.compile(r"([-+]?) ?(?:\\infty|∞|inf(?:inity)?)", re.IGNORECASE)


def parse_intervals(text: str) -> tuple[Interval, ...] | None:
    r"""The disjoint intervals, from low to high, whose union `text`, the content of a box, is; None if it is none.

    Accepted: "(1, 2]", `x \in [0, \infty)`, `(-\infty; 0) \cup (1, 2)`. Ends are numbers as in `parse_number`. Those
    that overlap or touch are one interval. An empty one, and one that is closed at infinity, is no answer.
    """
    if len(text) > _MAX_CHARS:
        return None
    words = _SIZES.sub("", _one_line(text)).replace("{,}", "").strip(" $*`.")
    words = _UNION.split(words[match.end() :] if (match := _ELEMENT.match(words)) else words)
    if len(words) > MAX_ITEMS or None in (pieces := [_interval(piece.strip()) for piece in words]):
        return None
    union: list[Interval] = []
    for piece in sorted(pieces):
        last = union[-1] if union else None
        if last and (piece.low < last.high or (piece.low == last.high and (last.high_closed or not piece.low_open))):
            high, closed = max((last.high, last.high_closed), (piece.high, piece.high_closed))
            union[-1] = Interval(last.low, last.low_open, high, closed)
        else:
            union.append(piece)
    return tuple(union)


def _interval(text: str) -> Interval | None:
    match = _PIECE.fullmatch(text)
    if match is None or None in (ends := [_end(match[2]), _end(match[3])]):
        return None
    (low, high), closed = ends, [match[1] == "[", match[4] == "]"]
    if any(math.isinf(end) and shut for end, shut in zip(ends, closed, strict=True)):
        return None
    return Interval(low, not closed[0], high, closed[1]) if low < high or (low == high and all(closed)) else None


def _end(text: str) -> float | None:
    if match := _INFINITY.fullmatch(text.strip().replace("−", "-")):
        return -math.inf if match[1] == "-" else math.inf
    return parse_number(text)


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
