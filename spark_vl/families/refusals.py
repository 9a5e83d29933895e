"""Models that would train on something silently wrong, and why: refused by name, before any weights are loaded.

A packed group rests on attention that sees what the mask shows it and nothing else. A layer that carries a state from
token to token goes on from the end of one completion into the next, and a layer that sees a window of tokens counts
those of other completions; neither raises an error. What nobody thought of is left to the check at the start of a run
(`policy.check`), which compares packed and single scores.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

_STATE = "carry a state from one completion of a packed group into the next, whatever the mask says"
_WINDOW = "see a window of tokens, in which a packed group has those of other completions"

LAYERS = {
    "linear_attention": f"linear-attention (recurrent) layers, which {_STATE}",
    "recurrent": f"recurrent layers, which {_STATE}",
    "mamba": f"recurrent layers, which {_STATE}",
    "conv": f"convolutional-state layers, which {_STATE}",
    "hybrid": f"layers that are partly recurrent, which {_STATE}",
    "hybrid_sliding": f"layers that are partly recurrent, which {_STATE}",
    "sliding_attention": f"sliding-window attention layers, which {_WINDOW}",
    "chunked_attention": f"chunked attention layers, which {_WINDOW}",
}
"""Name in a configuration's `layer_types` → what such layers are called, and what goes wrong."""

MODELS = {
    "qwen3_vl_moe": "a mixture of experts, whose weights transformers cannot load under ZeRO-3: it would not train on "
    "several processes (use a dense Qwen3-VL)",
}
"""`model_type` → what is refused whatever its layers are."""


def refusal(config: Any) -> str | None:
    """What makes a model unfit, given its Hugging Face configuration; None: nothing that is known."""
    if config.model_type in MODELS:
        return MODELS[config.model_type]
    language = config.get_text_config()
    facts, kinds = language.to_dict(), getattr(language, "layer_types", None) or []  # not all configurations list them
    for kind, count in Counter(kinds).items():
        if kind != "full_attention":
            what = LAYERS.get(kind, f"of kind {kind!r}, which is not known to keep completions of a group apart")
            return f"{count} of {len(kinds)} layers are {what}"
    if not kinds and facts.get("sliding_window") and facts.get("use_sliding_window", True):
        return f"it has {LAYERS['sliding_attention']}"
    for name in facts:
        if "ngram" in name or "n_gram" in name:
            return f"it has n-gram layers ({name}), which read the tokens before each, also those of other completions"
    return None
