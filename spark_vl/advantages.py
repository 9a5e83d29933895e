"""Group rewards → advantages: how much better each completion did than the others of its group."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(rewards: Sequence[float], correctness: Sequence[float], *, normalize: bool) -> list[float]:
    """Rewards of one group, [G] → advantages, [G], which add up to zero.

    A group whose rewards are all equal gets exact zeros: it says nothing about which completion is better.

    What is divided by is the deviation of the correctness alone. Where all are right, or all are wrong, the rewards
    differ by their shaping terms, and dividing by that deviation would make a hundredth of a point of format or length
    count as much as right and wrong do elsewhere. So nothing is divided where the correctness varies less than the
    shaping does: the terms then count as much as their weights say.

    Args:
        rewards: of the G completions of one prompt, shaping terms included (`RolloutGroup.rewards`).
        correctness: [G] the rewards without shaping terms (`RolloutGroup.correctness`).
        normalize: divide by the standard deviation + 1e-4, as GRPO does (arXiv 2402.03300, §4.1.2); it is the sample
            deviation (Bessel's correction), the one that TRL's `GRPOTrainer` takes. Dr. GRPO (arXiv 2503.20783, §3.2)
            does not divide, so as not to favor prompts that are nearly solved or nearly hopeless.
    """
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    scale = 1.0
    if normalize:
        shaping = [reward - right for reward, right in zip(rewards, correctness, strict=True)]
        deviation = stdev(correctness)
        scale = deviation + 1e-4 if deviation > stdev(shaping) else 1.0
    return [(reward - mean) / scale for reward in rewards]
