"""Builds the trainer and all its parts from a configuration."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from spark_vl.checkpoint import BestFigure, Checkpoints, check_checkpoint, claim_folder, find_checkpoint, prepare_export
from spark_vl.config import (
    ConfigError,
    SelfJudgeConfig,
    TrainConfig,
    blamed_on,
    config_differences,
    flat,
    read_config,
    save_config,
)
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipes
from spark_vl.data.sampler import PromptSampler
from spark_vl.data.sources import RowLimits
from spark_vl.distributed.launch import describe_launch, start_accelerator, strategy
from spark_vl.distributed.stop import StopRequest
from spark_vl.distributed.watch import Watch
from spark_vl.families.base import Processor
from spark_vl.families.registry import check_recipes, find_family
from spark_vl.feed import PHASES, PromptFeed
from spark_vl.log import RunLog
from spark_vl.policy.batch import BatchMaker
from spark_vl.policy.check import LogprobCheck
from spark_vl.policy.update import load_updater
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, PromptRecord
from spark_vl.reward import AveragedWeights, GenerativeReward, Measurement, SelfJudge
from spark_vl.rollout import Collector, Sampling, load_engine
from spark_vl.rollout.distributed import DistributedEngine, DistributedVerifiers
from spark_vl.run.paths import CHECKPOINTS, CONFIG, JUDGMENTS
from spark_vl.run.provenance import note_environment, public_name, write_recipes
from spark_vl.run.quarantine import Quarantine
from spark_vl.run.shards import ShardWriter
from spark_vl.run.sinks import JudgmentSink, Sink
from spark_vl.trainer import Trainer
from spark_vl.verifiers.base import SELF_JUDGE
from spark_vl.verifiers.pool import VerifierPool

Evaluate = Callable[..., Mapping[str, Any]]
"""Held-out evaluation of the current policy: (engine, processor, verifiers, progress=RunLog.progress) → name → estimate
(`value`, `low`, `high`, `n`)."""


def load_trainer(
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = None,
    sinks: Callable[[Accelerator], Sequence[Sink]] | None = None,
    resume: str = "none",
    allow_config_change: bool = False,
    trust_checkpoint: bool = False,
) -> Trainer:
    """Everything that a run needs, ready to train. Its folder is claimed: no other run can use it meanwhile.

    Args:
        config: of the run, checked (`check_train_config`).
        evaluate: is called before and after the run and, with `config.evaluation.every`, while it goes on.
        sinks: makes, on each process and once the folder is claimed, what is told of groups, metrics and checkpoints
            beside the run's own files. None: nothing.
        resume: `auto` (from the run's latest checkpoint, if it has one), `none`, or the path of a checkpoint.
        allow_config_change: go on although the checkpoint was written under other settings.
        trust_checkpoint: under ZeRO and FSDP2, read also a checkpoint that lies outside `output_dir`, and so run what
            code it may hold.

    Raises:
        ConfigError: `output_dir` holds a run that is not to be resumed, cannot be written, or is in use.
        CheckpointError: there is no whole checkpoint at `resume`, or it does not go with this run.
        LaunchError: what runs is not what the launch asked for.
    """
    folder = Path(config.output_dir)
    checkpoint = find_checkpoint(folder / CHECKPOINTS, resume)
    if resume == "none" and (folder / "metrics.jsonl").exists():
        raise ConfigError(f"output_dir: {folder} already holds a run; name another folder, or go on with --resume auto")
    # Before the accelerator: under ZeRO-3 transformers then shards every model that is made, also one without weights.
    family = find_family(config.model)
    check_recipes("data.recipes", config.data.recipes, config.model)
    processor = family.load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)
    accelerator = start_accelerator(config, folder)
    if config.self_judge.average is not None and (held := strategy(accelerator)) not in ("single", "ddp"):
        raise ConfigError(
            f"self_judge.average: is {config.self_judge.average}, but weights under {held} are sharded, or their "
            "optimizer has copies of its own; set it to null"
        )
    claim: AbstractContextManager[Any] = claim_folder(folder) if accelerator.is_main_process else nullcontext()
    set_seed(config.seed)
    # Before anything large is loaded.
    manifest = checkpoint and check_checkpoint(
        accelerator, checkpoint, config, allow_config_change=allow_config_change, trust=trust_checkpoint
    )

    # What is asked.
    rank = accelerator.process_index
    templater = Templater.from_config(config.prompts, family.reserved)
    limits = RowLimits(config.data.max_row_bytes, config.data.max_row_chars, config.data.max_row_images)
    with blamed_on("data.recipes"):
        recipes = load_recipes(config.data.recipes)
        problems = [open_recipe(recipe, "train", templater, limits, weighted=True) for recipe in recipes]
        sampler = PromptSampler(problems, seed=config.seed)
    quarantine = Quarantine(
        folder / (f"quarantine.rank{rank}.jsonl" if rank else "quarantine.jsonl"), config.data.max_quarantined_fraction
    )
    feed = PromptFeed(
        sampler,
        processor,
        templater,
        quarantine,
        accelerator,
        config.data,
        config.recycle,
        refills=config.objective.refill_rounds,
        seed=config.seed,
    )

    # What answers, and learns.
    steps = config.steps or math.ceil(config.epochs * len(sampler) / config.data.prompts_per_step)
    updates = steps * len(PHASES[config.recycle.schedule]) * config.optimizer.updates_per_batch
    updater = load_updater(config, accelerator, processor, updates=updates)
    disable_progress_bar()  # those of files that are written would run through the run's own
    prepare_export(accelerator.unwrap_model(updater.policy).model, processor)
    verifiers = VerifierPool(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb)
    make_batches = BatchMaker(
        accelerator=accelerator,
        processor=processor,
        objective=config.objective,
        optimizer=config.optimizer,
        max_new_tokens=config.rollout.max_new_tokens,
    )

    # Where it stands.
    measured = Measurement()
    parts: dict[str, Any] = {"updater": updater} | ({"self_judge": measured} if config.self_judge.recipes else {})
    best = BestFigure(config.checkpoint.keep_best)
    checkpoints = Checkpoints(
        folder=folder / CHECKPOINTS,
        accelerator=accelerator,
        policy=updater.policy,
        optimizer=updater.optimizer,
        processor=processor,
        templater=templater,
        config=config,
        feed=feed,
        best=best,
        parts=parts,
    )
    resumed = None
    if checkpoint and manifest:
        resumed = checkpoints.load(checkpoint, manifest, allow_config_change=allow_config_change)
        updater.use_settings()

    # What is written down.
    watch, stop = Watch(accelerator, timeout_s=config.distributed.timeout_s), StopRequest()
    log = RunLog(accelerator, folder, steps=steps, resumed=resumed, on_progress=watch.at)
    engine = load_engine(config, accelerator, updater, processor, add=log.add, say=log.say)
    check = LogprobCheck(config, updater, log, folder / CHECKPOINTS)
    own: list[Sink] = [log, check]
    sampling = Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.max_new_tokens)
    self_judge = None
    if config.self_judge.recipes:
        self_judge = SelfJudge(
            GenerativeReward(engine, processor, templater, sampling=sampling, samples=config.self_judge.votes),
            _held_out(config.self_judge, processor, templater, limits),
            measured,
            engine=engine,
            average=AveragedWeights(updater.optimizer, config.self_judge.average),
            verifiers=verifiers,
            accelerator=accelerator,
            sampling=sampling,
            config=config.self_judge,
            log=log,
            seed=config.seed,
        )
        own.append(self_judge)
    if config.logging.judgments:
        with blamed_on("output_dir"):
            shards = ShardWriter(
                folder / JUDGMENTS,
                rank=rank,
                model=public_name(config.model.path),
                model_revision=processor.commit,
                resumed=resumed,
            )
        own.append(JudgmentSink(shards, quarantine))
    if checkpoints.data_changes:
        changes = "; ".join(checkpoints.data_changes)
        log.say(f"other data than before: {changes}; the epoch that was under way begins again, shuffled anew")
    _describe_run(config, accelerator, folder, resumed, checkpoints.data_changes, log)

    def evaluate_after(step: int) -> Mapping[str, Any]:
        if evaluate is None:
            return {}
        with accelerator.autocast():
            figures = evaluate(
                DistributedEngine(engine, accelerator),
                processor,
                DistributedVerifiers(verifiers, accelerator),
                progress=log.progress,
            )
        log.evaluation(step, figures)
        return figures

    @contextmanager
    def session() -> Iterator[None]:
        # The watch within the signal handlers: when a process dies, the launcher sends the others SIGTERM, and the
        # watch takes some seconds to find out which one it was.
        with claim, stop, verifiers, closing(engine), watch, log:
            yield

    return Trainer(
        config=config,
        accelerator=accelerator,
        feed=feed,
        engine=engine,
        collector=Collector(
            engine=engine,
            verifiers=verifiers,
            accelerator=accelerator,
            log=log,
            sampling=sampling,
            n=config.rollout.n,
            refill_rounds=config.objective.refill_rounds,
            refused=feed.refuse,
            self_judge=self_judge,
        ),
        make_batches=make_batches,
        updater=updater,
        checkpoints=checkpoints,
        best=best,
        log=log,
        sinks=[*own, *(sinks(accelerator) if sinks else ())],
        check=check,
        evaluate=evaluate_after,
        stop=stop,
        session=session(),
        steps=steps,
        resumed=resumed,
        step=resumed or 0,
    )


def _held_out(
    config: SelfJudgeConfig, processor: Processor, templater: Templater, limits: RowLimits
) -> list[PromptRecord]:
    """Problems that tell how well the policy judges: as many of each recipe, drawn with a fixed seed.

    Raises:
        ConfigError: a recipe cannot be opened, or has no verified problem that can be used.
    """
    with blamed_on("self_judge.recipes"):
        sets = [open_recipe(recipe, config.split, templater, limits) for recipe in load_recipes(config.recipes)]
    found: list[PromptRecord] = []
    for problems in sets:
        of_recipe: list[PromptRecord] = []
        rows = list(range(len(problems)))
        random.Random(f"{problems.recipe.name}/{config.split}/self_judge").shuffle(rows)
        for row in rows:
            try:
                record = processor.process(problems[row]).record
            except BadRecordError:
                continue
            if record.kind == "problem" and record.verifier != SELF_JUDGE:
                of_recipe.append(record)
            if len(of_recipe) * len(sets) >= config.problems:
                break
        if not of_recipe:
            raise ConfigError(f"self_judge.recipes: {problems.recipe.name} has no verified problem that can be used")
        found += of_recipe
    return found


def _describe_run(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path,
    resumed: int | None,
    data_changes: Sequence[str],
    log: RunLog,
) -> None:
    """Write down settings, data and machine of this start, and tell the trackers of the settings."""
    if accelerator.is_main_process:
        written = folder / CONFIG  # by the start before this one
        changed: list[str] = []
        if resumed is not None and written.exists():
            changed = config_differences(read_config(written), config)
        save_config(config, written)
        write_recipes(folder, [*config.data.recipes, *config.evaluation.recipes])
        note_environment(folder, resumed or 0, describe_launch(accelerator), [*changed, *data_changes])
    if config.logging.trackers:
        settings = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in flat(asdict(config)).items()
        }
        log.start_trackers(settings)
