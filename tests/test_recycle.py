from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from spark_vl.recycle import Choice, Recycled, choose, deal, find_evidence, recycle, roc_auc, word
from spark_vl.run.codec import record_from_json, record_to_json

TEMPLATER = Templater.load()
IMAGE = ImageRef(data=b"png")
ALL = RecycleConfig(max_judge=10_000, max_reflection=10_000)
"""Defaults without caps."""
ONE_EACH = replace(ALL, pointwise="one_per_group")
"""The rule of the released code."""
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


def choice(groups, settings: RecycleConfig = ALL, *, step=3, seed=0) -> Choice:
    """What is chosen, before it is written."""
    found, _ = find_evidence(groups, settings, step=step, seed=seed)
    return choose([[each.candidate for each in found]], settings, step=step, seed=seed)


def labels(records) -> list[bool]:
    """Whether the quoted answer is right, of the pointwise prompts among `records`."""
    return [r.origin.quoted_correct for r in records if r.kind == "pointwise"]


# ── the table of rules ──


def test_right_and_wrong_answers_to_one_question_give_a_matched_pair():
    source = group(MIXED)
    recycled = run([source], config(pairwise_share=0))
    right, wrong = recycled.judge
    parent = source.record
    assert (right.id, wrong.id) == (f"{parent.id}@3#pointwise_correct", f"{parent.id}@3#pointwise_incorrect")
    assert labels(recycled.judge) == [True, False]
    assert right.origin.pair == wrong.origin.pair != ""
    # The same words but for the answer, so that the labels, too, are one of each.
    assert right.origin.template == wrong.origin.template
    assert right.choices == wrong.choices
    assert {right.gold, wrong.gold} == set(right.choices)
    for judge, side in ((right, "right"), (wrong, "wrong")):
        assert (judge.kind, judge.verifier, judge.recipe) == ("pointwise", "judgment", "r")
        assert judge.question == parent.question
        assert judge.images == (IMAGE,)
        assert (judge.origin.parent_id, judge.origin.step) == (parent.id, 3)
        assert judge.origin.template in TEMPLATER.templates
        (index,) = judge.origin.rollouts
        assert f"{side} answer {index} of" in text(judge)
    quoted = [f"{side} answer {r.origin.rollouts[0]} of" for side, r in (("right", right), ("wrong", wrong))]
    assert text(right).replace(quoted[0], quoted[1]) == text(wrong)


def test_a_wrong_answer_gives_one_reflection():
    source = group(WRONG)
    (reflection,) = run([source]).reflection
    parent = source.record
    assert (reflection.id, reflection.kind) == (f"{parent.id}@3#reflection", "reflection")
    assert (reflection.gold, reflection.verifier, reflection.choices) == (parent.gold, parent.verifier, parent.choices)
    assert reflection.origin.quoted_correct is False
    assert f"wrong answer {reflection.origin.rollouts[0]} of" in text(reflection)


def test_unanimous_groups_give_couples_up_to_their_share_and_nothing_by_themselves():
    assert run(many(RIGHT, 30) + many(WRONG, 30)).judge == []
    groups = many(RIGHT, 30) + many(WRONG, 20) + many(MIXED, 60)
    for share, couples in ((0.0, 0), (0.1, 6.67), (0.2, 15), (0.5, 20)):
        found = run(groups, config(pairwise_share=0, unanimous_share=share)).judge
        unanimous = [record for record in found if record.parent_id not in {g.record.id for g in many(MIXED, 60)}]
        assert len(found) - len(unanimous) == 120
        assert abs(len(unanimous) / 2 - couples) < 1
        assert sum(labels(unanimous)) * 2 == len(unanimous)
        pairs = [record.origin.pair for record in found]
        assert all(pairs.count(pair) == 2 for pair in pairs)
    # Over many steps with one matched pair each, a tenth of the prompts, too.
    few = [group(MIXED), group(RIGHT), group(WRONG)]
    tenth = config(pairwise_share=0, unanimous_share=0.1)
    sizes = [len(run(few, tenth, seed=seed).judge) for seed in range(400)]
    assert set(sizes) == {2, 4}
    assert 25 < sizes.count(4) < 65  # 1/9 of 400 is 44


def test_mixed_groups_give_pairwise_or_two_pointwise_prompts_in_the_given_share():
    groups = many(MIXED, 1000)
    drawn = [unit.kind for unit in choice(groups).judge][:1000]
    assert 650 < drawn.count("pairwise") < 750
    # With room for more, each gives the other kind, too; without, those that come first give their own alone.
    kinds = [record.kind for record in run(groups).judge]
    assert (kinds.count("pairwise"), kinds.count("pointwise")) == (1000, 2000)
    capped = choice(groups, config(max_judge=600)).judge
    assert sum(len(unit.parts) for unit in capped) == 600
    assert len({part.parent_id for unit in capped for part in unit.parts}) == len(capped)
    assert {r.kind for r in run(many(MIXED, 50), config(pairwise_share=1)).judge} == {"pairwise"}
    assert {r.kind for r in run(many(MIXED, 50), config(pairwise_share=0)).judge} == {"pointwise"}
    assert len(run(many(MIXED, 50), config(pairwise_share=1)).judge) == 50
    kinds = [record.kind for record in run(many(MIXED, 1000), ONE_EACH).judge]
    assert len(kinds) == 1000
    assert 650 < kinds.count("pairwise") < 750


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
    assert run([same]).judge == []
    assert [r.kind for r in run([same], replace(ONE_EACH, pairwise_share=1)).judge] == ["pointwise"]


def test_half_of_the_reflections_show_the_whole_completion():
    recycled = run(many(WRONG, 1000))
    shows_cot = ["Idea" in text(record) for record in recycled.reflection]
    assert 430 < sum(shows_cot) < 570
    for record, shown in zip(recycled.reflection, shows_cot, strict=True):
        assert TEMPLATER.templates[record.origin.template].shows == ("cot" if shown else "answer")
        assert "wrong answer" in text(record)


@pytest.mark.parametrize("scores", [RIGHT, WRONG, MIXED])
def test_a_reflections_own_group_gives_a_matched_pair_or_nothing_where_asked_and_never_a_reflection(scores):
    groups = [as_recycled(g, "reflection") for g in many(scores, 20)]
    asked = config(judge_reflections=True, pairwise_share=1)
    off, on = run(groups), run(groups + many(RIGHT, 5, "r") + many(WRONG, 5, "w"), asked)
    assert off.judge + off.reflection == []
    own = [record for record in on.judge if record.parent_id in {g.record.id for g in groups}]
    assert [record.kind for record in own] == ["pointwise"] * (40 if scores == MIXED else 0)
    assert labels(own) == [True, False] * (20 if scores == MIXED else 0)
    one_each = run(groups, replace(ONE_EACH, judge_reflections=True))
    assert [record.kind for record in one_each.judge] == ["pointwise"] * 20


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
def test_judgments_are_never_recycled(kind):
    groups = [as_recycled(g, kind) for s in (RIGHT, WRONG, MIXED) for g in many(s, 5)]
    recycled = run(groups, config(judge_reflections=True, judge_sees="cot"))
    assert recycled.judge + recycled.reflection == []
    assert not any(recycled.counts.values())


def test_what_is_recycled_can_be_recycled_once_more_only_as_a_judged_reflection():
    judging = replace(ONE_EACH, judge_reflections=True)
    first = run(many(WRONG, 10), ONE_EACH)
    again = [RolloutGroup(r, group(WRONG).rollouts, group(WRONG).verdicts) for r in first.judge + first.reflection]
    second = run(again, judging, step=4)
    assert second.reflection == []
    assert {r.id for r in second.judge} == {f"{r.id}@4#pointwise_incorrect" for r in first.reflection}
    third = [RolloutGroup(r, group(WRONG).rollouts, group(WRONG).verdicts) for r in second.judge]
    assert run(third, judging, step=5).judge == []


def as_recycled(source: RolloutGroup, kind: str) -> RolloutGroup:
    """`source` with a record of `kind` that was recycled from some other problem."""
    record = RecycledRecord(**vars(source.record) | {"kind": kind, "origin": PARENT})
    return replace(source, record=record)


# ── mistakes of the released code ──


def test_the_judged_answer_is_the_last_box():
    source = [group([s], texts=[r"First I get \boxed{11111}, no: \boxed{\frac{22222}{3}}."]) for s in (1.0, 0.0)]
    recycled = run(source, replace(ONE_EACH, reflection_cot_share=0))
    assert len(recycled.judge) == 2
    assert len(recycled.reflection) == 1
    for record in recycled.judge + recycled.reflection:
        assert r"\frac{22222}{3}" in text(record)
        assert "11111" not in text(record)


def test_the_whole_quoted_completions_are_kept_in_the_order_of_the_prompt():
    settings = config(judge_sees="mixed", pairwise_share=0.5)
    groups = {g.record.id: g for g in many(MIXED, 60) + many(WRONG, 20)}
    recycled = run(list(groups.values()), settings)
    for record in recycled.judge + recycled.reflection:
        source = groups[record.origin.parent_id]
        assert record.origin.completions == tuple(source.rollouts[i].text for i in record.origin.rollouts)
        assert len(record.origin.completions) == (2 if record.kind == "pairwise" else 1)
    assert {record.kind for record in recycled.judge + recycled.reflection} == {"pointwise", "pairwise", "reflection"}


def test_pairs_are_kept_or_left_out_as_a_whole():
    groups = many(MIXED, 40) + many(RIGHT, 20) + many(WRONG, 20)
    for cap in range(30):
        settings = config(max_judge=cap, unanimous_share=0.2, pairwise_share=0.5)
        found, chosen = run(groups, settings), choice(groups, settings)
        # An odd place goes to the next pairwise prompt, of which there are plenty.
        assert len(found.judge) == cap
        assert found.counts["judge_unfilled"] == 0
        assert found.counts["pointwise_correct"] == found.counts["pointwise_incorrect"]
        kept = {unit.pair for unit in chosen.judge if unit.pair}
        assert not kept & {unit.pair for unit in chosen.surplus}
        assert sum(len(unit.parts) == 2 for unit in chosen.judge) == len(kept)
    settings = config(max_judge=5, pairwise_share=0)
    assert len(run(groups, settings).judge) == 4
    assert run(groups, settings).counts["judge_unfilled"] == 1


def test_too_few_mixed_groups_are_said_and_not_made_up_for():
    found = run(many(RIGHT, 50) + many(WRONG, 10) + many(MIXED, 3), RecycleConfig(pairwise_share=0))
    assert len(found.judge) in (6, 8)
    assert found.counts["judge_unfilled"] == 32 - len(found.judge)
    assert found.counts["groups_mixed"] == 3


def test_difficulty_predicts_the_label_only_as_far_as_the_share_allows():
    steps = []
    for seed in range(20):
        rng = random.Random(seed)
        rates = [rng.betavariate(0.8, 0.5) for _ in range(64)]
        steps.append(
            [group([float(rng.random() < p) for _ in range(8)], name=f"{seed}-{i}") for i, p in enumerate(rates)]
        )

    def auc(settings):
        return area([pair for seed, step in enumerate(steps) for pair in choice(step, settings, seed=seed).labels])

    rates = {g.record.id: sum(g.scores) / 8 for g in steps[0]}
    judged = [r for r in run(steps[0]).judge if r.kind == "pointwise"]
    assert choice(steps[0]).labels == [(rates[r.parent_id], r.origin.quoted_correct) for r in judged]
    capped = RecycleConfig()
    assert auc(replace(capped, unanimous_share=0)) == 0.5
    for share in (0.05, 0.1, 0.3):
        assert auc(replace(capped, unanimous_share=share)) == pytest.approx(0.5 + share - share**2 / 2, abs=0.03)
    assert auc(replace(capped, pointwise="one_per_group")) > 0.9


def area(pairs) -> float:
    """The area under the ROC curve, by its definition: all pairs of a true and a false one."""
    won = [(t > f) + (t == f) / 2 for t, yes in pairs if yes for f, no in pairs if not no]
    return sum(won) / len(won)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=40))
def test_the_area_under_the_roc_curve(pairs):
    both = len({label for _, label in pairs}) == 2
    assert roc_auc(pairs) == (pytest.approx(area(pairs)) if both else None)


def test_labels_do_not_tell_which_label_or_letter_is_right():
    records = [r for seed in range(20) for r in run(many(MIXED, 40, f"s{seed}"), config(pairwise_share=0)).judge]
    for choices in (("Yes", "No"), ("A", "B")):
        golds = [r.gold for r in records if r.choices == choices]
        assert sum(gold == choices[0] for gold in golds) * 2 == len(golds) > 400
    letters = [r for r in records if r.choices == ("A", "B")]
    right = [r.gold for r in letters if r.origin.quoted_correct]
    assert 0.4 < right.count("A") / len(right) < 0.6
    assert all((r.gold == "Yes") == r.origin.quoted_correct for r in records if r.choices == ("Yes", "No"))
    fixed = run(many(MIXED, 80), config(pairwise_share=0, a_is_correct=True)).judge
    fixed = [r for r in fixed if r.choices == ("A", "B")]
    assert len(fixed) > 40
    assert all((r.gold == "A") == r.origin.quoted_correct for r in fixed)


def test_without_matched_pairs_each_group_gives_one_and_a_mixed_one_tosses_a_coin():
    settings = replace(ONE_EACH, pairwise_share=0)
    assert 430 < sum(labels(run(many(MIXED, 1000), settings).judge)) < 570
    found = run(many(RIGHT, 100) + many(WRONG, 50) + many(MIXED, 400), settings)
    assert len(found.judge) == 550
    assert not any(record.origin.pair for record in found.judge)
    assert 250 < sum(labels(found.judge)) < 350
    capped = choice(many(RIGHT, 100), replace(settings, max_judge=32))
    assert (len(capped.judge), len(capped.surplus)) == (32, 68)


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
    chosen = choice(groups, config(max_judge=0, max_reflection=32))
    surplus = [unit.parts[0].parent_id for unit in chosen.surplus if unit.kind == "reflection"]
    assert surplus == [r.parent_id for r in everything[32:]]
    assert cut.counts["reflection_correct"] == 8


def test_the_share_is_met_as_far_as_there_are_answers_to_quote():
    no_right = run(many(WRONG, 20)).reflection
    assert [r.origin.quoted_correct for r in no_right] == [False] * 20
    assert all(run(many(RIGHT, 20), seed=seed).reflection == [] for seed in range(20))
    few = run(many(WRONG, 40) + many(RIGHT, 2), config(max_reflection=8))
    assert few.counts["reflection_correct"] == 2
    assert len(run(many(WRONG, 40) + many(RIGHT, 2)).reflection) == 42


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
    recycled = run(groups, replace(ONE_EACH, judge_sees=sees))
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
    wanted = run(cut, replace(ONE_EACH, recycle_truncated=True))
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
    assert labels(run([group([0.3, 1.0])], ONE_EACH).judge) == [True]


def test_a_completion_without_an_answer_is_wrong_and_shown_only_as_a_whole():
    lost = group(WRONG, texts=["I do not know."] * 4, status="unparsable")
    answers = run([lost], replace(ONE_EACH, reflection_cot_share=0))
    assert answers.judge + answers.reflection == []
    assert answers.counts["groups_wrong"] == 1
    whole = run([lost], replace(ONE_EACH, judge_sees="cot", reflection_cot_share=1))
    assert labels(whole.judge) == [False]
    for record in whole.judge + whole.reflection:
        assert "I do not know" in text(record)
    # one with a box that no verifier could read has a final answer
    boxed = group([0.0], texts=[r"\boxed{none of these}"], status="unparsable")
    assert labels(run([boxed], ONE_EACH).judge) == [False]


def test_empty_completions_are_not_quoted():
    recycled = run([group([0.0, 0.0], texts=["", "  "])], config(judge_sees="cot", reflection_cot_share=1))
    assert recycled.judge + recycled.reflection == []


def test_an_unverified_group_is_an_error():
    with pytest.raises(ValueError, match="r/raw: 0 verdicts for 4 rollouts"):
        run([replace(group(RIGHT, name="raw"), verdicts=())])


def test_a_record_that_comes_twice_is_recycled_once():
    source = group(WRONG)
    recycled = run([source, source], ONE_EACH)
    assert len(recycled.judge) == len(recycled.reflection) == 1
    assert recycled.counts["groups_repeated"] == 1


# ── the whole ──


def test_counts():
    groups = many(RIGHT, 3) + many(WRONG, 5) + many(MIXED, 4) + [group([], texts=[])]
    recycled = run(groups, config(pairwise_share=1, max_judge=6, max_reflection=6))
    expected = {
        "groups_correct": 3,
        "groups_wrong": 5,
        "groups_mixed": 4,
        "groups_without_evidence": 1,
        "pairwise": 4,
        "judge_unfilled": 2,
    }
    assert {k: v for k, v in recycled.counts.items() if v and not k.startswith("reflection")} == expected
    assert recycled.counts["reflection_correct"] + recycled.counts["reflection_incorrect"] == 6
    assert set(run([]).counts) == set(recycled.counts)
    one_each = run(groups, replace(ONE_EACH, pairwise_share=0)).counts
    assert one_each["pointwise_correct"] + one_each["pointwise_incorrect"] == 12


# ── several processes ──


def recycle_together(parts, settings) -> list[list[RecycledRecord]]:
    """What each process is dealt, of the groups [processes][groups] that each has sampled."""
    evidence = [find_evidence(groups, settings, step=3, seed=0)[0] for groups in parts]
    chosen = choose([[each.candidate for each in own] for own in evidence], settings, step=3, seed=0)
    units = chosen.judge + chosen.reflection
    dealt = [[] for _ in parts]
    for unit, to in zip(units, deal(units, [0] * len(parts)), strict=True):
        dealt[to] += [word(part, unit, evidence[part.process], TEMPLATER, settings, step=3) for part in unit.parts]
    return dealt


@pytest.mark.parametrize("settings", [RecycleConfig(), RecycleConfig(max_judge=7, pointwise="one_per_group"), ALL])
@pytest.mark.parametrize("processes", [2, 3, 64])
def test_any_number_of_processes_recycles_what_one_does(settings, processes):
    groups = many(RIGHT, 20) + many(WRONG, 14) + many(MIXED, 30) + [group(MIXED, name=f"{MIXED}-0")]
    dealt = recycle_together([groups[i::processes] for i in range(processes)], settings)
    alone = run(groups[:64], settings)
    everything = {record.id: record for of_process in dealt for record in of_process}
    assert sum(map(len, dealt)) == len(everything)
    assert everything == {record.id: record for record in alone.judge + alone.reflection}
    # Pairs stay together, and all processes have as much to do, of each kind.
    for of_process in dealt:
        pairs = [record.origin.pair for record in of_process if record.origin.pair]
        assert all(pairs.count(pair) == 2 for pair in pairs)
    for kind in ("pointwise", "pairwise", "reflection"):
        counts = [sum(record.kind == kind for record in of_process) for of_process in dealt]
        assert max(counts) - min(counts) <= (2 if settings.pointwise == "matched_pairs" and kind == "pointwise" else 1)
    loads = [len(of_process) for of_process in dealt]
    assert max(loads) - min(loads) <= 3


def test_processes_that_have_more_waiting_get_less():
    units = choice(many(WRONG, 9)).reflection
    assert sorted(deal(units, [0, 0, 0])) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert deal(units[:1], [0]) == [0]
    assert deal(units[:2], [5, 0, 0]) == [1, 2]


@pytest.mark.parametrize("rule", [[], ["--one-per-group"]])
def test_the_simulation_holds_its_bounds(rule):
    script = Path(__file__).parents[1] / "scripts" / "simulations" / "labels.py"
    said = subprocess.run([sys.executable, script, "--steps=6", "--json", *rule], check=True, capture_output=True)
    rows = json.loads(said.stdout)
    assert len(rows) == 12
    for row in rows:
        assert (row["auc"] <= 0.6) == (row["label_difference_max"] <= 1) == (not rule)
        assert row["spread_max"] <= 3
        assert row["pointwise_per_step"] + row["pairwise_per_step"] == 32
        assert row["reflections_per_step"] == 32
        alone = rows[rows.index(row) // 4 * 4]
        assert {**row, "processes": 1, "spread_max": 0} == alone


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
    pointwise=st.sampled_from(["matched_pairs", "one_per_group"]),
    unanimous_share=st.sampled_from([0.0, 0.1, 0.5]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, st.booleans()), max_size=16), SETTINGS, st.integers(0, 99), st.randoms())
def test_properties(drawn, settings, seed, rng: random.Random):
    groups = [
        group(scores, name=f"p{i}", kind="problem" if problem else "reflection")
        for i, (scores, problem) in enumerate(drawn)
    ]
    recycled, uncapped = (
        run(groups, each, seed=seed) for each in (settings, replace(settings, max_judge=999, max_reflection=999))
    )
    assert run(rng.sample(groups, len(groups)), settings, seed=seed) == recycled

    scores_of = {g.record.id: g.rewards for g in groups}
    assert len(recycled.judge) <= settings.max_judge
    assert len(recycled.reflection) == min(settings.max_reflection, len(uncapped.reflection))
    eligible = [g for g in groups if g.record.kind == "problem" or settings.judge_reflections]
    assert recycled.counts["judge_unfilled"] == (settings.max_judge - len(recycled.judge) if eligible else 0)
    everything = uncapped.judge + uncapped.reflection
    assert len({r.id for r in everything}) == len(everything)
    assert {r.id for r in recycled.judge + recycled.reflection} <= {r.id for r in everything}
    # one reflection for each problem with a wrong rollout, at least
    with_wrong = {g.record.id for g in groups if g.record.kind == "problem" and 0.0 in g.rewards}
    assert {r.origin.parent_id for r in uncapped.reflection} >= with_wrong
    for record in everything:
        scores = [scores_of[record.origin.parent_id][i] for i in record.origin.rollouts]
        if record.kind == "pairwise":
            assert sorted(scores) == [0.0, 1.0]
        else:
            assert scores == [float(record.origin.quoted_correct)]
    parents = [r.origin.parent_id for r in uncapped.judge]
    if settings.pointwise == "one_per_group":
        assert len(recycled.judge) == min(settings.max_judge, len(uncapped.judge))
        assert sorted(parents) == sorted(g.record.id for g in eligible if {0.0, 1.0} & set(g.rewards))
        return
    mixed = {g.record.id for g in eligible if {0.0, 1.0} <= set(g.rewards)}
    assert set(parents) >= mixed
    for judge in (recycled.judge, uncapped.judge):
        assert sum(labels(judge)) * 2 == len(labels(judge))
        of_unanimous = [r for r in judge if r.kind == "pointwise" and r.parent_id not in mixed]
        assert all(r.parent_id in {g.record.id for g in groups if g.record.kind == "problem"} for r in of_unanimous)
        pairs = [r.origin.pair for r in judge if r.kind == "pointwise"]
        assert all(pairs.count(pair) == 2 for pair in pairs)
