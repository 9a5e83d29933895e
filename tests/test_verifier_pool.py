from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from spark_vl.records import ImageRef, Message, Origin, PromptRecord, RecycledRecord, Verdict
from spark_vl.verifiers.base import run_verifier
from spark_vl.verifiers.pool import VerifierPool, _without_images

YES_NO = ("Yes", "No")


def record(verifier: str, gold: str = "5", choices: tuple[str, ...] = ()) -> PromptRecord:
    return PromptRecord("toy/7", "problem", (), (), gold, verifier, "toy", choices)


def obey(*commands: str) -> list[tuple[str, PromptRecord]]:
    return [(command, record("tests.misbehaving:obey")) for command in commands]


def alive(pid: int) -> bool:
    """Whether the process exists, as a zombie too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether the process runs; a zombie, which only its adoptive parent can reap, does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until_gone(*pids: int, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < end, f"still running: {running}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def pool():
    """Shared by the tests that do no harm to it."""
    with VerifierPool(workers=2, timeout_s=20.0) as pool:
        yield pool


def test_every_kind_in_one_call_in_order(pool: VerifierPool) -> None:
    rows = [
        (r"\boxed{1/2}", record("math", "0.5"), 1.0),
        (r"\boxed{Yes}", record("judgment", "No", YES_NO), 0.0),
        ("no box", record("math", "0.5"), 0.0),
        (r"\boxed{5}", record("number"), 1.0),
        ("anything", record("tests.misbehaving:half"), 0.5),
        (r"\boxed{A}", record("choice", "A"), 1.0),
        (r"\boxed{0.25}", record("math", "0.5"), 0.0),
    ] * 20
    verdicts = pool.verify([row[:2] for row in rows])
    assert [verdict.score for verdict in verdicts] == [row[2] for row in rows]
    assert [verdict.parsed for verdict in verdicts[:7]] == ["1/2", "Yes", None, "5", "anything", "A", "0.25"]


def test_nothing_to_verify(pool: VerifierPool) -> None:
    assert pool.verify([]) == []


def test_order_is_kept_when_items_take_different_times(pool: VerifierPool) -> None:
    commands = [f"sleep {0.001 * (i * 7 % 11)}" for i in range(150)]
    assert [verdict.parsed for verdict in pool.verify(obey(*commands))] == commands


def test_exceptions_are_verdicts_and_are_counted(pool: VerifierPool) -> None:
    before = pool.errors
    kinds = ["raises", "not_a_verdict", "too_good", "half"]
    verdicts = pool.verify([("x", record(f"tests.misbehaving:{kind}")) for kind in kinds])
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(0.0, "error")] * 3 + [(0.5, "ok")]
    assert [verdict.detail.split(":")[0] for verdict in verdicts[:3]] == ["KeyError", "TypeError", "TypeError"]
    assert "the verifier's own bug" in verdicts[0].detail
    assert pool.errors - before == 3
    assert pool.restarts == 0


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(np.float32(0.5), np.str_("x"), np.str_("ok"), np.str_("")),
        Verdict(torch.tensor(0.5), "x"),
        Verdict(Fraction(1, 2), "x"),
    ],
)
def test_verdicts_are_made_of_plain_numbers_and_texts(verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_vl.verifiers.base.get_verifier", lambda name: lambda *_: verdict)
    plain = run_verifier("x", record("any"))
    assert plain == Verdict(0.5, "x")
    assert [type(value) for value in (plain.score, plain.parsed, plain.status, plain.detail)] == [float, str, str, str]


@pytest.mark.parametrize(
    ("verdict", "detail"),
    [
        (Verdict("1", "x"), "score: found '1'; allowed: a number in [0, 1]"),
        (Verdict(None, "x"), "score: found None"),
        (Verdict(math.nan, "x"), "score: found nan"),
        (Verdict(torch.ones(2), "x"), "element"),
        (Verdict(1.0, 5), "parsed: found 5; allowed: a text or None"),
        (Verdict(1.0, "x", "fine"), "status: found 'fine'; allowed: ok, unparsable, timeout, error"),
        (Verdict(1.0, "x", ["ok"]), "status: found ['ok']"),
        (Verdict(0.0, None, "error", KeyError("x")), "detail: found KeyError('x'); allowed: a text"),
    ],
)
def test_a_verdict_of_other_types_is_an_error(verdict: Verdict, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_vl.verifiers.base.get_verifier", lambda name: lambda *_: verdict)
    said = run_verifier("x", record("any"))
    assert (said.score, said.parsed, said.status) == (0.0, None, "error")
    assert detail in said.detail


def test_a_bad_gold_is_an_error_of_its_own_item(pool: VerifierPool) -> None:
    bad, good, inline = pool.verify(
        [(r"\boxed{5}", record("math", "5?")), (r"\boxed{5}", record("math")), (r"\boxed{5}", record("number", "many"))]
    )
    assert (bad.status, good.score, inline.status) == ("error", 1.0, "error")
    assert "toy/7" in bad.detail
    assert "toy/7" in inline.detail


def test_workers_get_neither_pixels_nor_the_parents_modules() -> None:
    image = ImageRef(data=b"0" * 1_000_000)
    question = ("How many? ", image)
    full = PromptRecord(
        "r", "problem", (Message("user", question),), question, "5", "tests.misbehaving:received", "toy"
    )
    with VerifierPool(workers=1) as own:
        received = json.loads(own.verify([("x", full)])[0].parsed)
    assert received == {"messages": [], "question": ["How many? <image>"], "heavy": [], "main": None}


def test_workers_do_not_get_the_completions_that_a_judgment_quotes() -> None:
    origin = Origin("toy/7", 3, "yes_no", (1,), True, ("x" * 1_000_000,))
    full = RecycledRecord("r", "pointwise", (), ("How many?",), "Yes", "judgment", "toy", ("Yes", "No"), origin=origin)
    _, sent = _without_images("x", full)
    assert sent == replace(full, verifier=sent.verifier, origin=replace(origin, completions=()))


def test_prints_of_a_verifier_stay_out_of_standard_output(
    pool: VerifierPool, capfd: pytest.CaptureFixture[str]
) -> None:
    with VerifierPool(workers=1) as own:
        assert own.verify(obey("print"))[0].score == 1.0
    assert capfd.readouterr().out == ""


def test_from_a_thread(pool: VerifierPool) -> None:
    results: list[float] = []

    def judge() -> None:
        with VerifierPool(workers=1) as own:  # started, used and closed off the main thread
            results.append(own.verify([(r"\boxed{5}", record("math"))])[0].score)
        results.append(pool.verify([(r"\boxed{5}", record("math"))])[0].score)

    threads = [threading.Thread(target=judge) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [1.0] * 4


def test_big_completions(pool: VerifierPool) -> None:
    text = "x" * 1_000_000
    verdicts = pool.verify(obey(*[text] * 8))
    assert [len(verdict.parsed) for verdict in verdicts] == [1_000_000] * 8


def test_throughput(pool: VerifierPool) -> None:
    judgments = [(r"It is wrong: \boxed{No}", record("judgment", "No", YES_NO))] * 5000
    piped = [("x", record("tests.misbehaving:half"))] * 2000
    for items in (judgments, piped):
        start = time.perf_counter()
        assert len(pool.verify(items)) == len(items)
        assert time.perf_counter() - start < 5


def test_progress_is_called_with_every_item_once() -> None:
    heard: list[int] = []
    items = [*obey("exit", "raise", "hang", *["fine"] * 40), *[(r"\boxed{5}", record("number"))] * 7]
    with VerifierPool(workers=2, timeout_s=0.4) as own:
        own.verify(items, progress=heard.append)
        assert sum(heard) == len(items)
        assert heard[0] == 7  # at once
        assert min(heard) > 0
        assert len(heard) > 5
        with pytest.raises(ZeroDivisionError):
            own.verify(obey("one", "two"), progress=lambda done: done / 0)
        assert [verdict.parsed for verdict in own.verify(obey("three", "four"))] == ["three", "four"]


@pytest.mark.parametrize("use", ["verify", "close"])
def test_progress_must_not_use_the_pool(use: str) -> None:
    with VerifierPool(workers=1) as own:
        again = {"verify": lambda done: own.verify(obey("two")), "close": lambda done: own.close()}
        with pytest.raises(RuntimeError, match="`progress` must not use or close the pool"):
            own.verify(obey("one"), progress=again[use])
        assert [verdict.parsed for verdict in own.verify(obey("three"))] == ["three"]


def test_close_waits_for_a_call_in_another_thread() -> None:
    own = VerifierPool(workers=2)
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.extend(own.verify(obey(*["sleep 0.3"] * 4))))
    thread.start()
    time.sleep(0.4)
    own.close()
    thread.join(60)
    assert [verdict.status for verdict in verdicts] == ["ok"] * 4
    assert own.restarts == 0


def test_a_slow_parent_costs_no_verdict() -> None:
    big = "x" * 5_000_000  # more than a pipe holds
    pauses = iter([2.5])  # after the first answer, so during the second
    with VerifierPool(workers=1, timeout_s=0.3) as own:
        verdicts = own.verify(obey("one", big, "three", "four"), progress=lambda done: time.sleep(next(pauses, 0)))
        assert [verdict.parsed for verdict in verdicts] == ["one", big, "three", "four"]
        assert own.restarts == 0


def test_cheap_kinds_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with VerifierPool() as own:
        assert own.verify([(r"\boxed{No}", record("judgment", "No", YES_NO))])[0].score == 1.0


# ── hangs and deaths ──


def test_a_tower_of_powers_is_killed_at_the_deadline() -> None:
    with VerifierPool(workers=2, timeout_s=1.5) as own:
        own.verify([(r"\boxed{4}", record("math"))] * 4)
        items = [(r"\boxed{5}" if i != 30 else r"\boxed{9^{9^9}}", record("math")) for i in range(60)]
        start = time.perf_counter()
        verdicts = own.verify(items)
        elapsed = time.perf_counter() - start
        assert [i for i, verdict in enumerate(verdicts) if verdict != Verdict(1.0, "5")] == [30]
        assert (verdicts[30].score, verdicts[30].status) == (0.0, "timeout")
        assert "1.5 s" in verdicts[30].detail
        assert (own.timeouts, own.errors, own.restarts) == (1, 0, 1)
        assert 1.5 <= elapsed < 6


@pytest.mark.parametrize(
    ("command", "status", "detail"),
    [
        ("hang", "timeout", "more than 0.4 s"),
        ("hang_in_c", "timeout", "more than 0.4 s"),
        ("catastrophic_regex", "timeout", "more than 0.4 s"),
        ("ignore_signals", "timeout", "more than 0.4 s"),
        ("exit", "error", "died, exit code 7"),
        ("sys_exit", "error", "died, exit code 7"),
        ("keyboard_interrupt", "error", "died, exit code"),
        ("segfault", "error", f"died, exit code {-signal.SIGSEGV}"),
        ("abort", "error", f"died, exit code {-signal.SIGABRT}, perhaps out of memory"),
        ("kill", "error", f"died, exit code {-signal.SIGKILL}, perhaps out of memory"),
        ("close_descriptors", "error", "died, exit code"),
        ("not_picklable", "error", "died, exit code 1"),
        ("not_to_be_read_back", "error", "not a verdict (TypeError: "),
        ("write_garbage", "error", "not a verdict (bad message length)"),
        ("stop_in_the_middle", "timeout", "more than 0.4 s"),
        ("eat_memory", "error", "MemoryError: more than 200 MiB"),
        ("hide_that_memory_is_eaten", "error", "MemoryError: more than 200 MiB"),
    ],
)
def test_a_hang_or_a_death_costs_one_item(command: str, status: str, detail: str) -> None:
    commands = ["fine"] * 20
    commands[3] = commands[4] = commands[17] = command
    with VerifierPool(workers=2, timeout_s=0.4, memory_mb=200) as own:
        verdicts = own.verify(obey(*commands))
        for said, verdict in zip(commands, verdicts, strict=True):
            assert (verdict.score, verdict.status) == ((1.0, "ok") if said == "fine" else (0.0, status))
            assert detail in verdict.detail or said == "fine"
        assert (own.timeouts, own.errors) == ((3, 0) if status == "timeout" else (0, 3))
        assert own.restarts == 3


def test_the_deadline_is_per_item_not_per_batch() -> None:
    with VerifierPool(workers=1, timeout_s=0.6) as own:
        verdicts = own.verify(obey(*["sleep 0.1"] * 16))
    assert {verdict.status for verdict in verdicts} == {"ok"}


def test_imports_do_not_count_towards_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import time; time.sleep(0.8)\n"
        "from spark_vl.records import Verdict\n"
        "def f(completion, record): return Verdict(1.0, 'x')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # and what the parent can import, the workers can
    with VerifierPool(workers=1, timeout_s=0.3) as own:
        assert own.verify([("x", record("slow_to_import:f"))]) == [Verdict(1.0, "x")]


def test_a_leak_costs_the_item_that_meets_the_limit() -> None:
    with VerifierPool(workers=1, memory_mb=300) as own:
        verdicts = own.verify(obey(*["leak 50"] * 14))
        failed = [i for i, verdict in enumerate(verdicts) if verdict.status == "error"]
        assert {verdicts[i].detail for i in failed} == {"MemoryError: more than 300 MiB"}
        assert [second - first for first, second in pairwise([-1, *failed])] == [6, 6]  # 5 × 50 and a new process
        assert own.restarts == 2


def test_math_fits_in_the_memory_that_its_docs_say() -> None:
    with VerifierPool(workers=1, memory_mb=100) as own:
        items = [(rf"\boxed{{\frac{{{2 * i}}}{{2}}+x^2}}", record("math", f"x^2+{i}")) for i in range(30)]
        assert {verdict.score for verdict in own.verify(items)} == {1.0}


def test_a_limit_below_what_the_imports_need_is_an_error_at_once() -> None:
    with VerifierPool(workers=1, memory_mb=20) as own, pytest.raises(RuntimeError, match="did not start"):
        own.verify([(r"\boxed{5}", record("math"))])


def test_a_fork_does_not_answer_in_its_parents_place() -> None:
    commands = ["fork" if i % 5 == 2 else f"answer {i}" for i in range(40)]
    with VerifierPool(workers=1) as own:
        assert [verdict.parsed for verdict in own.verify(obey(*commands))] == commands
        assert own.restarts == 0


def test_a_timer_that_is_left_behind_does_not_go_off_in_the_next_item() -> None:
    with VerifierPool(workers=1) as own:
        commands = ["leave_a_timer 0.3", "sleep 0.6", "fine", "fine"]
        assert {verdict.status for verdict in own.verify(obey(*commands))} == {"ok"}
        assert own.restarts == 0


def test_children_are_killed_with_a_worker_that_dies(tmp_path: Path) -> None:
    with VerifierPool(workers=1) as own:
        died, fine = own.verify(obey(f"start_children_and_die {tmp_path / 'pids'}", "fine"))
        assert (died.status, fine.status) == ("error", "ok")
        wait_until_gone(*map(int, (tmp_path / "pids").read_text().split()))


def test_megabytes_of_prints_cost_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with VerifierPool(workers=2) as own:
        verdicts = own.verify(obey("print_megabytes 4", "fine", "print_megabytes 4"))
        assert {verdict.status for verdict in verdicts} == {"ok"}
    out, errors = capfd.readouterr()
    assert (len(out), len(errors)) == (0, 16 * 2**20)


def test_a_worker_that_does_not_read_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_vl.verifiers.pool.START_S", 2.0)
    with VerifierPool(workers=1) as own:
        own.verify(obey("hold_the_lock_later"))
        time.sleep(0.5)
        text = "x" * 1_000_000  # more than a pipe holds
        assert [len(verdict.parsed) for verdict in own.verify(obey(text, text))] == [len(text)] * 2
        assert (own.errors, own.timeouts, own.restarts) == (0, 0, 1)


def test_no_process_is_left_after_close(tmp_path: Path) -> None:
    with VerifierPool(workers=2, timeout_s=0.5) as own:
        pids = {int(v.parsed) for v in own.verify([("x", record("tests.misbehaving:pid"))] * 50)}
        assert all(alive(pid) for pid in pids)
        child = tmp_path / "pids"
        own.verify(obey("exit", "hang", f"start_child {child}"))
        pids |= {int(v.parsed) for v in own.verify([("x", record("tests.misbehaving:pid"))] * 50)}
    worker, grandchild = map(int, child.read_text().split())
    assert not any(alive(pid) for pid in pids | {worker})  # a zombie would still be there
    wait_until_gone(grandchild)
    own.close()  # twice is fine
    with own:
        assert own.verify(obey("fine"))[0].score == 1.0  # and it can start again


def test_a_worker_that_dies_between_calls_is_replaced_at_no_cost() -> None:
    with VerifierPool(workers=1) as own:
        first = int(own.verify([("x", record("tests.misbehaving:pid"))])[0].parsed)
        os.kill(first, signal.SIGKILL)
        verdicts = own.verify([("x", record("tests.misbehaving:pid"))] * 3)
        assert {verdict.status for verdict in verdicts} == {"ok"}
        assert int(verdicts[0].parsed) != first
        assert (own.errors, own.restarts) == (0, 1)


PARENT = """
    import os, sys, time
    from spark_vl.records import PromptRecord
    from spark_vl.verifiers.pool import VerifierPool
    def record(name): return PromptRecord("r", "problem", (), (), "5", "tests.misbehaving:" + name, "toy")
    pool = VerifierPool(workers=1, timeout_s=60)
    print(pool.verify([("x", record("pid"))])[0].parsed, flush=True)
    if sys.argv[1] == "forked" and os.fork() == 0:
        print(os.getpid(), flush=True)
    elif sys.argv[1] not in ("idle", "forked"):
        pool.verify([(sys.argv[1], record("obey"))])
    time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "forked", "hang_in_c", "start_child"])
def test_workers_end_when_the_parent_is_killed(state: str, tmp_path: Path) -> None:
    """Also where a fork of the parent lives on, and one stuck in a verifier, with what that has started."""
    pids = tmp_path / "pids"
    command = f"start_child {pids}" if state == "start_child" else state
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), command], stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = int(parent.stdout.readline())
        fork = int(parent.stdout.readline()) if state == "forked" else None
        time.sleep(0.5)
        assert alive(worker)
        parent.kill()
    wait_until_gone(worker)
    if state == "start_child":
        wait_until_gone(*map(int, pids.read_text().split()))
    if fork:
        os.kill(fork, signal.SIGKILL)


FORKS = """
    import os, threading, time
    from spark_vl.records import PromptRecord
    from spark_vl.verifiers.pool import VerifierPool
    def record(name): return PromptRecord("r", "problem", (), (), "5", "tests.misbehaving:" + name, "toy")
    def said(*texts, by="half"): return [verdict.parsed for verdict in pool.verify([(t, record(by)) for t in texts])]
    pool = VerifierPool(workers=1)
    worker = said("x", by="pid")
    thread = threading.Thread(target=said, args=("sleep 0.6",), kwargs={"by": "obey"})
    thread.start()  # it has the lock at the moment of the fork
    time.sleep(0.2)
    fork = os.fork()
    texts = [f"{os.getpid()} {i}" for i in range(300)]
    assert said(*texts) == texts
    assert (said("x", by="pid") == worker) == (fork != 0)
    if fork:
        thread.join()
        assert os.waitpid(fork, 0)[1] == 0
        assert said("x", by="pid") == worker
        assert pool.restarts == 0
    pool.close()
"""


def test_a_fork_of_the_parent_has_workers_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(FORKS)], timeout=60, check=True)


def when_started(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """Sends the first so many workers a signal as soon as they are started."""
    left = iter(range(times))

    class Signalled(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            if next(left, None) is not None:
                self.send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_ask_a_run_to_stop_do_not_stop_a_worker_from_starting(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_started(monkeypatch, number, times=9)
    with VerifierPool(workers=2) as own:
        assert {verdict.status for verdict in own.verify(obey("exit", *["fine"] * 9))} == {"ok", "error"}
        assert own.restarts == 1


def test_a_worker_that_is_killed_before_it_has_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    when_started(monkeypatch, signal.SIGKILL, times=2)
    with VerifierPool(workers=2) as own:
        assert {verdict.status for verdict in own.verify(obey(*["fine"] * 9))} == {"ok"}
        assert (own.errors, own.restarts) == (0, 2)
        own.close()
        when_started(monkeypatch, signal.SIGKILL, times=9)
        with pytest.raises(RuntimeError, match="did not start: exit code -9; its output is on stderr"):
            own.verify(obey("fine"))


def test_workers_start_in_a_folder_whose_files_are_named_as_pythons_modules_are(tmp_path: Path) -> None:
    scripts, folder = tmp_path / "scripts", tmp_path / "folder"
    scripts.mkdir()
    folder.mkdir()
    for name in ("json", "types", "socket"):
        (folder / f"{name}.py").write_text("raise SystemExit('not this one')")
    (folder / "mine.py").write_text(
        "from spark_vl.records import Verdict\ndef f(completion, record): return Verdict(1.0, completion)\n"
    )
    (scripts / "script.py").write_text(
        "import sys\n"
        "from spark_vl.records import PromptRecord\n"
        "from spark_vl.verifiers.pool import VerifierPool\n"
        "sys.path.append('')\n"
        "with VerifierPool(workers=1) as pool:\n"
        "    print(pool.verify([('x', PromptRecord('r', 'problem', (), (), '5', 'mine:f', 'toy'))])[0].parsed)\n"
    )
    command = [sys.executable, str(scripts / "script.py")]
    assert subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout == "x\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_that_ask_a_run_to_stop_do_not_cost_verdicts(name: str) -> None:
    """Sent to all processes, as schedulers do; a verifier's own subprocesses can be terminated as ever."""
    number = signal.Signals[name]
    with VerifierPool(workers=1) as own:
        worker = int(own.verify([("x", record("tests.misbehaving:pid"))])[0].parsed)
        timer = threading.Timer(0.3, os.kill, (worker, number))
        timer.start()
        verdicts = own.verify(obey("sleep 1", f"signal_child {number}"))
        timer.join()
        assert [verdict.status for verdict in verdicts] == ["ok", "ok"]
        assert own.restarts == 0


# ── mistakes of the caller ──


def test_unknown_verifiers_are_refused_before_anything_runs(pool: VerifierPool) -> None:
    with pytest.raises(ValueError, match="unknown verifier 'maths'; allowed: choice"):
        pool.verify([(r"\boxed{5}", record("math")), (r"\boxed{5}", record("maths"))])


def test_a_verifier_that_workers_cannot_import_is_an_error_not_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("only_in_the_parent")
    module.f = lambda completion, record: Verdict(1.0, "x")
    monkeypatch.setitem(sys.modules, "only_in_the_parent", module)
    with VerifierPool(workers=2) as own:
        with pytest.raises(
            RuntimeError, match=r"did not start: UnknownVerifierError: .*there is no module 'only_in_the_parent'"
        ):
            own.verify([*obey("sleep 0.2", "sleep 0.2", "sleep 0.2"), ("x", record("only_in_the_parent:f"))])
        # Answers to the call that failed are not taken for answers to the next.
        assert [verdict.parsed for verdict in own.verify(obey("one", "two"))] == ["one", "two"]


def test_a_verifier_of_the_main_script_is_refused(pool: VerifierPool) -> None:
    with pytest.raises(ValueError, match=r"'__main__:mine': workers cannot import .* put it in a module"):
        pool.verify([("x", record("__main__:mine"))])


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("workers", 0, "at least 1"),
        ("memory_mb", 0, "at least 1"),
        *[("timeout_s", value, r"above 0, at most 86400 \(a day\)") for value in (0.0, math.nan, math.inf, 1e10)],
    ],
)
def test_bad_sizes(setting: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}: found .*; allowed: {allowed}"):
        VerifierPool(**{setting: value})
