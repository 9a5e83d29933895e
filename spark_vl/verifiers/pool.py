"""Runs verifiers in worker processes with hard limits on time and memory: one that hangs or dies costs one item.

Workers are plain subprocesses, not `multiprocessing` ones: nothing is forked from a parent that holds torch, the
parent's main module is not imported again, and any thread may start them. The parent sends a worker a batch; the worker
answers `READY` once it has imported the batch's verifiers, and then one verdict an item. So the parent knows at every
moment which item runs and since when, and after a kill which items were not begun.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Literal

from spark_vl.records import PromptRecord, Verdict, plain_text
from spark_vl.verifiers.base import VERIFIERS, get_verifier, run_verifier

INLINE = frozenset({"choice", "number", "count", "text", "list", "set", "interval", "json_field", "judgment"})
"""Verifiers run in the calling process: they search text in linear or bounded time, so they need no deadline and no
worker."""

START_S = 120.0
"""Seconds that a worker may take to start and to import a batch's verifiers."""
BATCH = 32
"""Most items sent to a worker at a time."""
READY = "ready"
OUT_OF_MEMORY = 75
"""Exit code of a worker whose verifier has met the limit on memory."""
PARENT_CHECK_S = 2.0
"""Seconds between the looks of an idle worker at whether its parent is alive."""


class VerifierPool:
    """Worker processes that verify completions; a context manager. Workers start on first need and are kept.

    Counted over the pool's life: `timeouts` and `errors` (verdicts with that status), `restarts` (workers that hung or
    died). One call of `verify` runs at a time; others wait for it.

    Args:
        workers: number of processes.
        timeout_s: wall-clock seconds that one completion may take, imports not counted.
        memory_mb: MiB that a worker may hold for itself, imports counted (math: 60, with torch: 800), and so may each
            process that a verifier starts. Linux; memory that processes share is not counted.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 10.0, memory_mb: int = 2048) -> None:
        if workers < 1 or timeout_s <= 0 or memory_mb < 1:
            found = f"{workers}, {timeout_s} and {memory_mb}"
            raise ValueError(f"workers and memory_mb must be at least 1 and timeout_s above 0, not {found}")
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self.timeouts = self.errors = self.restarts = 0
        self._started: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A later `verify` starts new ones."""
        while self._started:
            self._started.pop().end()

    def verify(
        self, items: Sequence[tuple[str, PromptRecord]], *, progress: Callable[[int], None] = lambda done: None
    ) -> list[Verdict]:
        """One verdict for each (completion, record), in order.

        A verifier that passes the deadline gives status `timeout`; one that raises, needs too much memory or kills its
        process, `error`; all score 0. Workers get neither messages nor images, and see `<image>` in the question.

        Args:
            progress: called with how many more items are done, in this thread and whenever some are.

        Raises:
            ValueError: a record names an unknown verifier.
            RuntimeError: a worker cannot start.
        """
        for name in {record.verifier for _, record in items} - VERIFIERS.keys():
            get_verifier(name)
        with self._lock:
            try:
                verdicts = self._verify(items, progress)
            except BaseException:
                self.close()  # what the workers still have to say belongs to this call, not to the next
                raise
            self.timeouts += sum(verdict.status == "timeout" for verdict in verdicts)
            self.errors += sum(verdict.status == "error" for verdict in verdicts)
        return verdicts

    def _verify(self, items: Sequence[tuple[str, PromptRecord]], progress: Callable[[int], None]) -> list[Verdict]:
        verdicts = {i: run_verifier(*item) for i, item in enumerate(items) if item[1].verifier in INLINE}
        if verdicts:
            progress(len(verdicts))
        todo = deque(i for i in range(len(items)) if i not in verdicts)
        batch = min(BATCH, 1 + len(todo) // (4 * self.workers))  # small enough that all workers end at about one time

        def lose(worker: _Worker, status: Literal["timeout", "error"]) -> None:
            """Ends a worker that hung or died. The item that it was at pays with a verdict, the others go back."""
            code = worker.end(grace_s=0.0 if status == "timeout" else 1.0)
            self._started.remove(worker)
            self.restarts += 1
            if worker.running:
                reason = f"more than {self.timeout_s:g} s" if status == "timeout" else self._cause(code)
                verdicts[worker.queue.popleft()] = Verdict(0.0, None, status, reason)
            elif worker.fresh:
                raise RuntimeError(f"a verifier worker did not start (exit code {code}); its own words are on stderr")
            todo.extendleft(reversed(worker.queue))

        while (done := len(verdicts)) < len(items):
            while todo and (worker := self._idle_worker()):
                chunk = [todo.popleft() for _ in range(min(batch, len(todo)))]
                worker.send(chunk, [_without_images(*items[i]) for i in chunk])
            busy = [worker for worker in self._started if worker.queue]
            patience_s = min(worker.deadline for worker in busy) - time.monotonic()
            answered = wait([worker.pipe for worker in busy], max(0.0, patience_s))
            for worker in busy:
                if worker.pipe in answered:
                    try:
                        verdict = worker.receive(self.timeout_s)
                    except (EOFError, OSError):
                        lose(worker, "error")
                    else:
                        if verdict is not None:
                            verdicts[worker.queue.popleft()] = verdict
                elif time.monotonic() >= worker.deadline:
                    lose(worker, "timeout")
            if len(verdicts) > done:
                progress(len(verdicts) - done)
        return [verdicts[i] for i in range(len(items))]

    def _cause(self, code: int) -> str:
        """Why a worker died that ended with this exit code."""
        if code == OUT_OF_MEMORY:
            return f"MemoryError: more than {self.memory_mb} MiB"
        reason = f"its process died, exit code {code}"
        # The system kills where memory runs out, and C code that is refused some aborts.
        return reason + ", perhaps for want of memory" if code in (-signal.SIGKILL, -signal.SIGABRT) else reason

    def _idle_worker(self) -> _Worker | None:
        """A worker with nothing to do, a new one if there may be more; else None."""
        idle = next((worker for worker in self._started if not worker.queue), None)
        if idle is None and len(self._started) < self.workers:
            idle = _Worker(self.timeout_s, self.memory_mb)
            self._started.append(idle)
        return idle


class _Worker:
    """The parent's side of one subprocess."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.pipe, theirs = Pipe()
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as ours:
            # A worker that does not read, held by a thread that a verifier left behind, must not hold the parent too.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(START_S), 0))
        self.queue: deque[int] = deque()
        """Indices of the items that it still has to answer, the one that it is at first."""
        self.deadline = 0.0
        """When, on the monotonic clock, it is to be ended if it has not said anything."""
        self.running = False
        """Whether it has imported the verifiers of its batch, and so is at the first item of its queue."""
        self.fresh = True
        """Whether it has yet to say a first word."""
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from spark_vl.verifiers import pool; pool.work()"
        )
        arguments = [json.dumps([str(path) for path in sys.path])]
        arguments += map(str, (theirs.fileno(), os.getpid(), timeout_s, memory_mb))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a verifier prints does not belong among the parent's output
            start_new_session=True,  # so that ending it ends what it started, and Ctrl-C reaches the parent only
        )
        theirs.close()

    def send(self, indices: list[int], items: list[tuple[str, PromptRecord]]) -> None:
        self.queue.extend(indices)
        self.running = False
        self.deadline = time.monotonic() + START_S
        with contextlib.suppress(OSError):  # it has died, and reading will say so
            self.pipe.send(items)

    def receive(self, timeout_s: float) -> Verdict | None:
        """The verdict on the first item of the queue; None for `READY`. Raises EOFError or OSError if it has died."""
        said = self.pipe.recv()
        self.deadline = time.monotonic() + timeout_s
        self.running, self.fresh = True, False
        return None if said == READY else said

    def end(self, grace_s: float = 0.0) -> int:
        """Kills the worker, and the processes that it started; its exit code, its own if it exits within the grace."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _without_images(completion: str, record: PromptRecord) -> tuple[str, PromptRecord]:
    record = replace(record, messages=(), question=(plain_text(record.question),), origin=None)
    return completion, replace(record, verifier=VERIFIERS.get(record.verifier, record.verifier))


def work() -> None:
    """The worker's side. It ends when the parent does, and what its verifiers have started with it.

    Arguments: `sys.path`, the pipe's descriptor, the parent's process id, the timeout in seconds, the memory in MiB.
    """
    descriptor, parent, timeout_s, memory_mb = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
    # Not RLIMIT_AS: libraries reserve far more addresses than they ever use.
    limits = (memory_mb * 2**20, *resource.getrlimit(resource.RLIMIT_DATA))
    resource.setrlimit(resource.RLIMIT_DATA, (min(x for x in limits if x != resource.RLIM_INFINITY),) * 2)
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # A scheduler may send them to all processes: the parent, which ends its step and saves, still needs verdicts.
        # Not SIG_IGN, which a verifier's own subprocesses would inherit.
        signal.signal(number, lambda *_: None)
    own = os.getpid()
    with open(os.devnull, "w") as nowhere, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while not pipe.poll(PARENT_CHECK_S):
                if os.getppid() != parent:  # and a fork of it holds the pipe, or this would be an EOFError
                    raise EOFError
            items = pipe.recv()
            for name in {record.verifier for _, record in items}:
                get_verifier(name)
            pipe.send(READY)
            for item in items:
                # Should the parent be gone, nobody kills a hung worker. This does, even if the hang holds the GIL.
                faulthandler.dump_traceback_later(2 * timeout_s + 1, file=nowhere, exit=True)
                verdict = run_verifier(*item)
                if os.getpid() != own:
                    os._exit(0)  # a fork that the verifier made; the item is the worker's
                if verdict.status == "error" and "MemoryError" in verdict.detail:
                    os._exit(OUT_OF_MEMORY)  # the verifier may still hold it all: the next item gets a new process
                pipe.send(verdict)
            faulthandler.cancel_dump_traceback_later()
    os.killpg(own, signal.SIGKILL)
