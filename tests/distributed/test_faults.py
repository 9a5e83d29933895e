"""What goes wrong on a shared machine ends a run with a message that says what it was; the last checkpoint is whole."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from spark_vl.checkpoint import CheckpointError, check_checkpoint, find_checkpoint
from spark_vl.cli import main
from spark_vl.config_cli import parse_train_config
from spark_vl.setup import load_trainer
from spark_vl.trainer import Trainer
from tests.distributed.launching import (
    NO_EVALUATION,
    ROOT,
    SHARDED,
    SMALL,
    Run,
    assert_same_run,
    latest,
    launch,
    lines,
    metrics,
    start,
    weights,
)
from tests.test_foreign_files import Bomb, sign
from tests.test_nonfinite import LINEAR, assert_second_update_was_skipped

pytestmark = pytest.mark.distributed

ENDLESS = (*SMALL, NO_EVALUATION, "--steps=1000", "--checkpoint.every=1")
LONG_STEPS = ("--data.prompts_per_step=128", "--rollout.n=16")
DRIVER = "tests.distributed.driver"


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Paths in `SMALL` are relative."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Gives a disk: `disk("size=20m")`, and once more with other options, in use as it is."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        options = f"remount,{options}" if folder.is_mount() else options
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run, with its checkpoints of steps 9 and 12."""
    return shutil.copytree(whole, tmp_path / "copy")


def make_trainer(folder: Path, *overrides: str, resume: str = "auto", **settings) -> Trainer:
    """In this process, without evaluation (which changes nothing else)."""
    return load_trainer(parse_train_config([*SMALL, *overrides, f"--output_dir={folder}"]), resume=resume, **settings)


def refusal(call: Callable[[], object]) -> str:
    """What the `CheckpointError` says that `call` raises; what hung on its traceback, such as open files, is gone."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    pytest.fail("it was not refused")


# ── the disk ──


def test_a_full_disk(whole, disk):
    folder = disk("size=20m") / "run"  # a checkpoint has 13 MB
    ended = launch(1, "single", *SMALL, f"--output_dir={folder}")
    assert ended.returncode == 2
    path = re.escape(str(folder / "checkpoints" / "step-000006"))
    said = re.search(
        rf"{path}: the checkpoint could not be written: about ([\d,]+) bytes are needed, ([\d,]+) are free",
        ended.stdout,
    )
    assert said, ended.stdout
    needed, free = (int(number.replace(",", "")) for number in said.groups())
    assert needed == sum(file.stat().st_size for file in latest(folder).rglob("*") if file.is_file()) > free
    assert latest(folder).name == "step-000003"

    disk("size=64m")
    assert launch(1, "single", *SMALL, f"--output_dir={folder}", "--resume=auto").returncode == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("spare_mb", [1, 5, 11])  # to fill up in the weights, the optimizer's state, the plain model
def test_a_disk_that_fills_up_in_the_writing(whole, disk, monkeypatch, spare_mb):
    folder = disk(f"size={13 + spare_mb}m") / "run"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
        said = refusal(lambda: make_trainer(folder).train())
    assert said.startswith(f"{folder / 'checkpoints' / 'step-000006'}: the checkpoint could not be written")
    assert re.search(r"about 1[23],\d{3},\d{3} bytes are needed", said)
    assert latest(folder).name == "step-000003"
    assert shutil.disk_usage(folder).free > (spare_mb - 1) * 2**20, "what was begun still takes the room"

    disk("size=64m")
    assert make_trainer(folder).train()
    assert metrics(folder) == metrics(whole)


def test_a_disk_that_fills_up_under_two_processes(whole_zero3, disk, monkeypatch):
    folder = disk("size=18m") / "run"
    arguments = (*SHARDED, f"--output_dir={folder}", "--resume=auto")
    monkeypatch.setenv("ADD", "room")
    ended = launch(2, "zero3", *arguments, module=DRIVER)
    assert ended.returncode != 0
    assert f"{folder / 'checkpoints' / 'step-000004'}: the checkpoint could not be written" in ended.stdout
    assert latest(folder).name == "step-000002"

    disk("size=64m")
    assert launch(2, "zero3", *arguments).returncode == 0
    assert_same_run(folder, whole_zero3)


@pytest.mark.parametrize("where", ["below a file", "read-only"])
def test_an_output_dir_that_cannot_be_written(disk, tmp_path, where, capfd, monkeypatch):
    monkeypatch.setattr("spark_vl.setup.load_updater", None)  # nothing large is loaded first
    if where == "read-only":
        folder = disk("ro") / "run"
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMALL, f"--output_dir={folder}"])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert f"output_dir: {folder} cannot be written to" in said


def test_two_runs_in_one_folder(tmp_path):
    folder = tmp_path / "run"
    with start(1, "single", *ENDLESS, f"--output_dir={folder}") as first:
        first.wait_until(lambda: latest(folder))
        second = launch(1, "single", *ENDLESS, f"--output_dir={folder}", "--resume=auto")
        assert second.returncode == 2
        assert f"output_dir: another run is at work in {folder}" in second.stdout
        first.terminate()
        ended = first.finish()
    assert ended.returncode == 0
    steps = [line["step"] for line in lines(folder, "metrics")]
    assert steps == list(range(1, len(steps) + 1))
    assert latest(folder).name == f"step-{len(steps):06d}"


# ── a process ──


def in_the_second_step(run: Run, folder: Path) -> None:
    """Wait until the processes, which tell each other once a second, know that they are there."""
    run.wait_until(lambda: "step 1/" in run.output() and latest(folder))
    time.sleep(2)
    assert "step 2/" not in run.output(), "a step is too short"


def assert_named(output: str, rank: int) -> None:
    """`output` says that `rank` is missing, and what it was at."""
    said = rf"rank {rank} has died or hangs: silent for \d+ s, it was in step 2, (sampling|verifying|updating) "
    assert re.search(said, output), output


@pytest.mark.parametrize(("strategy", "rank"), [("zero3", 1), ("ddp", 0)])
def test_a_process_that_dies(tmp_path, strategy, rank):
    folder = tmp_path / "run"
    with start(2, strategy, *ENDLESS, *LONG_STEPS, f"--output_dir={folder}") as run:
        in_the_second_step(run, folder)
        run.worker(rank).kill()
        died = time.monotonic()
        ended = run.finish()
    assert time.monotonic() - died < 60
    assert ended.returncode != 0
    assert_named(ended.stdout, rank)
    assert latest(folder)


def test_a_process_that_hangs(tmp_path):
    folder = tmp_path / "run"
    settings = (*ENDLESS, *LONG_STEPS, f"--output_dir={folder}", "--distributed.timeout_s=10")
    with start(2, "ddp", *settings) as run:
        in_the_second_step(run, folder)
        hanging, other = run.worker(1), run.worker(0)
        hanging.suspend()
        hung = time.monotonic()
        run.wait_until(lambda: not psutil.pid_exists(other.pid))
        assert time.monotonic() - hung < 40
        hanging.kill()
        ended = run.finish()
    assert ended.returncode != 0
    assert_named(ended.stdout, 1)
    assert latest(folder)


def test_a_process_that_computes_nan(tmp_path, monkeypatch):
    monkeypatch.setenv("ADD", "nan")
    arguments = (*SHARDED, *LINEAR, "--steps=3", f"--output_dir={tmp_path / 'run'}")
    ended = launch(2, "zero3", *arguments, module=DRIVER)
    assert ended.returncode == 0, ended.stdout
    assert_second_update_was_skipped(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_process_that_scores_otherwise_than_it_samples_stops_all(tmp_path, monkeypatch, strategy):
    """The other process has no group to check, and stops with it; the launcher may end it before it has said so."""
    monkeypatch.setenv("ADD", "causal")
    arguments = (*SHARDED, "--data.prompts_per_step=1", f"--output_dir={tmp_path / 'run'}")
    ended = launch(2, strategy, *arguments, module=DRIVER)
    assert ended.returncode == 1, ended.stdout
    said = re.findall(r"spark-vl: stopped: before the update of step 1, .*packed ≠ alone = sampler", ended.stdout)
    assert len(said) in (1, 2), ended.stdout
    assert not lines(tmp_path / "run", "metrics")


# ── the checkpoint ──


def test_damage_is_found_in_every_file(copy):
    trainer = make_trainer(copy)
    checkpoint = latest(copy)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (changed, content[:-1], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            said = refusal(
                lambda: check_checkpoint(
                    trainer.accelerator, find_checkpoint(checkpoint.parent, "auto"), trainer.config
                )
            )
            assert re.search(rf"[ (]{re.escape(str(path.relative_to(checkpoint)))}\b", said)
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_not_resumed_from(copy, capsys):
    (latest(copy) / "optimizer.safetensors").unlink()
    arguments = ["train", *SMALL, f"--output_dir={copy}"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--resume=auto"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{copy}/checkpoints/step-000012: is damaged: optimizer.safetensors is missing" in said
    assert "--resume PATH (step-000009)" in said


def test_two_processes_then_one_then_two(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    arguments = (*SMALL, NO_EVALUATION, f"--output_dir={folder}", "--resume=auto")
    with start(2, "ddp", *arguments) as run:
        run.wait_until(lambda: "step 4/" in run.output())
        run.worker(1).terminate()
        assert run.finish().returncode == 0

    def stop_after_eight_steps(*args, **kwargs):
        if trainer.step == 8:
            signal.raise_signal(signal.SIGTERM)
        return {}

    trainer = make_trainer(folder, NO_EVALUATION, evaluate=stop_after_eight_steps)
    assert trainer.step in (4, 5)
    sampler = trainer.feed.sampler
    assert round(sampler.epoch * len(sampler)) == 4 * trainer.step
    ids = waiting(latest(folder))
    assert len(ids) > 3
    held = [record["id"] for each in trainer.feed.state_dict()["waiting"] for record in each["records"]]
    assert sorted(held) == sorted(ids)
    assert not trainer.train()

    monkeypatch.setenv("ADD", "held")
    ids = waiting(latest(folder))
    assert launch(2, "ddp", *arguments, module=DRIVER).returncode == 0
    held = [json.loads((folder / f"held.rank{rank}.json").read_text()) for rank in range(2)]
    assert sorted(held[0] + held[1]) == sorted(ids)
    assert abs(len(held[0]) - len(held[1])) <= 2  # pairs stay together

    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))
    drawn = [line["data/epoch"] * len(sampler) for line in metrics(folder)]
    assert drawn == pytest.approx(range(4, 49, 4))


def waiting(checkpoint: Path) -> list[str]:
    """The ids of the prompts that wait, of all processes."""
    states = [json.loads(path.read_text()) for path in checkpoint.glob("trainer.rank*.json")]
    return [record["id"] for state in states for each in state["feed"]["waiting"] for record in each["records"]]


def test_sharded_state_is_not_cut_anew(whole_zero3, tmp_path):
    copy = shutil.copytree(whole_zero3, tmp_path / "copy")
    said = refusal(lambda: make_trainer(copy, *SHARDED))
    assert "was written under zero3, this run is launched under single" in said
    assert f"--model.path {copy / 'checkpoints' / 'step-000006' / 'model'}" in said
    ended = launch(1, "zero3", *SHARDED, f"--output_dir={copy}", "--resume=auto")
    assert ended.returncode != 0
    assert "was written by 2 processes, this run has 1, and zero3 cuts the optimizer's state" in ended.stdout


@pytest.mark.parametrize(("strategy", "unpickled"), [("zero3", "pytorch_model/zero*.pt"), ("fsdp2", "*/.metadata")])
def test_a_checkpoint_that_can_hold_code_has_to_be_trusted_outside_of_its_run(tmp_path, strategy, unpickled):
    whole = launch(2, strategy, *SHARDED, f"--output_dir={tmp_path / 'whole'}", deadline_s=300)  # it may compile
    assert whole.returncode == 0, whole.stdout
    theirs = tmp_path / "whole" / "checkpoints" / "step-000004"
    arguments = (*SHARDED, f"--output_dir={tmp_path / 'run'}")
    trusted = launch(2, strategy, *arguments, f"--resume={theirs}", "--trust-checkpoint")
    assert trusted.returncode == 0, trusted.stdout
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "whole").keys()
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "whole")[name]), name

    for file in theirs.glob(unpickled):
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    sign(theirs)
    refused = launch(2, strategy, *SHARDED, f"--output_dir={tmp_path / 'other'}", f"--resume={theirs}")
    assert refused.returncode != 0
    assert f"found {theirs}, allowed: files below output_dir ({tmp_path / 'other'})" in refused.stdout
    assert not (tmp_path / "marker").exists()
    launch(2, strategy, *SHARDED, f"--output_dir={tmp_path / 'other'}", f"--resume={theirs}", "--trust-checkpoint")
    assert (tmp_path / "marker").exists(), "the bomb is a dud"


def test_what_a_killed_run_had_begun_to_write_is_removed(copy):
    (copy / "checkpoints" / ".step-000010.partial").mkdir()
    make_trainer(copy, "--steps=13", allow_config_change=True).train()
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["latest", "step-000012", "step-000013"]


def test_a_changed_configuration(copy):
    changed = ("--optimizer.lr=0.002", "--steps=13")
    said = refusal(lambda: make_trainer(copy, *changed, "--checkpoint.every=7"))
    assert "steps: 12 → 13; optimizer.lr: 0.0001 → 0.002. " in said
    assert "--allow-config-change" in said
    assert "checkpoint.every" not in said  # changes nothing that is computed
    assert make_trainer(copy, *changed, allow_config_change=True).train()
    assert metrics(copy)[-1]["step"] == 13
    assert metrics(copy)[-1]["update/lr"] == 0.002
