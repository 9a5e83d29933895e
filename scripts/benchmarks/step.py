"""A training step of spark-vl beside one of TRL's `GRPOTrainer`, on one machine in one run.

    python scripts/benchmarks/step.py [--steps 3] [--prompts 2] [--new-tokens 128] [--side 448]

Both train the same random Qwen2.5-VL (38 M weights, 10 M of them in the vision tower) with GRPO without a KL term on
prompts with one image and 8 completions each. Needs the extra [test]. Prints seconds a step for each, without the
first, and the ratio.

The floor: the vision tower and the prompt once for each prompt in sampling and once in the update, and every completion
token once in each. What spark-vl spends above it: the masked half of packed attention (a CPU has no block-sparse
kernel), and what every decoding step costs whatever its size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from spark_vl.config_cli import parse_train_config
from spark_vl.demo.tiny import build_model, build_processor
from spark_vl.setup import load_trainer

QUESTION = "Describe in a few words what this picture shows, then name the largest digit that stands in it."


def make_inputs(folder: Path, prompts: int, side: int) -> None:
    """A random checkpoint, random images and a recipe."""
    processor = build_processor([QUESTION], vocab_size=320, max_pixels=side * side)
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, hidden=512, layers=12, heads=8, vision_hidden=480, window=112, std=0.02)
    size = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.model.named_children()}
    print("million weights:", {name: round(count, 1) for name, count in size.items()})
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    noise = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as rows:
        for i in range(prompts):
            pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            rows.write(json.dumps({"question": QUESTION, "answer": "5", "image": f"{i}.png"}) + "\n")
    (folder / "recipe.yaml").write_text(
        f"name: noise\ndescription: noise\nlicense: none\nsource: {{jsonl: {folder}}}\nsplits: {{train: train.jsonl}}\n"
        "columns: {question: question, answer: answer, images: image}\nverifier: parity:verify\n"
    )


def time_ours(folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each step of spark-vl."""
    prompt = math.ceil(arguments.side / 28) ** 2 + 64  # tokens at most: those of the image, and of the words
    config = parse_train_config(
        [
            f"--output_dir={folder / 'ours'}",
            f"--data.recipes=[{folder / 'recipe.yaml'}]",
            f"--data.prompts_per_step={arguments.prompts}",
            f"--model.path={folder / 'model'}",
            "--model.dtype=float32",
            "--model.gradient_checkpointing=false",
            f"--model.max_pixels={arguments.side**2}",
            f"--rollout.max_new_tokens={arguments.new_tokens}",
            "--recycle.schedule=none",
            "--objective.beta=0",
            f"--data.max_prompt_tokens={prompt}",
            f"--optimizer.tokens_per_pack={prompt + 8 * arguments.new_tokens}",  # one group: a dense mask costs T²
            f"--steps={arguments.steps}",
            "--prompts.reasoning_suffix=",
        ]
    )
    load_trainer(config).train()
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        print({name: round(line[name], 1) for name in line if name.startswith(("time/", "problem/length"))})
    return [line["time/step"] for line in lines]


def time_trl(folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each step of TRL."""
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
            "image": Image.open(folder / f"{i}.png"),
        }
        for i in range(arguments.prompts)
    ]

    def parity(completions, **_):
        return [float(sum(map(ord, c[0]["content"])) % 2 == 0) for c in completions]

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=parity,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            num_generations=8,
            per_device_train_batch_size=8 * arguments.prompts,
            max_completion_length=arguments.new_tokens,
            max_steps=arguments.steps,
            beta=0.0,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list(rows * arguments.steps),
        processing_class=AutoProcessor.from_pretrained(folder / "model", padding_side="left"),
    )
    trainer.train()
    return [line["step_time"] for line in trainer.state.log_history if "step_time" in line]


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--side", type=int, default=448, help="of the square image, in pixels")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: at least 2 are needed, since the first is not counted")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, arguments.prompts, arguments.side)
        start = time.perf_counter()
        ours = statistics.median(time_ours(folder, arguments)[1:])
        trl = statistics.median(time_trl(folder, arguments)[1:])
        print(f"threads {torch.get_num_threads()}, both together {time.perf_counter() - start:.0f} s")
        print(f"spark-vl {ours:.1f} s a step, TRL {trl:.1f} s a step: {trl / ours:.1f} times as fast")


if __name__ == "__main__":
    main()
