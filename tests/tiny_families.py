"""A tiny random model of each family, with transformers' own classes, for the tests that every family has to pass.

A new family is a row of `TINY`: what makes a model and its processor, or its tokenizer if it takes no images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLVideoProcessor,
)
from transformers import Qwen3VLProcessor as HuggingFaceProcessor
from transformers.models.qwen3_5 import Qwen3_5Model
from transformers.models.qwen3_vl_moe import Qwen3VLMoeModel

from spark_vl.config import ModelConfig
from spark_vl.demo.digits import QUESTIONS
from spark_vl.demo.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, build_processor, random_tiny
from spark_vl.families.base import Processor
from spark_vl.families.qwen3_vl import Qwen3VL, Qwen3VLProcessor
from spark_vl.families.qwen_vl import QwenVL, QwenVLProcessor
from spark_vl.families.registry import find_family

THINKING_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
"""As that of Qwen3-VL's thinking checkpoints: the generation prompt begins the thought."""


def qwen3_vl_processor(vocab_size: int = 320, chat_template: str = CHAT_TEMPLATE) -> HuggingFaceProcessor:
    """Patches of 16 that are merged two by two, and the tokens of a thought beside the demo's."""
    tokenizer = build_processor(list(QUESTIONS), vocab_size=vocab_size).tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    sizes = {"patch_size": 16, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"min_pixels": 32 * 32, "max_pixels": 256 * 256}
    return HuggingFaceProcessor(
        Qwen2VLImageProcessor(**sizes, **pixels),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes),
        chat_template=chat_template,
    )


def qwen3_vl_settings(
    processor: Any,
    *,
    vocab_size: int,
    hidden: int = 64,
    heads: int = 4,
    head_dim: int = 16,
    vision: int = 32,
    std: float = 0.125,
) -> dict[str, Any]:
    """Of a `Qwen3VLConfig` with three layers and three vision blocks, two of which are read by deepstack."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "text_config": {
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "initializer_range": std,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # the shares of time, height and width in each head's frequencies: Qwen's 24, 20, 20 of 64
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [head_dim // 2 - 2 * (head_dim * 5 // 32), head_dim * 5 // 32, head_dim * 5 // 32],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": vision,
            "intermediate_size": 2 * vision,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
            "initializer_range": std,
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def stops(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """`model`, in evaluation mode, with a generation configuration that, as published ones, also says how to sample."""
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    sampling = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 3.0}
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=ids[1], **sampling)
    return model.eval()


def tiny_text(
    config_class: type[PreTrainedConfig], seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[PreTrainedModel, Any]:
    """A language model alone. `settings` are of its configuration."""
    tokenizer = build_processor(list(QUESTIONS), vocab_size=320).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny = {
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.125},
        **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**tiny | settings)).to(dtype)
    return stops(model, tokenizer), tokenizer


def tiny_qwen3_vl(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: int) -> tuple[PreTrainedModel, Any]:
    """`settings` are of `qwen3_vl_settings`."""
    processor = qwen3_vl_processor()
    config = Qwen3VLConfig(**qwen3_vl_settings(processor, vocab_size=len(processor.tokenizer), **settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).to(dtype)
    return stops(model, processor.tokenizer), processor


def wide_qwen3_vl() -> tuple[PreTrainedModel, Any]:
    """As the 2B model: width 2048, heads of 128, tied embeddings of 151,936 words; a vision tower of width 1024."""
    processor = qwen3_vl_processor()
    settings = qwen3_vl_settings(processor, vocab_size=151936, hidden=2048, heads=16, head_dim=128, std=0.02)
    settings["text_config"] |= {"num_hidden_layers": 2, "intermediate_size": 6144}
    settings["vision_config"] |= {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    settings["vision_config"]["num_position_embeddings"] = 2304
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings | {"tie_word_embeddings": True}))
    return stops(model, processor.tokenizer), processor


@dataclass(frozen=True)
class TinyFamily:
    """A row of the families' tests."""

    model_type: str
    make: Callable[..., tuple[PreTrainedModel, Any]]
    """(seed, dtype) → an untrained model, equal for equal seeds, and its Hugging Face processor or tokenizer."""
    make_wide: Callable[[], tuple[PreTrainedModel, Any]] | None = None
    """→ two layers of realistic widths under a vocabulary of real size, in float32; for slow tests."""
    merged_patch: int = 0
    """Pixels of the side of what becomes one image token; 0: it takes no images."""
    coordinates: str | None = None

    def __str__(self) -> str:
        return self.model_type

    @property
    def images(self) -> tuple[int, ...]:
        """How many images each prompt of the tests has."""
        return (1, 0, 3) if self.merged_patch else (0, 0, 0)

    def save(self, folder: Path) -> ModelConfig:
        """Write the checkpoint, and say how it is loaded."""
        model, processor = self.make()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        pixels = {"min_pixels": 784, "max_pixels": 224 * 224} if self.merged_patch else {}
        return ModelConfig(path=str(folder), dtype="float32", **pixels)

    def load_processor(self, config: ModelConfig) -> Processor:
        return find_family(config).load_processor(config, max_prompt_tokens=4096)


# As the models of 3B and 1.7B: tied embeddings of 151,936 words.
WIDE = {
    **{"vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 2},
    **{"initializer_range": 0.02, "tie_word_embeddings": True},
}
WIDE_QWEN2 = WIDE | {"intermediate_size": 11008}
WIDE_QWEN3 = WIDE | {"intermediate_size": 6144, "num_key_value_heads": 8, "head_dim": 128}

TINY = (
    TinyFamily("qwen2_5_vl", random_tiny, merged_patch=28, coordinates="resized"),
    TinyFamily("qwen3_vl", tiny_qwen3_vl, wide_qwen3_vl, merged_patch=32, coordinates="thousand"),
    TinyFamily(
        "qwen2",
        partial(tiny_text, Qwen2Config, tie_word_embeddings=True),
        partial(tiny_text, Qwen2Config, **WIDE_QWEN2),
    ),
    # Its heads are together wider than the hidden states.
    TinyFamily("qwen3", partial(tiny_text, Qwen3Config, head_dim=24), partial(tiny_text, Qwen3Config, **WIDE_QWEN3)),
)


def tiny_family(model_type: str) -> TinyFamily:
    """The row of `model_type`."""
    return next(family for family in TINY if family.model_type == model_type)


class Qwen3_5(QwenVL):
    """As if somebody had written a family for it: what is refused has to be stopped by the check at the start."""

    reserved = ("<|",)

    class processor_class(QwenVLProcessor):
        model_class = Qwen3_5Model
        coordinates = "thousand"


class Qwen3VLMoe(Qwen3VL):
    """As if mixtures of experts were not refused."""

    class processor_class(Qwen3VLProcessor):
        model_class = Qwen3VLMoeModel
