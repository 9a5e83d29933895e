"""A Hub on the loopback for the tests of publishing, and processes that talk to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.driver import Driver, driver
from tests.hub.server import HubServer

ROOT = Path(__file__).parents[2]


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


def digests(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spark_vl(hub: HubServer, *arguments: object, **settings) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "spark_vl", *map(str, arguments)]
    return subprocess.run(command, env=hub.environment(**settings), cwd=ROOT, capture_output=True, text=True)
