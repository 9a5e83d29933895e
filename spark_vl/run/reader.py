"""Reads what lies in a run's folder: whose run it is, its recipes, and the groups that it has stored."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spark_vl.data.judgments import completions_column
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
    """What `provenance.write_recipes` noted about recipes, by their names in the configuration."""
    facts = json.loads((run / RECIPES).read_text())
    return [facts[name] for name in names]


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
