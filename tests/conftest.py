"""What the tests share: the tiny model with random weights, and records to feed it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Before torch is imported: two processes of a test must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import docstring_parser
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from spark_vl.demo.tiny import random_tiny
from spark_vl.families.qwen2_5_vl import Qwen2_5VLProcessor
from spark_vl.policy.policy import Policy
from spark_vl.records import ImageRef, Message, Origin, PromptRecord, RecycledRecord
from spark_vl.verifiers import VerifierPool

torch.set_num_threads(1)

# The help of all settings is read from their source once, not for each command line that a test reads.
docstring_parser.parse_from_object = cache(docstring_parser.parse_from_object)

# The same examples in each run: what fails once fails everywhere. `--hypothesis-profile=default` draws others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

pytest_plugins = ["tests.hub.fixtures"]


def make_image(seed: int, size: tuple[int, int] = (56, 56)) -> ImageRef:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def make_record(name: str, *content: str | ImageRef, gold: str = "5", kind: str = "problem", **fields) -> PromptRecord:
    """A record that shows `content`."""
    fields = {
        "id": name,
        "kind": kind,
        "messages": (Message("user", tuple(content)),),
        "question": tuple(content),
        "gold": gold,
        "verifier": "number",
        "recipe": "test",
    } | fields
    if kind == "problem":
        return PromptRecord(**fields)
    return RecycledRecord(**{"origin": Origin("parent", 1, "template", (0,))} | fields)


@pytest.fixture(scope="session")
def tiny():
    """(model, Hugging Face processor) with random float32 weights. Do not change the weights: use `make_policy`."""
    return random_tiny(seed=0)


@pytest.fixture(scope="session")
def processor(tiny) -> Qwen2_5VLProcessor:
    model, hf_processor = tiny
    return Qwen2_5VLProcessor(
        hf_processor,
        model.config,
        model.generation_config,
        min_pixels=28 * 28,
        max_pixels=224 * 224,
        max_prompt_tokens=4096,
    )


@pytest.fixture(scope="session")
def pool() -> Iterator[VerifierPool]:
    """Verifiers in one process beside this one."""
    with VerifierPool(workers=1) as verifiers:
        yield verifiers


@pytest.fixture
def make_policy(processor):
    """A fresh policy: `make_policy(dtype=…, attention=…, temperature=…)`."""

    def make(dtype=torch.float32, *, attention="sdpa", temperature=1.0, suppress=True, seed=0) -> Policy:
        model, _ = random_tiny(seed=seed, dtype=dtype)
        suppressed = processor.suppressed_token_ids if suppress else ()
        return Policy(model, attention=attention, temperature=temperature, suppressed_token_ids=suppressed)

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of four steps, evaluated before and after, made by the command's own function. Copy it to
    change it."""
    from spark_vl import cli
    from tests.test_trainer import make_config

    folder = tmp_path_factory.mktemp("finished") / "tiny-run"
    settings = ("--steps=4", "--evaluation.recipes=[digits]", "--evaluation.problems=6")
    cli.train(make_config(folder, *settings), "none")
    return folder
