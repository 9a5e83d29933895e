"""SIGKILL at any moment costs what was done since the last checkpoint, and nothing else."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from spark_vl.run.paths import CONFIG, LATEST, name_of, pointed
from tests.distributed.launching import SHARDED, SMALL, Run, assert_same_run, latest, lines, start

pytestmark = pytest.mark.distributed


def kill_in(run: Run, folder: Path, phase: str, step: int, rng: random.Random) -> None:
    """Kill all processes of `run` in `phase`, after `step` steps or a few more."""

    def steps() -> int:
        return max((int(number) for number in re.findall(r"^step (\d+)/", run.output(), re.MULTILINE)), default=-1)

    match phase:
        case "evaluation":  # before the first step
            run.wait_until((folder / CONFIG).exists)
            time.sleep(rng.uniform(0, 1))
        case "rollout" | "update":  # by the clock of the step before
            run.wait_until(lambda: steps() >= step)
            clock = lines(folder, "metrics")[-1]
            part = rng.random()
            if phase == "rollout":
                time.sleep(clock["time/load"] + part * clock["time/generate"])
            else:
                time.sleep(clock["time/step"] - part * clock["time/update"])
        case "saving":
            run.wait_until(lambda: steps() >= step and list((folder / "checkpoints").glob(".step-*.partial")))
            time.sleep(rng.uniform(0, 0.08))
        case "finishing":  # after the last checkpoint
            run.wait_until(
                lambda: (
                    steps() >= step
                    and pointed(folder / "checkpoints", LATEST) == folder / "checkpoints" / name_of(step)
                )
            )
            time.sleep(rng.uniform(0, 0.3))
    run.kill_all()


def kill_and_resume(n: int, strategy: str, arguments: tuple[str, ...], folder: Path, moments, rng) -> int:
    """Run to the end, killed at each of `moments`. Returns how many times that was while a checkpoint was written."""
    arguments = (*arguments, f"--output_dir={folder}", "--resume=auto")
    torn = 0
    for phase, step in moments:
        with start(n, strategy, *arguments) as run:
            kill_in(run, folder, phase, step, rng)
        latest(folder)
        torn += any((folder / "checkpoints").glob(".step-*.partial"))
    with start(n, strategy, *arguments) as run:
        ended = run.finish()
    assert ended.returncode == 0, ended.stdout
    return torn


def test_eleven_kills_change_nothing(whole, tmp_path):
    rng = random.Random(0)
    moments = [("evaluation", 0)]
    for checkpoint in (0, 3, 6):  # from which it is resumed
        moments += [(phase, checkpoint + rng.choice([1, 2])) for phase in ("rollout", "update", "saving")]
    torn = kill_and_resume(1, "single", SMALL, tmp_path / "run", [*moments, ("finishing", 12)], rng)
    assert torn, "no checkpoint was interrupted in the writing"
    assert_same_run(tmp_path / "run", whole)


def test_three_kills_of_two_sharded_processes_change_nothing(whole_zero3, tmp_path):
    moments = [("saving", 1), ("rollout", 3), ("update", 4)]
    kill_and_resume(2, "zero3", SHARDED, tmp_path / "run", moments, random.Random(0))
    assert_same_run(tmp_path / "run", whole_zero3)
