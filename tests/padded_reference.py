"""The plain padded computation that packing must equal: each completion in a row of its own, with prompt and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from spark_vl.families.base import ProcessedPrompt


def padded_logprobs(
    model: PreTrainedModel, prompt: ProcessedPrompt, completions: Sequence[Sequence[int]], image_token_id: int
) -> list[torch.Tensor]:
    """Log-probabilities of each completion's tokens, with Hugging Face's own positions and causal mask."""
    results = []
    for completion in completions:
        ids = torch.cat([prompt.input_ids, torch.tensor(completion)])[None]
        images = {}
        if prompt.images:
            images = {
                "pixel_values": torch.cat([i.pixel_values for i in prompt.images]),
                "image_grid_thw": torch.stack([i.grid_thw for i in prompt.images]),
            }
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image_token_id).int(),
            **images,
        ).logits[0]
        logp = torch.log_softmax(logits[len(prompt.input_ids) - 1 : -1], dim=-1)
        results.append(logp.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return results
