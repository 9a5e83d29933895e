"""The model of a run, read for its card: every number in a card comes from here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from spark_vl.config import read_config
from spark_vl.hub.benchmarks import Benchmark
from spark_vl.hub.client import HubError, check_repo_name
from spark_vl.hub.release import ReleaseError
from spark_vl.prompts.templater import PROMPTS_FILE, Templater
from spark_vl.report import comparison
from spark_vl.run.jsonl import read_lines
from spark_vl.run.paths import BEST, CONFIG, ENVIRONMENT, LATEST, MODEL, RECIPES, TRAINING_FILE, pointed
from spark_vl.run.provenance import public_name
from spark_vl.run.reader import find_run, recipe_facts

_OF_A_MODEL = ("metrics.jsonl", ENVIRONMENT)
_FOLDERS = re.compile(r"(?<=['\"])[^'\"]*/")
"""What comes before the last part of a quoted path."""


@dataclass(frozen=True)
class TrainedModel:
    """The weights after one step of a run."""

    folder: Path
    """A plain Hugging Face checkpoint."""
    run: Path
    step: int
    base: str
    """What training started from: an id on the Hub, or the last part of a folder's path."""
    base_commit: str | None
    """The commit on the Hub; None if training started from a folder."""
    benchmarks: tuple[Benchmark, ...] = ()
    """Of an evaluation outside of the run."""

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The resolved configuration with which these weights were saved; it is stored beside them."""
        return read_config(self.folder.parent / CONFIG)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration without `publish`; of paths on the author's machine only the last part."""
        config = {name: part for name, part in self._config.items() if name != "publish"}
        config["output_dir"] = self.run.name
        config["model"] = config["model"] | {"path": self.base}
        for group in ("data", "evaluation"):
            config[group] = config[group] | {"recipes": [_public_recipe(name) for name in config[group]["recipes"]]}
        templates = [Path(name).name for name in config["prompts"]["templates"]]
        config["prompts"] = config["prompts"] | {"templates": templates}
        return _without_folders(config)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The metrics of each step up to this one."""
        return [line for line in read_lines(self.run / "metrics.jsonl") if line["step"] <= self.step]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations up to this step."""
        return [line for line in read_lines(self.run / "evaluations.jsonl") if line["step"] <= self.step]

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """The run's first evaluation beside that of this step; None if there was none at this step."""
        return comparison(self.run, self.step)

    @cached_property
    def environments(self) -> list[dict[str, Any]]:
        """What the run ran on after each start, and which settings had changed; only differences are kept."""
        kept: list[dict[str, Any]] = []
        for line in read_lines(self.run / ENVIRONMENT):
            line["changed"] = [_FOLDERS.sub("", change) for change in line["changed"]]
            if line["step"] < self.step and (not kept or line | {"step": 0} != kept[-1] | {"step": 0}):
                kept.append(line)
        return kept

    @cached_property
    def trained_on(self) -> list[dict[str, Any]]:
        """Facts about the recipes of `data.recipes` (see `provenance.write_recipes`)."""
        return facts_of(self.run, self._config["data"]["recipes"])

    @cached_property
    def evaluated_on(self) -> list[dict[str, Any]]:
        """Facts about the recipes of `evaluation.recipes`."""
        return facts_of(self.run, self._config["evaluation"]["recipes"])

    @cached_property
    def has_vision(self) -> bool:
        """Whether it has a vision tower."""
        return "vision_config" in json.loads((self.folder / "config.json").read_text())

    @cached_property
    def templater(self) -> Templater:
        """The prompt wording that it was trained with."""
        return Templater.read(self.folder / PROMPTS_FILE)

    def total(self, *names: str) -> int:
        """The sum over all steps of metrics that are counts. A run without recycling has no `recycle/` metrics."""
        return round(sum(line.get(name, 0) for line in self.metrics for name in names))


def find_model(checkpoint: Path) -> TrainedModel:
    """The model at `checkpoint`: a run's folder, its `model/`, one of its checkpoints, or its `checkpoints/best`.

    Raises:
        ReleaseError: there is no model, or it does not belong to a run.
    """
    inside = checkpoint.resolve()
    if checkpoint.name in (LATEST, BEST) and checkpoint.is_file():
        inside = checkpoint.parent.resolve()
        try:
            checkpoint = pointed(checkpoint.parent, checkpoint.name) or checkpoint
        except ValueError as error:
            raise ReleaseError(str(error)) from error
    folder = checkpoint if (checkpoint / TRAINING_FILE).is_file() else checkpoint / MODEL
    if not (folder / TRAINING_FILE).is_file():
        raise ReleaseError(
            f"{checkpoint}: holds no trained model; allowed: the folder of a finished run, its model/, one of its "
            "checkpoints/step-*/, or its checkpoints/best"
        )
    if not folder.resolve().is_relative_to(inside):
        raise ReleaseError(f"{folder}: is a symbolic link that leads out of {inside}")
    run = run_of(folder)
    _check_regular([folder / TRAINING_FILE, folder / PROMPTS_FILE, folder / "config.json", folder.parent / CONFIG])
    facts = _training_facts(folder / TRAINING_FILE)
    if missing := [name for name in _OF_A_MODEL if not (run / name).is_file()]:
        raise ReleaseError(f"{run}: {' and '.join(missing)}: is missing, and the card is written from nothing else")
    return TrainedModel(folder, run, facts["step"], facts["base"], facts["base_commit"])


def run_of(path: Path) -> Path:
    """The folder of the run that `path` is in.

    Raises:
        ReleaseError: it is not in one, so there is nothing to write a card from; or a file that is quoted is a link.
    """
    try:
        run = find_run(path)
    except ValueError as error:
        raise ReleaseError(f"{error}, which its card needs") from error
    _check_regular([run / name for name in (CONFIG, RECIPES, *_OF_A_MODEL, "evaluations.jsonl")])
    return run


def facts_of(run: Path, recipes: Sequence[str]) -> list[dict[str, Any]]:
    """See `reader.recipe_facts`.

    Raises:
        ReleaseError: see there.
    """
    try:
        return recipe_facts(run, recipes)
    except ValueError as error:
        raise ReleaseError(str(error)) from error


@contextmanager
def read_from(run: Path) -> Iterator[None]:
    """Say in words what is wrong with the files of a run, which may be somebody else's and hold anything.

    Raises:
        ReleaseError: they are not as a run writes them.
    """
    try:
        yield
    except (ReleaseError, HubError):
        raise
    except Exception as error:
        raise ReleaseError(f"{run}: its files are not as a run writes them: {type(error).__name__}: {error}") from error


def _check_regular(files: Iterable[Path]) -> None:
    """What is quoted in a card is looked for secrets, but other private words would pass."""
    for file in files:
        if file.is_symlink() or (file.exists() and not file.is_file()):  # a pipe would be waited for
            what = "a symbolic link" if file.is_symlink() else "no file"
            raise ReleaseError(f"{file}: is {what}; a card quotes only regular files")


def _training_facts(file: Path) -> dict[str, Any]:
    facts = json.loads(file.read_text())
    match facts:
        case {"step": int(), "base": str(base), "base_commit": None} if base:
            return facts
        case {"step": int(), "base": str(base), "base_commit": str(commit)} if re.fullmatch(r"[0-9a-f]{40}", commit):
            check_repo_name(base, f"{file}: base")
            return facts
    raise ReleaseError(
        f"{file}: found {facts!r:.200}; allowed: step (an integer), base (a text) and base_commit (40 hexadecimal "
        "digits or null)"
    )


def _public_recipe(written: str) -> str:
    """The name of a recipe and its parameters, without folders of the author's machine."""
    name, mark, query = written.partition("?")
    parameters = {key: _public(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    return f"{Path(name).name}{mark}{urlencode(parameters, safe='/')}"


def _public(value: str) -> str:
    """As `public_name`, but also for a folder that no longer exists, or was on another machine."""
    return public_name(value) if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", value) else Path(value).name


def _without_folders(value: Any) -> Any:
    match value:
        case dict():
            return {name: _without_folders(item) for name, item in value.items()}
        case list():
            return [_without_folders(item) for item in value]
        case str() if value.startswith(("/", "~")):
            return public_name(str(Path(value).expanduser()))
        case _:
            return value
