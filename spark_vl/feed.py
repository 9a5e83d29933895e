"""The prompts of each step: problems drawn from the recipes, and what was recycled from earlier rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from accelerate import Accelerator

from spark_vl.config import DataConfig, RecycleConfig
from spark_vl.data.sampler import PromptSampler
from spark_vl.distributed.gather import each_process
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.policy.batch import Scored
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Kind, PromptRecord
from spark_vl.recycle import recycle
from spark_vl.run.codec import record_from_json, record_to_json
from spark_vl.run.quarantine import Quarantine, TooManyBadRowsError

Phase = Literal["problems", "recycled", "both"]
"""What is sampled together and trained on together: new problems, recycled prompts that wait, or both."""

PHASES: dict[str, tuple[Phase, ...]] = {
    "none": ("problems",),
    "merged": ("both",),
    "sequential": ("problems", "recycled"),
}
"""`recycle.schedule` → the phases of a step, in order."""


class PromptFeed:
    """Draws problems, recycles rollouts, deals out what waits, and remembers where it is.

    Args:
        sampler: draws problems; all processes stand at the same place in it.
        processor: turns records into model inputs.
        templater: words recycled prompts.
        quarantine: takes rows and prompts that cannot be used.
        accelerator: knows this process and the others.
        data, config: `prompts_per_step`; the schedule, caps and shares of recycling.
        seed: of recycling's draws.
    """

    def __init__(
        self,
        sampler: PromptSampler,
        processor: Processor,
        templater: Templater,
        quarantine: Quarantine,
        accelerator: Accelerator,
        data: DataConfig,
        config: RecycleConfig,
        *,
        seed: int,
    ) -> None:
        self.sampler = sampler
        self.processor = processor
        self.templater = templater
        self.quarantine = quarantine
        self.accelerator = accelerator
        self.phases = PHASES[config.schedule]
        self._share = data.prompts_per_step
        self._config = config
        self._seed = seed
        self._waiting: list[PromptRecord] = []
        """Recycled prompts for the next phase that takes them."""
        self._surplus: list[PromptRecord] = []
        """More of them than the caps allow: dynamic sampling refills from here."""
        self._start = self._here()

    # ── out: what is sampled next ──

    def next(self, phase: Phase) -> list[ProcessedPrompt]:
        """The prompts of this process for `phase`, maybe none. Collective.

        Raises:
            TooManyBadRowsError: more rows cannot be used than the run allows.
        """
        prompts: list[ProcessedPrompt] = []
        if phase == self.phases[0]:
            self.processor.forget_images()  # of the last step
            self._start = self._here()
        if phase != "recycled":
            prompts += self._draw(self._mine(self._share))
        if phase != "problems":
            prompts += self._process(self._waiting)
            self._waiting = []
        return prompts

    def more(self, kind: Kind, n: int) -> list[ProcessedPrompt]:
        """Up to `n` more prompts of `kind`, to replace groups without variance: problems from the recipes, others from
        recycling's surplus. Collective.
        """
        if kind == "problem":
            return self._draw(n)
        chosen = [record for record in self._surplus if record.kind == kind][:n]
        self._surplus = [record for record in self._surplus if record not in chosen]
        return self._process(chosen)

    def rewind(self) -> None:
        """Go back to the start of this step, which is abandoned: its prompts will be dealt out again."""
        sampler, quarantine, self._waiting, self._surplus = self._start
        self.sampler.load_state_dict(sampler)
        self.quarantine.load_state_dict(quarantine)

    # ── in: what was sampled ──

    def recycle(self, scored: Sequence[Scored], step: int) -> dict[str, int]:
        """Turn all that was sampled in `step` into the prompts that wait for the next phase.

        A problem whose verifier failed on every completion is quarantined: the fault is in its row.

        Returns:
            Counts for the metrics (`Recycled.counts`); none where the schedule recycles nothing.

        Raises:
            TooManyBadRowsError: see `next`.
        """
        groups = [group for _, group in scored]
        for group in groups:
            if group.record.kind == "problem" and all(verdict.status == "error" for verdict in group.verdicts):
                reason = f"the {group.record.verifier} verifier fails on every completion: {group.verdicts[0].detail}"
                self.quarantine.add(BadRecordError(group.record.id, reason))
        if self._config.schedule == "none":
            return {}
        config = replace(
            self._config,
            max_judge=self._mine(self._config.max_judge),
            max_reflection=self._mine(self._config.max_reflection),
        )
        recycled = recycle(groups, self.templater, config, step=step, seed=self._seed)
        self._waiting = [*self._waiting, *recycled.judge, *recycled.reflection]
        self._surplus = [*recycled.judge_surplus, *recycled.reflection_surplus]
        return recycled.counts

    # ── state ──

    @property
    def epoch(self) -> float:
        """Epochs drawn so far by all processes together."""
        return self.sampler.epoch

    def counts(self) -> dict[str, int]:
        """For the metrics: rows and prompts of this process that could not be used, since the run began."""
        return {"quarantined": self.quarantine.rows_bad, "quarantined_prompts": self.quarantine.prompts_bad}

    def state_dict(self) -> dict[str, Any]:
        """Where this process is, as JSON values."""
        return {
            "sampler": self.sampler.state_dict(),
            "quarantine": self.quarantine.state_dict(),
            "waiting": [record_to_json(record) for record in self._waiting],
            "surplus": [record_to_json(record) for record in self._surplus],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made.

        Raises:
            ValueError: the sampler's state is of other data (`PromptSampler.load_state_dict`).
        """
        self.sampler.load_state_dict(state["sampler"])
        self.quarantine.load_state_dict(state["quarantine"])
        self._waiting = [record_from_json(record) for record in state["waiting"]]
        self._surplus = [record_from_json(record) for record in state["surplus"]]

    @staticmethod
    def deal_out(states: Sequence[Mapping[str, Any]], rank: int, processes: int) -> dict[str, Any]:
        """The state of process `rank` of `processes`, from those of another number of processes: what waits is dealt
        out anew, and rank 0 takes over the counts of the quarantine."""
        dealt = {
            name: [record for state in states for record in state[name]][rank::processes]
            for name in ("waiting", "surplus")
        }
        counts = Quarantine.merge([state["quarantine"] for state in states] if rank == 0 else [])
        return {"sampler": states[0]["sampler"], "quarantine": counts, **dealt}

    # ── parts ──

    def _here(self) -> tuple[dict[str, Any], dict[str, int], list[PromptRecord], list[PromptRecord]]:
        return self.sampler.state_dict(), self.quarantine.state_dict(), self._waiting, self._surplus

    def _mine(self, total: int) -> int:
        """This process's share of `total` prompts."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return total // processes + (rank < total % processes)

    def _draw(self, n: int) -> list[ProcessedPrompt]:
        """The next `n` problems that can be used; the others are quarantined. Collective: `n` may differ."""
        prompts: list[ProcessedPrompt] = []
        bad_in_a_row = 0
        while any(wanted := each_process(self.accelerator, n - len(prompts))):
            for row in self.sampler.draw(wanted, self.accelerator.process_index):
                self.quarantine.seen(1)
                try:
                    prompts.append(self.processor.process(self.sampler[row]))
                    bad_in_a_row = 0
                except BadRecordError as error:
                    self.quarantine.add(error)
                    bad_in_a_row += 1
                    if bad_in_a_row > len(self.sampler):  # any share of bad rows may be allowed
                        raise TooManyBadRowsError(f"none of {bad_in_a_row} rows can be used: {error}") from error
        return prompts

    def _process(self, records: Sequence[PromptRecord]) -> list[ProcessedPrompt]:
        """Recycled records as inputs. One that quotes more than a prompt may hold is quarantined."""
        prompts = []
        for record in records:
            try:
                prompts.append(self.processor.process(record))
            except BadRecordError as error:
                self.quarantine.add_prompt(error)
        return prompts
