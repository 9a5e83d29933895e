"""Mathematical expressions: the reply's last box is equivalent to the gold, as math-verify sees it.

math-verify can run for ever (`9^{9^9}`), and its own timeouts need the main thread, so they are off here: run it in a
`VerifierPool`. It also merges several boxes into a set, picks numbers out of prose, reads "1 2" as 3 and fails on
`30°`; hence it is given exactly one box, cleaned, and no leave to search anything else.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, FiniteSet, Interval, MatrixBase, Set, Tuple, floor, log
from sympy.logic.boolalg import Boolean

from spark_vl.answers import last_boxed, normalised
from spark_vl.records import BadRecordError, PromptRecord, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

_MAX_CHARS = 1000
"""Longer boxes are no answers, and would each cost a worker its whole deadline."""

_STYLE = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mbox)"


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
    (re.compile(r"\\[hv]?phantom\s*\{(?:[^{}]|\{[^{}]*\})*\}"), ""),  # it is not shown
    (re.compile(rf"^\s*{_STYLE}\s*\{{\s*(-?[\d.,/]+)\s*\}}\s*$"), r"\1"),
    (re.compile(r"(?<!\\)\\$"), ""),  # what white space at the end left of `\ `
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
    (re.compile(r"_(\w)(?=\s)"), r"_{\1}"),  # \log_2 8 holds no two numbers
    (re.compile(r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))"), _repeating),
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"(?<!\\)(?:\\[ ,;:]|~)|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"(?<=\d) (?=\d{3}(?!\d))"), ""),  # 20 000
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 1/2, which would be (2 + 1)/2
    (re.compile(r"\\frac\s*(\d)\s+(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(\d)[eE]([-+]?\d+)(?![A-Za-z\d])"), r"\1\\times 10^{\2}"),
]
_TWO_NUMBERS = re.compile(r"\d\s+\d")
_INTERVAL = re.compile(r"\\infty|\\cup|[\[\]]")
_BRACES = re.compile(r"(?:\\left\s*)?\\\{")
_STYLED = re.compile(rf"(?:{_STYLE}\s*\{{[^{{}}]*\}}[\s.$*]*)+")
_LETTERS = re.compile(r"[^\W\d_]{2,}(?:[\s',-]+[^\W\d_]+)*")
_WORD = re.compile(r"[^\W\d_]{4,}|\b(?:yes|no|not|odd|all|dne)\b")


@lru_cache(maxsize=1024)  # a group shares its gold, and often its answers
def _clean(answer: str) -> str:
    for spelling, standard in _SPELLINGS:
        answer = spelling.sub(standard, answer)
    return re.sub(r"(?<!\\right)\.$", "", answer.strip("*` ").rstrip(",;"))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """[expression], or [] where `answer`, the content of a box, is no mathematics."""
    answer = _clean(answer)
    if _TWO_NUMBERS.search(answer):  # would be read as their sum
        return []
    config = [LatexExtractionConfig()]
    return parse(rf"\boxed{{{answer}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def _decimals(*expressions: Any) -> int:
    """To how many decimals math-verify is to compare: six, and six digits of numbers that are smaller than 0.1."""
    smallest = min((exponent for e in expressions for exponent in _exponents(e)), default=0)
    return 6 - min(0, smallest + 1)


def _exponents(expression: Any) -> Iterator[int]:
    """Of ten, of each real number in `expression` that is compared by itself: as a member of a set, say."""
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


def _words(answer: str) -> str | None:
    r"""`answer`, normalised, where it is words rather than a product of letters: `\text{...}`, or a longer word."""
    plain = normalised(answer)
    if _LETTERS.fullmatch(plain) and (_STYLED.fullmatch(answer) or _WORD.search(plain)):
        return plain
    return None


def _is_set(answer: str, parsed: list[Any]) -> bool:
    r"""Whether it is a set by its braces: math-verify gives `\{1, 2\}`, `1, 2` and `(1, 2)` full marks for one another,
    and those without braces are left at that, for people write solutions in each way."""
    return isinstance(parsed[0], FiniteSet) and _BRACES.match(_clean(answer)) is not None


def _is_point(parsed: list[Any]) -> bool:
    """Of a plane or of space, or an interval."""
    return isinstance(parsed[0], Tuple | Interval)


def verify_math(completion: str, record: PromptRecord) -> Verdict:
    r"""1 if the last box is equivalent to `record.gold`; `parsed` is its content.

    Degrees and other simple units do not count; 10% equals both 10 and 0.1; lists compare as sets; decimals agree in
    six places, those of numbers smaller than 0.1 in six digits; words agree but for their case, and are no products of
    their letters. Runs without a limit on time: `9^{9^9}` does not come back.
    """
    gold = last_boxed(record.gold) or record.gold
    if not (expected := _parse(gold)):
        raise BadRecordError(
            record.id, f"gold {record.gold!r:.200} is no mathematical expression that math-verify reads"
        )
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    if len(boxed) > _MAX_CHARS:
        return Verdict(0.0, None, "unparsable", f"the last box holds {len(boxed)} characters, more than {_MAX_CHARS}")
    if not (answer := _parse(boxed)):
        return Verdict(0.0, None, "unparsable", "the last box holds no mathematical expression")
    if _clean(boxed) == _clean(gold):
        return Verdict(1.0, boxed)
    if (_is_set(gold, expected) and _is_point(answer)) or (_is_set(boxed, answer) and _is_point(expected)):
        return Verdict(0.0, boxed)
    if (words := _words(gold)) and _LETTERS.fullmatch(said := normalised(boxed)):
        return Verdict(float(said == words), boxed)
    try:
        equal = verify(
            expected,
            answer,
            float_rounding=(decimals := _decimals(*expected, *answer)),
            numeric_precision=decimals + 9,
            allow_set_relation_comp=_INTERVAL.search(_clean(gold)) is not None,  # (1, 2) may be a point
            timeout_seconds=None,
            raise_on_error=True,
        )
    except Exception as error:  # sympy knows no way to compare them: an inequation with an inequality, say
        return Verdict(0.0, boxed, "error", f"cannot compare with the gold: {type(error).__name__}: {error}"[:500])
    return Verdict(float(equal), boxed)
