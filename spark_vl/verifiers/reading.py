r"""Reads the content of a box, spelled, as one answer; what is not understood to its end is no answer.

In this order: words; an option with its letter; numbers between words; several answers; a relation; brackets; a ratio;
a numeral with its base; a quantity. Each reader returns None for what is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import TypeGuard

from spark_vl.answers.latex import WIDE
from spark_vl.verifiers.expressions import Expression, UnreadableError, read_expression
from spark_vl.verifiers.wording import Time, measured, parts, time, words


@dataclass(frozen=True)
class Words:
    """What is compared letter by letter: words, a name, a numeral."""

    said: str


@dataclass(frozen=True)
class Value:
    """An expression with its unit."""

    expression: Expression
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Relation:
    """Sides, of which each two have a sign between them, and a condition under which it holds."""

    signs: tuple[str, ...]
    sides: tuple[Answer, ...]

    @property
    def equation(self) -> bool:
        return set(self.signs) <= {"=", r"\approx"}


@dataclass(frozen=True)
class Group:
    """Several answers."""

    kind: str
    r"""`list`, `or` (a list of inequalities), `sequence` (also numbered answers), `set`, `point`, `ratio`, `matrix`,
    `row`, an interval by its brackets (`[)`), or the union, intersection or difference of sets (`\cup`)."""
    members: tuple[Answer, ...]


@dataclass(frozen=True)
class Given:
    """An answer and the condition under which it holds."""

    answer: Answer
    condition: Answer


@dataclass(frozen=True)
class Option:
    """The letter of an option, and what stands behind it."""

    letter: str
    answer: Answer


@dataclass(frozen=True)
class Clock:
    """What may be a time, and what it is if it is none. `certain`: no ratio, which would be in lowest terms and without
    leading zeros."""

    time: Time
    other: Answer | None
    certain: bool


@dataclass(frozen=True)
class Numeral:
    """Digits in a base."""

    digits: str
    base: str


@dataclass(frozen=True)
class Measures:
    """Numbers with a word or a unit each."""

    parts: tuple[tuple[str, float], ...]


Answer = Words | Value | Relation | Group | Given | Option | Clock | Numeral | Measures

INTERVALS = ("(]", "[)", "[]")
COMBINATIONS = (r"\cup", r"\cap", r"\setminus")
EVERYTHING = Group("()", ())
"""All real numbers."""


@lru_cache(maxsize=1024)  # a group shares its gold and often its answers
def read(text: str) -> Answer:
    """The answer that `text`, which must be `spelled`, gives.

    Raises:
        UnreadableError: it is not understood, or not all of it.
    """
    text = _bare(text)
    try:
        for reader in (_words, _option, _clock, _measures, _list, _given, _relation, _brackets, _ratio, _numeral):
            if (answer := reader(text)) is not None:
                return answer
        return _value(text)
    except RecursionError:
        raise UnreadableError(text) from None


def _bare(text: str) -> str:
    r"""Without braces, or `\text{...}`, around all of it."""
    while True:
        text = text.strip(f" {WIDE}")
        start = 5 if text.startswith("\\text{") else 0
        if not (text[start : start + 1] == "{" and text[-1:] == "}" and _closes(text, start) == len(text) - 1):
            return re.sub(r"^(?:=|\\approx(?![A-Za-z]))\s*(?=\S)", "", text)
        text = text[start + 1 : -1]


# ── structure ──

_PIECE = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)


def _closes(text: str, start: int) -> int:
    """Where the bracket at `start` closes; -1 if it does not."""
    return next((end for end, _, depth in _pieces(text, start) if depth == 0), -1)


def _pieces(text: str, start: int = 0) -> Iterator[tuple[int, str, int]]:
    """Each command or letter from `start`: where its last letter stands, itself, and how deep in brackets it ends."""
    depth = 0
    for match in _PIECE.finditer(text, start):
        piece = match[0]
        if piece in ("(", "[", "{", r"\{", r"\begin"):
            depth += 1
        elif piece in (")", "]", "}", r"\}", r"\end"):
            depth -= 1
        yield match.end() - 1, piece, depth


def _split(text: str, marks: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The parts of `text` between those of `marks` that stand outside brackets, and these marks."""
    found, between, start = [], [], 0
    for end, piece, depth in _pieces(text):
        if depth == 0 and piece in marks:
            found.append(text[start : end - len(piece) + 1].strip())
            between.append(piece)
            start = end + 1
    return [*found, text[start:].strip()], between


# ── readers ──


def _words(text: str) -> Answer | None:
    said = words(text)
    if said in ("all real numbers", "all reals"):
        return EVERYTHING
    return None if said is None else Words(said)


_OPTION = re.compile(r"(?:\(([A-J])\)|([A-J])(?:[.)]|\s-\s))\s*(?=\S)(.+)")


def _option(text: str) -> Answer | None:
    match = _OPTION.fullmatch(text)
    if match is None or match[3][:1] in "^_()+*/=":
        return None
    answer: Answer = Words(match[3])
    with suppress(UnreadableError):
        answer = answer if _OPTION.match(match[3]) else read(match[3])
    return Option(match[1] or match[2], answer)


def _clock(text: str) -> Answer | None:
    if (read_time := time(text)) is None:
        return None
    other = None
    with suppress(UnreadableError):
        other = None if read_time.half and ":" in text else _ratio(text) or _value(text)
    whole = gcd(read_time.hour, *read_time.rest) > 1
    return Clock(read_time, other, ":" in text and (read_time.half != "" or ":0" in text or whole))


def _measures(text: str) -> Answer | None:
    found = parts(text)
    return None if found is None else Measures(found)


_NUMBERED = re.compile(r"\s*[,;]?\s*\((\d)\)\s*")
_AND_OR = re.compile(
    r"(?:[,;\s\u2003]|\\text\{[,\s]*(?=(?:and|or)\b))*(?:(?<=\{)|(?<![A-Za-z\\]))\b(and|or)\b[\s\u2003,]*\}?\s*"
)
_ROWS = re.compile(
    r"\\begin\{(cases|array|aligned|align\*?|gathered|split)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL
)


def _list(text: str) -> Answer | None:
    """Several answers."""
    if rows := _ROWS.fullmatch(text.removeprefix(r"\{").strip()):
        members = [row.replace("&", " ").strip(f",; {WIDE}") for row in rows[2].split(r"\\")]
        return _group("list", [member for member in members if member])
    before, *numbered = _NUMBERED.split(text)
    numbers = "".join(numbered[::2])
    if len(numbers) > 1 and not before and "123456789".startswith(numbers) and all(numbered[1::2]):
        return _group("sequence", numbered[1::2])
    said: list[str] = []
    separated = _AND_OR.sub(lambda match: said.append(match[1]) or ";", text)  # type: ignore[func-returns-value]
    members = [member for member in _split(separated, (",", ";", WIDE))[0] if member]
    if len(members) < 2:
        return _signs(text) if len(members) == 1 and separated == text else None
    answer = _group("or" if "or" in said else "list", members)
    if set(said) == {"and"} and all(map(_inequality, answer.members)):
        return Group(r"\cap", answer.members)
    if len(answer.members) == 2 and _is_condition(*answer.members):
        return Given(*answer.members)
    sets = any(isinstance(member, Group) and member.kind in (*INTERVALS, *COMBINATIONS) for member in answer.members)
    return answer if sets or all(map(_inequality, answer.members)) else Group("list", answer.members)


def _is_condition(answer: Answer, condition: Answer) -> bool:
    """Whether the second of two answers says for which values the first, a formula, holds: `y = 6/x, x > 0`."""
    formula = answer.sides[-1] if isinstance(answer, Relation) and answer.equation else answer
    return (
        _inequality(condition)
        and isinstance(formula, Value)
        and not formula.expression.constant
        and (formula is not answer or condition.signs == (r"\in",))
    )


def _inequality(answer: Answer) -> TypeGuard[Relation]:
    return isinstance(answer, Relation) and not answer.equation


def _group(kind: str, members: list[str]) -> Group:
    """The answers that `members` give; those of a list within a list belong to the outer one."""
    answers: list[Answer] = []
    for member in members:
        answer = read(member)
        answers += answer.members if isinstance(answer, Group) and answer.kind == "list" else [answer]
    return Group(kind, tuple(answers))


def _signs(text: str) -> Answer | None:
    """Plus or minus is two answers."""
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return None
    upper, lower = (re.sub(rf"\\{sign}(?![A-Za-z])", "+", text) for sign in ("pm", "mp"))
    return _group("list", [re.sub(r"\\(?:pm|mp)(?![A-Za-z])", "-", one) for one in (upper, lower)])


_SIGNS = (
    *("=", r"\approx", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\notin", r"\cong", r"\sim", r"\parallel", r"\perp"),
    *(r"\equiv", r"\subset", r"\subseteq"),
)
_CONDITION = re.compile(r"\\text\{\s*(?:for|where|if|when)\b([^{}]*)\}|(?<![A-Za-z])(?:for|where|if|when)(?![A-Za-z])")


def _given(text: str) -> Answer | None:
    """An answer with its condition: in parentheses, or after a word."""
    if match := _CONDITION.search(text):
        before, behind = text[: match.start()], f"{match[1] or ''} {text[match.end() :]}"
    elif text.endswith(")"):
        starts = [end for end, piece, depth in _pieces(text) if piece == "(" and depth == 1]
        if not starts or starts[-1] == 0:
            return None
        before, behind = text[: starts[-1]], text[starts[-1] + 1 : -1]
        if not _split(behind, _SIGNS)[1] or re.search(r"[A-Za-z]$", before):
            return None
    else:
        return None
    if _CONDITION.search(behind) or re.search(r"\([^()]*[<>=][^()]*\)\s*$", before):
        raise UnreadableError(text)  # two conditions
    return Given(read(before), read(behind)) if before.strip() and behind.strip() else None


def _relation(text: str) -> Answer | None:
    sides, signs = _split(text, _SIGNS)
    if not signs:
        return None
    if not all(sides):
        raise UnreadableError(text)
    read_sides = []
    for i, side in enumerate(sides):
        try:
            read_sides.append(read(side))
        except UnreadableError:
            if i:
                raise
            read_sides.append(Words(side.replace(" ", "")))  # P(A|B), S_{\triangle ABC}
    if len(signs) == 1 and signs[0] == r"\in" and isinstance(read_sides[1], Group):
        return read_sides[1]
    return Relation(tuple(signs), tuple(read_sides))


_BUILDER = re.compile(r"\s*(?:[A-Za-z]|\([A-Za-z], ?[A-Za-z]\))(?: ?\\in ?\\mathbb ?\{?[A-Z]\}?)? ?[|:](.+)")
_MATRIX = re.compile(
    r"\\begin\{([pbB]?matrix)\}(?P<rows>.*)\\end\{\1\}"
    r"|[\[(] ?\\begin\{array\}(?:\{[lcr|]*\})?(?P<array>.*)\\end\{array\} ?[\])]",
    re.DOTALL,
)
_REALS = re.compile(r"\\mathbb ?\{?R\}?")


def _brackets(text: str) -> Answer | None:
    """Sets, points, intervals, unions and matrices."""
    if not text:
        return None
    pieces, marks = _split(re.sub(r"(?<=[)\]}]) ?U ?(?=[(\[\\])", r"\\cup ", text), COMBINATIONS)
    if marks:
        return Group(marks[0], tuple(map(read, pieces))) if len(set(marks)) == 1 else None
    if _REALS.fullmatch(text):
        return EVERYTHING
    if text == r"\emptyset":
        return Group("set", ())
    if matrix := _MATRIX.fullmatch(text):
        rows = (matrix["rows"] or matrix["array"] or "").split(r"\\")
        return Group("matrix", tuple(_group("row", row.split("&")) for row in rows if row.strip()))
    left, right = (r"\{", r"\}") if text.startswith(r"\{") else (text[0], text[-1])
    if left not in (r"\{", "(", "[") or _closes(text, 0) != len(text) - 1:
        return None
    inner = text[len(left) : -len(right)].strip()
    if left == r"\{":
        builder = _BUILDER.fullmatch(inner)
        return read(builder[1].strip()) if builder else _set(inner)
    members, separators = _split(inner, (",", ";"))
    if not all(members):
        raise UnreadableError(text)
    if not separators:
        return read(inner) if left + right in ("()", "[]") and not _split(inner, _SIGNS)[1] else None
    kind = "point" if left + right == "()" else left + right
    if kind != "point" and len(members) != 2:
        kind = "sequence" if kind == "[]" else ""
    return Group(kind, tuple(map(read, members))) if kind else None


def _set(inner: str) -> Answer:
    if not inner:
        return Group("set", ())
    answer = read(inner)
    if isinstance(answer, Group) and answer.kind in ("list", "or"):
        return Group("set", answer.members)
    return Group("set", (answer,))


_NO_RATIO = re.compile(r"[<>,;|=]|\\[{}]|\\(?:in|to|le|ge)(?![A-Za-z])")


def _ratio(text: str) -> Answer | None:
    value, _ = measured(text)
    terms = value.split(":")
    if len(terms) < 2 or _NO_RATIO.search(text):
        return None
    return Group("ratio", tuple(Value(read_expression(term.strip())) for term in terms))


_NUMERAL = re.compile(r"\(?(-?[0-9A-F]*[0-9][0-9A-F]*(?:\.[0-9A-F]+)?)\)?_(?:\{(?:\\text\{)?(\w+)\}?\}|(\d+))")


def _numeral(text: str) -> Answer | None:
    match = _NUMERAL.fullmatch(text)
    return Numeral(match[1], match[2] or match[3]) if match else None


_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def _value(text: str) -> Answer:
    value, unit = measured(text)
    if value != text and not value.endswith("%"):
        answer = read(value)
        return Value(answer.expression, unit, answer.percent) if isinstance(answer, Value) else answer
    percent = value.endswith("%")
    value = value.removesuffix("%").strip()
    if value.endswith("°") and not _TRIGONOMETRIC.search(value):
        value, unit = value[:-1], "°"
    return Value(read_expression(value), unit, percent)
