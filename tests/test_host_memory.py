"""The memory of the host stays where it is however many images a run goes through: records refer to them, and what is
decoded is dropped after each step.

Measured in a process of its own, as Linux counts its resident memory. Prompts come from the feed of a real trainer;
nothing is sampled or updated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROWS = 5000
"""Of an epoch."""
FILES = 16
SIDES = (1920, 1280)
"""2.5 megapixels: 7.4 MB as RGB, so 37 GB for all rows."""
GROWTH_MB = 150
"""Most that resident memory may grow by once the first steps have warmed everything up."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures as Linux can")


def photographs(folder: Path) -> None:
    """JPEGs that differ; smooth, so that they are encoded fast."""
    rng = np.random.default_rng(0)
    for i in range(FILES):
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(SIDES, Image.Resampling.BILINEAR)
        image.save(folder / f"{i}.jpg", quality=80)


def write_recipe(folder: Path, rows: int) -> Path:
    photographs(folder)
    with (folder / "train.jsonl").open("w") as lines:
        for row in range(rows):
            (folder / f"row-{row}.jpg").symlink_to(f"{row % FILES}.jpg")  # a picture of its own, as far as records know
            line = {"question": f"What is in picture {row}?", "answer": "5", "image": f"row-{row}.jpg"}
            lines.write(json.dumps(line) + "\n")
    recipe = folder / "photographs.yaml"
    recipe.write_text(
        "name: photographs\ndescription: large pictures\nlicense: none\n"
        f"source: {{jsonl: {folder}}}\nsplits: {{train: train.jsonl}}\n"
        "columns: {question: question, answer: answer, images: image}\nverifier: number\n"
    )
    return recipe


def measure(folder: Path, *, draws: int, forget: bool = True) -> dict[str, float]:
    """What a process says of itself that draws that many rows, eight a step."""
    command = [sys.executable, "-m", "tests.test_host_memory", str(write_recipe(folder, draws)), str(folder / "run")]
    run = subprocess.run(
        [*command, str(draws), str(int(forget))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024


def draw(recipe: str, output: str, draws: int, forget: bool) -> dict[str, float]:
    """Takes the prompts of each step, which drops the images of the step before, unless not to `forget` them."""
    from spark_vl.setup import load_trainer
    from tests.test_trainer import make_config

    settings = (f"--data.recipes=[{recipe}]", "--model.max_pixels=100352", "--data.prompts_per_step=8")
    feed = load_trainer(make_config(Path(output), *settings)).feed
    if not forget:
        feed.processor.forget_images = lambda: None
    warm, most, drawn = 0.0, 0.0, set()
    for step in range(draws // 8):
        prompts = feed.next(feed.phases[0])
        drawn |= {prompt.record.id for prompt in prompts}
        if step == 7:  # each picture has been decoded about four times, under one name or another
            warm = resident_mb()
        most = max(most, resident_mb())
    return {"warm_mb": warm, "grown_mb": most - warm, "rows": len(drawn), "bad": feed.quarantine.rows_bad}


def check(found: dict[str, float], rows: int) -> None:
    assert (found["rows"], found["bad"]) == (rows, 0)
    assert found["grown_mb"] < GROWTH_MB, found


def test_a_part_of_an_epoch_takes_no_more_memory_than_its_first_steps(tmp_path: Path) -> None:
    check(measure(tmp_path, draws=96), 96)


@pytest.mark.slow
def test_the_measure_would_notice_images_that_are_kept(tmp_path: Path) -> None:
    assert measure(tmp_path, draws=96, forget=False)["grown_mb"] > GROWTH_MB


@pytest.mark.slow
def test_an_epoch_takes_no_more_memory_than_its_first_steps(tmp_path: Path) -> None:
    check(measure(tmp_path, draws=ROWS), ROWS)


if __name__ == "__main__":
    print(json.dumps(draw(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")))
