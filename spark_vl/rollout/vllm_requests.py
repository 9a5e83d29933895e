"""What vLLM is asked and what it answers, the same in the process and over HTTP.

A prompt goes out with one token for each image, which vLLM expands itself; what it expanded to comes back, and has to
be the trainer's own prompt, token for token, or log-probabilities would be of another one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spark_vl.config import ModelConfig, RolloutConfig, TrainConfig
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.policy.weights import Bucket
from spark_vl.records import BadRecordError, Rollout, RolloutGroup
from spark_vl.rollout.engine import EngineError, Sampling

SERVING = {
    # Nothing of the checkpoint's own: the default model's has repetition_penalty 1.05, top_k 1, temperature 1e-6.
    "generation_config": "vllm",
    # Of the distribution that is sampled from: at its temperature, without the tokens that are never sampled.
    "logprobs_mode": "processed_logprobs",
    "worker_extension_cls": "spark_vl.rollout.vllm_worker.WeightReceiver",
}
"""Settings of vLLM without which its completions cannot be trained on."""
ON_CPU = {"enable_chunked_prefill": False}
"""Further settings where there is no GPU: vLLM rewinds the generator of a request with a seed when its prompt is cut
into chunks, and a CPU's generator cannot be rewound (0.32: "CPU Generator does not use offset")."""


def serving_arguments(
    model: ModelConfig, rollout: RolloutConfig, *, max_prompt_tokens: int, max_new_tokens: int, images: int
) -> dict[str, Any]:
    """The arguments of vLLM's `LLM`, and the flags of `vllm serve`, that follow from a run's settings.

    Args:
        max_prompt_tokens, max_new_tokens: the most of any prompt and completion.
        images: the most that a prompt may show; 0: the model has no vision tower.
    """
    arguments: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "dtype": model.dtype,
        "max_model_len": max_prompt_tokens + max_new_tokens,
        "max_num_seqs": max(rollout.decode_batch_size, rollout.n),
        "gpu_memory_utilization": rollout.vllm.memory_share,
        "enforce_eager": rollout.vllm.enforce_eager,
        **SERVING,
    }
    if images:
        arguments["limit_mm_per_prompt"] = {"image": images, "video": 0}
        pixels = {"shortest_edge": model.min_pixels, "longest_edge": model.max_pixels}
        arguments["mm_processor_kwargs"] = {"size": pixels}
    return arguments


def run_arguments(config: TrainConfig, *, vision: bool) -> dict[str, Any]:
    """What vLLM is started with for a run: see `serving_arguments`. Its evaluations may have longer completions."""
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    return serving_arguments(
        config.model,
        config.rollout,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=longest,
        images=config.data.max_row_images if vision else 0,
    )


@dataclass(frozen=True)
class Completion:
    """One of the completions that came back."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None
    versions: frozenset[str]
    """Of the weights that its tokens were sampled from."""


Asked = tuple[ProcessedPrompt, list[int], dict[str, Any]]
"""A prompt, its unexpanded tokens, and the fields of its `SamplingParams`."""
Read = Callable[[int, Sequence[int], list[Completion]], RolloutGroup]
"""(index of a prompt, what vLLM expanded it to, its completions) → its group; raises what `group_of` raises."""
OnGroup = Callable[[int, RolloutGroup], None]

Generate = Callable[[Sequence[Asked], Read, OnGroup], dict[int, BadRecordError]]
"""See `Backend.generate`."""


class Backend(Protocol):
    """A vLLM engine, wherever it is."""

    model: Mapping[str, Any]
    """What it serves: `vllm_worker.WeightReceiver.describe_model`."""

    def load(self, buckets: Iterable[Bucket], version: str) -> None:
        """Take weights, and call them `version`. All of `buckets` is taken, also where that fails.

        Raises:
            EngineError: vLLM does not take them.
        """

    def generate(self, asked: Sequence[Asked], read: Read, on_group: OnGroup) -> dict[int, BadRecordError]:
        """Ask all; groups come, in this thread, as they are complete.

        Returns:
            Which prompts are refused, and why.

        Raises:
            EngineError: vLLM fails.
        """

    def each(self) -> Sequence[tuple[str, Generate]]:
        """The engines that this process has to check, each by itself: where it is, and its `generate`."""

    def close(self) -> None:
        """Give back what it holds."""


def sampling_settings(sampling: Sampling, n: int, index: int, processor: Processor) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams` for prompt `index` of a call. All that could come from elsewhere is said.

    vLLM adds 0 to n - 1 to the seed, one for each completion, so seeds of prompts are spread.
    """
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": zlib.crc32(f"{sampling.seed}/{index}".encode()),
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        # Ours alone end a completion, and stand at its end.
        "stop_token_ids": list(processor.stop_token_ids),
        "ignore_eos": True,
        # Far below every logit. JSON has no infinity.
        "logit_bias": {token: -1e9 for token in processor.suppressed_token_ids} or None,
        "logprobs": 0,
        "detokenize": False,
    }


def group_of(
    prompt: ProcessedPrompt,
    n: int,
    version: str | None,
    prompt_token_ids: Sequence[int],
    completions: Iterable[Completion],
    processor: Processor,
) -> RolloutGroup:
    """The group of `prompt`, from what came back for it.

    Args:
        version: of the weights that it must have been sampled from; None: whatever the engine was started with.

    Raises:
        BadRecordError: vLLM has expanded it to another prompt.
        EngineError: there are not `n` completions, or not of the weights asked for, or one is not complete.
    """
    name, found = prompt.record.id, list(completions)
    check_expanded(prompt, prompt_token_ids)
    if len(found) != n:
        raise EngineError(f"{name}: vLLM returned {len(found)} completions; asked for {n}")
    for completion in found:
        if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
            raise EngineError(
                f"{name}: vLLM ended a completion of {len(completion.token_ids)} tokens with "
                f"{completion.finish_reason!r}; allowed: stop, length"
            )
        if len(completion.logprobs) != len(completion.token_ids):
            raise EngineError(
                f"{name}: {len(completion.logprobs)} log-probabilities for {len(completion.token_ids)} tokens"
            )
        if version is not None and completion.versions != {version}:
            raise EngineError(
                f"{name}: sampled from weights of version {', '.join(sorted(completion.versions)) or 'unknown'}; the "
                f"policy's are {version}: was the server restarted, or does another run use it?"
            )
    return RolloutGroup(prompt.record, tuple(_rollout(completion, processor) for completion in found))


def check_expanded(prompt: ProcessedPrompt, found: Sequence[int]) -> None:
    """Raises a BadRecordError unless `found` are the tokens of `prompt`."""
    own = prompt.input_ids.tolist()
    if list(found) == own:
        return
    differ = (i for i, (a, b) in enumerate(zip(own, found, strict=False)) if a != b)
    at = next(differ, min(len(own), len(found)))
    raise BadRecordError(
        prompt.record.id,
        f"vLLM expands the prompt to {len(found)} tokens, the trainer to {len(own)}; the first difference is at token "
        f"{at}: {found[at : at + 1]} and {own[at : at + 1]} (do model.min_pixels and model.max_pixels of the server "
        "differ from the run's?)",
    )


def _rollout(completion: Completion, processor: Processor) -> Rollout:
    ids = tuple(completion.token_ids)
    text = processor.decode(ids)
    # The limit may be met by a stop token; vLLM then says "stop", as the transformers engine does.
    return Rollout(
        token_ids=ids,
        logprobs=tuple(completion.logprobs),
        text=text,
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
        answer_start=processor.answer_start(text),
    )
