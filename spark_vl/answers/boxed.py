"""The last box of a reply, and its text without the marks that do not change what it says."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 10_000
"""A longer box is not read for choices, items or intervals."""

# `\\` before `boxed` is a doubled escape (as in JSON), not a line break: such a box counts too.
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?:[{}]|\\(?!boxed))|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    r"""The content, stripped, of the last `\boxed{...}` in `text`; None if there is none. See `last_box`."""
    span = last_box(text)
    return None if span is None else text[slice(*span)]


def last_box(text: str) -> tuple[int, int] | None:
    r"""Where in `text` the content, stripped, of the last `\boxed{...}` starts and ends; None if there is none.

    "Last" is the box that starts last, so of nested boxes it is the innermost. Boxes whose braces do not close (a
    reply that was cut off) and blank ones (`\boxed{}`, an echo of the instruction) hold no answer and are skipped.
    """
    stack: list[tuple[bool, int, int]] = []  # (is a box, where it starts, where its content starts)
    last, span = -1, None
    for match in _BRACE.finditer(text):
        if match["close"]:
            if stack:
                is_box, start, inside = stack.pop()
                if is_box and start > last and (found := text[inside : match.start()].strip()):
                    inside = text.index(found, inside)
                    last, span = start, (inside, inside + len(found))
        elif match["box"] or match["open"]:
            stack.append((match["box"] is not None, match.start(), match.end()))
    return span


STYLE = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mbox)"
"""Pattern of the LaTeX commands that set their content in a style and do not change what it says."""
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
"""The LaTeX commands that size the bracket after them."""
_STYLED = re.compile(rf"(?P<style>{STYLE}\s*\{{)|\\[{{}}\\]|(?P<open>\{{)|(?P<close>\}})")
_SPACE = re.compile(r"\\[ ,;:!]|\\q?quad(?![A-Za-z])|~|\s")


def unstyled(text: str) -> str:
    r"""`text` with each `\text{...}` or other style command replaced by its content."""
    cuts: list[tuple[int, int]] = []
    stack: list[tuple[int, int] | None] = []  # where each open style command stands; None: another brace
    for match in _STYLED.finditer(text):
        if match["style"] or match["open"]:
            stack.append(match.span() if match["style"] else None)
        elif match["close"] and stack and (style := stack.pop()):
            cuts += [style, match.span()]
    pieces, end = [], 0
    for start, stop in sorted(cuts):
        pieces.append(text[end:start])
        end = stop
    return "".join([*pieces, text[end:]])


def one_line(text: str) -> str:
    """`text` unstyled, each run of white space (LaTeX spaces count) replaced by one space."""
    return " ".join(_SPACE.sub(" ", unstyled(text)).split())


MAX_MARKS = 30
"""Most marks on one letter that are meant (UAX #15, stream-safe text). Putting more in order takes quadratic time."""


def composed(text: str) -> str:
    """`text` in Unicode's normal form C; unchanged if more than `MAX_MARKS` marks follow one another in it."""
    marks = "".join(c for c in set(text) if unicodedata.combining(unicodedata.normalize("NFD", c)[0]))
    if marks and re.search(f"[{re.escape(marks)}]{{{MAX_MARKS + 1}}}", text):
        return text
    return unicodedata.normalize("NFC", text)


_ESCAPED = re.compile(r"\\([%&#_$])")
_STRAIGHT = str.maketrans("‘’′“”″", "'''\"\"\"")
MATH_MARKS = "$*`"
"""The marks that may enclose a formula."""
_MARKS = MATH_MARKS + "_'\"("


def unmarked(text: str, marks: str) -> str:
    """`text` without those of `marks` that enclose all of it in pairs, and without periods at its end.

    A mark on one side only, or one that also occurs inside, is part of the text: "$5", "5'", "A*", "(a) and (b)".
    """
    closes: dict[int, int] = {}
    opened: list[int] = []
    for i, mark in enumerate(text):
        if mark == "(":
            opened.append(i)
        elif mark == ")" and opened:
            closes[opened.pop()] = i
    start, end = 0, len(text)
    while True:
        while start < end and text[end - 1] in " \n.":
            end -= 1
        while start < end and text[start] in " \n":
            start += 1
        if end - start < 2 or (first := text[start]) not in marks:
            return text[start:end]
        if first == "(":
            paired = closes.get(start) == end - 1
        else:  # of several, "**A**" or "$ $A$ $", the outer ones first
            within = text[start + 1 : start + 3].lstrip()[:1] + text[end - 3 : end - 1].rstrip()[-1:]
            several = end - start > 3 and within == first * 2
            paired = first == text[end - 1] and (several or text.find(first, start + 1, end - 1) < 0)
        if not paired:
            return text[start:end]
        start, end = start + 1, end - 1


def plain(text: str) -> str:
    r"""`text` as it reads: `\text{...}` and `\%` undone, white space collapsed, quotes straight, accents composed.

    Pairs of quotes, parentheses, asterisks, underscores, backticks or dollar signs around all of it are removed, and so
    are periods at its end.
    """
    text = _ESCAPED.sub(r"\1", one_line(composed(text)))
    return unmarked(text.translate(_STRAIGHT), _MARKS)


def normalized(text: str) -> str:
    """`plain(text)` in lower case."""
    return plain(text).casefold()


_TYPESET = [
    (SIZES, ""),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<=\\frac|\\sqrt) (?=[0-9{])"), ""),
    (re.compile(r"\{([A-Za-z0-9])\}"), r"\1"),
    (re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) "), ""),
]


def compact(text: str) -> str:
    r"""`normalized(text)` with one spelling for formulas: "(2, 1)" becomes "(2,1)", `\dfrac{1}{2}` `\frac12`.

    Spaces between letters and digits stay: "1 1/2" is not "11/2".
    """
    text = normalized(text)
    for spelling, standard in _TYPESET:
        text = spelling.sub(standard, text)
    return unmarked(text, _MARKS)  # also those that stood within `\left(...\right)`
