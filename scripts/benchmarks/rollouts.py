"""The rollout engines side by side, on one machine in one run: completion tokens a second, and what it costs to bring
the weights to vLLM.

    python scripts/benchmarks/rollouts.py [--sizes small,medium] [--prompts 8] [--new-tokens 64] [--side 224]

Needs vLLM: the extra [vllm] on a GPU, the environment of `make test-vllm` on a CPU. Each size of a random Qwen2.5-VL
has a process of its own. Both engines get the same prompts, each with its image, and sample at temperature 1 from the
same weights; `equal`: all completions have the same length; `unequal`: each token ends its completion with 1 chance in
20, so that lengths are from 1 to the limit.

A sync is gathering, sending, loading and the canary. Its peak is what the process has above what it had before, sampled
each millisecond (CPU), or as the allocator says (CUDA).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import psutil
import torch
from PIL import Image

from spark_vl.config import TrainConfig
from spark_vl.data.images import encode_pixels
from spark_vl.demo.tiny import build_model, build_processor
from spark_vl.distributed.launch import start_accelerator
from spark_vl.families.base import ProcessedPrompt
from spark_vl.families.registry import find_family
from spark_vl.policy.update import load_updater
from spark_vl.records import ImageRef, Message, PromptRecord
from spark_vl.rollout import RolloutEngine, Sampling, TransformersEngine, load_engine

QUESTION = "Describe in a few words what this picture shows, then name the largest digit that stands in it."
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 4, "vision_hidden": 240},
    "medium": {"hidden": 512, "layers": 12, "heads": 8, "vision_hidden": 480},
    "large": {"hidden": 1024, "layers": 24, "heads": 8, "vision_hidden": 640},
}


def load(folder: Path, size: str, arguments: argparse.Namespace) -> tuple[Any, ...]:
    """A random checkpoint, its updater and processor."""
    processor = build_processor([QUESTION], vocab_size=320, max_pixels=arguments.side**2)
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, window=112, std=0.02, **SIZES[size])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = TrainConfig()
    config.model.path, config.model.max_pixels = str(folder), arguments.side**2
    config.model.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config.data.max_prompt_tokens, config.data.max_row_images = 1024, 1
    config.objective.beta = 0.0
    config.rollout.engine, config.rollout.max_new_tokens = "vllm", arguments.new_tokens
    config.rollout.vllm.enforce_eager = not torch.cuda.is_available()
    accelerator = start_accelerator(config, folder)
    ours = find_family(config.model).load_processor(config.model, max_prompt_tokens=1024)
    return config, accelerator, ours, load_updater(config, accelerator, ours, updates=1)


def make_prompts(processor: Any, arguments: argparse.Namespace) -> list[ProcessedPrompt]:
    noise = np.random.default_rng(0)
    prompts = []
    for i in range(arguments.prompts):
        pixels = noise.integers(0, 256, (arguments.side, arguments.side, 3), dtype=np.uint8)
        content = (ImageRef(data=encode_pixels(Image.fromarray(pixels))), QUESTION)
        record = PromptRecord(
            id=f"noise/{i}",
            kind="problem",
            messages=(Message("user", content),),
            question=content,
            gold="",
            verifier="text",
            recipe="noise",
        )
        prompts.append(processor.process(record))
    return prompts


def tokens_per_second(engine: RolloutEngine, prompts: list[ProcessedPrompt], n: int, new_tokens: int) -> float:
    """The median of three calls, after one that warms up."""
    rates = []
    for seed in range(4):
        begun = time.perf_counter()
        groups = engine.generate(prompts, n, Sampling(1.0, 1.0, new_tokens, seed))
        tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
        rates.append(tokens / (time.perf_counter() - begun))
    return median(rates[1:])


def peak_of(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB above what was held before."""
    cuda, process, done = torch.cuda.is_available(), psutil.Process(), threading.Event()
    before = torch.cuda.memory_allocated() if cuda else process.memory_info().rss
    most = [before]

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], process.memory_info().rss)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    done.set()
    return seconds, ((torch.cuda.max_memory_allocated() if cuda else most[0]) - before) / 2**20


def measure(size: str, arguments: argparse.Namespace) -> None:
    """All figures of one size."""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        config, accelerator, processor, updater = load(Path(name), size, arguments)
        policy = accelerator.unwrap_model(updater.policy)
        prompts = make_prompts(processor, arguments)
        engine = load_engine(
            config, accelerator, updater, processor, add=lambda key, value, _: seen.setdefault(key, []).append(value)
        )
        plain = TransformersEngine(policy, processor, decode_batch_size=256)
        engine.generate(prompts[:1], 1, Sampling(max_new_tokens=1))  # the first sync, and vLLM's own warm-up
        parameters = list(policy.parameters())
        held = sum(p.numel() * p.element_size() for p in parameters) / 2**20
        print(f"\n{size}: {sum(p.numel() for p in parameters) / 1e6:.1f} M weights, {held:.0f} MiB")
        never = processor.suppressed_token_ids[:1]  # a token that is never sampled ends no completion
        vocabulary = policy.model.config.get_text_config().vocab_size
        often = tuple(range(0, vocabulary, 20))
        print(f"{'lengths':>8} {'n':>3} {'transformers':>13} {'vllm':>8}  ratio   (completion tokens a second)")
        for lengths, stops in (("equal", never), ("unequal", often)):
            processor.stop_token_ids = stops
            for n in (1, 4, 16):
                ours = tokens_per_second(plain, prompts, n, arguments.new_tokens)
                theirs = tokens_per_second(engine, prompts, n, arguments.new_tokens)
                print(f"{lengths:>8} {n:>3} {ours:>13.0f} {theirs:>8.0f} {theirs / ours:>6.2f}", flush=True)
        for bucket_mb in (512, 16):
            config.rollout.vllm.sync_bucket_mb = bucket_mb
            seen.clear()
            figures = []
            for _ in range(3):
                engine.sync_weights(policy)
                figures.append(peak_of(lambda: engine.generate([], 1, Sampling(max_new_tokens=1))))
            print(
                f"sync, buckets of {bucket_mb:>3} MiB: {median(seen['rollout/sync_seconds']):.3f} s, peak "
                f"{max(peak for _, peak in figures):.0f} MiB; canary {median(seen['rollout/canary_seconds']):.3f} s, "
                f"gap {max(seen['rollout/canary_gap']):.1e} nats",
                flush=True,
            )
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,medium", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    arguments = parser.parse_args()
    sizes = arguments.sizes.split(",")
    if len(sizes) == 1:
        return measure(sizes[0], arguments)
    for size in sizes:  # vLLM starts once in a process
        subprocess.run([sys.executable, *sys.argv, "--sizes", size], check=True)


if __name__ == "__main__":
    main()
