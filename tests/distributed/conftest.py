"""Uninterrupted runs, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import SHARDED, SMALL, launch


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of `SMALL` on one process. Do not change it."""
    return _run(tmp_path_factory, 1, "single", *SMALL)


@pytest.fixture(scope="session")
def whole_zero3(tmp_path_factory) -> Path:
    """The folder of `SHARDED` on two processes under ZeRO-3. Do not change it."""
    return _run(tmp_path_factory, 2, "zero3", *SHARDED)


def _run(tmp_path_factory: pytest.TempPathFactory, n: int, strategy: str, *arguments: str) -> Path:
    folder = tmp_path_factory.mktemp(f"whole_{strategy}") / "run"
    ended = launch(n, strategy, *arguments, f"--output_dir={folder}", deadline_s=300)  # DeepSpeed may have to compile
    assert ended.returncode == 0, ended.stdout
    return folder
