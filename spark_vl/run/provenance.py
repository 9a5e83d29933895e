"""What a run was made from: its data and their licenses, its machines and package versions. Cards quote it."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spark_vl.config import OfflineConfig, dump_config, read_config
from spark_vl.data.recipes import load_recipe
from spark_vl.run.jsonl import append_lines
from spark_vl.run.paths import CONFIG, ENVIRONMENT, RECIPES

_PACKAGES = ("spark-vl", "torch", "transformers", "accelerate", "qwen-vl-utils")


def write_recipes(run: Path, names: Iterable[str]) -> None:
    """Add to `recipes.json` for each name in the configuration the recipe's name, description, license, and the
    dataset (`id`, `config`, `revision`), if it is on the Hub."""
    file = run / RECIPES  # from an earlier start, whose checkpoints may have other recipes
    facts: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        recipe = load_recipe(name)
        on_hub = recipe.source.type == "hub" and public_name(recipe.source.location) == recipe.source.location
        facts[name] = {
            "name": recipe.name,
            "description": recipe.description,
            "license": recipe.license,
            "dataset": {
                "id": recipe.source.location,
                "config": recipe.source.config,
                "revision": recipe.source.revision,
            }
            if on_hub
            else None,
            "splits": dict(recipe.splits),
        }
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def note_environment(run: Path, step: int, launch: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Append to `environment.jsonl` where the run continues after `step`: a resumed run may change machines.

    Args:
        launch: see `distributed.launch.describe_launch`.
        changed: see `config.config_differences`.
    """
    packages = [*_PACKAGES, "deepspeed"] if launch["strategy"].startswith("zero") else _PACKAGES
    line = {
        "step": step,
        **launch,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "changed": list(changed),
    }
    append_lines(run / ENVIRONMENT, [line])


def copy_provenance(run: Path, output: Path, config: OfflineConfig) -> None:
    """Copy to `output`, which was recycled from the rollouts of `run`, the files that its card is written from."""
    settings = read_config(run / CONFIG)
    settings |= {name: part for name, part in asdict(config).items() if name in ("prompts", "recycle")}
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).write_text(dump_config(settings | {"recycled_from": run.name}))
    shutil.copyfile(run / RECIPES, output / RECIPES)


def public_name(location: str) -> str:
    """`location`, or only its last part if it is a path on the author's machine, where no reader can look it up."""
    return Path(location).name if Path(location).is_absolute() or Path(location).exists() else location
