"""What a processor gives, whatever the model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from spark_vl.records import ImageSize, PromptRecord


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One image as a vision tower takes it. Prompts that show the same image share one object."""

    pixel_values: torch.Tensor
    """[P, D] float32: P patches of D values."""
    grid_thw: torch.Tensor
    """[3] int64: patches along time (1), height and width; T·H·W = P."""
    tokens: int
    """Features that the vision tower makes of it, and so image tokens in the prompt."""
    size: ImageSize
    """Before and after resizing, which verifiers of coordinates need."""


@dataclass(frozen=True, eq=False)
class ProcessedPrompt:
    """One prompt as a language model takes it."""

    record: PromptRecord | None
    """None: padding, which is nobody's prompt."""
    input_ids: torch.Tensor
    """[T] int64, with as many image tokens as the vision tower gives features."""
    position_ids: torch.Tensor
    """[3, T] int64: multimodal rotary positions (time, height, width)."""
    images: tuple[ProcessedImage, ...]

    @property
    def next_position(self) -> int:
        """Rotary position of the first completion token (the same in all three components)."""
        return int(self.position_ids.max()) + 1


class Processor(Protocol):
    """Turns records into inputs, and tokens back into text."""

    commit: str | None
    """Commit of the Hub that it was loaded from; None: it was in a folder."""
    image_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    suppressed_token_ids: tuple[int, ...]
    """Vision tokens, which are never sampled: one in a completion would corrupt the next forward pass."""
    dummy_image: ProcessedImage
    """The smallest image, all zeros: lets a batch without images run the vision tower."""

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """The inputs of `record`.

        Raises:
            BadRecordError: the record cannot be used, for a reason in the record.
        """

    def forget_images(self) -> None:
        """Drop the decoded images of this step."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""

    def save(self, folder: Path) -> None:
        """Write the Hugging Face processor's files into `folder`."""


def padding_prompt(processor: Processor) -> ProcessedPrompt:
    """The dummy image alone. A process that has nothing left to do runs it, so that all make the same calls."""
    image = processor.dummy_image
    return ProcessedPrompt(
        record=None,
        input_ids=torch.full((image.tokens,), processor.image_token_id),
        position_ids=torch.arange(image.tokens).expand(3, -1),
        images=(image,),
    )
