"""Rollout engines sample groups of completions from the policy; the collector has them verified."""

from spark_vl.rollout.collect import Collector
from spark_vl.rollout.engine import RolloutEngine, Sampling
from spark_vl.rollout.transformers_engine import TransformersEngine, load_engine

__all__ = ["Collector", "RolloutEngine", "Sampling", "TransformersEngine", "load_engine"]
