from __future__ import annotations

import subprocess
import sys
import types

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spark_vl.answers import last_boxed
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers import VERIFIERS, boxed_gold, get_verifier, verify
from spark_vl.verifiers.base import run_verifier
from tests.golds import check_gold

YES_NO = ("Yes", "No")
AB = ("A", "B")
LETTERS = ("B", "A", "D", "C")
LENGTHS = ("4 cm", "5 cm", "6 cm")
RIGHT, WRONG, UNPARSABLE = (1.0, "ok"), (0.0, "ok"), (0.0, "unparsable")


def record(kind: str, gold: str, choices: tuple[str, ...] = ()) -> PromptRecord:
    return PromptRecord("toy/7", "problem", (), (), gold, kind, "toy", choices)


MATH = [  # gold, reply, expected, rule
    ("5", r"\boxed{5}", RIGHT, "the same"),
    ("5", r"\boxed{6}", WRONG, "another number"),
    ("5", "5", UNPARSABLE, "no box"),
    ("5", "The number 5 appears; I don't know.", UNPARSABLE, "no box"),
    ("5", r"\boxed{the number 5 appears; I don't know}", WRONG, "numbers are not picked out of prose"),
    ("5", r"\boxed{3}\boxed{5}", RIGHT, "the last box only"),
    ("5", r"\boxed{5}\boxed{3}", WRONG, "the last box only"),
    ("3, 5", r"\boxed{3}\boxed{5}", WRONG, "boxes are not merged into a set"),
    ("5", r"\boxed{3} so \boxed{5", WRONG, "a box that is cut off is no answer"),
    ("5", r"\boxed{5}, as asked in \boxed{}", RIGHT, "a blank box is no answer"),
    (r"\boxed{5}", r"\boxed{5}", RIGHT, "a gold may come in a box"),
    ("5", r"\boxed{5.}", RIGHT, "trailing period"),
    ("5", r"\boxed{**5**}", RIGHT, "Markdown"),
    ("5", r"\boxed{$5$}", RIGHT, "dollar signs"),
    ("5", r"\boxed{\text{5}}", RIGHT, "text command"),
    ("5", r"\boxed{x = 5}", RIGHT, "the value of a variable"),
    ("x = 5", r"\boxed{5}", RIGHT, "the value of a variable"),
    ("5", r"\boxed{2 + 3}", RIGHT, "arithmetic"),
    ("5", r"\boxed{\sqrt{25}}", RIGHT, "arithmetic"),
    ("5", r"\boxed{5 6}", UNPARSABLE, "two numbers are not their sum or product"),
    ("11", r"\boxed{5 6}", UNPARSABLE, "two numbers are not their sum or product"),
    ("5", r"\boxed{5 \text{ or } 6}", WRONG, "a hedge"),
    ("5", r"\boxed{5, 6}", WRONG, "a hedge"),
    ("5", r"\boxed{\pm 5}", WRONG, "a hedge"),
    ("5", r"\boxed{-5}", WRONG, "sign"),
    ("-5", r"\boxed{−5}", RIGHT, "Unicode minus"),
    ("5", r"\boxed{5?}", UNPARSABLE, "not mathematics"),
    ("5", r"\boxed{5x}", WRONG, "another expression"),
    ("30", r"\boxed{30°}", RIGHT, "degree sign"),
    ("30", r"\boxed{30^\circ}", RIGHT, "degree command"),
    ("30°", r"\boxed{30}", RIGHT, "degree sign in the gold"),
    (r"30^{\circ}", r"\boxed{30°}", RIGHT, "degrees both ways"),
    ("30°", r"\boxed{60°}", WRONG, "other degrees"),
    ("10%", r"\boxed{10\%}", RIGHT, "percent"),
    ("10%", r"\boxed{10}", RIGHT, "percent sign left out"),
    ("10", r"\boxed{10%}", RIGHT, "percent sign added, not a LaTeX comment"),
    ("0.1", r"\boxed{10%}", RIGHT, "percent as a fraction"),
    ("0.1", r"\boxed{10}", WRONG, "not a percent"),
    (r"\frac{1}{2}", r"\boxed{0.5}", RIGHT, "decimal"),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}", RIGHT, "short fraction"),
    ("0.5", r"\boxed{\frac 1 2}", RIGHT, "fraction without braces"),
    ("0.5", r"\boxed{1/2}", RIGHT, "slash"),
    ("1/3", r"\boxed{0.333}", WRONG, "rounded too far"),
    ("2.5", r"\boxed{2 1/2}", RIGHT, "mixed number"),
    ("2.5", r"\boxed{2\frac{1}{2}}", RIGHT, "mixed number"),
    ("1.5", r"\boxed{2 1/2}", WRONG, "mixed number"),
    ("20000", r"\boxed{20,000}", RIGHT, "thousands separator"),
    ("20000", r"\boxed{20 000}", RIGHT, "thousands separator"),
    ("20000", r"\boxed{20\,000}", RIGHT, "thousands separator"),
    ("0", r"\boxed{20 000}", WRONG, "not 20 times 0"),
    ("100000", r"\boxed{1e5}", RIGHT, "scientific notation"),
    ("100000", r"\boxed{10^5}", RIGHT, "powers"),
    ("1/8", r"\boxed{2^-3}", RIGHT, "negative power without braces"),
    (r"\sqrt{2}", r"\boxed{√2}", RIGHT, "Unicode root"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", RIGHT, "equivalent roots"),
    (r"\pi", r"\boxed{π}", RIGHT, "Unicode letter"),
    (r"\pi", r"\boxed{3.14}", WRONG, "not exact"),
    (r"-\infty", r"\boxed{-∞}", RIGHT, "Unicode infinity"),
    ("x^2 - 1", r"\boxed{(x-1)(x+1)}", RIGHT, "factored"),
    ("x^2", r"\boxed{x²}", RIGHT, "Unicode power"),
    ("x^2", r"\boxed{x^3}", WRONG, "another expression"),
    ("y = 2x + 3", r"\boxed{2x + 3 = y}", RIGHT, "an equation turned around"),
    ("y = 2x + 3", r"\boxed{y = 2x + 4}", WRONG, "another equation"),
    ("1, 2", r"\boxed{2, 1}", RIGHT, "lists compare as sets"),
    ("1, 2", r"\boxed{\{1, 2\}}", RIGHT, "set braces"),
    ("1, 2", r"\boxed{1}", WRONG, "half of a list"),
    ("(1, 2)", r"\boxed{(1,2)}", RIGHT, "a point"),
    ("(1, 2)", r"\boxed{(2, 1)}", WRONG, "another point"),
    ("[1, 2]", r"\boxed{(1, 2)}", WRONG, "closed and open interval"),
    (r"(3, \infty)", r"\boxed{\left(3, \infty\right)}", RIGHT, "sized parentheses"),
    ("3:4", r"\boxed{3/4}", RIGHT, "ratio"),
    (r"5\text{ cm}", r"\boxed{5 cm}", RIGHT, "unit"),
    (r"5\text{ cm}", r"\boxed{5}", RIGHT, "unit left out"),
    ("25", r"\boxed{25 \text{ cm}^2}", RIGHT, "unit added"),
    (r"\text{No solution}", r"\boxed{no solution}", RIGHT, "words"),
    (r"x \neq 3", r"\boxed{x > 3}", WRONG, "another relation"),
    ("5", r"\boxed{\frac{0}{0}}", WRONG, "not a number"),
    ("5", r"\boxed{" + "1+" * 2000 + "1}", UNPARSABLE, "too long to be an answer"),
]

CHOICE = [
    ("B", (), r"\boxed{B}", RIGHT, "letter"),
    ("B", (), r"I think \boxed{\text{(b)}}.", RIGHT, "letter in parentheses"),
    ("B", (), r"\boxed{C}", WRONG, "another letter"),
    ("B", (), "B", UNPARSABLE, "no box"),
    ("B", (), r"\boxed{A} or rather \boxed{B}", RIGHT, "the last box"),
    ("B", (), r"\boxed{B} or rather \boxed{A}", WRONG, "the last box"),
    ("B", (), r"\boxed{A, B, C, D}", UNPARSABLE, "all letters"),
    ("B", LENGTHS, r"\boxed{B. 5 cm}", RIGHT, "letter and text"),
    ("B", LENGTHS, r"\boxed{A. 5 cm}", UNPARSABLE, "letter and text disagree"),
    ("B", LENGTHS, r"\boxed{5 \text{ cm}}", RIGHT, "text"),
    ("B", LENGTHS, r"\boxed{4 cm}", WRONG, "another text"),
    ("B", LENGTHS, r"\boxed{7 cm}", UNPARSABLE, "no option's text"),
    ("B", LENGTHS, r"\boxed{D}", UNPARSABLE, "no such option"),
    ("5 cm", LENGTHS, r"\boxed{B}", RIGHT, "the gold is a text"),
    (r"\boxed{B}", LENGTHS, r"\boxed{5 cm}", RIGHT, "the gold comes in a box"),
    ("B", LETTERS, r"\boxed{B. A}", RIGHT, "letter and text, where the options are letters"),
    ("B", LETTERS, r"\boxed{A. B}", WRONG, "another letter, with its text"),
    ("B", LETTERS, r"\boxed{B}", UNPARSABLE, "a letter that is another option's text"),
    ("B", LETTERS, r"\boxed{B. B}", UNPARSABLE, "letter and text disagree"),
    ("A, C", LETTERS, r"\boxed{A. B, C. D}", RIGHT, "letters and texts, where the options are letters"),
    ("B. 5 cm", (), r"\boxed{5 cm}", RIGHT, "the text behind the letter of the gold"),
    ("B. 5 cm", (), r"\boxed{B}", RIGHT, "the letter of a gold with a text"),
    ("B. 5 cm", (), r"\boxed{C. 5 cm}", WRONG, "another letter"),
    ("B. 5 cm", (), r"\boxed{6 cm}", UNPARSABLE, "another text"),
    ("D", (), r"\boxed{D. Both A and B}", RIGHT, "letters in the text of an option"),
    ("A", (), r"\boxed{D. Both A and B}", WRONG, "letters in the text of an option"),
]

NUMBER = [
    ("5", r"\boxed{5}", RIGHT, "the same"),
    ("5", r"\boxed{5.0}", RIGHT, "decimals"),
    ("5", "5", UNPARSABLE, "no box"),
    ("5", r"\boxed{3}\boxed{5}", RIGHT, "the last box"),
    ("5", r"\boxed{5}\boxed{3}", WRONG, "the last box"),
    ("5", r"\boxed{5 or 6}", UNPARSABLE, "a hedge"),
    ("5", r"\boxed{-5}", WRONG, "sign"),
    ("1,234.5", r"\boxed{\$1234.50}", RIGHT, "separators and currency"),
    ("50%", r"\boxed{50}", RIGHT, "percent sign"),
    ("50%", r"\boxed{0.5}", WRONG, "50% is 50 here"),
    ("0.5", r"\boxed{\frac{1}{2}}", RIGHT, "fraction"),
    ("1500", r"\boxed{1.5 \times 10^3}", RIGHT, "scientific"),
    ("30", r"\boxed{30^\circ}", RIGHT, "degrees"),
    (r"\boxed{5}", r"\boxed{5}", RIGHT, "the gold comes in a box"),
    ("1000000", r"\boxed{1000000.5}", RIGHT, "within a millionth"),
    ("1000000", r"\boxed{1000002}", WRONG, "not within a millionth"),
    ("0", r"\boxed{0.0000001}", WRONG, "nothing else is 0"),
    ("0", r"\boxed{-0.0}", RIGHT, "nothing else is 0"),
    ("5", r"\boxed{five}", RIGHT, "a word"),
    ("50", r"\boxed{fifty}", UNPARSABLE, "words above twenty"),
]

JUDGMENT = [
    ("Yes", YES_NO, r"\boxed{Yes}", RIGHT, "the label"),
    ("Yes", YES_NO, r"\boxed{No}", WRONG, "the other label"),
    ("No", YES_NO, r"\boxed{\text{no}.}", RIGHT, "case, style, period"),
    ("Yes", YES_NO, "Yes", UNPARSABLE, "no box"),
    ("Yes", YES_NO, r"\box{Yes}", UNPARSABLE, "not a box"),
    ("Yes", YES_NO, r"\boxed{No}? No: \boxed{Yes}", RIGHT, "the last box"),
    ("Yes", YES_NO, r"\boxed{Yes and No}", UNPARSABLE, "a hedge"),
    ("Yes", YES_NO, r"\boxed{Yesterday}", UNPARSABLE, "whole labels"),
    ("Yes", YES_NO, r"\boxed{True}", UNPARSABLE, "not a label of this record"),
    ("A", AB, r"\boxed{(A)}", RIGHT, "parentheses"),
    ("B", AB, r"\boxed{A}", WRONG, "the other label"),
    ("A", AB, r"\boxed{A or B}", UNPARSABLE, "a hedge"),
]

TABLE = (
    [("math", gold, (), *rest) for gold, *rest in MATH]
    + [("choice", *row) for row in CHOICE]
    + [("number", gold, (), *rest) for gold, *rest in NUMBER]
    + [("judgment", *row) for row in JUDGMENT]
)


@pytest.mark.parametrize(
    ("kind", "gold", "choices", "reply", "expected", "rule"),
    TABLE,
    ids=[f"{r[0]}-{i}-{r[-1]}" for i, r in enumerate(TABLE)],
)
def test_verdicts(kind, gold, choices, reply, expected, rule) -> None:
    verdict = verify(kind, reply, gold, choices=choices)
    assert (verdict.score, verdict.status) == expected, rule
    assert (verdict.parsed is None) == (verdict.status == "unparsable")
    assert bool(verdict.detail) == (verdict.status != "ok")


@pytest.mark.parametrize(("kind", "gold", "choices"), sorted({row[:3] for row in TABLE}))
def test_every_gold_gets_full_marks(kind: str, gold: str, choices: tuple[str, ...]) -> None:
    check_gold(record(kind, gold, choices))


@pytest.mark.parametrize(
    ("kind", "gold", "choices"),
    [
        ("math", "", ()),
        ("math", "3 4", ()),
        ("math", "5?", ()),
        ("math", r"\boxed{}", ()),
        ("choice", "D", LENGTHS),
        ("choice", "7 cm", LENGTHS),
        ("choice", "a", ("b", "a")),
        ("choice", "x", ("x", "X")),
        ("number", "fifty", ()),
        ("number", "5 or 6", ()),
        ("number", "", ()),
        ("judgment", "Maybe", YES_NO),
        ("judgment", "yes", YES_NO),
    ],
)
def test_a_gold_that_means_nothing_is_a_bad_record(kind: str, gold: str, choices: tuple[str, ...]) -> None:
    for check in (check_gold, lambda r: get_verifier(kind)("no box", r)):
        with pytest.raises(BadRecordError, match=r"^toy/7: .*gold"):
            check(record(kind, gold, choices))
    assert run_verifier("no box", record(kind, gold, choices)).status == "error"


def test_a_gold_that_breaks_its_own_box_gets_no_full_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("strict_text")
    module.same = lambda completion, r: Verdict(float(last_boxed(completion) == r.gold), last_boxed(completion))
    monkeypatch.setitem(sys.modules, "strict_text", module)
    check_gold(record("strict_text:same", "a {b}"))
    with pytest.raises(BadRecordError, match=r"toy/7: the strict_text:same verifier gives its own gold 'a \{b' 0 of 1"):
        check_gold(record("strict_text:same", "a {b"))


# ── properties ──

golds = {
    "number": st.tuples(st.decimals(-(10**6), 10**6, places=3).map(str), st.just(())),
    "choice": st.tuples(st.sampled_from("ABC"), st.just(LENGTHS)),
    "judgment": st.tuples(st.sampled_from(YES_NO), st.just(YES_NO)),
    "math": st.tuples(
        st.integers(-99, 99).map(str) | st.sampled_from([r"\sqrt{7}", r"\frac{2}{7}", "x+1"]), st.just(())
    ),
}
kind_and_golds = st.sampled_from(sorted(golds)).flatmap(
    lambda kind: st.tuples(st.just(kind), golds[kind], golds[kind]).map(lambda t: (t[0], *t[1], t[2][0]))
)
prose = st.text(alphabet=st.characters(exclude_characters="\\"), max_size=40)
fragments = st.lists(
    st.sampled_from(
        ["\\boxed{", "}", "{", "Yes", "No", "A", "B", "5", "-", "/", "5 cm", " ", "\\text{", "%", ",", "."]
    ),
    max_size=12,
).map("".join)


@given(kind_and_golds, fragments)
@settings(deadline=None, max_examples=200)
def test_scores_are_between_0_and_1_and_parsing_is_all_or_nothing(case, reply: str) -> None:
    kind, gold, choices, _ = case
    verdict = verify(kind, reply, gold, choices=choices)
    assert 0 <= verdict.score <= 1
    assert (verdict.status == "unparsable") == (verdict.parsed is None)
    if last_boxed(reply) is None:
        assert (verdict.score, verdict.status) == UNPARSABLE


@given(kind_and_golds, prose)
@settings(deadline=None)
def test_no_box_no_score(case, reply: str) -> None:
    kind, gold, choices, _ = case
    for completion in (reply, reply + gold, f"{reply} The answer is {gold}."):
        assert verify(kind, completion, gold, choices=choices).status == "unparsable"


@given(kind_and_golds, prose, prose)
@settings(deadline=None)
def test_the_box_at_the_end_decides(case, before: str, between: str) -> None:
    kind, gold, choices, other = case
    right = rf"{before} \boxed{{{gold}}}"
    assert verify(kind, right, gold, choices=choices).score == 1
    assume(verify(kind, rf"\boxed{{{other}}}", gold, choices=choices).score == 0)
    assert verify(kind, rf"{right} {between} \boxed{{{other}}}", gold, choices=choices).score == 0
    assert verify(kind, rf"\boxed{{{other}}} {between} {right}", gold, choices=choices).score == 1


# ── boxes ──


def test_only_the_wording_that_is_asked_for_counts() -> None:
    assert verify("judgment", r"\box{Yes}", "Yes", choices=YES_NO).status == "unparsable"
    assert verify("judgment", boxed_gold(record("judgment", "Yes", YES_NO)), "Yes", choices=YES_NO).score == 1


@pytest.mark.parametrize(
    ("kind", "gold", "choices", "wrong"),
    [
        ("math", r"\frac{1}{2}", (), "3"),
        ("number", "5", (), "4"),
        ("choice", "B", LENGTHS, "A"),
        ("judgment", "No", YES_NO, "Yes"),
    ],
)
def test_judged_text_is_the_last_box(kind: str, gold: str, choices: tuple[str, ...], wrong: str) -> None:
    """What `last_boxed` cuts out for a judge is what was scored: alone in a box it gets the same verdict."""
    for first, last in ((gold, wrong), (wrong, gold)):
        reply = rf"First \boxed{{{first}}}, but no: \boxed{{{last}}}. Not \boxed{{}} nor \boxed{{{first}"
        verdict = verify(kind, reply, gold, choices=choices)
        assert last_boxed(reply) == last
        assert verdict.parsed == last
        assert verdict.score == float(last == gold)
        assert verify(kind, boxed_gold(record(kind, last_boxed(reply), choices)), gold, choices=choices) == verdict


# ── the registry ──


def test_registered_names() -> None:
    assert {"math", "choice", "number", "judgment"} <= VERIFIERS.keys()
    for name in VERIFIERS:
        assert callable(get_verifier(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "unknown verifier 'maths'; allowed: choice, .*math, .*'module:function', or './file.py:function'"),
        ("", "unknown verifier ''"),
        (":f", "unknown verifier ':f'"),
        ("m:", "unknown verifier 'm:'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("spark_vl.no_such_module:f", r"no module 'spark_vl\.no_such_module'"),
        ("spark_vl.answers:no_such_function", "module 'spark_vl.answers' has no 'no_such_function'"),
        ("spark_vl.verifiers.number:TOLERANCE", "not callable"),
        ("/nowhere/check.py:f", "there is no file '/nowhere/check.py'"),
        (f"{__file__}:f", "file '.*test_verifiers.py' has no 'f'"),
    ],
)
def test_unknown_verifiers_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_verifier(name)


def test_what_a_users_module_raises_on_import_comes_through(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import there_is_no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        get_verifier("needs_more:f")


def test_a_users_verifier() -> None:
    assert verify("tests.misbehaving:half", "anything", "gold") == Verdict(0.5, "anything")
    seen = [verify("tests.misbehaving:Counting", "anything", "gold").parsed for _ in range(3)]
    assert seen == ["1", "2", "3"], "a class is made once"
    for bad in ("not_a_verdict", "too_good"):
        assert run_verifier("x", record(f"tests.misbehaving:{bad}", "gold")).status == "error"


def test_judgments_import_no_heavy_library() -> None:
    code = (
        "import sys; from spark_vl.verifiers import pool, verify;"
        r"assert verify('judgment', r'\boxed{A}', 'A', choices=('A', 'B')).score == 1;"
        "print(sorted({'torch', 'transformers', 'sympy', 'math_verify', 'PIL', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
