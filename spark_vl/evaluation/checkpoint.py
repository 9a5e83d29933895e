"""Evaluates a checkpoint, outside of training: on any number of rows, in bounded memory, shared out over processes, and
from where it was when it was killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from spark_vl.config import ConfigError, EvalConfig, blamed_on, differences, flat, read_config, save_config
from spark_vl.data.preferences import Preference, PreferenceSet, open_preferences
from spark_vl.data.problems import FilteredRowError, ProblemSet
from spark_vl.data.recipes import PreferenceColumns, load_recipes
from spark_vl.distributed.launch import describe_launch, start_replicas
from spark_vl.evaluation.evaluator import Evaluator
from spark_vl.evaluation.figures import Estimate
from spark_vl.evaluation.preferences import judge_preferences, plot_reliability
from spark_vl.evaluation.prompts import BYTES_OF_A_PIXEL, MOST_PIXELS, in_chunks
from spark_vl.evaluation.results import Line, results
from spark_vl.evaluation.samples import by_problem, groups_to_json
from spark_vl.evaluation.shares import Shares
from spark_vl.evaluation.tables import write_results
from spark_vl.families.registry import check_recipes, find_family
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import BadRecordError, PromptRecord, plain_text
from spark_vl.reward import GenerativeReward
from spark_vl.rollout.engine import Sampling, nothing
from spark_vl.rollout.load import Loaded, load_sampler
from spark_vl.run.paths import CONFIG, ENVIRONMENT, RECIPES
from spark_vl.run.provenance import note_environment, write_recipes
from spark_vl.run.trained import find_templater
from spark_vl.verifiers import VerifierPool, check_golds

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64
"""Rows whose golds are checked together."""

_TIMEOUT_S = 24 * 3600.0
"""Processes wait for each other at the end: some have longer answers."""

_FREE = (
    *("output", "rollout.decode_batch_size", "rollout.vllm", "verifier.workers"),
    *(f"rollout.openai.{name}" for name in ("base_url", "token_from", "concurrency", "timeout_s", "retries")),
)
"""Settings that change no answer."""


def evaluate_checkpoint(config: EvalConfig, folder: Path, *, overwrite: bool = False) -> dict[str, Estimate]:
    """The figures (see `results.results`) of the checkpoint at `config.model.path`, on a GPU if there is one.

    Under `accelerate launch` each process holds a whole model and asks its share of the rows; all return the figures.
    What the folder holds of an evaluation under the same settings is not asked again.

    Args:
        folder: gets `SAMPLES`, `results.json`, `results.md`, reliability diagrams of reward benchmarks, and what they
            were made with: `config.yaml`, `recipes.json`, `environment.jsonl`, and `PROMPTS_FILE`, the prompts that
            were used.
        overwrite: whether what the folder holds of an evaluation is deleted first.

    Raises:
        ConfigError: a recipe or the model cannot be used, or the folder holds an evaluation under other settings.
        EngineError: the model cannot be asked.
    """
    accelerator = start_replicas(_TIMEOUT_S)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in ("samples*.jsonl", "results.*", CONFIG, RECIPES, ENVIRONMENT):
                for file in folder.glob(name):
                    file.unlink()
        _check_same(config, folder)
        save_config(config, folder / CONFIG)
        write_recipes(folder, config.evaluation.recipes)
        note_environment(folder, 0, describe_launch(accelerator), ())
    with blamed_on("evaluation.recipes"):
        recipes = load_recipes(config.evaluation.recipes)
    compared = [recipe for recipe in recipes if isinstance(recipe.columns, PreferenceColumns)]
    solved = [name for name, recipe in zip(config.evaluation.recipes, recipes, strict=True) if recipe not in compared]

    at_server = config.rollout.engine == "openai"
    if not at_server:
        check_recipes("evaluation.recipes", solved, config.model)
    reserved = None if at_server else find_family(config.model).reserved
    templater = find_templater(config.prompts, config.model, reserved)
    problems = replace(config.evaluation, recipes=solved)
    evaluator = Evaluator(problems, templater, rollout=config.rollout, seed=config.seed)
    with blamed_on("evaluation.recipes"):
        preferences = [open_preferences(recipe, problems.split, templater) for recipe in compared]
    model = load_sampler(
        config.model,
        config.rollout,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=evaluator.sampling.max_new_tokens,
        temperature=config.rollout.temperature,
        accelerator=accelerator,
    )
    with (
        closing(model.sampler),
        VerifierPool(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb) as verifiers,
        Shares(accelerator, folder, config.evaluation.problems) as shares,
    ):
        if accelerator.is_main_process:
            templater.save(folder / PROMPTS_FILE)
        for problem_set in evaluator.sets:
            _solve(problem_set, evaluator, model, verifiers, shares)
        if preferences:
            judge = _judge(config, model, templater, evaluator.sampling)
            for preference_set in preferences:
                _compare(preference_set, judge, config, shares)
        lines = shares.all_lines()
    found = results(lines, {name for recipe in recipes for name in recipe.own_verifiers})
    if accelerator.is_main_process:
        write_results(found, folder, config.model.path)
        for recipe in compared if "pointwise" in config.ask else ():
            judged = [line for line in lines if line["recipe"] == recipe.name and "answers" in line]
            plot_reliability(judged, folder / f"reliability-{recipe.name}.png")
    return found


def _solve(
    problem_set: ProblemSet, evaluator: Evaluator, model: Loaded, verifiers: VerifierPool, shares: Shares
) -> None:
    """Ask the problems of one recipe, and write down what was answered."""
    name = problem_set.recipe.name
    rows_by_id: dict[str, int] = {}

    def unusable(row: int, error: BadRecordError) -> None:
        logger.warning("left out of the evaluation: %s", error)
        shares.add([{"recipe": name, "row": row, "id": error.record_id, "unusable": error.reason}])

    def usable(rows: Sequence[int], refuse: Callable[[int, BadRecordError], None]) -> Iterator[PromptRecord]:
        """Records whose verifiers give their golds full marks."""
        left = iter(rows)
        while some := list(islice(left, _ROWS_AT_ONCE)):
            records: dict[int, PromptRecord] = {}
            for row in some:
                try:
                    records[row] = problem_set[row]
                except FilteredRowError:
                    continue
                except BadRecordError as error:
                    refuse(row, error)
            faults = check_golds(verifiers, list(records.values()))
            for (row, record), fault in zip(records.items(), faults, strict=True):
                if fault is not None:
                    refuse(row, fault)
                    continue
                rows_by_id[record.id] = row
                yield record

    rows, drawn = shares.rows(problem_set), shares.drawn(problem_set)
    if evaluator.config.judging and rows:
        # Wrong answers are the right ones of other problems, also of those that are asked elsewhere or were before.
        light = []
        for record in usable(drawn, nothing):
            try:
                record = model.prompts.process(record).record
            except BadRecordError:
                continue
            light.append(replace(record, messages=(), question=(plain_text(record.question),)))
            model.prompts.forget_images()
        evaluator.find_wrong_answers(light, verifiers)
    position = {row: number for number, row in enumerate(drawn)}
    chunks = in_chunks(
        usable(rows, unusable),
        model.prompts,
        evaluator.about,
        lambda error: unusable(rows_by_id[error.record_id], error),
    )
    for problems in shares.together(chunks):
        records = [prompts[0].record for prompts in problems]
        seed = position[rows_by_id[records[0].id]] if records else 0
        groups = evaluator.ask(model.sampler, model.prompts, verifiers, problems, seed, shares.progress)
        lines = []
        for id, of_problem in by_problem(groups, [record.id for record in records]).items():
            line: Line = {"recipe": name, "row": rows_by_id[id], "id": id}
            if any(group.record.id == id for group in of_problem["greedy"]):
                lines.append(line | {"groups": groups_to_json(of_problem)})
            else:
                lines.append(line | {"unusable": "the engine refuses its prompt; a warning says why"})
        shares.add(lines)
        problems.clear()  # their images go before those of the next ones come


def _judge(config: EvalConfig, model: Loaded, templater: Templater, sampling: Sampling) -> GenerativeReward:
    return GenerativeReward(
        model.sampler,
        model.prompts,
        templater,
        sampling=replace(sampling, temperature=sampling.temperature if config.votes > 1 else 0.0),
        samples=config.votes,
        policy=model.policy,
    )


def _compare(preferences: PreferenceSet, judge: GenerativeReward, config: EvalConfig, shares: Shares) -> None:
    """Ask which answer is the best, row by row of one recipe, and write down what was answered."""
    name = preferences.recipe.name
    images_at_once = max(1, MOST_PIXELS // (config.model.max_pixels * BYTES_OF_A_PIXEL))
    for ask in config.ask:

        def chunks(rows: Sequence[int], ask: str = ask) -> Iterator[list[tuple[int, Preference]]]:
            chunk: list[tuple[int, Preference]] = []
            for row in rows:
                try:
                    chunk.append((row, preferences[row]))
                except BadRecordError as error:
                    logger.warning("left out of the evaluation: %s", error)
                    line = {"recipe": name, "row": row, "id": error.record_id, "ask": ask, "unusable": error.reason}
                    shares.add([line])
                held = sum(len(preference.images) for _, preference in chunk)
                if len(chunk) == _ROWS_AT_ONCE or held >= images_at_once:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk

        for chunk in shares.together(chunks(shares.rows(preferences, ask))):
            judged = judge_preferences(judge, [preference for _, preference in chunk], [ask])
            shares.add([line | {"row": row} for (row, _), line in zip(chunk, judged, strict=True)])


def _check_same(config: EvalConfig, folder: Path) -> None:
    """Check that what the folder holds was evaluated as `config` says. Raises `ConfigError`."""
    if not any(folder.glob("samples*.jsonl")) or not (folder / CONFIG).exists():
        return
    if changed := differences(flat(read_config(folder / CONFIG)), flat(asdict(config)), free=_FREE):
        changes = "; ".join(f"{name}: {was!r} → {now!r}" for name, (was, now) in changed.items())
        raise ConfigError(
            f"output: {folder} holds an evaluation under other settings ({changes}); name another folder, or add "
            "--overwrite"
        )
