"""Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.models.qwen2_5_vl import Qwen2_5_VLModel

from spark_vl.config import ModelConfig
from spark_vl.families import read_facts
from spark_vl.families.base import ProcessedImage
from spark_vl.families.chat import or_config_error
from spark_vl.families.qwen_vl import QwenVLProcessor, vision_inputs
from spark_vl.families.registry import load_configuration, load_part, loaded_commit


class Qwen2_5VLProcessor(QwenVLProcessor):
    """`Processor` of Qwen2.5-VL."""

    model_class = Qwen2_5_VLModel
    coordinates = "resized"
    """Pixels of the image as the model sees it:
    https://github.com/QwenLM/Qwen2.5-VL/blob/main/cookbooks/spatial_understanding.ipynb."""


class Qwen2_5VL:
    """`Family` of Qwen2.5-VL."""

    reserved = tuple(read_facts("qwen2_5_vl")["reserved"])
    model_class = AutoModelForImageTextToText
    adapter_targets = r".*language_model\.layers\..*_proj"

    def load_processor(self, config: ModelConfig, *, max_prompt_tokens: int) -> Qwen2_5VLProcessor:
        """See `Family.load_processor`."""
        parts = load_part(AutoProcessor, config), load_configuration(config), load_part(GenerationConfig, config)
        return or_config_error(
            config,
            lambda: Qwen2_5VLProcessor(
                *parts,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
                max_prompt_tokens=max_prompt_tokens,
                commit=loaded_commit(config),
            ),
        )

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
            *vision_inputs(images, input_ids.device), return_dict=True
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
