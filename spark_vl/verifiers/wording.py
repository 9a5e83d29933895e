"""What words and numbers mean next to each other: units, numbers between words, times, words that are no products.

Every function takes a `spelled` text and takes time linear in its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_lowercase

from spark_vl.answers import normalized, parse_quantity
from spark_vl.answers.quantities import PREFIXED_UNITS, SCALES, UNITS_AFTER_DIGIT, UNITS_IN_LETTERS, UNITS_IN_STYLE

_STYLED = re.compile(r"\\text\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


def unstyled(text: str) -> str:
    r"""Without `\text{...}`."""
    return " ".join(_STYLED.sub(r" \1 ", text).split())


# ── words ──

_LETTERS = re.compile(r"(?:[^\W\d_]{2,}|[^\W\d_a-zA-Z])(?:[\s',-]+[^\W\d_]+)*")
_SENTENCE = re.compile(r"[^\W\d_][\w\s.,;:'\"!?()/&-]*")
_SHORT_WORDS = frozenset(("no", "dne"))
_LINKS_ONLY = frozenset(("and", "or"))
_FIGURE = re.compile(r"[A-Z]{3,}")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?\d*){2,}")
_BEARING = re.compile(r"[NS] ?\d+(?:\.\d+)? ?° ?[EW]|[EW] ?\d+(?:\.\d+)? ?° ?[NS]")
_STATEMENTS = re.compile(r"\(\d\)(?:\s*,?\s*\(\d\)){2,}")


def is_word(letters: str) -> bool:
    """Whether it is a word, not a product: four letters, or three with a vowel and not consecutive as in "abc"."""
    low = letters.casefold()
    if not low.isascii():
        return low.isalpha()
    if len(low) != 3 or low in _SHORT_WORDS:
        return low in _SHORT_WORDS or (len(low) > 3 and low.isalpha())
    return low.isalpha() and not set(low).isdisjoint("aeiouy") and "".join(sorted(low)) not in ascii_lowercase


def words(text: str) -> str | None:
    r"""`text`, normalized, if it is to be read and not computed.

    Words, with numbers among them ("Step 2"), the name of a figure ("ABC"), a chemical formula, the numbers of
    statements ("(1)(3)(4)"), a bearing ("N 30° E"), a lone sign of relation.
    """
    if text in ("<", ">", "=", r"\le", r"\ge", r"\ne"):
        return text
    if _STATEMENTS.fullmatch(text):
        return re.sub(r"\D+", " ", text)
    plain = unstyled(text)
    if _BEARING.fullmatch(plain):
        return plain.replace(" ", "")
    formula = re.sub(r"[_{}\s]", "", plain)
    if _FORMULA.fullmatch(formula) and re.search(r"\d", formula):
        return formula
    said = normalized(plain)
    tokens = [token for token in re.split(r"[^\w]+|\d+", said) if token not in _LINKS_ONLY]
    long = any(len(token) > 3 and token.isalpha() for token in tokens)
    if _LETTERS.fullmatch(said):
        if (
            _FIGURE.fullmatch(plain)
            or any(map(is_word, tokens))
            or (text != plain and len(said) > 1 and said[1:2] != " ")
        ):
            return said
    elif long and _SENTENCE.fullmatch(said) and "\\" not in plain:
        return said
    return None


# ── units ──

_POWER = r"(?:\s?\^\s?(?:-?\d|\{\s?-?\d\s?\}))"
_STYLED_UNIT = rf"\\text\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{_POWER}?"
_STYLED_TAIL = re.compile(rf"(?P<tail>{_STYLED_UNIT}(?:\s?(?:/|\\cdot)?\s?{_STYLED_UNIT})*)[\s.]*$")
_PLAIN_TAIL = re.compile(
    r"(?:(?<=[\d})])(?P<space>\s?)|(?<=\\pi)\s|(?<=°)\s?)"
    rf"(?P<tail>[A-Za-z][A-Za-z. ]*{_POWER}?(?:(?:/|\s?\\cdot\s?)\s?[A-Za-z]+{_POWER}?)*)$"
)
_ENCLOSED_TAIL = re.compile(r"(?<=\S)\s?[(\[]\s?((?:\\text\{[^{}]*\}|[A-Za-z.]+)(?:\^(?:\d|\{\d\}))?)\s?[)\]]$")
_FACTORS = re.compile(r"(?:\\cdot|[\s/*·()-])+")
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|when|where|for|except|half|halves|thirds?|fifths?|tenths?|hundredths?|thousandths?"
    r"|(?:arc)?(?:sin|cos|tan|cot|csc)h?|log|exp|mod|sqrt|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|rho"
    r"|sigma|tau|phi|chi|psi|omega)\b",
    re.IGNORECASE,
)
EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")
_NUMERIC = re.compile(r"(?:[^A-Za-z\\]|\\(?:frac|sqrt|pi|times|cdot|div|pm)(?![A-Za-z])|\\[!])*")
_SCALES = SCALES | {"dozen": 12}


def measured(text: str) -> tuple[str, str]:
    """`text` without the unit at its end, and that unit. Words such as "million" become factors."""
    if enclosed := _ENCLOSED_TAIL.search(text):
        tried = f"{text[: enclosed.start()]} {enclosed[1]}"
        value, unit = measured(tried)
        return (value, unit) if unit else (text, "")
    match = _STYLED_TAIL.search(text) or _PLAIN_TAIL.search(text)
    if match is None or not (value := text[: match.start()].rstrip()):
        return text, ""
    names = unstyled(match["tail"]).rstrip(". ").split()
    factor = 1
    while names and (scale := _SCALES.get(names[0].lower().removesuffix("s"))):
        factor, names = factor * scale, names[1:]
    scaled = rf"{value}\times {factor}" if factor > 1 else value
    if not (unit := " ".join(names)):
        return scaled, ""
    if unit.lower() in ("percent", "percentage", "pct", "%"):
        return f"{scaled}%", ""
    styled = match.re is _STYLED_TAIL
    if not _is_unit(unit, value, styled, not styled and match["space"] == ""):
        return text, ""
    return (scaled[:-1], f"°{unit[0].upper()}") if value.endswith("°") else (scaled, unit)


def _is_unit(unit: str, value: str, styled: bool, glued: bool) -> bool:
    r"""Whether `unit`, at the end of an answer, is a unit rather than a factor, a name or a condition.

    Args:
        value: the answer before it.
        styled: whether it is in `\text{...}`.
        glued: whether it is in plain letters right after a digit, as a variable would be.
    """
    if value.endswith("°"):
        return unit in ("C", "F") or unit.lower() in ("celsius", "fahrenheit")  # N and W are directions
    unit = re.sub(r"^° ?(?=[CF]$)", "", unit).replace(".", "")
    names = [name for name in _FACTORS.split(re.sub(_POWER, "", unit)) if name]
    numeric = _NUMERIC.fullmatch(EQUALS.split(value)[-1]) is not None
    if not names or _NO_UNIT.search(unit) or not (numeric or (styled and max(map(len, names)) > 1)):
        return False
    if glued:
        known = len(names) == 1 and (names[0] in UNITS_AFTER_DIGIT or (len(names[0]) > 3 and known_unit(unit) != ""))
        return unit in UNITS_AFTER_DIGIT or (known and len(names[0]) > 1)
    if styled:
        return all(
            n in UNITS_IN_STYLE or n in PREFIXED_UNITS or (is_word(n) and not n.isupper()) or not n.isascii()
            for n in names
        )
    if len(names) == len(names[0]) == 1 and names[0] not in ("m", unit):  # x^2; but m^2
        return False
    return any(n in UNITS_IN_LETTERS or len(n) > 3 for n in names) and all(
        n in UNITS_IN_LETTERS or is_word(n) for n in names
    )


def known_unit(unit: str) -> str:
    """The one spelling of a unit that `parse_quantity` knows; else ""."""
    quantity = parse_quantity(f"1 {unit}")
    return quantity.unit if quantity else ""


# ── numbers between words ──

_NUMBER = re.compile(r"(-?(?:\d+(?:\.\d+)?|\.\d+))")
_LINKS = re.compile(r"\b(?:and|or)\b|[,;]")
_LETTERS_ONLY = re.compile(r"[A-Za-z\s.'/-]*")
_SMALL_WORDS = frozenset(("to", "by", "of", "in", "at", "per", "out"))


def parts(text: str) -> tuple[tuple[str, float], ...] | None:
    """The numbers in `text`, such as "5 ft 8 in", each with the words after it, sorted by the words.

    None if it has fewer than two numbers, only commas between them, or anything besides numbers and words. Of a list
    with commas, too, unless each number has words of its own.
    """
    first, *rest = _NUMBER.split(EQUALS.split(text)[-1])
    if len(rest) < 4 or unstyled(first).strip("\\ "):
        return None
    found, between = [], False
    for i in range(0, len(rest), 2):
        behind = unstyled(rest[i + 1])
        name = _LINKS.sub(" ", behind).strip(" .")
        if name in ("°", "'", "''", '"'):  # degrees and minutes, feet and inches; but not a list of angles
            reads = _LINKS.search(behind) is None
        else:
            reads = bool(_LETTERS_ONLY.fullmatch(name) and ("\\text" in rest[i + 1] or _are_words(name)))
        if not reads:
            return None
        between = between or (bool(name) and i + 2 < len(rest))
        found.append((known_unit(name) or name.casefold(), float(rest[i])))
    names = {name for name, _ in found}
    if not between or ("," in text and (len(names) < len(found) or "" in names)):
        return None
    return tuple(sorted(found))


def _are_words(text: str) -> bool:
    return all(word in UNITS_IN_LETTERS or word in _SMALL_WORDS or is_word(word) for word in text.split())


# ── times ──

_TIME = re.compile(r"(\d{1,2})((?::[0-5]\d){0,2})\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Time:
    """What may be a time of day or of a stopwatch."""

    hour: int
    rest: tuple[int, ...]
    half: str
    """"a", "p" or ""."""

    def agrees(self, other: Time) -> bool:
        """Half past seven in the evening is 7:30 PM, 19:30, and 7:30."""
        if self.rest != other.rest:
            return False
        if bool(self.half) == bool(other.half):
            return self.hour == other.hour and self.half == other.half
        known, unknown = (self, other) if self.half else (other, self)
        return unknown.hour in (known.hour, known.hour % 12 + 12 * (known.half == "p"))


def time(text: str) -> Time | None:
    """`text` as a time, if it may be one."""
    match = _TIME.fullmatch(unstyled(text))
    if match is None or not (match[2] or match[3]):
        return None
    return Time(int(match[1]), tuple(map(int, (match[2] or ":0")[1:].split(":"))), (match[3] or "").lower())
