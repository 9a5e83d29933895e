"""Processors turn a `PromptRecord` into a model's inputs. The only place that knows a model family.

A step decodes, resizes and tokenizes nothing twice: a processor is called once for each unique prompt, and the
rollout engine and the policy update share its result.
"""

from spark_vl.families.base import ProcessedImage, ProcessedPrompt, Processor, padding_prompt
from spark_vl.families.qwen2_5_vl import QwenVLProcessor, load_processor

__all__ = ["ProcessedImage", "ProcessedPrompt", "Processor", "QwenVLProcessor", "load_processor", "padding_prompt"]
