"""Which family a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from transformers import AutoConfig

from spark_vl.config import ConfigError, ModelConfig, blamed_on
from spark_vl.data.recipes import load_recipes
from spark_vl.families import read_facts
from spark_vl.families.base import Family
from spark_vl.families.refusals import refusal

FAMILIES = {
    "qwen2": "spark_vl.families.qwen_text:Qwen2",
    "qwen2_5_vl": "spark_vl.families.qwen2_5_vl:Qwen2_5VL",
    "qwen3": "spark_vl.families.qwen_text:Qwen3",
    "qwen3_vl": "spark_vl.families.qwen3_vl:Qwen3VL",
}
"""`model_type` of the Hugging Face configuration → `module:class`, imported on first use."""


@cache
def get_family(model_type: str) -> Family:
    """The family of models of `model_type`, a key of `FAMILIES`."""
    module, _, name = FAMILIES[model_type].partition(":")
    return vars(import_module(module))[name]()


def find_family(config: ModelConfig) -> Family:
    """The family of the checkpoint at `config.path`.

    Raises:
        ConfigError: see `find_model_type`.
    """
    return get_family(find_model_type(config))


def find_model_type(config: ModelConfig) -> str:
    """The `model_type` of the checkpoint at `config.path`, a key of `FAMILIES`.

    Raises:
        ConfigError: there is no checkpoint, or it is of a family that the kit does not know or refuses.
    """
    loaded = load_configuration(config)
    found, reason = loaded.model_type, refusal(loaded)
    if found not in FAMILIES or reason:
        why = f": {reason}" if reason else ""
        allowed = ", ".join(map(repr, FAMILIES))
        raise ConfigError(f"model.path: {config.path} holds a {found!r} model{why}; allowed: {allowed}")
    return found


def check_recipes(setting: str, names: Sequence[str], config: ModelConfig) -> None:
    """Refuse recipes with images for a model without a vision tower, before their rows or its weights are loaded.

    Args:
        names: of the recipes, which `setting` holds.

    Raises:
        ConfigError: names the recipe and the model; or see `find_model_type`.
    """
    model_type = find_model_type(config)
    if "vision_config" in read_facts(model_type):
        return
    with blamed_on(setting):
        for name, recipe in zip(names, load_recipes(names), strict=True):
            if recipe.columns.images is not None:
                raise ValueError(
                    f"{name} has images (columns.images: {recipe.columns.images}), and model.path: {config.path} is "
                    f"a {model_type!r} model, which has no vision tower; allowed: recipes without images"
                )


def load_configuration(config: ModelConfig) -> Any:
    """The model's configuration, without the attention that it names: that may be code on the Hub.

    Raises:
        ConfigError: see `load_part`.
    """
    loaded = load_part(AutoConfig, config)
    loaded._attn_implementation = "sdpa"
    return loaded


def load_part(part: Any, config: ModelConfig, /, **settings: Any) -> Any:
    """What `part.from_pretrained` loads from `config.path`.

    Args:
        settings: of `from_pretrained`.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    try:
        # Left to itself, transformers asks at the terminal whether to run a folder's own code.
        return part.from_pretrained(config.path, revision=config.revision, trust_remote_code=False, **settings)
    except Exception as error:  # it raises whatever somebody else's file makes it stumble over
        found = f"{type(error).__name__}: {error}"
        if constants.HF_HUB_OFFLINE and not Path(config.path).exists():
            found = f"it is no folder, nor in the Hub's cache, and HF_HUB_OFFLINE forbids to ask the Hub. {found}"
        raise ConfigError(f"model.path: {config.path} cannot be loaded ({part.__name__}): {found}") from error


def loaded_commit(config: ModelConfig) -> str | None:
    """The commit of the Hub that `config.path` was just loaded from; None: it is a folder."""
    if Path(config.path).exists():
        return None
    file = try_to_load_from_cache(config.path, "config.json", revision=config.revision or "main")
    assert isinstance(file, str), "it was just loaded"
    return Path(file).parent.name  # the cache names the folder for the commit
