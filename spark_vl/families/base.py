"""What a model family is to the rest of the kit.

A `Family` knows the model's modules: how to run a pack, a prefill and a decoding step. The `Processor` that it loads
turns records into inputs. A step decodes, resizes and tokenizes nothing twice: a processor is called once for each
prompt, and the rollout engine and the policy update share its result.

Shapes: T tokens, B prompts, S tokens of the longest, R rows being decoded, H hidden values. Position ids have the
family's own leading dimensions (`...`): time, height and width, or none where positions count tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache, PreTrainedModel

from spark_vl.config import ModelConfig
from spark_vl.records import ImageSize, PromptRecord


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One image as a vision tower takes it. Prompts that show the same image share one object."""

    pixel_values: Tensor
    """[P, D] float32: P patches of D values."""
    grid_thw: Tensor
    """[3] int64: patches along time (1), height and width; T·H·W = P."""
    tokens: int
    """Features that the vision tower makes of it, and so image tokens in the prompt."""
    size: ImageSize
    """Before and after resizing."""
    resized: Image
    """RGB, as the patches were cut from it: for an engine that makes its own."""

    @property
    def nbytes(self) -> int:
        """Of memory, about."""
        width, height = self.resized.size
        return self.pixel_values.nbytes + 3 * width * height


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelInputs:
    """One prompt as a language model takes it."""

    input_ids: Tensor
    """[T] int64, with as many image tokens as the vision tower makes features."""
    position_ids: Tensor
    """[..., T] int64: rotary positions."""
    images: tuple[ProcessedImage, ...]

    @property
    def next_position(self) -> int:
        """Rotary position of the first completion token (the same in all components)."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class ProcessedPrompt(ModelInputs):
    """A record with its inputs."""

    record: PromptRecord
    """With what processing found out: `image_sizes` and `coordinates`."""


class Prompts(Protocol):
    """Turns records into prompts."""

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """The inputs of `record`.

        Raises:
            BadRecordError: the record cannot be used, for a reason in the record.
        """

    def forget_images(self) -> None:
        """Drop the decoded images, which prompts share until then: called at the end of a step or an evaluation."""


class Processor(Prompts, Protocol):
    """Turns records into inputs, and tokens back into text."""

    commit: str | None
    """Commit of the Hub that it was loaded from; None: it was in a folder."""
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    """Tokens that end a completion: those of the generation configuration, and the end of a turn in the chat."""
    suppressed_token_ids: tuple[int, ...]
    """Tokens that are never sampled: a vision token in a completion would corrupt the next forward pass."""
    padding: ModelInputs
    """What a process runs that has nothing to do, so that all processes make the same calls. With a vision tower it is
    the smallest image, all zeros, and nothing else; packs without an image get it too."""

    def unexpanded(self, prompt: ProcessedPrompt) -> list[int]:
        """The tokens of a prompt, with one token for each image: for an engine that expands them itself."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a part of a completion."""

    def answer_start(self, text: str) -> int:
        """Where in the `text` of a completion its answer begins: see `Rollout.answer_start`."""

    def render(self, prompt: ProcessedPrompt) -> str:
        """The text of a prompt with its special tokens; the tokens of an image as `<token>×N`."""

    def save(self, folder: Path) -> None:
        """Write the Hugging Face processor's files into `folder`."""


class Family(Protocol):
    """The models of one `model_type`.

    Rotary positions are always given: a model that is left to find them may take them from its previous call.
    """

    reserved: tuple[str, ...]
    """Texts that are or begin a special token, which no quotation may contain (see `Templater`)."""
    model_class: Any
    """Class of transformers whose `from_pretrained` loads the model."""
    adapter_targets: str
    """Regular expression for the names of the layers that low-rank adapters go to."""

    def load_processor(self, config: ModelConfig, *, max_prompt_tokens: int) -> Processor:
        """The processor that lies beside the weights of `config.path`; it refuses longer prompts.

        Raises:
            ConfigError: a file is missing or cannot be read.
        """

    def freeze_vision(self, model: PreTrainedModel) -> None:
        """Leave the vision tower out of the training."""

    def hidden_states(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor | BlockMask,
        images: Sequence[ProcessedImage],
    ) -> Tensor:
        """The last hidden states [T, H] of one packed sequence.

        Args:
            input_ids: [1, T]
            position_ids: [..., 1, T]
            mask: who sees whom, see `packing.attention_mask`.
            images: those that the sequence shows, in order.
        """

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        images: Sequence[ProcessedImage],
        shown: Sequence[int],
    ) -> tuple[Tensor, DynamicCache]:
        """Run prompts that are padded on the left: the hidden state [B, H] of each last token, and the cache.

        Args:
            input_ids: [B, S]
            position_ids: [..., B, S]
            mask: [B, S] 1 for tokens, 0 for padding.
            images: to run through the vision tower, each once.
            shown: index into `images` of each image of the prompts, in order. Empty where the vision tower runs only
                because other processes run theirs.
        """

    def decode(
        self, model: PreTrainedModel, token_R: Tensor, position_R: Tensor, mask_RS: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run one more token of each row: its hidden state [R, H]. The cache grows by it."""
