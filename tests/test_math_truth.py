"""The math verifier against cases written by hand, Math-Verify's own cases where they are at hand, and properties."""

from __future__ import annotations

import ast
import math
import time
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_vl.records import PromptRecord, Verdict
from spark_vl.verifiers import VerifierPool, verify
from tests.golds import check_gold
from tests.math_cases import CASES, KNOWN, REPLIES

BOXES = [(family, *case) for family, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module", autouse=True)
def worker() -> None:
    """Starts the worker of `verify`, so that no test's own limit on time has to allow for it."""
    verify("math", "", "5")


def record(gold: str) -> PromptRecord:
    return PromptRecord("toy/7", "problem", (), (), gold, "math", "toy")


def score(box: str, gold: str) -> float:
    return verify("math", rf"\boxed{{{box}}}", gold).score


@pytest.mark.parametrize(
    ("family", "box", "gold", "equal", "rule"), BOXES, ids=[f"{c[0]}-{i}-{c[-1]}" for i, c in enumerate(BOXES)]
)
def test_boxes(family: str, box: str, gold: str, equal: bool, rule: str) -> None:
    assert score(box, gold) == float(equal), rule


@pytest.mark.parametrize(("reply", "gold", "right", "rule"), REPLIES, ids=[case[-1] for case in REPLIES])
def test_replies(reply: str, gold: str, right: bool, rule: str) -> None:
    assert verify("math", reply, gold).score == float(right), rule


@pytest.mark.parametrize(("box", "gold", "equal", "today", "reason"), KNOWN, ids=[f"{k[0]} {k[1]}" for k in KNOWN])
def test_known_differences_from_the_truth(box: str, gold: str, equal: bool, today: float, reason: str) -> None:
    assert score(box, gold) == today, f"no longer so: {reason}"
    assert today != float(equal), "agrees with the truth: it belongs into CASES"


def test_there_are_enough_cases_of_both_kinds_and_none_twice() -> None:
    pairs = [(box, gold) for _, box, gold, _, _ in BOXES] + [case[:2] for case in KNOWN]
    assert len(set(pairs)) == len(pairs) >= 250
    assert sum(not equal for *_, equal, _ in BOXES) >= 100


@pytest.mark.parametrize("gold", sorted({c[2] for c in BOXES} | {c[1] for c in (*REPLIES, *KNOWN)}))
def test_every_gold_gets_full_marks(gold: str) -> None:
    check_gold(record(gold))


# ── Math-Verify's own cases ──


def own_cases(folder: Path) -> list[tuple[str, str, bool]]:
    """(gold, prediction, expected) of the literal cases in Math-Verify's tests."""
    found = []
    for file in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if (
                isinstance(node, ast.Tuple)
                and len(node.elts) >= 3
                and all(isinstance(e, ast.Constant) for e in node.elts)
            ):
                gold, prediction, expected = (e.value for e in node.elts[:3])
                if isinstance(gold, str) and isinstance(prediction, str) and expected in (0, 1):
                    found.append((gold, prediction, bool(expected)))
    return found


def test_math_verifys_own_cases() -> None:
    """What it calls equal may be refused (prose, several boxes); what it calls different must never be accepted."""
    package = Path(str(distribution("math-verify").locate_file("math_verify")))
    folders = [package / "tests", package.parent / "tests" / "math_verify"]
    if not (cases := [case for folder in folders if folder.is_dir() for case in own_cases(folder)]):
        pytest.skip("Math-Verify's tests are not shipped with its package: there is nothing to replay")
    with VerifierPool(workers=1, timeout_s=10) as pool:
        verdicts = pool.verify([(rf"\boxed{{{prediction}}}", record(gold)) for gold, prediction, _ in cases])
    accepted = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.score == 1 and not case[2]]
    assert accepted == []


def test_its_own_cases_would_be_found(tmp_path: Path) -> None:
    text = '@parametrize("gold,pred,expected", [(r"$5$", r"$6$", 0), ("a", "a", True), ("a", 1, 1), ("a", "b", 7)])\n'
    (tmp_path / "test_some.py").write_text(text + "def test(): pass\n", "utf-8")
    assert own_cases(tmp_path) == [("$5$", "$6$", False), ("a", "a", True)]


# ── properties ──

golds = st.integers(-999, 999).map(str) | st.sampled_from(
    [
        r"\frac{2}{7}",
        r"\sqrt{7}",
        "x+1",
        r"3\pi",
        "(1, 2)",
        r"(-\infty, 3]",
        r"\{1, 2\}",
        "y = 2x",
        r"\text{yes}",
        "2.5",
    ]
)
prose = st.text(alphabet=st.characters(exclude_characters="\\", exclude_categories=["Cs"]), max_size=60)
space = st.sampled_from(["", " ", "\n", "\t ", r"\,", r"\; "])
few = settings(deadline=2000, max_examples=40)


@given(golds, space, space, prose, prose)
@few
def test_how_the_gold_is_set_and_surrounded_does_not_matter(gold, left, right, before, after) -> None:
    for box in (gold, f"{left}{gold}{right}", f"${gold}$", f"{gold}."):
        assert verify("math", rf"{before}\boxed{{{box}}}{after.replace('}', '')}", gold).score == 1, box


@given(
    st.integers(-999, 999).map(str) | st.sampled_from(["yes", "x", "2.5"]),
    st.sampled_from(["text", "textbf", "mathrm"]),
)
@few
def test_style_does_not_matter(gold, style) -> None:
    assert score(rf"\{style}{{{gold}}}", gold) == 1


@given(golds, golds, prose)
@few
def test_another_answer_in_a_later_box_takes_it_back(gold, other, between) -> None:
    right = rf"\boxed{{{gold}}}"
    expected = float(gold == other)
    assert verify("math", rf"{right}{between}\boxed{{{other}}}", gold).score == expected
    assert verify("math", rf"\boxed{{{other}}}{between}{right}", gold).score == 1


@given(golds, prose)
@few
def test_no_box_no_score(gold, text) -> None:
    for reply in (text, text + gold, rf"\boxed{{{gold}", rf"\box{{{gold}}}", rf"{{{gold}}} \boxed{{}}"):
        verdict = verify("math", reply, gold)
        assert (verdict.score, verdict.status, verdict.parsed) == (0.0, "unparsable", None)


PIECES = [
    "\\boxed{", "}", "{", "\\frac", "1", "2", "x", "=", "<", "\\sqrt", "^", "_", "\\pm", ",", "(", ")", "[", "]",
    "\\infty", "\\cup", "i",
    "\\text{", "or", " ", "%", "\\%", "°", ".", "-", "½", "²", "\\\\", "\\", "\\overline{", "!",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), golds)
@few
def test_scores_are_0_or_1_and_only_for_what_was_parsed(pieces, gold) -> None:
    for reply in (pieces, rf"\boxed{{{pieces}}}"):
        verdict = verify("math", reply, gold)
        assert verdict.score in (0.0, 1.0)
        assert math.isfinite(verdict.score)
        assert (verdict.parsed is None) == (verdict.status == "unparsable")


KB_100 = [
    ("prose", "word " * 20_000, 0.0),
    ("prose before the answer", "word " * 20_000 + r"\boxed{5}", 1.0),
    ("prose after the answer", r"\boxed{5}" + " word" * 20_000, 1.0),
    ("a long box", r"\boxed{" + "5" * 100_000 + "}", 0.0),
    ("boxes that never close", r"\boxed{" * 14_000, 0.0),
    ("nested boxes", r"\boxed{" * 10_000 + "5" + "}" * 10_000, 1.0),
    ("boxes one after another", r"\boxed{5}" * 10_000, 1.0),
    ("white space after each command", (r"\boxed" + " " * 50) * 1_800, 0.0),
    ("backslashes", "\\" * 100_000, 0.0),
    ("open braces", "{" * 100_000, 0.0),
    ("close braces before the answer", "}" * 100_000 + r"\boxed{5}", 1.0),
    ("a tower", r"\boxed{9^{9^{9^{9}}}}", None),
    ("a large factorial", r"\boxed{(10^{10})!}", None),
    ("a sum that fills the box", r"\boxed{" + "1+" * 499 + "1}", None),
    ("a product of sums", r"\boxed{" + "(x+1)" * 190 + "}", None),
    ("nested fractions", r"\boxed{" + r"\frac{1}{1+" * 80 + "1" + "}" * 81, None),
    ("nested parentheses", r"\boxed{" + "(" * 490 + "5" + ")" * 490 + "}", None),
    ("digits", r"\boxed{" + "9" * 1_000 + "}", 0.0),
    ("phantoms that do not close", r"\boxed{" + r"\phantom" * 120 + "}", 0.0),
    ("nested styles", r"\boxed{" + r"\text{" * 150 + "5" + "}" * 151, None),
]


def test_long_and_costly_replies_end_in_time() -> None:
    """100 kB, and boxes up to the limit on their length; None: whatever it scores, if only it ends."""
    with VerifierPool(workers=2, timeout_s=3) as pool:
        pool.verify([(r"\boxed{5}", record("5"))])  # imports are not counted
        start = time.monotonic()
        verdicts = pool.verify([(reply, record("5")) for _, reply, _ in KB_100])
        assert time.monotonic() - start < 3 * len(KB_100)  # each ends by itself or is ended
    for (name, _, expected), verdict in zip(KB_100, verdicts, strict=True):
        assert isinstance(verdict, Verdict)
        assert 0 <= verdict.score <= 1
        if expected is not None:
            assert (verdict.score, verdict.status not in ("timeout", "error")) == (expected, True), (name, verdict)
        else:
            assert verdict.score == 0 or verdict.status == "ok", (name, verdict)


def test_reading_takes_time_linear_in_the_box() -> None:
    """No box of the allowed length costs what a regular expression that backtracks would."""
    from spark_vl.answers.latex import spelled
    from spark_vl.verifiers.expressions import UnreadableError
    from spark_vl.verifiers.math import _MAX_CHARS
    from spark_vl.verifiers.reading import read

    hostile = [
        *("0", " ", "1 2", "\\sin", "\\phantom{", "\\phantom{{}", "1.", "\\overline", "√(", "^ ", "2 1/", "1 a", "a "),
        *("\\text{a}", "\\mathrm{", "1:", "$", "$1$ ", "(", "(1)", "1,", "1,000", "{", "\\{x|", "[", "|", "x=", "x_{"),
        *("\\frac", "\\frac{1}", "\\begin{cases}", "\\\\", "and ", "\\text{and}", "a and ", "\\quad ", "°", "f(", "-"),
        *("\\pm", "x\\pm 1,", "A. ", "(A) ", "%", "\n", "1\n", "\\cup ", "(1,2)\\cup ", "for x ", "(x>0)", "5 cm "),
    ]
    for piece in hostile:
        for box in ((piece * _MAX_CHARS)[:_MAX_CHARS], "1" + (piece * _MAX_CHARS)[: _MAX_CHARS - 1]):
            start = time.perf_counter()
            with suppress(UnreadableError):
                read.__wrapped__(spelled.__wrapped__(box))
            assert time.perf_counter() - start < 0.5, piece
