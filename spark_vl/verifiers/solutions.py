"""Sets of real numbers: what intervals, inequalities and their combinations say."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeGuard

from sympy import Complement as Difference
from sympy import FiniteSet, Intersection, Interval, Rational, S, Set, Union

from spark_vl.verifiers.equality import number
from spark_vl.verifiers.reading import COMBINATIONS, EVERYTHING, INTERVALS, Answer, Group, Relation, Value

_COMBINE: dict[str, Callable[..., Any]] = {r"\cup": Union, r"\cap": Intersection, r"\setminus": Difference}


TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
"""Each sign, read from its other side."""


def is_variable(side: Answer) -> TypeGuard[Value]:
    """Whether it is a single name."""
    return (
        isinstance(side, Value) and side.expression.tree is not None and side.expression.tree[0] in ("name", "function")
    )


def is_set(answer: Answer) -> bool:
    return isinstance(answer, Relation) or (
        isinstance(answer, Group) and answer.kind in ("or", "()", *INTERVALS, *COMBINATIONS)
    )


def variables(answer: Answer) -> frozenset[str]:
    """The names that the inequalities in an answer speak of."""
    parts = answer.sides if isinstance(answer, Relation) else answer.members if isinstance(answer, Group) else ()
    named = {side.expression.text for side in parts if is_variable(side)} if isinstance(answer, Relation) else set()
    return frozenset(named).union(*map(variables, parts))


def as_set(answer: Answer) -> Set | None:
    """The real numbers that an answer says; None if it says no such set."""
    if answer == EVERYTHING:
        return S.Reals
    if isinstance(answer, Relation):
        return _solutions(answer)
    if not isinstance(answer, Group):
        return None
    if answer.kind == "set":
        ends = [_end(member) for member in answer.members]
        return None if None in ends else FiniteSet(*ends)
    if answer.kind in ("point", *INTERVALS):
        ends = [_end(member) for member in answer.members]
        if len(ends) != 2 or None in ends or not ends[0] < ends[1]:
            return None
        return Interval(*ends, answer.kind in ("point", "(]"), answer.kind in ("point", "[)"))
    if answer.kind == "or" or answer.kind in COMBINATIONS:
        sets = [as_set(member) for member in answer.members]
        return None if None in sets else reduce(_COMBINE.get(answer.kind, Union), sets)
    return None


def _end(answer: Answer) -> Any:
    """An end of an interval, exact enough to be compared."""
    value = number(answer.expression) if isinstance(answer, Value) else None
    if value is None:
        return None
    if value in (float("inf"), float("-inf")):
        return S.Infinity if value > 0 else S.NegativeInfinity
    return Rational(f"{float(value):.12g}")


_RAYS: dict[str, Callable[[Any], Set]] = {
    "<": lambda end: Interval.open(S.NegativeInfinity, end),
    ">": lambda end: Interval.open(end, S.Infinity),
    r"\le": lambda end: Interval(S.NegativeInfinity, end),
    r"\ge": lambda end: Interval(end, S.Infinity),
    r"\ne": lambda end: Difference(S.Reals, FiniteSet(end)),
}


def _solutions(relation: Relation) -> Set | None:
    """The numbers for which inequalities between a bare name and constants hold."""
    found: Set = S.Reals
    for sign, left, right in zip(relation.signs, relation.sides, relation.sides[1:], strict=False):
        if is_variable(left):
            end = _end(right)
        elif is_variable(right):
            end, sign = _end(left), TURNED.get(sign, sign)
        else:
            return None
        if end is None or sign not in _RAYS:
            return None
        found = Intersection(found, _RAYS[sign](end))
    return found
