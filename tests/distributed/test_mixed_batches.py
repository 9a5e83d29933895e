"""Whole runs in which processes have different work to do. The truth is that they end before their deadline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spark_vl.config import ModelConfig
from spark_vl.demo.digits import problem
from tests.distributed.launching import judgments, launch, metrics
from tests.distributed.updates import save_model
from tests.tiny_families import TINY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Five rows, fewer than two steps need: without an image, with one, two and three."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for i, images in enumerate(([0], [], [1, 2], [], [3, 4, 5])):
        for j in images:
            (folder / f"{j}.png").write_bytes(problem("train", j).image)
        question = "Which digit is larger?" if images else "Which digit is larger, 3 or 5?"
        rows.append({"question": question, "answer": str(3 + i), "images": [f"{j}.png" for j in images]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = folder / "mixed.yaml"
    file.write_text(
        "name: mixed\ndescription: rows with and without images\nlicense: none\n"
        f"source: {{jsonl: {folder}}}\nsplits: {{train: train.jsonl}}\n"
        "columns: {question: question, answer: answer, images: images}\nverifier: number\n"
    )
    return file


ONE_EACH = ("--recycle.pointwise=one_per_group",)
"""So that a step in which every group is all right or all wrong gives judge prompts, too."""


SCHEDULES = pytest.mark.parametrize(
    ("problems", "settings"),
    [
        # An odd number: one process has a problem more, and the only judge and reflection prompts.
        (3, ("--recycle.max_judge=1", "--recycle.max_reflection=1", *ONE_EACH, "--recycle.schedule=sequential")),
        # One process has none at all; zero-variance groups are sampled again on one of them.
        (1, ("--objective.refill_rounds={problem: 2, pointwise: 1}", "--rollout.gather=layer")),
    ],
    ids=["odd", "one_without_problems"],
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
@SCHEDULES
def test_no_process_waits_for_ever(tmp_path, recipe, strategy, problems, settings):
    run(tmp_path / "run", recipe, strategy, problems, settings)


@pytest.mark.parametrize("family", [tiny.model_type for tiny in TINY[1:] if tiny.merged_patch])
@SCHEDULES
def test_nor_with_other_families(tmp_path, recipe, family, problems, settings):
    run_random(tmp_path, recipe.read_text(), family, problems, settings)


def test_nor_with_a_language_model_alone(tmp_path, recipe):
    """No process encodes an image, also none that has nothing to do."""
    text = recipe.read_text().replace(", images: images", "")
    pixels = [f"--model.{name}={vars(ModelConfig())[name]}" for name in ("min_pixels", "max_pixels")]
    run_random(tmp_path, text, "qwen3", 1, ("--rollout.gather=layer", *pixels))


def run_random(folder: Path, recipe: str, family: str, problems: int, settings: tuple[str, ...]) -> None:
    """What random weights say is right by its length, so that something is learned and recycled."""
    save_model(folder, family)
    lottery = folder / "lottery.yaml"
    lottery.write_text(recipe.replace("verifier: number", "verifier: tests.misbehaving:half_are_right"))
    settings = (*settings, f"--model.path={folder / 'model'}", "--recycle.recycle_truncated=true")
    run(folder / "run", lottery, "zero3", problems, settings)


def run(folder: Path, recipe: Path, strategy: str, problems: int, settings: tuple[str, ...]) -> None:
    """Five steps on two processes."""
    arguments = (
        "--config=scripts/configs/digits/spark.yaml",
        "--evaluation.recipes=[]",
        f"--data.recipes=[{recipe}]",
        f"--data.prompts_per_step={problems}",
        "--data.max_prompt_tokens=512",
        "--optimizer.tokens_per_pack=600",
        "--rollout.n=4",
        "--steps=5",
        "--checkpoint.every=2",
        *settings,
    )
    ended = launch(2, strategy, *arguments, f"--output_dir={folder}", deadline_s=150.0)
    assert ended.returncode == 0, ended.stdout[-5000:]
    steps = metrics(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    # Five steps, five rows; more where groups are refilled.
    assert steps[-1]["data/epoch"] >= problems, "no epoch has come to its end"
    assert any(line["update/grad_norm"] > 0 for line in steps)
    recycled = sum(line.get(f"recycle/{kind}", 0) for line in steps for kind in ("pairwise", "reflection_incorrect"))
    assert recycled > 0, "nothing was recycled"
    assert judgments(folder)
