"""`spark-vl serve-rollouts`: `vllm serve` with the settings of a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import NoReturn

import torch

from spark_vl.config import TrainConfig
from spark_vl.families.registry import find_family
from spark_vl.rollout.vllm_requests import ON_CPU, run_arguments


def server_command(config: TrainConfig, *, host: str, port: int) -> list[str]:
    """The command line of a server that samples for a run with these settings."""
    processor = find_family(config.model).load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)
    arguments = run_arguments(config, vision=bool(processor.padding.images))
    # It has its devices to itself. vLLM's own default is what others use there.
    del arguments["gpu_memory_utilization"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments.pop("model")]
    command += ["--host", host, "--port", str(port), "--tensor-parallel-size", str(config.rollout.vllm.tensor_parallel)]
    # The route that takes tokens and images, and gives tokens. Its log would hold all prompts.
    command += ["--enable-scale-out", "--disable-uvicorn-access-log"]
    if not torch.cuda.is_available():
        arguments |= ON_CPU
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def serve_rollouts(config: TrainConfig, *, host: str, port: int) -> NoReturn:
    """Become a vLLM server for a run. Whoever reaches it can give it other weights, so it listens on
    this machine alone unless `host` says otherwise."""
    command = server_command(config, host=host, port=port)
    print(shlex.join(command), flush=True)
    # Opens the routes that take weights.
    os.execve(command[0], command, {**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
