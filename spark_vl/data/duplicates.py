"""Finds training problems that a benchmark asks, too: the same question about an image that looks the same.

Images are compared by a perceptual hash, which hardly changes where one is scaled or compressed anew. Questions are
compared letter by letter, without case, spaces, marks and placeholders. A question alone says little ("Find x."), and
so does an image, which may have many questions.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Literal

import numpy as np
from PIL import Image

from spark_vl.data.images import load_image
from spark_vl.records import PromptRecord, plain_text

SIDE, KEPT = 64, 16
"""Pixels of the side of the square that an image is scaled to, and frequencies in each direction that are hashed."""
BITS = KEPT * KEPT - 1
ALIKE = 48
"""Most bits in which the hashes of two images that look the same differ. Measured on 120 line drawings and 6 parts of
photographs: scaled to a third, or as JPEG of quality 30, at most 40 bits of one change; any two differ in 90."""
FLAT = 2.0
"""Standard deviation of the gray levels (0 to 255) below which a hash is noise, and only equal pixels are the same."""


@dataclass(frozen=True)
class ImageHash:
    """What is compared of an image."""

    bits: int | None
    """`BITS` signs, each of a frequency; None where the image is flat."""
    pixels: str
    """Digest of the scaled gray levels."""

    def is_alike(self, other: ImageHash) -> bool:
        """Whether the two images look the same."""
        if self.bits is None or other.bits is None:
            return self.pixels == other.pixels
        return (self.bits ^ other.bits).bit_count() <= ALIKE


def hash_image(image: Image.Image) -> ImageHash:
    """The perceptual hash of an image: of each low frequency (of a discrete cosine transform), whether it is above the
    median (pHash, C. Zauner, 2010)."""
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    pixels = hashlib.sha256(gray.astype(np.uint8).tobytes()).hexdigest()
    if gray.std() < FLAT:
        return ImageHash(None, pixels)
    waves = _waves()
    low = (waves @ gray @ waves.T).ravel()[1:]  # the first is the mean
    return ImageHash(int("".join("1" if above else "0" for above in low > np.median(low)), 2), pixels)


@cache
def _waves() -> np.ndarray:
    """[KEPT, SIDE] cosines of the transform."""
    return np.cos(pi / SIDE * (np.arange(SIDE) + 0.5)[None, :] * np.arange(KEPT)[:, None])


_KEPT_OF_TEXT = re.compile(r"[^\w+\-*/=<>^.]+|\.(?!\d)")


def question_key(question: str) -> str:
    """A question without what does not tell it from another: case, spaces, marks, placeholders of images."""
    return _KEPT_OF_TEXT.sub("", question.replace("<image>", " ").casefold())


@dataclass(frozen=True)
class Duplicate:
    """A training problem that a benchmark asks, too."""

    id: str
    """Of the training problem."""
    of: str
    """Of the first problem of a benchmark that it is."""
    kind: Literal["same", "image"]
    """`same`: question and images, which is a duplicate. `image`: an image of that problem under another question."""


def find_duplicates(problems: Iterable[PromptRecord], benchmark: Iterable[PromptRecord]) -> Iterator[Duplicate]:
    """The problems that are in the benchmark, too, each once: `same` goes before `image`. Takes time in proportion to
    the images of one times those of the other.

    Args:
        problems: records whose images can be opened.
        benchmark: likewise.

    Raises:
        ImageError: an image cannot be read.
    """
    asked: dict[str, list[tuple[str, tuple[ImageHash, ...]]]] = defaultdict(list)
    ids: list[str] = []
    signs: list[np.ndarray] = []
    for record in benchmark:
        hashes = _hashes(record)
        asked[question_key(plain_text(record.question))].append((record.id, hashes))
        for each in hashes:
            if each.bits is not None:
                ids.append(record.id)
                signs.append(_signs(each.bits))
    table = np.stack(signs) if signs else np.zeros((0, BITS), dtype=np.float32)
    for record in problems:
        hashes = _hashes(record)
        alike = [
            of
            for of, others in asked.get(question_key(plain_text(record.question)), ())
            if len(hashes) == len(others) and all(a.is_alike(b) for a, b in zip(hashes, others, strict=True))
        ]
        if alike:
            yield Duplicate(record.id, alike[0], "same")
        elif (image := next(filter(None, (_seen(each, table, ids) for each in hashes)), None)) is not None:
            yield Duplicate(record.id, image, "image")


def _seen(found: ImageHash, table: np.ndarray, ids: list[str]) -> str | None:
    """The benchmark's problem with an image that is alike; flat images, which are in many, are never."""
    if found.bits is None or not ids:
        return None
    distances = (BITS - table @ _signs(found.bits)) / 2
    best = int(distances.argmin())
    return ids[best] if distances[best] <= ALIKE else None


def _signs(bits: int) -> np.ndarray:
    """[BITS] The bits of a hash as 1 and -1: of two, BITS minus their product is twice the number that differ."""
    return np.array([1.0 if bit == "1" else -1.0 for bit in f"{bits:0{BITS}b}"], dtype=np.float32)


def _hashes(record: PromptRecord) -> tuple[ImageHash, ...]:
    return tuple(hash_image(load_image(ref)) for ref in record.images)
