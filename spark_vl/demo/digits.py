"""Questions about two handwritten digits, drawn from real images, with answers known from the labels.

The digits are the 1797 images of 8×8 pixels that come with scikit-learn (from "Optical Recognition of Handwritten
Digits", UCI repository). They are split by *instance*: no image of the test split is seen in training, whatever it is
paired with.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from spark_vl.data.sources import Rows
from spark_vl.verifiers.base import SELF_JUDGE

QUESTIONS: dict[str, Callable[[int, int], int]] = {
    "Which digit is larger?": max,
    "Which digit is smaller?": min,
    "By how much do the digits differ?": lambda a, b: abs(a - b),
}
"""Every question with the function from the two digits to its one-digit answer."""

SPLITS = {"train": 6000, "validation": 400, "test": 1000}
"""Rows of each split."""

_INSTANCES = {"train": (0, 1100), "validation": (1100, 1300), "test": (1300, 1797)}
"""The range of shuffled instances that each split draws from."""

SIDE = 28
"""Pixels on a side of one digit."""


@dataclass(frozen=True)
class Problem:
    """One row with what only its maker knows."""

    question: str
    answer: str
    digits: tuple[int, int]
    """The labels of the left and the right digit."""
    instances: tuple[int, int]
    """Their indices in `sklearn.datasets.load_digits()`."""
    image: bytes
    """A PNG of 56×56 pixels, which is 2×2 vision tokens at patch size 14 and merge size 2."""


def problem(split: str, index: int) -> Problem:
    """The row `index` of `split`, a deterministic function of both; any index is allowed."""
    images, labels, order = _digits()
    rng = random.Random(f"digits/{split}/{index}")
    question = rng.choice(list(QUESTIONS))
    start, stop = _INSTANCES[split]
    left, right = (int(i) for i in order[rng.sample(range(start, stop), 2)])
    digits = int(labels[left]), int(labels[right])
    image = _draw(images[left], images[right], rng)
    return Problem(question, str(QUESTIONS[question](*digits)), digits, (left, right), image)


def rows(split: str) -> Rows:
    """The rows of `split`, each with `id`, `question`, `answer` and `image`, made when asked for.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: the digits have {', '.join(SPLITS)}")
    return _Rows(split)


def half_rows(split: str) -> Rows:
    """As `rows`, with a column `verifier`. In training every other row hides its answer, and is self-judged."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: the digits have {', '.join(SPLITS)}")
    return _HalfRows(split)


class _Rows:
    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return SPLITS[self.split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index}: the split {self.split!r} has {len(self)} rows")
        index %= len(self)
        row = problem(self.split, index)
        return {
            "id": self._id(index),
            "question": row.question,
            "answer": row.answer,
            "image": {"bytes": row.image},
        }

    def column(self, name: str) -> Iterator[Any]:
        """See `ColumnarRows`: no image is drawn for the ids."""
        for index in range(len(self)):
            yield self._id(index) if name == "id" else self[index][name]

    def _id(self, index: int) -> str:
        return f"{self.split}-{index}"


class _HalfRows(_Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        verifier = self._verifier(index % len(self))
        row = super().__getitem__(index) | {"verifier": verifier}
        return row | {"answer": None} if verifier == SELF_JUDGE else row

    def column(self, name: str) -> Iterator[Any]:
        """See `_Rows.column`."""
        return map(self._verifier, range(len(self))) if name == "verifier" else super().column(name)

    def _verifier(self, index: int) -> str:
        return SELF_JUDGE if self.split == "train" and index % 2 else "number"


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 images [1797, 8, 8], their labels [1797], and the order in which the splits share them out."""
    from sklearn.datasets import load_digits  # an extra: only the demo needs it

    data = load_digits()
    images = (data.images * (255 / 16)).astype(np.uint8)
    return images, data.target, np.random.default_rng(0).permutation(len(images))


def _draw(left: np.ndarray, right: np.ndarray, rng: random.Random) -> bytes:
    """The two digits side by side, white on black, each at a height of its own, with light noise."""
    canvas = np.zeros((2 * SIDE, 2 * SIDE), np.float32)
    for column, digit in enumerate((left, right)):
        top = SIDE // 2 + rng.randint(-8, 8)
        glyph = Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas[top : top + SIDE, column * SIDE : (column + 1) * SIDE] = np.asarray(glyph)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 8, canvas.shape)
    buffer = io.BytesIO()
    Image.fromarray((canvas + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
