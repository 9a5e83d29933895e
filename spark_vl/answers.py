"""Finds the answer in a model's reply: boxed text, a label, a choice, a number.

Everything that reads an answer (verifiers, recycling, judges) starts from `last_boxed`, so that the text that a judge
is shown is the text that was scored. Every function here runs in time linear in the length of its text.
"""

from __future__ import annotations

import math
import re
from string import ascii_uppercase

# `\\` before `boxed` is a doubled escape (as in JSON), not a line break: such a box counts too.
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?:[{}]|\\(?!boxed))|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    r"""The content, stripped, of the last `\boxed{...}` in `text`; None if there is none.

    "Last" is the one that starts last, so of nested boxes it is the innermost. A box whose braces do not close (a
    reply that was cut off) and a blank one (`\boxed{}`, an echo of the instruction) hold no answer and are passed over.
    """
    stack: list[tuple[bool, int, int]] = []  # (is a box, where it starts, where its content starts)
    last, content = -1, None
    for match in _BRACE.finditer(text):
        if match["close"]:
            if stack:
                is_box, start, inside = stack.pop()
                if is_box and start > last and (found := text[inside : match.start()].strip()):
                    last, content = start, found
        elif match["box"] or match["open"]:
            stack.append((match["box"] is not None, match.start(), match.end()))
    return content


_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[ ,;:!]|\\q?quad(?![A-Za-z])|~|\s")


def _plain(text: str) -> str:
    text = _STYLE.sub(r"\1", _STYLE.sub(r"\1", text))  # twice: styles are rarely nested deeper
    return " ".join(_SPACE.sub(" ", text).split()).strip(" ().*_$`'\"")


def normalised(text: str) -> str:
    """`text` in lower case, without styling, quotes, outer parentheses and a trailing period, white space collapsed."""
    return _plain(text).casefold()


def match_label(reply: str, labels: tuple[str, ...]) -> str | None:
    r"""The one of `labels` that the last box of `reply` says; None if it says none, or anything besides.

    Case, `\text{...}`, `**...**`, parentheses and a trailing period do not count: `\boxed{(a).}` says "A". Whole
    labels only: neither "Yesterday" nor "Yes and No" says "Yes".
    """
    boxed = last_boxed(reply)
    return None if boxed is None else {normalised(label): label for label in labels}.get(normalised(boxed))


_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*\(?)?([a-z])\s*(?:$|\)?\s*(?:\.|:(?=\s|$))|\))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z])[A-Z](?=[.):])|(?:\band\b|\bor\b|[,;/&])\s*\(?[A-Z](?![A-Za-z])|^[A-Z]$")


def match_choice(text: str, choices: tuple[str, ...] = ()) -> str | None:
    """The letter ("A", "B", ...) of the choice that `text`, the content of a box, names; None if none or several.

    Accepted: the letter ("B", "(b)", "B.", "Option B"), the letter with a text ("B. 5 cm") and, where `choices` holds
    the options in order, an option's own text. Where letter and text name different options, or a bare letter is
    also another option's text, the answer is ambiguous. Without `choices`, every letter is a choice.
    """
    letters = ascii_uppercase[: len(choices)] if choices else ascii_uppercase
    options = [normalised(choice) for choice in choices]

    def saying(words: str) -> set[str]:
        return {letter for letter, option in zip(letters, options, strict=False) if option == normalised(words)}

    named = saying(text)
    if (match := _CHOICE.fullmatch(_plain(text))) and (letter := match[1].upper()) in letters:
        words = _plain(match[2])
        if not words:
            named.add(letter)
        elif not named:
            second = {found[-1] for found in _SECOND_CHOICE.findall(words)} & set(letters) - {letter}
            named = saying(words) or ({letter} if not second else set())
            return letter if letter in named else None
    return named.pop() if len(named) == 1 else None


_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]*)?|\.[0-9]+"
_NAME = (
    r"(?:degrees?|percent|°[CF]?|℃|℉|%|[$€£¥]|[kcmdnμ]?m|inch(?:es)?|in|foot|feet|ft|yards?|yd|miles?|mi|mph"
    r"|(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re))s?|[km]?g|m?[lL]|pounds?|lbs?|oz"
    r"|(?:millisecond|second|minute|hour|day|week|month|year)s?|ms|s|sec|min|hr?s?|[kM]?(?:N|J|W|Hz|Pa|V|A|Ω)|mol|K"
    r"|dollars?|cents?|units?)"
)
_UNIT = rf"(?:(?:square|cubic|sq|cu)\.? )?{_NAME}(?:(?:\s?\^\s?)?[23]|²|³)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?[$€£¥]?\s?"
    rf"(?:\\frac\s?(?P<num>[0-9]|\{{(?:{_UNSIGNED})\}})\s?(?P<den>[0-9]|\{{(?:{_UNSIGNED})\}})|(?P<value>{_UNSIGNED})"
    rf"(?:\s?/\s?(?P<over>{_UNSIGNED})"
    rf"|[eE](?P<e>[-+]?[0-9]+)|\s?[*×]\s?10\s?\^\s?(?P<power>[-+]?[0-9]+|\{{[-+]?[0-9]+\}}))?)"
    rf"(?:\s?{_UNIT}(?:\s?(?:/|per)\s?{_UNIT})?)?"
)
_SPELLINGS = [
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\^\{\s*([23])\s*\}"), r"^\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
]


def parse_number(text: str) -> float | None:
    r"""The finite number that `text`, the content of a box, is; None if it is none, or holds a second one.

    Accepted: a sign, thousands separators ("1,234.5"), currency signs, a percent sign ("50%" is 50), degrees, a unit
    ("3 cm", `3\ \text{m/s}^2`), fractions ("1/2", `\frac{1}{2}`), "1.5e3" and `1.5 \times 10^{3}`. Words of scale
    ("3 million") are not.
    """
    if len(text) > 200:  # no number is that long
        return None
    text = _STYLE.sub(r"\1", text)
    for spelling, standard in _SPELLINGS:
        text = spelling.sub(standard, text)
    text = " ".join(_SPACE.sub(" ", text).split()).strip(" ()*$").removesuffix(".")
    if (match := _NUMBER.fullmatch(text)) is None:
        return None
    number = (match["num"] or match["value"]).strip("{}").replace(",", "")
    divisor = float((match["den"] or match["over"] or "1").strip("{}").replace(",", ""))
    exponent = match["e"] or (match["power"] or "0").strip("{}")
    value = float(f"{match['sign']}{number}e{exponent}") / divisor if divisor else math.nan
    return value if math.isfinite(value) else None
