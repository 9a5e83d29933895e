"""Reads all of a spelled text as one formula.

Numbers side by side are neither added nor multiplied; a mixed number is the one exception. Names keep their case, i is
the imaginary unit, degrees count in trigonometric functions only. What only math-verify reads (an integral, a limit, a
matrix) is left to it, if it reads all of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

Tree = tuple[Any, ...]
"""("number", value), ("name", text), ("add", tree, ...), ("power", base, exponent), ("sin", argument), ..."""


class UnreadableError(ValueError):
    """A text is not one expression."""


@dataclass(frozen=True)
class Expression:
    """A formula that was read."""

    text: str
    tree: Tree | None
    """None: only math-verify reads it."""

    @property
    def rounded(self) -> bool:
        """Whether it holds decimals."""
        return _DECIMAL.search(self.text) is not None

    @property
    def constant(self) -> bool:
        """Whether it is a number."""
        return self.tree is not None and not _names(self.tree)


_DECIMAL = re.compile(r"\.\d")

# ── reading ──

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+|\d+\.(?=\D|$))|\\text ?\{(?P<text>[^{}]*)\}"
    r"|\\(?P<command>[A-Za-z]+)|(?P<letter>[A-Za-z])|(?P<mark>\\[{}|]|\S))",
    re.ASCII,
)


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SYMBOLS = _set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron rho varrho"
    " sigma varsigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell pi"
)
_FUNCTIONS = _set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp arccot arcsec arccsc")
_TRIGONOMETRIC = _set("sin cos tan cot sec csc")
_ACCENTS = _set("overline bar vec overrightarrow hat widehat tilde mathbb overarc")
_FIGURES = _set("angle triangle odot")
_ONLY_MATH_VERIFY = _set("int iint oint lim sum prod begin partial det gcd lcm max min bmod mod")
_PAIRS = {"(": ")", "{": "}", "[": "]", "\\{": "\\}"}
_NO_NAMES = _set("cap cup in setminus to parallel perp cong sim equiv end le ge ne approx pm mp rfloor rceil")
_END: tuple[str, str] = ("end", "")


@lru_cache(maxsize=4096)
def read_expression(text: str) -> Expression:
    """`text`, which must be `spelled`, as one expression.

    Raises:
        UnreadableError: it is none, or holds more.
    """
    try:
        reader = _Reader(text)
        tree = reader.sum()
        if reader.next != _END:
            raise UnreadableError(text)
        return Expression(text, tree)
    except RecursionError:
        raise UnreadableError(text) from None
    except _OtherError:
        sympy_of(text)
        return Expression(text, None)


class _OtherError(Exception):
    """A command that only math-verify reads."""


class _Reader:
    """Reads a sum by recursive descent. `in_function`: degrees count, since they are not radians."""

    def __init__(self, text: str) -> None:
        self.tokens = [
            next((kind, value) for kind, value in match.groupdict().items() if value is not None)
            for match in _TOKEN.finditer(text.strip())
        ]
        self.at, self.in_function, self.bars = 0, False, 0

    @property
    def next(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else _END

    def take(self, *marks: str) -> str | None:
        """The mark or command that comes next, if it is one of these; it is passed."""
        kind, value = self.next
        if kind in ("mark", "command") and value in marks:
            self.at += 1
            return value
        return None

    def need(self, mark: str) -> None:
        if self.take(mark) is None:
            raise UnreadableError(f"no {mark}")

    def sum(self) -> Tree:
        terms = [self.term()]
        while sign := self.take("+", "-"):
            term = self.term()
            terms.append(term if sign == "+" else _negative(term))
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self) -> Tree:
        if sign := self.take("+", "-"):
            term = self.term()
            return term if sign == "+" else _negative(term)
        tree = self.product(self.factor())
        while sign := self.take("*", "cdot", "times", "/", "div", ":"):
            negative = self.take("-")
            factor = self.factor()
            if sign == "/" and tree[0] == factor[0] == "number":  # 1/2x is half of x
                tree = self.product(("divide", tree, factor))
            else:
                factor = self.product(factor)
                tree = ("multiply", tree, factor) if sign in ("*", "cdot", "times") else ("divide", tree, factor)
            tree = _negative(tree) if negative else tree
        return tree

    def product(self, first: Tree) -> Tree:
        """`first` and the factors right behind it."""
        factors = [first]
        while self.starts_factor():
            factors.append(self.factor())
        return first if len(factors) == 1 else ("multiply", *factors)

    def starts_factor(self, functions: bool = True) -> bool:
        kind, value = self.next
        if kind == "command":
            return value not in (*_NO_NAMES, "cdot", "times", "div") and (functions or value not in _FUNCTIONS)
        return kind in ("letter", "text") or value in ("(", "{", "[") or (value == "|" and not self.bars)

    def factor(self) -> Tree:
        tree = self.primary()
        while True:
            if self.take("^"):
                tree = ("power", tree, self.script())
            elif self.take("!"):
                tree = ("factorial", tree)
            elif self.take("°"):
                tree = ("multiply", tree, ("degree",)) if self.in_function else tree
            elif self.take("%"):
                tree = ("divide", tree, ("number", Fraction(100)))
            else:
                return tree

    def script(self) -> Tree:
        """An exponent."""
        if self.take("-"):
            return _negative(self.script())
        return self.primary()

    def primary(self) -> Tree:
        kind, value = self.next
        self.at += 1
        match kind, value:
            case "number", _:
                return self.mixed(value)
            case "letter", _:
                return self.name(value)
            case "text", _:
                if re.fullmatch("[A-Z]{2,}", value.strip()):  # a length
                    self.tokens[self.at : self.at] = [("letter", letter) for letter in value.strip()[1:]]
                    value = value.strip()[0]
                return self.name(value.strip())
            case "mark", "(" | "{" | "[":
                bars, self.bars = self.bars, 0
                tree = self.sum()
                self.need(_PAIRS[value])
                self.bars = bars
                return tree
            case "mark", "|":
                self.bars += 1
                tree = self.sum()
                self.need("|")
                self.bars -= 1
                return ("absolute", tree)
            case "command", _:
                return self.command(value)
        raise UnreadableError(value)

    def mixed(self, digits: str) -> Tree:
        """A number, with the proper fraction behind it if there is one."""
        number = ("number", Fraction(digits))
        if self.next == ("command", "frac") and "." not in digits:
            self.at += 1
            part = (self.group(), self.group())
            values = [tree[1] for tree in part if tree[0] == "number"]
            if len(values) == 2:
                if not 0 < values[0] < values[1]:
                    raise UnreadableError("a number and a fraction")
                return ("number", number[1] + values[0] / values[1])
            return ("multiply", number, ("divide", *part))
        if self.next[0] == "number":
            raise UnreadableError("two numbers")
        return number

    def group(self) -> Tree:
        """The argument of a command: in braces, or one token."""
        if self.take("{"):
            tree = self.sum()
            self.need("}")
            return tree
        kind, value = self.next
        if kind == "number" and value.isdigit():
            self.tokens[self.at : self.at + 1] = [("number", digit) for digit in value]
            self.at += 1
            return ("number", Fraction(value[0]))
        return self.primary()

    def raw(self) -> str:
        """The argument of a command or an index, as text."""
        if not self.take("{"):
            kind, value = self.next
            if kind in ("mark", "end"):
                raise UnreadableError("no argument")
            self.at += 1
            return value
        depth, start = 1, self.at
        while depth:
            if self.next == _END:
                raise UnreadableError("a brace does not close")
            depth += (self.next == ("mark", "{")) - (self.next == ("mark", "}"))
            self.at += 1
        return "".join(value for _, value in self.tokens[start : self.at - 1]).replace("{", "").replace("}", "")

    def name(self, text: str) -> Tree:
        """A variable with its index and primes, a constant, or a function of that name applied."""
        while True:
            if self.take("_"):
                text += "_" + self.raw()
            elif self.take("'"):
                text += "'"
            else:
                break
        if text in ("f", "g", "f'", "g'", "f''", "g''") and self.next == ("mark", "("):
            self.at += 1
            arguments = [self.sum()]
            while self.take(","):
                arguments.append(self.sum())
            self.need(")")
            return ("function", text, *arguments)
        return (text,) if text in ("e", "i", "pi") else ("name", text)

    def command(self, name: str) -> Tree:
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _ONLY_MATH_VERIFY:
            raise _OtherError
        if name in _NO_NAMES or name == "_":
            raise UnreadableError(name)
        if name in ("frac", "binom", "tbinom", "dbinom"):
            return ("divide" if name == "frac" else "binomial", self.group(), self.group())
        if name == "sqrt":
            index: Tree = ("number", Fraction(2))
            if self.take("["):
                index = self.sum()
                self.need("]")
            return ("root", self.group(), index)
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.need({"lfloor": "rfloor", "lceil": "rceil"}[name])
            return ({"lfloor": "floor", "lceil": "ceiling"}[name], tree)
        if name == "infty":
            return ("infinity",)
        if name in _ACCENTS:
            return self.name(rf"\{name} {self.raw()}")
        if name in _FIGURES:
            letters = self.letters()
            return ("name", rf"\{name} {letters}")
        if name not in _SYMBOLS:
            raise UnreadableError(name)
        return self.name("pi" if name == "pi" else rf"\{name}")

    def letters(self) -> str:
        """The name of a figure. The vertex of an angle is the middle letter."""
        letters = self.raw() if self.next == ("mark", "{") else ""
        while self.next[0] in ("letter", "text") or self.next[1] in ("_", "'"):
            letters += self.next[1]
            self.at += 1
            if letters[-1] == "_":
                letters += self.raw()
        if len(letters) == 3 and letters.isalpha():
            letters = min(letters, letters[::-1])
        if not letters and self.next[0] == "number":
            letters = self.next[1]
            self.at += 1
        return letters

    def function(self, name: str) -> Tree:
        power = base = None
        while mark := self.take("^", "_"):
            if mark == "^":
                power = self.script()
            else:
                base = self.group()
        outer, self.in_function = self.in_function, name in _TRIGONOMETRIC
        if self.next[1] in ("(", "{", "["):
            argument = self.factor() if self.next[1] == "{" else self.primary()
        else:
            negative = self.take("-")
            factors = [self.factor()]
            while self.starts_factor(functions=False) and self.next[1] not in ("(", "["):
                factors.append(self.factor())
            argument = ("multiply", *factors)
            argument = _negative(argument) if negative else argument
        self.in_function = outer
        if power == ("multiply", ("number", Fraction(-1)), ("number", Fraction(1))) and name in _TRIGONOMETRIC:
            return (f"arc{name}", argument)
        if name in ("log", "lg", "ln"):
            base = base or (("e",) if name == "ln" else ("number", Fraction(10)))
            tree: Tree = ("logarithm", argument, base)
        else:
            tree = (name, argument)
        return tree if power is None else ("power", tree, power)


def _negative(tree: Tree) -> Tree:
    return ("multiply", ("number", Fraction(-1)), tree)


def _names(tree: Tree) -> frozenset[str]:
    if tree[0] == "name":
        return frozenset(tree[1:])
    return frozenset().union(*(_names(part) for part in tree[1:] if isinstance(part, tuple)))


# ── math-verify ──

_CONVERSION = ConversionConfig(lowercase_symbols=False)
_TWO_NUMBERS = re.compile(r"\d\s+\d|\d\s*\(\s*\d|\)\s*\d")


@lru_cache(maxsize=256)
def sympy_of(text: str) -> Any:
    """`text` as latex2sympy reads all of it."""
    if _TWO_NUMBERS.search(text):  # which it would add
        raise UnreadableError(text)
    try:
        return latex2sympy(text, is_real=True, normalization_config=None, conversion_config=_CONVERSION)
    except Exception as error:  # whatever its grammar raises
        raise UnreadableError(text) from error
