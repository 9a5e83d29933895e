"""Names of the files and folders in a run's folder that more than one module uses."""

from __future__ import annotations

import re
from pathlib import Path

from spark_vl.config import ConfigError

CONFIG = "config.yaml"
"""The resolved configuration."""
RECIPES = "recipes.json"
"""Facts about the run's data (`provenance.write_recipes`)."""
ENVIRONMENT = "environment.jsonl"
"""What the run ran on (`provenance.note_environment`)."""
JUDGMENTS = "judgments"
"""Folder of the stored rollouts and judgments (`run.shards`)."""
CHECKPOINTS = "checkpoints"
"""Folder of `step-000120/` folders and of the files `latest` and `best`, each of which names one of them."""
LATEST, BEST = "latest", "best"
MODEL = "model"
"""The plain Hugging Face checkpoint: in each checkpoint, and in the run's folder when the run has finished."""
ADAPTER = "adapter"
"""In `model/`, of a run that trains adapters: these alone, for peft, in the type that they were trained in."""
TRAINING_FILE = "spark_training.json"
"""In `model/`: the step after which the model was saved, and what the run started from; `base_commit` is null if that
was not a repository on the Hub."""


def name_of(step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return f"step-{step:06d}"


def model_folder(path: str) -> str:
    """What `path` means as a model: itself, an id of the Hub or a folder with weights; of a run, a checkpoint, or
    `checkpoints/best`, its `model/`.

    Raises:
        ConfigError: it is another file, a folder without weights, or a folder that is not there.
    """
    place = Path(path)
    if place.name in (LATEST, BEST) and place.is_file():
        place = pointed(place.parent, place.name) or place
    if place.is_file():
        raise ConfigError(
            f"model.path: {path} is a file; allowed: a Hub id, or the folder of a model, run or checkpoint"
        )
    if not place.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path, re.ASCII) and not Path(place.parts[0]).exists():
            return path
        where = "" if place.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"model.path: there is no folder {path}{where}; allowed: such a folder, or ORG/NAME of the Hub"
        )
    for folder in (place, place / MODEL):
        if (folder / "config.json").is_file():
            if not any(folder.glob("*.safetensors")):
                raise ConfigError(f"model.path: {folder} has no weights (*.safetensors)")
            return str(folder)
    latest = pointed(place / CHECKPOINTS, LATEST)
    advice = f"; its latest checkpoint is {latest}" if latest else ""
    raise ConfigError(f"model.path: {path} holds no model: there is no config.json in it or in its {MODEL}/{advice}")


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `pointer` (`latest`, `best`) in `folder` names; None if there is no such file yet.

    Raises:
        ConfigError: it names something else, maybe outside of `folder`.
    """
    file = folder / pointer
    if not file.exists():
        return None
    name = file.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-[0-9]{6,}", name):
        raise ConfigError(f"{file}: found {name!r:.80}; allowed: the name of a checkpoint, such as {name_of(120)}")
    return folder / name
