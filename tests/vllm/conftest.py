"""Real vLLM on CPUs: one engine in the test process, and one server that all tests of a session share."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from shutil import copytree

import httpx
import pytest

# Read by vLLM when it is imported.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from spark_vl.config import TrainConfig
from spark_vl.distributed.launch import start_accelerator
from spark_vl.families.registry import find_family
from tests.distributed.launching import Run

CHECKPOINT = "spark_vl/demo/checkpoint"
MISLEADING = {"repetition_penalty": 1.05, "temperature": 1e-6, "top_k": 1, "top_p": 0.001, "do_sample": True}
"""What Qwen2.5-VL's generation_config.json says, and a top_p: none of it may be applied."""


def run_config(**vllm: object) -> TrainConfig:
    """A run on the tiny model."""
    config = TrainConfig()
    config.model.path, config.model.dtype = CHECKPOINT, "float32"
    config.model.min_pixels, config.model.max_pixels = 784, 200704
    config.model.gradient_checkpointing = False
    config.data.max_prompt_tokens, config.data.max_row_images = 256, 4
    config.objective.beta = 0.0
    config.rollout.engine, config.rollout.max_new_tokens = "vllm", 24
    config.rollout.vllm.enforce_eager = True
    for name, value in vllm.items():
        setattr(config.rollout.vllm, name, value)
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path, port: int) -> Run:
    """`spark-vl serve-rollouts` in the background; `wait_up` waits for it."""
    model = folder / "model"
    copytree(CHECKPOINT, model)
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | MISLEADING))
    arguments = {
        "--model.path": str(model),
        "--model.dtype": "float32",
        "--model.min_pixels": "784",
        "--model.max_pixels": "200704",
        "--data.max_prompt_tokens": "256",
        "--data.max_row_images": "4",
        "--rollout.vllm.enforce_eager": "true",
        "--port": str(port),
    }
    command = [sys.executable, "-m", "spark_vl", "serve-rollouts", *(f"{k}={v}" for k, v in arguments.items())]
    return Run(command, 900.0)


def wait_up(run: Run, port: int) -> str:
    """The server's address, once it answers."""

    def up() -> bool:
        time.sleep(0.5)
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    run.wait_until(up)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address of the session's server."""
    port = free_port()
    with serve(tmp_path_factory.mktemp("server"), port) as run:
        yield lambda: wait_up(run, port)


@pytest.fixture
def own_server(tmp_path_factory):
    """A server that the test may kill, and its address."""
    port = free_port()
    with serve(tmp_path_factory.mktemp("server"), port) as run:
        yield run, wait_up(run, port)


@pytest.fixture(scope="session")
def run_accelerator(tmp_path_factory):
    return start_accelerator(run_config(), tmp_path_factory.mktemp("accelerator"))


@pytest.fixture(scope="session")
def run_processor():
    config = run_config()
    return find_family(config.model).load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)
