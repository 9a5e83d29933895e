"""The plain padded computation that packing must equal: each completion in a row of its own, with prompt and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from spark_vl.families.base import ProcessedPrompt


def plain_inputs(model: PreTrainedModel, prompt: ProcessedPrompt, completion: Sequence[int] = ()) -> dict[str, Any]:
    """A prompt and a completion as a Hugging Face model takes them, which finds positions and mask itself."""
    ids = torch.cat([prompt.input_ids, torch.tensor(completion, dtype=torch.long)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs |= {
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            "pixel_values": torch.cat([i.pixel_values for i in prompt.images]),
            "image_grid_thw": torch.stack([i.grid_thw for i in prompt.images]),
        }
    return inputs


def padded_logprobs(
    model: PreTrainedModel, prompt: ProcessedPrompt, completions: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of each completion's tokens, with Hugging Face's own positions and causal mask."""
    results = []
    for completion in completions:
        logits = model(**plain_inputs(model, prompt, completion)).logits[0]
        logp = torch.log_softmax(logits[len(prompt.input_ids) - 1 : -1], dim=-1)
        results.append(logp.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return results
