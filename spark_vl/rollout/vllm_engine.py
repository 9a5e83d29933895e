"""Rollouts by vLLM: the policy's weights go there, prompts go there, groups come back.

Before the first completion after an update, `VLLMEngine` sends the weights under a new version, which every completion
has to bear, and lets vLLM continue two fixed prompts (the canary): what it says of its tokens, the policy must say too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from spark_vl.config import VLLMConfig
from spark_vl.data.images import encode_pixels
from spark_vl.distributed.gather import each_process
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.policy.packing import Pack, PackItem, make_pack
from spark_vl.policy.policy import Policy
from spark_vl.policy.weights import weight_buckets
from spark_vl.records import BadRecordError, ImageRef, Message, PromptRecord, RolloutGroup
from spark_vl.rollout.engine import EngineError, PromptsRefusedError, Sampling, nothing
from spark_vl.rollout.vllm_requests import (
    Asked,
    Backend,
    Completion,
    group_of,
    sampling_settings,
)

_CANARY_TOKENS = 8


class VLLMEngine:
    """`RolloutEngine` by vLLM. All calls are collective: an error of one process is raised on all.

    Args:
        backend: where vLLM is.
        accelerator: knows the other processes.
        policy: whose weights it samples from, unwrapped.
        processor: makes and reads prompts.
        settings: of the run.
        dtype: in which vLLM holds the weights.
        max_model_len: tokens that a prompt and a completion may have together.
        score: the policy's log-probabilities of packs (`Updater.score`).
        max_canary_gap: mean absolute difference in nats per token that the canary may show.
        add: takes metrics: (name, sum, number of observations).
    """

    def __init__(
        self,
        backend: Backend,
        accelerator: Accelerator,
        policy: Policy,
        processor: Processor,
        *,
        settings: VLLMConfig,
        dtype: torch.dtype,
        max_model_len: int,
        score: Callable[[Sequence[Pack | None]], list[torch.Tensor]],
        max_canary_gap: float,
        add: Callable[[str, float, float], None] = nothing,
    ) -> None:
        self.backend, self.accelerator, self.policy, self.processor = backend, accelerator, policy, processor
        self.settings, self.dtype, self.score, self.max_canary_gap = settings, dtype, score, max_canary_gap
        self.add = add
        [self._run] = broadcast_object_list([uuid.uuid4().hex[:8]])
        self._syncs = 0
        self._stale = True
        self._canary = [processor.process(record) for record in _canary_records(bool(processor.padding.images))]
        self._check_model(max_model_len)

    @property
    def version(self) -> str:
        """Of the weights that the engine should have: this start of the run, and how often it has sent them."""
        return f"{self._run}/{self._syncs}"

    def sync_weights(self, policy: Policy) -> None:
        """See `RolloutEngine.sync_weights`. They are sent before the next completion."""
        self.policy = policy
        self._stale = True

    def generate(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        progress: Callable[[int], None] = nothing,
        on_group: Callable[[int, RolloutGroup], None] = nothing,
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        if self._stale:
            self._send_weights()
        groups: dict[int, RolloutGroup] = {}

        def arrived(i: int, group: RolloutGroup) -> None:
            groups[i] = group
            progress(n)
            on_group(i, group)

        with _together():
            refused = self._ask(prompts, n, sampling, arrived)
        in_order = [groups.get(i) for i in range(len(prompts))]
        if refused:
            raise PromptsRefusedError(in_order, refused)
        return [group for group in in_order if group]

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self.backend.close()

    def _ask(
        self,
        prompts: Sequence[ProcessedPrompt],
        n: int,
        sampling: Sampling,
        on_group: Callable[[int, RolloutGroup], None],
    ) -> dict[int, BadRecordError]:
        """The prompts of this process; of a tensor-parallel engine, all that its processes have are asked by each."""
        size = self.settings.tensor_parallel if self.settings.mode == "colocate" else 1
        if size == 1:
            return self.backend.generate(self._asked(prompts, n, sampling), self._reader(prompts, n), on_group)
        everyone = gather_object([list(prompts)])
        begin = self.accelerator.process_index // size * size
        shared = [prompt for others in everyone[begin : begin + size] for prompt in others]
        own = sum(map(len, everyone[begin : self.accelerator.process_index]))

        def mine(i: int, group: RolloutGroup) -> None:
            if own <= i < own + len(prompts):
                on_group(i - own, group)

        [seed] = broadcast_object_list([sampling.seed])
        same = replace(sampling, seed=seed)
        refused = self.backend.generate(self._asked(shared, n, same), self._reader(shared, n), mine)
        return {i - own: error for i, error in refused.items() if own <= i < own + len(prompts)}

    def _asked(self, prompts: Sequence[ProcessedPrompt], n: int, sampling: Sampling) -> list[Asked]:
        return [
            (prompt, self.processor.unexpanded(prompt), sampling_settings(sampling, n, i, self.processor))
            for i, prompt in enumerate(prompts)
        ]

    def _reader(self, prompts: Sequence[ProcessedPrompt], n: int) -> Callable[..., RolloutGroup]:
        def read(i: int, expanded: Sequence[int], completions: list[Completion]) -> RolloutGroup:
            return group_of(prompts[i], n, self.version, expanded, completions, self.processor)

        return read

    # ── weights ──

    def _send_weights(self) -> None:
        begun = time.monotonic()
        self._syncs += 1
        buckets = weight_buckets(
            self.accelerator,
            self.policy,
            dtype=self.dtype,
            bucket_bytes=self.settings.sync_bucket_mb * 2**20,
        )
        with _together():
            self.backend.load(buckets, self.version)
        self.add("rollout/sync_seconds", time.monotonic() - begun, 1.0)
        self._check_canary()
        self._stale = False

    def _check_canary(self) -> None:
        """Compare what the engine says of its own tokens with what the policy says of them.

        Raises:
            EngineError: they differ by more than the bound.
        """
        begun = time.monotonic()
        sampling = Sampling(self.policy.temperature, 1.0, _CANARY_TOKENS, seed=self._syncs)
        found: list[tuple[str, ProcessedPrompt, RolloutGroup]] = []
        with _together():
            asked, read = self._asked(self._canary, 1, sampling), self._reader(self._canary, 1)
            for where, generate in self.backend.each():
                groups: dict[int, RolloutGroup] = {}
                if refused := generate(asked, read, groups.__setitem__):
                    raise EngineError(f"the canary: {next(iter(refused.values()))}")
                found += [(where, self._canary[i], group) for i, group in groups.items()]
        packs = [
            make_pack([PackItem(prompt, [group.rollouts[0].token_ids], [0])], padding=self.processor.padding)
            for _, prompt, group in found
        ]
        most = max(each_process(self.accelerator, len(packs)))
        scores = self.score([*packs, *[None] * (most - len(packs))])
        gaps = []
        for (where, prompt, group), own in zip(found, scores, strict=False):
            difference = own.cpu() - torch.tensor(group.rollouts[0].logprobs)
            gaps.append((float(difference.abs().mean()), f"{prompt.record.id} at {where}"))
        for gap, _ in gaps:
            self.add("rollout/canary_gap", gap, 1.0)
        self.add("rollout/canary_seconds", time.monotonic() - begun, 1.0)
        wrong = [f"{where}: {gap:.2g}" for gap, where in gather_object(gaps) if not gap <= self.max_canary_gap]
        if wrong:
            raise EngineError(
                f"after the weights were sent (version {self.version}), vLLM and the policy give tokens other "
                f"log-probabilities: {', '.join(sorted(wrong))} nats per token in the mean; allowed are "
                f"{self.max_canary_gap:g} (rollout.vllm.max_canary_gap). Some weights have not arrived, or vLLM "
                "computes this model otherwise"
            )

    def _check_model(self, max_model_len: int) -> None:
        """Raises an EngineError unless the engine serves this run's model under this run's settings."""
        text = self.policy.model.config.get_text_config()
        wanted: dict[str, Any] = {
            "model_type": self.policy.model.config.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
        }
        found = self.backend.model
        if wrong := [
            f"{name}: {found[name]}, the run has {value}" for name, value in wanted.items() if found[name] != value
        ]:
            raise EngineError(f"vLLM does not serve the model of this run: {'; '.join(wrong)}")
        if found["max_model_len"] < max_model_len:
            raise EngineError(
                f"vLLM serves prompts with completions of up to {found['max_model_len']} tokens; this run has up to "
                f"{max_model_len} (data.max_prompt_tokens + rollout.max_new_tokens): start it with the run's settings"
            )


@contextmanager
def _together() -> Iterator[None]:
    """Raise an EngineError of any process on all of them, as they leave. Collective."""
    try:
        yield
    except EngineError as error:
        gather_object([str(error)])
        raise
    if failed := [text for text in gather_object([""]) if text]:
        raise EngineError(failed[0])


def _canary_records(images: bool) -> list[PromptRecord]:
    """A text prompt and, for models that see, one with an image that has no symmetry."""
    question = "Write down the first prime numbers, and say how you find the next one."
    contents: list[tuple[Any, ...]] = [(question,)]
    if images:
        gradient = Image.linear_gradient("L").resize((168, 112))
        picture = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
        contents.append((ImageRef(data=encode_pixels(picture)), "Describe the colors of this image."))
    return [
        PromptRecord(
            id=f"canary/{'image' if len(content) > 1 else 'text'}",
            kind="problem",
            messages=(Message("user", content),),
            question=content,
            gold="",
            verifier="text",
            recipe="canary",
        )
        for content in contents
    ]
