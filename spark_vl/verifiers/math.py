"""Mathematical expressions: the reply's last box is equivalent to the gold according to math-verify.

math-verify can run forever (`9^{9^9}`), and its own timeouts need the main thread, so they are off here: run this in a
`VerifierPool`. It also merges several boxes into a set, picks numbers out of prose, reads "1 2" as 3 and fails on
`30°`; so it gets exactly one box, cleaned, and must not search anything else. What it drops as a unit may be a variable
or half of the answer, it reads a colon as division and a word as a product of letters; so this module itself reads
units, numbers between words, times, ratios and words.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import gcd
from string import ascii_lowercase
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, FiniteSet, Integer, Interval, MatrixBase, Mul, Set, Symbol, Tuple, floor, log
from sympy.logic.boolalg import Boolean

from spark_vl.answers import last_boxed, normalized, parse_quantity, plain
from spark_vl.answers.boxed import STYLE
from spark_vl.answers.quantities import PREFIXED_UNITS, SCALES, UNITS_AFTER_DIGIT, UNITS_IN_LETTERS, UNITS_IN_STYLE
from spark_vl.records import BadRecordError, PromptRecord, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

_MAX_CHARS = 1000
"""A longer box is not an answer, nor a longer gold, and each would take the whole deadline."""

_DEFAULT = LatexExtractionConfig()
_CONFIG = replace(_DEFAULT, normalization_config=replace(_DEFAULT.normalization_config, units=False))

# ── spelling ──


def _fraction(match: re.Match[str]) -> str:
    """`½` as LaTeX."""
    return r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", match[0]).split("\u2044"))


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction 15/90."""
    whole, once, again = match[1], match[2], match[3] or match[4]
    number = int(whole + once + again) - int("0" + whole + once)
    return rf"\frac{{{number}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _script(sign: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{sign}{{{unicodedata.normalize('NFKC', match[0]).replace(chr(0x2212), '-')}}}"


_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[hv]?phantom\s*\{(?:[^{}]|\{[^{}]*\})*\}"), ""),  # phantoms are not shown
    (re.compile(rf"^\s*{STYLE}\s*\{{\s*((?:-|\\?\$)?\.?\d[^{{}}]*)\}}\s*$"), r"\1"),  # \text{5 cm}
    (re.compile(r"(?<!\\)\\$"), ""),  # left of `\ ` when white space at the end was stripped
    (re.compile(r"(?<!\\)\\!"), ""),  # 1,\!000
    (re.compile(r"\\underline(?![A-Za-z])|\\[bB]igg?[lrm]?(?![A-Za-z])"), ""),
    (re.compile(r"^\s*(?:=|≈|\\approx(?![A-Za-z]))"), ""),
    (re.compile(r"\\varnothing(?![A-Za-z])|∅"), r"\\emptyset "),
    (re.compile(r"[°º]|\^?\s*\\degrees?(?![A-Za-z])"), r"^\\circ "),
    (
        re.compile(
            r"\\(sin|cos|tan|cot|sec|csc)\s*(?:\\left)?[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*(?:\\right)?[)}]?"
        ),
        r"\\\1(\\frac{\2\\pi}{180})",
    ),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"[·⋅∙]"), r"\\cdot "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"[¼-¾⅐-⅞]"), _fraction),
    (re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+"), _script("^")),
    (re.compile(r"[₀-₉]+"), _script("_")),
    (re.compile(r"_(\w)(?=\s)"), r"_{\1}"),  # `\log_2 8` is not two numbers
    (re.compile(r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))"), _repeating),
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"(?<!\\)(?:\\[ ,;:]|~)|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"(?<=\d) (?=\d{3}(?!\d))"), ""),  # 20 000
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 1/2, which would be (2 + 1)/2
    (re.compile(r"\\frac\s*(\d)\s+(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(\d)[eE]([-+]?\d+)(?![A-Za-z\d])"), r"\1\\times 10^{\2}"),
    (re.compile(r"[£€¥₹]"), ""),
    (re.compile(r"(?<=\d)(?:st|nd|rd|th)$"), ""),
    (re.compile(rf"(?<=\d)(\s*(?:{STYLE}\s*\{{\s*)?(?:[ckdm]?m|ft|in))([23])(?=\s*\}}?$)"), r"\1^\2"),  # 5 cm2
]


@lru_cache(maxsize=1024)  # a group shares its gold and often its answers
def _clean(answer: str) -> str:
    for spelling, standard in _SPELLINGS:
        answer = spelling.sub(standard, answer)
    return re.sub(r"(?<!\\right)\.$", "", answer.strip("*` ").rstrip(",;"))


# ── units ──

_POWER = r"(?:\s?\^\s?(?:-?\d|\{\s?-?\d\s?\}))"
_STYLED_UNIT = rf"{STYLE}\s?\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}{_POWER}?"
_STYLED_TAIL = re.compile(rf"(?P<tail>{_STYLED_UNIT}(?:\s?(?:/|\\cdot)?\s?{_STYLED_UNIT})*)[\s.]*$")
_PLAIN_TAIL = re.compile(
    r"(?:(?<=[\d})])(?P<space>\s?)|(?:(?<=\\pi)|(?<=\\circ))\s)"
    rf"(?P<tail>[A-Za-z][A-Za-z. ]*{_POWER}?(?:/\s?[A-Za-z]+{_POWER}?)?)$"
)
_FACTORS = re.compile(r"(?:\\cdot|[\s/*·()-])+")
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|when|where|for|except|half|halves|thirds?|fifths?|tenths?|hundredths?|thousandths?"
    r"|(?:arc)?(?:sin|cos|tan|cot|csc)h?|log|exp|mod|sqrt|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|rho"
    r"|sigma|tau|phi|chi|psi|omega)\b",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")
_NUMERIC = re.compile(r"(?:[^A-Za-z\\]|\\(?:[dtc]?frac|sqrt|pi|left|right|times|cdot|pm|circ)(?![A-Za-z])|\\[%$!])*")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?$")
_SCALES = SCALES | {"dozen": 12}


def _is_unit(unit: str, value: str, styled: bool, glued: bool) -> bool:
    r"""Whether `unit`, at the end of an answer, is a unit rather than a factor, a name or a condition.

    Args:
        value: the answer before it.
        styled: whether it is in `\text{...}` or another style.
        glued: whether it is in plain letters right after a digit, as a variable would be.
    """
    if _DEGREES.search(value):
        return unit in ("C", "F") or unit.lower() in ("celsius", "fahrenheit")  # N and W are directions
    unit = re.sub(r"^\^\\circ (?=[CF]$)", "", unit)
    unit = unit.replace(".", "")
    words = [word for word in _FACTORS.split(re.sub(_POWER, "", unit)) if word]
    numeric = _NUMERIC.fullmatch(_EQUALS.split(value)[-1]) is not None
    if not words or _NO_UNIT.search(unit) or not (numeric or (styled and max(map(len, words)) > 1)):
        return False
    if glued:
        return unit in UNITS_AFTER_DIGIT or (len(words) == 1 < len(words[0]) and words[0] in UNITS_AFTER_DIGIT)
    if styled:
        return all(
            w in UNITS_IN_STYLE or w in PREFIXED_UNITS or (_is_word(w) and not w.isupper()) or not w.isascii()
            for w in words
        )
    if len(words) == len(words[0]) == 1 and words[0] not in ("m", unit):  # x^2; but m^2
        return False
    return any(w in UNITS_IN_LETTERS or len(w) > 3 for w in words) and all(
        w in UNITS_IN_LETTERS or _is_word(w) for w in words
    )


@lru_cache(maxsize=1024)
def _measured(answer: str) -> tuple[str, str]:
    """`answer`, cleaned, without the unit at its end, and that unit. Words such as "million" become factors."""
    answer = _clean(answer)
    match = _STYLED_TAIL.search(answer) or _PLAIN_TAIL.search(answer)
    if match is None or not (value := answer[: match.start()].rstrip()):
        return answer, ""
    words = plain(match["tail"]).split()
    factor = 1
    while words and (scale := _SCALES.get(words[0].lower().removesuffix("s"))):
        factor, words = factor * scale, words[1:]
    scaled = rf"{value}\times {factor}" if factor > 1 else value
    if not (unit := " ".join(words)):
        return scaled, ""
    if unit.lower() in ("percent", "%"):
        return rf"{scaled}\%", ""
    styled = match.re is _STYLED_TAIL
    return (scaled, unit) if _is_unit(unit, value, styled, not styled and match["space"] == "") else (answer, "")


# ── numbers between words ──

_NUMBER = re.compile(r"(-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+))")
_LINKS = re.compile(r"\b(?:and|or)\b|[,;]")
_LETTERS_ONLY = re.compile(r"[A-Za-z\s.'/-]*")
_SMALL_WORDS = frozenset(("to", "by", "of", "in", "at", "per", "out"))


def _parts(answer: str) -> list[tuple[str, float]] | None:
    """The numbers in `answer`, such as "5 ft 8 in", each with the words after it, sorted by the words.

    None if it has fewer than two numbers, only commas between them, or anything besides numbers and words."""
    first, *rest = _NUMBER.split(_EQUALS.split(_clean(answer))[-1])
    if len(rest) < 4 or plain(first).strip("\\"):
        return None
    parts, between = [], False
    for i in range(0, len(rest), 2):
        behind = rest[i + 1]
        words = _LINKS.sub(" ", plain(behind)).strip()
        if words in (r"^\circ", "'", "''", '"'):  # degrees and minutes, feet and inches; but not a list of angles
            reads = _LINKS.search(behind) is None
        else:
            reads = bool(_LETTERS_ONLY.fullmatch(words) and (re.search(STYLE, behind) or _are_words(words)))
        if not reads:
            return None
        between = between or (bool(words) and i + 2 < len(rest))
        quantity = parse_quantity(f"1 {words}")
        parts.append((quantity.unit if quantity else words.casefold(), float(rest[i].replace(",", ""))))
    return sorted(parts) if between else None


def _are_words(text: str) -> bool:
    return all(word in UNITS_IN_LETTERS or word in _SMALL_WORDS or _is_word(word) for word in text.split())


# ── times and ratios ──

_TIME = re.compile(r"(\d{1,2})((?::[0-5]\d){0,2})\s*(?:([ap])\.?\s?m)?", re.IGNORECASE)
_NO_RATIO = re.compile(r"[<>,;|]|\\[{}]|\\(?:in|mid|to|le|ge)(?![A-Za-z])")


def _time(answer: str) -> tuple[list[int], str] | None:
    """If `answer` may be a time of day or of a stopwatch: its numbers, hours first, and "a", "p" or ""."""
    match = _TIME.fullmatch(plain(_clean(answer)))
    if match is None or not (match[2] or match[3]):
        return None
    return [int(match[1]), *map(int, (match[2] or ":0")[1:].split(":"))], (match[3] or "").lower()


def _same_time(one: tuple[list[int], str], other: tuple[list[int], str]) -> bool:
    """Half past seven in the evening is 7:30 PM, 19:30, and 7:30."""
    (hour, *minutes), half = one
    (other_hour, *other_minutes), other_half = other
    if minutes != other_minutes:
        return False
    if bool(half) == bool(other_half):
        return hour == other_hour and half == other_half
    hour_of_day, unknown = (hour, other_hour) if half else (other_hour, hour)
    return unknown in (hour_of_day, hour_of_day % 12 + 12 * ((half or other_half) == "p"))


def _only_time(answer: str) -> bool:
    """Whether it is a time and cannot be a ratio, which would be in lowest terms and have no leading zeros."""
    time = _time(answer)
    return time is not None and ":" in answer and (time[1] != "" or ":0" in answer or gcd(*time[0]) > 1)


def _ratio(answer: str) -> list[Any]:
    """The terms between its colons, parsed; [] if it is not a ratio."""
    terms = _EQUALS.split(_measured(answer)[0])[-1].strip("$ ").split(":")
    if len(terms) < 2 or _NO_RATIO.search(answer):
        return []
    parsed = [_parse(term) for term in terms]
    return [term for (term,) in parsed] if all(parsed) else []


# ── words ──

_STYLED = re.compile(rf"(?:{STYLE}\s*\{{[^{{}}]*\}}[\s.$*]*)+")
_LETTERS = re.compile(r"[^\W\d_]{2,}(?:[\s',-]+[^\W\d_]+)*")
_SHORT_WORDS = frozenset(("no", "dne"))
_FIGURE = re.compile(r"[A-Z]{3,}")


def _is_word(letters: str) -> bool:
    """Whether it is a word, not a product: four letters, or three with a vowel and not consecutive as in "abc"."""
    low = letters.casefold()
    if len(low) != 3 or low in _SHORT_WORDS:
        return low in _SHORT_WORDS or (len(low) > 3 and low.isalpha())
    return low.isalpha() and not set(low).isdisjoint("aeiouy") and "".join(sorted(low)) not in ascii_lowercase


def _words(answer: str) -> str | None:
    r"""`answer`, normalized, if it is words rather than a product of letters: `\text{...}`, a word, a figure."""
    said = normalized(answer)
    if _LETTERS.fullmatch(said) and (
        _STYLED.fullmatch(answer) or any(map(_is_word, re.split(r"[\s',-]+", said))) or _FIGURE.fullmatch(plain(answer))
    ):
        return said
    return None


# ── expressions ──


def _angle(match: re.Match[str]) -> str:
    r"""`\angle CBA` as one name, the same as for ABC: the vertex is the middle letter."""
    side, vertex, other = match.groups()
    return rf" \text{{angle{min(side, other)}{vertex}{max(side, other)}}} "


_LETTER_IN_STYLE = rf"{STYLE}\s*\{{\s*(\\pi\s|[A-Za-z]|[A-Z]{{2,}})\s*\}}"
_NAMES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(rf"(?<=[A-Za-z])(?={STYLE})"), " "),  # what ends a command
    (re.compile(rf"(?<=[\^_]){_LETTER_IN_STYLE}"), r"{\1}"),
    (re.compile(_LETTER_IN_STYLE), r"\1"),
    (re.compile(r"(?:\\angle(?![A-Za-z])|∠)\s*\{?\s*([A-Z])\s*([A-Z])\s*([A-Z])(?![A-Za-z])\s*\}?"), _angle),
]
_TWO_NUMBERS = re.compile(r"\d\s+\d")
_INTERVAL = re.compile(r"\\infty|\\cup|[\[\]]")
_BRACES = re.compile(r"(?:\\left\s*)?\\\{")


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """[expression], or [] if `answer`, the content of a box, is not mathematics."""
    answer, _ = _measured(answer)
    for name, standard in _NAMES:
        answer = name.sub(standard, answer)
    if _TWO_NUMBERS.search(answer):  # math-verify would add them
        return []
    return parse(rf"\boxed{{{answer}}}", [_CONFIG], fallback_mode="no_fallback", parsing_timeout=None)


def _decimals(*expressions: Any) -> int:
    """The number of decimals that math-verify compares: six, or as many as give numbers below 0.1 six digits."""
    smallest = min((exponent for e in expressions for exponent in _exponents(e)), default=0)
    return 6 - min(0, smallest + 1)


def _exponents(expression: Any) -> Iterator[int]:
    """The power of ten of each real number in `expression` that is compared by itself, for example as a set member."""
    if not isinstance(expression, Basic | MatrixBase):
        return
    if isinstance(expression, MatrixBase):
        for entry in expression:
            yield from _exponents(entry)
    elif expression.is_number:
        value = expression.evalf(6)
        if value.is_Float and value.is_finite and value:
            yield int(floor(log(abs(value), 10)))
    elif isinstance(expression, Set | Tuple | Boolean):
        for argument in expression.args:
            yield from _exponents(argument)


def _is_set(answer: str, parsed: list[Any]) -> bool:
    r"""Whether it is a set in braces. math-verify finds `\{1, 2\}`, `1, 2` and `(1, 2)` equal to one another. For the
    two without braces that stays, because people write solutions in both ways."""
    return isinstance(parsed[0], FiniteSet) and _BRACES.match(_clean(answer)) is not None


def _is_point(parsed: list[Any]) -> bool:
    """Whether it is a point of a plane or of space, or an interval."""
    return isinstance(parsed[0], Tuple | Interval)


def _values(expressions: list[Any]) -> list[Any] | None:
    """[the point whose coordinates are the values of several variables, in the order of their names], or None."""
    equations = expressions[0].args if isinstance(expressions[0], FiniteSet) else ()
    if not all(isinstance(each, Eq) and isinstance(each.lhs, Symbol) for each in equations):
        return None
    values = {each.lhs.name: each.rhs for each in equations}
    if len(values) < max(2, len(equations)):
        return None
    return [Tuple(*(values[name] for name in sorted(values)))]


def _alike(answers: tuple[str, str]) -> list[list[Any]]:
    """Both parsed. If only one names its variables, it becomes a point, and so does the other if it is a bare list."""
    parsed = [_parse(answer) for answer in answers]
    values = [_values(each) for each in parsed]
    if (values[0] is None) == (values[1] is None):
        return parsed
    for i in (0, 1):
        if values[i] is None and isinstance(parsed[i][0], FiniteSet) and not _is_set(answers[i], parsed[i]):
            values[i] = _parse(f"({_clean(answers[i]).strip('$ ')})")
    return [value or each for value, each in zip(values, parsed, strict=True)]


def _without_mathematics(boxed: str, gold: str) -> bool | None:
    """Whether the answer is right by the rules of this module; None if they do not decide, and math-verify has to."""
    if (words := _words(gold)) and _LETTERS.fullmatch(said := normalized(boxed)):
        return said == words
    parts = _parts(boxed), _parts(gold)
    if any(parts):
        return parts[0] == parts[1]
    units = [_measured(answer)[1].casefold() for answer in (boxed, gold)]
    if len(set(units)) == 2 and all(len(unit) == 1 for unit in units):  # different single letters may be variables
        return False
    if (time := _time(boxed)) and (gold_time := _time(gold)):
        return _same_time(time, gold_time)
    return False if _only_time(gold) else None


def _equal(answer: list[Any], expected: list[Any], relations: bool = False) -> bool:
    """Whether math-verify finds them equal. `relations`: whether an inequality may equal an interval."""
    return verify(
        expected,
        answer,
        float_rounding=(decimals := _decimals(*expected, *answer)),
        numeric_precision=decimals + 9,
        allow_set_relation_comp=relations,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _proportional(terms: list[Any], expected: list[Any]) -> bool:
    """Whether they are equal up to one factor. Each side is divided by a term of its own, so 0:0:0 equals nothing."""
    pairs = list(zip(terms, expected, strict=False))
    unit = next(((a, b) for a, b in pairs if not _equal([b], [Integer(0)])), None)
    if len(terms) != len(expected) or unit is None:
        return False
    return all(_equal([Mul(a, 1 / unit[0])], [Mul(b, 1 / unit[1])]) for a, b in pairs)


def verify_math(completion: str, record: PromptRecord) -> Verdict:
    r"""1 if the last box is equivalent to `record.gold`; `parsed` is its content.

    - Degrees and other simple units are ignored, unless they are single letters that differ; 10% equals 10 and 0.1.
    - Lists are compared as sets. Decimals must agree in six places, numbers below 0.1 in six digits.
    - Words must be equal apart from case; they are not products of their letters.
    - Several numbers between words are compared one by one, and so are a point and the values of variables, in the
      order of their names.
    - Ratios are equal up to a factor, unless they may be times.

    There is no limit on time: on `9^{9^9}` it does not return.
    """
    gold = last_boxed(record.gold) or record.gold
    if len(gold) > _MAX_CHARS:
        raise BadRecordError(record.id, f"gold has {len(gold)} characters; math allows {_MAX_CHARS}")
    if not (expected := _parse(gold)):
        raise BadRecordError(
            record.id, f"gold {record.gold!r:.200} is not a mathematical expression that math-verify reads"
        )
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    if len(boxed) > _MAX_CHARS:
        return Verdict(0.0, None, "unparsable", f"the last box holds {len(boxed)} characters, more than {_MAX_CHARS}")
    if not (answer := _parse(boxed)):
        return Verdict(0.0, None, "unparsable", "the last box does not hold a mathematical expression")
    if _clean(boxed) == _clean(gold):
        return Verdict(1.0, boxed)
    if (verdict := _without_mathematics(boxed, gold)) is not None:
        return Verdict(float(verdict), boxed)
    answer, expected = _alike((boxed, gold))
    if (_is_set(gold, expected) and _is_point(answer)) or (_is_set(boxed, answer) and _is_point(expected)):
        return Verdict(0.0, boxed)
    try:
        if max(len(terms := _ratio(boxed)), len(others := _ratio(gold))) > 2:
            return Verdict(float(_proportional(terms, others)), boxed)
        relations = _INTERVAL.search(_clean(gold)) is not None  # (1, 2) may be a point
        equal = _equal(answer, expected, relations)
    except Exception as error:  # sympy cannot compare them, for example x ≠ 3 and x > 3
        return Verdict(0.0, boxed, "error", f"cannot compare with the gold: {type(error).__name__}: {error}"[:500])
    return Verdict(float(equal), boxed)
