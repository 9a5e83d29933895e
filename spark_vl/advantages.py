"""Group rewards → advantages: how much better each completion did than the others of its group."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(rewards: Sequence[float], *, normalize: bool) -> list[float]:
    """Rewards of one group, [G] → advantages, [G], which add up to zero.

    A group whose rewards are all equal gets exact zeros: it says nothing about which completion is better.

    Args:
        rewards: scores of the G completions of one prompt.
        normalize: divide by the group's standard deviation + 1e-4, as GRPO does (arXiv 2402.03300, §4.1.2); it is
            the sample deviation (Bessel's correction), the one that TRL's `GRPOTrainer` takes. Dr. GRPO (arXiv
            2503.20783, §3.2) does not divide, so as not to favor prompts that are nearly solved or nearly hopeless.
    """
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = stdev(rewards) + 1e-4 if normalize else 1.0
    return [(reward - mean) / scale for reward in rewards]
