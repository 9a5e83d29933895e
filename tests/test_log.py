"""Metrics of groups against numbers worked out by hand, and the files that a run writes."""

from __future__ import annotations

import json
import pickle
import time
from math import log

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from spark_vl.log import Means, RunLog, add_balanced_accuracy, group_metrics
from spark_vl.records import Origin, Rollout, RolloutGroup, Verdict
from tests.conftest import make_record


def make_group(record, scores, *, parsed=None, logprobs=None, finish_reason=None, status=None) -> RolloutGroup:
    """A group with a completion for each of `scores`; the other arguments have one item for each, too."""
    n = len(scores)
    logprobs = logprobs or [(-1.0,)] * n
    rollouts = [
        Rollout(tuple(range(len(lp))), tuple(lp), f"text {i}", f)
        for i, (lp, f) in enumerate(zip(logprobs, finish_reason or ["stop"] * n, strict=True))
    ]
    verdicts = [Verdict(*v) for v in zip(scores, parsed or ["5"] * n, status or ["ok"] * n, strict=True)]
    return RolloutGroup(record, tuple(rollouts), tuple(verdicts))


def make_pointwise(name, *, correct: bool, says, labels=("Yes", "No"), gold=None) -> RolloutGroup:
    """A pointwise group whose completions say `says` (None: nothing that can be read)."""
    gold = gold or labels[0 if correct else 1]
    origin = Origin("p", 1, "t", (0,), correct)
    record = make_record(name, "right?", gold=gold, kind="pointwise", choices=labels, origin=origin)
    status = ["unparsable" if label is None else "ok" for label in says]
    return make_group(record, [float(label == gold) for label in says], parsed=says, status=status)


def make_pairwise(name, *, gold: str, says) -> RolloutGroup:
    origin = Origin("p", 1, "t", (0, 1))
    record = make_record(name, "which?", gold=gold, kind="pairwise", choices=("A", "B"), origin=origin)
    return make_group(record, [float(label == gold) for label in says], parsed=says)


def test_problems_by_hand():
    mixed = make_group(
        make_record("p1", "2+3?"),
        [1.0, 0.0, 0.0, 0.5],
        parsed=["5", "4", None, "6"],
        logprobs=[(log(0.5),), (log(0.5), log(0.25)), (log(0.125),), (0.0, 0.0)],
        finish_reason=["stop", "stop", "length", "stop"],
        status=["ok", "ok", "unparsable", "timeout"],
    )
    flat_group = make_group(make_record("p2", "1+1?"), [1.0, 1.0], status=["ok", "error"], logprobs=[(log(0.5),)] * 2)
    assert group_metrics([mixed, flat_group]).result() == pytest.approx(
        {
            "problem/reward": 3.5 / 6,
            "problem/score": 3.5 / 6,
            "problem/length": 8 / 6,
            # of tokens, not of completions: seven halvings and two certain tokens in eight tokens, and two halvings
            "problem/entropy": (1 + 1 + 2 + 3 + 0 + 0 + 1 + 1) * log(2) / 8,
            "problem/truncated": 1 / 6,
            "problem/unparsable": 1 / 6,
            "problem/failed": 2 / 6,
            "problem/zero_variance": 1 / 2,
            "rollout/completions": 6,
            "rollout/tokens": 8,
        }
    )


def test_kinds_are_kept_apart_and_nothing_gives_nothing():
    groups = [
        make_group(make_record("p", "2+3?"), [1.0]),
        make_group(make_record("r", "again?", kind="reflection", origin=Origin("p", 1, "t", (0,), False)), [0.0]),
    ]
    metrics = group_metrics(groups).result()
    assert (metrics["problem/reward"], metrics["reflection/reward"]) == (1, 0)
    assert not [name for name in metrics if "accuracy" in name or "says" in name]
    assert group_metrics([]).result() == {}


def test_a_judge_that_always_says_yes_is_a_coin():
    """Nine in ten answers are right, so it earns 0.9, has no gradient, and knows nothing."""
    groups = [make_pointwise(f"j{i}", correct=i > 0, says=["Yes"] * 4) for i in range(10)]
    metrics = group_metrics(groups).result()
    add_balanced_accuracy(metrics)
    assert metrics["pointwise/reward"] == pytest.approx(0.9)
    assert metrics["pointwise/balanced_accuracy"] == 0.5
    assert metrics["pointwise/accuracy_correct"] == 1
    assert metrics["pointwise/accuracy_incorrect"] == 0
    assert metrics["pointwise/says_correct"] == 1
    assert metrics["pointwise/zero_variance"] == 1


def test_pointwise_accuracy_counts_what_is_said_not_which_letter():
    groups = [
        make_pointwise("yes", correct=True, says=["Yes", "No", None, "Yes"]),
        # Here B is the option that calls the answer correct, then A.
        make_pointwise("b", correct=False, says=["A", "B", None, None], labels=("A", "B"), gold="A"),
        make_pointwise("a", correct=True, says=["A", "B", "B", "B"], labels=("A", "B"), gold="A"),
    ]
    metrics = group_metrics(groups).result()
    add_balanced_accuracy(metrics)
    assert metrics["pointwise/accuracy_correct"] == 3 / 8
    assert metrics["pointwise/accuracy_incorrect"] == 1 / 4
    assert metrics["pointwise/balanced_accuracy"] == (3 / 8 + 1 / 4) / 2
    assert metrics["pointwise/says_correct"] == 4 / 12  # a reply that cannot be read does not say it
    assert metrics["pointwise/unparsable"] == 3 / 12


def test_pairwise_accuracy_by_position():
    groups = [make_pairwise("1", gold="A", says=["A", "A", "B"]), make_pairwise("2", gold="B", says=["A"])]
    metrics = group_metrics(groups).result()
    add_balanced_accuracy(metrics)
    assert metrics["pairwise/says_A"] == 3 / 4
    assert metrics["pairwise/accuracy_A"] == pytest.approx(2 / 3)
    assert metrics["pairwise/accuracy_B"] == 0
    assert metrics["pairwise/balanced_accuracy"] == pytest.approx(1 / 3)


def test_there_is_no_balanced_accuracy_of_one_label():
    metrics = group_metrics([make_pointwise("j", correct=True, says=["Yes", "Yes"])]).result()
    add_balanced_accuracy(metrics)
    assert metrics["pointwise/accuracy_correct"] == 1
    assert "pointwise/balanced_accuracy" not in metrics


def test_means_add_up_over_parts_of_any_size():
    parts = [[1.0], [2.0, 6.0, 7.0], []]
    total = Means()
    for part in parts:
        means = Means()
        means.add("x", sum(part), len(part))
        means.count("n", len(part))
        total.update(means)
    total.add("never", 0.0, 0.0)
    assert total.result() == {"x": 4.0, "n": 4}
    assert total.over_processes().result() == {"x": 4.0, "n": 4}
    assert pickle.loads(pickle.dumps(total)).result() == total.result(), "gathering over processes pickles"


# ── the files of a run ──

STEP = {"problem/reward": 0.25, "pairwise/reward": 0.5, "time/step": 1.26}


@pytest.fixture
def open_log(tmp_path):
    """`open_log(resumed)`: the log of a run of 9 steps that goes on after step `resumed`; None: it begins."""
    return lambda resumed=None, **kwargs: RunLog(Accelerator(cpu=True), tmp_path, steps=9, resumed=resumed, **kwargs)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_resumed_run_drops_later_lines_and_half_a_line(tmp_path, open_log):
    metrics = tmp_path / "metrics.jsonl"
    log = open_log()
    with log:
        for step in (1, 2, 3, 4):
            log.on_metrics(step, STEP)
            log.evaluation(step, {"problem": {"value": 0.5}})
    before = metrics.read_bytes()
    with metrics.open("ab") as file:
        file.write('{"step": 5, "text": "½'.encode()[:-1])  # killed inside a character

    log = open_log(resumed=2)
    assert [line["step"] for line in lines(metrics)] == [1, 2]
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [1, 2]
    with log:
        log.on_metrics(3, STEP)
        log.on_metrics(4, STEP)
    assert metrics.read_bytes() == before


def test_a_run_that_begins_keeps_nothing_and_a_resumed_one_its_evaluation_at_step_0(tmp_path, open_log):
    evaluations = tmp_path / "evaluations.jsonl"
    open_log().evaluation(0, {"problem": {"value": 0.5}})
    open_log(resumed=0)
    assert len(lines(evaluations)) == 1
    open_log()
    assert lines(evaluations) == []


def test_each_phase_and_the_progress_in_it_are_reported_with_their_step(open_log):
    reported = []
    with open_log(on_progress=lambda step, phase: reported.append((step, phase))) as log:
        log.phase("loading")
        log.begin_step(1)
        log.progress("sampling", 4)(3)
    assert reported == [(0, "loading"), (1, "sampling 0/4"), (1, "sampling 3/4")]


def test_the_metrics_of_a_step_are_gathered_and_begin_anew(open_log):
    group = make_group(make_record("p", "2+3?"), [1.0, 0.0])
    with open_log() as log:
        log.begin_step(1)
        log.on_groups(1, [(None, group)])  # of a step that is abandoned
        log.begin_step(1)
        for _ in range(2):
            with log.timed("a"):
                time.sleep(0.01)
        log.on_groups(1, [(None, group)])
        log.add("update/loss", 6.0, 4.0)
        log.count("recycle", {"pairwise": 2})
        log.count("recycle", {"pairwise": 1})
        metrics = log.end_step({"data/epoch": 0.5})
        log.begin_step(2)
        nothing = log.end_step({})
    assert metrics.pop("time/a") >= 0.02
    known = {name: metrics.pop(name) for name in ("update/loss", "recycle/pairwise", "data/epoch")}
    assert known == {"update/loss": 1.5, "recycle/pairwise": 3, "data/epoch": 0.5}
    assert metrics == group_metrics([group]).result()
    assert nothing == {}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_line_of_a_finished_step_is_dropped_too(tmp_path, open_log, cut):
    log = open_log()
    log.on_metrics(1, STEP)
    log.on_metrics(2, STEP)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-cut])
    open_log(resumed=2)
    assert [line["step"] for line in lines(metrics)] == [1]


def test_steps_are_plain_lines_when_not_on_a_terminal(open_log, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    log = open_log()
    results = {f"figure_{i}": {"value": 0.25 + i / 8, "low": 0.0, "high": 1.0, "n": 8} for i in range(4)}
    with log:
        log.phase("loading")
        log.progress("sampling", 4)(3)
        log.on_metrics(3, STEP)
        log.evaluation(3, results)
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9  reward: problem 0.25  pairwise 0.50  1.3 s",
        "evaluation after 3 steps: figure_0 0.25  figure_1 0.38  figure_2 0.50  figure_3 0.62",
    ]


def test_a_pipe_gets_a_line_of_progress_every_half_minute_without_another(open_log, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with open_log() as log:
        log.begin_step(3)
        advance = log.progress("evaluating, greedy", 900)
        for second in range(90):
            clock[0] = second + 1
            advance(10)
            if second == 40:
                log.say("something else")
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9  evaluating, greedy 300/900",
        "something else",
        "step 3/9  evaluating, greedy 710/900",
    ]


def test_a_run_that_learns_nothing_is_said_once(open_log, capsys):
    log = open_log()
    for step, shares in enumerate([(1.0, 1.0), (1.0, 0.9), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)], 1):
        log.on_metrics(step, STEP | dict(zip(("problem/zero_variance", "pairwise/zero_variance"), shares, strict=True)))
        assert ("nothing is learned: the problems" in capsys.readouterr().out) == (step == 5), step


def test_a_kind_of_which_no_answer_can_be_read_is_named_once(open_log, tmp_path, capsys):
    log = open_log()
    shares = [1.0, 1.0, 0.5, 1.0, None, 1.0, 1.0, 1.0]  # null: a step without such prompts
    for step, share in enumerate(shares, 1):
        log.on_metrics(step, STEP | ({} if share is None else {"reflection/unparsable": share}))
        warned = "no completion of a reflection prompt" in capsys.readouterr().out
        assert warned == (step == 7), step


def test_a_terminal_shows_the_progress(open_log, capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with open_log(resumed=2) as log:
        log.phase("loading")
    assert "2/9" in capsys.readouterr().out, "a resumed run does not begin at 0"
    with open_log(resumed=2) as log:
        log.on_metrics(3, STEP)
        sampled = log.progress("sampling", 4)
        sampled(1)
        sampled(2)
    shown = capsys.readouterr().out
    assert "3/9" in shown
    assert "sampling 3/4" in shown
    assert "problem 0.25  pairwise 0.50" in shown
    assert "step 3/9" not in shown


def test_a_verifier_that_fails_everywhere_is_said_once(open_log, capsys):
    """With the first reason, on one line, whatever the verifier wrote. One that worked somewhere is not said."""
    fails = [
        Verdict(0.0, None, "error", f"{'x' * 50}[/red]\n\ud83d\x1b[31m{'y' * 500}"),
        Verdict(0.0, None, "timeout", "late"),
    ]
    works = [Verdict(0.0, None, "error", "once"), Verdict(1.0, "5")]
    broken = [
        RolloutGroup(make_record(name, "?", verifier=verifier), (), tuple(verdicts))
        for name, verifier, verdicts in (
            ("a", "/home/me/check.py:near", fails),
            ("b", "math", works),
            ("c", "math", works[:1]),
            ("d", "/home/me/check.py:near", fails),
        )
    ]
    log = open_log()
    log.begin_step(3)
    log.verified(broken)
    log.verified(broken)
    [line] = capsys.readouterr().out.splitlines()
    start = (
        f"step 3: the verifier check.py:near failed on all 4 completions; the first: error: {'x' * 50}[/red]   [31myyy"
    )
    assert line.startswith(start)
    assert len(line) < 300
    log.verified([])
    log.verified(broken[2:3])
    assert "the verifier math failed on all 1 completions; the first: error: once" in capsys.readouterr().out


def test_a_steps_line_says_how_many_rows_were_bad_and_why_the_first(open_log, capsys):
    log = open_log()
    log.end_step({}, "mine/train/#7: an image is null")
    log.on_metrics(3, STEP | {"data/quarantined": 12})
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("1.3 s  quarantined: 12, the first: mine/train/#7: an image is null")
    log.on_metrics(4, STEP | {"data/quarantined": 0})
    assert "quarantined" not in capsys.readouterr().out


# ── trackers ──


class BadTracker(GeneralTracker):
    """Fails at one thing that it is asked for, each time, and remembers what it was asked for."""

    requires_logging_directory = False
    name = "bad"

    def __init__(self, fails_at: str) -> None:
        super().__init__()
        self.fails_at, self.asked = fails_at, []

    tracker = None

    def _do(self, what: str) -> None:
        self.asked.append(what)
        if what == self.fails_at:
            raise ConnectionError(f"[red]no\nroute[/nowhere] to {self.name} \ud83d" + "x" * 999)

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict) -> None:
        self._do("settings")

    def log(self, values: dict, step: int | None, **kwargs) -> None:
        self._do("log")

    def finish(self) -> None:
        self._do("finish")


@pytest.mark.parametrize("fails_at", ["start", "settings", "log", "finish"])
def test_no_tracker_stops_a_run(tmp_path, capsys, fails_at):
    bad, good = BadTracker(fails_at), BadTracker("nothing")
    good.name = "good"
    log = RunLog(Accelerator(cpu=True, log_with=[bad, good]), tmp_path, steps=9)
    with log:
        log.start_trackers({"lr": 1.0})
        for step in (1, 2):
            log.on_metrics(step, STEP)
        log.evaluation(2, {"problem": {"value": 0.5}})
    log.finish_trackers()
    assert good.asked == ["start", "settings", "log", "log", "log", "finish"]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "tracker" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: the tracker ")
    assert "bad" in said[0]
    assert "fails: ConnectionError: [red]no route[/nowhere] to bad" in said[0]
    assert len(said[0]) < 450
    if fails_at == "log":
        assert bad.asked == good.asked, "it is asked again"
