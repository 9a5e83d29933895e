"""Memory of an evaluation: images of a megapixel, of which only some are to be held decoded at a time.

    python scripts/benchmarks/evaluation.py --images 1000

Prints the most resident memory beside what the libraries and the model (a tiny one) take, and what all images would
take at once. `--folder` keeps the images and the evaluation, which goes on from there.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import yaml
from PIL import Image

import spark_vl.demo
from spark_vl.config import EvalConfig, EvaluationConfig, ModelConfig, RolloutConfig
from spark_vl.evaluation import evaluate_checkpoint
from spark_vl.evaluation.prompts import BYTES_OF_A_PIXEL, MOST_PIXELS

SIDE = 1008
"""Of an image, in pixels: 36 patches of 28."""
MIB = 2**20


def write_problems(folder: Path, images: int) -> Path:
    """A recipe of so many problems, each with an image of its own."""
    rng = np.random.default_rng(0)
    for number in range(images):
        if (path := folder / f"{number}.jpg").exists():
            continue
        coarse = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((SIDE, SIDE)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    rows = ({"id": n, "image": f"{n}.jpg", "q": "How many colors?", "a": "3"} for n in range(images))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **{"name": "megapixels", "description": "x", "license": "CC0-1.0", "source": {"jsonl": str(folder)}},
        **{"splits": {"test": "rows.jsonl"}, "verifier": "number"},
        "columns": {"id": "id", "question": "q", "answer": "a", "images": "image"},
    }
    path = folder / "megapixels.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def watch(ended: threading.Event, most: list[int]) -> None:
    """Note the most resident memory of this process, in bytes, in `most`, until `ended`."""
    process = psutil.Process()
    while not ended.wait(0.02):
        most[0] = max(most[0], process.memory_info().rss)


def main() -> None:
    """Evaluate, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        config = EvalConfig(
            model=ModelConfig(path=str(Path(spark_vl.demo.__file__).parent / "checkpoint"), dtype="float32"),
            rollout=RolloutConfig(max_new_tokens=1, decode_batch_size=4),
            evaluation=EvaluationConfig(
                recipes=[str(write_problems(folder, options.images))],
                **{"problems": None, "samples": 0, "judging": False, "reflection_rounds": 0},
            ),
        )
        config.model.max_pixels = SIDE * SIDE
        before = psutil.Process().memory_info().rss
        ended, most = threading.Event(), [before]
        threading.Thread(target=watch, args=(ended, most), daemon=True).start()
        started = time.monotonic()
        found = evaluate_checkpoint(config, folder / "evaluation")
        seconds = time.monotonic() - started
        ended.set()
    print(f"{found['reasoning_greedy']['n']} images of {SIDE * SIDE:,} pixels in {seconds:.0f} s")
    print(f"most resident memory beside the libraries: {(most[0] - before) / MIB:,.0f} MiB")
    print(f"decoded images and patches that may be held: {MOST_PIXELS / MIB:,.0f} MiB")
    print(f"all of them at once: {options.images * SIDE * SIDE * BYTES_OF_A_PIXEL / MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
