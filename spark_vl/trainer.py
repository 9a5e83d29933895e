"""The loop: sample → verify → recycle → advantages → update.

What differs from the paper's released code, and why:
- `merged` (the default) samples the prompts recycled in the last step together with this step's problems: one
  generation phase and one update a step instead of two. All rollouts are still sampled from the weights that they
  update.
- The prompts that wait for the next step are in the checkpoint, so nothing is lost at the end of an epoch or on resume.
- All randomness comes from (seed, step, process): a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import set_seed

from spark_vl.checkpoint import (
    CheckpointError,
    claim_folder,
    copy_model,
    find_checkpoint,
    is_latest,
    load_checkpoint,
    point,
    save_checkpoint,
)
from spark_vl.config import ConfigError, TrainConfig, blamed_on, config_differences, flat, save_config
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipes
from spark_vl.data.sampler import PromptSampler
from spark_vl.distributed.gather import any_process, each_process
from spark_vl.distributed.launch import describe_launch, start_accelerator
from spark_vl.distributed.stop import StopRequest
from spark_vl.distributed.watch import Watch
from spark_vl.families import ProcessedPrompt, load_processor
from spark_vl.log import Means, RunLog, Timer, add_balanced_accuracy, group_metrics
from spark_vl.policy.update import NonFiniteUpdateError, load_updater
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Kind, PromptRecord, RolloutGroup, record_from_json, record_to_json
from spark_vl.recycle import recycle
from spark_vl.rollout import Sampling, load_engine
from spark_vl.rollout.distributed import DistributedEngine, DistributedVerifiers
from spark_vl.run.paths import CHECKPOINTS, CONFIG, JUDGMENTS, LATEST, MODEL, name_of
from spark_vl.run.provenance import note_environment, public_name, write_recipes
from spark_vl.run.quarantine import Quarantine, TooManyBadRowsError
from spark_vl.run.shards import ShardWriter
from spark_vl.verifiers.groups import verify_groups
from spark_vl.verifiers.pool import VerifierPool

Evaluate = Callable[..., Mapping[str, Any]]
"""Held-out evaluation of the current policy: (engine, processor, verifiers, progress=RunLog.counting) → name → estimate
(`value`, `low`, `high`, `n`)."""


class _StepAbandoned(Exception):
    """The run is to stop, and the step has not come to its update yet."""


class Trainer:
    """Trains one model as policy and as generative reward.

    Args:
        config: of the run, checked (`check_train_config`).
        evaluate: run before, after and, with `config.evaluation.every`, during training.
        resume: `auto` (from the run's latest checkpoint, if it has one), `none`, or the path of a checkpoint.
        allow_config_change: whether to go on though the checkpoint was written under other settings.

    Raises:
        ConfigError: `output_dir` holds a run that is not to be resumed, cannot be written, or is in use.
        CheckpointError: there is no whole checkpoint at `resume`, or it does not go with this run.
        LaunchError: what runs is not what the launch asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        evaluate: Evaluate | None = None,
        resume: str = "none",
        *,
        allow_config_change: bool = False,
    ) -> None:
        self.config = config
        self.evaluate = evaluate
        self.publish: Callable[[Path], None] | None = None
        """Hears of each checkpoint, on the main process; returns at once."""
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / CHECKPOINTS
        checkpoint = find_checkpoint(self.checkpoints, resume)
        if resume == "none" and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"output_dir: {self.folder} already holds a run; name another folder, or go on with --resume auto"
            )
        # First: after the start under ZeRO-3 transformers shards every model that is made, also one without weights.
        self.processor = load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)
        self.accelerator = start_accelerator(config, self.folder)
        self._lock = claim_folder(self.folder) if self.accelerator.is_main_process else None
        set_seed(config.seed)
        self.templater = Templater.from_config(config.prompts)
        with blamed_on("data.recipes"):
            problems = [open_recipe(r, "train", self.templater) for r in load_recipes(config.data.recipes)]
        rank = self.accelerator.process_index
        self.sampler = PromptSampler(problems, seed=config.seed)
        self.steps = config.steps or math.ceil(config.epochs * len(self.sampler) / config.data.prompts_per_step)

        phases = 2 if config.recycle.schedule == "sequential" else 1
        self.updater = load_updater(
            config,
            self.accelerator,
            self.processor,
            updates=self.steps * phases * config.optimizer.updates_per_batch,
        )
        self.any_process = partial(any_process, self.accelerator)
        self.engine = load_engine(config.rollout, self.accelerator, self.updater.policy, self.processor)
        self.verifiers = VerifierPool(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb)
        name = f"quarantine.rank{rank}.jsonl" if rank else "quarantine.jsonl"
        self.quarantine = Quarantine(self.folder / name, config.data.max_quarantined_fraction)
        self.timer = Timer()
        self.stop = StopRequest()
        self.watch = Watch(self.accelerator, timeout_s=config.distributed.timeout_s)
        self.step = 0
        self.waiting: list[PromptRecord] = []  # recycled prompts for the next generation phase
        self.surplus: list[PromptRecord] = []  # more of them, which dynamic sampling refills from
        self.calls = 0  # of `_seed` within the step
        self.updated = False  # whether the step has touched the weights, and so has to be finished
        self.best = -math.inf  # of the figure that `checkpoint.keep_best` names
        self.resumed: int | None = None  # step of the checkpoint that the run goes on from

        if checkpoint:
            self._load(checkpoint, allow_config_change)
        self.shards: ShardWriter | None = None
        if config.logging.judgments:
            with blamed_on("output_dir"):
                self.shards = ShardWriter(
                    self.folder / JUDGMENTS,
                    rank=rank,
                    model=public_name(config.model.path),
                    model_revision=self.processor.commit,
                    resumed=self.resumed,
                )

    def train(self) -> bool:
        """Run to the last step. Leaves `model/`, a plain Hugging Face checkpoint, in the run's folder.

        Returns:
            Whether it got there: a signal stops it before, at a checkpoint.

        Raises:
            NonFiniteUpdateError: the loss or gradient was not finite several times in a row.
            CheckpointError: a checkpoint cannot be written.
        """
        if self.accelerator.is_main_process:
            written = self.folder / CONFIG  # by the start before this one
            changed: list[str] = []
            if self.resumed is not None and written.exists():
                changed = config_differences(yaml.safe_load(written.read_text()), self.config)
            save_config(self.config, written)
            write_recipes(self.folder, [*self.config.data.recipes, *self.config.evaluation.recipes])
            note_environment(self.folder, self.step, describe_launch(self.accelerator), changed)
        if self.config.logging.trackers:
            settings = {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in flat(asdict(self.config)).items()
            }
            self.accelerator.init_trackers("spark-vl", config=settings)
        with (
            self.verifiers,
            self.watch,
            self.stop,
            RunLog(
                self.accelerator,
                self.folder,
                steps=self.steps,
                resumed=self.resumed,
                heard=lambda phase: self.watch.at(self.step, phase),
            ) as self.log,
        ):
            try:
                finished = self._run()
            except (NonFiniteUpdateError, TooManyBadRowsError):
                raise
            except (RuntimeError, OSError) as error:  # maybe because another process is not there any more
                if self.accelerator.num_processes > 1:
                    error.add_note(f"rank {self.accelerator.process_index}: {self.watch.explain()}")
                raise
            finally:
                if self._lock:
                    self._lock.close()
        self.accelerator.end_training()
        return finished

    def _run(self) -> bool:
        if self.resumed is None:
            self._evaluate()
        while self.step < self.steps:
            if self._asked_to_stop():
                return self._stopped()
            before = self._state()
            try:
                metrics = self._train_step()
            except _StepAbandoned:
                self._set_state(before)
                return self._stopped()
            self.step += 1
            self.log.step(self.step, metrics)
            last = self.step == self.steps
            # Evaluated first: a run that is resumed from this checkpoint has the figures of its step.
            best = (last or self._due(self.config.evaluation.every)) and self._evaluate()
            if best or last or self._due(self.config.checkpoint.every):
                self._save(best=best)
        if self.accelerator.is_main_process:
            copy_model(self.checkpoints / name_of(self.step), self.folder / MODEL)
        self.accelerator.wait_for_everyone()  # whoever left earlier would be taken for dead
        return True

    def _asked_to_stop(self) -> bool:
        return self.any_process(self.stop.signal is not None)

    def _stopped(self) -> bool:
        """Save where the run is, unless that is done, and say how to go on."""
        if not is_latest(self.checkpoints, self.step):
            self._save(best=False)
        self.log.console.print(
            f"stopped after step {self.step} of {self.steps}; go on with the same command and --resume auto",
            soft_wrap=True,
        )
        return False

    # ── one step ──

    def _train_step(self) -> dict[str, float]:
        """Sample, verify, recycle and update once, by the schedule. Returns the step's metrics."""
        means = Means()
        self.calls = 0
        self.updated = False
        with self.timer("step"):
            problems = self._draw(self._share(self.config.data.prompts_per_step))
            match self.config.recycle.schedule:
                case "none":
                    self._learn_from(problems, means)
                case "merged":
                    sampled = self._learn_from(problems + self._process(self.waiting), means)
                    self.waiting = self._recycle(sampled, means)
                case "sequential":
                    sampled = self._learn_from(problems, means)
                    # What was waiting are judgments of the last step's reflections.
                    self.waiting = self.waiting + self._recycle(sampled, means)
                    sampled = self._learn_from(self._process(self.waiting), means)
                    self.waiting = self._recycle(sampled, means)
        self.processor.forget_images()
        means.count("data/quarantined", self.quarantine.rows_bad)
        means.count("data/quarantined_prompts", self.quarantine.prompts_bad)
        metrics = means.over_processes().result()
        add_balanced_accuracy(metrics)
        return metrics | {"data/epoch": self.sampler.epoch} | self.timer.reset()

    def _learn_from(self, prompts: Sequence[ProcessedPrompt], means: Means) -> list[RolloutGroup]:
        """Sample, verify and update on `prompts`, of which only some processes may have any. Returns all groups that
        were sampled.

        Raises:
            _StepAbandoned: the run is to stop.
        """
        if not self.any_process(bool(prompts)):
            return []
        by_id = {prompt.record.id: prompt for prompt in prompts}
        chosen = self._sample(prompts)
        sampled = list(chosen)
        for kind, rounds in self.config.objective.refill_rounds.items():
            for _ in range(rounds):
                dead = [i for i, group in enumerate(chosen) if group.record.kind == kind and group.zero_variance]
                fresh = self._fresh(kind, len(dead))
                if not self.any_process(bool(fresh)):
                    break
                by_id |= {prompt.record.id: prompt for prompt in fresh}
                groups = self._sample(fresh)
                sampled += groups
                for i, group in zip(dead, (g for g in groups if not g.zero_variance), strict=False):
                    chosen[i] = group
        means.update(group_metrics(sampled))
        if self._asked_to_stop() and not self.updated:
            raise _StepAbandoned
        with self.timer("update"):
            self._update(chosen, by_id, means)
            self.engine.sync_weights(self.accelerator.unwrap_model(self.updater.policy))
        if self.config.logging.rollouts_every and self.step % self.config.logging.rollouts_every == 0:
            self.log.rollouts(self.step + 1, sampled)
        if self.shards:
            self._write_down(sampled)
        return sampled

    def _write_down(self, groups: Sequence[RolloutGroup]) -> None:
        """Add `groups` to the judgments that can be published."""
        with self.timer("write"):
            self.log.phase("writing judgments")
            for group in groups:
                try:
                    self.shards.add(self.step + 1, group)
                except BadRecordError as error:  # its image, which could be read before, is gone or has changed
                    self.quarantine.add_prompt(error)

    def _update(self, groups: Sequence[RolloutGroup], prompts: Mapping[str, ProcessedPrompt], means: Means) -> None:
        self.updated = True
        try:
            self.updater.update(groups, prompts, seed=self._seed("update"), add=means.add, counting=self.log.counting)
        except NonFiniteUpdateError as error:
            file = self.log.dump(self.step + 1, error.groups)
            raise NonFiniteUpdateError(
                f"{error}; step {self.step + 1} is in {file}, the last good weights in {self.checkpoints}", error.groups
            ) from error

    def _sample(self, prompts: Sequence[ProcessedPrompt]) -> list[RolloutGroup]:
        """A verified group of completions for each prompt."""
        settings = self.config.rollout
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=zlib.crc32(self._seed("sample").encode()),
        )
        with self.timer("generate"), self.accelerator.autocast():
            progress = self.log.counting("sampling", len(prompts) * settings.n)
            groups = self.engine.generate(prompts, settings.n, sampling, progress)
        with self.timer("verify"):
            self.log.phase("verifying")
            groups = verify_groups(self.verifiers, groups, settings.max_new_tokens)
        for group in groups:
            if group.record.kind == "problem" and all(verdict.status == "error" for verdict in group.verdicts):
                reason = f"the {group.record.verifier} verifier fails on every completion: {group.verdicts[0].detail}"
                self.quarantine.add(BadRecordError(group.record.id, reason))
        return groups

    def _recycle(self, groups: Sequence[RolloutGroup], means: Means) -> list[PromptRecord]:
        """The prompts that `groups` are recycled into; what is over the caps is kept to refill from."""
        config = self.config.recycle
        config = replace(
            config, max_judge=self._share(config.max_judge), max_reflection=self._share(config.max_reflection)
        )
        recycled = recycle(groups, self.templater, config, step=self.step + 1, seed=self.config.seed)
        self.surplus = recycled.judge_surplus + recycled.reflection_surplus
        for name, count in recycled.counts.items():
            means.count(f"recycle/{name}", count)
        return recycled.judge + recycled.reflection

    def _draw(self, n: int) -> list[ProcessedPrompt]:
        """The next `n` problems that can be used; the others are quarantined. Collective: `n` may differ."""
        prompts: list[ProcessedPrompt] = []
        bad_in_a_row = 0
        with self.timer("load"):
            self.log.phase("loading")
            while any(wanted := each_process(self.accelerator, n - len(prompts))):
                for row in self.sampler.draw(wanted, self.accelerator.process_index):
                    self.quarantine.seen(1)
                    try:
                        prompts.append(self.processor.process(self.sampler[row]))
                        bad_in_a_row = 0
                    except BadRecordError as error:
                        self.quarantine.add(error)
                        bad_in_a_row += 1
                        if bad_in_a_row > len(self.sampler):  # any share may be allowed
                            raise TooManyBadRowsError(f"none of {bad_in_a_row} rows can be used: {error}") from error
        return prompts

    def _process(self, records: Sequence[PromptRecord]) -> list[ProcessedPrompt]:
        """Recycled records as inputs. One that quotes more than a prompt may hold is quarantined."""
        prompts = []
        with self.timer("load"):
            for record in records:
                try:
                    prompts.append(self.processor.process(record))
                except BadRecordError as error:
                    self.quarantine.add_prompt(error)
        return prompts

    def _fresh(self, kind: Kind, n: int) -> list[ProcessedPrompt]:
        """Up to `n` more prompts of `kind`: problems from the sampler, others from what recycling had left over.
        Collective."""
        if kind == "problem":
            return self._draw(n)
        chosen = [record for record in self.surplus if record.kind == kind][:n]
        self.surplus = [record for record in self.surplus if record not in chosen]
        return self._process(chosen)

    def _share(self, total: int) -> int:
        """This process's part of `total` prompts."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return total // processes + (rank < total % processes)

    def _seed(self, purpose: str) -> str:
        """Different for each step, process, purpose and call within a step; the same when a step is run again."""
        self.calls += 1
        return f"{self.config.seed}/{self.step}/{self.accelerator.process_index}/{purpose}/{self.calls}"

    # ── before, between and after ──

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate(self) -> bool:
        """Evaluate, and say whether that was the best so far by `checkpoint.keep_best`.

        Raises:
            ConfigError: there is no such figure.
        """
        if self.evaluate is None:
            return False
        with self.accelerator.autocast():
            results = self.evaluate(
                DistributedEngine(self.engine, self.accelerator),
                self.processor,
                DistributedVerifiers(self.verifiers, self.accelerator),
                progress=self.log.counting,
            )
        self.processor.forget_images()
        self.log.evaluation(self.step, results)
        name = self.config.checkpoint.keep_best
        if name is None:
            return False
        if name not in results:
            raise ConfigError(f"checkpoint.keep_best: there is no figure {name!r}; there are {', '.join(results)}")
        value, before = results[name]["value"], self.best
        self.best = max(value, before)
        return self.step > 0 and value > before

    def _state(self) -> dict[str, Any]:
        """What a step changes, besides the weights and what goes with them."""
        return {
            "sampler": self.sampler.state_dict(),
            "rows": [self.quarantine.rows_seen, self.quarantine.rows_bad, self.quarantine.prompts_bad],
            "waiting": list(self.waiting),
            "surplus": list(self.surplus),
            "skipped_in_a_row": self.updater.skipped_in_a_row,
            "best": self.best,
        }

    def _set_state(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.quarantine.rows_seen, self.quarantine.rows_bad, self.quarantine.prompts_bad = state["rows"]
        self.waiting, self.surplus = list(state["waiting"]), list(state["surplus"])
        self.updater.skipped_in_a_row = state["skipped_in_a_row"]
        self.best = state["best"]

    def _save(self, *, best: bool) -> None:
        self.log.phase("saving")
        if self.shards:  # first: a run that goes on from this checkpoint has the rows of its steps
            try:
                self.shards.flush()
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder / JUDGMENTS}: the judgments could not be written: {error}. Earlier ones, and the "
                    "last checkpoint, are untouched"
                ) from error
        state = self._state()
        for name in ("waiting", "surplus"):
            state[name] = [record_to_json(record) for record in state[name]]
        save_checkpoint(
            self.accelerator,
            self.updater.policy,
            self.processor,
            self.templater,
            self.config,
            self.checkpoints,
            self.step,
            state,
            best=best,
        )
        if self.publish and self.accelerator.is_main_process:
            self.publish(self.checkpoints / name_of(self.step))

    def _load(self, checkpoint: Path, allow_config_change: bool) -> None:
        manifest, states = load_checkpoint(
            self.accelerator, checkpoint, self.config, allow_config_change=allow_config_change
        )
        self.updater.use_settings()
        self.step = self.resumed = manifest["step"]
        if self.accelerator.is_main_process and checkpoint.parent == self.checkpoints:
            point(self.checkpoints, LATEST, checkpoint)  # newer ones will be written anew
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        state = states[0]
        if manifest["processes"] != processes:  # what waits is dealt out anew
            for name in ("waiting", "surplus"):
                state[name] = [record for other in states for record in other[name]][rank::processes]
            rows = [sum(counts) for counts in zip(*(other["rows"] for other in states), strict=True)]
            state["rows"] = [0, 0, 0] if rank else rows
        for name in ("waiting", "surplus"):
            state[name] = [record_from_json(record) for record in state[name]]
        self._set_state(state)
