"""Qwen2.5-VL: `qwen-vl-utils` resizes, the Hugging Face processor normalizes and tokenizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.data.images import ImageError, load_image
from spark_vl.families import read_facts
from spark_vl.families.base import ModelInputs, ProcessedImage, ProcessedPrompt
from spark_vl.families.registry import load_configuration, load_part, loaded_commit
from spark_vl.records import BadRecordError, Coordinates, ImageRef, ImageSize, Message, PromptRecord, writable

COORDINATES: Coordinates = "resized"
"""Pixels of the image as the model sees it:
https://github.com/QwenLM/Qwen2.5-VL/blob/main/cookbooks/spatial_understanding.ipynb."""
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Qwen2_5VL:
    """`Family` of Qwen2.5-VL."""

    reserved = tuple(read_facts("qwen2_5_vl")["reserved"])
    model_class = AutoModelForImageTextToText
    adapter_targets = r".*language_model\.layers\..*_proj"

    def load_processor(self, config: ModelConfig, *, max_prompt_tokens: int) -> QwenVLProcessor:
        """See `Family.load_processor`."""
        parts = load_part(AutoProcessor, config), load_configuration(config), load_part(GenerationConfig, config)
        try:
            processor = QwenVLProcessor(
                *parts,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
                max_prompt_tokens=max_prompt_tokens,
                commit=loaded_commit(config),
            )
            processor.check_chat_template()
        except ValueError as error:
            raise ConfigError(f"model.path: {config.path}: {error}") from error
        except Exception as error:  # numbers that are none, or not of this world
            raise ConfigError(f"model.path: {config.path}: {type(error).__name__}: {error}") from error
        return processor

    def freeze_vision(self, model: PreTrainedModel) -> None:
        """See `Family.freeze_vision`; the merger belongs to the tower."""
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
        pixel_values, grid_thw = _vision_inputs(images, input_ids.device)
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
        embeds_BSH = self._embed(model, input_ids, mask, images, shown)
        cache = DynamicCache(config=model.config.text_config)
        return self._run(model, embeds_BSH, position_ids, mask, cache), cache

    def decode(
        self, model: PreTrainedModel, token_R: Tensor, position_R: Tensor, mask_RS: Tensor, cache: DynamicCache
    ) -> Tensor:
        """See `Family.decode`."""
        embeds_R1H = model.get_input_embeddings()(token_R[:, None])
        return self._run(model, embeds_R1H, position_R[None, :, None].expand(3, -1, 1), mask_RS, cache)

    @staticmethod
    def _embed(
        model: PreTrainedModel, input_ids: Tensor, mask: Tensor, images: Sequence[ProcessedImage], shown: Sequence[int]
    ) -> Tensor:
        """[B, S, H] embeddings of the tokens, with the features of the images in their places."""
        embeds = model.get_input_embeddings()(input_ids)
        if not images:
            return embeds
        features = model.model.get_image_features(
            *_vision_inputs(images, input_ids.device), return_dict=True
        ).pooler_output
        in_order = torch.cat([features[i] for i in shown] or [features[0][:0]])
        is_image = (input_ids == model.config.image_token_id) & mask.bool()
        return embeds.masked_scatter(is_image[..., None], in_order.to(embeds.dtype))

    @staticmethod
    def _run(model: PreTrainedModel, embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """The hidden state of each row's last token."""
        return model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


def _vision_inputs(images: Sequence[ProcessedImage], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the vision tower takes: the patches of all images [P, D], and their grids [I, 3]."""
    pixel_values = torch.cat([image.pixel_values for image in images])
    grid_thw = torch.stack([image.grid_thw for image in images])
    return pixel_values.to(device), grid_thw.to(device)


class QwenVLProcessor:
    """`Processor` of Qwen2.5-VL.

    Args:
        processor: the Hugging Face processor.
        config: the model's configuration.
        generation_config: names stop tokens; the token that ends a turn of the chat is one too.
        min_pixels, max_pixels: images are resized, ratio kept, to sides that are multiples of 28 and an area in
            between.
        max_prompt_tokens: longer prompts are refused.
        commit: see `Processor`.

    Raises:
        ValueError: the chat template fails, or no token ends a completion.
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
        self.stop_token_ids = self._stop_tokens(generation_config)
        vocabulary = processor.tokenizer.get_vocab()
        tokens = set(vocabulary.values())
        for name, ids in (
            ("config.json: image_token_id", [self.image_token_id]),
            ("generation_config.json: eos_token_id", self.stop_token_ids),
            ("tokenizer_config.json: pad_token", [self.pad_token_id]),
        ):
            if not ids or not all(type(number) is int and number in tokens for number in ids):
                raise ValueError(f"{name}: found {ids!r:.80}; allowed: tokens of the vocabulary")
        self._image_token: str = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
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
        image = ProcessedImage(
            torch.zeros(side**2, width), torch.tensor([1, side, side]), tokens=4, size=ImageSize(pixels, pixels)
        )
        self.padding = ModelInputs(
            input_ids=torch.full((image.tokens,), self.image_token_id),
            position_ids=torch.arange(image.tokens).expand(3, -1),  # any would do: nothing reads what comes of it
            images=(image,),
        )

    def _stop_tokens(self, generation_config: GenerationConfig) -> tuple[int, ...]:
        """Those of the configuration, and the one that the chat template writes behind a reply: a base model's
        configuration names the end of a text only, and a fine-tuned one may have lost its own."""
        named = generation_config.eos_token_id
        stop = named if isinstance(named, list) else [] if named is None else [named]
        reply = "The digit is seven."
        chat = [Message("user", (ImageRef(data=b""), "Which digit is this?")), Message("assistant", (reply,))]
        behind = self._chat(chat, ask=False).rpartition(reply)[2]
        end = self.hf.tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        stop += [token for token in end if token in self.hf.tokenizer.added_tokens_decoder and token not in stop]
        if not stop:
            raise ValueError(
                "nothing ends a completion: generation_config.json has no eos_token_id, and the chat template ends a "
                "reply without a special token; name the token that does as eos_token_id"
            )
        return tuple(stop)

    def check_chat_template(self) -> None:
        """Try the chat template on one question with an image.

        Raises:
            ValueError: it fails, or does not show the question, or does not show the image once.
        """
        question = "Which digit is this?"
        chat = self._chat([Message("user", (ImageRef(data=b""), question))])
        found = [chat.count(part) for part in (question, self._image_token)]
        if found != [1, 1]:
            raise ValueError(
                f"chat_template: shows a question {found[0]} times, and the {self._image_token} of its image "
                f"{found[1]} times; allowed: each once"
            )

    def _chat(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The text that the chat template makes of `messages`, and `ask`s for a reply to them.

        Raises:
            ValueError: it fails.
        """
        try:
            return self.hf.apply_chat_template(
                [_chat_message(message) for message in messages], tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"chat_template: fails with {type(error).__name__}: {error}") from error

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
        try:
            chat = self._chat(record.messages)
        except ValueError as error:
            raise BadRecordError(record.id, str(error)) from error
        if writable(chat) != chat:
            raise BadRecordError(record.id, "the prompt is not valid Unicode")  # which no tokenizer takes
        # The chat template writes one image token for each image; the vision tower makes one feature for each merged
        # patch.
        pieces = chat.split(self._image_token)
        if len(pieces) != len(images) + 1:
            raise BadRecordError(record.id, f"the chat holds {len(pieces) - 1} image tokens for {len(images)} images")
        text = pieces[0] + "".join(
            self._image_token * image.tokens + piece for image, piece in zip(images, pieces[1:], strict=True)
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
        grids: Any = torch.stack([image.grid_thw for image in images]) if images else None
        positions, _ = self._positions.get_rope_index(
            ids[None],
            image_grid_thw=grids,
            mm_token_type_ids=is_image[None].int(),
        )
        return ProcessedPrompt(
            record=replace(record, image_sizes=tuple(image.size for image in images), coordinates=COORDINATES),
            input_ids=ids,
            position_ids=positions[:, 0],
            images=images,
        )

    def forget_images(self) -> None:
        """See `Processor.forget_images`."""
        self._images.clear()

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Processor.decode`."""
        return self.hf.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def render(self, prompt: ProcessedPrompt) -> str:
        """See `Processor.render`."""
        text = self.hf.tokenizer.decode(prompt.input_ids.tolist())
        runs = re.compile(f"(?:{re.escape(self._image_token)})+")
        return runs.sub(lambda run: f"{self._image_token}×{len(run[0]) // len(self._image_token)}", text)

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
            )
        return self._images[ref]


def _chat_message(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content
        ],
    }
