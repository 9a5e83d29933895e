"""What the Qwen-VL models share.

`qwen-vl-utils` resizes images, and the Hugging Face processor normalizes and tokenizes. A vision tower makes features
of the patches, which take the places of the image tokens in the language model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from spark_vl.config import ModelConfig
from spark_vl.data.images import ImageError, load_image
from spark_vl.families.base import ModelInputs, ProcessedImage, ProcessedPrompt
from spark_vl.families.chat import QUESTION, ChatProcessor, or_config_error
from spark_vl.families.decoder import run_with_cache
from spark_vl.families.registry import load_configuration, load_part, loaded_commit
from spark_vl.records import BadRecordError, Coordinates, ImageRef, ImageSize, Message, PromptRecord

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def vision_inputs(images: Sequence[ProcessedImage], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the vision tower takes: the patches of all images [P, D], and their grids [I, 3]."""
    pixel_values = torch.cat([image.pixel_values for image in images])
    grid_thw = torch.stack([image.grid_thw for image in images])
    return pixel_values.to(device), grid_thw.to(device)


class QwenVLProcessor(ChatProcessor):
    """`Processor` of the Qwen-VL models, whose images are patches that are merged two by two.

    Args:
        processor: the Hugging Face processor.
        config: the model's configuration.
        generation_config, max_prompt_tokens, commit: see `ChatProcessor`.
        min_pixels, max_pixels: images are resized, ratio kept, to sides that are multiples of a merged patch and an
            area in between.

    Raises:
        ValueError: see `ChatProcessor`.
    """

    example = (ImageRef(data=b""), QUESTION)
    model_class: ClassVar[Any]
    """Class of transformers that computes rotary positions (`get_rope_index`)."""
    coordinates: ClassVar[Coordinates]
    """In which the model names places in an image."""

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
        super().__init__(
            processor, processor.tokenizer, generation_config, max_prompt_tokens=max_prompt_tokens, commit=commit
        )
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.image_token_id: int = config.image_token_id
        self.check_tokens("config.json: image_token_id", [self.image_token_id])
        vocabulary = self.tokenizer.get_vocab()
        self._image_token: str = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.suppressed_token_ids = tuple(vocabulary[token] for token in VISION_TOKENS if token in vocabulary)
        # Rotary positions come from the library's own model code; on the meta device it holds no weights.
        with torch.device("meta"):
            self._positions = self.model_class(config)
        image_processor = processor.image_processor
        self._patch, self._merge = image_processor.patch_size, image_processor.merge_size
        self._images: dict[ImageRef, ProcessedImage] = {}
        width = 3 * image_processor.temporal_patch_size * self._patch**2
        side = 2 * self._merge
        pixels = (side * self._patch, side * self._patch)
        image = ProcessedImage(
            torch.zeros(side**2, width),
            torch.tensor([1, side, side]),
            tokens=4,
            size=ImageSize(pixels, pixels),
            resized=Image.new("RGB", pixels),
        )
        self.padding = ModelInputs(
            input_ids=torch.full((image.tokens,), self.image_token_id),
            position_ids=torch.arange(image.tokens).expand(3, -1),  # any would do: nothing reads what comes of it
            images=(image,),
        )

    def example_parts(self) -> dict[str, str]:
        """See `ChatProcessor.example_parts`."""
        return super().example_parts() | {f"the {self._image_token} of its image": self._image_token}

    def chat_message(self, message: Message) -> dict[str, Any]:
        """See `ChatProcessor.chat_message`."""
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content
        ]
        return {"role": message.role, "content": parts}

    def process(self, record: PromptRecord) -> ProcessedPrompt:
        """See `Processor.process`."""
        images: tuple[ProcessedImage, ...] = ()
        for ref in record.images:
            images += (self._image(ref, record.id),)
            features = sum(image.tokens for image in images)
            if features > self.max_prompt_tokens:  # before more of them take memory
                raise BadRecordError(
                    record.id,
                    f"the first {len(images)} of {len(record.images)} images have {features} tokens; at most "
                    f"{self.max_prompt_tokens} are allowed (data.max_prompt_tokens, model.max_pixels)",
                )
        chat = self.chat_of(record)
        # The chat template writes one image token for each image; the vision tower makes one feature for each merged
        # patch.
        pieces = chat.split(self._image_token)
        if len(pieces) != len(images) + 1:
            raise BadRecordError(record.id, f"the chat holds {len(pieces) - 1} image tokens for {len(images)} images")
        text = pieces[0] + "".join(
            self._image_token * image.tokens + piece for image, piece in zip(images, pieces[1:], strict=True)
        )
        ids = self.tokens_of(text)
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
        grids: Any = torch.stack([image.grid_thw for image in images]) if images else None
        positions, _ = self._positions.get_rope_index(
            ids[None],
            image_grid_thw=grids,
            mm_token_type_ids=is_image[None].int(),
        )
        return ProcessedPrompt(
            record=replace(record, image_sizes=tuple(image.size for image in images), coordinates=self.coordinates),
            input_ids=ids,
            position_ids=positions[:, 0],
            images=images,
        )

    def forget_images(self) -> None:
        """See `Processor.forget_images`."""
        self._images.clear()

    def render(self, prompt: ProcessedPrompt) -> str:
        """See `Processor.render`."""
        text = super().render(prompt)
        runs = re.compile(f"(?:{re.escape(self._image_token)})+")
        return runs.sub(lambda run: f"{self._image_token}×{len(run[0]) // len(self._image_token)}", text)

    def unexpanded(self, prompt: ProcessedPrompt) -> list[int]:
        """See `Processor.unexpanded`."""
        expanded, images = prompt.input_ids.tolist(), iter(prompt.images)
        tokens: list[int] = []
        at = 0
        while at < len(expanded):
            tokens.append(expanded[at])
            at += next(images).tokens if expanded[at] == self.image_token_id else 1
        return tokens

    def save(self, folder: Path) -> None:
        """See `Processor.save`. What is saved resizes as this processor does, not as the base model's."""
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
            except ValueError as error:  # a long and narrow image, whose shorter side would vanish
                raise BadRecordError(
                    record_id,
                    f"image {ref}: {decoded.width}×{decoded.height} cannot be resized to {self.min_pixels} to "
                    f"{self.max_pixels} pixels (model.min_pixels, model.max_pixels): {error}",
                ) from error
            # Of sides up to half a merged patch the two have different rules, and the model would later be shown
            # another image than it was trained on.
            limits = self._patch * self._merge, self.min_pixels, self.max_pixels
            if resized.size[::-1] != smart_resize(decoded.height, decoded.width, *limits):
                raise BadRecordError(
                    record_id,
                    f"image {ref}: {decoded.width}×{decoded.height} is resized differently by qwen-vl-utils and by the "
                    f"exported processor; allowed: sides of more than {limits[0] // 2} pixels",
                )
            # Not resized again: the Hugging Face processor has limits of its own.
            inputs = self.hf.image_processor(images=[resized], do_resize=False, return_tensors="pt")
            grid_thw = inputs["image_grid_thw"][0]
            _, height, width = (self._patch * int(side) for side in grid_thw)
            self._images[ref] = ProcessedImage(
                inputs["pixel_values"],
                grid_thw,
                tokens=int(grid_thw.prod()) // self._merge**2,
                size=ImageSize(decoded.size, (width, height)),
                resized=resized,
            )
        return self._images[ref]


class QwenVL:
    """`Family` of a line of Qwen-VL models: a vision tower and a language model in `model.model`."""

    reserved: ClassVar[tuple[str, ...]]
    processor_class: ClassVar[type[QwenVLProcessor]]
    model_class = AutoModelForImageTextToText
    adapter_targets = r".*language_model\.layers\..*_proj"

    def load_processor(self, config: ModelConfig, *, max_prompt_tokens: int) -> QwenVLProcessor:
        """See `Family.load_processor`."""
        parts = load_part(AutoProcessor, config), load_configuration(config), load_part(GenerationConfig, config)
        return or_config_error(
            config,
            lambda: self.processor_class(
                *parts,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
                max_prompt_tokens=max_prompt_tokens,
                commit=loaded_commit(config),
            ),
        )

    def freeze_vision(self, model: PreTrainedModel) -> None:
        """See `Family.freeze_vision`; all mergers belong to the tower."""
        model.model.visual.requires_grad_(False)

    def hidden_states(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor | BlockMask,
        images: Sequence[ProcessedImage],
    ) -> Tensor:
        """See `Family.hidden_states`."""
        pixel_values, grid_thw = vision_inputs(images, input_ids.device)
        return model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            pixel_values=pixel_values,
            image_grid_thw=grid_thw,
            use_cache=False,
        ).last_hidden_state[0]

    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        images: Sequence[ProcessedImage],
        shown: Sequence[int],
    ) -> tuple[Tensor, DynamicCache]:
        """See `Family.prefill`."""
        embeds_BSH = model.get_input_embeddings()(input_ids)
        deeper: dict[str, Any] = {}
        if images:
            features = model.model.get_image_features(*vision_inputs(images, input_ids.device), return_dict=True)
            is_image_BS = (input_ids == model.config.image_token_id) & mask.bool()
            in_order = shown_features(features.pooler_output, shown).to(embeds_BSH.dtype)
            embeds_BSH = embeds_BSH.masked_scatter(is_image_BS[..., None], in_order)
            deeper = self.deeper_features(features, shown, is_image_BS)
        cache = DynamicCache(config=model.config.text_config)
        hidden_BH = run_with_cache(
            model.model.language_model,
            cache,
            inputs_embeds=embeds_BSH,
            position_ids=position_ids,
            attention_mask=mask,
            **deeper,
        )
        return hidden_BH, cache

    def decode(
        self, model: PreTrainedModel, token_R: Tensor, position_R: Tensor, mask_RS: Tensor, cache: DynamicCache
    ) -> Tensor:
        """See `Family.decode`."""
        return run_with_cache(
            model.model.language_model,
            cache,
            inputs_embeds=model.get_input_embeddings()(token_R[:, None]),
            position_ids=position_R[None, :, None].expand(3, -1, 1),
            attention_mask=mask_RS,
        )

    def deeper_features(self, features: Any, shown: Sequence[int], is_image_BS: Tensor) -> dict[str, Any]:
        """What the language model takes of the vision tower's `features` behind its embeddings, by the names of its
        arguments; nothing, unless a line of models says so.

        Args:
            shown: see `Family.prefill`.
            is_image_BS: where the tokens of the images are.
        """
        return {}


def shown_features(features: Sequence[Tensor], shown: Sequence[int]) -> Tensor:
    """[F, H] the features of the images that prompts show, in order; maybe none."""
    return torch.cat([features[i] for i in shown] or [features[0][:0]])
