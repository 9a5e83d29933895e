"""Objectives over packed tokens: clipped surrogate, KL to the reference, entropy bonus.

Shapes: N tokens of R whole completions, in one flat list; `row[n]` says which completion token n belongs to. A
completion is never cut over two packs. Every token carries a weight that is normalized over the *whole optimizer
step* (`StepTotals`), so the loss of a pack is a plain sum, the loss of a step is the sum over its packs and ranks,
and the cut into packs changes neither loss nor gradient.

| objective | ratio | a token weighs, in the completion r | source |
|---|---|---|---|
| grpo | token | weight_r / (length_r · completions) | arXiv 2402.03300, eq. 3 |
| dr_grpo | token | weight_r / (max_new_tokens · completions) | arXiv 2503.20783, §3.2 |
| dapo | token | weight_r / tokens | arXiv 2503.14476, eq. 8 |
| gspo | whole completion | weight_r / (length_r · completions) | arXiv 2507.18071, eq. 5 and 7 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["grpo", "dr_grpo", "dapo", "gspo"]


@dataclass(frozen=True)
class StepTotals:
    """What an optimizer step holds in all its packs on all ranks, padding not counted."""

    completions: int
    tokens: int
    """Completion tokens."""
    max_new_tokens: int
    """Longest completion that sampling allows."""


def token_weights(objective: Objective, lengths: Tensor, weights: Tensor, totals: StepTotals) -> Tensor:
    """[R] the weight of each token of completion r in the loss (table above).

    Args:
        objective: one of `Objective`.
        lengths: [R] tokens of each completion.
        weights: [R] weight of each completion: that of its prompt kind, 0 for padding.
        totals: of the optimizer step.

    Raises:
        ValueError: unknown objective.
    """
    match objective:
        case "grpo" | "gspo":
            return weights / (lengths.clamp(min=1) * totals.completions)
        case "dr_grpo":
            return weights / (totals.max_new_tokens * totals.completions)
        case "dapo":
            return weights / totals.tokens
    raise ValueError(f"objective: found {objective!r}, allowed are grpo, dr_grpo, dapo, gspo")


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N] estimate of KL(policy ‖ reference) at each sampled token: unbiased and never negative.

    Source: J. Schulman, "Approximating KL divergence" (2020), the estimator k3.
    """
    log_ratio = ref_logprobs - logprobs
    # Near the reference exp(x) - 1 - x is nothing but rounding: 5e-9 for a ratio of 1.0001, where float32 has 6e-8.
    return log_ratio.expm1() - log_ratio


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, clip: float) -> Tensor:
    """[N] how much likelier each token is under the policy that is trained than where it was sampled, at most `clip`.

    Both stand for the same weights, but an engine with kernels of its own samples from a slightly different policy.
    Truncated importance sampling makes up for it. Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training" (2025).

    Args:
        logprobs: [N] under the weights that sampled, as the trainer computes them.
        sampler_logprobs: [N] as the engine gave them.
    """
    return (logprobs.detach() - sampler_logprobs).exp().clamp(max=clip)


def policy_loss(
    objective: Objective,
    logprobs: Tensor,
    advantages: Tensor,
    row: Tensor,
    weights: Tensor,
    totals: StepTotals,
    *,
    clip_low: float,
    clip_high: float,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    entropies: Tensor | None = None,
    entropy_bonus: float = 0.0,
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of one pack in the loss of the optimizer step, and what to log of it.

    loss = Σ_n w_n · (−min(ratio·A, clip(ratio)·A) + beta · k3 − entropy_bonus · entropy)

    Data parallelism that *averages* gradients over ranks asks for the loss times the number of ranks.

    Args:
        objective: one of `Objective`.
        logprobs: [N] float32 or wider, with gradient.
        advantages: [R]
        row: [N] int64, the completion of each token, 0..R-1.
        weights: [R] weight of each completion: that of its prompt kind, 0 for padding.
        totals: of the optimizer step.
        clip_low: the ratio counts down to 1 - clip_low,
        clip_high: and up to 1 + clip_high. GSPO's ratio is a geometric mean: its clips are 100 times narrower.
        old_logprobs: [N] under the policy that sampled; None says that it is this one, and the ratio is exactly 1.
        ref_logprobs: [N] under the reference policy; needed where `beta` is not 0.
        beta: coefficient of the KL term.
        entropies: [N] of the next-token distributions, with gradient; needed where `entropy_bonus` is not 0.
        entropy_bonus: coefficient of the entropy bonus.
        importance: [N] `importance_weights` of the tokens, where another program than this one sampled them. They
            weight the policy gradient, not the KL term.

    Returns:
        The loss, a scalar, and detached sums over the tokens of each completion, each [R]: `tokens`, `ratio`,
        `clipped_low`, `clipped_high` and, where given, `kl` and `entropy`. They add up over completions and packs;
        divided by the sum of `tokens` they are means, over everything or over the completions of one kind.
    """
    n_rows = len(advantages)
    lengths = torch.bincount(row, minlength=n_rows)

    def per_row(values: Tensor) -> Tensor:
        """Sums of [N] over the tokens of each completion: [R]."""
        return torch.zeros(n_rows, dtype=values.dtype, device=values.device).index_add(0, row, values)

    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)
    if objective == "gspo":
        log_ratio = (per_row(log_ratio) / lengths.clamp(min=1))[row]
    ratio = log_ratio.exp()
    advantage = advantages[row]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if importance is not None:
        loss = importance * loss

    sums = {
        "tokens": lengths.to(logprobs.dtype),
        "ratio": per_row(ratio.detach()),
        "clipped_low": per_row(((ratio < 1 - clip_low) & (advantage < 0)).to(logprobs.dtype)),
        "clipped_high": per_row(((ratio > 1 + clip_high) & (advantage > 0)).to(logprobs.dtype)),
    }
    if ref_logprobs is not None:
        kl = k3(logprobs, ref_logprobs)
        loss = loss + beta * kl
        sums["kl"] = per_row(kl.detach())
    elif beta:
        raise ValueError(f"beta: {beta} needs ref_logprobs")
    if entropies is not None:
        loss = loss - entropy_bonus * entropies
        sums["entropy"] = per_row(entropies.detach())
    elif entropy_bonus:
        raise ValueError(f"entropy_bonus: {entropy_bonus} needs entropies")
    return (token_weights(objective, lengths, weights, totals)[row] * loss).sum(), sums
