"""What lies where in a run's folder, as far as more than one module must know."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
"""The resolved configuration."""
RECIPES = "recipes.json"
"""What the run knows of its data (`provenance.write_recipes`)."""
ENVIRONMENT = "environment.jsonl"
"""What it ran on (`provenance.note_environment`)."""
JUDGMENTS = "judgments"
"""Folder of the rollouts and judgments that it kept (`data.shards`)."""
CHECKPOINTS = "checkpoints"
"""Folder of `step-000120/` folders and of the files `latest` and `best`, which name one each."""
LATEST, BEST = "latest", "best"
MODEL = "model"
"""In a checkpoint, and at last in the run's folder: the plain Hugging Face checkpoint."""
TRAINING_FILE = "spark_training.json"
"""In `model/`: after which step of its run the model was saved, and what it started from; `base_commit` is null where
that was no repository of the Hub."""


def name_of(step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return f"step-{step:06d}"


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `pointer` (`latest`, `best`) in `folder` names; None: there is none yet."""
    file = folder / pointer
    return folder / file.read_text().strip() if file.exists() else None
