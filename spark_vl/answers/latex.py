"""One spelling for LaTeX, Unicode and plain typing of the same formula.

`spelled` is the only place that knows them all. What it returns still reads as the text did: numbers stay apart, and
nothing is computed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

WIDE = "\u2003"
"""What stands for a wide space or a line break: it may separate two answers."""


def _letter(sign: str) -> str:
    """A Greek letter as a command."""
    *_, size, _, name = ["", *unicodedata.name(sign).replace("LAMDA", "LAMBDA").replace("FINAL ", "").split()]
    return rf"\{name.capitalize() if size == 'CAPITAL' else name.lower()} "


_SIGNS = {
    **dict.fromkeys("−–﹣‒", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("°º˚", "°"),
    **dict.fromkeys("′’‘", "'"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002", " "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **{"×": r"\times ", "÷": r"\div ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap "},
    **{"∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "∠": r"\angle ", "∥": r"\parallel "},
    **{
        "⊥": r"\perp ",
        "≅": r"\cong ",
        "∽": r"\sim ",
        "∼": r"\sim ",
        "ϵ": r"\epsilon ",
        "ϕ": r"\phi ",
        "ℝ": r"\mathbb{R}",
    },
    **{"、": ",", "“": '"', "”": '"', "″": "''"},
    **dict.fromkeys("△▵", r"\triangle "),
    **{sign: _letter(sign) for sign in "αβγδεζηθικλμνξοπρςστυφχψωΓΔΘΛΞΠΣΦΨΩ"},
}
_TRANSLATED = str.maketrans(
    _SIGNS | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if not chr(code).isalnum()}
)

_Rules = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]
_END = r"(?![A-Za-z])"


def _commands(names: str) -> str:
    """Pattern of any of these commands."""
    return rf"\\(?:{'|'.join(names.split())}){_END}"


def _script(sign: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{sign}{{{unicodedata.normalize('NFKC', match[0]).replace(chr(0x2212), '-')}}}"


def _fraction(match: re.Match[str]) -> str:
    """`½` as LaTeX."""
    return r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", match[0]).split("\u2044"))


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction 15/90."""
    whole, once, again = match[1], match[2], match[3] or match[4]
    number = int(whole + once + again) - int("0" + whole + once)
    return rf"\frac{{{number}}}{{{'9' * len(again)}{'0' * len(once)}}}"


_MATH_STYLES = "mathbf mathit boldsymbol bm bf it underline mathsf sf textsf mathcal displaystyle textstyle scriptstyle"
_TEXT_STYLES = (
    "text textbf textit textrm texttt textnormal textup mathrm mathnormal mbox rm unit operatorname number hbox"
)
_STYLE = re.compile(rf"\\(?:(?P<math>{'|'.join(_MATH_STYLES.split())})|(?:{'|'.join(_TEXT_STYLES.split())})){_END}\s*")
_BEFORE_FENCES: _Rules = [
    (re.compile(r"\\[hv]?phantom\s*\{(?:[^{}]|\{[^{}]*\})*\}"), ""),  # phantoms are not shown
    (re.compile(r"\\\$|[£€¥₹]"), ""),
    (re.compile(r"√\s*(\d+(?:\.\d+)?)"), r"\\sqrt{\1}"),
    (re.compile("√"), r"\\sqrt "),
]
_COMMANDS: _Rules = [
    (re.compile(r"(?<!\\)\\$"), ""),  # left of `\ ` when white space at the end was stripped
    (re.compile(r",\s*\\!\s*|\{,\}"), ",\ufeff"),  # 1,\!000: no list
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\[ ,;:>]|~"), " "),
    (re.compile(r"[ \t\r]+"), " "),
    (re.compile(rf"\s*(?:(?<!\\){_commands('qquad quad')}|\\hspace\*?\s*\{{[^{{}}]*\}}|\n)\s*"), WIDE),
    (re.compile(_commands("left right middle [bB]igg?[lrm]? limits nolimits") + r"\s*\.?\s*"), ""),
    (re.compile(r"\\(?:text)?color\s*\{[a-z]+\}"), ""),
    (re.compile(r"\\[dtc]frac" + _END), r"\\frac"),
    (re.compile(_commands("leqslant leqq leq")), r"\\le "),
    (re.compile(_commands("geqslant geqq geq")), r"\\ge "),
    (re.compile(r"\\not\s*=|!=|" + _commands("neq")), r"\\ne "),
    (re.compile(_commands("lt")), "<"),
    (re.compile(_commands("gt")), ">"),
    (re.compile(_commands("lvert rvert vert mid")), "|"),
    (re.compile(_commands("lbrace")), r"\\{"),
    (re.compile(_commands("rbrace")), r"\\}"),
    (re.compile(_commands("colon")), ":"),
    (re.compile(_commands("varnothing")), r"\\emptyset "),
    (re.compile(_commands("varphi")), r"\\phi "),
    (re.compile(_commands("backslash smallsetminus")), r"\\setminus "),
    (re.compile(_commands("imath")), "i"),
    (re.compile(_commands("cdotp bullet ast")), r"\\cdot "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r"(?<=[A-Za-z])//(?=[A-Za-z])"), r"\\parallel "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\%"), "%"),
    (
        re.compile(
            r"(?:\{\})?\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\}|o(?![A-Za-z])|\{\s*(?:\\text\s*\{)?\s*o\s*\}?\s*\})"
            rf"|{_commands('degrees? textdegree')}|textdegree"
        ),
        "°",
    ),
    (re.compile(r"(?<=[\d ])degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])|(?<=\d)(pi|sqrt)(?![A-Za-z])"), r"\\\1\2 "),
    (
        re.compile(
            r"(?<![A-Za-z\\{])((?:arc)?(?:sin|cos|tan|cot|sec|csc)|ln|log)(?=[ (\\^_]+[^ A-Za-z]|[ ]+[a-zA-Z]$)"
        ),
        r"\\\1",
    ),
]
_NUMBERS: _Rules = [
    (re.compile(r"[¼-¾⅐-⅞]"), _fraction),
    (re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+"), _script("^")),
    (re.compile(r"[₀-₉]+"), _script("_")),
    (re.compile(r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))"), _repeating),
    (re.compile(r"(?<=\d),\ufeff(?=\d{3}(?!\d))"), ""),  # 1{,}234
    (re.compile("\ufeff"), ""),
    (
        re.compile(r"(?<![\d.,_^{])(?<![(\[]) ?([1-9]\d{0,2}(?:,\d{3})+)(?![\d,]|\.\d*,)"),
        lambda m: m[0].replace(",", ""),
    ),
    (re.compile(r"(?<=[(\[])[1-9]\d{0,2}(?:,\d{3})+(?![\d,)\]])"), lambda match: match[0].replace(",", "")),
    (re.compile(r"(?<=\d) (?=\d{3}(?!\d))"), ""),  # 20 000
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 1/2
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"(\d)[eE]([-+]?\d+)(?![A-Za-z\d])"), r"\1\\times 10^{\2}"),
    (re.compile(r"(?<=\d)(?:st|nd|rd|th)$"), ""),
    (re.compile(r"(?<=\d)(\s*(?:\\text\s*\{\s*)?(?:[ckdm]?m|ft|in))([23])(?=\s*\}?$)"), r"\1^{\2}"),  # 5 cm2
    (re.compile(r"\{\}|\s+(?=°)"), ""),
    (re.compile(r"[ \t\r]+"), " "),
]
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z(){}\[\],;!])")
"""A backslash too many, as in JSON."""
_FENCE = re.compile(r"\$\$?|(?<!\\)\\[()\[\]]")
_LITERAL = re.compile(r"(?:[^\\+=<>$|]|\\cdot(?![A-Za-z]))*")
_OUTSIDE = "*` \n" + WIDE


@lru_cache(maxsize=1024)  # a group shares its gold and often its answers
def spelled(text: str) -> str:
    r"""`text` in one spelling, without white space or marks around it.

    Fractions are `\frac{1}{2}`, degrees `°`, percent `%`, numbers without separators; `\text{...}` stands for every
    upright style and holds words or a unit; other styles, sizes, spaces, dollars and currencies are gone. Two formulas
    next to each other (`$7$ $11$`) get a comma.
    """
    text = text.translate(_TRANSLATED).strip(_OUTSIDE)
    if r"\begin" not in text:
        text = _DOUBLED.sub(r"\\", text).replace(r"\\ ", WIDE)
    for spelling, standard in _BEFORE_FENCES:
        text = spelling.sub(standard, text)
    text = _unfenced(text)
    for spelling, standard in _COMMANDS:
        text = spelling.sub(standard, text)
    text = _restyled(text)
    for spelling, standard in _NUMBERS:
        text = spelling.sub(standard, text)
    return re.sub(r"\.$", "", text.strip(_OUTSIDE).rstrip(",;" + WIDE)).strip(_OUTSIDE)


def _unfenced(text: str) -> str:
    r"""Without dollars and `\(...\)`; a comma where only white space stood between two of them."""
    fences = list(_FENCE.finditer(text))
    if len(fences) % 2:
        return _FENCE.sub(" ", text)  # the sign of a currency
    pieces, end = [], 0
    for i, fence in enumerate(fences):
        before = text[end : fence.start()]
        if i and i % 2 == 0 and before and not before.strip():
            before = ", "
        pieces.append(before.rstrip(" .") if i % 2 and before.rstrip().endswith(".") else before)
        end = fence.end()
    return "".join([*pieces, text[end:]])


_BRACE = re.compile(rf"(?P<style>{_STYLE.pattern})(?P<braced>\{{)?|\\[{{}}\\]|(?P<open>\{{)|(?P<close>\}})")


def _restyled(text: str) -> str:
    r"""With `\text{...}` around words and units that were set upright, and no other style."""
    stack: list[tuple[bool, list[str]]] = [(False, [])]  # (is a style, the pieces so far)
    end = 0
    styles: list[str | None] = []
    for match in _BRACE.finditer(text):
        stack[-1][1].append(text[end : match.start()])
        end = match.end()
        if match["style"]:
            if match["braced"]:
                styles.append("math" if match["math"] else "text")
                stack.append((True, []))
            elif len(stack) > 1 and not "".join(stack[-1][1]).strip() and styles[-1] is None:  # {\rm cm}
                styles[-1] = "math" if match["math"] else "text"
        elif match["open"]:
            styles.append(None)
            stack.append((False, []))
        elif match["close"] and len(stack) > 1:
            content = "".join(stack.pop()[1])
            stack[-1][1].append(_styled(content, styles.pop()))
        else:
            stack[-1][1].append(match[0])
    tail = text[end:]
    while len(stack) > 1:  # braces that do not close
        tail = "{" + "".join(stack.pop()[1]) + tail
    return "".join([*stack[0][1], tail])


def _styled(content: str, style: str | None) -> str:
    if style is None:
        return content if re.fullmatch(r"\{[^{}]*\}", content) else f"{{{content}}}"
    words = content.strip(" " + WIDE)
    if words.startswith("\\text{") and words.find("}") == len(words) - 1:
        return words
    if not words[:1].isalpha() or not _LITERAL.fullmatch(words) or (style == "math" and not words.isalpha()):
        return f" {content} "
    return rf"\text{{{words}}}"
