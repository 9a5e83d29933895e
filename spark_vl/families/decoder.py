"""Runs the language model of a family with a cache, whatever the version of transformers calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import DynamicCache


def run_with_cache(decoder: Any, kv_cache: DynamicCache, **inputs: Any) -> Tensor:
    """The hidden state [B, H] of each row's last token, after a prefill or a decoding step; `kv_cache` grows by it.

    Args:
        decoder: the language model without its head.
        inputs: of its `forward`: tokens or embeddings, `position_ids` and `attention_mask`.
    """
    inputs[_cache_argument(type(decoder).forward)] = kv_cache
    return decoder(**inputs, use_cache=True).last_hidden_state[:, -1]


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """`past_key_values` until transformers 5.24, which calls it `cache`."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
