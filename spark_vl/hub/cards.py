"""Model cards. A card states no number that is not in the run's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    CardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    RepoCard,
    eval_result_entries_to_yaml,
)

from spark_vl import __version__
from spark_vl.config import dump_config
from spark_vl.hub.benchmarks import Benchmark
from spark_vl.hub.release import ReleaseError, below
from spark_vl.hub.run import TrainedModel
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import Template
from spark_vl.run.paths import CONFIG

BASE_LICENSE = ("license", "license_name", "license_link")
"""What the card of a base model says of its license, in the Hub's words."""

_RECYCLED = {
    "recycled, pointwise, right answer": "pointwise_correct",
    "recycled, pointwise, wrong answer": "pointwise_incorrect",
    "recycled, pairwise": "pairwise",
    "recycled, reflection on a wrong answer": "reflection_incorrect",
    "recycled, reflection on a right answer": "reflection_correct",
}


def write_model_card(
    model: TrainedModel, path: Path, *, model_id: str, name: str, base_license: Mapping[str, str] | None = None
) -> None:
    """Write the card of `model`.

    Args:
        model_id: what its snippets load: `ORG/NAME`, or a folder.
        base_license: of the base model, as its card names it (`BASE_LICENSE`).
    """
    config = model.config
    license = base_license or {}
    base, on_hub = model.base, model.base_commit is not None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(model),
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        base_model=base if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=sorted({recipe["dataset"]["id"] for recipe in model.trained_on if recipe["dataset"]}) or None,
        tags=["spark-vl", "generative-reward-model", "grpo"],
        model_name=name,
        eval_results=list(_eval_results(model)) or None,
    )
    judge, says_right = _judge(model.templater)
    evaluation = model.evaluation
    consistency = None if evaluation is None else evaluation["after"].get("pairwise_consistency")
    max_new_tokens = config["rollout"]["max_new_tokens"]
    if not isinstance(max_new_tokens, int):  # it becomes code
        raise ReleaseError(f"{CONFIG}: rollout.max_new_tokens: found {max_new_tokens!r:.80}; allowed: an integer")
    config_text = dump_config(config)
    save_card(
        ModelCard,
        path,
        data,
        "model.md",
        name=name,
        model_id=Verbatim(json.dumps(model_id)),
        version=__version__,
        base=Verbatim(f"[{base}](https://huggingface.co/{base})") if on_hub else _code(base),
        base_license=license.get("license_name") or license.get("license"),
        config=config,
        config_text=Verbatim(config_text),
        has_vision=model.has_vision,
        fence=Verbatim("`" * max(3, 1 + _longest_ticks(config_text))),
        step=model.step,
        system_messages=_system_messages(config["prompts"]["system"], model.has_vision),
        suffix=Verbatim(repr(config["prompts"]["reasoning_suffix"])),
        judge_parts=_parts(judge, model.has_vision),
        says_right=Verbatim(repr(says_right)),
        reflect_parts=_parts(_reflection(model.templater), model.has_vision),
        evaluation=evaluation,
        benchmarks=model.benchmarks,
        evaluation_recipes=[recipe["name"] for recipe in model.evaluated_on],
        percent=_percent,
        consistency=None if consistency is None else f"{100 * consistency:.0f}",
        sampled={name: model.total(f"rollout/{name}") for name in ("completions", "tokens")},
        recycled={name: model.total(f"recycle/{key}") for name, key in _RECYCLED.items()},
        environments=model.environments,
        recipes=model.trained_on,
    )


class Verbatim(str):
    """A text that `save_card` does not escape."""

    __slots__ = ()


def save_card(kind: type[RepoCard], path: Path, data: CardData, template: str, **values: Any) -> None:
    """Write a card. All that its template shows is escaped, so that it is read as the words that it is and not as
    Markdown or HTML, but for what is `Verbatim`; `code(…)` quotes a text as code."""
    text = (resources.files("spark_vl.model_cards") / template).read_text()
    page = jinja2.Environment(finalize=_escaped).from_string(text)
    kind(page.render(card_data=Verbatim(data.to_yaml()), code=_code, **values)).save(path)


def _escaped(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Verbatim):
        return value
    return re.sub(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", _one_line(value))


def _code(text: str) -> Verbatim:
    """In Markdown; it may stand in a table."""
    text = _one_line(text).replace("|", "\\|")
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if "`" in text else ""
    return Verbatim(f"{ticks}{space}{text}{space}{ticks}")


def _one_line(text: str) -> str:
    """Without line breaks, and without characters that are not seen but change what is."""
    return "".join(character if character.isprintable() else " " for character in text)


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def write_eval_results(model: TrainedModel, folder: Path) -> None:
    """Write `.eval_results/NAME.yaml` for each dataset of the Hub that these weights were evaluated on: accuracy in
    percent, as leaderboards read it."""
    outside = {each.recipe["name"] for each in model.benchmarks}
    within = [each for each in _within_run(model) if each.recipe["name"] not in outside]
    for each in (*model.benchmarks, *within):
        recipe, result = each.recipe, each.result
        if recipe["dataset"] is None or each.figure in ("pointwise_greedy", "pairwise_greedy"):
            continue
        figure = "" if each.figure == "reasoning_greedy" else f"{each.figure}: "
        entry = EvalResultEntry(
            dataset_id=recipe["dataset"]["id"],
            task_id=recipe["dataset"]["config"] or "default",
            value=round(100 * result["value"], 2),
            dataset_revision=recipe["dataset"]["revision"],
            notes=f"{figure}{each.how}, {result['n']:.0f} problems of split {each.split}, "
            f"95 % interval {100 * result['low']:.1f} to {100 * result['high']:.1f}",
        )
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        below(folder, f"{recipe['name']}.yaml").write_text(text)


def _eval_results(model: TrainedModel) -> Iterator[EvalResult]:
    """For the metadata of the card (`model-index`)."""
    for each in (*model.benchmarks, *_within_run(model)):
        recipe = each.recipe
        yield EvalResult(
            task_type=_task(model),
            task_name=f"{'Visual question' if model.has_vision else 'Question'} answering with verifiable answers",
            dataset_type=recipe["dataset"]["id"] if recipe["dataset"] else recipe["name"],
            dataset_name=recipe["name"],
            dataset_split=each.split,
            metric_type="accuracy",
            metric_name=each.figure,
            metric_value=round(100 * each.result["value"], 2),
        )


def _within_run(model: TrainedModel) -> Iterator[Benchmark]:
    """The accuracies of each recipe that these weights were evaluated on in their run."""
    if model.evaluation is None:
        return
    [results] = [line["results"] for line in model.evaluations if line["step"] == model.step]
    for recipe in model.evaluated_on:
        for figure in ("reasoning_greedy", "pointwise_greedy", "pairwise_greedy"):
            key = figure if len(model.evaluated_on) == 1 else f"{recipe['name']}/{figure}"
            if key in results:
                split = recipe["splits"][model.config["evaluation"]["split"]]
                yield Benchmark(recipe, figure, split, results[key], "greedy")


def _task(model: TrainedModel) -> str:
    """What the Hub calls what it does."""
    return "image-text-to-text" if model.has_vision else "text-generation"


def _judge(templater: Templater) -> tuple[Template, str]:
    """The template that the card shows, and the label that calls an answer right."""
    templates = [t for t in templater.templates.values() if t.kind == "pointwise"]
    template = next((t for t in templates if t.options is None), templates[0])
    assert template.labels is not None, "a pointwise template has labels"
    return template, template.labels[0]


def _reflection(templater: Templater) -> Template:
    templates = [t for t in templater.templates.values() if t.kind == "reflection" and t.claim == "check"]
    return next((t for t in templates if t.shows == "answer"), templates[0])


def _parts(template: Template, has_vision: bool) -> Verbatim:
    """`template` as arguments in Python, with the variables `image` (if it sees), `question` and `answer`."""
    options = dict(zip(("{option_a}", "{option_b}"), template.options or (), strict=False))
    parts: list[list[str]] = [[]]
    for piece in re.split(r"(\{(?:question|answer|option_a|option_b)\})", template.text):
        match piece:
            case "{question}":
                parts += [["image"], ["question"]] if has_vision else [["question"]]
            case "{answer}":
                parts[-1].append("answer")
            case "":
                pass
            case _:
                parts[-1].append(repr(options.get(piece, piece)))
    return Verbatim(", ".join(" + ".join(part) for part in parts if part))


def _system_messages(system: str, has_vision: bool) -> Verbatim:
    """What stands before the user's turn in a list in Python."""
    if not system:
        return Verbatim()
    content = f"[{{'type': 'text', 'text': {system!r}}}]" if has_vision else repr(system)
    return Verbatim(f"[{{'role': 'system', 'content': {content}}}] + ")


def _percent(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return ""
    return f"{100 * value:.1f} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"
