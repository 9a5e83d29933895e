"""Train a vision-language model with SPARK: one model that is policy and generative reward (arXiv 2509.22624).

What a notebook needs can be imported from here; `docs/api.md` lists it. A name is loaded when it is first asked for:
`import spark_vl` alone loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the table below, for type checkers
    from spark_vl.answers import last_boxed as last_boxed
    from spark_vl.cli import train as train
    from spark_vl.config import CheckpointConfig as CheckpointConfig
    from spark_vl.config import DataConfig as DataConfig
    from spark_vl.config import DistributedConfig as DistributedConfig
    from spark_vl.config import EvalConfig as EvalConfig
    from spark_vl.config import EvaluationConfig as EvaluationConfig
    from spark_vl.config import JudgeConfig as JudgeConfig
    from spark_vl.config import LoggingConfig as LoggingConfig
    from spark_vl.config import LoraConfig as LoraConfig
    from spark_vl.config import ModelConfig as ModelConfig
    from spark_vl.config import ObjectiveConfig as ObjectiveConfig
    from spark_vl.config import OptimizerConfig as OptimizerConfig
    from spark_vl.config import PromptConfig as PromptConfig
    from spark_vl.config import PublishConfig as PublishConfig
    from spark_vl.config import RecycleConfig as RecycleConfig
    from spark_vl.config import RolloutConfig as RolloutConfig
    from spark_vl.config import SelfJudgeConfig as SelfJudgeConfig
    from spark_vl.config import TrainConfig as TrainConfig
    from spark_vl.config import VerifierConfig as VerifierConfig
    from spark_vl.config_cli import parse_train_config as parse_train_config
    from spark_vl.data.recipes import Recipe as Recipe
    from spark_vl.data.recipes import load_recipe as load_recipe
    from spark_vl.data.recipes import recipes as recipes
    from spark_vl.evaluation import Evaluator as Evaluator
    from spark_vl.evaluation import evaluate_checkpoint as evaluate_checkpoint
    from spark_vl.prompts import Templater as Templater
    from spark_vl.records import BadRecordError as BadRecordError
    from spark_vl.records import ImageRef as ImageRef
    from spark_vl.records import ImageSize as ImageSize
    from spark_vl.records import Message as Message
    from spark_vl.records import Origin as Origin
    from spark_vl.records import PromptRecord as PromptRecord
    from spark_vl.records import RecycledRecord as RecycledRecord
    from spark_vl.records import Rollout as Rollout
    from spark_vl.records import RolloutGroup as RolloutGroup
    from spark_vl.records import Verdict as Verdict
    from spark_vl.reward import GenerativeReward as GenerativeReward
    from spark_vl.reward import Judgment as Judgment
    from spark_vl.reward import Ranking as Ranking
    from spark_vl.reward import Reply as Reply
    from spark_vl.run.sinks import Sink as Sink
    from spark_vl.setup import load_trainer as load_trainer
    from spark_vl.trainer import Trainer as Trainer
    from spark_vl.verifiers import as_trl_reward as as_trl_reward
    from spark_vl.verifiers import verify as verify

PUBLIC = {
    module: tuple(names.split())
    for module, names in {
        "spark_vl.config": """
            CheckpointConfig DataConfig DistributedConfig EvalConfig EvaluationConfig JudgeConfig LoggingConfig
            LoraConfig ModelConfig ObjectiveConfig OptimizerConfig PromptConfig PublishConfig RecycleConfig
            RolloutConfig SelfJudgeConfig TrainConfig VerifierConfig""",
        "spark_vl.config_cli": "parse_train_config",
        "spark_vl.cli": "train",
        "spark_vl.setup": "load_trainer",
        "spark_vl.trainer": "Trainer",
        "spark_vl.run.sinks": "Sink",
        "spark_vl.reward": "GenerativeReward Judgment Ranking Reply",
        "spark_vl.evaluation": "Evaluator evaluate_checkpoint",
        "spark_vl.answers": "last_boxed",
        "spark_vl.verifiers": "as_trl_reward verify",
        "spark_vl.data.recipes": "Recipe load_recipe recipes",
        "spark_vl.prompts": "Templater",
        "spark_vl.records": """
            BadRecordError ImageRef ImageSize Message Origin PromptRecord RecycledRecord Rollout RolloutGroup
            Verdict""",
    }.items()
}
"""Module → the names of the public API that it defines."""

_HOMES = {name: module for module, names in PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
