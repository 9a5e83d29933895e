"""Qwen2.5-VL: `qwen-vl-utils` resizes, the Hugging Face processor normalizes and tokenizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from qwen_vl_utils.vision_process import fetch_image
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PretrainedConfig, ProcessorMixin
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.data.images import ImageError, load_image
from spark_vl.families.base import ProcessedImage, ProcessedPrompt
from spark_vl.records import BadRecordError, ImageRef, ImageSize, PromptRecord

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def load_processor(config: ModelConfig, *, max_prompt_tokens: int) -> QwenVLProcessor:
    """The processor that lies beside the weights of `config.path`.

    Raises:
        ConfigError: there is no whole checkpoint, or it is of another model family.
    """
    hf_config = _load(AutoConfig, config)
    if hf_config.model_type != "qwen2_5_vl":
        raise ConfigError(f"model.path: {config.path} holds a {hf_config.model_type!r} model; allowed is 'qwen2_5_vl'")
    return QwenVLProcessor(
        _load(AutoProcessor, config),
        hf_config,
        _load(GenerationConfig, config),
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        max_prompt_tokens=max_prompt_tokens,
        commit=_commit(config),
    )


def _commit(config: ModelConfig) -> str | None:
    """The commit that was just loaded: the folder of the cache that the files are in bears its name."""
    if Path(config.path).exists():
        return None
    file = try_to_load_from_cache(config.path, "config.json", revision=config.revision or "main")
    return Path(file).parent.name


def _load(part: Any, config: ModelConfig) -> Any:
    try:
        return part.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError) as error:  # ValueError: of a family that transformers does not know
        raise ConfigError(f"model.path: {config.path} cannot be loaded ({part.__name__}): {error}") from error


class QwenVLProcessor:
    """`Processor` of Qwen2.5-VL.

    Args:
        processor: the Hugging Face processor.
        config: the model's configuration.
        generation_config: names the stop tokens.
        min_pixels, max_pixels: images are resized, ratio kept, to sides that are multiples of 28 and an area in
            between.
        max_prompt_tokens: longer prompts are refused.
        commit: see `Processor`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        *,
        min_pixels: int,
        max_pixels: int,
        max_prompt_tokens: int,
        commit: str | None = None,
    ) -> None:
        self.hf = processor
        self.commit = commit
        self.min_pixels, self.max_pixels, self.max_prompt_tokens = min_pixels, max_pixels, max_prompt_tokens
        self.image_token_id: int = config.image_token_id
        self.pad_token_id: int = processor.tokenizer.pad_token_id
        stop = generation_config.eos_token_id
        self.stop_token_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        vocabulary = processor.tokenizer.get_vocab()
        self.suppressed_token_ids = tuple(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)
        # Rotary positions come from the library's own model code; on the meta device it holds no weights.
        with torch.device("meta"):
            self._positions = Qwen2_5_VLModel(config)
        image_processor = processor.image_processor
        self._patch, self._merge = image_processor.patch_size, image_processor.merge_size
        self._images: dict[ImageRef, ProcessedImage] = {}
        width = 3 * image_processor.temporal_patch_size * self._patch**2
        side = 2 * self._merge
        pixels = (side * self._patch, side * self._patch)
        self.dummy_image = ProcessedImage(
            torch.zeros(side**2, width), torch.tensor([1, side, side]), tokens=4, size=ImageSize(pixels, pixels)
        )

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """See `Processor.process`."""
        images = tuple(self._image(ref, record.id) for ref in record.images)
        chat = self.hf.apply_chat_template(
            [_chat_message(m) for m in record.messages], tokenize=False, add_generation_prompt=True
        )
        # The chat template writes one image token for each image; the vision tower gives one feature for each merged
        # patch.
        pieces = chat.split(self.hf.image_token)
        if len(pieces) != len(images) + 1:
            raise BadRecordError(record.id, f"the chat holds {len(pieces) - 1} image tokens for {len(images)} images")
        text = pieces[0] + "".join(
            self.hf.image_token * image.tokens + piece for image, piece in zip(images, pieces[1:], strict=True)
        )
        ids = self.hf.tokenizer(text, return_tensors="pt")["input_ids"][0]
        is_image = ids == self.image_token_id
        features = sum(image.tokens for image in images)
        if int(is_image.sum()) != features:
            raise BadRecordError(record.id, f"{int(is_image.sum())} image tokens for {features} image features")
        if len(ids) > self.max_prompt_tokens:
            raise BadRecordError(
                record.id,
                f"the prompt has {len(ids)} tokens, {features} of them of images; at most {self.max_prompt_tokens} are "
                "allowed (data.max_prompt_tokens, model.max_pixels)",
            )
        positions, _ = self._positions.get_rope_index(
            ids[None],
            image_grid_thw=torch.stack([image.grid_thw for image in images]) if images else None,
            mm_token_type_ids=is_image[None].int(),
        )
        record = replace(record, image_sizes=tuple(image.size for image in images))
        return ProcessedPrompt(record, ids, positions[:, 0], images)

    def forget_images(self) -> None:
        """See `Processor.forget_images`."""
        self._images.clear()

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Processor.decode`."""
        return self.hf.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """See `Processor.save`. What is saved resizes as this does: the limits of the base model may be far away."""
        saved = copy.deepcopy(self.hf)
        saved.image_processor.size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        saved.save_pretrained(folder)

    def _image(self, ref: ImageRef, record_id: str) -> ProcessedImage:
        if ref not in self._images:
            try:
                decoded = load_image(ref)
            except ImageError as error:
                raise BadRecordError(record_id, f"image {ref}: {error}") from error
            try:
                resized = fetch_image(
                    {"image": decoded, "min_pixels": self.min_pixels, "max_pixels": self.max_pixels},
                    image_patch_size=self._patch,
                )
            except ValueError as error:  # a long and narrow image, of which too little height would be left
                raise BadRecordError(
                    record_id,
                    f"image {ref}: {decoded.width}×{decoded.height} cannot be resized to {self.min_pixels} to "
                    f"{self.max_pixels} pixels (model.min_pixels, model.max_pixels): {error}",
                ) from error
            # No second resize: the processor's own pixel budget need not be ours.
            inputs = self.hf.image_processor(images=[resized], do_resize=False, return_tensors="pt")
            grid_thw = inputs["image_grid_thw"][0]
            _, height, width = (self._patch * int(side) for side in grid_thw)
            self._images[ref] = ProcessedImage(
                inputs["pixel_values"],
                grid_thw,
                tokens=int(grid_thw.prod()) // self._merge**2,
                size=ImageSize(decoded.size, (width, height)),
            )
        return self._images[ref]


def _chat_message(message: Any) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content
        ],
    }
