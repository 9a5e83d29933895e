"""The loop: sample → verify → recycle → advantages → update.

What differs from the paper's released code, and why:
- `merged` (the default) samples the prompts recycled in the last step together with this step's problems: one
generation phase and one
  update a step instead of two. All rollouts are still sampled from the weights that they update.
- The prompts that wait for the next step are in the checkpoint, so nothing is lost at the end of an epoch or on resume.
- All randomness comes from (seed, step, process): a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from spark_vl.checkpoint import export_model, find_checkpoint, load_checkpoint, save_checkpoint
from spark_vl.config import ConfigError, TrainConfig, blamed_on, save_config
from spark_vl.data.problems import open_recipe
from spark_vl.data.quarantine import Quarantine
from spark_vl.data.recipes import load_recipe
from spark_vl.data.sampler import PromptSampler
from spark_vl.metrics import Means, RunLog, Timer, add_balanced_accuracy, flat, group_metrics
from spark_vl.policy.update import load_updater
from spark_vl.processors import ProcessedPrompt, load_processor
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Kind, PromptRecord, RolloutGroup, record_from_json, record_to_json
from spark_vl.recycle import recycle
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.verifiers.groups import verify_groups
from spark_vl.verifiers.pool import VerifierPool

Evaluate = Callable[..., Mapping[str, Any]]
"""Held-out evaluation of the current policy: (engine, processor, verifiers, counting=RunLog.counting) → name → estimate
(`value`, `low`, `high`, `n`)."""


class Trainer:
    """Trains one model as policy and as generative reward.

    Args:
        config: of the run, checked (`check_train_config`).
        evaluate: run before, after and, with `config.evaluation.every`, during training.
        resume: `auto` (from the run's latest checkpoint, if it has one), `none`, or the path of a checkpoint.

    Raises:
        ConfigError: `output_dir` holds a run that is not to be resumed.
        CheckpointError: there is no whole checkpoint at `resume`.
    """

    def __init__(self, config: TrainConfig, evaluate: Evaluate | None = None, resume: str = "none") -> None:
        self.config = config
        self.evaluate = evaluate
        self.folder = Path(config.output_dir)
        checkpoint = find_checkpoint(self.folder / "checkpoints", resume)
        if resume == "none" and (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"output_dir: {self.folder} already holds a run; name another folder, or go on with --resume auto"
            )
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no",
            log_with=config.logging.trackers or None,
            project_dir=self.folder,
        )
        set_seed(config.seed)
        self.templater = Templater.from_config(config.prompts)
        with blamed_on("data.recipes"):
            problems = [open_recipe(load_recipe(name), "train", self.templater) for name in config.data.recipes]
        self.sampler = PromptSampler(
            problems,
            seed=config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        n_problems = sum(map(len, problems))
        self.steps = config.steps or math.ceil(config.epochs * n_problems / config.data.prompts_per_step)

        self.processor = load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)
        phases = 2 if config.recycle.schedule == "sequential" else 1
        self.updater = load_updater(
            config,
            self.accelerator,
            self.processor,
            updates=self.steps * phases * config.optimizer.updates_per_batch,
        )
        self.engine = TransformersEngine(
            self.accelerator.unwrap_model(self.updater.policy),
            self.processor,
            rows_at_once=config.rollout.rows_at_once,
        )
        self.verifiers = VerifierPool(config.verifier.workers, config.verifier.timeout_s)
        rank = self.accelerator.process_index
        name = f"quarantine.rank{rank}.jsonl" if rank else "quarantine.jsonl"
        self.quarantine = Quarantine(self.folder / name, config.data.max_quarantined_fraction)
        self.timer = Timer()
        self.step = 0
        self.waiting: list[PromptRecord] = []  # recycled prompts for the next generation phase
        self.surplus: list[PromptRecord] = []  # more of them, which dynamic sampling refills from
        self.calls = 0  # of `_seed` within the step

        if checkpoint:
            self._load(checkpoint)

    def train(self) -> None:
        """Run to the last step. Leaves `model/`, a plain Hugging Face checkpoint, in the run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        if self.config.logging.trackers:
            self.accelerator.init_trackers("spark-vl", config=flat(asdict(self.config)))
        with (
            self.verifiers,
            RunLog(self.accelerator, self.folder, steps=self.steps, start=self.step) as self.log,
        ):
            if self.step == 0:
                self._evaluate()
            while self.step < self.steps:
                metrics = self._train_step()
                self.step += 1
                self.log.step(self.step, metrics)
                if self._due(self.config.checkpoint.every) or self.step == self.steps:
                    self._save()
                if self._due(self.config.evaluation.every) and self.step < self.steps:
                    self._evaluate()
            self._evaluate()
            export_model(
                self.accelerator,
                self.updater.policy,
                self.processor,
                self.folder / "model",
                dtype=getattr(torch, self.config.model.dtype),
            )
        self.accelerator.end_training()

    # ── one step ──

    def _train_step(self) -> dict[str, float]:
        """Sample, verify, recycle and update once, by the schedule. Returns the step's metrics."""
        means = Means()
        self.calls = 0
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
        metrics = means.over_processes().result()
        add_balanced_accuracy(metrics)
        metrics |= {"data/epoch": self.sampler.epoch, "data/quarantined": self.quarantine.rows_bad}
        return metrics | self.timer.reset()

    def _learn_from(self, prompts: Sequence[ProcessedPrompt], means: Means) -> list[RolloutGroup]:
        """Sample, verify and update on `prompts`. Returns all groups that were sampled."""
        if not prompts:
            return []
        by_id = {prompt.record.id: prompt for prompt in prompts}
        chosen = self._sample(prompts)
        sampled = list(chosen)
        for kind, rounds in self.config.objective.refill_rounds.items():
            for _ in range(rounds):
                dead = [i for i, group in enumerate(chosen) if group.record.kind == kind and group.zero_variance]
                fresh = self._fresh(kind, len(dead)) if dead else []
                if not fresh:
                    break
                by_id |= {prompt.record.id: prompt for prompt in fresh}
                groups = self._sample(fresh)
                sampled += groups
                for i, group in zip(dead, (g for g in groups if not g.zero_variance), strict=False):
                    chosen[i] = group
        means.update(group_metrics(sampled))
        with self.timer("update"):
            self.updater.update(chosen, by_id, seed=self._seed("update"), add=means.add, counting=self.log.counting)
            self.engine.sync_weights(self.accelerator.unwrap_model(self.updater.policy))
        if self.config.logging.rollouts_every and self.step % self.config.logging.rollouts_every == 0:
            self.log.rollouts(self.step + 1, sampled)
        return sampled

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
            return verify_groups(self.verifiers, groups)

    def _recycle(self, groups: Sequence[RolloutGroup], means: Means) -> list[PromptRecord]:
        """The prompts that `groups` are recycled into; what is over the caps is kept to refill from."""
        config = self.config.recycle
        config = replace(
            config, max_judge=self._share(config.max_judge), max_reflection=self._share(config.max_reflection)
        )
        recycled = recycle(groups, self.templater, config, step=self.step, seed=self.config.seed)
        self.surplus = recycled.judge_surplus + recycled.reflection_surplus
        for name, count in recycled.counts.items():
            means.add(f"recycle/{name}", count * self.accelerator.num_processes)
        return recycled.judge + recycled.reflection

    def _draw(self, n: int) -> list[ProcessedPrompt]:
        """The next `n` problems that can be used; the others are quarantined."""
        prompts: list[ProcessedPrompt] = []
        with self.timer("load"):
            self.log.phase("loading")
            while len(prompts) < n:
                self.quarantine.seen(1)
                try:
                    prompts.append(self.processor.process(self.sampler.draw()))
                except BadRecordError as error:
                    self.quarantine.add(error)
        return prompts

    def _process(self, records: Sequence[PromptRecord]) -> list[ProcessedPrompt]:
        """Recycled records as inputs. One that quotes more than a prompt may hold is quarantined."""
        prompts = []
        with self.timer("load"):
            for record in records:
                try:
                    prompts.append(self.processor.process(record))
                except BadRecordError as error:
                    self.quarantine.add(error)
        return prompts

    def _fresh(self, kind: Kind, n: int) -> list[ProcessedPrompt]:
        """Up to `n` more prompts of `kind`: problems from the sampler, others from what recycling had left over."""
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

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        with self.accelerator.autocast():
            results = self.evaluate(self.engine, self.processor, self.verifiers, counting=self.log.counting)
        self.processor.forget_images()
        self.log.evaluation(self.step, results)

    def _save(self) -> None:
        self.log.phase("saving")
        state = {
            "sampler": self.sampler.state_dict(),
            "rows": [self.quarantine.rows_seen, self.quarantine.rows_bad],
            "waiting": [record_to_json(record) for record in self.waiting],
            "surplus": [record_to_json(record) for record in self.surplus],
        }
        save_checkpoint(
            self.accelerator, self.folder / "checkpoints", self.step, state, keep=self.config.checkpoint.keep
        )

    def _load(self, checkpoint: Path) -> None:
        state = load_checkpoint(self.accelerator, checkpoint)
        self.step = state["step"]
        self.sampler.load_state_dict(state["sampler"])
        self.quarantine.rows_seen, self.quarantine.rows_bad = state["rows"]
        self.waiting = [record_from_json(record) for record in state["waiting"]]
        self.surplus = [record_from_json(record) for record in state["surplus"]]
