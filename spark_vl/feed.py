"""The prompts of each step: problems drawn from the recipes, and what was recycled from earlier rollouts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from spark_vl.config import DataConfig, RecycleConfig
from spark_vl.data.cells import count
from spark_vl.data.problems import FilteredRowError, data_changes
from spark_vl.data.sampler import PromptSampler
from spark_vl.distributed.gather import each_process
from spark_vl.distributed.spread import send
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.policy.batch import Scored
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef, Kind, PromptRecord, RecycledRecord
from spark_vl.recycle import DifficultyAuc, choose, deal, find_evidence, word
from spark_vl.run.codec import record_from_json, record_to_json
from spark_vl.run.quarantine import Quarantine, TooManyBadRowsError
from spark_vl.verifiers.base import public_name

Phase = Literal["problems", "recycled", "both"]
"""What is sampled together and trained on together: new problems, recycled prompts that wait, or both."""

PHASES: dict[str, tuple[Phase, ...]] = {
    "none": ("problems",),
    "merged": ("both",),
    "sequential": ("problems", "recycled"),
}
"""`recycle.schedule` → the phases of a step, in order."""


@dataclass
class _Waiting:
    """Recycled prompts that are taken together: one, or the two of a pair."""

    number: int
    """Counts what was recycled, over all processes: the lowest is the oldest."""
    records: list[PromptRecord]

    def to_json(self) -> dict[str, Any]:
        return {"number": self.number, "records": [record_to_json(record) for record in self.records]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], verifiers: Collection[str]) -> _Waiting:
        return cls(count(data, "number"), [record_from_json(record, verifiers) for record in data["records"]])


class PromptFeed:
    """Draws problems, recycles rollouts, deals out what waits, and remembers where it is.

    Args:
        sampler: draws problems; all processes stand at the same place in it.
        processor: turns records into model inputs.
        templater: words recycled prompts.
        quarantine: takes rows and prompts that cannot be used.
        accelerator: knows this process and the others.
        data, config: `prompts_per_step`; the schedule, caps and shares of recycling.
        refills: kinds of prompts of which `more` may be asked for more than the caps allow.
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
        refills: Iterable[str] = (),
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
        self._refills = set(refills)
        self._seed = seed
        self._waiting: list[_Waiting] = []
        """Recycled prompts of this process for the next phase that takes them."""
        self._surplus: list[_Waiting] = []
        """More of them than the caps allow: dynamic sampling refills from here."""
        self._recycled = 0
        """So many have been recycled by all processes; numbers what waits."""
        self._difficulty = DifficultyAuc()
        self._filtered = 0
        """So many rows of this process were left out when they were drawn; they are not bad (`Recipe.pixels`)."""
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
            prompts += self._process(self._take())
        return prompts

    def more(self, kind: Kind, n: int) -> list[ProcessedPrompt]:
        """Up to `n` more prompts of `kind`, to replace groups without variance: problems from the recipes, others from
        recycling's surplus, pairs as a whole. Collective.
        """
        if kind == "problem":
            return self._draw(n)
        chosen: list[_Waiting] = []
        left: list[_Waiting] = []
        for waiting in self._surplus:
            fits = waiting.records[0].kind == kind and len(waiting.records) <= n
            (chosen if fits else left).append(waiting)
            n -= len(waiting.records) if fits else 0
        self._surplus = left
        return self._process(chosen)

    def rewind(self) -> None:
        """Go back to the start of this step, which is abandoned: its prompts will be dealt out again."""
        sampler, quarantine, self._waiting, self._surplus, self._filtered = self._start
        self.sampler.load_state_dict(sampler)
        self.quarantine.load_state_dict(quarantine)

    # ── in: what was sampled ──

    def recycle(self, scored: Sequence[Scored], step: int) -> dict[str, int]:
        """Turn all that all processes sampled in `step` into the prompts that wait for the next phase. Collective.

        What is recycled is a decision about the whole step (`spark_vl.recycle`): processes tell each other what their
        groups prove, choose the same, write what quotes their own groups, and send it where it is dealt to. So texts
        and encoded images move, and decoded pixels never.

        A problem whose verifier failed on every completion is quarantined: the fault is in its row.

        Returns:
            Counts for the metrics (`Recycled.counts`), this process's part; none where the schedule recycles nothing.

        Raises:
            TooManyBadRowsError: see `next`.
        """
        groups = [group for _, group in scored]
        for group in groups:
            if group.record.kind == "problem" and all(verdict.status == "error" for verdict in group.verdicts):
                verifier, detail = public_name(group.record.verifier), group.verdicts[0].detail
                reason = f"the {verifier} verifier fails on every completion: {detail}"
                self.quarantine.add(BadRecordError(group.record.id, reason))
        if self._config.schedule == "none":
            return {}
        evidence, counts = find_evidence(groups, self._config, step=step, seed=self._seed)
        waiting = sum(len(each.records) for each in self._waiting)
        everyone = gather_object([([each.candidate for each in evidence], waiting)])
        choice = choose([candidates for candidates, _ in everyone], self._config, step=step, seed=self._seed)
        self._difficulty.add(step, choice.labels)

        chosen = choice.judge + choice.reflection
        units = chosen + [unit for unit in choice.surplus if unit.kind in self._refills]
        here = self.accelerator.process_index
        parcels = []
        for number, (unit, to) in enumerate(zip(units, deal(units, [loaded for _, loaded in everyone]), strict=True)):
            for part in unit.parts:
                if part.process == here:
                    record = word(part, unit, evidence, self.templater, self._config, step=step)
                    parcels.append((to, (number, record)))
        dealt: dict[int, list[PromptRecord]] = {}
        for number, record in sorted(send(self.accelerator, parcels), key=lambda numbered: numbered[0]):
            dealt.setdefault(number, []).append(record)
        arrived = [_Waiting(self._recycled + number, records) for number, records in dealt.items()]
        self._waiting = self._waiting + [w for w in arrived if w.number < self._recycled + len(chosen)]
        self._surplus = [w for w in arrived if w.number >= self._recycled + len(chosen)]
        self._recycled += len(units)
        return counts | (choice.counts if self.accelerator.is_main_process else {})

    def refuse(self, record: PromptRecord, error: BadRecordError) -> None:
        """A prompt of this process cannot be sampled: it is quarantined.

        Raises:
            TooManyBadRowsError: see `next`.
        """
        if isinstance(record, RecycledRecord):
            self.quarantine.add_prompt(error)
        else:
            self.quarantine.add(error)

    # ── state ──

    def counts(self) -> dict[str, int]:
        """For the metrics: rows and prompts of this process that could not be used, since the run began; and, where a
        recipe has `pixels`, the rows that these left out."""
        counts = {"quarantined": self.quarantine.rows_bad, "quarantined_prompts": self.quarantine.prompts_bad}
        return counts | ({"filtered": self._filtered} if self.sampler.filters else {})

    def first_fault(self) -> str:
        """The first row that could not be used on any process, and why; empty if all could. Collective."""
        return next((first for first in gather_object([self.quarantine.first]) if first), "")

    def metrics(self) -> dict[str, float]:
        """For the metrics, the same on all processes: epochs, and how well the pass rate of a group predicts the label
        of the pointwise prompts that quote it (`DifficultyAuc`)."""
        auc = self._difficulty.value
        return {"data/epoch": self.sampler.epoch} | ({} if auc is None else {"pointwise/difficulty_auc": auc})

    def state_dict(self) -> dict[str, Any]:
        """Where this process is, as JSON values."""
        return {
            "sampler": self.sampler.state_dict(),
            "data": self.sampler.fingerprints,
            "quarantine": self.quarantine.state_dict(),
            "waiting": [waiting.to_json() for waiting in self._waiting],
            "surplus": [waiting.to_json() for waiting in self._surplus],
            "recycled": self._recycled,
            "difficulty": self._difficulty.state_dict(),
            "filtered": self._filtered,
        }

    def changes_since(self, state: Mapping[str, Any]) -> list[str]:
        """How the data differ from those that `state` was made with, recipe by recipe; empty: they do not."""
        # A checkpoint of an earlier version has no fingerprints.
        return data_changes(state["data"], self.sampler.fingerprints) if "data" in state else []

    def load_state_dict(self, state: Mapping[str, Any], *, anew: bool = False) -> None:
        """Go on where `state_dict` was made.

        Args:
            anew: with other data, or data in another order: see `PromptSampler.load_state_dict`. Prompts that wait are
                left out if their recipe or its verifier is gone.

        Raises:
            ValueError: the sampler's state is of other data, or a prompt that waits names a verifier that none of its
                recipes does; and not `anew`.
        """
        self.sampler.load_state_dict(state["sampler"], anew=anew)
        self.quarantine.load_state_dict(state["quarantine"])
        verifiers, recipes = self.sampler.verifiers, self.sampler.recipes

        def restored(name: str) -> list[_Waiting]:
            return [
                _Waiting.from_json(waiting, verifiers)
                for waiting in state[name]
                if not anew
                or all(each["verifier"] in verifiers and each["recipe"] in recipes for each in waiting["records"])
            ]

        self._waiting, self._surplus = restored("waiting"), restored("surplus")
        self._recycled = count(state, "recycled")
        self._filtered = count(state, "filtered") if "filtered" in state else 0  # a checkpoint of an earlier version
        self._difficulty.load_state_dict(state["difficulty"])

    @staticmethod
    def deal_out(states: Sequence[Mapping[str, Any]], rank: int, processes: int) -> dict[str, Any]:
        """The state of process `rank` of `processes`, from those of another number of processes: what waits is dealt
        out anew, and rank 0 takes over the counts of the quarantine and of the filter."""
        dealt: dict[str, list[Any]] = {"waiting": [], "surplus": []}
        for name, mine in dealt.items():
            loads = [0] * processes
            for waiting in sorted((w for state in states for w in state[name]), key=lambda w: w["number"]):
                to = loads.index(min(loads))
                loads[to] += len(waiting["records"])
                if to == rank:
                    mine.append(waiting)
        counts = Quarantine.merge([state["quarantine"] for state in states] if rank == 0 else [])
        filtered = 0 if rank else sum(state.get("filtered", 0) for state in states)
        return {**states[0], "quarantine": counts, "filtered": filtered, **dealt}

    # ── parts ──

    def _here(self) -> tuple[dict[str, Any], dict[str, int], list[_Waiting], list[_Waiting], int]:
        return self.sampler.state_dict(), self.quarantine.state_dict(), self._waiting, self._surplus, self._filtered

    def _mine(self, total: int) -> int:
        """This process's share of `total` prompts."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return total // processes + (rank < total % processes)

    def _draw(self, n: int) -> list[ProcessedPrompt]:
        """The next `n` problems that can be used; the others are quarantined, or left out by the recipe. Collective:
        `n` may differ."""
        prompts: list[ProcessedPrompt] = []
        unused_in_a_row = 0
        most = max(self.sampler.rows, len(self.sampler))
        while any(wanted := each_process(self.accelerator, n - len(prompts))):
            for row in self.sampler.draw(wanted, self.accelerator.process_index):
                try:
                    prompt = self.processor.process(self.sampler[row])
                except BadRecordError as error:
                    if isinstance(error, FilteredRowError):
                        self._filtered += 1
                    else:
                        self.quarantine.seen(1)
                        self.quarantine.add(error)
                    unused_in_a_row += 1
                    if unused_in_a_row > most:  # any share of bad rows may be allowed
                        raise TooManyBadRowsError(f"none of {unused_in_a_row} rows can be used: {error}") from error
                else:
                    self.quarantine.seen(1)
                    prompts.append(prompt)
                    unused_in_a_row = 0
        return prompts

    def _take(self) -> list[_Waiting]:
        """What this process samples of the recycled prompts that wait: all, or what of the oldest `batch` of all
        processes is its own. Collective."""
        taken = {waiting.number for waiting in self._waiting}
        if (batch := self._config.batch) is not None:
            sizes = gather_object([(waiting.number, len(waiting.records)) for waiting in self._waiting])
            taken = set()
            if sum(size for _, size in sizes) >= batch:
                for number, size in sorted(sizes):
                    if size <= batch:  # where a pair does not fit, a single prompt behind it may
                        taken.add(number)
                        batch -= size
        mine = [waiting for waiting in self._waiting if waiting.number in taken]
        self._waiting = [waiting for waiting in self._waiting if waiting.number not in taken]
        return mine

    def _process(self, taken: Sequence[_Waiting]) -> list[ProcessedPrompt]:
        """Recycled records as inputs. One that quotes more than a prompt may hold is quarantined, and the other of its
        pair with it."""
        prompts = []
        for waiting in taken:
            processed = []
            for record in waiting.records:
                try:
                    self._check_images(record)
                    processed.append(self.processor.process(record))
                except BadRecordError as error:
                    self.quarantine.add_prompt(error)
            if len(processed) == len(waiting.records):
                prompts += processed
            else:
                for prompt in processed:
                    self.quarantine.add_prompt(BadRecordError(prompt.record.id, "the other of its pair cannot be used"))
        return prompts

    def _check_images(self, record: PromptRecord) -> None:
        """Refuse images outside the folders of the recipes: a record from a checkpoint names what it likes."""
        quoted = (part for part in record.question if isinstance(part, ImageRef))
        for ref in (*record.images, *quoted):
            if ref.data is None and ref.root not in self.sampler.roots:
                allowed = ", ".join(sorted(self.sampler.roots)) or "none"
                raise BadRecordError(record.id, f"image {ref}: is below {ref.root!r}; allowed: {allowed}")
