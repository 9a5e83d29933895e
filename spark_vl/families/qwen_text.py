"""Qwen2.5 and Qwen3, dense, without a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedModel

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.families import read_facts
from spark_vl.families.base import ModelInputs, ProcessedImage, ProcessedPrompt
from spark_vl.families.chat import ChatProcessor, or_config_error
from spark_vl.families.decoder import run_with_cache
from spark_vl.families.registry import load_part, loaded_commit
from spark_vl.records import BadRecordError, Message, PromptRecord, plain_text

_OF_IMAGES = ("freeze", "min_pixels", "max_pixels")
"""Fields of `ModelConfig` that mean nothing here."""


class QwenTextProcessor(ChatProcessor):
    """`Processor` of a language model alone: positions count tokens.

    Args:
        tokenizer: with its chat template.
        generation_config, max_prompt_tokens, commit: see `ChatProcessor`.

    Raises:
        ValueError: see `ChatProcessor`.
    """

    def __init__(
        self, tokenizer: Any, generation_config: GenerationConfig, *, max_prompt_tokens: int, commit: str | None = None
    ) -> None:
        super().__init__(tokenizer, tokenizer, generation_config, max_prompt_tokens=max_prompt_tokens, commit=commit)
        self.padding = _inputs(torch.tensor([self.pad_token_id]))

    def chat_message(self, message: Message) -> dict[str, Any]:
        """See `ChatProcessor.chat_message`. The templates take texts only."""
        return {"role": message.role, "content": plain_text(message.content)}

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """See `Processor.process`."""
        if record.images:
            raise BadRecordError(record.id, f"it shows {len(record.images)} images, and the model has no vision tower")
        ids = self.tokens_of(self.chat_of(record))
        if len(ids) > self.max_prompt_tokens:
            raise BadRecordError(
                record.id,
                f"the prompt has {len(ids)} tokens; at most {self.max_prompt_tokens} are allowed "
                "(data.max_prompt_tokens)",
            )
        return ProcessedPrompt(record=record, **vars(_inputs(ids)))

    def forget_images(self) -> None:
        """See `Processor.forget_images`; there are none."""


class Qwen3Processor(QwenTextProcessor):
    """`Processor` of Qwen3, whose chats have thoughts in them."""

    thought = ("<think>", "</think>")


class QwenText:
    """`Family` of dense language models. Their `model_type` names a subclass, which knows the reserved texts."""

    reserved: tuple[str, ...]
    processor_class: type[QwenTextProcessor] = QwenTextProcessor
    model_class = AutoModelForCausalLM
    adapter_targets = r"model\.layers\..*_proj"

    def load_processor(self, config: ModelConfig, *, max_prompt_tokens: int) -> QwenTextProcessor:
        """See `Family.load_processor`."""
        for name in _OF_IMAGES:
            if (found := vars(config)[name]) != vars(ModelConfig())[name]:
                raise ConfigError(f"model.{name}: found {found!r}, and {config.path} has no vision tower; leave it out")
        parts = load_part(AutoTokenizer, config), load_part(GenerationConfig, config)
        return or_config_error(
            config,
            lambda: self.processor_class(*parts, max_prompt_tokens=max_prompt_tokens, commit=loaded_commit(config)),
        )

    def freeze_vision(self, model: PreTrainedModel) -> Never:
        """See `Family.freeze_vision`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("model.freeze: found 'vision', and the model has no vision tower; leave it out")

    def hidden_states(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor | BlockMask,
        images: Sequence[ProcessedImage],
    ) -> Tensor:
        """See `Family.hidden_states`."""
        return model.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state[0]

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        images: Sequence[ProcessedImage],
        shown: Sequence[int],
    ) -> tuple[Tensor, DynamicCache]:
        """See `Family.prefill`."""
        cache = DynamicCache(config=model.config)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}
        return run_with_cache(model.model, cache, **inputs), cache

    def decode(
        self, model: PreTrainedModel, token_R: Tensor, position_R: Tensor, mask_RS: Tensor, cache: DynamicCache
    ) -> Tensor:
        """See `Family.decode`."""
        inputs = {"input_ids": token_R[:, None], "position_ids": position_R[:, None], "attention_mask": mask_RS}
        return run_with_cache(model.model, cache, **inputs)


class Qwen2(QwenText):
    """`Family` of Qwen2 and Qwen2.5."""

    reserved = tuple(read_facts("qwen2")["reserved"])


class Qwen3(QwenText):
    """`Family` of Qwen3."""

    reserved = tuple(read_facts("qwen3")["reserved"])
    processor_class = Qwen3Processor


def _inputs(ids: Tensor) -> ModelInputs:
    return ModelInputs(input_ids=ids, position_ids=torch.arange(len(ids)), images=())
