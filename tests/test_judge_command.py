"""`spark-vl judge`: rows in, judgments out, and nothing asked twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from spark_vl import cli
from spark_vl.config import ConfigError, JudgeConfig
from spark_vl.demo import digits
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import TEMPLATES
from spark_vl.reward import judge_file
from spark_vl.run.jsonl import read_lines
from tests.conftest import make_image
from tests.test_reward import Refusing, against, in_favor, shown, votes


def write_rows(folder: Path, rows) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def answers(n):
    return [{"question": "Which?", "answer": f"{i}"} for i in range(n)]


def even(record, i):
    """Of a judge that calls even answers correct."""
    return in_favor(record) if int(shown(record).split('"')[1]) % 2 == 0 else against(record)


def test_each_row_gets_its_judgment_or_the_reason_why_not(tmp_path, processor):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(make_image(1).data)
    rows = [
        {"id": "x", "question": "<image> Which?", "images": ["a.png"], "answer": "7"},
        {"question": "Which?", "answer_a": "<image>", "answer_a_images": "a.png", "answer_b": "8", "id": 5},
        {"question": "Which?", "answer": "unreadable"},
        "{oops\n",
        "\n",
        "[1]\n",
        {"question": "Which?", "images": ["../a.png"], "answer": "7"},
        {"question": "Which?", "images": ["b.png"], "answer": "7"},
        {"question": "Which?", "answer_a": "7"},
        {"question": "Which?", "answer": "7", "answer_a": "7", "answer_b": "8"},
        {"answer": "7"},
        {"question": "Q " * 5000, "answer": "7"},
    ]
    judge = votes(processor, lambda record, i: "?" if "unread" in shown(record) else in_favor(record))
    judge.engine.finish_reason = "length"
    config = JudgeConfig(output=str(tmp_path / "out.jsonl"), media_root=str(tmp_path / "pictures"), rows_at_once=2)
    counts = judge_file(write_rows(tmp_path, rows), config, lambda: judge)
    assert counts == {"ok": 2, "unparsable": 1, "truncated": 1, "error": 8, "before": 0}
    settings, *lines = read_lines(tmp_path / "out.jsonl")
    assert settings["settings"]["probability"] == "labels"
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    one, two, three, *bad = lines
    assert (one["id"], one["kind"], one["probability"], one["consistent"]) == ("x", "pointwise", 1.0, True)
    assert (two["id"], two["kind"], two["probabilities"]) == (5, "pairwise", [1.0, 1.0])
    assert (three["status"], three["probability"], three["truncated"]) == ("unparsable", None, True)
    assert three["orders"][0][0]["text"] == "?"
    assert [line["status"] for line in bad] == ["error"] * 8
    reasons = ["not valid JSON", "a mapping", "without '..'", "b.png", "it has answer_a; allowed", "answer, answer_a"]
    for line, reason in zip(bad, [*reasons, "no column 'question'", "4096 are allowed"], strict=True):
        assert reason in line["error"]


def test_a_kill_asks_nothing_twice(tmp_path, processor):
    """A real one, while the judge is at work, which also tears the line that was being written."""
    rows = write_rows(tmp_path, answers(40))
    output = tmp_path / "out.jsonl"
    config = JudgeConfig(output=str(output), rows_at_once=2)

    def slow(record, i):
        time.sleep(0.02)
        return even(record, i)

    child = multiprocessing.get_context("fork").Process(
        target=judge_file, args=(rows, config, lambda: votes(processor, slow))
    )
    child.start()
    until = time.monotonic() + 30
    while len(read_lines(output)) < 7:
        assert child.is_alive()
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    done = [line["row"] for line in read_lines(output)[1:]]
    assert 6 <= len(done) < 40
    with output.open("ab") as file:
        file.write(b'{"row": 39, "digest": "x", "status": "ok", "probab')

    judge = votes(processor, even)
    counts = judge_file(rows, config, lambda: judge)
    assert counts == {"ok": 40, "unparsable": 0, "truncated": 0, "error": 0, "before": len(done)}
    assert [shown(record).split('"')[1] for record in judge.engine.asked] == [str(i) for i in range(len(done), 40)]
    lines = read_lines(output)[1:]
    assert [line["row"] for line in lines] == list(range(1, 41))
    assert [line["probability"] for line in lines] == [1.0, 0.0] * 20
    assert judge.engine.closed
    judge_file(rows, config, load=lambda: pytest.fail("there is nothing left to ask"))


def test_other_rows_or_settings_do_not_go_on(tmp_path, processor):
    output = tmp_path / "out.jsonl"
    config = JudgeConfig(output=str(output), rows_at_once=2)
    judge = votes(processor, even)
    judge_file(write_rows(tmp_path, answers(3)), config, lambda: judge)
    asked = len(judge.engine.asked)
    judge_file(write_rows(tmp_path, answers(5)), JudgeConfig(output=str(output), rows_at_once=9), lambda: judge)
    assert len(judge.engine.asked) == asked + 2, "rows were added"
    with pytest.raises(ConfigError, match=r"written under other settings \(samples: 1 → 4\)"):
        judge_file(tmp_path / "rows.jsonl", JudgeConfig(output=str(output), samples=4), lambda: judge)
    with pytest.raises(ConfigError, match=r"line 1 of .*rows\.jsonl is not the row that was judged"):
        judge_file(write_rows(tmp_path, answers(5)[1:]), config, lambda: judge)
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="is not a file of judgments"):
        judge_file(tmp_path / "rows.jsonl", JudgeConfig(output=str(tmp_path / "notes.jsonl")), lambda: judge)
    assert len(judge.engine.asked) == asked + 2


def test_the_command_judges_with_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problems = [digits.problem("test", i) for i in range(3)]
    for i, problem in enumerate(problems):
        Path(f"{i}.png").write_bytes(problem.image)
    rows = [
        {"question": p.question, "images": f"{i}.png", "answer_a": p.answer, "answer_b": "9"}
        for i, p in enumerate(problems)
    ]
    command = ["judge", str(write_rows(tmp_path, rows)), f"--model.path={CHECKPOINT}", "--model.dtype=float32"]
    command += [
        "--rollout.max_new_tokens=32",
        f"--prompts.templates=[{TEMPLATES}]",
        "--prompts.builtin_templates=false",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    assert "ok                   3" in capsys.readouterr().out
    for line in read_lines(tmp_path / "judged.jsonl")[1:]:
        first, second = line["probabilities"]
        assert line["probability"] == pytest.approx((first + second) / 2)
        assert 0 < first < 1
        assert 0 < second < 1
    at_a_server = ["--rollout.engine=openai", "--rollout.openai.base_url=http://localhost:9/v1"]
    for arguments, message in [
        (["judge", "nowhere.jsonl"], "rows: there is no file nowhere.jsonl"),
        ([*command, "--media_root=nowhere"], "media_root: there is no folder nowhere"),
        ([*command, "--model.min_pixels=99999999"], "model.min_pixels: is 99999999"),
        ([*command, "--rollout.engine=openai"], "rollout.openai.base_url: is null"),
        ([*command, *at_a_server], "probability: is labels, but with rollout.engine: openai the weights"),
        ([*command, "--samples=2"], "(samples: 1 → 2); name another file, or add --overwrite"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_what_the_engine_refuses_is_an_error_of_its_row(tmp_path, processor):
    judge = votes(processor, None)
    judge.engine = Refusing(processor, even)
    config = JudgeConfig(output=str(tmp_path / "out.jsonl"))
    counts = judge_file(write_rows(tmp_path, [*answers(2), {"question": "bad", "answer": "4"}]), config, lambda: judge)
    assert (counts["ok"], counts["error"]) == (2, 1)
    assert read_lines(tmp_path / "out.jsonl")[3]["error"] == "x: the server refuses it"
    assert judge.as_trl_reward()(["Which?", "bad"], [r"\boxed{2}"] * 2) == [1.0, None]
