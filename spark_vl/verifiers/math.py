"""Mathematical expressions: the reply's last box is equivalent to the gold, as math-verify sees it.

math-verify can run for ever (`9^{9^9}`), and its own timeouts need the main thread, so they are off here: run it in a
`VerifierPool`. It also merges several boxes into a set, picks numbers out of prose, reads "1 2" as 3 and fails on
`30°`; hence it is given exactly one box, cleaned, and no leave to search anything else.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from spark_vl.answers import last_boxed, normalised
from spark_vl.records import BadRecordError, PromptRecord, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

_MAX_CHARS = 1000
"""Longer boxes are no answers, and would each cost a worker its whole deadline."""

_SPELLINGS = [
    (re.compile(r"[°º]"), r"^\\circ "),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"[−–﹣－]"), "-"),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\^\s*(-\d+)"), r"^{\1}"),
    (re.compile(r"(?<!\\)\\[ ,;:!]|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"(?<=\d) (?=\d{3}(?!\d))"), ""),  # 20 000
    (re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\\frac{\2}{\3}"),  # 2 1/2, which would be (2 + 1)/2
    (re.compile(r"\\frac\s*(\d)\s+(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(\d)[eE]([-+]?\d+)(?![A-Za-z\d])"), r"\1\\times 10^{\2}"),
]
_TWO_NUMBERS = re.compile(r"\d\s+\d")


@lru_cache(maxsize=1024)  # a group shares its gold, and often its answers
def _parse(answer: str) -> list[Any]:
    """[expression], or [] where `answer`, the content of a box, is no mathematics."""
    for spelling, standard in _SPELLINGS:
        answer = spelling.sub(standard, answer)
    answer = answer.strip("* ").removesuffix(".")
    if _TWO_NUMBERS.search(answer):  # would be read as their sum
        return []
    config = [LatexExtractionConfig()]
    return parse(rf"\boxed{{{answer}}}", config, fallback_mode="no_fallback", parsing_timeout=None)


def verify_math(completion: str, record: PromptRecord) -> Verdict:
    """1 if the last box is equivalent to `record.gold`; `parsed` is its content.

    Degrees and other simple units do not count; 10% equals both 10 and 0.1; lists compare as sets. Runs without a limit
    on time: `9^{9^9}` does not come back.
    """
    gold = last_boxed(record.gold) or record.gold
    if not _parse(gold):
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
    try:
        equal = verify(_parse(gold), answer, timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # sympy knows no way to compare them: an inequation with an inequality, say
        return Verdict(0.0, boxed, "error", f"cannot compare with the gold: {type(error).__name__}: {error}"[:500])
    return Verdict(float(equal or normalised(boxed) == normalised(gold)), boxed)  # the same words, one in \text{}
