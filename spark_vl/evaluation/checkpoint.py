"""Evaluates a checkpoint by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spark_vl.config import DataConfig, EvalConfig
from spark_vl.evaluation.evaluator import Evaluator
from spark_vl.evaluation.figures import Estimate
from spark_vl.policy.policy import load_policy
from spark_vl.processors import load_processor
from spark_vl.prompts import Templater
from spark_vl.rollout import TransformersEngine
from spark_vl.verifiers import VerifierPool


def evaluate_checkpoint(config: EvalConfig, templater: Templater, samples_file: Path) -> dict[str, Estimate]:
    """The figures (see `Evaluator`) of the checkpoint at `config.model.path`, on a GPU if there is one.

    Raises:
        ConfigError, ValueError: see `Evaluator` and `load_processor`.
    """
    evaluator = Evaluator(
        config.evaluation, templater, rollout=config.rollout, seed=config.seed, samples_file=samples_file
    )
    processor = load_processor(config.model, max_prompt_tokens=DataConfig.max_prompt_tokens)
    policy = load_policy(
        config.model,
        dtype=getattr(torch, config.model.dtype),
        temperature=config.rollout.temperature,
        suppressed_token_ids=processor.suppressed_token_ids,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(policy, processor, rows_at_once=config.rollout.rows_at_once)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        VerifierPool(config.verifier.workers, config.verifier.timeout_s, config.verifier.memory_mb) as verifiers,
        Progress(*columns, TimeRemainingColumn()) as bar,
    ):

        def counting(name: str, total: int):
            task = bar.add_task(name, total=total)
            return lambda finished: bar.advance(task, finished)

        return evaluator(engine, processor, verifiers, counting)
