"""A Space for a model: the page in `scripts/space`, with everything that it needs to run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import validate_repo_id

MODULES = (
    "__init__.py",
    "answers/__init__.py",
    "answers/boxed.py",
    "answers/choices.py",
    "answers/latex.py",
    "answers/quantities.py",
    "answers/sequences.py",
    "config.py",
    "records.py",
    "data/__init__.py",
    "data/images.py",
    "prompts/__init__.py",
    "prompts/templater.py",
)
"""What the page imports of this package. It is copied, because no package index has it."""


def stage_space(folder: Path, *, model: str, revision: str | None = None, title: str | None = None) -> Path:
    """Write every file of a Space that shows `model` into `folder`, which is new or empty, and return it.

    Args:
        model: Hub id, `owner/name`. Its repository must hold what `Templater.save` wrote, as `PROMPTS_FILE`.
        revision: commit, tag or branch of the model; None: its main branch as it is when the Space starts.
        title: of the Space; None: the name of the model.

    Raises:
        ValueError: the folder is not empty, or `model` is not a Hub id.
    """
    validate_repo_id(model)
    if "/" not in model:
        raise ValueError(f"model: found {model!r}; allowed: the Hub id of a model, owner/name")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; a Space is written into a new folder")

    page, package = resources.files("spark_vl.space"), resources.files("spark_vl")
    sources = {name: page / name for name in ("app.py", "requirements.txt")}
    sources |= {f"spark_vl/{name}": package / name for name in MODULES}
    for name, source in sources.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    settings = {"model": model, "revision": revision}
    (folder / "space.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    card = SpaceCard((page / "README.md").read_text(encoding="utf-8"))
    card.data["title"] = title or model.rpartition("/")[2]
    card.data["models"] = [model]
    card.save(folder / "README.md")
    return folder
