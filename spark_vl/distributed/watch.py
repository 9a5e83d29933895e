"""Finds the process that died or hangs, and says where it was.

Each process writes to a store, once a second, that it is alive, and its step and phase. When one dies, the others hang
in a collective call, or fail with a message about sockets. From the store they learn which one it was, and where.

The store listens on the main process's address alone. Whoever reaches it can read and write without a password, so the
processes sign what they write, and no other value ends a process. The network between them has to be trusted all the
same: torch.distributed itself takes anybody's word.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import DistError, TCPStore

_BEAT_S = 1.0
_SILENT_S = 5.0
"""Seconds after which a process counts as dead, once a call has failed."""
_DEAD_S = 60.0
"""Seconds after which it counts as dead without any other sign."""


@dataclass(frozen=True)
class Place:
    """Where a process is."""

    step: int = 0
    """Counted from 1; 0: before the first."""
    phase: str = "starting"
    progress: int = 0
    """Increases with everything that is done."""
    beat: int = 0
    """Increases once a second."""


@dataclass
class _Seen:
    """The last news of a process."""

    place: Place
    beat_at: float
    """On this process's monotonic clock."""
    progress_at: float


class Watch:
    """Watches the other processes from a thread; a context manager. Collective to enter.

    When a process has been silent, or none has made progress for `timeout_s`, it prints on stderr which and where, and
    ends this process. A single process watches nothing.

    Args:
        timeout_s: see `DistributedConfig`.
    """

    def __init__(self, accelerator: Accelerator, *, timeout_s: float) -> None:
        self.accelerator, self.timeout_s = accelerator, timeout_s
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self._here = Place()
        self._seen: dict[int, _Seen] = {}
        self._store_lost = False
        self.foreign = 0
        """How often a value was found that no process of the run has written."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.processes > 1:
            self._store = self._open_store()
            self._tell()
            self.accelerator.wait_for_everyone()  # each has told once before anyone asks
            now = time.monotonic()
            self._seen = {rank: _Seen(self._here, now, now) for rank in range(self.processes)}
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # Communication that failed, maybe because another process is gone: say which.
        if self.processes > 1 and isinstance(error, RuntimeError | OSError):
            error.add_note(f"rank {self.rank}: {self.explain()}")
        self._ended.set()
        if self.processes > 1:
            self._thread.join()

    def at(self, step: int, phase: str) -> None:
        """Note that this process has begun `phase` of `step`, or made progress in it."""
        with self._lock:
            self._here = Place(step, phase, self._here.progress + 1, self._here.beat)

    def explain(self) -> str:
        """What to say of the other processes after a collective call has failed. Takes some seconds to be sure."""
        deadline = time.monotonic() + 2 * _SILENT_S
        while not (silent := self._silent(_SILENT_S)) and time.monotonic() < deadline:
            time.sleep(_BEAT_S / 4)
        return self._describe(silent)

    def _open_store(self) -> TCPStore:
        """Held by the main process, on a port that the system chooses and the existing group tells the others."""

        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=_SILENT_S)
        if self.accelerator.is_main_process:
            listener = _listen(host)
            port = listener.getsockname()[1]
            store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=listener.detach(),  # the store closes it
            )
            [_, self._key] = broadcast_object_list([port, secrets.token_bytes(32)])
            return store
        [port, self._key] = broadcast_object_list([0, b""])
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def _name(self, rank: int) -> str:
        """Where the store has the news of `rank`; a name that cannot be guessed."""
        return hmac.digest(self._key, b"name %d" % rank, "sha256").hex()

    def _signed(self, rank: int, text: str) -> str:
        return f"{hmac.digest(self._key, f'{rank} {text}'.encode(), 'sha256').hex()} {text}"

    def _read(self, rank: int, value: bytes) -> Place | None:
        """What `rank` has written; None, counted, if it has not written that."""
        text = value.partition(b" ")[2].decode(errors="replace")
        if not hmac.compare_digest(self._signed(rank, text).encode(), value):
            if not self.foreign:
                print(
                    f"spark-vl: rank {self.rank}: somebody else writes into the watch's store on "
                    f"{os.environ['MASTER_ADDR']}; that is ignored, but the network is not to be trusted",
                    file=sys.stderr,
                    flush=True,
                )
            self.foreign += 1
            return None
        return Place(**json.loads(text))

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_S):
            self._exchange()
            if silent := self._silent(min(_DEAD_S, self.timeout_s)):
                self._stop(self._describe(silent))
            now = time.monotonic()
            if all(now - seen.progress_at > self.timeout_s for seen in self._seen.values()):
                self._stop(
                    f"no process has made progress for {self.timeout_s:g} s (distributed.timeout_s): "
                    + self._describe([])
                )

    def _tell(self) -> None:
        with self._lock:
            self._here = replace(self._here, beat=self._here.beat + 1)
            text = json.dumps(asdict(self._here))
        self._store.set(self._name(self.rank), self._signed(self.rank, text))

    def _exchange(self) -> None:
        try:
            self._tell()
            told = self._store.multi_get([self._name(rank) for rank in range(self.processes)])
        except DistError:  # the store died with the main process
            self._store_lost = True
            return
        self._store_lost = False
        now = time.monotonic()
        for rank, value in enumerate(told):
            place, seen = self._read(rank, value), self._seen[rank]
            if place is None:  # it says nothing of the process, not even that it is silent
                seen.beat_at = now
            elif place.beat > seen.place.beat:  # an older value, written again, is no news either
                seen.beat_at = now
                if place.progress > seen.place.progress:
                    seen.progress_at = now
                seen.place = place

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that have been silent for `seconds`."""
        now = time.monotonic()
        ranks = [rank for rank, seen in self._seen.items() if rank != self.rank and now - seen.beat_at > seconds]
        return [0] if ranks and self._store_lost else ranks

    def _describe(self, silent: list[int]) -> str:
        now = time.monotonic()

        def place(rank: int) -> str:
            where = self._here if rank == self.rank else self._seen[rank].place
            return f"step {where.step}, {where.phase}"

        if silent:
            ranks = "; ".join(
                f"rank {rank} has died or hangs: silent for {now - self._seen[rank].beat_at:.0f} s, "
                f"it was in {place(rank)}"
                for rank in silent
            )
            return f"{ranks} (rank {self.rank} is in {place(self.rank)})"
        return "all processes are alive: " + "; ".join(f"rank {rank} in {place(rank)}" for rank in sorted(self._seen))

    def _stop(self, message: str) -> None:
        """End this process, whose main thread is in a call that does not return."""
        print(f"spark-vl: rank {self.rank} stops: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def _listen(host: str) -> socket.socket:
    """A socket on a free port of `host` alone, which must be an address of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"MASTER_ADDR: found {host!r}; allowed: an address of the main process's machine"
        ) from error
    listener.listen(socket.SOMAXCONN)
    return listener
