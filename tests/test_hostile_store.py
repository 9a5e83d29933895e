"""A stranger who reaches the watch's store can neither forge a process's news nor end one."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from spark_vl.distributed import watch
from spark_vl.distributed.watch import Place, Watch


class Pair:
    """The watches of two processes, without their threads, and a stranger's connection to their store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Any] = []

        def broadcast(values: list[Any]) -> list[Any]:
            told.extend(values if not told else [])  # the main process enters first
            return told[:2]

        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setattr(watch, "broadcast_object_list", broadcast)
        monkeypatch.setattr(Watch, "_run", lambda self: None)
        self.watches = [
            Watch(
                SimpleNamespace(  # type: ignore[arg-type]
                    process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
                ),
                timeout_s=60,
            ).__enter__()
            for rank in (0, 1)
        ]
        self.port: int = told[0]
        self.stranger = TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=2))

    @property
    def of_rank_1(self) -> str:
        """The key of rank 1's news. A stranger finds it in the list of keys."""
        keys = [key for key in self.stranger.list_keys() if json_of(self.stranger.get(key))]
        assert len(keys) == 2
        return next(key for key in keys if key == self.watches[0]._name(1))

    def seen(self) -> Place:
        """What rank 0 knows of rank 1."""
        self.watches[0]._exchange()
        return self.watches[0]._seen[1].place


def json_of(value: bytes) -> bool:
    return value.endswith(b"}")


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(monkeypatch)
    yield made
    for each in made.watches:
        each.__exit__(None, None, None)


def test_the_processes_hear_of_each_other(pair: Pair) -> None:
    pair.watches[1].at(3, "generate")
    pair.watches[1]._exchange()
    assert (pair.seen().step, pair.seen().phase) == (3, "generate")
    assert pair.watches[0].foreign == 0


@pytest.mark.parametrize(
    "junk",
    ["", "junk", "{}", "1", "[]", "\ud7ff\U0010ffff", json.dumps(asdict(Place(beat=10**9))), "0" * 64 + " {}"],
)
def test_junk_is_ignored_and_counted(pair: Pair, junk: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair.watches[1].at(3, "generate")
    pair.watches[1]._exchange()
    before = pair.seen()
    pair.stranger.set(pair.of_rank_1, junk)
    assert pair.seen() == before
    assert pair.seen() == before
    assert pair.watches[0].foreign == 2
    assert capsys.readouterr().err.count("somebody else writes into the watch's store") == 1


def test_junk_is_not_silence(pair: Pair) -> None:
    """Else whoever writes junk more often than once a second would end the run."""
    pair.stranger.set(pair.of_rank_1, "junk")
    watching = pair.watches[0]
    watching._seen[1].beat_at -= 1000
    watching._exchange()
    assert watching._silent(5) == []


def test_news_of_another_process_and_old_news_count_for_nothing(pair: Pair) -> None:
    key, own = pair.of_rank_1, pair.watches[0]._name(0)
    old = pair.stranger.get(key).decode()
    pair.watches[1]._exchange()
    before = pair.seen()
    pair.stranger.set(key, pair.stranger.get(own).decode())  # of rank 0, signed
    assert pair.seen() == before
    assert pair.watches[0].foreign == 1
    pair.stranger.set(key, old)
    pair.watches[0]._seen[1] = replace(pair.watches[0]._seen[1], beat_at=-1000)
    assert pair.seen() == before
    assert pair.watches[0]._silent(5) == [1]


def test_the_store_listens_on_the_address_of_the_main_process_alone(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.port), timeout=2):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", pair.port), timeout=2)


def test_an_address_of_another_machine_is_an_error_in_words() -> None:
    with pytest.raises(OSError, match=r"MASTER_ADDR: found '192.0.2.1'; allowed: an address of the main process"):
        watch._listen("192.0.2.1")
