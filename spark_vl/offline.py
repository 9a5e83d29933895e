"""Recycles again the rollouts that a run has stored, without a model, under other settings or templates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import Any

from spark_vl.config import RecycleConfig
from spark_vl.data.judgments import features, group_of, row_of
from spark_vl.prompts.templater import Templater
from spark_vl.records import ImageRef, RolloutGroup
from spark_vl.recycle import recycle
from spark_vl.run.reader import find_stored
from spark_vl.run.shards import RowWriter, Shard, find_shards, read_shard

logger = logging.getLogger(__name__)


def recycle_rollouts(
    rollouts: Path,
    output: Path,
    *,
    templater: Templater,
    config: RecycleConfig,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, int]:
    """Recycle the rollouts of a run into `output`: shards of judgment and reflection prompts without completions.

    Each step is recycled separately, with the rollouts of all processes together. With `config.judge_reflections` the
    run's reflections are read too. Everything recycled from a problem goes to the split of the problem.

    Args:
        rollouts: folder of a run, its `judgments/`, or the `rollouts/` in it.
        output: folder in which `pointwise/`, `pairwise/` and `reflection/` are made.
        config: its caps are per step.
        progress: called with the number of rows that were read since the last call.

    Returns:
        The number of rows written, as `pointwise`, `pairwise` and `reflection`, and of rows read that cannot be used,
        as `unusable`.

    Raises:
        ValueError: there are no rollouts, a shard cannot be read, or `output` already holds shards.
    """
    if there := find_shards(output):
        raise ValueError(f"{output}: already holds shards, such as {there[0].path.relative_to(output)}; name another")
    configs = ("rollouts", "reflection") if config.judge_reflections else ("rollouts",)
    found_shards = find_stored(rollouts)
    if not any(shard.config == "rollouts" for shard in found_shards):
        raise ValueError(f"{rollouts}: holds no rollouts; a run's folder does, in judgments/rollouts")
    shards = [shard for shard in found_shards if shard.config in configs]
    streams = groupby(shards, key=lambda shard: (shard.config, shard.split, shard.rank))
    counts = dict.fromkeys(("pointwise", "pairwise", "reflection", "unusable"), 0)
    writer = RowWriter(output)
    rows = merge(*(_in_order(list(stream)) for _, stream in streams), key=lambda found: found[1]["step"])
    for step, found in groupby(rows, key=lambda found: found[1]["step"]):
        groups: list[RolloutGroup] = []
        parents: dict[str, tuple[str, dict[str, Any]]] = {}  # id → split and row
        for shard, row in found:
            progress(1)
            try:
                group = group_of(row, shard.config, neutralize=templater.neutralize)
            except ValueError as error:
                logger.warning("left out: %s: row %r: %s", shard.path, row["id"], error)
                counts["unusable"] += 1
                continue
            groups.append(group)
            parents.setdefault(group.record.id, (shard.split, row))
        recycled = recycle(groups, templater, config, step=step, seed=seed)
        for record in recycled.judge + recycled.reflection:
            split, parent = parents[record.parent_id]
            row = row_of(
                RolloutGroup(record, ()),
                step,
                model=parent["model"],
                model_revision=parent["model_revision"],
                image_bytes=_stored_bytes,
            )
            writer.add(record.kind, split, row)
            counts[record.kind] += 1
    writer.flush()
    return counts


def _stored_bytes(ref: ImageRef) -> bytes:
    """The bytes that were encoded when the rollouts were stored."""
    assert ref.data is not None, "a row holds its images as bytes"
    return ref.data


def _in_order(shards: list[Shard]) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """The rows that one process wrote for one configuration and split, with their shards."""
    last = 0
    for shard in shards:
        for row in read_shard(shard.path, list(features(shard.config))):
            if row["step"] < last:
                raise ValueError(f"{shard.path}: row {row['id']!r}: its step is {row['step']}, after {last}")
            last = row["step"]
            yield shard, row
