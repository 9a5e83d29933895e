"""Rollout engines sample groups of completions from the policy; the collector has them verified."""

from spark_vl.rollout.collect import Collector
from spark_vl.rollout.engine import EngineError, PromptsRefusedError, RolloutEngine, Sampler, Sampling
from spark_vl.rollout.load import Loaded, load_engine, load_sampler
from spark_vl.rollout.openai_engine import OpenAIEngine, RemotePrompts
from spark_vl.rollout.transformers_engine import TransformersEngine

__all__ = [
    "Collector",
    "EngineError",
    "Loaded",
    "OpenAIEngine",
    "PromptsRefusedError",
    "RemotePrompts",
    "RolloutEngine",
    "Sampler",
    "Sampling",
    "TransformersEngine",
    "load_engine",
    "load_sampler",
]
