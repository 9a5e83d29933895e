"""Model cards. A card states no number that is not in the run's own files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from spark_vl import __version__
from spark_vl.data.problems import check, open_recipe
from spark_vl.data.recipes import Recipe, load_recipe
from spark_vl.prompts import Templater
from spark_vl.records import PromptRecord, plain_text


def write_model_card(run: Path) -> Path:
    """Write `model/README.md` of a finished run, from its config, metrics and summary (if it was evaluated)."""
    config_text = (run / "config.yaml").read_text()
    config = yaml.safe_load(config_text)
    summary = run / "summary.json"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recipes = [load_recipe(name) for name in config["data"]["recipes"]]
    base = config["model"]["path"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=_hub_id(base),
        base_model_relation=_hub_id(base) and "finetune",
        datasets=[id for r in recipes if r.source.kind == "hub" and (id := _hub_id(r.source.location))] or None,
        tags=["spark-vl", "generative-reward-model", "grpo"],
    )
    card = ModelCard.from_template(
        data,
        template_str=(resources.files("spark_vl.model_cards") / "model.md").read_text(),
        name=run.name,
        model_id=str(run / "model"),
        version=__version__,
        config=config,
        config_text=config_text,
        question=_first_question(recipes[0]),
        summary=json.loads(summary.read_text()) if summary.exists() else None,
        percent=_percent,
        steps=len(steps),
        recycled={
            "judge": _total(steps, "pointwise_correct", "pointwise_incorrect", "pairwise"),
            "reflection": _total(steps, "reflection_correct", "reflection_incorrect"),
        },
        recipes=recipes,
    )
    path = run / "model" / "README.md"
    card.save(path)
    return path


def _first_question(recipe: Recipe) -> str:
    """The text of the first training problem that can be used, as an example."""
    problems = check(open_recipe(recipe, "train", Templater.load()))
    record = next(found for found in problems if isinstance(found, PromptRecord))
    return plain_text(record.question).replace("<image>", "").strip()


def _hub_id(location: str) -> str | None:
    """`location`, unless it is a folder of the author's machine, which no reader could look up."""
    return None if Path(location).exists() else location


def _percent(value: float | None, interval: list[float] | None) -> str:
    return "" if value is None else f"{100 * value:.1f} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"


def _total(steps: list[dict], *names: str) -> int:
    """Recycled prompts over all steps; a run without recycling has none of these."""
    return round(sum(step.get(f"recycle/{name}", 0) for step in steps for name in names))
