"""Qwen2.5-VL."""

from __future__ import annotations

from transformers.models.qwen2_5_vl import Qwen2_5_VLModel

from spark_vl.families import read_facts
from spark_vl.families.qwen_vl import QwenVL, QwenVLProcessor


class Qwen2_5VLProcessor(QwenVLProcessor):
    """`Processor` of Qwen2.5-VL."""

    model_class = Qwen2_5_VLModel
    coordinates = "resized"
    """Pixels of the image as the model sees it:
    https://github.com/QwenLM/Qwen2.5-VL/blob/main/cookbooks/spatial_understanding.ipynb."""


class Qwen2_5VL(QwenVL):
    """`Family` of Qwen2.5-VL."""

    reserved = tuple(read_facts("qwen2_5_vl")["reserved"])
    processor_class = Qwen2_5VLProcessor
