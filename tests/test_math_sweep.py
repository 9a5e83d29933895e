"""Pairs of answers whose relation is known by construction: spellings of one value, and of another one next to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from spark_vl.answers import last_boxed
from spark_vl.records import PromptRecord
from spark_vl.verifiers import verify
from spark_vl.verifiers.math import verify_math

CASES = [
    json.loads(line) for line in Path(__file__).with_name("data").joinpath("verdicts.jsonl").open(encoding="utf-8")
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i} {case['family']}" for i, case in enumerate(CASES)])
def test_collected_verdicts(case: dict) -> None:
    """Answers to real questions that were once judged wrongly, each of a kind of its own."""
    context = {key: value for key, value in case.items() if key in ("choices", "image_size")}
    assert verify(case["verifier"], case["reply"], case["gold"], **context).score == case["score"]


def right(box: str, gold: str) -> bool:
    record = PromptRecord("toy/7", "problem", (), (), gold, "math", "toy")
    return verify_math(rf"\boxed{{{box}}}", record).score == 1


# ── spellings of one value ──


def fraction(value: Fraction, random: Random) -> str:
    sign, (p, q) = "-" if value < 0 else "", (abs(value.numerator), value.denominator)
    k = random.randint(2, 5)
    ways = [rf"{sign}\frac{{{p}}}{{{q}}}", f"{sign}{p}/{q}", rf"{sign}\dfrac{{{p * k}}}{{{q * k}}}"]
    ways += [rf"\frac{{{sign}{p}}}{{{q}}}", rf"{sign}{p} \div {q}", rf"{sign}({p})/({q})"]
    if p > q > 1:
        ways += [rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}", f"{sign}{p // q} {p % q}/{q}"]
    if 10**6 % q == 0:
        ways.append(f"{float(value):.6f}".rstrip("0").rstrip("."))
    if q == 1:
        ways += [str(value), f"{value}.0", f"{float(value):e}", rf"{value} \cdot 1", f"{value - k} + {k}"]
        ways += [f"{int(value):,}".replace(",", comma) for comma in (",", "{,}", r",\!")]
    return random.choice(ways)


def polynomial(coefficients: list[int], random: Random) -> str:
    """Its terms from the highest power, or in any order."""
    terms = []
    for power, c in enumerate(coefficients):
        x = ["", "x", f"x^{power}", f"x^{{{power}}}", rf"x \cdot x^{{{power - 1}}}"][
            min(power, 1) if power < 2 else random.randint(2, 4)
        ]
        if c:
            terms.append(f"{c}{x}" if abs(c) != 1 or not x else ("-" if c < 0 else "") + x)
    random.shuffle(terms)
    return " + ".join(terms or ["0"]).replace("+ -", "- ")


def product(roots: list[int], factor: int) -> str:
    factors = "".join(rf"(x {'-' if root >= 0 else '+'} {abs(root)})" for root in roots)
    return factors if factor == 1 else f"{factor}{factors}"


def expanded(roots: list[int], factor: int) -> list[int]:
    coefficients = [factor]
    for root in roots:
        shifted = [0, *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, 0], strict=True)]
    return coefficients


def dressed(text: str, random: Random) -> str:
    ways = [
        "{}",
        "${}$",
        r"\({}\)",
        " {} ",
        r"\mathbf{{{}}}",
        r"\displaystyle {}",
        "**{}**",
        "{}.",
        r"\boldsymbol{{{}}}",
    ]
    return text if "$" in text else random.choice(ways).format(text)


# ── families: (gold, right answer, wrong answer) ──


def numbers(random: Random) -> tuple[str, str, str]:
    value = Fraction(random.randint(-3000, 3000), random.choice([1, 1, 2, 3, 4, 5, 7, 12]))
    other = random.choice([-value or Fraction(1), value + 1, value + Fraction(1, 7), value * 10 or Fraction(3)])
    return fraction(value, random), fraction(value, random), fraction(other, random)


def quantities(random: Random) -> tuple[str, str, str]:
    value = Fraction(random.randint(1, 500), random.choice([1, 2, 4]))
    unit = random.choice(
        [" cm", r"\text{ cm}", r"\,\mathrm{cm}^2", " km/h", r"\text{ students}", "%", "°", " square units"]
    )
    spelled = [f"{fraction(v, random)}" for v in (value, value, value + 1)]
    return spelled[0] + random.choice(["", unit]), spelled[1] + unit, spelled[2] + random.choice(["", unit])


def polynomials(random: Random) -> tuple[str, str, str]:
    roots = [random.randint(-6, 6) for _ in range(random.randint(1, 3))]
    factor = random.choice([1, 2, 3])
    right_one = expanded(roots, factor)
    wrong_one = list(right_one)
    wrong_one[random.randrange(len(wrong_one))] += random.choice([-1, 1])
    return product(roots, factor), polynomial(right_one, random), polynomial(wrong_one, random)


def equations(random: Random) -> tuple[str, str, str]:
    roots = [random.randint(-6, 6) for _ in range(2)]
    coefficients = expanded(roots, 1)
    scale = random.choice([-3, -1, 2, 5])
    wrong_one = [coefficients[0] + random.choice([-1, 1]), *coefficients[1:]]
    spelled = [polynomial([scale * c for c in cs], random) for cs in (coefficients, wrong_one)]
    answers = [random.choice(["{} = 0", "0 = {}"]).format(one) for one in spelled]
    return f"{polynomial(coefficients, random)} = 0", *answers


def lines(random: Random) -> tuple[str, str, str]:
    a, b = random.choice([-5, -3, -2, 2, 3, 4]), random.choice([-7, -4, -1, 1, 5, 8])
    spelled = [
        polynomial([d, c], random)
        for c, d in ((a, b), (a, b), random.choice([(a + 1, b), (a, b + 1), (-a, b), (b, a)]))
    ]
    wrong_one = spelled[2] if (a, b) != (b, a) else polynomial([b + 2, a], random)
    return (
        f"y = {spelled[0]}",
        random.choice(["y = {}", "{} = y", "{}", "f(x) = {}"]).format(spelled[1]),
        f"y = {wrong_one}",
    )


def roots(random: Random) -> tuple[str, str, str]:
    inside, outside = random.choice([2, 3, 5, 6, 7]), random.randint(2, 9)
    ways = [rf"{outside}\sqrt{{{inside}}}", rf"\sqrt{{{inside * outside**2}}}", rf"{outside} \cdot {inside}^{{1/2}}"]
    ways += [rf"\frac{{{outside * inside}}}{{\sqrt{{{inside}}}}}", f"{outside}√{inside}", rf"{outside}\sqrt {inside}"]
    wrong_one = random.choice(
        [rf"{outside}\sqrt{{{inside + 4}}}", rf"{outside + 1}\sqrt{{{inside}}}", f"{outside * inside}"]
    )
    return random.choice(ways), random.choice(ways), wrong_one


def lists(random: Random) -> tuple[str, str, str]:
    values = random.sample(range(-20, 20), random.randint(2, 4))
    shuffled = random.sample(values, len(values))
    others = [*shuffled[:-1], shuffled[-1] + 41] if random.random() < 0.5 else shuffled[:-1]
    ways: list[Callable[[list[int]], str]] = [
        lambda v: ", ".join(map(str, v)),
        lambda v: "x = " + ", x = ".join(map(str, v)),
        lambda v: r" \text{ or } ".join(map(str, v)),
        lambda v: "; ".join(map(str, v)),
        lambda v: rf"\{{{', '.join(map(str, v))}\}}",
        lambda v: " ".join(f"${n}$" for n in v),
        lambda v: ", ".join(map(str, v[:-1])) + f" and {v[-1]}" if len(v) > 1 else str(v[0]),
    ]
    return random.choice(ways)(values), random.choice(ways)(shuffled), random.choice(ways)(others)


def points(random: Random) -> tuple[str, str, str]:
    x, y = random.sample(range(-9, 10), 2)
    ways = [rf"\left({x}, {y}\right)", f"({x},{y})", f"({x}; {y})", f"x={x}, y={y}", rf"y = {y} \text{{ and }} x = {x}"]
    ways += [
        rf"\left ( {x} , {y} \right )",
        rf"\begin{{cases}} x = {x} \\ y = {y} \end{{cases}}",
        f"(x, y) = ({x}, {y})",
    ]
    wrong_one = random.choice([f"({y}, {x})", rf"\{{{x}, {y}\}}", f"x={y}, y={x}", f"({x}, {y + 1})", f"({x}, {y}, 0)"])
    return f"({x}, {y})", random.choice(ways), wrong_one


def intervals(random: Random) -> tuple[str, str, str]:
    a = random.randint(-9, 5)
    b = a + random.randint(1, 9)
    left, right_end = random.choice("(["), random.choice(")]")
    below, above = "<" if left == "(" else r"\le", "<" if right_end == ")" else r"\le"
    ways = [f"{left}{a}, {b}{right_end}", rf"x \in {left}{a},{b}{right_end}", f"{a} {below} x {above} {b}"]
    ways += [rf"\{{x \mid {a} {below} x {above} {b}\}}", rf"\left{left} {a}, {b} \right{right_end}"]
    other = "[" if left == "(" else "("
    wrong_one = random.choice([f"{other}{a}, {b}{right_end}", f"{left}{a}, {b + 1}{right_end}", f"x {above} {b}"])
    return random.choice(ways[1:] if left + right_end == "()" else ways), random.choice(ways), wrong_one


FAMILIES = [numbers, quantities, polynomials, equations, lines, roots, lists, points, intervals]


def pairs(family: Callable[[Random], tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    random = Random(family.__name__)
    for _ in range(60):
        gold, right_one, wrong_one = family(random)
        yield dressed(gold, random), dressed(right_one, random), dressed(wrong_one, random)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_one_value_in_any_spelling_is_right_and_its_neighbor_wrong(family) -> None:
    refused = [(answer, gold) for gold, answer, _ in pairs(family) if not right(answer, gold)]
    accepted = [(answer, gold) for gold, _, answer in pairs(family) if right(answer, gold)]
    assert (accepted, refused) == ([], [])


# ── any text ──

PIECES = [
    *(
        "1",
        "12",
        "0.5",
        "x",
        "a",
        "i",
        "e",
        "+",
        "-",
        "/",
        "^",
        "_",
        "=",
        "<",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "|",
        ",",
        ";",
    ),
    *(
        r"\{",
        r"\}",
        r"\frac",
        r"\frac{1}{2}",
        r"\sqrt",
        r"\pi ",
        r"\infty ",
        r"\cup ",
        r"\pm ",
        r"\sin ",
        r"\log_",
        "!",
        "%",
    ),
    *(
        "°",
        "'",
        r"\text{cm}",
        r"\text{ or }",
        "and ",
        "cm",
        ":",
        "$",
        r"\quad ",
        r"\begin{cases}",
        r"\end{cases}",
        r"\\",
    ),
    *(
        "&",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        r"\angle ABC",
        "f(x)",
        r"\mathbb{R}",
        "if ",
        "(1)",
        "(2)",
        "yes",
        "B. ",
    ),
    *("12:30", "5 ft ", "_7", "10^{5}", r"\le ", r"\in ", r"\overline{AB}"),
]


def test_any_text_is_read_or_unparsable_and_what_is_not_read_to_its_end_is_not_right() -> None:
    random = Random("any")
    for _ in range(800):
        text = "".join(random.choice(PIECES) for _ in range(random.randint(1, 9)))
        verdict = verify_math(rf"\boxed{{{text}}}", PromptRecord("toy/7", "problem", (), (), "5", "math", "toy"))
        assert verdict.status in ("ok", "unparsable"), text
        if last_boxed(rf"\boxed{{5 {text} ?}}") == f"5 {text} ?":  # its braces are balanced
            assert not right(f"5 {text} ?", "5"), text
