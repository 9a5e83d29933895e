"""Reads what lies in a run's folder: whose run it is, its recipes, and the groups that it has stored."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spark_vl.data.judgments import completions_column
from spark_vl.data.recipes import RECIPE_NAME
from spark_vl.data.sources import Row
from spark_vl.run.paths import CONFIG, JUDGMENTS, RECIPES
from spark_vl.run.shards import Shard, find_shards, read_shard

_OF_A_RUN = (CONFIG, RECIPES)
_OF_A_VERDICT = ("reward", "parsed", "status", "finish_reason")


def find_run(path: Path) -> Path:
    """The folder of the run that `path` is in.

    Raises:
        ValueError: it is not in one.
    """
    path = path.resolve()
    for folder in (path, *path.parents):
        if all((folder / name).is_file() for name in _OF_A_RUN):
            return folder
    raise ValueError(f"{path}: is in no run's folder (one that has {' and '.join(_OF_A_RUN)})")


def recipe_facts(run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What `provenance.write_recipes` noted about recipes, by their names in the configuration. The run may be somebody
    else's: names become parts of paths and addresses, so they are checked here.

    Raises:
        ValueError: a recipe or one of its facts is missing or not of the form that is written; names file and field.
    """
    file = run / RECIPES
    try:
        facts = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file}: found {facts!r:.80}; allowed: an object of recipes")
    for name in names:
        _check_facts(f"{file}: {name!r:.200}", facts.get(name))
    return [facts[name] for name in names]


def _check_facts(where: str, facts: Any) -> None:
    def check(field: str, found: Any, pattern: str, allowed: str) -> None:
        if not isinstance(found, str) or not re.fullmatch(pattern, found, re.ASCII):
            raise ValueError(f"{where}: {field}: found {found!r:.80}; allowed: {allowed}")

    if not isinstance(facts, dict):
        raise ValueError(f"{where}: found {facts!r:.80}; allowed: an object of facts")
    check("name", facts.get("name"), RECIPE_NAME, "letters, digits, '.', '_' and '-'")
    check("license", facts.get("license"), r"(?s).+", "text that is not empty")
    splits = facts.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(split, str) for split in splits.values()):
        raise ValueError(f"{where}: splits: found {splits!r:.80}; allowed: an object of texts")
    match facts.get("dataset"):
        case None:
            pass
        case {"id": id, "config": config, "revision": revision}:
            check("dataset.id", id, r"[\w-][\w.-]*(/[\w-][\w.-]*)?", "OWNER/NAME of a dataset of the Hub")
            for field, text in (("config", config), ("revision", revision)):
                if text is not None:
                    check(f"dataset.{field}", text, r"(?s).+", "text or null")
        case other:
            raise ValueError(f"{where}: dataset: found {other!r:.80}; allowed: null, or id, config and revision")


def find_stored(path: Path) -> list[Shard]:
    """The shards of a run.

    Args:
        path: folder of the run, its `judgments/`, or the `rollouts/` in it.
    """
    folders = [path / JUDGMENTS, path, *([path.parent] if path.name == "rollouts" else ())]
    return next((shards for folder in folders if (shards := find_shards(folder))), [])


def rows_of_step(shards: Sequence[Shard], step: int, *, images: bool) -> Iterator[tuple[Shard, Row]]:
    """The stored groups that were sampled in `step`, with their shards, a few at a time in memory.

    Args:
        images: whether to read the column `images`.

    Raises:
        ShardError: see `read_shard`.
    """
    for shard in shards:
        if shard.first_step <= step <= shard.last_step:
            columns = ["id", "parent_id", "step", "recipe", "messages", "label", "verifier", *_OF_A_VERDICT]
            columns += [completions_column(shard.config), *(["images"] if images else [])]
            columns += [] if shard.config == "rollouts" else ["template"]
            yield from ((shard, row) for row in read_shard(shard.path, columns) if row["step"] == step)


def recycled_in_step(shards: Sequence[Shard], step: int) -> dict[str, list[tuple[Shard, Row]]]:
    """Id of a record → the stored prompts that were recycled from its group of `step`, whenever those were sampled.

    Raises:
        ShardError: see `read_shard`.
    """
    found: dict[str, list[tuple[Shard, Row]]] = defaultdict(list)
    columns = ["id", "parent_id", "step", "template", "label", *_OF_A_VERDICT]
    for shard in shards:
        if shard.config != "rollouts" and shard.last_step >= step:
            for row in read_shard(shard.path, columns):
                if row["id"].rpartition("#")[0] == f"{row['parent_id']}@{step}":
                    found[row["parent_id"]].append((shard, row))
    return found
