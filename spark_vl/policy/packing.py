"""Group packing: the G completions of a prompt share one copy of it, and of its images.

A padded trainer runs the vision tower and the prompt once for each completion. Here a group is one sequence,

    [prompt][completion 1]...[completion G]

in which each completion sees the prompt and itself, and has the rotary positions that it would have right behind the
prompt. Several short groups share a pack; a long one is cut into packs that repeat the prompt. The hidden state of
the prompt's last token predicts the first token of every completion. The loss is normalized over the whole optimizer
step, so where packs are cut changes no gradient.

Shapes: T tokens of a pack, N completion tokens (each is a target). Position ids have the leading dimensions (`...`) of
the model family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from spark_vl.families.base import ModelInputs, ProcessedImage, ProcessedPrompt

PROMPT = -1


@dataclass(frozen=True)
class PackItem:
    """A prompt and some of its completions, which stay together."""

    prompt: ModelInputs
    completions: Sequence[Sequence[int]]
    """Token ids; none is empty."""
    rows: Sequence[int]
    """Which completion of the step each is: index into the step's advantages."""

    @property
    def tokens(self) -> int:
        """Tokens that the item adds to a pack."""
        return len(self.prompt.input_ids) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Pack:
    """The input of one forward pass."""

    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[..., 1, T]"""
    item_T: torch.Tensor
    """[T] which item of the pack a token belongs to."""
    segment_T: torch.Tensor
    """[T] which completion of the item a token belongs to, or PROMPT."""
    images: tuple[ProcessedImage, ...]
    """In order. Never empty if the model has a vision tower: see `make_pack`."""
    source_N: torch.Tensor
    """[N] index in T of the token whose hidden state predicts the target."""
    target_N: torch.Tensor
    """[N] the completion tokens."""
    row_N: torch.Tensor
    """[N] which completion of the step the target belongs to."""

    def to(self, device: torch.device) -> Pack:
        """This pack with its tensors on `device`; its images, which the model family moves, stay where they are."""
        tensors = [field.name for field in fields(self) if field.name != "images"]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def pack_items(items: Sequence[PackItem], *, tokens_per_pack: int, padding: ModelInputs) -> list[Pack]:
    """Distribute `items` over packs of at most `tokens_per_pack` tokens, first fit; an item that is too long is cut.

    Args:
        padding: see `make_pack`.

    Raises:
        ValueError: a prompt with one of its completions is longer than a pack.
    """
    bins: list[list[PackItem]] = []
    free: list[int] = []
    for item in (part for whole in items for part in _cut(whole, tokens_per_pack)):
        for i, room in enumerate(free):
            if item.tokens <= room:
                bins[i].append(item)
                free[i] -= item.tokens
                break
        else:
            bins.append([item])
            free.append(tokens_per_pack - item.tokens)
    return [make_pack(content, padding=padding) for content in bins]


def _cut(item: PackItem, tokens_per_pack: int) -> list[PackItem]:
    room = tokens_per_pack - len(item.prompt.input_ids)
    parts: list[tuple[list[Sequence[int]], list[int]]] = []
    left = 0
    for completion, row in zip(item.completions, item.rows, strict=True):
        if len(completion) > room:
            name = item.prompt.record.id if isinstance(item.prompt, ProcessedPrompt) else "padding"
            raise ValueError(
                f"{name}: a prompt of {len(item.prompt.input_ids)} tokens and a completion of "
                f"{len(completion)} do not fit into optimizer.tokens_per_pack = {tokens_per_pack}"
            )
        if not parts or len(completion) > left:
            parts.append(([], []))
            left = room
        parts[-1][0].append(completion)
        parts[-1][1].append(row)
        left -= len(completion)
    return [PackItem(item.prompt, completions, rows) for completions, rows in parts]


def make_pack(items: Sequence[PackItem], *, padding: ModelInputs) -> Pack:
    """Lay `items` out in one sequence.

    A pack without an image gets that of `padding`, isolated: its tokens attend only to themselves, and nothing attends
    to them. Every pack then runs the vision tower, forward and backward, which ZeRO-3 and DDP need to be the same on
    every process. A model family without a vision tower has padding without an image.
    """
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    item_T: list[torch.Tensor] = []
    segment_T: list[torch.Tensor] = []
    source_N: list[torch.Tensor] = []
    row_N: list[torch.Tensor] = []
    images: list[ProcessedImage] = []
    length = 0

    def append(token_ids: torch.Tensor, position_ids: torch.Tensor, item: int, segment: int) -> None:
        nonlocal length
        n = len(token_ids)
        ids.append(token_ids)
        positions.append(position_ids)
        item_T.append(torch.full((n,), item))
        segment_T.append(torch.full((n,), segment))
        length += n

    for i, item in enumerate(items):
        append(item.prompt.input_ids, item.prompt.position_ids, i, PROMPT)
        images.extend(item.prompt.images)
        last_of_prompt = length - 1
        for segment, (completion, row) in enumerate(zip(item.completions, item.rows, strict=True)):
            n = len(completion)
            source_N.append(torch.tensor([last_of_prompt, *range(length, length + n - 1)]))
            row_N.append(torch.full((n,), row))
            behind = torch.arange(n) + item.prompt.next_position
            append(torch.tensor(completion), behind.expand(*item.prompt.position_ids.shape[:-1], n), i, segment)
    targets = [torch.tensor(completion) for item in items for completion in item.completions]
    if not images and padding.images:
        images.extend(padding.images)
        append(padding.input_ids, padding.position_ids, len(items), PROMPT)
    return Pack(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=-1)[..., None, :],
        item_T=torch.cat(item_T),
        segment_T=torch.cat(segment_T),
        images=tuple(images),
        source_N=torch.cat(source_N),
        target_N=torch.cat(targets),
        row_N=torch.cat(row_N),
    )


def attention_mask(pack: Pack, backend: Literal["sdpa", "flex"]) -> torch.Tensor | BlockMask:
    """Who sees whom: a token sees, at or before itself, its item's prompt and its own completion.

    Returns:
        `sdpa`: [1, 1, T, T] bool, true where attention is allowed. `flex`: the same as a block-sparse mask.
    """
    item_T, segment_T = pack.item_T, pack.segment_T

    def visible(_batch, _head, query, key):
        return (
            (key <= query)
            & (item_T[query] == item_T[key])
            & ((segment_T[key] == PROMPT) | (segment_T[key] == segment_T[query]))
        )

    length = len(item_T)
    if backend == "flex":
        return create_block_mask(visible, None, None, length, length, device=item_T.device)
    index = torch.arange(length, device=item_T.device)
    return visible(None, None, index[:, None], index[None, :])[None, None]
