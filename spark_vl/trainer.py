"""The loop. Each step samples completions, verifies them, learns from them, and recycles them into new prompts.

Sampled: `rollout.n` completions of each prompt, from the current weights. Prompts are problems of the recipes, and
    judgments and reflections recycled from earlier completions. Both take the same way through this loop.
Reward: of a completion, the verifier's score in [0, 1] against the prompt's known right answer, times the prompt's
    weight, plus shaping terms (`RolloutGroup.rewards`). Nothing else is a reward: there is no reward model.
Gradient: completions are compared within their group (`group_advantages`), and a clipped policy-gradient loss with a
    KL penalty (`policy/losses.py`) is minimized over packs of whole groups, one optimizer step per batch.
Recycled: after the update, every verified group becomes pointwise, pairwise or reflection prompts (`recycle.py`). They
    wait in the feed for the next phase that takes them: the second phase of the step (`recycle.schedule: sequential`,
    as in the paper's code), or the next step, together with its problems (`merged`: one update per step).
Checkpoint: weights, optimizer, learning-rate schedule, random generators (Accelerate saves these); position in the
    problems, recycled prompts that wait, counts of bad rows (the feed's state); the best figure so far. All seeds are
    made from (seed, step, process, phase), so a resumed run draws what an uninterrupted one would have drawn.
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
from spark_vl.rollout import Collector, RolloutEngine
from spark_vl.run.paths import MODEL
from spark_vl.run.sinks import Sink


@dataclass
class Trainer:
    """Trains one model as policy and as generative reward. `setup.load_trainer` builds it from a configuration."""

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
    """Are told of verified groups, metrics and checkpoints."""
    evaluate: Callable[[int], Mapping[str, Any]]
    """Step → held-out figures of the policy after it: name → `value`, `low`, `high`, `n`. None: it is not evaluated."""
    stop: StopRequest
    session: AbstractContextManager[None]
    """Holds open what the run needs: verifiers, engine, log, signal handlers, the watch over other processes."""
    steps: int
    """Of the whole run."""
    resumed: int | None = None
    """Step of the checkpoint that the run goes on from; None: it begins."""
    step: int = 0
    """Steps finished so far."""

    def train(self) -> bool:
        """Run to the last step, and leave `model/`, a plain Hugging Face checkpoint, in the run's folder.

        Returns:
            Whether it got there: a signal stops it before, at a checkpoint.

        Raises:
            NonFiniteUpdateError: the loss or the gradient was not finite several times in a row.
            TooManyBadRowsError: more rows cannot be used than the run allows.
            CheckpointError: a checkpoint cannot be written.
        """
        with self.session:
            finished = self._run()
        self.accelerator.end_training()
        return finished

    def _run(self) -> bool:
        if self.resumed is None:
            self.best.improved(self.step, self.evaluate(self.step))
        while self.step < self.steps:
            if self._asked_to_stop() or not self._train_step(self.step + 1):
                return self._stop()
            self.step += 1
            last = self.step == self.steps
            # Before the checkpoint: a run that resumes from it has the figures of its step.
            figures = self.evaluate(self.step) if last or self._due(self.config.evaluation.every) else {}
            is_best = self.best.improved(self.step, figures)
            if is_best or last or self._due(self.config.checkpoint.every):
                self._save(is_best=is_best)
        self.checkpoints.copy_model(self.step, self.log.folder / MODEL)
        return True

    def _train_step(self, step: int) -> bool:
        """Take one step. Returns False if it was abandoned before its first update, because the run is to stop."""
        self.log.begin_step(step)
        with self.log.timed("step"):
            for phase, name in enumerate(self.feed.phases):
                with self.log.timed("load"):
                    self.log.phase("loading")
                    prompts = self.feed.next(name)
                if not self._any_process(bool(prompts)):
                    continue
                seed = self._seed(step, "sample", 2 * phase + 1)
                scored = self.collector.sample_and_verify(prompts, seed=seed)
                # Dynamic sampling, if asked for: all that was sampled, and what is trained on.
                scored, chosen = self.collector.refill(scored, self.feed.more, seed=seed)
                if phase == 0 and self._asked_to_stop():
                    self.feed.rewind()
                    return False
                normalize = self.config.objective.loss != "dr_grpo"
                advantages = [group_advantages(group.rewards, normalize=normalize) for _, group in chosen]
                self._update(chosen, advantages, self._seed(step, "update", 2 * phase + 2))
                self.log.count("recycle", self.feed.recycle(scored, step))
                with self.log.timed("write"):
                    self.log.phase("writing")
                    for sink in self.sinks:
                        sink.on_groups(step, scored)
        self.log.count("data", self.feed.counts())
        metrics = self.log.end_step({"data/epoch": self.feed.epoch})
        for sink in self.sinks:
            sink.on_metrics(step, metrics)
        return True

    def _update(self, chosen: Sequence[Scored], advantages: Sequence[Sequence[float]], seed: str) -> None:
        """Pack the groups, take the optimizer steps, and let the engine sample from the new weights. Collective."""
        with self.log.timed("update"):
            try:
                batches = self.make_batches(chosen, advantages, seed=seed)
                self.updater.update(batches, add=self.log.add, progress=self.log.progress)
            except NonFiniteUpdateError as error:
                file = self.log.dump(self.step + 1, [group for _, group in chosen])
                kept = f"step {self.step + 1} is in {file}, the last good weights in {self.checkpoints.folder}"
                raise NonFiniteUpdateError(f"{error}; {kept}") from error
            self.engine.sync_weights(self.accelerator.unwrap_model(self.updater.policy))

    def _save(self, *, is_best: bool) -> None:
        """Write a checkpoint. It counts once every sink has written what belongs to it."""
        self.log.phase("saving")
        checkpoint = self.checkpoints.write(self.step)
        for sink in self.sinks:
            sink.on_checkpoint(self.step, checkpoint)
        self.checkpoints.commit(self.step, is_best=is_best)

    def _stop(self) -> bool:
        """Save where the run is, unless that is done, and say how to go on."""
        if not self.checkpoints.is_latest(self.step):
            self._save(is_best=False)
        resume = "go on with the same command and --resume auto"
        self.log.say(f"stopped after step {self.step} of {self.steps}; {resume}")
        return False

    def _asked_to_stop(self) -> bool:
        return self._any_process(self.stop.signal is not None)

    def _any_process(self, here: bool) -> bool:
        return any_process(self.accelerator, here)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _seed(self, step: int, purpose: str, turn: int) -> str:
        """The seed of one draw on this process. Steps are counted from 0 here, and the draws of a step from 1."""
        return f"{self.config.seed}/{step - 1}/{self.accelerator.process_index}/{purpose}/{turn}"
