"""A Hub on the loopback for the tests of publishing, and processes that talk to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import Command, Ended, command
from tests.hub.driver import Driver, driver
from tests.hub.server import HubServer

ROOT = Path(__file__).parents[2]
IMPATIENT = """
from spark_vl.cli import main
from spark_vl.hub import client
client._WAITS_S = tuple(wait / 10 for wait in client._WAITS_S)
main()
"""
"""`spark-vl` that tries again ten times as soon."""


@pytest.fixture(scope="session")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def call(server) -> Iterator[Driver]:
    with driver(server.environment(SECOND_TOKEN=HubServer.READ)) as process:
        yield process


@pytest.fixture
def hub(server, call) -> Iterator[HubServer]:
    """The server with no repository, no memory of requests, and good manners."""
    server.behave()
    server.repos.clear()
    server.requests.clear()
    yield server
    server.behave()


@pytest.fixture(scope="session")
def forked(server) -> Iterator[Command]:
    """Runs `spark-vl` and Python programs in processes that know the Hub, with all imports done."""
    heavy = ("spark_vl.setup", "spark_vl.evaluation", "spark_vl.report", "spark_vl.hub.publish", "spark_vl.hub.upload")
    with command(*heavy, environment=server.environment()) as run:
        yield run


@pytest.fixture(scope="session")
def spark_vl(server, forked) -> Callable[..., Ended]:
    """`spark-vl *arguments`, in a process of its own in `folder` that knows the Hub, under a changed environment. What
    is read when huggingface_hub is imported must be `imported`, and starts a process anew."""

    def run(
        *arguments: object, folder: Path = ROOT, imported: dict[str, str] | None = None, **environment: str
    ) -> Ended:
        if imported is None:
            return forked(folder, *map(str, arguments), **environment)
        start = [sys.executable, "-c", IMPATIENT, *map(str, arguments)]
        settings = {"env": server.environment(PYTHONPATH=str(ROOT), **imported, **environment), "cwd": folder}
        done = subprocess.run(start, **settings, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr, set())

    return run


def digests(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
