"""What is told of a run while it goes on: of verified groups, of metrics, of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spark_vl.records import BadRecordError, RolloutGroup
from spark_vl.run.quarantine import Quarantine
from spark_vl.run.shards import ShardWriter


class Sink:
    """Takes what a run produces, on every process; each method does nothing unless a subclass overrides it."""

    def on_groups(self, step: int, scored: Sequence[tuple[Any, RolloutGroup]]) -> None:
        """`step` sampled and verified these pairs of a processed prompt and its group, and has learned from them."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is finished; `metrics` are over all processes."""

    def on_checkpoint(self, step: int, checkpoint: Path) -> None:
        """`checkpoint` has been written, and a run will resume from it once all sinks on all processes have returned:
        what they keep of the steps so far must be on the disk by then."""


class JudgmentSink(Sink):
    """Keeps all rollouts and judgments as the shards of a dataset.

    Args:
        shards: writes them.
        quarantine: takes groups whose image, which could be read before, is gone or has changed.
    """

    def __init__(self, shards: ShardWriter, quarantine: Quarantine) -> None:
        self.shards, self.quarantine = shards, quarantine

    def on_groups(self, step: int, scored: Sequence[tuple[Any, RolloutGroup]]) -> None:
        """See `Sink.on_groups`."""
        for _, group in scored:
            try:
                self.shards.add(step, group)
            except BadRecordError as error:
                self.quarantine.add_prompt(error)

    def on_checkpoint(self, step: int, checkpoint: Path) -> None:
        """Write the rows of all steps so far, which a run that resumes from `checkpoint` does not sample again."""
        self.shards.flush()
