"""Rollout engines: sample groups of completions from the policy."""

from spark_vl.rollout.engine import RolloutEngine, Sampling
from spark_vl.rollout.transformers_engine import TransformersEngine, load_engine

__all__ = ["RolloutEngine", "Sampling", "TransformersEngine", "load_engine"]
