"""Shaping terms: what is added to a reward for how a completion is written, whether or not it is right.

A recipe gives each its weight next to that of the verifier: `verifier: {math: 1.0, format: 0.1, overlong: 0.5}`. The
score of a verdict, by which answers are recycled and evaluated, never changes. Weights are not negative: a term that
discourages something has negative values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spark_vl.records import Rollout, Verdict

Term = Callable[[Rollout, Verdict, int | None], float]
"""(completion, its verdict, limit on its new tokens or None if unknown) → value in [-1, 1]."""

OVERLONG_SHARE = 0.2
"""The last part of the limit on new tokens, in which length is punished (L_cache / L_max in DAPO)."""
NGRAM = 20
"""Tokens in a passage that counts as repeated: so many that sound reasoning seldom repeats one."""


def format_term(rollout: Rollout, verdict: Verdict, max_new_tokens: int | None) -> float:
    """1 if the completion ended by itself and holds an answer that its verifier can read, right or wrong; else 0."""
    return float(rollout.finish_reason == "stop" and verdict.status != "unparsable")


def overlong_term(rollout: Rollout, verdict: Verdict, max_new_tokens: int | None) -> float:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), in [-1, 0].

    0 up to 80% of `max_new_tokens`, from there linearly to -1 at the limit.

    Raises:
        ValueError: the limit is not known.
    """
    if max_new_tokens is None:
        raise ValueError("the shaping term overlong needs the limit on new tokens")
    cache = OVERLONG_SHARE * max_new_tokens
    return max(-1.0, min(0.0, (max_new_tokens - cache - len(rollout.token_ids)) / cache))


def repetition_term(rollout: Rollout, verdict: Verdict, max_new_tokens: int | None) -> float:
    """Minus the share of the completion's passages of `NGRAM` tokens that occurred in it before, in (-1, 0]."""
    tokens = rollout.token_ids
    passages = list(zip(*(tokens[i:] for i in range(NGRAM)), strict=False))
    return len(set(passages)) / len(passages) - 1 if passages else 0.0


SHAPING: Mapping[str, Term] = {"format": format_term, "overlong": overlong_term, "repetition": repetition_term}
"""By name."""
