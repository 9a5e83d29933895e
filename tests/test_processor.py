"""The Qwen2.5-VL processor against the Hugging Face processor and the real model's own forward pass."""

from __future__ import annotations

import io
import json
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.data.images import load_image
from spark_vl.processors import QwenVLProcessor, load_processor
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef, Message, PromptRecord
from tests.conftest import make_image, make_record

SYSTEM = Message("system", ("Be brief.",))


def smooth_image(width: int, height: int) -> ImageRef:
    """A gradient, which any good resizing keeps, and which is different in each direction and colour."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    buffer = io.BytesIO()
    Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8)).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def make_processor(tiny, **limits) -> QwenVLProcessor:
    model, hf = tiny
    limits = {"min_pixels": 28 * 28, "max_pixels": 224 * 224, "max_prompt_tokens": 4096} | limits
    return QwenVLProcessor(hf, model.config, model.generation_config, **limits)


def hugging_face(hf, record: PromptRecord) -> dict[str, torch.Tensor]:
    """What the Hugging Face processor makes of `record`."""
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in record.messages
    ]
    text = hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    images = [load_image(image) for image in record.images]
    return hf(text=[text], images=images or None, return_tensors="pt")


def with_messages(*messages: Message) -> PromptRecord:
    return PromptRecord("r", "problem", messages, (), "5", "number", "test")


RECORDS = [
    make_record("text", "Name a digit."),
    make_record("one", make_image(1), "Which digit is larger?"),
    make_record("last", "Which digit is larger?", make_image(1, (112, 84))),
    make_record("three", "First ", make_image(2, (112, 56)), " then ", make_image(3), make_image(4, (84, 140)), "?"),
    make_record("same twice", make_image(1), " or ", make_image(1), "?"),
    with_messages(SYSTEM, Message("user", (make_image(5), "What is it?"))),
    with_messages(
        Message("system", ("Look at ", make_image(6))),
        Message("user", ("What is it?",)),
        Message("assistant", ("A five.",)),
        Message("user", ("Sure? ", make_image(7, (56, 84)))),
    ),
    make_record("unicode", "Größer als ½? 五 \u200b <image> {x} 😀"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_inputs_are_those_of_the_hugging_face_processor(tiny, processor, record):
    expected = hugging_face(tiny[1], record)
    prompt = processor.process(record)
    assert prompt.record is record
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    assert len(prompt.images) == len(record.images)
    if prompt.images:
        assert torch.equal(torch.stack([image.grid_thw for image in prompt.images]), expected["image_grid_thw"])
        assert torch.equal(torch.cat([image.pixel_values for image in prompt.images]), expected["pixel_values"])
    features = sum(image.tokens for image in prompt.images)
    assert int((prompt.input_ids == processor.image_token_id).sum()) == features


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (100, 75), (57, 60), (300, 60), (2000, 1990)])
def test_an_image_of_any_size_is_resized_as_by_the_hugging_face_processor(tiny, processor, size):
    record = make_record("r", smooth_image(*size), "?")
    expected = hugging_face(tiny[1], record)
    prompt = processor.process(record)
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    assert prompt.images[0].grid_thw.tolist() == expected["image_grid_thw"][0].tolist()
    # The one resizes with Pillow, the other with torchvision: at most one of 256 levels apart.
    level = 1.001 / 255 / min(tiny[1].image_processor.image_std)
    torch.testing.assert_close(prompt.images[0].pixel_values, expected["pixel_values"], rtol=0, atol=level)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_positions_are_those_of_the_model(tiny, processor, record):
    """That is, those with which the model calls its language model when it is left to find them itself."""
    model, hf = tiny
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**hugging_face(hf, record))
    hook.remove()
    prompt = processor.process(record)
    length = len(prompt.input_ids)
    plain = torch.arange(length).expand(3, length)  # what a language model takes for granted when it is given none
    expected = plain if seen[0] is None else seen[0][:, 0]
    assert torch.equal(prompt.position_ids, expected)
    assert torch.equal(expected, plain) == (not record.images)
    assert prompt.next_position == int(expected.max()) + 1


def test_positions_by_hand(processor):
    """An image of 4 × 2 patches, merged two by two, is 2 × 1 features; the text goes on after its longer side."""
    prompt = processor.process(make_record("r", "a", smooth_image(28, 56), "b"))
    start = prompt.input_ids.tolist().index(processor.image_token_id)
    time, height, width = (prompt.position_ids[:, start - 1 : start + 4] - start).tolist()
    assert time == [-1, 0, 0, 2, 3]
    assert height == [-1, 0, 1, 2, 3]
    assert width == [-1, 0, 0, 2, 3]


@given(
    width=st.integers(1, 1500),
    height=st.integers(1, 1500),
    low=st.integers(1, 20),
    high=st.integers(2, 5),
)
def test_images_stay_in_the_budget_and_keep_their_shape(tiny, width, height, low, high):
    if max(width, height) > 10 * min(width, height):
        width = height = max(width, height)
    min_pixels, max_pixels = low * 784, high * low * 784
    processor = make_processor(tiny, min_pixels=min_pixels, max_pixels=max_pixels)
    (image,) = processor.process(make_record("r", smooth_image(width, height), "?")).images
    _, rows, columns = image.grid_thw.tolist()
    assert image.grid_thw[0] == 1
    assert rows % 2 == columns % 2 == 0
    assert image.tokens == rows * columns // 4
    assert image.pixel_values.shape == (rows * columns, 3 * 2 * 14 * 14)
    area = 14 * 14 * rows * columns
    if 10 * max_pixels > 300 * 784:
        assert min_pixels <= area <= max_pixels
