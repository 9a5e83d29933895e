"""Verifiers, `(completion, record) -> Verdict`, and the pool of processes that runs them under a deadline."""

from spark_vl.verifiers.base import VERIFIERS, Verifier, boxed_gold, get_verifier
from spark_vl.verifiers.golds import check_golds
from spark_vl.verifiers.groups import verify_groups
from spark_vl.verifiers.pool import VerifierPool
from spark_vl.verifiers.reward_function import as_trl_reward
from spark_vl.verifiers.standalone import verify

__all__ = [
    "VERIFIERS",
    "Verifier",
    "VerifierPool",
    "as_trl_reward",
    "boxed_gold",
    "check_golds",
    "get_verifier",
    "verify",
    "verify_groups",
]
