"""Prompts without a right answer, which the policy judges itself: verdicts and guard against numbers made by hand."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from spark_vl import setup
from spark_vl.config import ConfigError, EvaluationConfig, RecycleConfig, RolloutConfig, SelfJudgeConfig
from spark_vl.data.problems import check, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.demo import digits
from spark_vl.evaluation import Evaluator
from spark_vl.log import RunLog, group_metrics
from spark_vl.offline import recycle_rollouts
from spark_vl.records import Rollout, RolloutGroup, Verdict
from spark_vl.recycle import recycle
from spark_vl.reward import AveragedWeights, Measurement, SelfJudge
from spark_vl.rollout import Collector, Sampling
from spark_vl.setup import load_trainer
from tests.conftest import make_image, make_record
from tests.test_reward import TEMPLATER, Refusing, Scripted, against, in_favor, shown, votes
from tests.test_trainer import make_config, metrics, weights

HALF = "spark_vl/demo/digits_half.yaml"


class Log:
    """Keeps what it is told."""

    def __init__(self):
        self.means, self.counts = {}, {}

    def add(self, name, total, weight=1.0):
        was = self.means.get(name, (0.0, 0.0))
        self.means[name] = was[0] + total, was[1] + weight

    def count(self, group, counts):
        for name, n in counts.items():
            self.counts[f"{group}/{name}"] = self.counts.get(f"{group}/{name}", 0) + n

    def phase(self, name):
        pass

    def mean(self, name):
        total, weight = self.means[f"self_judge/{name}"]
        return total / weight


def self_judge(processor, pool, reply, held_out=(), average=None, **settings):
    """The stage, whose model says `reply(record, i)`."""
    config = SelfJudgeConfig(**settings)
    judge = votes(processor, reply, samples=config.votes)
    return SelfJudge(
        judge,
        held_out,
        Measurement(),
        engine=judge.engine,
        average=average or AveragedWeights(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), None),
        verifiers=pool,
        accelerator=Accelerator(),
        sampling=Sampling(max_new_tokens=8),
        config=config,
        log=Log(),
        seed=0,
    )


def group_of(*texts, **fields):
    record = make_record("p", "Which?", gold="", verifier="self_judge", **fields)
    return RolloutGroup(record, tuple(Rollout((1,), (0.0,), text, "stop") for text in texts))


def asked_about(record):
    return shown(record).split('"')[1]


# ── verdicts ──


def test_an_answer_is_worth_the_share_of_votes_for_it(processor, pool):
    """Of four: 7 gets three, 3 gets one, and of 5 no vote can be read. Equal answers are asked about once."""
    said = {"7": [in_favor] * 3 + [against], "3": [against] * 3 + [in_favor], "5": [lambda record: "?"] * 4}
    stage = self_judge(processor, pool, lambda record, i: said[asked_about(record)][i](record))
    group = group_of(r"\boxed{7}", r"so \boxed{ 7 }", r"\boxed{3}", r"\boxed{5}", "no box")
    [judged] = stage.verified([group], seed="s")
    assert judged.scores == [0.75, 0.75, 0.25, 0.5, 0.0]  # 5: the mean of the others, so that nothing is learned
    assert [verdict.status for verdict in judged.verdicts] == ["ok", "ok", "ok", "unparsable", "unparsable"]
    assert [asked_about(record) for record in stage.judge.engine.asked] == ["5", "3", "7"]
    assert stage.log.mean("unparsable") == pytest.approx(1 / 3)
    assert stage.log.mean("reward") == pytest.approx(2.25 / 5)
    assert stage.log.counts == {"self_judge/groups": 1}


def test_verdicts_that_differ_between_orders_count_one_half(processor, pool):
    """9 is better than all; between 3 and 5 the judge goes by the place."""

    def reply(record, i):
        answers = [part.partition('"')[0] for part in shown(record).split(': "')[1:]]
        return rf"\boxed{{{'AB'[answers.index('9')] if '9' in answers else 'A'}}}"

    stage = self_judge(processor, pool, reply, ask="pairwise", votes=1)
    [judged] = stage.verified([group_of(r"\boxed{3}", r"\boxed{9}", r"\boxed{5}")], seed="s")
    assert judged.scores == [0.25, 1.0, 0.25]
    assert len(stage.judge.engine.asked) == 6
    assert stage.log.mean("inconsistent") == pytest.approx(1 / 3)
    [alike] = stage.verified([group_of(r"\boxed{3}", r"\boxed{3}")], seed="s")
    assert (alike.scores, alike.zero_variance) == ([0.5, 0.5], True)


def test_weights_and_shaping_terms_are_those_of_the_record(processor, pool):
    stage = self_judge(processor, pool, lambda record, i: in_favor(record))
    [judged] = stage.verified([group_of(r"\boxed{7}", "none", weight=2.0, shaping=(("format", 0.5),))], seed="s")
    assert judged.rewards == [2.5, 0.0]


def test_what_is_too_long_to_ask_about_is_not_judged(processor, pool):
    stage = self_judge(processor, pool, lambda record, i: in_favor(record))
    [judged] = stage.verified([group_of(r"\boxed{7}", rf"\boxed{{{'7 ' * 5000}}}")], seed="s")
    assert judged.scores == [1.0, 1.0]
    assert [verdict.status for verdict in judged.verdicts] == ["ok", "unparsable"]


def test_what_the_engine_refuses_is_not_judged(processor, pool):
    stage = self_judge(processor, pool, None)
    stage.judge.engine = Refusing(processor, lambda record, i: in_favor(record))
    [judged] = stage.verified([group_of(r"\boxed{7}", r"\boxed{bad}")], seed="s")
    assert [verdict.status for verdict in judged.verdicts] == ["ok", "unparsable"]


# ── the guard ──


def known(n):
    """Problems whose answers are their numbers."""
    return [make_record(f"p{i}", make_image(i), f"Which? {i}", gold=str(i), verifier="number") for i in range(n)]


def replies(record, i, *, solves, judges):
    """Of a policy that gives a right and a wrong answer to problems where `solves`, else wrong ones, and calls the
    answers correct that `judges` says."""
    if record.kind == "problem":
        return rf"\boxed{{{record.gold if solves(record) and i == 0 else 77}}}"
    return in_favor(record) if judges(asked_about(record)) else against(record)


@pytest.mark.parametrize(
    ("judges", "accuracy"),
    [
        (lambda answer: answer != "77", 1.0),
        (lambda answer: True, 0.5),  # always "correct": a coin, whatever the share of right answers
        (lambda answer: answer in ("0", "77"), 0.25),  # one of two right answers, and no wrong one
    ],
)
def test_the_judge_is_measured_on_right_and_wrong_answers_alike(processor, pool, judges, accuracy):
    """Four problems: both answers to 0 and 1, only wrong ones to 2 and 3."""

    def reply(record, i):
        return replies(record, i, solves=lambda record: record.gold in "01", judges=judges)

    stage = self_judge(processor, pool, reply, known(4), min_accuracy=0.75, samples=2)
    assert stage.is_allowed() == (accuracy >= 0.75)
    assert stage.last == Measurement(accuracy, 6)
    assert stage.log.mean("balanced_accuracy") == accuracy
    assert (stage.log.mean("used"), stage.log.mean("measured")) == (accuracy >= 0.75, 6)


def test_pairs_are_measured_in_both_orders(processor, pool):
    def reply(record, i):
        return replies(record, i, solves=lambda record: True, judges=None) if record.kind == "problem" else r"\boxed{A}"

    stage = self_judge(processor, pool, reply, known(3), ask="pairwise", samples=2)
    assert not stage.is_allowed()
    assert stage.last == Measurement(0.5, 3)


def test_a_judge_that_cannot_be_measured_is_not_believed(processor, pool):
    def reply(record, i):
        return rf"\boxed{{{record.gold}}}" if record.kind == "problem" else in_favor(record)

    stage = self_judge(processor, pool, reply, known(3), min_accuracy=0.0)
    assert not stage.is_allowed()
    assert stage.last == Measurement(None, 3)
    assert "self_judge/balanced_accuracy" not in stage.log.means


def test_it_is_measured_before_the_first_step_and_then_every_so_often(processor, pool):
    stage = self_judge(processor, pool, lambda record, i: r"\boxed{77}", known(1), every=3)
    measured = []
    stage._measure = lambda step: (measured.append(step), setattr(stage.last, "answers", 1))
    for step in range(1, 7):
        stage.is_allowed()
        stage.on_metrics(step, {})
    assert measured == [0, 3, 6]


def test_while_it_is_not_allowed_its_prompts_are_left_out(processor, pool, tmp_path):
    def reply(record, i):
        return replies(record, i, solves=lambda record: True, judges=lambda answer: good and answer != "77")

    engine = Scripted(processor, reply)
    stage = self_judge(processor, pool, reply, known(2), samples=2)
    settings = {"verifiers": pool, "accelerator": Accelerator(), "sampling": Sampling(max_new_tokens=8), "n": 2}
    settings |= {"engine": engine, "log": RunLog(Accelerator(), tmp_path, steps=1)}
    settings |= {"refill_rounds": {}, "refused": None}
    own, verified = make_record("own", "Which?", gold="", verifier="self_judge"), known(1)[0]
    prompts = [processor.process(own), processor.process(verified), processor.process(own)]
    for is_good, expected in ((False, ["p0"]), (True, ["own", "p0", "own"])):
        good = is_good
        stage.last = Measurement()
        scored = Collector(**settings, self_judge=stage).sample_and_verify(prompts, seed="s")
        assert [group.record.id for _, group in scored] == expected
        assert all(prompt.record is group.record for prompt, group in scored)
        assert {tuple(group.scores) for _, group in scored if group.record.id == "p0"} == {(1.0, 0.0)}
    assert scored[0][1].verdicts[1] == Verdict(0.0, "77")
    with pytest.raises(ConfigError, match=r"self_judge\.recipes: is empty, and own has the verifier self_judge"):
        Collector(**settings).sample_and_verify(prompts, seed="s")


# ── an averaged judge ──


def steps(n, decay):
    """A weight after each of `n` updates of a real optimizer, and what its average is then, with the optimizer."""
    weight, frozen = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight, frozen], lr=0.3)
    average = AveragedWeights(optimizer, decay)
    was = []
    for _ in range(n):
        optimizer.zero_grad()
        (weight**3).sum().backward()
        optimizer.step()
        average.update()
        was.append(weight.detach().clone())
    return weight, was, average


def test_the_average_is_that_of_the_weights_after_each_step():
    weight, was, average = steps(4, 0.75)
    expected = was[0]
    for now in was[1:]:
        expected = 0.75 * expected + 0.25 * now
    storage = weight.data_ptr()
    with average.in_use():
        torch.testing.assert_close(weight.detach(), expected)
    assert weight.equal(was[-1])
    with pytest.raises(RuntimeError, match="stopped"), average.in_use():
        raise RuntimeError("stopped")
    assert weight.equal(was[-1])
    assert weight.data_ptr() == storage
    plain, _, none = steps(4, None)
    assert plain.equal(weight), "the average changes no update"
    with none.in_use():
        assert plain.equal(weight)
    average.decay = None
    average.update()
    assert all("average" not in state for state in average.optimizer.state.values())


def test_the_average_judges_and_the_policy_answers(processor, pool):
    weight, was, average = steps(3, 0.5)
    seen = {"problem": set(), "pointwise": set()}

    def reply(record, i):
        seen[record.kind].add(tuple(weight.tolist()))
        return replies(record, i, solves=lambda record: True, judges=lambda answer: answer != "77")

    stage = self_judge(processor, pool, reply, known(2), average, every=1)
    with average.in_use():
        mean = tuple(weight.tolist())
    assert stage.is_allowed()
    stage.verified([group_of(r"\boxed{7}")], seed="s")
    assert seen == {"problem": {tuple(was[-1].tolist())}, "pointwise": {mean}}
    stage.on_metrics(4, {})
    with average.in_use():
        assert tuple(weight.tolist()) != mean, "the weights after a step are taken in"


def test_where_there_is_no_average_it_is_said(tmp_path, monkeypatch, capsys):
    settings = ["--self_judge.average=0.9", "--self_judge.recipes=[digits]", "--steps=1"]
    served = ["--rollout.engine=vllm", "--rollout.vllm.mode=server", "--rollout.vllm.servers=[http://localhost:9]"]
    with pytest.raises(SystemExit):
        make_config(tmp_path, *settings, *served)
    assert "self_judge.average: is 0.9, but rollout.engine: vllm has" in capsys.readouterr().err
    monkeypatch.setattr(setup, "strategy", lambda accelerator: "fsdp2")
    with pytest.raises(ConfigError, match=r"self_judge\.average: is 0\.9, but weights under fsdp2 are sharded"):
        load_trainer(make_config(tmp_path, *settings))


# ── what it is not ──


def test_nothing_that_was_self_judged_is_evidence_or_a_figure():
    texts = (r"\boxed{7}", r"\boxed{3}")
    verdicts = (Verdict(1.0, "7"), Verdict(0.0, "3"))
    own = group_of(*texts).verified(verdicts)
    config = RecycleConfig(recycle_truncated=True)
    found = recycle([own], TEMPLATER, config, step=1, seed=0)
    assert (found.judge, found.reflection) == ([], [])
    truth = RolloutGroup(make_record("q", "Which?", gold="7"), own.rollouts, verdicts)
    assert recycle([truth], TEMPLATER, config, step=1, seed=0).judge, "evidence is recycled"
    assert set(group_metrics([own]).result()) == {"rollout/completions", "rollout/tokens"}


def recipe(tmp_path, rows, **fields):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": {"jsonl": str(tmp_path)}, "splits": {"train": "rows.jsonl", "test": "rows.jsonl"}}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"name": "own", "description": "x", "license": "MIT", **source, **fields}))
    return file


def test_a_recipe_may_have_no_answers(tmp_path, pool, processor):
    rows = [{"q": "Which?", "o": ["red", "blue"]}, {"q": "Why?", "o": None}]
    file = recipe(tmp_path, rows, columns={"question": "q", "choices": "o"}, verifier="self_judge")
    opened = open_recipe(load_recipe(file), "train", TEMPLATER)
    found = list(check(opened, pool))
    assert [(record.verifier, record.gold, len(record.choices)) for record in found] == [
        ("self_judge", "", 2),
        ("self_judge", "", 0),
    ]
    for columns, fields in [
        ({}, {"verifier": "math"}),
        ({"verifier": "q"}, {}),
        ({"verifier": "q"}, {"verifier": "math"}),
    ]:
        with pytest.raises(ValueError, match=r"columns\.answer: is missing"):
            load_recipe(recipe(tmp_path, rows, columns={"question": "q", **columns}, **fields))
    settings = {"self_judge": {"votes": 2}}
    file = recipe(tmp_path, rows, columns={"question": "q"}, verifier="self_judge", settings=settings)
    with pytest.raises(ValueError, match="settings: self_judge has none here"):
        load_recipe(file)
    file = recipe(tmp_path, rows, columns={"question": "q"}, verifier="self_judge")
    evaluator = Evaluator(EvaluationConfig(recipes=[str(file)]), TEMPLATER, rollout=RolloutConfig(), seed=0)
    with pytest.raises(ConfigError, match="none of its 2 rows can be evaluated on"):
        evaluator(None, processor, pool)


def test_half_of_the_digits_hide_their_answers(pool):
    opened = open_recipe(load_recipe(HALF), "train", TEMPLATER)
    found = [opened[i] for i in range(20)]
    assert [record.verifier for record in found] == ["number", "self_judge"] * 10
    assert [record.gold for record in found[::2]] == [digits.problem("train", i).answer for i in range(0, 20, 2)]
    assert {record.gold for record in found[1::2]} == {""}
    verified = open_recipe(load_recipe("spark_vl/demo/digits_half_verified.yaml"), "train", TEMPLATER)
    assert len(verified) == len(opened) / 2
    assert verified[3].question == found[6].question
    for split in ("validation", "test"):
        held_out = open_recipe(load_recipe(HALF), split, TEMPLATER)
        assert {held_out[i].verifier for i in range(10)} == {"number"}


# ── a run ──


def test_a_weight_has_no_meaning_for_what_is_held_out(tmp_path):
    settings = (f"--data.recipes=[{HALF}]", "--self_judge.recipes=[digits?weight=2]")
    with pytest.raises(ConfigError, match=r"self_judge\.recipes: recipe digits: weight: .*in data\.recipes only"):
        load_trainer(make_config(tmp_path, *settings))


@pytest.mark.parametrize("average", ["null", "0.5"])
def test_a_run_judges_itself_and_resumes_as_if_it_had_not_stopped(tmp_path, average):
    settings = [f"--data.recipes=[{HALF}]", "--self_judge.recipes=[digits]", "--self_judge.problems=8"]
    settings += ["--self_judge.min_accuracy=0.1", "--self_judge.every=1", "--self_judge.votes=1", "--steps=2"]
    settings += ["--checkpoint.every=1", "--checkpoint.save_total_limit=2"]
    settings.append(f"--self_judge.average={average}")
    load_trainer(make_config(tmp_path / "whole", *settings)).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    first = str(tmp_path / "cut" / "checkpoints" / "step-000001")
    load_trainer(make_config(tmp_path / "cut", *settings), resume=first).train()
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == whole
    for name, value in weights(tmp_path / "whole").items():
        assert value.equal(weights(tmp_path / "cut")[name]), name
    kept = [
        load_file(tmp_path / name / "checkpoints" / "step-000002" / "optimizer.safetensors")
        for name in ("whole", "cut")
    ]
    averages = {name for name in kept[0] if name.endswith(".average")}
    assert bool(averages) == (average != "null")
    assert all(kept[0][name].equal(kept[1][name]) for name in averages)
    assert [line["self_judge/used"] for line in whole] == [1.0] * 2
    first, second = ((line["self_judge/balanced_accuracy"], line["self_judge/measured"]) for line in whole)
    assert first != second, "it is measured after each step"
    assert sum(line["self_judge/groups"] for line in whole) > 0

    settings = {"templater": TEMPLATER, "config": RecycleConfig(), "seed": 0}
    counts = recycle_rollouts(tmp_path / "whole", tmp_path / "anew", **settings)
    assert counts["unusable"] == 0
    assert counts["pointwise"] + counts["pairwise"] > 0
