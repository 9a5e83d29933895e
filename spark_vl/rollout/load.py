"""The engine that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from spark_vl.config import DataConfig, ModelConfig, RolloutConfig, TrainConfig
from spark_vl.distributed.gather import any_process, whole_weights
from spark_vl.distributed.launch import strategy
from spark_vl.families.base import Processor, Prompts
from spark_vl.families.registry import find_family
from spark_vl.policy.check import MAX_LOGPROB_GAP
from spark_vl.policy.packing import Pack
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.policy.update import Updater
from spark_vl.rollout.engine import RolloutEngine, Sampler, nothing
from spark_vl.rollout.openai_engine import OpenAIEngine, RemotePrompts
from spark_vl.rollout.transformers_engine import TransformersEngine
from spark_vl.rollout.vllm_colocated import Colocated
from spark_vl.rollout.vllm_engine import VLLMEngine
from spark_vl.rollout.vllm_requests import Backend, run_arguments, serving_arguments
from spark_vl.rollout.vllm_servers import Servers


def load_vllm(
    model: ModelConfig,
    rollout: RolloutConfig,
    arguments: Mapping[str, Any],
    accelerator: Accelerator,
    policy: Policy,
    processor: Processor,
    *,
    score: Callable[[Sequence[Pack | None]], list[torch.Tensor]],
    add: Callable[[str, float, float], None] = nothing,
    say: Callable[[str], None] = nothing,
) -> VLLMEngine:
    """vLLM, where `rollout.vllm` wants it, with the weights of `policy`.

    Args:
        arguments: of vLLM, see `serving_arguments`; a server has been given its own.
        policy: unwrapped.
        score: see `VLLMEngine`.
        add, say: see `load_engine`.

    Raises:
        EngineError: see `load_engine`.
    """
    settings = rollout.vllm
    backend: Backend
    if settings.mode == "server":
        backend = Servers(settings, accelerator, say)
    else:
        backend = Colocated(arguments, accelerator, tensor_parallel=settings.tensor_parallel)
    return VLLMEngine(
        backend,
        accelerator,
        policy,
        processor,
        settings=settings,
        dtype=getattr(torch, model.dtype),
        max_model_len=arguments["max_model_len"],
        score=score,
        max_canary_gap=settings.max_canary_gap or rollout.max_logprob_gap or MAX_LOGPROB_GAP[model.dtype],
        add=add,
    )


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
        return load_vllm(
            config.model,
            rollout,
            run_arguments(config, vision=bool(processor.padding.images)),
            accelerator,
            policy,
            processor,
            score=updater.score,
            add=add,
            say=say,
        )
    if rollout.gather == "layer" and strategy(accelerator) in ("zero3", "fsdp2"):
        sharded: dict[str, Any] = {"any_process": partial(any_process, accelerator)}
    else:
        sharded = {"weights": partial(whole_weights, accelerator, updater.policy)}
    return TransformersEngine(policy, processor, decode_batch_size=rollout.decode_batch_size, **sharded)


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked, here or at a server. `sampler.close()` gives back what it holds."""

    sampler: Sampler
    prompts: Prompts
    """Make the prompts that `sampler` takes."""
    processor: Processor | None
    """`prompts`, with the model's tokens; None: a server of `engine: openai` alone knows them."""
    policy: Policy | None
    """The weights, in evaluation mode; None: a server of `engine: openai` has them."""


def load_sampler(
    model: ModelConfig,
    rollout: RolloutConfig,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    accelerator: Accelerator | None = None,
    say: Callable[[str], None] = print,
) -> Loaded:
    """The model at `model.path` with the engine that `rollout` asks for, for an evaluation or a judge: its weights stay
    as they are.

    Args:
        max_prompt_tokens, max_new_tokens: the most of any prompt and completion. A server of `engine: openai` has
            limits of its own.
        temperature: of the policy's log-probabilities.
        accelerator: knows the device; None: a GPU if there is one, and no other processes.
        say: takes what a person should know.

    Raises:
        ConfigError: the model or a setting cannot be used.
        EngineError: see `load_engine`.
    """
    if rollout.engine == "openai":
        return Loaded(OpenAIEngine(rollout.openai, model.path), RemotePrompts(), None, None)
    processor = find_family(model).load_processor(model, max_prompt_tokens=max_prompt_tokens)
    policy = load_policy(
        model,
        dtype=getattr(torch, model.dtype),
        temperature=temperature,
        suppressed_token_ids=processor.suppressed_token_ids,
    )
    gpu = torch.cuda.is_available()
    policy.to(accelerator.device if accelerator else "cuda" if gpu else "cpu").eval()
    if rollout.engine == "transformers":
        engine = TransformersEngine(policy, processor, decode_batch_size=rollout.decode_batch_size)
        return Loaded(engine, processor, processor, policy)
    arguments = serving_arguments(
        model,
        rollout,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        images=DataConfig.max_row_images if processor.padding.images else 0,
    )

    @torch.no_grad()
    def score(passes: Sequence[Pack | None]) -> list[torch.Tensor]:
        return [policy(pack.to(policy.suppressed.device)).logprobs for pack in passes if pack]

    accelerator = accelerator or Accelerator(cpu=not gpu)
    vllm = load_vllm(model, rollout, arguments, accelerator, policy, processor, score=score, say=say)
    return Loaded(vllm, processor, processor, policy)
