"""The loop. A step samples completions, verifies them, learns from them, and recycles them into new prompts.

A step has one phase or two, by `recycle.schedule`; each phase takes prompts, samples, verifies, updates and recycles:
    `none`: problems. `merged`: problems together with what the last step recycled. `sequential`, as in the paper's
    code: problems, then every recycled prompt that waits, sampled from the updated policy.
Sampled: `rollout.n` completions of each prompt, from the current weights; old completions are never trained on again.
Reward: the verifier's score in [0, 1] against the prompt's reference answer, weighted, plus weighted shaping terms
    such as format (`RolloutGroup.rewards`). The reference answer of a judgment is known, since what it judges was
    verified. A judgment is rewarded for agreeing with the verifier; its verdict never rewards another completion.
    There is no reward model.
Gradient: a completion's advantage is its reward minus the mean of its group, divided by the standard deviation of the
    group's correctness (`advantages.py`; not for `dr_grpo`). `make_batches` deals the groups out to
    `optimizer.updates_per_batch` parts (default 1). Each is one optimizer step, accumulated over packs of whole groups.
    The loss is the clipped policy gradient, whose ratio compares with the trainer's own log-probabilities under the
    weights that sampled (so it is 1 in the first part), plus `objective.beta` times the KL divergence from the policy
    that the run began with (`policy/losses.py`).
Recycled: after the update, the group of each problem becomes judgments (pointwise: is this answer right? pairwise:
    which of two is?) and reflections (check this answer, and give the right one). With `recycle.judge_reflections` the
    group of a reflection becomes pointwise judgments. Judgments are not recycled (`recycle/`). Recycled prompts wait
    in the feed for the next phase that takes them.
Checkpoint: weights, optimizer and random generators (`distributed.state`), the place in the problems, the prompts
    that wait, counts of bad rows and skipped updates, and the best evaluation so far. The reference policy is loaded
    anew, and the learning rate follows from the step. Every seed is made from (seed, step, process, draw), so a run
    resumed on as many processes draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from spark_vl.advantages import group_advantages
from spark_vl.checkpoint import BestFigure, Checkpoints
from spark_vl.config import TrainConfig
from spark_vl.distributed.gather import any_process
from spark_vl.distributed.stop import StopRequest
from spark_vl.feed import PromptFeed
from spark_vl.log import RunLog
from spark_vl.policy.batch import BatchMaker, Scored
from spark_vl.policy.update import NonFiniteUpdateError, Updater
from spark_vl.rollout import Collector, EngineError, RolloutEngine
from spark_vl.run.paths import MODEL
from spark_vl.run.sinks import Sink


@dataclass
class Trainer:
    """Trains one model to solve problems and to judge solutions. `setup.load_trainer` builds it from a config."""

    config: TrainConfig
    accelerator: Accelerator
    feed: PromptFeed
    engine: RolloutEngine
    collector: Collector
    make_batches: BatchMaker
    updater: Updater
    checkpoints: Checkpoints
    best: BestFigure
    log: RunLog
    sinks: Sequence[Sink]
    """What is told of verified groups, metrics and checkpoints."""
    check: Callable[[int, Sequence[Scored]], None]
    """Is given what a step has sampled, before it updates; raises where training would compute something else."""
    evaluate: Callable[[int], Mapping[str, Any]]
    """Step → held-out figures of the policy after it, which it also logs: name → `value`, `low`, `high`, `n`. Empty
    where nothing is evaluated."""
    stop: StopRequest
    session: AbstractContextManager[None]
    """Holds open what the run needs: verifiers, engine, log, signal handlers, watch over other processes."""
    steps: int
    """Steps of the whole run."""
    resumed: int | None = None
    """Step of the checkpoint that the run resumes from; None for a new run."""
    step: int = 0
    """Steps finished so far."""

    def train(self) -> bool:
        """Train to the last step, and leave its model, a plain Hugging Face checkpoint, as `model/` of the run.

        Returns:
            False if a signal stopped the run before the last step; it then saves a checkpoint to resume from.

        Raises:
            NonFiniteUpdateError: the loss or the gradient was not finite several times in a row.
            LogprobGapError: sampling and training do not compute the same log-probabilities.
            TooManyBadRowsError: there are more unusable rows than the run allows.
            EngineError: the rollout engine cannot go on; where the run stands between two steps it saves a checkpoint.
            CheckpointError: a checkpoint cannot be written.
        """
        with self.session:
            finished = self._run()
        self.log.finish_trackers()
        self.accelerator.end_training()
        return finished

    def _run(self) -> bool:
        if self.resumed is None:
            self.best.update(self.step, self.evaluate(self.step))
        elif self.step < self.steps:
            self.log.say(f"goes on after step {self.step} of {self.steps}")
        else:
            self.log.say(f"all {self.steps} steps are done: {self.log.folder / MODEL} is written again, and no more")
        while self.step < self.steps:
            if self._asked_to_stop() or not self._train_step(self.step + 1):
                return self._stop()
            self.step += 1
            last = self.step == self.steps
            # Evaluated before it is saved, so that a run that resumes from the checkpoint does not evaluate it again.
            try:
                figures = self.evaluate(self.step) if last or self._due(self.config.evaluation.every) else {}
            except EngineError:
                self._save(is_best=False)
                raise
            is_best = self.best.update(self.step, figures)
            if is_best or last or self._due(self.config.checkpoint.every):
                self._save(is_best=is_best)
        self.checkpoints.copy_model(self.step, self.log.folder / MODEL)
        return True

    def _train_step(self, step: int) -> bool:
        """Take one step. Returns False if it was abandoned, before its first update, because a signal came."""
        self.log.begin_step(step)
        with self.log.timed("step"):
            for phase, name in enumerate(self.feed.phases):
                with self.log.timed("load"):
                    self.log.phase("loading")
                    prompts = self.feed.next(name)
                if not self._any_process(bool(prompts)):
                    continue
                seed = self._seed(step, "sample", 2 * phase + 1)
                try:
                    scored = self.collector.sample_and_verify(prompts, seed=seed)
                    # Dynamic sampling, if asked for, draws fresh groups, with seeds of their own. They join `scored`;
                    # in `trained_on` they replace groups without a gradient, which are recycled all the same.
                    scored, trained_on = self.collector.refill(scored, self.feed.more, seed=seed)
                except EngineError:
                    if phase == 0:
                        self.feed.rewind()
                        self._save_unless_saved()
                    raise
                if phase == 0 and self._asked_to_stop():
                    self.feed.rewind()  # to the start of the step, which the resumed run takes again
                    return False
                self.check(step, scored)
                normalize = self.config.objective.loss != "dr_grpo"
                advantages = [
                    group_advantages(group.rewards, group.correctness, normalize=normalize) for _, group in trained_on
                ]
                self._update(step, phase, trained_on, advantages)
                self.log.count("recycle", self.feed.recycle(scored, step))
                with self.log.timed("write"):
                    self.log.phase("writing")
                    for sink in self.sinks:
                        sink.on_groups(step, scored)
        self.log.count("data", self.feed.counts())
        metrics = self.log.end_step(self.feed.metrics(), self.feed.first_fault())
        for sink in self.sinks:
            sink.on_metrics(step, metrics)
        return True

    def _update(
        self, step: int, phase: int, trained_on: Sequence[Scored], advantages: Sequence[Sequence[float]]
    ) -> None:
        """Take the optimizer steps, and let the engine sample from the new weights. A collective call."""
        seed = self._seed(step, "update", 2 * phase + 2)
        # By the plan, in which no phase is empty and no update is left out.
        first = ((step - 1) * len(self.feed.phases) + phase) * self.config.optimizer.updates_per_batch
        with self.log.timed("update"):
            try:
                batches = self.make_batches(trained_on, advantages, seed=seed)
                self.updater.update(batches, first=first, add=self.log.add, progress=self.log.progress)
            except NonFiniteUpdateError as error:
                file = self.log.dump(step, [group for _, group in trained_on])
                kept = f"step {step} is in {file}, the last good weights in {self.checkpoints.folder}"
                raise NonFiniteUpdateError(f"{error}; {kept}") from error
            self.engine.sync_weights(self.accelerator.unwrap_model(self.updater.policy))

    def _save(self, *, is_best: bool) -> None:
        """Write a checkpoint. A run can resume from it once every sink has written its part, and not before."""
        self.log.phase("saving")
        checkpoint = self.checkpoints.write(self.step)
        for sink in self.sinks:
            sink.on_checkpoint(self.step, checkpoint)
        self.checkpoints.commit(self.step, is_best=is_best)

    def _stop(self) -> bool:
        """Save a checkpoint, unless there is one of this step, and say how to resume."""
        self._save_unless_saved()
        resume = "go on with the same command and --resume auto"
        self.log.say(f"stopped after step {self.step} of {self.steps}; {resume}")
        return False

    def _save_unless_saved(self) -> None:
        if not self.checkpoints.is_latest(self.step):
            self._save(is_best=False)

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal to stop. A collective call."""
        return self._any_process(self.stop.signal is not None)

    def _any_process(self, here: bool) -> bool:
        return any_process(self.accelerator, here)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _seed(self, step: int, purpose: str, turn: int) -> str:
        """The seed of one draw on this process: steps count from 0 in it, the draws of a step from 1."""
        return f"{self.config.seed}/{step - 1}/{self.accelerator.process_index}/{purpose}/{turn}"
