"""Whether two expressions are equal: by their values at points that are drawn once for all.

That decides in milliseconds; math-verify is asked about the rest: integrals, limits, sums, matrices in a formula, and
numbers too large to compute, on which it may run forever.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from math import factorial, prod
from random import Random
from typing import Any

from math_verify import verify
from mpmath import MPContext

from spark_vl.verifiers.expressions import Expression, Tree, sympy_of

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off


class TooLargeError(ArithmeticError):
    """A number has more digits than can be computed."""


_SCIENTIFIC = re.compile(r"(?:\\times|\\cdot|\*) ?10 ?\^")

# ── values ──

_mp = MPContext()
_mp.dps = 60
_LARGEST_POWER = 10**7
"""Bits of the largest power that is computed."""
_LARGEST_ARGUMENT = 10**6
_ANY_ARGUMENT = frozenset(("absolute", "logarithm", "floor", "ceiling"))
"""What is quick for larger arguments, too."""
_LONGEST_FRACTION = 10**6
"""Bits."""
_LARGEST_FACTORIAL = 5000
_FUNCTION_OF: dict[str, Callable[..., Any]] = {
    **{name: getattr(_mp, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")},
    **{f"arc{name}": getattr(_mp, f"a{name}") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    "floor": _mp.floor,
    "ceiling": _mp.ceil,
    "absolute": abs,
    "factorial": _mp.factorial,
    "binomial": _mp.binomial,
    "logarithm": lambda x, base: _mp.ln(x) / _mp.ln(base),
}


def _value(tree: Tree, draw: Callable[[str], Any]) -> Any:
    """The value of `tree`, where `draw` gives that of a name.

    Raises:
        ArithmeticError: there is none. `TooLargeError`: it is not computed.
    """
    kind, *parts = tree
    match kind:
        case "number":
            return _mp.mpf(parts[0].numerator) / parts[0].denominator
        case "name":
            return draw(parts[0])
        case "pi" | "e":
            return +getattr(_mp, kind)
        case "i":
            return _mp.j
        case "degree":
            return _mp.pi / 180
        case "infinity":
            return _mp.inf
        case "function":
            arguments = [_mp.nstr(_value(part, draw), 20) for part in parts[1:]]
            return draw(f"{parts[0]}{arguments}")
    values = [_value(part, draw) for part in parts]
    match kind:
        case "add":
            return _mp.fsum(values)
        case "multiply":
            return _mp.fprod(values)
        case "divide":
            return values[0] / values[1]
        case "power":
            return _power(*values)
        case "root":
            x, index = values
            if _mp.im(x) == 0 and _mp.re(x) < 0 and index == _mp.floor(index) and index % 2 == 1:
                return -_power(-x, 1 / index)
            return _power(x, 1 / index)
    if kind not in _ANY_ARGUMENT and any(abs(value) > _LARGEST_ARGUMENT for value in values):
        raise TooLargeError
    return _FUNCTION_OF[kind](*values)


def _power(base: Any, exponent: Any) -> Any:
    if base == 0 and _mp.re(exponent) <= 0:
        raise ZeroDivisionError
    if base and abs(exponent) * (abs(_mp.ln(abs(base))) + 4) > _LARGEST_POWER:
        raise TooLargeError
    return _mp.power(base, exponent)


def _at(point: int) -> Callable[[str], Any]:
    """Draws the value of a name at one of the points, always the same."""
    low, high = ((0.1, 0.9), (1, 3), (-3, 3), (5, 40), (-1, 0))[point % 5]
    return lambda name: _mp.mpf(Random(f"{point} {name}").uniform(low, high))


_POINTS = 15


def _defined(tree: Tree, point: int) -> Any:
    """The value of `tree` at a point, None if it has none there."""
    try:
        value = _value(tree, _at(point))
    except TooLargeError:
        raise
    except (ArithmeticError, ValueError, TypeError):
        return None
    return None if _mp.isnan(value) else value


def _exact(tree: Tree) -> Fraction | None:
    """The value of a rational number that is written out; None for others."""
    kind, *parts = tree
    if kind == "number":
        return Fraction(parts[0])
    values = [_exact(part) for part in parts if isinstance(part, tuple)]
    match kind, values:
        case "add" | "multiply", _ if (known := [value for value in values if value is not None]) and known == values:
            return sum(known, Fraction(0)) if kind == "add" else prod(known, start=Fraction(1))
        case "divide", [Fraction() as a, Fraction() as b] if b:
            return a / b
        case "power", [Fraction() as a, Fraction(denominator=1) as b] if a:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b)
            return Fraction(a**b) if bits < _LONGEST_FRACTION else None
        case "factorial", [Fraction(denominator=1) as n] if 0 <= n < _LARGEST_FACTORIAL:
            return Fraction(factorial(int(n)))
    return None


def equal(answer: Expression, gold: Expression) -> bool:
    """Whether they are equal: at all points where both are real or, if there are none, where both are defined.

    Decimals agree in six places, those below 0.1 and powers of ten in six digits; else nothing is rounded.
    """
    if answer.text == gold.text:
        return True
    if answer.tree is None or gold.tree is None:
        return _symbolically_equal(answer, gold)
    rounded = answer.rounded or gold.rounded
    scientific = any(_SCIENTIFIC.search(side.text) for side in (answer, gold))
    constant = answer.constant and gold.constant
    if constant and not rounded:  # 1 - 1/2^2000 is not 1
        a, b = _exact(answer.tree), _exact(gold.tree)
        if a is not None and b is not None:
            return a == b
    imaginary = _holds(answer.tree, "i") or _holds(gold.tree, "i")
    real: list[bool] = []
    other: list[bool] = []
    too_large = False
    for point in range(1 if constant else _POINTS):
        try:
            a, b = _defined(answer.tree, point), _defined(gold.tree, point)
            if a is None or b is None:
                continue
            agree = _agree(a, b, rounded, scientific) or _noise(answer.tree, gold.tree, point)
        except TooLargeError:
            too_large = True
            continue
        is_real = imaginary or (_mp.im(a) == 0 == _mp.im(b))
        if is_real and not agree:
            return False
        (real if is_real else other).append(agree)
    if not real and not other and too_large:
        return _symbolically_equal(answer, gold)
    return len(real) > 1 or (constant and bool(real)) or (bool(other) and all(other))


def _holds(tree: Tree, kind: str) -> bool:
    return tree[0] == kind or any(_holds(part, kind) for part in tree[1:] if isinstance(part, tuple))


def _agree(a: Any, b: Any, rounded: bool = False, scientific: bool = False) -> bool:
    if a == b:
        return True
    difference, size = abs(a - b), max(abs(a), abs(b))
    if not _mp.isfinite(difference):
        return False
    if not rounded:
        return bool(difference <= size * _mp.mpf(10) ** -40)
    unit = _mp.mpf(10) ** (_mp.floor(_mp.log10(size)) + 1) if scientific or size < _mp.mpf("0.1") else _mp.mpf(1)
    return bool(difference <= unit * _mp.mpf("5.000001e-7"))


def _noise(a: Tree, b: Tree, point: int) -> bool:
    """Whether they differ by what was rounded off only: less when computed with more digits."""
    differences = []
    for digits in (0, 100):
        with _mp.extradps(digits):
            differences.append(abs(_value(a, _at(point)) - _value(b, _at(point))))
    return _mp.isfinite(differences[0]) and bool(differences[1] <= differences[0] * _mp.mpf(10) ** -50)


def proportional(answer: tuple[Expression, Expression], gold: tuple[Expression, Expression]) -> Any:
    """The factor c, a number, in (left - right of `answer`) = c (left - right of `gold`); None if there is none.

    None, too, if a difference is the same everywhere: an equation that always holds, or never.
    """
    trees = [side.tree for side in (*answer, *gold)]
    if None in trees:
        return None
    rounded = any(side.rounded for side in (*answer, *gold))
    differences: list[tuple[Any, Any]] = []
    for point in range(_POINTS):
        with suppress(TooLargeError):
            values = [_defined(tree, point) for tree in trees if tree is not None]
            if any(value is None or not _mp.isfinite(value) for value in values):
                continue
            one, other = values[0] - values[1], values[2] - values[3]
            size = max(map(abs, values)) * _mp.mpf(10) ** -40
            if abs(one) <= size or abs(other) <= size:
                return None
            differences.append((one, other))
    margin = _mp.mpf(10) ** (-6 if rounded else -30)

    def fixed(values: list[Any]) -> bool:
        return all(abs(value - values[0]) <= margin * abs(values[0]) for value in values)

    factors = [one / other for one, other in differences]
    ones = [one for one, _ in differences]
    return factors[0] if len(factors) > 2 and fixed(factors) and not fixed(ones) else None


def number(expression: Expression) -> Any:
    """The value of a constant; None if it is none, or not real."""
    if not expression.constant or expression.tree is None:
        return None
    try:
        value = _defined(expression.tree, 0)
    except TooLargeError:
        return None
    return None if value is None or _mp.im(value) else _mp.re(value)


def _symbolically_equal(answer: Expression, gold: Expression) -> bool:
    return verify(sympy_of(gold.text), sympy_of(answer.text), timeout_seconds=None, raise_on_error=True)
