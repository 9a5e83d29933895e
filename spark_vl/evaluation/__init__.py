"""Held-out evaluation of one model as policy, as judge and in test-time reflection."""

from spark_vl.evaluation.checkpoint import evaluate_checkpoint
from spark_vl.evaluation.evaluator import Evaluator
from spark_vl.evaluation.figures import score, wilson
from spark_vl.evaluation.rescore import rescore, rescore_folder

__all__ = ["Evaluator", "evaluate_checkpoint", "rescore", "rescore_folder", "score", "wilson"]
