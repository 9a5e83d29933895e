from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_vl.config import RecycleConfig
from spark_vl.prompts.templater import Templater
from spark_vl.records import (
    ImageRef,
    Message,
    Origin,
    PromptRecord,
    RecycledRecord,
    Rollout,
    RolloutGroup,
    Verdict,
    plain_text,
)
from spark_vl.recycle import Recycled, recycle
from spark_vl.run.codec import record_from_json, record_to_json

TEMPLATER = Templater.load()
IMAGE = ImageRef(data=b"png")
ALL = RecycleConfig(max_judge=10_000, max_reflection=10_000)
"""Defaults without caps."""
RIGHT, WRONG = [1.0] * 4, [0.0] * 4
MIXED = [1.0, 0.0, 0.0, 1.0]
PARENT = Origin("r/parent", 1, "template", (0,))


def config(**changes) -> RecycleConfig:
    return replace(ALL, **changes)


def group(scores, *, texts=None, finish_reason="stop", status="ok", kind="problem", name=None) -> RolloutGroup:
    """A verified group; rollout i boxes `[right|wrong] answer i of <name>` unless `texts` are given."""
    name = name or "-".join(f"{score:g}" for score in scores)
    if texts is None:
        texts = [rf"Idea {i}. \boxed{{{'right' if s else 'wrong'} answer {i} of {name}}}" for i, s in enumerate(scores)]
    question = ("Look: ", IMAGE, f" What is {name}?")
    record = PromptRecord(
        f"r/{name}", "problem", (Message("user", question),), question, f"gold of {name}", "choice", "r", ("x", "y")
    )
    rollouts = tuple(Rollout((1,), (-0.5,), text, finish_reason) for text in texts)
    verified = RolloutGroup(record, rollouts, tuple(Verdict(s, None, status) for s in scores))
    return verified if kind == "problem" else as_recycled(verified, kind)


def many(scores, n: int, prefix: str = "") -> list[RolloutGroup]:
    return [group(scores, name=f"{prefix or scores}-{i}") for i in range(n)]


def run(groups, settings: RecycleConfig = ALL, *, step=3, seed=0) -> Recycled:
    return recycle(groups, TEMPLATER, settings, step=step, seed=seed)


def text(record: PromptRecord) -> str:
    return "".join(plain_text(message.content) for message in record.messages)


def labels(records) -> list[bool]:
    """Whether the quoted answer is right, of the pointwise prompts among `records`."""
    return [r.origin.quoted_correct for r in records if r.kind == "pointwise"]


# ── the table of rules ──


def test_only_right_answers_give_one_pointwise_prompt():
    source = group(RIGHT)
    recycled = run([source])
    (judge,) = recycled.judge
    assert recycled.reflection == []
    assert judge.id == f"{source.record.id}@3#pointwise"
    assert (judge.kind, judge.verifier, judge.recipe) == ("pointwise", "judgment", "r")
    assert judge.question == source.record.question
    assert judge.images == (IMAGE,)
    assert judge.gold in judge.choices
    assert len(judge.choices) == 2
    assert judge.origin.parent_id == source.record.id
    assert judge.origin.step == 3
    assert judge.origin.template in TEMPLATER.templates
    assert judge.origin.quoted_correct is True
    (index,) = judge.origin.rollouts
    assert f"right answer {index} of" in text(judge)


def test_only_wrong_answers_give_one_pointwise_prompt_and_one_reflection():
    source = group(WRONG)
    recycled = run([source])
    (judge,), (reflection,) = recycled.judge, recycled.reflection
    assert judge.kind == "pointwise"
    assert judge.origin.quoted_correct is False
    assert f"wrong answer {judge.origin.rollouts[0]} of" in text(judge)
    parent = source.record
    assert (reflection.id, reflection.kind) == (f"{parent.id}@3#reflection", "reflection")
    assert (reflection.gold, reflection.verifier, reflection.choices) == (parent.gold, parent.verifier, parent.choices)
    assert reflection.origin.quoted_correct is False
    assert f"wrong answer {reflection.origin.rollouts[0]} of" in text(reflection)


def test_mixed_groups_give_pairs_and_pointwise_prompts_in_the_given_share():
    recycled = run(many(MIXED, 1000))
    kinds = [record.kind for record in recycled.judge]
    assert len(kinds) == 1000
    assert set(kinds) == {"pointwise", "pairwise"}
    assert 650 < kinds.count("pairwise") < 750
    assert {r.kind for r in run(many(MIXED, 50), config(pairwise_share=1)).judge} == {"pairwise"}
    assert {r.kind for r in run(many(MIXED, 50), config(pairwise_share=0)).judge} == {"pointwise"}


def test_a_pair_holds_a_right_and_a_wrong_answer_in_the_order_that_gold_and_origin_say():
    recycled = run(many(MIXED, 200), config(pairwise_share=1))
    for record in recycled.judge:
        shown = ["right" if MIXED[index] else "wrong" for index in record.origin.rollouts]
        assert sorted(shown) == ["right", "wrong"]
        assert record.gold == "AB"[shown.index("right")]
        assert record.choices == ("A", "B")
        assert record.origin.quoted_correct is None
        places = [text(record).index(f"answer {index} of") for index in record.origin.rollouts]
        assert places == sorted(places)
    assert 70 < sum(record.gold == "A" for record in recycled.judge) < 130


def test_a_pair_quotes_two_different_answers():
    same = group([1.0, 0.0], texts=[r"\boxed{7}", r"\boxed{ 7 }"])
    assert [r.kind for r in run([same], config(pairwise_share=1)).judge] == ["pointwise"]


def test_half_of_the_reflections_show_the_whole_completion():
    recycled = run(many(WRONG, 1000))
    shows_cot = ["Idea" in text(record) for record in recycled.reflection]
    assert 430 < sum(shows_cot) < 570
    for record, shown in zip(recycled.reflection, shows_cot, strict=True):
        assert TEMPLATER.templates[record.origin.template].shows == ("cot" if shown else "answer")
        assert "wrong answer" in text(record)


@pytest.mark.parametrize("scores", [RIGHT, WRONG, MIXED])
def test_a_reflections_own_group_gives_a_pointwise_prompt_where_asked_and_never_a_reflection(scores):
    groups = [as_recycled(g, "reflection") for g in many(scores, 20)]
    off, on = run(groups), run(groups, config(judge_reflections=True, balance_labels=False))
    assert off.judge + off.reflection + on.reflection == []
    assert [record.kind for record in on.judge] == ["pointwise"] * 20


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
def test_judgments_are_never_recycled(kind):
    groups = [as_recycled(g, kind) for s in (RIGHT, WRONG, MIXED) for g in many(s, 5)]
    recycled = run(groups, config(judge_reflections=True, judge_sees="cot"))
    assert recycled.judge + recycled.reflection == []
    assert not any(recycled.counts.values())


def test_what_is_recycled_can_be_recycled_once_more_only_as_a_judged_reflection():
    first = run(many(WRONG, 10), config(balance_labels=False))
    again = [RolloutGroup(r, group(WRONG).rollouts, group(WRONG).verdicts) for r in first.judge + first.reflection]
    second = run(again, config(judge_reflections=True, balance_labels=False), step=4)
    assert second.reflection == []
    assert {r.id for r in second.judge} == {f"{r.id}@4#pointwise" for r in first.reflection}
    third = [RolloutGroup(r, group(WRONG).rollouts, group(WRONG).verdicts) for r in second.judge]
    assert run(third, config(judge_reflections=True), step=5).judge == []


def as_recycled(source: RolloutGroup, kind: str) -> RolloutGroup:
    """`source` with a record of `kind` that was recycled from some other problem."""
    record = RecycledRecord(**vars(source.record) | {"kind": kind, "origin": PARENT})
    return replace(source, record=record)


# ── mistakes of the released code ──


def test_the_judged_answer_is_the_last_box():
    source = [group([s], texts=[r"First I get \boxed{11111}, no: \boxed{\frac{22222}{3}}."]) for s in (1.0, 0.0)]
    recycled = run(source, config(reflection_cot_share=0))
    assert len(recycled.judge) == 2
    assert len(recycled.reflection) == 1
    for record in recycled.judge + recycled.reflection:
        assert r"\frac{22222}{3}" in text(record)
        assert "11111" not in text(record)


def test_the_whole_quoted_completions_are_kept_in_the_order_of_the_prompt():
    settings = config(judge_sees="mixed", balance_labels=False, pairwise_share=0.5)
    groups = {g.record.id: g for g in many(MIXED, 60) + many(WRONG, 20)}
    recycled = run(list(groups.values()), settings)
    for record in recycled.judge + recycled.reflection:
        source = groups[record.origin.parent_id]
        assert record.origin.completions == tuple(source.rollouts[i].text for i in record.origin.rollouts)
        assert len(record.origin.completions) == (2 if record.kind == "pairwise" else 1)
    assert {record.kind for record in recycled.judge + recycled.reflection} == {"pointwise", "pairwise", "reflection"}


def test_mixed_groups_make_up_for_unanimous_ones():
    pointwise = config(pairwise_share=0)
    for groups in (
        many(RIGHT, 20) + many(MIXED, 20),
        many(WRONG, 20) + many(MIXED, 20),
        many(RIGHT, 7) + many(WRONG, 12) + many(MIXED, 5),
        many(MIXED, 40),
    ):
        found = labels(run(groups, pointwise).judge)
        assert len(found) == len(groups)
        assert sum(found) * 2 == len(groups)


def test_the_excess_of_the_more_frequent_label_is_left_out():
    groups = many(WRONG, 60) + many(RIGHT, 8) + many(MIXED, 10)
    recycled = run(groups, config(max_judge=60, pairwise_share=0))
    found = labels(recycled.judge)
    assert (found.count(True), found.count(False)) == (18, 19)
    assert len(recycled.judge_surplus) == 78 - 37
    assert not any(labels(recycled.judge_surplus))
    # pairs are no part of the balance
    recycled = run(groups, config(max_judge=60, pairwise_share=1))
    assert recycled.counts["pairwise"] == 10
    assert (recycled.counts["pointwise_correct"], recycled.counts["pointwise_incorrect"]) == (8, 9)
    # any cut is even, and what is cut off comes before the excess
    recycled = run(groups, config(max_judge=16, pairwise_share=0))
    assert sum(labels(recycled.judge)) == 8
    assert sum(labels(recycled.judge_surplus)[:21]) == 10
    # a policy that is always right teaches no judge that says so
    assert len(run(many(RIGHT, 30)).judge) == 1


def test_labels_do_not_tell_which_label_or_letter_is_right():
    records = [r for seed in range(20) for r in run(many(MIXED, 40, f"s{seed}"), config(pairwise_share=0)).judge]
    for choices in (("Yes", "No"), ("A", "B")):
        golds = [r.gold for r in records if r.choices == choices]
        assert 0.42 < sum(gold == choices[0] for gold in golds) / len(golds) < 0.58
    letters = [r for r in records if r.choices == ("A", "B")]
    right = [r.gold for r in letters if r.origin.quoted_correct]
    assert 0.4 < right.count("A") / len(right) < 0.6
    assert all((r.gold == "Yes") == r.origin.quoted_correct for r in records if r.choices == ("Yes", "No"))


def test_an_odd_prompt_left_over_takes_either_label_in_turn():
    settings = config(max_judge=5, pairwise_share=0)
    sums = [sum(labels(run(many(MIXED, 20), settings, seed=seed).judge)) for seed in range(60)]
    assert set(sums) == {2, 3}
    assert 15 < sums.count(2) < 45


def test_without_balancing_a_mixed_group_tosses_a_coin():
    settings = config(balance_labels=False, pairwise_share=0)
    assert 430 < sum(labels(run(many(MIXED, 1000), settings).judge)) < 570
    found = run(many(RIGHT, 100) + many(MIXED, 400), settings).judge
    assert 250 < sum(labels(found)) < 350


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_given_share_of_reflections_quotes_a_right_answer(share):
    recycled = run(many(MIXED, 80), config(correct_reflection_share=share))
    assert len(recycled.reflection) == 80
    assert sum(r.origin.quoted_correct for r in recycled.reflection) == 80 * share
    for record in recycled.reflection:
        side = "right" if record.origin.quoted_correct else "wrong"
        assert f"{side} answer {record.origin.rollouts[0]} of" in text(record)


def test_the_share_holds_in_every_cut_and_right_answers_may_come_from_groups_without_a_wrong_one():
    groups = many(WRONG, 60, "w") + many(RIGHT, 40, "r") + many(MIXED, 20, "m")
    recycled = run(groups)
    everything = recycled.reflection
    quoted = [r.origin.quoted_correct for r in everything]
    for n in range(1, len(everything)):
        assert abs(sum(quoted[:n]) - n / 4) < 1
    assert len(quoted) - sum(quoted) <= 80
    assert {r.origin.parent_id[2] for r in everything if r.origin.quoted_correct} == {"r", "m"}
    cut = run(groups, config(max_reflection=32))
    assert cut.reflection == everything[:32]
    assert cut.reflection_surplus == everything[32:]
    assert cut.counts["reflection_correct"] == 8


def test_the_share_is_met_as_far_as_there_are_answers_to_quote():
    no_right = run(many(WRONG, 20)).reflection
    assert [r.origin.quoted_correct for r in no_right] == [False] * 20
    assert all(run(many(RIGHT, 20), seed=seed).reflection == [] for seed in range(20))
    few = run(many(WRONG, 40) + many(RIGHT, 2), config(max_reflection=8))
    assert few.counts["reflection_correct"] == 2
    assert len(few.reflection + few.reflection_surplus) == 42


def test_the_share_holds_over_steps_with_few_reflections():
    one_group = [run([group(MIXED)], seed=seed).reflection[0] for seed in range(400)]
    one_slot = [run(many(MIXED, 9), config(max_reflection=1), seed=seed).reflection[0] for seed in range(400)]
    for reflections in (one_group, one_slot):
        assert 70 < sum(r.origin.quoted_correct for r in reflections) < 130


def test_a_right_answer_is_never_called_wrong():
    recycled = run(many(MIXED, 200), config(correct_reflection_share=1))
    assert {TEMPLATER.templates[r.origin.template].claim for r in recycled.reflection} == {"check"}


@pytest.mark.parametrize(("sees", "least", "most"), [("answer", 0, 0), ("mixed", 140, 260), ("cot", 400, 400)])
def test_judges_see_answers_or_whole_completions(sees, least, most):
    groups = many(MIXED, 200) + many(RIGHT, 100) + many(WRONG, 100)
    recycled = run(groups, config(judge_sees=sees))
    thoughts = [text(record).count("Idea") for record in recycled.judge]
    quotes = [len(record.origin.rollouts) for record in recycled.judge]
    assert all(t in (0, q) for t, q in zip(thoughts, quotes, strict=True))
    assert least <= sum(t > 0 for t in thoughts) <= most


def test_rollouts_cut_off_by_the_length_limit_are_not_evidence():
    cut = [group(WRONG, finish_reason="length"), group(RIGHT, finish_reason="length")]
    recycled = run(cut)
    assert recycled.judge + recycled.reflection == []
    assert recycled.counts["rollouts_truncated"] == 8
    assert recycled.counts["groups_without_evidence"] == 2
    wanted = run(cut, config(recycle_truncated=True))
    assert sorted(labels(wanted.judge)) == [False, True]
    assert wanted.counts["rollouts_truncated"] == 0

    finished = group([0.0, 1.0, 0.0])
    first, *rest = finished.rollouts
    partly = replace(finished, rollouts=(replace(first, finish_reason="length"), *rest))
    for seed in range(20):
        recycled = run([partly], seed=seed)
        assert recycled.counts["groups_mixed"] == recycled.counts["rollouts_truncated"] == 1
        assert all(0 not in r.origin.rollouts for r in recycled.judge + recycled.reflection)


# ── what is evidence ──


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_a_failed_verification_is_no_evidence(status):
    recycled = run([group(WRONG, status=status)])
    assert recycled.judge + recycled.reflection == []
    assert recycled.counts["rollouts_unverified"] == 4


def test_a_partial_score_is_no_evidence():
    recycled = run([group([0.5, 0.99, 0.01])])
    assert recycled.judge + recycled.reflection == []
    assert recycled.counts["rollouts_partial"] == 3
    assert labels(run([group([0.3, 1.0])]).judge) == [True]


def test_a_completion_without_an_answer_is_wrong_and_shown_only_as_a_whole():
    lost = group(WRONG, texts=["I do not know."] * 4, status="unparsable")
    answers = run([lost], config(reflection_cot_share=0))
    assert answers.judge + answers.reflection == []
    assert answers.counts["groups_wrong"] == 1
    whole = run([lost], config(judge_sees="cot", reflection_cot_share=1))
    assert labels(whole.judge) == [False]
    for record in whole.judge + whole.reflection:
        assert "I do not know" in text(record)
    # one with a box that no verifier could read has a final answer
    assert labels(run([group([0.0], texts=[r"\boxed{none of these}"], status="unparsable")]).judge) == [False]


def test_empty_completions_are_not_quoted():
    recycled = run([group([0.0, 0.0], texts=["", "  "])], config(judge_sees="cot", reflection_cot_share=1))
    assert recycled.judge + recycled.reflection == []


def test_an_unverified_group_is_an_error():
    with pytest.raises(ValueError, match="r/raw: 0 verdicts for 4 rollouts"):
        run([replace(group(RIGHT, name="raw"), verdicts=())])


def test_a_record_that_comes_twice_is_recycled_once():
    source = group(WRONG)
    recycled = run([source, source])
    assert len(recycled.judge) == len(recycled.reflection) == 1
    assert recycled.counts["groups_repeated"] == 1


# ── the whole ──


def test_counts():
    groups = many(RIGHT, 3) + many(WRONG, 5) + many(MIXED, 4) + [group([], texts=[])]
    recycled = run(groups, config(pairwise_share=1, max_reflection=6))
    expected = {
        "groups_correct": 3,
        "groups_wrong": 5,
        "groups_mixed": 4,
        "groups_without_evidence": 1,
        "pointwise_correct": 3,
        "pointwise_incorrect": 4,
        "pairwise": 4,
    }
    assert {k: v for k, v in recycled.counts.items() if v and not k.startswith("reflection")} == expected
    assert recycled.counts["reflection_correct"] + recycled.counts["reflection_incorrect"] == 6
    assert set(run([]).counts) == set(recycled.counts)


def test_another_step_or_seed_draws_anew():
    groups = many(MIXED, 30)
    base = run(groups)
    for other in (run(groups, step=4), run(groups, seed=1)):
        assert [r.origin.parent_id for r in other.judge] != [r.origin.parent_id for r in base.judge]
        drawn = {r.origin.parent_id: (r.kind, r.origin.template, r.origin.rollouts) for r in other.judge}
        assert drawn != {r.origin.parent_id: (r.kind, r.origin.template, r.origin.rollouts) for r in base.judge}


def test_records_survive_the_checkpoint():
    recycled = run(many(MIXED, 10) + many(WRONG, 5))
    for record in recycled.judge + recycled.reflection:
        assert record_from_json(record_to_json(record)) == record


SCORES = st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=4)
SETTINGS = st.builds(
    RecycleConfig,
    max_judge=st.integers(0, 12),
    max_reflection=st.integers(0, 12),
    pairwise_share=st.sampled_from([0.0, 0.7, 1.0]),
    judge_sees=st.sampled_from(["answer", "cot", "mixed"]),
    correct_reflection_share=st.sampled_from([0.0, 0.25, 1.0]),
    judge_reflections=st.booleans(),
    balance_labels=st.booleans(),
)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans()), max_size=16), SETTINGS, st.integers(0, 99), st.randoms())
def test_properties(drawn, settings, seed, rng: random.Random):
    groups = [
        group(scores, name=f"p{i}", kind="problem" if problem else "reflection")
        for i, (scores, problem) in enumerate(drawn)
    ]
    recycled = run(groups, settings, seed=seed)
    assert run(rng.sample(groups, len(groups)), settings, seed=seed) == recycled

    scores_of = {g.record.id: g.rewards for g in groups}
    assert len(recycled.judge) <= settings.max_judge
    assert len(recycled.reflection) <= settings.max_reflection
    assert not recycled.reflection_surplus or len(recycled.reflection) == settings.max_reflection
    judge, reflection = recycled.judge + recycled.judge_surplus, recycled.reflection + recycled.reflection_surplus
    # one judge prompt for each group with evidence; one reflection for each problem with a wrong rollout, at least
    eligible = [g for g in groups if g.record.kind == "problem" or settings.judge_reflections]
    assert {r.origin.parent_id for r in judge} == {g.record.id for g in eligible if {0.0, 1.0} & set(g.rewards)}
    with_wrong = {g.record.id for g in groups if g.record.kind == "problem" and 0.0 in g.rewards}
    assert {r.origin.parent_id for r in reflection} >= with_wrong
    assert len({r.id for r in judge + reflection}) == len(judge + reflection)
    for record in judge + reflection:
        scores = [scores_of[record.origin.parent_id][i] for i in record.origin.rollouts]
        if record.kind == "pairwise":
            assert sorted(scores) == [0.0, 1.0]
        else:
            assert scores == [float(record.origin.quoted_correct)]
    if settings.balance_labels:
        for n in range(len(recycled.judge) + 1):
            cut = labels(recycled.judge[:n])
            assert abs(cut.count(True) - cut.count(False)) <= 1
    else:
        assert not recycled.judge_surplus or len(recycled.judge) == settings.max_judge
