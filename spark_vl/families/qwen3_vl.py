"""Qwen3-VL, the dense models, instructed and thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.models.qwen3_vl import Qwen3VLModel

from spark_vl.families import read_facts
from spark_vl.families.qwen_vl import QwenVL, QwenVLProcessor, shown_features


class Qwen3VLProcessor(QwenVLProcessor):
    """`Processor` of Qwen3-VL."""

    model_class = Qwen3VLModel
    thought = ("<think>", "</think>")
    coordinates = "thousand"
    """Thousandths of width and height:
    https://github.com/QwenLM/Qwen3-VL/blob/main/cookbooks/2d_grounding.ipynb."""


class Qwen3VL(QwenVL):
    """`Family` of Qwen3-VL: features of inner layers of the vision tower are added to the output of the language
    model's first layers (DeepStack, arXiv 2406.04334)."""

    reserved = tuple(read_facts("qwen3_vl")["reserved"])
    processor_class = Qwen3VLProcessor

    def deeper_features(self, features: Any, shown: Sequence[int], is_image_BS: Tensor) -> dict[str, Any]:
        """See `QwenVL.deeper_features`. Without them the language model would go on silently, to other tokens."""
        return {
            "visual_pos_masks": is_image_BS,
            "deepstack_visual_embeds": [shown_features(layer, shown) for layer in features.deepstack_features],
        }
