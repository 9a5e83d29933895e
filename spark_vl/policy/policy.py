"""The policy: a Hugging Face vision-language model that scores packs in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from spark_vl.config import ModelConfig
from spark_vl.policy.head import ScoringHead, TokenScores
from spark_vl.policy.packing import Pack, attention_mask


class Policy(nn.Module):
    """A vision-language model as the trainer sees it. One `forward` of one module, so DDP and ZeRO see an ordinary
    step.

    Args:
        model: its `lm_head` is replaced by a `ScoringHead` over the same weight.
        attention: back-end of the packed forward pass.
        temperature: of the sampling, so that log-probabilities are those of the distribution that was sampled from.
        suppressed_token_ids: tokens that are never sampled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Literal["sdpa", "flex"],
        temperature: float,
        suppressed_token_ids: Sequence[int],
    ) -> None:
        super().__init__()
        old = model.lm_head
        with torch.device("meta"):
            head = ScoringHead(old.in_features, old.out_features, bias=old.bias is not None)
        head.weight, head.bias = old.weight, old.bias  # the same Parameters: tied embeddings stay tied
        model.lm_head = head
        self.model = model
        self.attention = attention
        self.temperature = temperature
        self.register_buffer("suppressed", torch.tensor(list(suppressed_token_ids), dtype=torch.long), persistent=False)
        self.use_attention(attention)

    def use_attention(self, backend: Literal["sdpa", "flex"]) -> None:
        """Compute the language model's attention with `backend` from here on."""
        self.model.config.text_config._attn_implementation = {"flex": "flex_attention"}.get(backend, backend)

    def forward(self, pack: Pack) -> TokenScores:
        """Score the N completion tokens of `pack`."""
        hidden_TH = self.model.model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=attention_mask(pack, self.attention),
            pixel_values=pack.pixel_values,
            image_grid_thw=pack.image_grid_thw,
            use_cache=False,
        ).last_hidden_state[0]
        return self.model.lm_head(
            hidden_TH[pack.source_N],
            pack.target_N,
            temperature=self.temperature,
            suppressed=self.suppressed,
        )


def load_policy(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    temperature: float,
    suppressed_token_ids: Sequence[int],
    frozen: bool = False,
) -> Policy:
    """Load the checkpoint at `config.path`, in safetensors only and without any code of its own.

    Args:
        dtype: of the weights. An optimizer without float32 master weights needs float32 here: steps of 5e-7 vanish in
            bfloat16. frozen: the reference policy: evaluation mode, no gradients.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        config.path,
        revision=config.revision,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
    )
    policy = Policy(
        model,
        attention=config.attention,
        temperature=temperature,
        suppressed_token_ids=suppressed_token_ids,
    )
    if frozen:
        return policy.eval().requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train()
