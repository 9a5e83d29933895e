"""What a run saves beside the weights for those who use the model: how it was trained, in which words, within which
limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from spark_vl.config import EvalConfig, ModelConfig, PromptConfig, TrainConfig, blamed_on
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.run.paths import MODEL, TRAINING_FILE

_LIMITS = {
    "model.dtype": "model.dtype",
    "model.min_pixels": "model.min_pixels",
    "model.max_pixels": "model.max_pixels",
    "rollout.temperature": "rollout.temperature",
    "rollout.max_new_tokens": "rollout.max_new_tokens",
    "data.max_prompt_tokens": "max_prompt_tokens",
}
"""Settings of training → those of an evaluation that begin with the same value."""


def limits_of(config: TrainConfig) -> dict[str, Any]:
    """How finely the model saw images, and how it was sampled: settings of an evaluation → values."""
    values = {}
    for path, limit in _LIMITS.items():
        group, name = path.split(".")
        values[limit] = vars(vars(config)[group])[name]
    return values


def saved_limits(path: str, revision: str | None) -> dict[str, Any]:
    """The `limits_of` the run that has trained a model; empty: no run has.

    Raises:
        ConfigError: the file that says so cannot be used, or the Hub cannot be asked for it.
    """
    with blamed_on("model.path"):
        file = find_saved(path, revision, TRAINING_FILE)
        if file is None:
            return {}
        try:
            limits = json.loads(file.read_text()).get("limits", {})
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from error
        if not isinstance(limits, Mapping) or not {*limits} <= {*_LIMITS.values()}:
            raise ValueError(f"{file}: limits: found {limits!r:.200}; allowed: {', '.join(_LIMITS.values())}")
        return dict(limits)


def find_saved(path: str, revision: str | None, name: str) -> Path | None:
    """The file `name` beside the weights of a folder or a repository of the Hub; None: there is none."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except EntryNotFoundError:  # also when offline, for a file that was never downloaded
        return None


def find_templater(prompts: PromptConfig, model: ModelConfig, reserved: Sequence[str] | None) -> Templater:
    """The prompts to ask a model with: those of `prompts`; if nothing is set there, those that the model was
    trained on, which a run saves in its folder, or repository, as `PROMPTS_FILE`.

    Args:
        reserved: see `Templater`.

    Raises:
        ConfigError: a template file, or that file, cannot be used, or the Hub cannot be asked for it.
    """
    if prompts != PromptConfig():
        return Templater.from_config(prompts, reserved)
    with blamed_on("model.path"):
        file = find_saved(model.path, model.revision, PROMPTS_FILE)
        print(f"uses the prompts {'of the shipped templates' if file is None else 'that the model was trained on'}")
        return Templater.from_config(prompts, reserved) if file is None else Templater.read(file)


def evaluation_settings(file: Path) -> dict[str, Any] | None:
    """The settings that an evaluation takes over from `file`, the configuration of a training run, and the model that
    the run has trained; None: it is no such file."""
    try:
        settings = yaml.safe_load(file.read_bytes()) if file.is_file() else None
    except yaml.YAMLError:  # which the parser of settings says
        return None
    if not isinstance(settings, dict) or "output_dir" not in settings:
        return None
    own = {field.name for field in fields(EvalConfig)}
    kept = {name: value for name, value in settings.items() if name in own}
    if (file.parent / MODEL).is_dir() and isinstance(kept.get("model"), dict):
        kept["model"]["path"] = str(file.parent / MODEL)  # what the run has trained, not what it began with
    if isinstance(data := settings.get("data"), dict) and "max_prompt_tokens" in data:
        kept["max_prompt_tokens"] = data["max_prompt_tokens"]
    return kept
