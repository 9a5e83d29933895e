"""Evaluation with scripted policies, whose figures are known, and with a real model."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest

import spark_vl.demo
from spark_vl.config import (
    ConfigError,
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    RolloutConfig,
)
from spark_vl.evaluation import Evaluator, score, wilson
from spark_vl.evaluation.figures import estimate
from spark_vl.evaluation.prompts import in_chunks, judge_own
from spark_vl.evaluation.samples import groups_from_json, groups_to_json, merged, verified_again
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import Rollout, RolloutGroup, Verdict, plain_text
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.rollout.engine import nothing
from spark_vl.run.trained import find_templater
from spark_vl.verifiers import VerifierPool, boxed_gold
from tests.conftest import make_record

TEMPLATES = Path(spark_vl.demo.__file__).with_name("templates.yaml")
TEMPLATER = Templater.load([TEMPLATES], builtin=False, reasoning_suffix="\n\\boxed{}")
SUMS = [
    {"id": i, "q": f"What is {a} + {b}?", "a": str(a + b)} for i, (a, b) in enumerate([(2, 3), (4, 4), (1, 6), (5, 5)])
]
ACCURACIES = [
    *("reasoning_greedy", "reasoning_sampled", "pointwise_greedy", "pointwise_sampled"),
    *("pairwise_greedy", "pairwise_sampled", "reflection_greedy", "reflection_sampled", "reflection_keeps"),
    *("test_time_reflection", "test_time_majority"),
]


@pytest.fixture
def verifiers():
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.fixture
def make_evaluator(tmp_path):
    """An `Evaluator` on recipes that hold the given rows: `make_evaluator({"sums": rows}, samples=3)`."""

    def make(recipes, *, templater=TEMPLATER, seed=0, columns=(), verifier="number", **config):
        paths = []
        for name, rows in recipes.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            recipe = {
                **{"name": name, "description": "x", "license": "MIT", "source": {"jsonl": str(tmp_path)}},
                **{"splits": {"test": f"{name}.jsonl"}, "verifier": verifier},
                "columns": {"id": "id", "question": "q", "answer": "a", **dict(columns)},
            }
            paths.append(tmp_path / f"{name}.yaml")
            paths[-1].write_text(yaml.safe_dump(recipe))
        config = EvaluationConfig(recipes=[str(path) for path in paths], **config)
        rollout = RolloutConfig(temperature=0.7, top_p=0.9, max_new_tokens=8)
        return Evaluator(config, templater, rollout=rollout, seed=seed)

    return make


class Scripted:
    """A `RolloutEngine` that says `reply(record, i)`, a text or (text, tokens), as sample `i`, None if greedy."""

    def __init__(self, reply):
        self.reply = reply
        self.asked = []

    def generate(self, prompts, n, sampling, progress=nothing, on_group=nothing):
        self.asked.append((n, sampling, [prompt.record for prompt in prompts]))
        groups = []
        for prompt in prompts:
            replies = [self.reply(prompt.record, None if sampling.temperature == 0 else i) for i in range(n)]
            replies = [reply if isinstance(reply, tuple) else (reply, len(reply)) for reply in replies]
            rollouts = tuple(Rollout((0,) * tokens, (0.0,) * tokens, text, "stop") for text, tokens in replies)
            groups.append(RolloutGroup(prompt.record, rollouts))
        return groups

    def records(self, kind=None):
        """The records of the first call, which is the greedy one of all fixed prompts."""
        return [record for record in self.asked[0][2] if kind in (None, record.kind)]


def oracle(record, i):
    return boxed_gold(record)


def all_groups(evaluator, engine, processor, verifiers):
    """What `evaluator` asks, by mode, written down and read again."""
    problems = evaluator._draw(processor, verifiers)
    groups = merged(
        evaluator.ask(engine, processor, verifiers, chunk) for chunk in in_chunks(problems, processor, evaluator.about)
    )
    return groups_from_json(json.loads(json.dumps(groups_to_json(groups))))


def values(results):
    return {name: result["value"] for name, result in results.items()}


def other_label(record):
    return next(label for label in record.choices if label != record.gold)


# ── the maths ──


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (100, 200), (199, 200), (200, 200)])
def test_wilson_equals_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high))
    assert all(0 <= bound <= 1 for bound in wilson(k / n, n))


def test_what_was_cut_off_in_one_recipe_counts_in_the_mean_over_all():
    def group(recipe, i, finish):
        record = replace(make_record(f"{recipe}/{i}", "q"), recipe=recipe)
        return RolloutGroup(record, (Rollout((), (), "", finish),), (Verdict(0.0, "x"),))

    whole = [group(recipe, i, "stop") for recipe in "ab" for i in range(4)]
    assert not [name for name in score({"greedy": whole}) if "truncated" in name]
    results = score({"greedy": [*whole[:7], group("b", 3, "length")]})
    shares = {name: figure["value"] for name, figure in results.items() if "truncated" in name}
    assert shares == {"reasoning_truncated": (0 + 1 / 4) / 2, "b/reasoning_truncated": 1 / 4}


def test_several_recipes_give_a_macro_mean_whose_interval_is_that_of_independent_estimates():
    def group(recipe, i, right):
        record = replace(make_record(f"{recipe}/{i}", "q"), recipe=recipe)
        return RolloutGroup(record, (Rollout((), (), "", "stop"),), (Verdict(float(right), "x"),))

    greedy = [group("a", i, i < 9) for i in range(10)] + [group("b", i, i < 10) for i in range(40)]
    results = score({"greedy": greedy, "sampled": [], "test_time_reflection": [], "test_time_majority": []})
    a, b, both = (results[f"{prefix}reasoning_greedy"] for prefix in ("a/", "b/", ""))
    assert (a["value"], a["n"], b["value"], b["n"]) == (0.9, 10, 0.25, 40)
    assert (both["value"], both["n"]) == (pytest.approx((0.9 + 0.25) / 2), 50)
    assert both["value"] - both["low"] == pytest.approx(math.hypot(0.9 - a["low"], 0.25 - b["low"]) / 2)
    assert both["high"] - both["value"] == pytest.approx(math.hypot(a["high"] - 0.9, b["high"] - 0.25) / 2)


# ── scripted policies ──


def test_an_oracle_gets_full_marks(make_evaluator, processor, verifiers):
    results = make_evaluator({"sums": SUMS}, samples=3)(Scripted(oracle), processor, verifiers)
    assert {name: results[name]["value"] for name in ACCURACIES} == dict.fromkeys(ACCURACIES, 1.0)
    rest = {name: value for name, value in values(results).items() if name not in ACCURACIES}
    assert rest == {
        "reasoning_unparsable": 0.0,
        "pointwise_says_correct": 0.5,
        "pairwise_consistency": 1.0,
        "unusable": 0.0,
    }
    for result in results.values():
        assert result["n"] == 4
        assert (result["low"], result["high"]) == wilson(result["value"], 4)
    json.dumps(results)


def test_a_constant_judge_is_right_in_exactly_half_and_never_consistent(make_evaluator, processor, verifiers):
    rows = [{"id": i, "q": f"What is {i} + 1?", "a": str(i + 1)} for i in range(25)]
    evaluator = make_evaluator({"sums": rows}, templater=Templater.load([TEMPLATES]), samples=2)
    for position in (0, 1):

        def constant(record, i, position=position):
            judgment = record.kind in ("pointwise", "pairwise")
            return rf"\boxed{{{record.choices[position]}}}" if judgment else ""

        engine = Scripted(constant)
        results = values(evaluator(engine, processor, verifiers))
        for mode in ("greedy", "sampled"):
            assert results[f"pointwise_{mode}"] == 0.5
            assert results[f"pairwise_{mode}"] == 0.5
        assert results["pairwise_consistency"] == 0
    judgments = engine.records("pointwise")
    assert {record.choices for record in judgments} == {("Yes", "No"), ("A", "B")}
    # the two prompts of a problem differ in nothing but the answer
    assert set(Counter((record.origin.parent_id, record.origin.template) for record in judgments).values()) == {2}
    assert len({(record.origin.parent_id, record.gold) for record in judgments}) == 50


@pytest.mark.parametrize("says_correct", [True, False])
def test_a_judge_that_finds_everything_right_or_wrong(says_correct, make_evaluator, processor, verifiers):
    def reply(record, i):
        if record.kind != "pointwise" or record.origin.quoted_correct is None:
            return ""
        return rf"\boxed{{{record.gold if record.origin.quoted_correct == says_correct else other_label(record)}}}"

    results = values(make_evaluator({"sums": SUMS})(Scripted(reply), processor, verifiers))
    assert (results["pointwise_says_correct"], results["pointwise_greedy"]) == (float(says_correct), 0.5)


@pytest.mark.parametrize("stubborn", [True, False])
def test_repairing_and_keeping_are_two_figures(stubborn, make_evaluator, processor, verifiers):
    def reply(record, i):
        right = record.kind == "reflection" and record.origin.quoted_correct == stubborn
        return boxed_gold(record) if right else r"\boxed{-1}"

    results = values(make_evaluator({"sums": SUMS})(Scripted(reply), processor, verifiers))
    assert (results["reflection_keeps"], results["reflection_greedy"]) == (float(stubborn), float(not stubborn))
    assert results["reflection_sampled"] == float(not stubborn)


def test_a_policy_that_never_answers_gets_nothing(make_evaluator, processor, verifiers):
    results = values(make_evaluator({"sums": SUMS})(Scripted(lambda record, i: "Hm."), processor, verifiers))
    assert results.pop("reasoning_unparsable") == 1
    assert set(results.values()) == {0.0}


def test_sampled_figures_are_means_over_the_samples(make_evaluator, processor, verifiers):
    engine = Scripted(lambda record, i: boxed_gold(record) if i == 0 else "")
    results = make_evaluator({"sums": SUMS}, samples=4, seed=11)(engine, processor, verifiers)
    for name in ("reasoning", "pointwise", "pairwise", "reflection"):
        assert results[f"{name}_sampled"]["value"] == 0.25
        assert results[f"{name}_sampled"]["n"] == 4
        assert results[f"{name}_greedy"]["value"] == 0
    (n, greedy, _), (k, sampled, _) = engine.asked[:2]
    assert (n, greedy.temperature, greedy.max_new_tokens) == (1, 0, 8)
    assert (k, sampled.temperature, sampled.top_p, sampled.max_new_tokens, sampled.seed) == (4, 0.7, 0.9, 8, 11)


# ── the fixed prompts ──


def test_prompts_depend_on_neither_policy_nor_seed(make_evaluator, processor, verifiers):
    rows = [{"id": i, "q": f"What is {i} + 1?", "a": str(i + 1)} for i in range(30)]
    first, second, third = Scripted(oracle), Scripted(lambda record, i: ""), Scripted(oracle)
    evaluator = make_evaluator({"sums": rows}, problems=8)
    evaluator(first, processor, verifiers)
    evaluator(second, processor, verifiers)
    make_evaluator({"sums": rows}, problems=8, seed=5)(third, processor, verifiers)
    assert first.records() == second.records() == third.records()
    assert len({record.id for record in first.records()}) == len(first.records()) == 8 * 7
    drawn = [int(record.id.split("/")[-1]) for record in first.records("problem")]
    assert drawn != list(range(8))  # drawn from all rows, not the first ones


def test_judgments_quote_a_right_and_a_wrong_answer_in_equal_numbers(make_evaluator, processor, verifiers):
    rows = [{"id": i, "q": ("Larger?", "Smaller?")[i % 2], "a": str(5 * (i % 2) + i % 5)} for i in range(20)]
    engine = Scripted(oracle)
    make_evaluator({"digits": rows})(engine, processor, verifiers)
    problems = {record.id: record for record in engine.records("problem")}
    golds = {"Larger?": "01234", "Smaller?": "56789"}
    sides = Counter()
    for record in engine.records("pointwise"):
        problem = problems[record.origin.parent_id]
        quoted = plain_text(record.messages[0].content).split('"')[1]
        assert (quoted == problem.gold) == record.origin.quoted_correct
        assert quoted in golds[problem.question[0]]  # of a problem with the same question
        assert (record.verifier, record.recipe, record.question) == ("judgment", "digits", problem.question)
        sides[record.origin.quoted_correct] += 1
    assert sides == {True: 20, False: 20}
    for record in engine.records("reflection"):
        quoted = plain_text(record.messages[0].content).split('"')[1]
        assert (quoted == record.gold) == record.origin.quoted_correct
        assert (record.gold, record.verifier) == (problems[record.origin.parent_id].gold, "number")
    for record in engine.records("pairwise"):
        answers = plain_text(record.messages[0].content).split('"')[1:4:2]
        gold = problems[record.origin.parent_id].gold
        assert [answer == gold for answer in answers] == [record.gold == "A", record.gold == "B"]


def test_another_spelling_of_the_gold_is_no_wrong_answer(make_evaluator, processor, verifiers):
    halves = ["1/2", "0.5", "50e-2", ".5", "5/10", "0.50", "2/4", "3/6"]
    rows = [{"id": i, "q": "How much?", "a": answer} for i, answer in enumerate([*halves, "3"])]
    engine = Scripted(oracle)
    make_evaluator({"halves": rows})(engine, processor, verifiers)
    golds = {record.id: record.gold for record in engine.records("problem")}
    wrong = {
        golds[record.origin.parent_id]: plain_text(record.messages[0].content).split('"')[1]
        for record in engine.records("pointwise")
        if not record.origin.quoted_correct
    }
    assert {wrong.pop(half) for half in halves} == {"3"}
    assert wrong.pop("3") in halves


def test_the_wrong_answer_to_a_choice_question_is_another_letter(make_evaluator, processor, verifiers):
    rows = [{"id": i, "q": "Which?", "a": "AB"[i % 2], "o": ["x", "y", "z"]} for i in range(12)]
    engine = Scripted(oracle)
    make_evaluator({"choices": rows}, columns={"choices": "o"})(engine, processor, verifiers)
    golds = {record.id: record.gold for record in engine.records("problem")}
    wrong = []
    for record in engine.records("reflection"):
        if not record.origin.quoted_correct:
            wrong.append(plain_text(record.messages[0].content).split('"')[1])
            assert wrong[-1] != golds[record.origin.parent_id]
    assert set(wrong) == {"A", "B", "C"}  # C too, although no row has it as its gold


def test_problems_without_a_wrong_answer_are_not_judged(make_evaluator, processor, verifiers):
    rows = [{"id": i, "q": f"{i}?", "a": "1"} for i in range(3)]
    results = make_evaluator({"ones": rows})(Scripted(oracle), processor, verifiers)
    assert results.keys() == {
        *("reasoning_greedy", "reasoning_sampled", "reasoning_unparsable"),
        *("test_time_reflection", "test_time_majority", "unusable"),
    }


def test_bad_rows_are_replaced_counted_and_named(make_evaluator, processor, verifiers, caplog):
    rows = [{"id": i, "q": f"{i}?", "a": str(i)} for i in range(5)]
    rows += [
        {"id": 5, "q": "", "a": "1"},
        {"id": 6, "q": "No number?", "a": "blue"},
    ]
    engine = Scripted(oracle)
    results = make_evaluator({"rows": rows}, problems=5)(engine, processor, verifiers)
    unusable = results["unusable"]
    assert results["reasoning_greedy"]["n"] == 5
    assert unusable["n"] * (1 - unusable["value"]) == pytest.approx(5)
    assert len(caplog.messages) == unusable["n"] - 5
    assert sorted(int(r.id.split("/")[-1]) for r in engine.records("problem")) == [0, 1, 2, 3, 4]

    caplog.clear()
    all_rows = make_evaluator({"rows": rows}, problems=100)(Scripted(oracle), processor, verifiers)
    assert (all_rows["reasoning_greedy"]["n"], all_rows["unusable"]["n"], all_rows["unusable"]["value"]) == (
        5,
        7,
        2 / 7,
    )
    for reason in ("rows/test/5: 'q' is empty", "rows/test/6: the number verifier"):
        assert reason in caplog.text

    with pytest.raises(ConfigError, match=r"^evaluation\.recipes: bad/test: none of its 2 rows"):
        make_evaluator({"bad": rows[5:7]})(Scripted(oracle), processor, verifiers)


def test_rows_that_share_an_id_are_all_asked_and_judged(make_evaluator, processor, verifiers):
    rows = [row | {"id": "same"} for row in SUMS]
    engine, apart = Scripted(oracle), Scripted(oracle)
    results = make_evaluator({"sums": rows}, problems=4)(engine, processor, verifiers)
    expected = make_evaluator({"sums": SUMS}, problems=4)(apart, processor, verifiers)
    assert {name: (found["value"], found["n"]) for name, found in results.items()} == {
        name: (found["value"], found["n"]) for name, found in expected.items()
    }
    asked = [record.id for record in engine.records()]
    assert len(set(asked)) == len(asked) == 4 * 7  # each with its six judge and reflection prompts


def test_judge_prompts_that_are_too_long_are_left_out_and_labels_stay_balanced(
    make_evaluator, tiny, processor, verifiers
):
    short = type(processor)(
        *(processor.hf, tiny[0].config, tiny[0].generation_config),
        **{"min_pixels": 784, "max_pixels": 784, "max_prompt_tokens": 180},
    )
    rows = [*SUMS, {"id": 9, "q": "What is 7 + 0?", "a": "7." + "0" * 150}]
    engine = Scripted(oracle)
    results = make_evaluator({"sums": rows})(engine, short, verifiers)
    assert results["reasoning_greedy"]["n"] == 5
    assert 0 < results["pointwise_greedy"]["n"] < 5
    sides = Counter(record.origin.quoted_correct for record in engine.records("pointwise"))
    assert sides[True] == sides[False] == results["pointwise_greedy"]["n"]


def test_recipes_of_the_same_name_are_refused(make_evaluator):
    evaluator = make_evaluator({"sums": SUMS})
    config = EvaluationConfig(recipes=evaluator.config.recipes * 2)
    with pytest.raises(ConfigError, match=r"evaluation\.recipes: more than one is named sums"):
        Evaluator(config, TEMPLATER, rollout=RolloutConfig(), seed=0)


def test_a_weight_is_refused(make_evaluator):
    path = make_evaluator({"sums": SUMS}).config.recipes[0]
    config = EvaluationConfig(recipes=[f"{path}?weight=2"])
    with pytest.raises(ConfigError, match=r"evaluation\.recipes: recipe sums: weight: .*in data\.recipes only"):
        Evaluator(config, TEMPLATER, rollout=RolloutConfig(), seed=0)


def test_rows_that_the_recipe_leaves_out_are_neither_drawn_nor_unusable(tmp_path, processor, verifiers, caplog):
    rows = [{"q": f"What is {n} + 1?", "a": n + 1, "image": f"{n}.png"} for n in range(4)]
    for n in range(4):
        Image.new("RGB", (28 * (1 + n % 2), 28)).save(tmp_path / f"{n}.png")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"name": "mine", "description": "x", "license": "MIT", "source": {"jsonl": str(tmp_path)}}
    recipe |= {"splits": {"test": "t.jsonl"}, "columns": {"question": "q", "answer": "a", "images": "image"}}
    recipe |= {"verifier": "number", "pixels": {"max": 784}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    results = evaluate([tmp_path / "mine.yaml"], Scripted(oracle), processor, verifiers)
    assert results["unusable"] == estimate(0, 2)
    assert results["reasoning_greedy"]["n"] == 2
    assert caplog.text == ""


# ── the policy's own answers ──


def attempts(*texts, scores, finish=None, parsed="x", status="ok"):
    """A verified group of completions to one problem."""
    rollouts = tuple(Rollout((), (), text, finish or "stop") for text in texts)
    return RolloutGroup(make_record("sums/1", "What is 2 + 3?"), rollouts).verified(
        tuple(Verdict(score, parsed, status) for score in scores)
    )


def quoted(record):
    return plain_text(record.messages[0].content).split('"')[1]


def test_own_answers_are_judged_in_two_prompts_that_differ_in_nothing_but_the_answer():
    templates = set()
    for i in range(20):
        group = attempts(r"So \boxed{5}", r"\boxed{7}", r"\boxed{8}", scores=(1.0, 0.0, 0.0))
        group = replace(group, record=replace(group.record, id=f"sums/{i}"))
        right, wrong = judge_own(group, TEMPLATER)
        assert (right, wrong) == tuple(judge_own(group, TEMPLATER))
        assert (quoted(right), quoted(wrong) in ("7", "8")) == ("5", True)
        assert (right.origin.quoted_correct, wrong.origin.quoted_correct) == (True, False)
        assert right.origin.completions == (r"So \boxed{5}",)
        assert group.rollouts[wrong.origin.rollouts[0]].text == wrong.origin.completions[0]
        prompts = [plain_text(r.messages[0].content).replace(f'"{quoted(r)}"', "") for r in (right, wrong)]
        assert prompts[0] == prompts[1]
        assert {right.gold, wrong.gold} == set(right.choices) == set(wrong.choices)
        templates.add((right.origin.template, right.gold, quoted(wrong)))
    assert len(templates) > 4  # drawn by the problem


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (attempts(r"\boxed{5}", r"\boxed{5}", scores=(1.0, 1.0)), ["5"]),
        (attempts(r"\boxed{7}", r"\boxed{6}", scores=(0.0, 0.5)), ["7"]),
        (attempts("It is 5.", "It is 7.", scores=(1.0, 1.0), parsed="5"), ["5"]),
        (attempts("Hm.", scores=(0.0,), parsed=None), []),
        (attempts(r"\boxed{5}", scores=(1.0,), finish="length"), []),
        (attempts(r"\boxed{5}", scores=(0.0,), status="timeout"), []),
        (attempts(r"\boxed{5} m", r"\boxed{ 5 } cm", r"\boxed{7}", scores=(1.0, 0.0, 0.0)), ["7"]),
    ],
    ids=["one side", "partial score", "no box", "no answer", "cut off", "no verdict", "right and wrong"],
)
def test_only_answers_that_are_known_to_be_right_or_wrong_are_judged(group, expected):
    assert [quoted(record) for record in judge_own(group, TEMPLATER)] == expected


def own_judge(right_on):
    """Answers sum 0 always right, 1 always wrong, the others both ways; judges its own answers to the sums as
    `right_on`, which names (sum, side), says."""

    def reply(record, i):
        number = int(record.id.split("#")[0].split("/")[-1])
        if record.kind == "problem":
            return boxed_gold(record) if number == 0 or (number > 1 and i in (None, 0)) else r"\boxed{-1}"
        if "#pointwise_sampled" not in record.id:
            return ""
        return (
            rf"\boxed{{{record.gold if (number, record.origin.quoted_correct) in right_on else other_label(record)}}}"
        )

    return reply


def test_judging_own_answers_is_balanced_over_right_and_wrong_ones(make_evaluator, processor, verifiers):
    right_on = {(0, True), (2, True), (2, False), (3, True)}
    engine = Scripted(own_judge(right_on))
    results = make_evaluator({"sums": SUMS}, samples=2)(engine, processor, verifiers)
    (asked,) = [call for call in engine.asked if any("#pointwise_sampled" in record.id for record in call[2])]
    n, sampling, records = asked
    assert (n, sampling.temperature, len(records)) == (1, 0, 6)
    # three of three right answers, one of three wrong ones; both of sum 2
    own, pairs = results["pointwise_own"], results["pointwise_own_pairs"]
    assert (own["value"], own["n"]) == (pytest.approx((3 / 3 + 1 / 3) / 2), 4)
    assert own["low"] == pytest.approx((wilson(1, 3)[0] + wilson(1 / 3, 3)[0]) / 2)
    assert own["high"] == pytest.approx((1 + wilson(1 / 3, 3)[1]) / 2)
    assert (pairs["value"], pairs["n"]) == (0.5, 2)
    assert results["pointwise_greedy"]["value"] == 0


def test_the_interval_of_own_answers_holds_the_truth_even_if_both_verdicts_on_a_problem_are_one(processor):
    """The worst case: one coin a problem decides both verdicts, so that there are half as many draws as prompts."""
    rng = random.Random(0)
    misses = 0
    for _ in range(400):
        judgments = []
        for i in range(60):
            score_of_both = float(rng.random() < 0.7)
            for record in judge_own(attempts(r"\boxed{5}", r"\boxed{7}", scores=(1.0, 0.0)), TEMPLATER):
                record = replace(record, origin=replace(record.origin, parent_id=f"p{i}"))
                judgments.append(RolloutGroup(record, (Rollout((), (), "", "stop"),), (Verdict(score_of_both, "x"),)))
        own = score({"own_answers": judgments})["pointwise_own"]
        misses += not own["low"] <= 0.7 <= own["high"]
    assert misses <= 400 * 0.08


def test_a_constant_judge_of_own_answers_is_right_in_half_and_on_no_pair(make_evaluator, processor, verifiers):
    says_correct = {(number, True) for number in range(4)}
    results = values(make_evaluator({"sums": SUMS}, samples=2)(Scripted(own_judge(says_correct)), processor, verifiers))
    assert (results["pointwise_own"], results["pointwise_own_pairs"]) == (0.5, 0)


def test_a_policy_that_is_always_right_or_never_has_no_figure_for_its_own_answers(make_evaluator, processor, verifiers):
    for answer in (oracle, lambda record, i: r"\boxed{-1}"):
        results = make_evaluator({"sums": SUMS}, samples=2)(Scripted(answer), processor, verifiers)
        assert not [name for name in results if "own" in name]


# ── published judgments ──


@pytest.fixture
def make_published(tmp_path, make_evaluator):
    """The path of a recipe with published judgments: `make_published("pairwise", *changes of rows)`."""

    def make(kind, *changes):
        rows = []
        for i, change in enumerate(changes):
            message = {"role": "user", "content": [{"type": "text", "text": f"{kind} {i}?"}]}
            row = {
                **{"id": f"j{i}", "images": [], "messages": [message], "question": "What is 2 + 3?", "label": "A"},
                **{
                    "choices": ["A", "B"],
                    "verifier": "judgment",
                    "settings": "{}",
                    "license": "MIT",
                    "parent_id": f"p{i}",
                    "step": 3,
                    "template": "t",
                },
                **{"correct": True, "completion": f"{i}", "completion_a": f"a{i}", "completion_b": f"b{i}"},
            }
            if kind in ("reflection", "rollouts"):
                row |= {"label": "5", "choices": [], "verifier": "number"}
            rows.append(row | change)
        (tmp_path / f"published-{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            **{"name": f"published-{kind}", "description": "x", "license": "other", "columns": {"judgments": kind}},
            **{"source": {"jsonl": str(tmp_path)}, "splits": {"test": f"published-{kind}.jsonl"}},
        }
        path = tmp_path / f"published-{kind}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


def evaluate(recipes, engine, processor, verifiers, **settings):
    config = EvaluationConfig(recipes=[str(path) for path in recipes], **settings)
    rollout = RolloutConfig(temperature=0.7, top_p=0.9, max_new_tokens=8)
    return Evaluator(config, TEMPLATER, rollout=rollout, seed=0)(engine, processor, verifiers)


def test_published_pairs_are_asked_as_they_are_and_in_one_order(make_published, processor, verifiers):
    """Of one problem come two pairs with different labels, which are not one pair in both orders."""
    path = make_published("pairwise", {}, {"label": "B", "parent_id": "p0"}, {"label": "B"}, {})
    engine = Scripted(lambda record, i: r"\boxed{A}")
    results = evaluate([path], engine, processor, verifiers)
    assert values(results) == {
        "pairwise_greedy": pytest.approx((0.5 + 0 + 1) / 3),
        "pairwise_sampled": pytest.approx((0.5 + 0 + 1) / 3),
        "unusable": 0.0,
    }
    assert (results["pairwise_greedy"]["n"], results["unusable"]["n"]) == (3, 4)
    asked = {record.id: plain_text(record.messages[0].content) for record in engine.records()}
    assert asked == {f"published-pairwise/test/j{i}": f"pairwise {i}?" for i in range(4)}
    assert [len(records) for _, _, records in engine.asked[:2]] == [4, 4]
    assert not any(records for _, _, records in engine.asked[2:])


def test_published_pairs_in_both_orders_have_a_consistency(make_published, processor, verifiers):
    swapped = {"parent_id": "p0", "label": "B", "completion_a": "b0", "completion_b": "a0"}
    path = make_published("pairwise", {}, swapped, {})
    for reply, consistency in ((oracle, 1.0), (lambda record, i: r"\boxed{A}", 0.0)):
        results = evaluate([path], Scripted(reply), processor, verifiers)
        assert (results["pairwise_consistency"]["value"], results["pairwise_consistency"]["n"]) == (consistency, 1)


def test_published_pointwise_prompts_and_reflections(make_published, processor, verifiers):
    pointwise = make_published(
        *("pointwise", {"choices": ["Yes", "No"], "label": "Yes"}),
        *({"choices": ["Yes", "No"], "label": "No", "correct": False}, {"label": "B", "correct": False}),
    )
    reflection = make_published("reflection", {}, {"correct": False}, {"correct": False, "label": "7"})
    engine = Scripted(lambda record, i: rf"\boxed{{{'5' if record.kind == 'reflection' else record.choices[0]}}}")
    results = evaluate([pointwise, reflection], engine, processor, verifiers)
    figures = values(results)
    assert {name: value for name, value in figures.items() if "/" not in name} == {
        "pointwise_greedy": pytest.approx(1 / 3),
        "pointwise_sampled": pytest.approx(1 / 3),
        "pointwise_says_correct": 1.0,
        "reflection_greedy": 0.5,
        "reflection_sampled": 0.5,
        "reflection_keeps": 1.0,
        "unusable": 0.0,
    }
    assert results["reflection_greedy"]["n"] == 2


def test_problems_and_published_judgments_side_by_side(make_published, make_evaluator, processor, verifiers, caplog):
    pairs = make_published("pairwise", {}, {"label": "C"}, {"verifier": "os:system"}, {"verifier": "number"})
    sums = make_evaluator({"sums": SUMS}).config.recipes
    results = evaluate([*sums, pairs], Scripted(oracle), processor, verifiers)
    assert (results["unusable"]["value"], results["unusable"]["n"]) == (pytest.approx(3 / 8), 8)
    assert results["reasoning_greedy"]["n"] == results["sums/pairwise_greedy"]["n"] == 4
    assert results["published-pairwise/pairwise_greedy"]["n"] == 1
    assert results["pairwise_consistency"]["n"] == 4
    assert "published-pairwise/reasoning_greedy" not in results
    assert "published-pairwise/pairwise_consistency" not in results
    assert "'verifier' is 'os:system'; allowed: judgment" in caplog.text


def test_published_rollouts_are_problems(make_published, processor, verifiers):
    path = make_published("rollouts", {}, {"label": "6"})
    results = evaluate([path], Scripted(oracle), processor, verifiers)
    assert {name: results[name]["value"] for name in ACCURACIES} == dict.fromkeys(ACCURACIES, 1.0)
    assert results["pairwise_consistency"]["n"] == 2


def test_published_judgments_can_be_scored_again(make_published, processor, verifiers):
    path = make_published("pairwise", {}, {"label": "B", "parent_id": "p0"})
    evaluator = Evaluator(
        EvaluationConfig(recipes=[str(path)]), TEMPLATER, rollout=RolloutConfig(max_new_tokens=8), seed=0
    )
    results = evaluator(Scripted(oracle), processor, verifiers)
    again = score(verified_again(all_groups(evaluator, Scripted(oracle), processor, verifiers), verifiers))
    assert again == {name: figure for name, figure in results.items() if name != "unusable"}
    assert again.keys() == {"pairwise_greedy", "pairwise_sampled"}


# ── test-time reflection and its baseline ──


def reflecting(*, solved, repaired_in=1, judge=True):
    """Answers the sums in `solved`; judges its own answers as they are if `judge`; repairs in the given round."""

    def reply(record, i):
        name = int(record.id.split("#")[0].split("/")[-1])
        if record.kind == "problem":
            return boxed_gold(record) if name in solved else r"\boxed{-1}"
        if "own_" not in record.id:
            return ""
        turn = int(record.id[-1])
        right = name in solved or turn > repaired_in
        if record.kind == "pointwise":
            return rf"\boxed{{{record.gold if right == judge else other_label(record)}}}"
        return boxed_gold(record) if turn >= repaired_in else r"\boxed{-2}"

    return reply


@pytest.mark.parametrize(("rounds", "repaired_in", "after"), [(1, 1, 1.0), (1, 2, 0.5), (2, 2, 1.0), (3, 1, 1.0)])
def test_answers_judged_wrong_are_revised_for_at_most_so_many_rounds(
    rounds, repaired_in, after, make_evaluator, processor, verifiers
):
    engine = Scripted(reflecting(solved={0, 1}, repaired_in=repaired_in))
    evaluator = make_evaluator({"sums": SUMS}, reflection_rounds=rounds)
    results = values(evaluator(engine, processor, verifiers))
    assert (results["reasoning_greedy"], results["test_time_reflection"]) == (0.5, after)
    judged = [record for _, _, records in engine.asked[2::2] for record in records]
    reflected = [record for _, _, records in engine.asked[3::2] for record in records]
    assert {record.kind for record in judged} == {"pointwise"}
    turns = min(rounds, repaired_in)
    assert Counter(record.origin.parent_id for record in reflected) == {"sums/test/2": turns, "sums/test/3": turns}
    assert '"-1"' in plain_text(reflected[0].messages[0].content)
    if turns == 2:
        assert '"-2"' in plain_text(reflected[-1].messages[0].content)


def test_a_judge_that_is_mistaken_spoils_right_answers(make_evaluator, processor, verifiers):
    engine = Scripted(reflecting(solved={0, 1}, repaired_in=9, judge=False))
    results = values(make_evaluator({"sums": SUMS})(engine, processor, verifiers))
    assert (results["reasoning_greedy"], results["test_time_reflection"]) == (0.5, 0.0)


def test_an_answer_without_a_box_is_reflected_on_whole_and_one_without_a_verdict_is_kept(
    make_evaluator, processor, verifiers
):
    def reply(record, i):
        if record.kind == "problem":
            return "No idea." if record.id.endswith("/0") else boxed_gold(record)
        return boxed_gold(record) if record.id.endswith("reflection_own_1") else "Hm."

    engine = Scripted(reply)
    results = values(make_evaluator({"sums": SUMS})(engine, processor, verifiers))
    assert (results["reasoning_greedy"], results["test_time_reflection"]) == (0.75, 1.0)
    (judged, reflected) = (records for _, _, records in engine.asked[2:4])
    assert sorted(record.origin.parent_id for record in judged) == [f"sums/test/{i}" for i in (1, 2, 3)]
    assert [record.origin.parent_id for record in reflected] == ["sums/test/0"]
    assert '"No idea."' in plain_text(reflected[0].messages[0].content)
    assert "cot_check" in reflected[0].origin.template


@pytest.mark.parametrize(("unreadable", "after"), [("keep", 0.5), ("reflect", 1.0)])
def test_an_answer_whose_judgment_has_no_verdict_is_kept_or_revised(
    unreadable, after, make_evaluator, processor, verifiers
):
    """Sums 0 and 1 are solved, and judged correct; of 2 and 3 the judge says nothing."""
    policy = reflecting(solved={0, 1})

    def reply(record, i):
        speechless = record.kind == "pointwise" and policy(record, i) == rf"\boxed{{{other_label(record)}}}"
        return "Hm." if speechless else policy(record, i)

    engine = Scripted(reply)
    evaluator = make_evaluator({"sums": SUMS}, unreadable_judgment=unreadable)
    assert values(evaluator(engine, processor, verifiers))["test_time_reflection"] == after
    revised = {record.origin.parent_id for record in engine.asked[3][2]}
    assert revised == ({"sums/test/2", "sums/test/3"} if unreadable == "reflect" else set())


@pytest.mark.parametrize("claim", ["check", "wrong"])
def test_a_revision_is_asked_for_with_the_claim_that_is_set(claim, make_evaluator, processor, verifiers):
    def never_right(record, i):
        if record.kind == "pointwise":
            return rf"\boxed{{{other_label(record)}}}"
        return "Hm." if record.id.endswith("/0") else r"\boxed{-1}"

    engine = Scripted(never_right)
    make_evaluator({"sums": SUMS}, reflection_claim=claim)(engine, processor, verifiers)
    reflections = engine.asked[3][2]
    templates = {record.origin.parent_id: TEMPLATER.templates[record.origin.template] for record in reflections}
    assert {parent: (t.shows, t.claim) for parent, t in templates.items()} == {
        f"sums/test/{i}": ("answer" if i else "cot", claim) for i in range(4)
    }


def test_a_claim_that_no_template_makes_is_refused_before_anything_is_sampled(make_evaluator):
    checking = Templater([template for template in TEMPLATER.templates.values() if template.claim != "wrong"])
    make_evaluator({"sums": SUMS}, templater=checking)
    with pytest.raises(ConfigError, match=r"^evaluation\.reflection_claim: .* no reflection that .*, claim: wrong"):
        make_evaluator({"sums": SUMS}, templater=checking, reflection_claim="wrong")


@pytest.mark.parametrize(("judge_tokens", "expected"), [(4, 0.0), (9, 0.0), (10, 0.0), (20, 1.0), (500, 1.0)])
def test_the_majority_vote_spends_the_tokens_of_test_time_reflection(
    judge_tokens, expected, make_evaluator, processor, verifiers
):
    """Greedy answers take 10 tokens and their judgments `judge_tokens`: one vote (wrong) below 20 in all, two (a tie,
    which the first answer wins) below 30, then three, two of which are right."""

    def reply(record, i):
        if record.kind != "problem":
            return boxed_gold(record), judge_tokens
        return rf"\boxed{{{-1 if i == 0 else record.gold}}}", 10

    results = values(make_evaluator({"sums": SUMS}, samples=3)(Scripted(reply), processor, verifiers))
    assert results["reasoning_sampled"] == pytest.approx(2 / 3)
    assert results["test_time_majority"] == expected


# ── the samples file ──


def test_samples_can_be_scored_again_without_the_model(make_evaluator, processor, verifiers):
    evaluator = make_evaluator({"sums": SUMS, "more": SUMS[:3]}, samples=2)
    for reply in (reflecting(solved={0, 1}), oracle):
        result = evaluator(Scripted(reply), processor, verifiers)
        groups = all_groups(evaluator, Scripted(reply), processor, verifiers)
        again = score(verified_again(groups, verifiers))
        assert again == {name: figure for name, figure in result.items() if name != "unusable"}
    assert all(group.record.messages == () for of_mode in groups.values() for group in of_mode)
    greedy = groups["greedy"][0]
    assert greedy.rollouts[0].token_ids == ()
    assert greedy.rollouts[0].tokens == len(oracle(greedy.record, None))  # as `Scripted` counts

    # A gold that was corrected since counts.
    corrected = {
        mode: [
            replace(group, record=replace(group.record, gold="12345")) if group.record.verifier == "number" else group
            for group in of_mode
        ]
        for mode, of_mode in groups.items()
    }
    again = score(verified_again(corrected, verifiers))
    assert (again["reasoning_greedy"]["value"], again["pointwise_greedy"]["value"]) == (0, 1)


# ── a real model ──


def test_a_real_model_end_to_end(make_policy, processor, verifiers):
    engine = TransformersEngine(make_policy(), processor, decode_batch_size=64)
    config = EvaluationConfig(recipes=["digits"], problems=6, samples=2)
    evaluator = Evaluator(config, TEMPLATER, rollout=RolloutConfig(max_new_tokens=6), seed=0)
    heard = Counter()

    def counting(name, total):
        heard[name] -= total
        return lambda finished: heard.update({name: finished})

    results = evaluator(engine, processor, verifiers, counting)
    assert set(heard.values()) == {0}  # all that was announced has been heard of
    assert not processor._images, "the decoded images of an evaluation are kept"
    assert results == evaluator(engine, processor, verifiers)
    assert all(result["low"] <= result["value"] <= result["high"] for result in results.values())
    assert {result["n"] for result in results.values()} == {6}
    groups = all_groups(evaluator, engine, processor, verifiers)
    sizes = Counter((mode, len(group.rollouts)) for mode, of_mode in groups.items() for group in of_mode)
    assert sizes >= Counter(
        {("greedy", 1): 42, ("sampled", 2): 36, ("test_time_reflection", 1): 6, ("test_time_majority", 1): 6}
    )
    # the greedy completion of a problem is what the engine says to it alone
    problem = evaluator._problems[0]
    alone = engine.generate([processor.process(problem)], 1, Sampling(temperature=0, max_new_tokens=6))[0]
    found = next(group for group in groups["greedy"] if group.record.id == problem.id)
    assert found.rollouts[0].text == alone.rollouts[0].text


def test_a_model_is_asked_in_the_words_it_was_trained_on_unless_others_are_asked_for(tmp_path, capsys):
    def suffix(prompts: PromptConfig) -> str:
        return (
            find_templater(prompts, ModelConfig(path=str(tmp_path)), ("<|",))
            .problem(("?",))[-1]
            .content[-1]
            .removeprefix("?")
        )

    assert suffix(PromptConfig()) == PromptConfig().reasoning_suffix
    assert "of the shipped templates" in capsys.readouterr().out
    Templater.load(reasoning_suffix=" In a box.").save(tmp_path / PROMPTS_FILE)
    assert suffix(PromptConfig()) == " In a box."
    assert "that the model was trained on" in capsys.readouterr().out
    assert suffix(PromptConfig(reasoning_suffix=" Boxed.")) == " Boxed."
    (tmp_path / PROMPTS_FILE).unlink()
    for prompts in (PromptConfig(), PromptConfig(reasoning_suffix=" Boxed.")):
        templater = find_templater(prompts, ModelConfig(path=str(tmp_path)), ("[INST]",))
        assert templater.neutralize("[INST] <|") == "[\u200bINST] <|", "the tokens of this model, and no others"
    (tmp_path / PROMPTS_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=rf"^model\.path: .*{PROMPTS_FILE}: found"):
        suffix(PromptConfig())


def test_a_verifier_that_fails_is_a_figure_where_one_does():
    record = make_record("a", "?", gold="5")
    groups = [
        RolloutGroup(replace(record, id=name), (Rollout((), (), "", "stop"),), (Verdict(0.0, None, status),))
        for name, status in (("a", "error"), ("b", "timeout"), ("c", "unparsable"), ("d", "ok"))
    ]
    assert score({"greedy": groups})["reasoning_failed"]["value"] == 0.5
    assert "reasoning_failed" not in score({"greedy": groups[2:]})
