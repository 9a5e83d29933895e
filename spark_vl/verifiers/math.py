r"""Mathematical answers: the reply's last box says the same as the gold.

Both are brought to one spelling (`answers/latex.py`), read to the end (`reading.py`), and compared here part by part;
expressions by their values (`expressions.py`). `docs/verifiers.md` has the rules.

Setting `decimals`: two numbers that are the same once both are rounded to so many decimals are right, too, as in
MATH-Vision and MMMU; 0: they are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from spark_vl.answers import distinct, last_boxed, same_unit
from spark_vl.answers.latex import spelled
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of
from spark_vl.verifiers.equality import equal, number, proportional
from spark_vl.verifiers.expressions import Expression, Tree, UnreadableError, read_expression
from spark_vl.verifiers.reading import (
    Answer,
    Clock,
    Given,
    Group,
    Numeral,
    Option,
    Relation,
    Value,
    Words,
    read,
)
from spark_vl.verifiers.solutions import TURNED, as_set, is_set, is_variable, variables
from spark_vl.verifiers.wording import known_unit, unstyled

SETTINGS: dict[str, Any] = {"decimals": 0}

_MAX_CHARS = 1000
"""A longer box is not an answer, nor a longer gold, and each would take the whole deadline."""


def verify_math(completion: str, record: PromptRecord) -> Verdict:
    """1 if the last box says the same as `record.gold`; `parsed` is its content.

    There is no limit on time: what is too large to compute (`9^{9^9}`) goes to math-verify, which may not return.
    """
    gold = last_boxed(record.gold) or record.gold
    if len(gold) > _MAX_CHARS:
        raise BadRecordError(record.id, f"gold has {len(gold)} characters; math allows {_MAX_CHARS}")
    try:
        expected = read(spelled(gold))
    except UnreadableError:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is not a mathematical answer") from None
    boxed = last_boxed(completion)
    if boxed is None:
        return Verdict(0.0, None, "unparsable", "no box")
    if len(boxed) > _MAX_CHARS:
        return Verdict(0.0, None, "unparsable", f"the last box holds {len(boxed)} characters, more than {_MAX_CHARS}")
    try:
        answer = read(spelled(boxed))
    except UnreadableError:
        return Verdict(0.0, None, "unparsable", "the last box does not hold a mathematical answer")
    if spelled(boxed) == spelled(gold):
        return Verdict(1.0, boxed)
    try:
        decimals = settings_of(record)["decimals"]
        right = (
            same(answer, expected)
            or _letters(boxed) == _letters(gold) != ""
            or (decimals > 0 and _rounds_alike(answer, expected, decimals))
        )
    except Exception as error:  # sympy or math-verify cannot compare them
        return Verdict(0.0, boxed, "error", f"cannot compare with the gold: {type(error).__name__}: {error}"[:500])
    return Verdict(float(right), boxed)


_OPTIONS = re.compile(r"[A-J](?:(?:, ?| and | ?& ?)?[A-J])*")


def _letters(text: str) -> str:
    """The letters of options ("A and C", "AC"), one after another; "" if it is something else."""
    plain = unstyled(spelled(text))
    return re.sub("[^A-J]", "", plain) if _OPTIONS.fullmatch(plain) else ""


def _rounds_alike(answer: Answer, gold: Answer, decimals: int) -> bool:
    """Whether both are numbers, with units that do not contradict each other, and equal once they are rounded."""
    if not isinstance(answer, Value) or not isinstance(gold, Value) or answer.percent is not gold.percent:
        return False
    if not same_unit(known_unit(answer.unit), known_unit(gold.unit)):
        return False
    values = number(answer.expression), number(gold.expression)
    return None not in values and round(float(values[0]), decimals) == round(float(values[1]), decimals)


# ── comparison ──


def same(answer: Answer, gold: Answer) -> bool:
    """Whether two answers say the same."""
    if isinstance(answer, Given) or isinstance(gold, Given):
        return _same_given(answer, gold)
    if isinstance(answer, Clock) or isinstance(gold, Clock):
        return _same_time(answer, gold)
    if isinstance(answer, Option) or isinstance(gold, Option):
        return _same_option(answer, gold)
    if _is_equation(answer) or _is_equation(gold):
        return _same_equation(answer, gold)
    match answer, gold:
        case Words(), Words():
            return answer == gold
        case Numeral(), Numeral():
            return answer == gold
        case (Numeral() as numeral, Value() as value) | (Value() as value, Numeral() as numeral):
            return numeral.digits == value.expression.text
        case Value(), Value():
            return _same_value(answer, gold)
        case Group(), Group() if _same_group(answer, gold):
            return True
        case Relation(), Relation() if _same_relation(answer, gold):
            return True
        case (Group("set", (Value() as only,)), Value() as value) | (
            Value() as value,
            Group("set", (Value() as only,)),
        ):
            return same(only, value)
        case (Group("ratio", (Value() as a, Value() as b)), Value() as value) | (
            Value() as value,
            Group("ratio", (Value() as a, Value() as b)),
        ):
            return equal(_quotient(a.expression, b.expression), value.expression)
    if is_set(answer) or is_set(gold):
        sets = as_set(answer), as_set(gold)
        return None not in sets and sets[0] == sets[1] and len(variables(answer) | variables(gold)) <= 1
    return answer == gold


def _same_given(answer: Answer, gold: Answer) -> bool:
    """A condition may be missing on either side; but a number has none: "5 if x > 0" is a hedge."""
    if isinstance(answer, Given) and isinstance(gold, Given):
        return same(answer.answer, gold.answer) and same(answer.condition, gold.condition)
    one, other = (side.answer if isinstance(side, Given) else side for side in (answer, gold))
    hedge = isinstance(answer, Given) and isinstance(one, Value) and one.expression.constant
    return not hedge and same(one, other)


def _same_time(answer: Answer, gold: Answer) -> bool:
    if isinstance(answer, Clock) and isinstance(gold, Clock):
        return answer.time.agrees(gold.time)
    if isinstance(gold, Clock) and gold.certain:
        return False
    one, other = (side.other if isinstance(side, Clock) else side for side in (answer, gold))
    return one is not None and other is not None and same(one, other)


def _same_option(answer: Answer, gold: Answer) -> bool:
    """The letter, or what stands behind it, or both."""
    match answer, gold:
        case Option(), Option():
            return answer.letter == gold.letter and (isinstance(gold.answer, Words) or same(answer.answer, gold.answer))
        case (Option() as option, Value() as value) | (Value() as value, Option() as option) if letter := re.fullmatch(
            r"\(?([A-J])\)?", value.expression.text
        ):
            return option.letter == letter[1]
    return same(*(side.answer if isinstance(side, Option) else side for side in (answer, gold)))


def _same_value(answer: Value, gold: Value) -> bool:
    """A unit may be missing. 10% is 10 and 0.1."""
    if (answer.percent and gold.unit) or (answer.unit and gold.percent):
        return False
    if answer.unit and gold.unit:
        units = known_unit(answer.unit), known_unit(gold.unit)
        if not same_unit(*units) or (len(answer.unit) == len(gold.unit) == 1 and answer.unit != gold.unit):
            return False
    if equal(answer.expression, gold.expression):
        return True
    if answer.percent is gold.percent:
        return False
    percent, other = (answer, gold) if answer.percent else (gold, answer)
    return equal(_quotient(percent.expression, read_expression("100")), other.expression)


def _quotient(a: Expression, b: Expression) -> Expression:
    return read_expression(rf"\frac{{{a.text}}}{{{b.text}}}")


# ── relations ──


def _is_equation(answer: Answer) -> bool:
    return isinstance(answer, Relation) and answer.equation


_APPLIED = re.compile(r"[A-Za-z]+'*(?:\^\{-1\}|_\w|_\{\w+\})? ?\([^()=]*(?:\([^()]*\)[^()=]*)*\)")


def _name(side: Answer) -> str | None:
    r"""What an equation may give the value of: "x", "AB", "f(2)", `\angle ABC`, "Area", "x + y", (x, y); y is f(x)."""
    match side:
        case Words(said):
            return said
        case Group("ratio" | "point" as kind, members) if all(map(_name, members)):
            return f"{kind} {[_name(member) for member in members]}"
        case Value(expression) if _APPLIED.fullmatch(expression.text) or _only_names(expression.tree):
            name = unstyled(expression.text).replace(" ", "")
            return "y" if name == "f(x)" else name
    return None


def _only_names(tree: Tree | None) -> bool:
    """Whether there are names in it and no numbers."""
    if tree is None or tree[0] == "power":
        return False
    parts = [part for part in tree[1:] if isinstance(part, tuple)]
    return tree[0] == "name" or (bool(parts) and all(map(_only_names, parts)))


def _chain(relation: Relation) -> tuple[str | None, tuple[Answer, ...]]:
    """The name that an equation gives a value, and its other sides."""
    first, *rest = relation.sides
    if (name := _name(first)) is not None:
        return name, tuple(rest)
    if is_variable(relation.sides[-1]):
        return _name(relation.sides[-1]), relation.sides[:-1]
    return None, relation.sides


def _candidates(relation: Relation) -> list[Answer]:
    """What an equation may stand for: the value of a name, or of sides that are all the same. After a sign of
    approximation the value may be rounded."""
    name, sides = _chain(relation)
    known = [side for side in sides if not isinstance(side, Value) or side.expression.constant or name is None]
    if r"\approx" in relation.signs:
        return list(known) if all(_near(side, known[0]) for side in known) else []
    if not all(same(side, known[-1]) for side in known[:-1]):
        return []
    return [sides[-1]] if name is not None or len(sides) > 1 else []


def _near(side: Answer, other: Answer) -> bool:
    """Whether one may be the other, rounded."""
    if not (isinstance(side, Value) and isinstance(other, Value)):
        return same(side, other)
    a, b = number(side.expression), number(other.expression)
    return a is not None and b is not None and abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _same_equation(answer: Answer, gold: Answer) -> bool:
    """An equation is compared as one, or by the value that it gives. Whether it is true does not matter."""
    if not (isinstance(answer, Relation) and isinstance(gold, Relation)):
        relation, other = (answer, gold) if isinstance(answer, Relation) and answer.equation else (gold, answer)
        return isinstance(relation, Relation) and any(same(*pair) for pair in _oriented(relation, other, answer))
    if not (answer.equation and gold.equation):
        return False
    (name, _), (gold_name, values) = _chain(answer), _chain(gold)
    if name is not None and name == gold_name:
        return any(same(value, values[-1]) for value in _candidates(answer))
    return _same_sides(answer.sides, gold.sides) or _proportional(answer, gold) is not None


def _oriented(relation: Relation, other: Answer, answer: Answer) -> list[tuple[Answer, Answer]]:
    values = _candidates(relation)
    return [(value, other) if relation is answer else (other, value) for value in values]


def _same_sides(answer: tuple[Answer, ...], gold: tuple[Answer, ...]) -> bool:
    if len(answer) != len(gold):
        return False
    return any(all(map(same, answer, order)) for order in (gold, gold[::-1]))


def _proportional(answer: Relation, gold: Relation) -> Any:
    sides = [side.expression for side in (*answer.sides, *gold.sides) if isinstance(side, Value)]
    if len(sides) != 4 or all(side.constant for side in sides):
        return None
    return proportional((sides[0], sides[1]), (sides[2], sides[3]))


_SYMMETRIC = (r"\ne", r"\cong", r"\sim", r"\parallel", r"\perp", r"\equiv")


def _same_relation(answer: Relation, gold: Relation) -> bool:
    turned = Relation(tuple(TURNED.get(sign, sign) for sign in reversed(answer.signs)), answer.sides[::-1])
    for one in (answer, turned) if set(answer.signs) <= {*TURNED, *_SYMMETRIC} else (answer,):
        if one.signs != gold.signs or len(one.sides) != len(gold.sides):
            continue
        if all(map(same, one.sides, gold.sides)):
            return True
        factor = _proportional(one, gold)
        if factor is not None and (factor > 0 if one.signs[0] in TURNED else one.signs[0] == r"\ne"):
            return True
    return False


# ── several answers ──


def _same_group(answer: Group, gold: Group) -> bool:
    named, gold_named = _named(answer), _named(gold)
    if (named is None) != (gold_named is None):
        pairs, other = (named, gold) if named is not None else (gold_named, answer)
        values = [value for _, value in pairs or ()]
        if len({name for name, _ in pairs or ()}) == 1:
            return other.kind in ("list", "set", "or") and _unordered(values, other.members)
        if other.kind == "point":
            values = [value for _, value in sorted(pairs or (), key=lambda pair: pair[0])]
        return other.kind in ("point", "list", "sequence") and _ordered(values, other.members)
    kinds = {answer.kind, gold.kind}
    if kinds <= {"list", "or", "set"}:
        one, two = (distinct(side.members, same) if "set" in kinds else side.members for side in (answer, gold))
        return _unordered(one, two)
    if answer.kind == "ratio" == gold.kind:
        return _same_ratio(answer.members, gold.members)
    if len(kinds) == 1 and answer.kind in (r"\cup", r"\cap"):
        return _unordered(answer.members, gold.members)
    if len(kinds) == 1 or kinds <= {"list", "point", "sequence"}:
        return _ordered(answer.members, gold.members)
    return False


def _named(group: Group) -> list[tuple[str, Answer]] | None:
    """The names and values, if all members name one."""
    if group.kind not in ("list", "or", "set"):
        return None
    pairs = []
    for member in group.members:
        name, values = _chain(member) if isinstance(member, Relation) and member.equation else (None, ())
        if name is None:
            return None
        pairs.append((name, values[-1]))
    return pairs or None


def _ordered(answer: Sequence[Answer], gold: Sequence[Answer]) -> bool:
    return len(answer) == len(gold) and all(map(same, answer, gold))


def _unordered(answer: Sequence[Answer], gold: Sequence[Answer]) -> bool:
    if len(answer) != len(gold):
        return False
    left = list(gold)
    for member in answer:
        found = next((i for i, other in enumerate(left) if same(member, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_ratio(terms: Sequence[Answer], gold: Sequence[Answer]) -> bool:
    """Whether they are equal up to one factor; nothing is in proportion to zeros."""
    pairs = [
        (a.expression, b.expression)
        for a, b in zip(terms, gold, strict=False)
        if isinstance(a, Value) and isinstance(b, Value)
    ]
    zero = read_expression("0")
    unit = next((pair for pair in pairs if not equal(pair[1], zero)), None)
    if len(terms) != len(gold) or unit is None or equal(unit[0], zero):
        return False
    return all(equal(_quotient(a, unit[0]), _quotient(b, unit[1])) for a, b in pairs)
