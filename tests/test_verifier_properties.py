"""What holds for every kind of answer. A kind takes part by its row in `CASES`."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spark_vl.answers import last_boxed
from spark_vl.records import PromptRecord, Verdict
from spark_vl.verifiers import VERIFIERS, boxed_gold, verify
from tests.golds import check_gold

ELSEWHERE = {"math", "iou", "point", "detection"}
"""Kinds that have tests of their own for these properties."""

COLORS = ("red", "blue", "green", "gray")
YES_NO = ("Yes", "No")
words = st.text(alphabet="abcdefgh", min_size=2, max_size=8)
items = st.lists(st.integers(-50, 50).map(str) | words, min_size=1, max_size=5)
letters = st.lists(st.sampled_from("ABCD"), min_size=1, max_size=4, unique=True).map(", ".join)
ends = st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda pair: f"{pair[0]}, {sum(pair)}")
pieces = st.tuples(st.sampled_from("(["), ends | st.just(r"0, \frac{1}{2}"), st.sampled_from(")]")).map("".join)
rays = st.tuples(st.sampled_from("(["), st.integers(-9, 9), st.just(r", \infty)")).map(lambda p: f"{p[0]}{p[1]}{p[2]}")


@dataclass(frozen=True)
class Case:
    """How golds of a kind are drawn. Any two of them may be right answer and wrong answer, unless they are equal."""

    golds: st.SearchStrategy[str]
    choices: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


CASES: list[tuple[str, Case]] = [
    ("judgment", Case(st.sampled_from(YES_NO), YES_NO)),
    ("choice", Case(letters | st.sampled_from(COLORS), COLORS)),
    ("choice", Case(letters)),
    ("number", Case(st.decimals(-(10**6), 10**6, places=3).map(str))),
    ("number", Case(st.integers(-999, 999).map("{}%".format), settings={"percent": "fraction"})),
    ("number", Case(st.integers(1, 10**6).map("{:,} cm".format), settings={"relative": 0.05, "absolute": 0.1})),
    ("count", Case(st.integers(0, 10**6).map(str) | st.sampled_from(["none", "one", "twenty"]))),
    ("text", Case(words | st.lists(words, min_size=1, max_size=3).map(json.dumps))),
    ("text", Case(words, settings={"mode": "exact"})),
    ("text", Case(words | words.map(lambda word: word * 50), settings={"mode": "anls"})),
    ("list", Case(items.map(", ".join) | items.map(json.dumps))),
    ("set", Case(items.map(", ".join) | items.map(json.dumps) | items.map(lambda i: rf"\{{{', '.join(i)}\}}"))),
    ("set", Case(items.map(", ".join), settings={"partial": "f1"})),
    ("interval", Case(pieces | rays | st.tuples(pieces, rays).map(r" \cup ".join))),
    ("json_field", Case(words.map(lambda word: json.dumps({"answer": word, "more": {"x": [1]}})))),
    (
        "json_field",
        Case(
            st.integers(-99, 99).map(lambda number: json.dumps({"a": {"b": number}})),
            settings={"field": "a.b", "verifier": "number"},
        ),
    ),
]


def asked(kind: str, case: Case, gold: str) -> PromptRecord:
    options = tuple(case.settings.items())
    return PromptRecord("toy/7", "problem", (), (), gold, kind, "toy", case.choices, settings=options)


def verdict_on(kind: str, case: Case, completion: str, gold: str) -> Verdict:
    verdict = verify(kind, completion, gold, choices=case.choices, **case.settings)
    assert math.isfinite(verdict.score)
    assert 0 <= verdict.score <= 1
    assert (verdict.parsed is None) == (verdict.status == "unparsable")
    assert verdict.status == "ok" or verdict.score == 0
    (verdict.parsed or "").encode()
    return verdict


def test_every_kind_takes_part() -> None:
    assert {kind for kind, _ in CASES} | ELSEWHERE == VERIFIERS.keys()


drawn = st.sampled_from(CASES).flatmap(
    lambda row: st.tuples(st.just(row[0]), st.just(row[1]), row[1].golds, row[1].golds)
)
"""(kind, case, gold, another gold)"""
prose = st.text(alphabet=st.characters(exclude_characters="\\`"), max_size=40)
dresses = st.lists(
    st.sampled_from([r"\text{{{}}}", r"\mathrm{{ {} }}", "${}$", "  {} ", "\n{}\n", r"\text{{\textbf{{{}}}}}"]),
    max_size=3,
)


@given(drawn)
@settings(deadline=None, max_examples=150)
def test_every_gold_gets_full_marks(case) -> None:
    kind, case, gold, _ = case
    check_gold(asked(kind, case, gold))


@given(drawn, dresses, prose, prose)
@settings(deadline=None, max_examples=200)
def test_a_right_answer_is_right_however_it_is_dressed(case, dresses: list[str], before: str, after: str) -> None:
    kind, case, gold, _ = case
    answer = gold
    for dress in dresses:
        answer = dress.format(answer)
    assert verdict_on(kind, case, rf"{before}\boxed{{{answer}}}{after}", gold).score == 1


@given(drawn, prose)
@settings(deadline=None, max_examples=150)
def test_the_last_box_decides(case, between: str) -> None:
    kind, case, gold, other = case
    right, wrong = rf"\boxed{{{gold}}}", rf"\boxed{{{other}}}"
    alone = verdict_on(kind, case, wrong, gold)
    assert verdict_on(kind, case, f"{right} {between} {wrong}", gold) == alone
    assert verdict_on(kind, case, f"{wrong} {between} {right}", gold).score == 1
    assume(alone.score == 0)
    assert verdict_on(kind, case, f"{right} {between} {wrong}", gold).score == 0
    assert verdict_on(kind, case, f"{right} {between} {right[:-1]}", gold).score == 1  # the second is cut off


@given(drawn, prose)
@settings(deadline=None, max_examples=150)
def test_without_an_answer_there_is_no_score(case, reply: str) -> None:
    kind, case, gold, _ = case
    for completion in (reply, reply + gold, f"{reply} The answer is {gold}.", rf"\boxed{{}} {gold} \boxed{{{gold}"):
        if last_boxed(completion) is None:
            assert verdict_on(kind, case, completion, gold).status == "unparsable"


@given(
    drawn,
    st.lists(
        st.sampled_from(
            [
                r"\boxed{",
                "}",
                "{",
                r"\{",
                '"',
                ":",
                "[",
                "]",
                "(",
                ")",
                ",",
                ";",
                " and ",
                "answer",
                "A",
                "B",
                "red",
                "Yes",
                "5",
                "-",
                "/",
                "%",
                " cm",
                " ",
                r"\text{",
                "$",
                r"\infty",
                r"\cup",
                "```json",
                "```",
                "\ud800",
            ]
        ),
        max_size=14,
    ),
)
@settings(deadline=None, max_examples=200)
def test_any_reply_has_a_verdict(case, parts: list[str]) -> None:
    kind, case, gold, _ = case
    reply = "".join(parts)
    for completion in (reply, rf"\boxed{{{reply}}}", rf"\boxed{{{gold}{reply}}}"):
        verdict_on(kind, case, completion.replace("\ud800", r"\ud800"), gold)


@given(drawn, st.integers(2, 100))
@settings(deadline=None)
def test_many_answers_at_once_are_not_right(case, times: int) -> None:
    kind, case, gold, other = case
    assume(verdict_on(kind, case, rf"\boxed{{{other}}}", gold).score < 1)
    flood = " or ".join([gold, other] * times)
    assert verdict_on(kind, case, rf"\boxed{{{flood}}}", gold).score < 1


LONG = {  # kind → gold and settings, those that take longest
    "judgment": ("Yes", {}),
    "choice": ("A, C", {}),
    "number": ("1,234 cm", {"percent": "fraction"}),
    "count": ("5", {}),
    "text": ("red " * 900 + "car", {"mode": "anls"}),
    "list": (", ".join(map(str, range(200))), {}),
    "set": (", ".join(map(str, range(200))), {"partial": "f1"}),
    "interval": (r" \cup ".join(f"[{2 * i}, {2 * i + 1}]" for i in range(200)), {}),
    "json_field": ('{"answer": ["a", 5]}', {"verifier": "set"}),
}


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES}))
def test_100_kB_take_less_than_a_second(kind: str) -> None:
    gold, options = LONG[kind]
    case = Case(st.just(gold), YES_NO if kind == "judgment" else COLORS, options)
    right = boxed_gold(asked(kind, case, gold))
    for part in [
        *("a", "5", " ", "A, ", "A and ", "red, ", "red ", "1,", "1;", "and ", "(", "[", "{", r"\{", "(1, 2) ∪ "),
        *(r"\text{", r"\boxed{", r"\cup", "```json", '{"answer":', '{"answer": 1}', '"a": 1, ', "\n", "\\", "∞", "ß"),
    ]:
        text = part * (100_000 // len(part))
        for completion in (rf"\boxed{{{text}}}", rf"\boxed{{{gold}{text}}}", text + right + text):
            start = time.process_time()
            verdict_on(kind, case, completion, gold)
            assert time.process_time() - start < 1, (part, len(completion))
