"""A judge on reward benchmarks: figures of scripted judges against numbers made by hand, and a trained one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import permutations
from statistics import fmean

import pytest
from PIL import Image

from spark_vl import GenerativeReward
from spark_vl.data.preferences import Preference
from spark_vl.demo import digits
from spark_vl.evaluation.preferences import (
    calibration,
    figures,
    judge_preferences,
    plot_reliability,
    reliability,
    rescored,
)
from spark_vl.records import BadRecordError, Content, ImageRef, plain_text
from tests.test_benchmarks import cache, copy, preferences  # noqa: F401  # fixtures
from tests.test_reward import Refusing, Scripted, against, in_favor, shown, trained, votes  # noqa: F401

FIXTURES = {"vl_rewardbench": 9, "multimodal_rewardbench": 9, "mmrb2": 8}
"""Benchmarks of two answers, with the rows of their fixtures."""
FIRST_IS_BETTER = {"vl_rewardbench": 5 / 9, "multimodal_rewardbench": 4 / 9, "mmrb2": 4 / 8}
"""Share of rows that prefer the first answer."""


def item(name: str, *answers: str, question: Content = ("Q",), preferred: int = 0, category: str = "c") -> Preference:
    return Preference(name, question, tuple((answer,) for answer in answers), preferred, category, "mine")


def pair_shown(items) -> Callable[..., tuple[Preference, int, int]]:
    """A function: the prompt of a comparison → its item, and the answers that it shows first and second."""
    known = {}
    for each in items:
        texts = [plain_text(answer) for answer in each.answers]
        for i, j in permutations(range(len(texts)), 2):
            known[f'{plain_text(each.question)} A: "{texts[i]}" B: "{texts[j]}" Which?'] = each, i, j
    return lambda record: known[shown(record).partition(" \\boxed")[0]]


def judged(processor, items, pick, ask=("pairwise",), **settings):
    """The lines of a judge that picks `pick(item, first, second)`: an answer, or None."""
    find = pair_shown(items)

    def reply(record, i):
        each, first, second = find(record)
        picked = pick(each, first, second)
        return "?" if picked is None else rf"\boxed{{{'AB'[(first, second).index(picked)]}}}"

    lines = judge_preferences(votes(processor, reply, **settings), items, ask)
    assert json.loads(json.dumps(lines)) == lines
    return lines


def values(recipe, lines):
    found = {name: figure for name, figure in figures(recipe, lines).items() if "category" not in name}
    for name, figure in found.items():
        assert figure["low"] <= figure["value"] <= figure["high"]
        of_replies = name.endswith(("unparsable", "truncated"))
        assert figure["n"] == sum("error" not in line for line in lines) if of_replies else len(lines)
    return {name.removeprefix("reward_"): figure["value"] for name, figure in found.items()}


def rows(recipe):
    opened = preferences(recipe)
    return [opened[i] for i in range(len(opened))]


# ── judges on the fixtures ──

NOTHING_WRONG = {"unparsable": 0.0, "truncated": 0.0}


@pytest.mark.parametrize("name", FIXTURES)
def test_judges_of_two_answers(name, copy, processor):  # noqa: F811
    items = rows(copy(name))
    first = FIRST_IS_BETTER[name]
    assert (len(items), fmean(each.preferred == 0 for each in items)) == (FIXTURES[name], first)

    always_a = values(name, judged(processor, items, lambda each, i, j: i))
    official = {  # agree and reject are equally many: no majority; the order of the dataset; both orders
        "vl_rewardbench": {},
        "multimodal_rewardbench": {"official_overall": first},
        "mmrb2": {"official_overall": 0.5, "official_dropped": 0.0},
    }[name]
    coin = {"accuracy": 0.5, "macro": 0.5, "consistency": 0.0, "all_orders": 0.0}
    assert always_a == pytest.approx(coin | official | {"first_place": 1.0} | NOTHING_WRONG)

    lines = judged(processor, items, lambda each, i, j: each.preferred)
    best = values(name, lines)
    official = {key: 0.0 if key == "official_dropped" else 1.0 for key in best if "official" in key}
    assert len(official) == {"vl_rewardbench": 3, "multimodal_rewardbench": 1, "mmrb2": 2}[name]
    expected = {"accuracy": 1.0, "macro": 1.0, "consistency": 1.0, "all_orders": 1.0, "first_place": 0.5}
    assert best == pytest.approx(expected | official | NOTHING_WRONG)
    assert [rescored(line) for line in lines] == lines
    categories = {f"reward_category={each.category}" for each in items}
    assert {key for key in figures(name, lines) if "category" in key} == categories

    unread = values(name, judged(processor, items, lambda each, i, j: None))
    official = {"official_overall": 0.5} if name == "multimodal_rewardbench" else {}
    zero = dict.fromkeys(("accuracy", "macro", "consistency", "all_orders"), 0.0)
    assert unread == pytest.approx(zero | official | NOTHING_WRONG | {"unparsable": 1.0})

    # Right as the dataset has the answers, wrong the other way round: each time at the same place.
    one = values(name, judged(processor, items, lambda each, i, j: each.preferred if i == 0 else 1 - each.preferred))
    official = {
        "vl_rewardbench": {},
        "multimodal_rewardbench": {"official_overall": 1.0},
        "mmrb2": {"official_overall": 0.5, "official_dropped": 0.0},
    }[name]
    assert one == pytest.approx(coin | official | {"first_place": first} | NOTHING_WRONG)


def test_judges_of_four_answers(copy, processor):  # noqa: F811
    items = rows(copy("rewardbench2"))
    lines = judged(processor, items, lambda each, i, j: i)
    assert [len(line["replies"]) for line in lines] == [12] * 9
    tied = {"accuracy": 0.0, "macro": 0.0, "consistency": 0.0, "first_place": 1.0, "official_overall": 0.25}
    assert values("rewardbench2", lines) == pytest.approx(tied | NOTHING_WRONG)
    best = {"accuracy": 1.0, "macro": 1.0, "consistency": 1.0, "first_place": 0.5, "official_overall": 1.0}
    lines = judged(processor, items, lambda each, i, j: min(i, j))  # the best stands first in each row
    assert values("rewardbench2", lines) == pytest.approx(best | NOTHING_WRONG)
    lines = judged(processor, items, lambda each, i, j: None)
    zero = {"accuracy": 0.0, "macro": 0.0, "consistency": 0.0, "official_overall": 0.25}
    assert values("rewardbench2", lines) == pytest.approx(zero | NOTHING_WRONG | {"unparsable": 1.0})


def test_the_best_of_four_by_hand(processor):
    """Wins of both orders: those of 0 and 1 are counted in the comments, of six."""
    items = [item(name, "p", "q", "r", "s", question=(name,), preferred=0) for name in "abcd"]

    def pick(each, i, j):
        pair = {i, j}
        match each.id:
            case "a":  # 0 beats all but 1, against which the place decides: 5; 1 beats 2 and 3, too: 5. A tie.
                return i if pair == {0, 1} else min(pair)
            case "b":  # the pair of the leaders cannot be read in one order; in the other one it is 0's: 5 to 4
                return (None if i == 1 else 0) if pair == {0, 1} else min(pair)
            case "c":  # unread against 3 in both orders, which costs 0 two wins: 4, and 1 has 4. A tie.
                return None if pair == {0, 3} else min(pair)
            case "d":  # 1 beats all
                return 1 if 1 in pair else min(pair)

    lines = judged(processor, items, pick)
    found = {line["id"]: figures("rewardbench2", [line])["reward_accuracy"]["value"] for line in lines}
    assert found == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
    all_of_them = values("rewardbench2", lines)
    assert all_of_them["official_overall"] == (0.25 + 1 + 0.25 + 0) / 4
    assert all_of_them["consistency"] == (24 - 3) / 24
    assert all_of_them["unparsable"] == 3 / 48


def test_votes_are_counted_in_each_order_and_official_rules_see_them_all(processor):
    """Three votes in each order. Item a: 2 of 3 for the best, then 1 of 2 that can be read, a tie. Item b: 3, and 3."""
    said = {
        ("a", 0): (in_favor, in_favor, against),
        ("a", 1): (in_favor, against, lambda record: "?"),
        ("b", 0): (in_favor,) * 3,
        ("b", 1): (in_favor,) * 3,
    }
    items = [item("a", "p", "q", question=("a",)), item("b", "p", "q", question=("b",))]
    find = pair_shown(items)

    def reply(record, k):
        each, first, _ = find(record)
        return said[each.id, first][k](record)

    lines = judge_preferences(votes(processor, reply, samples=3), items, ["pairwise"])
    found = values("vl_rewardbench", lines)
    assert found["accuracy"] == (0.5 + 1) / 2
    assert found["unparsable"] == pytest.approx(1 / 12)
    # a has 3 of 6 for the best, no more than half; b agrees.
    assert (found["official_overall"], found["official_dropped"]) == (1.0, 0.5)


# ── what cannot be asked ──


def test_an_item_that_cannot_be_asked_is_wrong(processor):
    broken = ImageRef(data=b"\x89PNG\r\n\x1a\n not a picture")
    items = [
        item("fine", "p", "q", question=("fine",)),
        item("long", "p", "q", question=("Q " * 5000,)),
        item("broken", "p", "q", question=(broken, "see")),
        item("four", "p", "q", "r", "Q " * 5000, question=("four",)),
    ]
    lines = judged(processor, items, lambda each, i, j: each.preferred)
    assert ["error" in line for line in lines] == [False, True, True, True]
    assert "4096 are allowed" in lines[1]["error"]
    assert all("replies" not in line for line in lines[1:])
    found = {name: figure["value"] for name, figure in figures("mmrb2", lines).items()}
    assert (found["reward_accuracy"], found["reward_consistency"]) == (1 / 4, 1 / 9)  # of 1 + 1 + 1 + 6 pairs
    assert found["reward_unparsable"] == 0.0
    assert found["reward_official_overall"] == 1.0  # of those that can be read
    assert [rescored(line) for line in lines] == lines


def test_what_the_engine_refuses_is_an_error_of_its_item(processor):
    judge = votes(processor, None)
    judge.engine = Refusing(processor, lambda record, i: in_favor(record))
    items = [item("a", "p", "q"), item("b", "bad", "q"), item("c", "p", "q")]
    lines = judge_preferences(judge, items, ["pointwise", "pairwise"])
    assert [line.get("error") for line in lines] == [None, None, *["the server refuses it"] * 2, None, None]
    assert [len(line.get("replies", ())) for line in lines] == [2, 2, 0, 0, 2, 2]
    with pytest.raises(BadRecordError, match="the server refuses it"):
        judge.pointwise("Q", None, "bad")


# ── pointwise ──


@pytest.fixture
def one_by_one(processor):
    """Lines of a judge that calls each answer correct with its own share of four votes."""
    items = [
        item("a", "p3", "p1"),  # right, 0.75 and 0.25
        item("b", "p1", "p3"),  # wrong
        item("c", "p2", "p2"),  # tied
        item("d", "p4", "??"),  # one cannot be read
        item("e", "Q " * 5000, "p1"),
    ]

    def reply(record, k):
        answer = shown(record).split('"')[1]
        return "?" if answer == "??" else (in_favor if k < int(answer[1]) else against)(record)

    return judge_preferences(votes(processor, reply, samples=4), items, ["pointwise"])


def test_answers_one_by_one_by_hand(one_by_one):
    assert values("mine", one_by_one) == pytest.approx(
        {
            "pointwise": 1 / 5,
            "pointwise_tied": 1 / 5,
            "brier": (0.25**2 * 2 + 0.75**2 * 2 + 0.5**2 * 2 + (0 + 1) + (1 + 1)) / 10,
            "pointwise_unparsable": 4 / 32,
            "pointwise_truncated": 0.0,
        }
    )
    found = calibration(one_by_one)
    assert [(each.low, each.n, each.predicted, each.right) for each in found.bins] == [
        (0.2, 2, 0.25, 0.5),
        (0.5, 2, 0.5, 0.5),
        (0.7, 2, 0.75, 0.5),
        (0.9, 1, 1.0, 1.0),
    ]
    assert found.ece == pytest.approx((2 * 0.25 + 2 * 0.25) / 7)


def test_a_template_with_options_is_one_prediction(processor):
    """Asked with either option at A, a judge that always says A is undecided."""
    judge = votes(processor, lambda record, i: r"\boxed{A}", pointwise_template="demo/ab_1")
    lines = judge_preferences(judge, [item("a", "p", "q")], ["pointwise"])
    assert [reply["shown"] for reply in lines[0]["replies"]] == [[0], [0], [1], [1]]
    assert values("mine", lines)["brier"] == 0.25
    assert values("mine", lines)["pointwise_tied"] == 1.0


def test_both_ways_of_asking_stand_side_by_side(processor):
    lines = judge_preferences(
        votes(processor, lambda record, i: in_favor(record)), [item("a", "p", "q")], ["pairwise", "pointwise"]
    )
    found = figures("mmrb2", lines)
    assert (found["reward_accuracy"]["value"], found["reward_pointwise"]["value"]) == (1.0, 0.0)
    assert {figure["n"] for figure in found.values()} == {1}
    assert figures("mmrb2", []) == {}


def test_a_diagram_is_drawn(one_by_one, tmp_path):
    for lines, file in ((one_by_one, "a.png"), ([], "b.png")):
        plot_reliability(lines, tmp_path / file)
        with Image.open(tmp_path / file) as drawn:
            assert drawn.size == (675, 675)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


# ── calibration ──


def test_reliability_by_hand():
    found = reliability([(0.0, False), (0.05, True), (0.1, False), (1.0, True), (0.95, False)])
    assert [(each.low, each.high, each.n) for each in found.bins] == [(0.0, 0.1, 2), (0.1, 0.2, 1), (0.9, 1.0, 2)]
    assert [each.predicted for each in found.bins] == pytest.approx([0.025, 0.1, 0.975])
    assert [each.right for each in found.bins] == [0.5, 0.0, 0.5]
    assert found.ece == pytest.approx((2 * 0.475 + 0.1 + 2 * 0.475) / 5)
    assert (reliability([]).bins, reliability([]).ece) == ((), None)


def test_a_calibrated_judge_has_no_error_and_an_overconfident_one_has_its_own():
    rng = random.Random(0)
    truth = [(p, rng.random() < p) for p in (rng.random() for _ in range(40_000))]
    found = reliability(truth)
    assert found.ece < 0.012
    assert all(abs(each.predicted - each.right) < 4 * math.sqrt(0.25 / each.n) for each in found.bins)
    squared = reliability([(p * p, came_true) for p, came_true in truth])
    assert squared.ece == pytest.approx(1 / 6, abs=0.01)  # the mean of p - p² over [0, 1]


# ── intervals, and reading again ──


def test_official_intervals_are_of_items_not_of_verdicts(processor):
    """70 of 100 items right in both orders: 200 verdicts, but the spread is that of 100."""
    items = [item(f"{n}", "p", "q", question=(f"{n}",)) for n in range(100)]
    lines = judged(processor, items, lambda each, i, j: 0 if int(each.id) < 70 else 1)
    found = figures("mmrb2", lines)["reward_official_overall"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert found["value"] == pytest.approx(0.7)
    assert (0.7 - found["low"], found["high"] - 0.7) == pytest.approx((half, half), rel=0.2)


def test_labels_are_read_again_from_the_texts(processor, make_policy):
    engine = Scripted(processor, lambda record, i: r"\boxed{A}")
    scored = votes(processor, None)
    scored.engine, scored.policy = engine, make_policy().eval()
    [line] = judge_preferences(scored, [item("a", "p", "q")], ["pairwise"])
    first, second = line["replies"]
    assert 0 < first["probability"] < 1
    assert rescored(line) == line
    changed = {**line, "replies": [{**first, "text": r"\boxed{B}"}, {**second, "text": r"<t>\boxed{B}", "tokens": 9}]}
    one, two = rescored(changed)["replies"]
    assert (one["label"], one["in_favor"], one["probability"]) == ("B", False, 0.0)
    assert (two["label"], two["in_favor"], two["probability"]) == ("B", True, 1.0)
    thought = {**line, "replies": [{**first, "text": r"\boxed{B} so \boxed{A}", "answer_start": 9}, second]}
    assert rescored(thought) == thought, "the label of the answer has not changed, and keeps its probability"
    unread = {**line, "replies": [{**first, "text": r"\boxed{A}", "answer_start": 9}, second]}
    assert rescored(unread)["replies"][0]["probability"] is None


# ── a trained model ──


def test_a_trained_judge_on_digits(trained):  # noqa: F811
    problems = [digits.problem("test", i) for i in range(24)]
    items = [
        Preference(
            f"{i}",
            (ImageRef(data=p.image), p.question),
            (((p.answer,), (str(int(p.answer) + 1),)) if i % 2 else ((str(int(p.answer) + 1),), (p.answer,))),
            preferred=1 - i % 2,
            category="even" if int(p.answer) % 2 == 0 else "odd",
            recipe="digits",
        )
        for i, p in enumerate(problems)
    ]
    judge = GenerativeReward.from_pretrained(str(trained))
    lines = judge_preferences(judge, items, ["pairwise", "pointwise"])
    found = figures("digits", lines)
    questions, wrong = [each.question for each in items], [each.answers[1 - each.preferred] for each in items]
    best = [each.answers[each.preferred] for each in items]
    of_best, of_wrong = (
        [judgment.probability for judgment in judge.pointwise(questions, None, answers)] for answers in (best, wrong)
    )
    assert found["reward_pointwise"]["value"] == fmean(a > b for a, b in zip(of_best, of_wrong, strict=True)) > 0.5
    squares = [*((1 - p) ** 2 for p in of_best), *(p**2 for p in of_wrong)]
    assert found["reward_brier"]["value"] == pytest.approx(fmean(squares), rel=1e-3)
    in_pairs = [p > 0.5 for judgment in judge.pairwise(questions, None, best, wrong) for p in judgment.probabilities]
    assert found["reward_accuracy"]["value"] == fmean(in_pairs)

    alone = [judge_preferences(judge, [each], ["pairwise", "pointwise"]) for each in items[:4]]
    texts = [[reply["text"] for reply in line["replies"]] for of_item in alone for line in of_item]
    assert texts == [[reply["text"] for reply in line["replies"]] for line in lines[:8]]
    assert [rescored(line) for line in lines] == lines
    assert all(reply["tokens"] > 1 for line in lines for reply in line["replies"])
