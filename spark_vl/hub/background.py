"""Publishing while a run trains: in a process of its own, so that nothing that happens to it touches training."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from spark_vl.config import ConfigError, PublishConfig
from spark_vl.hub.client import HubError, check_repo_name, find_token
from spark_vl.run.jsonl import append_lines
from spark_vl.run.paths import CHECKPOINTS, CONFIG, MODEL
from spark_vl.run.sinks import Sink

_WAITS_S = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Before a checkpoint is tried again; the last one from then on. A newer checkpoint takes its place."""


def check_publish_config(config: PublishConfig) -> None:
    """What can be checked before a run begins.

    Raises:
        ConfigError: the name of the repository is not spelled as the Hub allows, or there is no token.
    """
    if config.repo is None:
        return
    try:
        check_repo_name(config.repo, "publish.repo")
        find_token(config.token_from, "publish.token_from")
    except HubError as error:
        raise ConfigError(str(error)) from error


class BackgroundPublisher(Sink):
    """Publishes every `config.every`-th checkpoint; a failure is counted, written to `publish.jsonl` in the
    run's folder, and tried again.

    Args:
        waits_s: seconds before each new try.
    """

    def __init__(self, config: PublishConfig, run: Path, *, waits_s: tuple[float, ...] = _WAITS_S) -> None:
        self.config, self.run = config, run
        self.console = Console(highlight=False)
        self.published = 0
        self.failures = 0
        self._waits_s = waits_s
        self._saved = 0  # checkpoints
        self._last: Path | None = None  # the last of them
        self._target: Path | None = None  # newest that is to be published and is not yet
        self._lost: Path | None = None  # the newest one, if its files could not be kept
        self._fault = ""  # of the last failure
        self._closing = False
        self._child: subprocess.Popen[str] | None = None
        self._changed = threading.Condition()
        self._queue = run / "release" / "queue"
        shutil.rmtree(self._queue, ignore_errors=True)  # of a run that was killed
        self._thread = threading.Thread(target=self._work, name="publishing", daemon=True)
        self._thread.start()

    def on_checkpoint(self, step: int, checkpoint: Path) -> None:
        """See `Sink.on_checkpoint`. Returns at once."""
        self._saved += 1
        self._last = checkpoint
        if self._saved % self.config.every == 0:
            self._submit(checkpoint)

    def finish(self, *, wait: bool) -> None:
        """Publish the last checkpoint, and print how many were published and what failed.

        Args:
            wait: whether to wait for the last checkpoint, `config.wait_s` at most: where the run finished. A run that
                was told to stop does not wait.
        """
        if wait and self._last is not None and self._saved % self.config.every:
            self._submit(self._last)
        with self._changed:
            if wait and self._target is not None:
                self.console.print(f"publishing to {self.config.repo} …", soft_wrap=True)
                self._changed.wait_for(lambda: self._target is None, self.config.wait_s)
            self._closing = True
            left = self._target or self._lost
            if self._child is not None:
                self._child.kill()
            self._changed.notify_all()
        self._thread.join()
        shutil.rmtree(self._queue, ignore_errors=True)
        if not self._saved:
            return
        words = f"published {self.published} checkpoints to {self.config.repo}"
        if self.failures:
            words += f"; {self.failures} tries failed, the last one because: {self._fault}"
        if left is not None:
            again = shlex.join(["spark-vl", *self._command(self.run / CHECKPOINTS / left.name)])
            words += f". The last checkpoint is not published; publish it with\n{again}"
        self.console.print(words, soft_wrap=True, markup=False)

    def _submit(self, checkpoint: Path) -> None:
        """Make `checkpoint` the next one to publish. Links keep its files when the run deletes it."""
        kept = self._queue / checkpoint.name
        try:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(checkpoint / MODEL, kept / MODEL, copy_function=_link)
            _link(checkpoint / CONFIG, kept / CONFIG)
        except OSError as error:
            self._lost = checkpoint
            self._failed(checkpoint, f"its files cannot be kept: {error!s:.500}")
            return
        with self._changed:
            self._lost = None
            self._target = kept
            self._changed.notify_all()

    def _work(self) -> None:
        waits, tried = iter(self._waits_s), None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._target is not None or self._closing)
                if self._closing:
                    return
                target = self._target
            assert target is not None, "that, or closing, was waited for"
            if target != tried:
                waits, tried = iter(self._waits_s), target
            start = time.monotonic()
            try:
                fault = self._publish(target)
            except OSError as error:  # the process cannot be started
                fault = str(error)
            with self._changed:
                if self._closing:
                    return
                seconds = time.monotonic() - start
                if fault is None:
                    self.published += 1
                    self._note(target, True, seconds, "")
                    if self._target == target:
                        self._target = None
                        self._changed.notify_all()
                else:
                    self._failed(target, fault, seconds)
                    wait_s = next(waits, self._waits_s[-1])
                    self._changed.wait_for(partial(self._is_over, target), wait_s)
                if self._target != target:  # done, or a newer one has taken its place
                    shutil.rmtree(target, ignore_errors=True)

    def _is_over(self, target: Path) -> bool:
        """Whether `target` need not be tried again."""
        return self._target != target or self._closing

    def _publish(self, target: Path) -> str | None:
        """The reason that it failed; None: it did not."""
        with self._changed:
            if self._closing:
                return None
            self._child = subprocess.Popen(
                [sys.executable, "-m", "spark_vl", *self._command(target)],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a signal for the run is not for it
            )
        said, _ = self._child.communicate()
        if self._child.returncode == 0:
            return None
        said = said.rpartition("spark-vl: not published: ")[2].strip()
        return said[-2000:] or f"it ended with status {self._child.returncode}"

    def _command(self, checkpoint: Path) -> list[str]:
        config = self.config
        command = ["publish", "model", str(checkpoint), "--repo", str(config.repo)]
        command += ["--revision", config.revision] if config.revision else []
        command += ["--token-from", config.token_from] if config.token_from else []
        return command + (["--public"] if config.public else [])

    def _failed(self, checkpoint: Path, fault: str, seconds: float = 0.0) -> None:
        self.failures += 1
        self._fault = fault
        self._note(checkpoint, False, seconds, fault)
        self.console.print(
            f"publishing {checkpoint.name} failed, training goes on: {fault}", soft_wrap=True, markup=False
        )

    def _note(self, checkpoint: Path, ok: bool, seconds: float, fault: str) -> None:
        line = {"checkpoint": checkpoint.name, "ok": ok, "seconds": round(seconds, 1), "fault": fault}
        try:
            append_lines(self.run / "publish.jsonl", [line])
        except OSError as error:  # a full disk is for the trainer to find
            self.console.print(f"publish.jsonl cannot be written: {error}", soft_wrap=True, markup=False)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name of a file; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
