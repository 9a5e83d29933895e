"""Whole runs on vLLM, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import fmean

import pytest

from tests.distributed.launching import NO_EVALUATION, latest, launch, lines, start

pytestmark = pytest.mark.vllm

TEN = (
    "--config=scripts/configs/digits/spark.yaml",
    NO_EVALUATION,
    "--steps=10",
    "--rollout.vllm.enforce_eager=true",
    "--data.max_row_images=4",
)
SERVED = ("--rollout.engine=vllm", "--rollout.vllm.mode=server", "--rollout.vllm.timeout_s=60")

EVALUATION = (
    "--model.path=spark_vl/demo/checkpoint",
    "--model.dtype=float32",
    "--model.min_pixels=784",
    "--model.max_pixels=50176",
    "--max_prompt_tokens=256",
    "--rollout.max_new_tokens=32",
    "--evaluation.recipes=[digits]",
    "--evaluation.problems=20",
    "--evaluation.samples=2",
    "--prompts.templates=[spark_vl/demo/templates.yaml]",
    "--prompts.builtin_templates=false",
)


def learned(folder) -> tuple[float, float]:
    """Mean reward of problems and of pointwise judgments in the last five of ten steps."""
    steps = lines(folder, "metrics")
    assert [line["step"] for line in steps] == list(range(1, 11))
    return fmean(s["problem/reward"] for s in steps[5:]), fmean(s["pointwise/reward"] for s in steps[5:])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the transformers engine reaches, with two seeds: their distance is the spread of seeds."""
    folders = [tmp_path_factory.mktemp("plain") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        assert launch(1, "single", *TEN, f"--seed={seed}", f"--output_dir={folder}").returncode == 0
    return [learned(folder) for folder in folders]


def assert_learns_as_well(folder, plain) -> None:
    for found, *others in zip(learned(folder), *plain, strict=True):
        spread = abs(others[0] - others[1])
        assert found > min(others) - max(0.08, 2 * spread)
    for line in lines(folder, "metrics"):
        assert line["rollout/sampler_logprob_gap"] < 1e-5
        assert line["rollout/sampler_logprob_gap_max"] < 1e-3
        assert line["update/importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert line["rollout/canary_gap"] < 1e-5


def test_colocated(tmp_path, plain):
    done = launch(1, "single", *TEN, "--rollout.engine=vllm", f"--output_dir={tmp_path}", deadline_s=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert_learns_as_well(tmp_path, plain)


def test_two_zero3_processes_with_a_server(server, tmp_path, plain):
    arguments = (*TEN, *SERVED, f"--rollout.vllm.servers=[{server()}]", f"--output_dir={tmp_path}")
    done = launch(2, "zero3", *arguments, deadline_s=400)
    assert done.returncode == 0, done.stdout[-3000:]
    assert_learns_as_well(tmp_path, plain)


def test_an_evaluation_has_the_greedy_figures_of_the_transformers_engine(server, tmp_path):
    results = []
    for name, engine in {"plain": (), "vllm": (*SERVED, f"--rollout.vllm.servers=[{server()}]")}.items():
        done = subprocess.run(
            [sys.executable, "-m", "spark_vl", "eval", *EVALUATION, *engine, f"--output={tmp_path / name}"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    plain, vllm = results
    assert plain.keys() == vllm.keys()
    greedy = [name for name in plain if name.endswith("_greedy") or name == "test_time_reflection"]
    assert len(greedy) == 6
    assert {name: vllm[name] for name in greedy} == {name: plain[name] for name in greedy}


def test_killed_and_resumed(server, tmp_path):
    arguments = (*TEN, *SERVED, f"--rollout.vllm.servers=[{server()}]", "--checkpoint.every=2")
    arguments += (f"--output_dir={tmp_path}", "--resume=auto")
    with start(1, "single", *arguments) as run:
        run.wait_until(lambda: latest(tmp_path))
        run.kill_all()
    begun = len(lines(tmp_path, "metrics"))
    assert 2 <= begun < 10
    done = launch(1, "single", *arguments, deadline_s=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [line["step"] for line in lines(tmp_path, "metrics")] == list(range(1, 11))


def test_a_server_that_dies_stops_the_run_with_a_checkpoint_from_which_it_goes_on(own_server, server, tmp_path):
    dying, address = own_server
    arguments = (*TEN, *SERVED, "--rollout.vllm.retries=1", "--checkpoint.every=0", f"--output_dir={tmp_path}")
    with start(1, "single", *arguments, f"--rollout.vllm.servers=[{address}]", deadline_s=300) as run:
        run.wait_until(lambda: len(lines(tmp_path, "metrics")) >= 2)
        dying.kill_all()
        ended = run.finish()
    assert ended.returncode == 1
    assert "spark-vl: stopped: " in ended.stdout
    assert address in ended.stdout
    assert "Traceback (most recent call last)" not in ended.stdout.split("spark-vl: stopped")[0][-200:]
    assert latest(tmp_path) is not None
    other = f"--rollout.vllm.servers=[{server()}]"
    done = launch(1, "single", *arguments, other, "--resume=auto", deadline_s=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [line["step"] for line in lines(tmp_path, "metrics")] == list(range(1, 11))
