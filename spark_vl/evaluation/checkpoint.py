"""Evaluates a checkpoint, outside of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spark_vl.config import DataConfig, EvalConfig
from spark_vl.evaluation.evaluator import Evaluator
from spark_vl.evaluation.figures import Estimate
from spark_vl.families.base import Processor
from spark_vl.families.registry import check_recipes, find_family
from spark_vl.log import Pace
from spark_vl.policy.packing import Pack
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.rollout import RolloutEngine, TransformersEngine
from spark_vl.rollout.load import load_vllm
from spark_vl.rollout.vllm_requests import serving_arguments
from spark_vl.run.trained import find_templater
from spark_vl.verifiers import VerifierPool


def evaluate_checkpoint(config: EvalConfig, folder: Path) -> dict[str, Estimate]:
    """The figures (see `Evaluator`) of the checkpoint at `config.model.path`, on a GPU if there is one.

    Args:
        folder: gets `samples.jsonl`, and `PROMPTS_FILE` with the prompts that were used.

    Raises:
        ConfigError, ValueError: see `Evaluator`, `find_family` and `Templater`.
    """
    family = find_family(config.model)
    check_recipes("evaluation.recipes", config.evaluation.recipes, config.model)
    processor = family.load_processor(config.model, max_prompt_tokens=config.max_prompt_tokens)
    templater = find_templater(config.prompts, config.model, family.reserved)
    templater.save(folder / PROMPTS_FILE)
    evaluator = Evaluator(
        config.evaluation,
        templater,
        rollout=config.rollout,
        seed=config.seed,
        samples_file=folder / "samples.jsonl",
    )
    policy = load_policy(
        config.model,
        dtype=getattr(torch, config.model.dtype),
        temperature=config.rollout.temperature,
        suppressed_token_ids=processor.suppressed_token_ids,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    engine: RolloutEngine = TransformersEngine(policy, processor, decode_batch_size=config.rollout.decode_batch_size)
    if config.rollout.engine == "vllm":
        engine = _vllm(config, policy.eval(), processor)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pace = Pace()
    with (
        VerifierPool(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb) as verifiers,
        Progress(*columns, TimeRemainingColumn()) as bar,
    ):

        def progress(name: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(name, total=total)

            def advance(finished: int) -> None:
                bar.advance(task, finished)
                if not bar.console.is_terminal and pace.is_due():
                    print(f"{name} {bar.tasks[task].completed:.0f}/{total}", flush=True)

            return advance

        return evaluator(engine, processor, verifiers, progress)


def _vllm(config: EvalConfig, policy: Policy, processor: Processor) -> RolloutEngine:
    arguments = serving_arguments(
        config.model,
        config.rollout,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.evaluation.max_new_tokens or config.rollout.max_new_tokens,
        images=DataConfig.max_row_images if processor.padding.images else 0,
    )

    @torch.no_grad()
    def score(passes: Sequence[Pack | None]) -> list[torch.Tensor]:
        return [policy(pack.to(policy.suppressed.device)).logprobs for pack in passes if pack]

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return load_vllm(config.model, config.rollout, arguments, accelerator, policy, processor, score=score, say=print)
