"""The engine that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from spark_vl.config import TrainConfig
from spark_vl.distributed.gather import any_process, whole_weights
from spark_vl.distributed.launch import strategy
from spark_vl.families.base import Processor
from spark_vl.policy.check import MAX_LOGPROB_GAP
from spark_vl.policy.update import Updater
from spark_vl.rollout.engine import RolloutEngine, nothing
from spark_vl.rollout.transformers_engine import TransformersEngine


def load_engine(
    config: TrainConfig,
    accelerator: Accelerator,
    updater: Updater,
    processor: Processor,
    *,
    add: Callable[[str, float, float], None] = nothing,
    say: Callable[[str], None] = nothing,
) -> RolloutEngine:
    """An engine that samples from the policy of `updater`, however its weights are held.

    Args:
        add: takes the engine's metrics: (name, sum, number of observations).
        say: takes what a person should know.

    Raises:
        EngineError: vLLM does not start, its servers are not up, or they serve another model.
    """
    policy, rollout = accelerator.unwrap_model(updater.policy), config.rollout
    if rollout.engine == "vllm":
        from spark_vl.rollout.vllm_engine import VLLMEngine, load_backend

        return VLLMEngine(
            load_backend(config, accelerator, processor, say),
            accelerator,
            policy,
            processor,
            settings=rollout.vllm,
            dtype=getattr(torch, config.model.dtype),
            score=updater.score,
            max_canary_gap=rollout.vllm.max_canary_gap
            or rollout.max_logprob_gap
            or MAX_LOGPROB_GAP[config.model.dtype],
            add=add,
        )
    if rollout.gather == "layer" and strategy(accelerator) in ("zero3", "fsdp2"):
        sharded: dict[str, Any] = {"any_process": partial(any_process, accelerator)}
    else:
        sharded = {"weights": partial(whole_weights, accelerator, updater.policy)}
    return TransformersEngine(policy, processor, decode_batch_size=rollout.decode_batch_size, **sharded)
