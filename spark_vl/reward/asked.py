"""What a caller may ask about: texts, images, records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image as PillowImage

from spark_vl.data.images import image_in_text
from spark_vl.data.problems import image_of, place_images
from spark_vl.records import Content, ImageRef, PromptRecord

Image = ImageRef | PillowImage | bytes | Path | str
"""An image: a reference, pixels, an encoded file, or the path of one (a text may also be base64 or a data URL)."""

Question = str | Content | PromptRecord
"""A text, in which `<image>` stands where an image belongs (without any, images go first); texts and images in reading
order, as a tuple; or a record, whose question it is."""

Answer = str | Content
"""A text, or a tuple of texts and images (`ImageRef`) in reading order."""


def as_content(question: Question, images: Sequence[Image] | None = None) -> Content:
    """`question` with its images.

    Args:
        images: of a question that is a text; None or empty: it has none, or holds them itself.

    Raises:
        ValueError: question and images do not go together, or one of them is not an image.
        OSError: there is no file of this name.
    """
    if isinstance(question, str):
        return place_images(question, [as_image(image) for image in images or ()])
    if images:
        raise ValueError(f"images: found {len(images)} beside a question that holds its images itself; allowed: none")
    return question.question if isinstance(question, PromptRecord) else question


def as_image(image: Image) -> ImageRef:
    """`image`, which is the caller's own: any file may be named.

    Raises:
        ValueError: it is not one of `Image`.
        OSError: there is no file of this name.
    """
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, Path) or (isinstance(image, str) and image_in_text(image) is None):
        return ImageRef(data=Path(image).read_bytes())
    return image_of(image, None, "images")
