"""Runs as a user starts them: real processes, each under a deadline at which all of them are killed and the test fails.

launch(2, "zero3", *SMALL, f"--output_dir={folder}")  # to its end

with start(1, "single", *SMALL, f"--output_dir={folder}") as run:
    run.wait_until(lambda: "step 3/" in run.output())
    run.send_signal(signal.SIGTERM)
    assert run.finish().returncode == 0
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from spark_vl.run.shards import find_shards

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
FILES = {"zero1": "tests/distributed/zero1.yaml"} | {
    name: f"scripts/accelerate/{file}.yaml"
    for name, file in {
        "ddp": "ddp",
        "fsdp2": "fsdp2",
        "zero2": "zero2",
        "zero3": "zero3_cpu",
        "zero3_offload": "zero3_offload",
    }.items()
}
"""How the weights are held → launch file. `single` needs none."""
SMALL = (
    "--config=scripts/configs/digits/spark.yaml",
    "--steps=12",
    "--data.prompts_per_step=4",
    "--rollout.n=4",
    "--evaluation.problems=8",
    "--evaluation.samples=2",
    "--evaluation.every=4",
    "--checkpoint.every=3",
)
"""The digits run in seconds; it needs an `--output_dir`."""
NO_EVALUATION = "--evaluation.recipes=[]"
SHARDED = (*SMALL, NO_EVALUATION, "--steps=6", "--checkpoint.every=2")
"""Shorter still, for several processes, which take longer for everything."""
DEADLINE_S = 180.0
# DeepSpeed compiles an extension at its first start on CPUs. Environments that share ~/.cache would do so in turn.
ENVIRONMENT = {"TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions"}


class Run(subprocess.Popen):
    """A run that was started. Leaving its context kills what is left of it."""

    def __init__(self, command: list[str], deadline_s: float) -> None:
        self._ends_at = time.monotonic() + deadline_s
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 - a pipe would have to be emptied all the time
        self._mark = uuid.uuid4().hex  # in the environment of all its processes, orphans too
        super().__init__(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | os.environ | {"MARK": self._mark},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        self._log.close()

    def output(self) -> str:
        """What it has said so far, on stdout and stderr."""
        return Path(self._log.name).read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that live, in whatever session they are: torchrun gives each worker its own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MARK") == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def worker(self, rank: int) -> psutil.Process:
        """The process of `rank` under a launcher."""
        (worker,) = [p for p in self.processes() if p.environ().get("RANK") == str(rank) and p.ppid() == self.pid]
        return worker

    def kill_all(self) -> None:
        """SIGKILL to all its processes, as when the machine goes down."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()

    def wait_until(self, happened: Callable[[], T]) -> T:
        """What `happened` returns, as soon as that is true; fails where it can no more become true."""
        while not (result := happened()):
            self._fail_after_deadline()
            if self.poll() is not None and not (result := happened()):
                pytest.fail(f"the run has ended with {self.returncode} before it:\n{self.output()[-3000:]}")
            time.sleep(0.002)
        return result

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Its exit code and output, when it has ended by itself."""
        while self.poll() is None:
            self._fail_after_deadline()
            time.sleep(0.01)
        return subprocess.CompletedProcess(self.args, self.returncode, self.output())

    def _fail_after_deadline(self) -> None:
        if time.monotonic() > self._ends_at:
            self.kill_all()
            pytest.fail(f"the run was killed at its deadline:\n{self.output()[-3000:]}")


def start(
    n: int,
    strategy: str,
    *arguments: str,
    command: str = "train",
    module: str = "spark_vl",
    deadline_s: float = DEADLINE_S,
) -> Run:
    """Start `python -m MODULE COMMAND arguments` on `n` processes, under `accelerate launch` unless `single`."""
    run = ["-m", module, command, *arguments]
    if strategy == "single":
        assert n == 1
        return Run([sys.executable, *run], deadline_s)
    options = [
        f"--config_file={FILES[strategy]}",
        f"--num_processes={n}",
        f"--main_process_port={_free_port()}",
    ]
    return Run([sys.executable, "-m", "accelerate.commands.launch", *options, *run], deadline_s)


def launch(n: int, strategy: str, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """As `start`, to the end."""
    with start(n, strategy, *arguments, **settings) as run:
        return run.finish()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of `name`.jsonl."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(folder, "metrics")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the final model."""
    return load_file(folder / "model" / "model.safetensors")


def judgments(folder: Path) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """The rows of each configuration, split and rank, in order."""
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for shard in find_shards(folder / "judgments"):
        rows.setdefault((shard.config, shard.split, shard.rank), []).extend(pq.read_table(shard.path).to_pylist())
    return rows


def assert_same_run(folder: Path, other: Path, *, same_files: bool = True) -> None:
    """What two runs have computed and written down is the same to the last bit.

    Args:
        same_files: whether judgments are cut into the same files; a stop by a signal is one more place to cut.
    """
    assert judgments(folder) == judgments(other)
    assert metrics(folder) == metrics(other)
    assert lines(folder, "evaluations") == lines(other, "evaluations")
    shards: list[Path] = []
    if same_files:
        shards = sorted(path.relative_to(other) for path in (other / "judgments").rglob("*.parquet"))
        assert shards == sorted(
            path.relative_to(folder) for path in (folder / "judgments").rglob("*") if path.is_file()
        )
    for path in (*shards, Path("model", "model.safetensors")):
        assert (folder / path).read_bytes() == (other / path).read_bytes(), path


def latest(folder: Path) -> Path | None:
    """The run's latest checkpoint, after a check that it is whole; None: there is no `latest` yet."""
    pointer = folder / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    checkpoint = pointer.parent / pointer.read_text()
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    found = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    del found["manifest.json"]
    assert {name: (file["bytes"], file["sha256"]) for name, file in listed.items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in found.items()
    }
    return checkpoint


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
