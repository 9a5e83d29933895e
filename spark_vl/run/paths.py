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
