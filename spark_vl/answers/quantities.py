"""Numbers and units as an answer writes them. The names of units, for formulas too, are all here."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spark_vl.answers.boxed import composed, normalized, one_line, plain, unmarked

# ── units ──

METRIC_UNITS = {  # symbol → names; both take the prefixes
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
_SYMBOLS = {f"{prefix}{symbol}": f"{prefix}{symbol}" for symbol in METRIC_UNITS for prefix in _PREFIXES}
_NAMES = {
    f"{prefix}{name}{plural}": f"{short}{symbol}"
    for symbol, names in METRIC_UNITS.items()
    for short, prefix in _PREFIXES.items()
    for name in names.split()
    for plural in ("", "s")
}
for _known, _spellings in _SPELLED_UNITS.items():
    for _spelling in filter(None, (_known, *_spellings.split())):
        (_NAMES if len(_spelling) > 2 else _SYMBOLS)[_spelling] = _known  # the case of a symbol counts: mW is not MW


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


_NAME = rf"(?:{_any_of(_SYMBOLS)}|(?i:{_any_of(_NAMES)}))"
_UNIT = rf"(?:(?:square|cubic|sq|cu)\.? )?{_NAME}(?:(?:\s?\^\s?)?[23]|²|³)?"
_UNIT_PARTS = re.compile(
    rf"(?:(?P<square>square|sq)|(?P<cubic>cubic|cu))?\.? ?(?P<name>{_NAME})(?:(?:\s?\^\s?)?(?P<power>[23²³]))?"
)


def _canonical_unit(text: str) -> str:
    """The one spelling of a unit: "cm^2" for "square centimeters"."""
    match = _UNIT_PARTS.fullmatch(text)
    assert match, "_NUMBER finds units only"
    name = match["name"]
    unit = _SYMBOLS[name] if name in _SYMBOLS else _NAMES[name.casefold()]
    power = "2" if match["square"] else "3" if match["cubic"] else match["power"]
    return f"{unit}^{power}".translate({ord("²"): "2", ord("³"): "3"}) if power else unit


_VAGUE = {"°": {"°C", "°F"}, "pound": {"lb", "£"}}


def same_unit(a: str, b: str) -> bool:
    """Whether the units of two `Quantity` are equal or do not contradict each other: one is missing, or one leaves open
    what the other says (degrees: C or F; pounds: weight or money)."""
    return not (a and b) or a == b or b in _VAGUE.get(a, ()) or a in _VAGUE.get(b, ())


def _set(spellings: str) -> frozenset[str]:
    return frozenset(spellings.split())


# In a formula a letter may be a variable: "5m" may be 5 · m. These short spellings are units there,
UNITS_AFTER_DIGIT = _set("m s g h l cm mm km kg ft lb hr min sec mph")
"""even in plain letters right after a digit ("5m");"""
UNITS_IN_LETTERS = UNITS_AFTER_DIGIT | _set(
    "L N J W V A K yd mi in lbs oz gal hrs ms day dm kN kJ kW kWh kV Hz kHz MHz Pa kPa mL ml mol ohm rad cup am pm AM"
    " PM sq cu per of men"
)
"""in plain letters after a space ("5 N"), where the last few are words among units;"""
UNITS_IN_STYLE = UNITS_IN_LETTERS | _set(
    "C F T H M cc eV MeV dB gm au AU ly lm lx Bq Gy Sv Wb GB MB KB TB GW MW MJ MPa GHz kph kmh rpm bpm psi ppm pts Rs"
    " USD AUD EUR"
)
r"""in `\text{...}` or another style (`5\text{ T}`);"""
PREFIXED_UNITS = frozenset(
    f"{prefix}{symbol}" for prefix in "kcdmunpμ" for symbol in (*METRIC_UNITS, "C", "F", "T", "H", "eV")
)
r"""in a style, too. The prefix M is not among them: `\text{MN}` may be a line from M to N."""


# ── numbers ──

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_NO_NOUN = (  # words after a number that change it, or that lead to another answer
    rf"(?:{'|'.join(_WORDS)}|(?:thir|for|fif|six|seven|eigh|nine)ty|halves|half|quarters?|dozens?|pi|infinity"
    rf"|(?:{'|'.join(SCALES)})(?:s|ths?)?|lakhs?|crores?|mil|mn|bn"
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
_Rules = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]
_FORMULA: _Rules = [  # applied before `\text{...}` is undone, because it may end a command: `^\circ\text{C}`
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|×"), "*"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\mu(?![A-Za-z])\s*|µ"), "μ"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    (re.compile(r"[¼-¾⅐-⅞]"), lambda match: f" {unicodedata.normalize('NFKC', match[0]).replace('⁄', '/')} "),
]
_SPELLINGS: _Rules = [  # applied after it is undone
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


@dataclass(frozen=True)
class Quantity:
    """A number as it is written in an answer."""

    value: float
    """Finite; 50 for "50%"."""
    unit: str
    """In one spelling ("cm", "m/s^2", "%", "°", "$"), or the words after the number in lower case ("people")."""


def parse_quantity(text: str, *, nouns: bool = False) -> Quantity | None:
    r"""Reads `text`, the content of a box, as one finite number with or without a unit.

    Accepted: a sign, thousands separators ("1,234.5", "1 234"), currency signs, a percent sign ("50%" is 50), degrees,
    a unit ("3 cm", `3\ \text{m/s}^2`), fractions ("1/2", `\frac{1}{2}`, "1 1/2", "½"), "1.5e3" and
    `1.5 \times 10^{3}`, "=" or "x =" before the number, and the words of `parse_word`. None for anything else, also
    for two numbers.

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
    if len(_DOLLAR.findall(text)) % 2 == 0:  # a pair encloses a formula; a single one is a currency
        text = _DOLLAR.sub(" ", text)
    text = one_line(composed(text))
    for spelling, standard in _SPELLINGS:
        text = spelling.sub(standard, text)
    text = unmarked(" ".join(text.replace(r"\$", "$").split()), "*`(").strip()
    text = unmarked(text[match.end() :], "*`(") if (match := _EQUALS.match(text)) else text
    match = _NUMBER.fullmatch(text)
    return None if match is None or (match["nouns"] and not nouns) else _quantity(match)


def _quantity(match: re.Match[str]) -> Quantity | None:
    """The quantity that a match of `_NUMBER` says; None if it is not one finite number."""

    def read(number: str) -> float:
        return float(number.replace(",", ""))

    if match["value"]:
        value = float(f"{match['value'].replace(',', '')}e{match['exponent'] or 0}")
    elif (divisor := read(match["den"])) == 0:
        return None
    else:
        value = read(match["num"]) / divisor
        if match["whole"]:
            if not 0 < value < 1:  # two numbers, not a mixed one
                return None
            value += read(match["whole"])
    units = [_canonical_unit(match[name]) for name in ("unit", "per") if match[name]]
    if match["currency"]:
        if match["unit"] and units[0] != match["currency"]:
            return None
        units = [match["currency"], *units[match["unit"] is not None :]]
    unit = "/".join(["", *units] if match["per"] and len(units) == 1 else units) or match["nouns"].strip().casefold()
    return Quantity(-value if match["sign"] == "-" else value, unit) if math.isfinite(value) else None


TOLERANCE = 1e-6
"""Relative to the gold: room for rounding in the last printed digits only."""


def agrees(answer: Quantity, gold: Quantity, relative: float = TOLERANCE, absolute: float = 0.0) -> bool:
    """Whether the values differ by at most `relative` times that of `gold`, or by at most `absolute`, and the units are
    the same (see `same_unit`). Nothing is converted: "1 m" contradicts "100 cm".
    """
    if not same_unit(answer.unit, gold.unit):
        return False
    slack = 1e-12 * abs(gold.value)  # 1.155 is 5% above 1.1, though not in binary fractions
    return abs(answer.value - gold.value) <= max(relative * abs(gold.value), absolute) + slack


_WORD_VALUES = {"none": 0} | {word: value for value, word in enumerate(_WORDS)}


def parse_word(text: str) -> int | None:
    """Reads `text`, the content of a box, as an English number: "none" (0), "zero" to "twenty"; else None."""
    return _WORD_VALUES.get(normalized(text))


_COUNT = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.0*)?")


def parse_count(text: str) -> int | None:
    """Reads `text`, the content of a box, as a whole number from 0: digits ("1,234", "5.0") or a word of `parse_word`.

    None for anything else: signs, fractions, units, nouns ("5 dogs"), "about 5", "5 or 6", "no" and "a".
    """
    if len(text) > 200:
        return None
    match = _COUNT.fullmatch(plain(text.replace("{,}", ",")))
    return int(match[1].replace(",", "")) if match else parse_word(text)
