"""Qwen2.5-VL in miniature: the model and processor classes of transformers, with few weights and a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from spark_vl.demo.digits import QUESTIONS

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The warm-started model that is installed with the package."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
"""Qwen's turns, with no system message but the caller's."""


def build_processor(
    texts: Iterable[str], *, vocab_size: int = 400, min_pixels: int = 28 * 28, max_pixels: int = 224 * 224
) -> Qwen2_5_VLProcessor:
    """A processor whose byte-level BPE, of at most `vocab_size` tokens, is trained on `texts`; it encodes any text.

    Digits are split one by one, as in Qwen's tokenizers. `min_pixels` and `max_pixels` bound a resized image's area.
    """
    blank = Qwen2Tokenizer(
        unk_token=None,  # type: ignore[arg-type]  # what Qwen's own tokenizers have
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    pixels = {"patch_size": 14, "merge_size": 2, "min_pixels": min_pixels, "max_pixels": max_pixels}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=CHAT_TEMPLATE
    )


def build_model(
    tokenizer: Qwen2Tokenizer, *, hidden: int, layers: int, heads: int, vision_hidden: int, window: int, std: float
) -> Qwen2_5_VLForConditionalGeneration:
    """A model for `tokenizer` with weights drawn from torch's current random state.

    Args:
        hidden: width of the language model, whose `heads` share half as many key-value heads.
        vision_hidden: width of the vision tower, which has two blocks: windowed attention, then full.
        window: side of the attention window, in pixels.
        std: standard deviation of the initial weights.
    """
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    half_head = hidden // heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 2048,
            "initializer_range": std,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # the shares of time, height and width in each head's rotary frequencies: Qwen's 16, 24, 24 of 64
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half_head // 4, 3 * half_head // 8, 3 * half_head // 8],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "window_size": window,
            "fullatt_block_indexes": [1],
            "initializer_range": std,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    return model


def random_tiny(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained model for tests, in evaluation mode, smaller than the demo's; equal for equal seeds.

    Its weights are large enough that what it says depends on its prompt and its image.
    """
    processor = build_processor(list(QUESTIONS), vocab_size=320)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(processor.tokenizer, hidden=64, layers=2, heads=2, vision_hidden=32, window=56, std=0.125)
    model.to(dtype)  # type: ignore[arg-type]  # transformers wraps the method and loses its signature
    return model.eval(), processor
