"""Completions do not depend on who holds the weights, nor on how they are gathered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launching import launch
from tests.distributed.sampling import PROMPTS, SHARES
from tests.distributed.updates import save_model
from tests.tiny_families import TINY

pytestmark = pytest.mark.distributed


FAMILIES = [tiny.model_type for tiny in TINY if tiny.merged_patch]


def run(folder: Path, n: int, strategy: str, family: str) -> dict:
    """What the processes have sampled."""
    folder.mkdir()
    save_model(folder, family)
    ended = launch(n, strategy, str(folder), module="tests.distributed.sampling")
    assert ended.returncode == 0, ended.stdout[-5000:]
    return json.loads((folder / "completions.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, dict]:
    """What one process samples, by family."""
    return {family: run(tmp_path_factory.mktemp("one") / family, 1, "single", family) for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *(("qwen2_5_vl", strategy) for strategy in ("ddp", "zero2")),
        *((family, strategy) for family in FAMILIES for strategy in ("fsdp2", "zero3")),
    ],
)
def test_two_processes_sample_what_one_samples(tmp_path, one_process, family, strategy):
    sampled, one_process = run(tmp_path / "run", 2, strategy, family), one_process[family]
    assert sampled["phase 0"].keys() == {record.id for record in PROMPTS}
    assert sampled["phase 0"] == one_process["phase 0"]
    assert sampled["layer 0"] == one_process["phase 0"]
    # At a temperature the draws of a process depend on what else it samples, but not on how it holds the weights.
    assert sampled["layer 1"] == sampled["phase 1"]
    assert sampled["phase 1"] != sampled["phase 0"]
    assert len({str(completions) for completions in sampled["phase 0"].values()}) > 3, "the prompts make no difference"
    # The weights are sharded again after an exception, and training goes on.
    assert sampled["after an exception"] == one_process["after an exception"]
    assert 1e-3 < sampled["norm"] < float("inf")


def test_the_shares_are_what_the_test_needs():
    images = [len(record.images) for record in PROMPTS]
    assert {0, 1, 2} == {images[i] for i in SHARES[2][0]}
    assert {images[i] for i in SHARES[2][1]} == {0}
    assert sorted(SHARES[2][0] + SHARES[2][1]) == SHARES[1][0]
