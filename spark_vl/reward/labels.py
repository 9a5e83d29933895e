"""How probable a verdict was: the probability of each label where the reply says one, behind the same rationale."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spark_vl.answers import last_box, match_label
from spark_vl.config import OptimizerConfig
from spark_vl.families.base import ModelInputs, ProcessedPrompt, Processor
from spark_vl.policy.packing import PackItem, pack_items
from spark_vl.policy.policy import Policy
from spark_vl.records import Rollout


@dataclass(frozen=True)
class Alternatives:
    """What a reply could have said where it says its label."""

    before: ModelInputs
    """The prompt and the reply up to the last token that ends at or before the label."""
    labels: tuple[list[int], ...]
    """The tokens of each label, in the prompt's order and spelled as the reply spells its own, with what the tokens of
    `before` leave out in front of it (`\\boxed{Yes` may have the token `{Yes`)."""


def alternatives(prompt: ProcessedPrompt, rollout: Rollout, processor: Processor) -> Alternatives | None:
    """Those of one reply to a judgment's prompt. None: its last box says none of the labels."""
    labels, text = prompt.record.choices, rollout.text
    if (place := _place(rollout.answer_text, labels)) is None:
        return None
    start, end = (rollout.answer_start + offset for offset in place)
    ids = rollout.token_ids

    def decoded(n: int) -> str:
        return processor.decode(ids[:n])

    # The longest run of tokens that ends before the label. A run that ends within a character decodes to another one.
    kept = bisect_right(range(len(ids) + 1), start, key=lambda n: len(decoded(n))) - 1
    while not text.startswith(decoded(kept)):
        kept -= 1
    between = text[len(decoded(kept)) : start]
    tokens = torch.tensor([*prompt.input_ids.tolist(), *ids[:kept]])
    behind = torch.arange(kept) + prompt.next_position
    positions = torch.cat([prompt.position_ids, behind.expand(*prompt.position_ids.shape[:-1], kept)], dim=-1)
    spelled = [processor.encode(between + _like(text[start:end], label)) for label in labels]
    return Alternatives(ModelInputs(input_ids=tokens, position_ids=positions, images=prompt.images), tuple(spelled))


@torch.no_grad()
def label_probabilities(policy: Policy, asked: Sequence[Alternatives], *, padding: ModelInputs) -> list[list[float]]:
    """For each reply the probabilities of its labels, which sum to 1: a softmax over the log-probabilities of the
    labels' tokens. One packed forward pass scores both labels of many replies.

    Args:
        padding: see `Processor.padding`.
    """
    rows = [range(2 * i, 2 * i + 2) for i in range(len(asked))]
    items = [PackItem(each.before, each.labels, of_reply) for each, of_reply in zip(asked, rows, strict=True)]
    device = policy.suppressed.device
    logprobs = torch.zeros(2 * len(asked), dtype=torch.float64)
    tokens_per_pack = max([OptimizerConfig.tokens_per_pack, *(item.tokens for item in items)])
    for pack in pack_items(items, tokens_per_pack=tokens_per_pack, padding=padding):
        scores = policy(pack.to(device)).logprobs
        logprobs.index_add_(0, pack.row_N, scores.double().cpu())
    return logprobs.view(-1, 2).softmax(-1).tolist()


def _place(reply: str, labels: tuple[str, ...]) -> tuple[int, int] | None:
    """Where the label starts and ends that the last box of `reply` says."""
    label, box = match_label(reply, labels), last_box(reply)
    if label is None or box is None:
        return None
    written = re.compile(rf"(?<![A-Za-z]){re.escape(label)}(?![A-Za-z])", re.IGNORECASE)
    found = written.search(reply, *box)
    return found and found.span()


def _like(said: str, label: str) -> str:
    """`label` in small letters or capitals, as `said` is."""
    return label.lower() if said.islower() else label.upper() if said.isupper() else label
