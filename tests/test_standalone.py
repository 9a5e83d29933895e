"""`verify`: one verdict at a time, which comes in time whatever the verifier does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spark_vl.records import BadRecordError, Verdict
from spark_vl.verifiers import as_trl_reward, verify

ENDLESS = r"\boxed{9^{9^{9^9}}}"

SESSION = r"""
import threading
from spark_vl.verifiers import VerifierPool, as_trl_reward, verify
reward = as_trl_reward("math", pool=VerifierPool(workers=1, timeout_s=0.5))
def ask():
    print(verify("math", ENDLESS, "3", timeout_s=0.5).status, reward([ENDLESS, r"\boxed{3}"], ["3", "3"]))
ask()
thread = threading.Thread(target=ask)
thread.start()
thread.join()
print("worker", verify("tests.misbehaving:pid", "x", "3", timeout_s=0.5).parsed)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_verifier_that_hangs_is_a_timeout_and_the_next_call_is_verified() -> None:
    assert verify("math", r"\boxed{3}", "3", timeout_s=0.7).score == 1  # the worker has started
    start = time.monotonic()
    assert verify("math", ENDLESS, "3", timeout_s=0.7) == Verdict(0.0, None, "timeout", "more than 0.7 s")
    assert time.monotonic() - start < 5
    assert verify("math", r"\boxed{3}", "3", timeout_s=0.7).score == 1


@pytest.mark.parametrize("way", ["script", "typed"])
def test_a_hang_ends_in_a_script_without_a_guard_in_a_session_and_in_a_thread(way: str, tmp_path: Path) -> None:
    code = SESSION.replace("ENDLESS", repr(ENDLESS))
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = [str(script)] if way == "script" else []
    run = subprocess.run(
        [sys.executable, *arguments],
        input=None if arguments else code,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    *asked, worker = run.stdout.splitlines()
    assert asked == ["timeout [0.0, 1.0]"] * 2
    end = time.monotonic() + 10
    while is_alive(int(worker.removeprefix("worker "))):  # it ends with the process that started it
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("verifier", "completion", "gold"),
    [
        ("number", r"\boxed{104}", 104),
        ("number", r"\boxed{0.5}", np.float32(0.5)),
        ("text", r"\boxed{True}", True),
        ("text", r"\boxed{NYC}", ["New York", "NYC"]),
        ("set", r"\boxed{b, a}", ("a", "b")),
        ("json_field", r'\boxed{{"answer": "yes"}}', {"answer": "yes"}),
    ],
)
def test_right_answers_need_not_be_texts(verifier: str, completion: str, gold) -> None:
    assert verify(verifier, completion, gold).score == 1
    assert as_trl_reward(verifier)([completion], [gold]) == [1.0]
    assert verify(verifier, r"\boxed{no}", gold).score == 0


def test_calls_share_one_worker() -> None:
    pids = {verify("tests.misbehaving:pid", "x", "5").parsed for _ in range(3)}
    thread = threading.Thread(target=lambda: pids.add(verify("tests.misbehaving:pid", "x", "5").parsed))
    thread.start()
    thread.join()
    assert len(pids) == 1
    assert str(os.getpid()) not in pids


def test_a_verifier_that_cannot_hang_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert verify("number", r"\boxed{5}", "5", timeout_s=0.9).score == 1


@pytest.mark.parametrize(("verifier", "gold"), [("math", "5?"), ("number", "a few")])
def test_a_gold_that_the_verifier_cannot_use_is_raised_with_and_without_a_worker(verifier: str, gold: str) -> None:
    with pytest.raises(BadRecordError, match=r"^verify: gold '") as error:
        verify(verifier, r"\boxed{5}", gold)
    assert (error.value.record_id, error.value.reason[:5]) == ("verify", "gold ")


def test_a_bug_in_a_verifier_is_a_verdict() -> None:
    verdict = verify("tests.misbehaving:raises", "x", "5")
    assert (verdict.score, verdict.status) == (0.0, "error")
    assert verdict.detail.startswith("KeyError")


def test_a_setting_may_be_called_verifier() -> None:
    assert verify("json_field", r'\boxed{{"answer": "5.0"}}', '{"answer": 5}', verifier="number").score == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_deadline_is_above_0(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"timeout_s: found .*; allowed: above 0"):
        verify("math", r"\boxed{5}", "5", timeout_s=seconds)
