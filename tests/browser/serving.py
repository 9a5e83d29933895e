"""Stages a Space that shows the tiny model, and serves it as the Hub would: with its requirements and nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path

import httpx
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import REASONING_SUFFIX, TEMPLATES
from spark_vl.hub.space import stage_space
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE

MODEL, REVISION = "someone/tiny-digits", "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, *, yes_no: bool) -> Path:
    """The demo's checkpoint with its prompts.

    Asked for Yes or No, it judges every answer wrong. Asked for A or B, it judges some right.
    """
    templates = Templater.load([TEMPLATES], builtin=False).templates.values()
    kept = [template for template in templates if yes_no or template.labels != ("Yes", "No")]
    shutil.copytree(CHECKPOINT, folder)
    Templater(kept, reasoning_suffix=REASONING_SUFFIX).save(folder / PROMPTS_FILE)
    return folder


def environment(requirements: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH with the installed packages that `requirements` asks for, and those that they ask for."""
    folder.mkdir()
    for found in closure(requirements.read_text().splitlines()):
        for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():  # some packages share a folder
                (folder / name).symlink_to(found.locate_file(name))
    return folder


def closure(lines: list[str]) -> list[Distribution]:
    """The installed distributions that a requirements file leads to."""
    left = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    while left:
        wanted = left.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in found:
            continue
        found[key] = distribution(wanted.name)
        assert wanted.specifier.contains(found[key].version, prereleases=True), f"{wanted} is not installed"
        for line in found[key].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                left.append(needed)
    return list(found.values())


@contextmanager
def served_space(folder: Path) -> Iterator[Callable[[], str]]:
    """A Space, staged below `folder` and started; its model lies in a cache of the Hub.

    Yields what waits until it serves, and gives its address.
    """
    space = stage_space(folder / "space", model=MODEL, revision=REVISION)
    site = environment(space / "requirements.txt", folder / "site")
    assert not (site / "spark_vl").exists(), "the kit itself would stand in for what was not staged"
    snapshots = folder / "home" / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots"
    write_model(snapshots / REVISION, yes_no=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {
        "PYTHONPATH": str(site),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "OMP_NUM_THREADS": "1",
    }
    url, log = f"http://127.0.0.1:{port}/", folder / "log.txt"
    # -S: without the site-packages of this interpreter.
    command = [sys.executable, "-S", "app.py"]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=space, env=os.environ | own, stdout=output, stderr=output)
    try:
        yield lambda: _when_up(url, server, log)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _when_up(url: str, server: subprocess.Popen, log: Path) -> str:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()
        try:
            httpx.get(url)
        except httpx.TransportError:  # it does not listen yet
            time.sleep(0.1)
        else:
            return url
    raise TimeoutError(log.read_text())
