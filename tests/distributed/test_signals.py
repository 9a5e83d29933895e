"""A signal stops a run at a checkpoint, from which it goes on as if nothing had been."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_vl.trainer import Trainer
from tests.distributed.launching import NO_EVALUATION, SHARDED, SMALL, Run, assert_same_run, latest, launch, start
from tests.test_trainer import make_config

pytestmark = pytest.mark.distributed


def assert_stopped(output: str, folder: Path, after: int) -> None:
    """`output` says how to go on, and the latest checkpoint is the one that it says: after step `after` or the next."""
    said = re.search(r"stopped after step (\d+) of \d+; go on with the same command and --resume auto", output)
    assert said, output
    assert int(said[1]) in (after, after + 1)
    assert latest(folder).name == f"step-{int(said[1]):06d}"
    assert not (folder / "model").exists()


def stop(run: Run, after: int, send: Callable[[], None]) -> tuple[int, str]:
    """Call `send` after step `after`; the exit code and the output."""
    with run:
        run.wait_until(lambda: f"step {after}/" in run.output())
        send()
        ended = run.finish()
    return ended.returncode, ended.stdout


def test_each_signal_stops_it_at_a_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    arguments = (*SMALL, f"--output_dir={folder}", "--resume=auto", "--checkpoint.every=0")
    for number, after in ((signal.SIGTERM, 2), (signal.SIGINT, 5), (signal.SIGUSR1, 7)):
        run = start(1, "single", *arguments)
        code, output = stop(run, after, lambda run=run, number=number: run.send_signal(number))
        assert code == 0
        assert f"{number.name}: saving, then stopping" in output
        assert_stopped(output, folder, after)
    assert launch(1, "single", *arguments).returncode == 0
    assert_same_run(folder, whole, same_files=False)


def test_a_second_signal_ends_it_at_once(tmp_path):
    folder = tmp_path / "run"
    long_steps = ("--data.prompts_per_step=64", "--rollout.n=16", "--checkpoint.every=1")
    with start(1, "single", *SMALL, NO_EVALUATION, *long_steps, f"--output_dir={folder}") as run:
        run.wait_until(lambda: latest(folder))
        run.send_signal(signal.SIGTERM)
        run.wait_until(lambda: "SIGTERM: saving" in run.output())
        asked = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.finish().returncode == 128 + signal.SIGINT
        assert time.monotonic() - asked < 2
    assert latest(folder).name == "step-000001"


def test_a_signal_to_one_of_two_workers_or_to_their_launcher_stops_both(whole_zero3, tmp_path):
    folder = tmp_path / "run"
    arguments = (*SHARDED, f"--output_dir={folder}", "--resume=auto", "--checkpoint.every=0")
    run = start(2, "zero3", *arguments)
    code, output = stop(run, 1, lambda: run.worker(1).send_signal(signal.SIGUSR1))
    assert code == 0
    assert_stopped(output, folder, 1)

    run = start(2, "zero3", *arguments)
    code, output = stop(run, 3, run.terminate)
    assert code != 0  # torchrun hands the signal on, and then has an error of its own
    assert_stopped(output, folder, 3)

    assert launch(2, "zero3", *arguments).returncode == 0
    assert_same_run(folder, whole_zero3, same_files=False)


@pytest.mark.parametrize(
    ("schedule", "call", "stops_after"),
    [
        ("merged", "generate", 2),  # the step is abandoned
        ("merged", "update", 3),  # the step is finished
        ("sequential", "generate", 2),
        ("sequential", "generate again", 3),  # the first of two updates has been made
    ],
)
def test_a_step_is_abandoned_or_finished(tmp_path, schedule, call, stops_after):
    """The signal comes in the third step, at one certain point."""
    overrides = (f"--recycle.schedule={schedule}", "--steps=4")
    uninterrupted = make_config(tmp_path / "whole", *overrides)
    Trainer(uninterrupted).train()

    trainer = Trainer(make_config(tmp_path / "cut", *overrides))
    owner = trainer.updater if call == "update" else trainer.engine
    name = call.split()[0]
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        if trainer.step == 2:
            calls.append(name)
            if len(calls) == len(call.split()):
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR1)  # SLURM's may come twice, and means the same
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)
    assert not trainer.train()
    assert latest(tmp_path / "cut").name == f"step-{stops_after:06d}"
    assert Trainer(make_config(tmp_path / "cut", *overrides), resume="auto").train()
    assert_same_run(tmp_path / "cut", tmp_path / "whole", same_files=False)
