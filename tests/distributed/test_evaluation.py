"""An evaluation that several processes share."""

from __future__ import annotations

import pytest

from spark_vl.run.jsonl import read_lines
from tests.distributed.launching import launch

pytestmark = pytest.mark.distributed

ARGUMENTS = (
    "--config=scripts/configs/digits/spark.yaml",
    "--evaluation.problems=12",
    "--evaluation.samples=0",
    "--evaluation.reflection_rounds=0",
)


def test_two_processes_give_the_answers_of_one(tmp_path):
    """Of prompts that are padded otherwise, an answer may flip where two tokens are equally probable."""
    folders = {n: tmp_path / str(n) for n in (1, 2)}
    for n, folder in folders.items():
        ended = launch(n, "single" if n == 1 else "ddp", *ARGUMENTS, f"--output={folder}", command="eval")
        assert ended.returncode == 0, ended.stdout
        assert ended.stdout.count("results are in") == 1
        assert {file.name for file in folder.glob("samples*")} == {"samples.jsonl"}
    alone, shared = ({line["id"]: line for line in read_lines(folder / "samples.jsonl")} for folder in folders.values())
    assert alone.keys() == shared.keys()
    assert len(alone) == 12
    same = [alone[id]["groups"]["greedy"] == shared[id]["groups"]["greedy"] for id in alone]
    assert sum(same) >= 11


def test_sharded_weights_are_refused_in_words(tmp_path):
    ended = launch(2, "zero3", *ARGUMENTS, f"--output={tmp_path}", command="eval")
    assert ended.returncode != 0
    assert "launch: DEEPSPEED shards weights; an evaluation takes scripts/accelerate/ddp.yaml" in ended.stdout
