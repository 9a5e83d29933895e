"""A tiny random model of each family, with transformers' own classes, for the tests that every family has to pass.

A new family is a row of `TINY`: what makes a model and its processor, or its tokenizer if it takes no images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2VLImageProcessor,
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
    processor: Any, *, vocab_size: int, hidden: int = 64, heads: int = 4, head_dim: int = 16, std: float = 0.125
) -> dict[str, Any]:
    """Of a `Qwen3VLConfig` with two layers and three vision blocks, two of which are read by deepstack."""
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
            "hidden_size": 32,
            "intermediate_size": 64,
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
    """`model`, in evaluation mode, with the generation configuration that a published one has."""
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=ids[1])
    return model.eval()


def tiny_qwen3_vl(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    processor = qwen3_vl_processor()
    config = Qwen3VLConfig(**qwen3_vl_settings(processor, vocab_size=len(processor.tokenizer)))
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
        """How many images a prompt of the tests has."""
        return (1, 0, 3) if self.merged_patch else (0,)

    def save(self, folder: Path) -> ModelConfig:
        """Write the checkpoint, and say how it is loaded."""
        model, processor = self.make()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return ModelConfig(path=str(folder), dtype="float32", min_pixels=784, max_pixels=224 * 224)

    def load_processor(self, config: ModelConfig) -> Processor:
        return find_family(config).load_processor(config, max_prompt_tokens=4096)


TINY = (
    TinyFamily("qwen2_5_vl", random_tiny, merged_patch=28, coordinates="resized"),
    TinyFamily("qwen3_vl", tiny_qwen3_vl, wide_qwen3_vl, merged_patch=32, coordinates="thousand"),
)


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
