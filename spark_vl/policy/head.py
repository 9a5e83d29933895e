"""The output layer that scores given tokens without ever holding a [T, vocabulary] tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Elements of the largest logits tensor (256 MiB in float32): 440 tokens of a vocabulary of 152k words."""


class TokenScores(NamedTuple):
    """The policy's scores of given tokens."""

    logprobs: torch.Tensor
    """[N] natural-log probabilities, float32 (float64 for a float64 model)."""
    entropy: torch.Tensor
    """[N] entropy of the distribution that each token was drawn from, in nats. A loss that leaves it out (rather than
    weighing it with 0) would keep two tensors of the size of the logits for each chunk: the checkpoint is not unpacked
    where no gradient arrives."""


class ScoringHead(nn.Linear):
    """A model's `lm_head` that, given targets, returns their log-probabilities instead of logits.

    The loop over chunks is inside this one module's forward: under ZeRO-3 every *module call* is a collective, and
    ranks have different numbers of chunks.
    """

    def forward(  # type: ignore[override]  # nn.Linear takes and returns a tensor only
        self,
        hidden: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        temperature: float = 1.0,
        suppressed: torch.Tensor | None = None,
    ) -> torch.Tensor | TokenScores:
        """Logits [..., V] of `hidden` [..., H]; or, with `target` [N], the `TokenScores` of `hidden` [N, H].

        `suppressed` [S] are token ids with probability 0; logits are divided by `temperature`, as in sampling.
        """
        if target is None:
            return super().forward(hidden)
        rows = max(1, LOGITS_AT_ONCE // self.out_features)
        chunks = [
            checkpoint(self._score, h, t, temperature, suppressed, use_reentrant=False)
            for h, t in zip(hidden.split(rows), target.split(rows), strict=True)
        ]
        return TokenScores(*(torch.cat(part) for part in zip(*chunks, strict=True)))

    def _score(
        self, hidden: torch.Tensor, target: torch.Tensor, temperature: float, suppressed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, self.weight, self.bias)
        logp = torch.log_softmax(sampling_logits(logits, temperature, suppressed), dim=-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, target[:, None])[:, 0], entropy


def sampling_logits(logits: torch.Tensor, temperature: float, suppressed: torch.Tensor | None) -> torch.Tensor:
    """[..., V] logits, at least float32, of the distribution that completions are drawn from: sampling and training
    share it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if suppressed is not None:
        # Finite, so that 0 · log 0 in the entropy is 0.
        logits = logits.index_fill(-1, suppressed, torch.finfo(logits.dtype).min / 2)
    return logits
