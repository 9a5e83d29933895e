"""Runs verifiers in worker processes with hard limits on time and memory: one that hangs or dies costs one item.

Workers are plain subprocesses, not `multiprocessing` ones: nothing is forked from a parent that holds torch, the
parent's main module is not imported again, and any thread may start them. The parent sends a worker a batch; the worker
answers `READY` once it has imported the batch's verifiers, and then one verdict per item. So the parent always knows
which item runs and since when, and after a kill, which items were not begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Literal

from spark_vl.records import PromptRecord, RecycledRecord, Verdict, plain_text
from spark_vl.verifiers.base import VERIFIERS, get_verifier, run_verifier

INLINE = frozenset({"choice", "number", "count", "text", "list", "set", "interval", "json_field", "judgment"})
"""Verifiers that run in the calling process: they take linear or bounded time, so they need neither deadline nor
worker."""

START_S = 120.0
"""Seconds that a worker may take to start and to import a batch's verifiers."""
LONGEST_TIMEOUT_S = 86400.0
BATCH = 32
"""Most items sent to a worker at a time."""
READY = "ready"
OUT_OF_MEMORY = 75
"""Exit code of a worker whose verifier has reached the limit on memory."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""A scheduler may send them to all processes, and the parent, which ends its step and saves, still needs verdicts."""
LONGEST_ANSWER = 2**26
"""Limit on a worker's message in bytes. Text that a verifier writes to the pipe mostly decodes as a greater length."""


class VerifierPool:
    """Worker processes that verify completions; a context manager. Workers start on first need and are kept.

    Counted over the pool's life: `timeouts` and `errors` (verdicts with that status), `restarts` (workers that hung or
    died). One call of `verify` or `close` runs at a time; others wait for it. A fork of the process has a pool without
    workers, which starts its own.

    When a worker ends, the processes that its verifiers have started are killed. When the pool's own process is killed,
    so are the workers and these processes (Linux; elsewhere a verifier that hangs then stays). A process that has left
    the worker's process group, with `setsid`, lives on.

    Args:
        workers: number of processes.
        timeout_s: wall-clock seconds that one completion may take, imports not counted. At most a day.
        memory_mb: private memory in MiB that a worker may have, imports counted (math: 60, with torch: 800), and also
            each process that a verifier starts. Linux only.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 10.0, memory_mb: int = 2048) -> None:
        for name, value in (("workers", workers), ("memory_mb", memory_mb)):
            if value < 1:
                raise ValueError(f"{name}: found {value}; allowed: at least 1")
        if not 0 < timeout_s <= LONGEST_TIMEOUT_S:  # nor is nan
            raise ValueError(f"timeout_s: found {timeout_s:g}; allowed: above 0, at most {LONGEST_TIMEOUT_S:g} (a day)")
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self.timeouts = self.errors = self.restarts = 0
        self._without_workers()
        _POOLS.add(self)

    def _without_workers(self) -> None:
        self._started: list[_Worker] = []
        self._lock = threading.Lock()
        self._user: int | None = None
        """The thread that holds the lock."""

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, once a call of `verify` in another thread is done. A later `verify` starts new ones."""
        with self._alone():
            self._end_workers()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other threads from using the workers, and ends the workers on an exception."""
        if self._user == threading.get_ident():
            raise RuntimeError("a call of verify is running in this thread: `progress` must not use or close the pool")
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            except BaseException:
                self._end_workers()  # what they would still send belongs to this call, not to the next
                raise
            finally:
                self._user = None

    def _end_workers(self) -> None:
        while self._started:
            self._started.pop().end()

    def verify(
        self, items: Sequence[tuple[str, PromptRecord]], *, progress: Callable[[int], None] = lambda done: None
    ) -> list[Verdict]:
        """One verdict for each (completion, record), in order.

        A verifier that exceeds the deadline gives status `timeout`; one that raises, needs too much memory or kills its
        process gives `error`; both score 0. Workers receive no messages and no images, and see `<image>` in the
        question.

        Args:
            progress: called in this thread, whenever items are done, with their number. Must not use the pool.

        Raises:
            ValueError: a record names an unknown verifier, or one that no other process can import.
            RuntimeError: a worker cannot start, or cannot import a verifier.
        """
        for name in {record.verifier for _, record in items} - VERIFIERS.keys():
            if name.startswith("__main__:"):
                raise ValueError(f"verifier {name!r}: workers cannot import what a script defines; put it in a module")
            get_verifier(name)
        with self._alone():
            verdicts = self._verify(items, progress)
            self.timeouts += sum(verdict.status == "timeout" for verdict in verdicts)
            self.errors += sum(verdict.status == "error" for verdict in verdicts)
        return verdicts

    def _verify(self, items: Sequence[tuple[str, PromptRecord]], progress: Callable[[int], None]) -> list[Verdict]:
        verdicts = {i: run_verifier(*item) for i, item in enumerate(items) if item[1].verifier in INLINE}
        if verdicts:
            progress(len(verdicts))
        todo = deque(i for i in range(len(items)) if i not in verdicts)
        batch = min(
            BATCH, 1 + len(todo) // (4 * self.workers)
        )  # small enough that all workers end at about the same time
        failed_starts = 0

        def lose(worker: _Worker, status: Literal["timeout", "error"], reason: str = "") -> None:
            """Ends a worker that hung or died. Its current item gets a verdict; the others go back into the queue."""
            nonlocal failed_starts
            code = worker.end(grace_s=0.0 if reason else 1.0)
            self._started.remove(worker)
            self.restarts += 1
            if worker.running:
                verdicts[worker.queue.popleft()] = Verdict(0.0, None, status, reason or self._cause(code))
            elif worker.fresh:
                failed_starts += 1  # one per worker is allowed: something outside may have killed it
                if failed_starts > self.workers or worker.complaint or status == "timeout":
                    said = worker.complaint or f"exit code {code}; its output is on stderr"
                    raise RuntimeError(f"a verifier worker did not start: {said}")
            todo.extendleft(reversed(worker.queue))

        while (done := len(verdicts)) < len(items):
            while todo and (worker := self._idle_worker()):
                chunk = [todo.popleft() for _ in range(min(batch, len(todo)))]
                worker.send(chunk, [_without_images(*items[i]) for i in chunk])
            busy = [worker for worker in self._started if worker.queue]
            patience_s = min(worker.deadline for worker in busy) - time.monotonic()
            answered = wait([worker.pipe for worker in busy], max(0.0, patience_s))
            for worker in busy:
                try:
                    if worker.pipe in answered:
                        if (verdict := worker.receive(self.timeout_s)) is not None:
                            verdicts[worker.queue.popleft()] = verdict
                    elif time.monotonic() >= worker.deadline and not worker.pipe.poll():
                        raise TimeoutError
                except (EOFError, ConnectionError):
                    lose(worker, "error")
                except (TimeoutError, BlockingIOError):
                    lose(worker, "timeout", f"more than {self.timeout_s:g} s")
                except Exception as error:
                    lose(worker, "error", f"its process sent something that is not a verdict ({error})")
            if len(verdicts) > done:
                progress(len(verdicts) - done)
        return [verdicts[i] for i in range(len(items))]

    def _cause(self, code: int) -> str:
        """Why a worker ended with this exit code."""
        if code == OUT_OF_MEMORY:
            return f"MemoryError: more than {self.memory_mb} MiB"
        reason = f"its process died, exit code {code}"
        # The system kills a process when memory runs out; C code aborts when an allocation fails.
        return reason + ", perhaps out of memory" if code in (-signal.SIGKILL, -signal.SIGABRT) else reason

    def _idle_worker(self) -> _Worker | None:
        """A worker with nothing to do, or a new one if the limit allows it; else None."""
        idle = next((worker for worker in self._started if not worker.queue), None)
        if idle is None and len(self._started) < self.workers:
            idle = _Worker(self.timeout_s, self.memory_mb)
            self._started.append(idle)
        return idle


_POOLS: weakref.WeakSet[VerifierPool] = weakref.WeakSet()


def _leave_workers_to_parent() -> None:
    """In a fork: the workers stay with the parent, and end with it even if the fork lives on."""
    for pool in _POOLS:
        for worker in pool._started:
            worker.pipe.close()
            worker.lifeline.close()
        pool._without_workers()


os.register_at_fork(after_in_child=_leave_workers_to_parent)


class _Worker:
    """The parent's side of one subprocess."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self.queue: deque[int] = deque()
        """Indices of the items that it still has to answer, its current one first."""
        self.deadline = 0.0
        """When, on the monotonic clock, it is ended unless it has sent something."""
        self.running = False
        """Whether it has imported the verifiers of its batch, and so runs the first item of its queue."""
        self.fresh = True
        """Whether it has yet to import its first verifiers."""
        self.complaint = ""
        """Why it could not import a verifier."""
        self.pipe, theirs = Pipe()
        self.lifeline, watched = Pipe()
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as ours:
            # A worker that does not read (a thread that a verifier left behind may block it), or that stops in the
            # middle of a message, must not block the parent.
            for option, seconds in ((socket.SO_SNDTIMEO, START_S), (socket.SO_RCVTIMEO, timeout_s)):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", math.ceil(seconds), 0))
        # -P keeps a json.py in the working folder from shadowing Python's; then sys.path becomes that of the parent.
        code = "import json, sys; sys.path = json.loads(sys.argv[1]); from spark_vl.verifiers.pool import work; work()"
        arguments = [json.dumps([str(path) for path in sys.path]), str(theirs.fileno()), str(memory_mb)]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited, until the worker has its handlers
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *arguments],
                pass_fds=[theirs.fileno(), watched.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints does not belong among the parent's output
                start_new_session=True,  # so that ending it ends what it started, and Ctrl-C reaches the parent only
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if sys.platform == "linux":
            # If the parent is gone, it cannot kill a hung worker and its children. The system does so as soon as the
            # other end of the lifeline is closed.
            fcntl.fcntl(watched, fcntl.F_SETOWN, -self.process.pid)
            fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(watched, fcntl.F_SETFL, os.O_ASYNC)
        theirs.close()
        watched.close()

    def send(self, indices: list[int], items: list[tuple[str, PromptRecord]]) -> None:
        self.queue.extend(indices)
        self.running = False
        self.deadline = time.monotonic() + START_S
        with contextlib.suppress(OSError):  # it has died, which reading will show
            self.pipe.send(items)

    def receive(self, timeout_s: float) -> Verdict | None:
        """The verdict on the first item of the queue; None for a message about the imports.

        Raises EOFError or ConnectionError if it has died, BlockingIOError if it stops halfway, ValueError or OSError if
        it has sent anything else.
        """
        answer = self.pipe.recv_bytes(LONGEST_ANSWER)
        try:
            said = pickle.loads(answer)
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not isinstance(said, Verdict if self.running else str):
            raise ValueError(f"{said!r:.100}")
        self.deadline = time.monotonic() + timeout_s
        if isinstance(said, Verdict):
            return said
        if said == READY:
            self.running, self.fresh = True, False
        else:
            self.complaint = said
        return None

    def end(self, grace_s: float = 0.0) -> int:
        """Kills the worker, unless it exits within `grace_s`, and what it started; returns its exit code."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.lifeline.close()
        return self.process.wait()


def _without_images(completion: str, record: PromptRecord) -> tuple[str, PromptRecord]:
    record = replace(record, messages=(), question=(plain_text(record.question),))
    if isinstance(record, RecycledRecord):
        record = replace(record, origin=replace(record.origin, completions=()))
    return completion, replace(record, verifier=VERIFIERS.get(record.verifier, record.verifier))


def work() -> None:
    """The worker's side. It ends, with all that its verifiers have started, when the parent does.

    Arguments: `sys.path`, the pipe's descriptor, the memory in MiB.
    """
    descriptor, memory_mb = int(sys.argv[2]), int(sys.argv[3])
    # Not RLIMIT_AS: libraries reserve far more address space than they use.
    limits = (memory_mb * 2**20, *resource.getrlimit(resource.RLIMIT_DATA))
    resource.setrlimit(resource.RLIMIT_DATA, (min(x for x in limits if x != resource.RLIM_INFINITY),) * 2)
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a verifier's own subprocesses would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    own = os.getpid()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            items = pipe.recv()
            try:
                for name in {record.verifier for _, record in items}:
                    get_verifier(name)
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
                raise
            pipe.send(READY)
            for item in items:
                verdict = run_verifier(*item)
                if os.getpid() != own:
                    os._exit(0)  # a fork that the verifier made; only the worker itself answers
                for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
                    signal.setitimer(timer, 0)  # a timer that the verifier left behind would kill the next item
                if verdict.status == "error" and "MemoryError" in verdict.detail:
                    os._exit(
                        OUT_OF_MEMORY
                    )  # the verifier may still hold the memory, so the next item gets a new process
                pipe.send(verdict)
    os.killpg(own, signal.SIGKILL)
