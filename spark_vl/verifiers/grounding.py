r"""What `iou`, `point` and `detection` share: which places in an image the gold and a reply mean.

The gold is in pixels of the original image, upright. A model writes coordinates in the system that it was trained with.
The record says which that is, unless the setting `coordinates` does. No other system is tried, so none is picked
because it scores best.

Every coordinate of a reply is scaled to pixels of the original image. It must then be inside the image, or outside by
at most `BORDER`, and is moved to the edge in that case. If one box of a reply violates this, has its corners swapped or
has no area, the whole reply is unparsable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from spark_vl.answers import last_boxed
from spark_vl.records import BadRecordError, Coordinates, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of
from spark_vl.verifiers.boxes import Key, Shape, UnreadableError, find_answer, read_shapes

GROUNDING: dict[str, Any] = {
    "image": 0,
    "coordinates": ("model", *get_args(Coordinates)),
    "gold_boxes": ("xyxy", "xywh"),
}
"""The settings of all three.

`image`: index of the image that is pointed at, among those of the prompt.

`coordinates`: how replies are written: as the model's family writes them (`model`), or, where the prompt asks for
something else, as `records.Coordinates` says.

`gold_boxes`: how the boxes of the gold are written: by two corners, or by a corner, width and height, as in COCO.
Replies are always by two corners.
"""

BORDER = 0.05
"""How far beyond the image a coordinate may be, as a share of the image's width or height."""

TOLERANCE = 1e-6
"""By how much, relatively, an IoU may miss a threshold, or 1: scaling back and forth costs the last bits."""


def share(record: PromptRecord, name: str) -> float:
    """The setting `name` of the record's verifier, in [0, 1].

    Raises:
        BadRecordError: it is above 1.
    """
    value = settings_of(record)[name]
    if value > 1:
        raise BadRecordError(
            record.id, f"setting {name} is {value}; allowed: numbers in [0, 1], neither percentages nor pixels"
        )
    return value


def sizes(record: PromptRecord) -> tuple[tuple[int, int], tuple[int, int]]:
    """[width, height] of the original image, and of the image whose coordinates replies are written in.

    Raises:
        BadRecordError: the image's size, or how replies are written, is not known.
    """
    settings = settings_of(record)
    index, count = settings["image"], len(record.image_sizes)
    system = record.coordinates if settings["coordinates"] == "model" else settings["coordinates"]
    if not 0 <= index < count:
        raise BadRecordError(
            record.id,
            f"the size of image {index} is missing, which {record.verifier} needs: the record has the sizes of {count} "
            "images, and a record that no processor has processed has none",
        )
    if system is None:
        raise BadRecordError(
            record.id,
            f"how coordinates are written is missing, which {record.verifier} needs: a record that no processor has "
            "processed does not say it, and neither does the setting coordinates",
        )
    size = record.image_sizes[index]
    written = {"resized": size.processed, "thousand": (1000, 1000), "original": size.original}
    return size.original, written[system]


def gold_shapes(record: PromptRecord, key: Key) -> list[Shape]:
    """The boxes or points of the gold, in pixels of the original image.

    Raises:
        BadRecordError: one is outside the image, cannot be read, or has no number above 1.
    """
    original, _ = sizes(record)
    try:
        shapes = read_shapes(_gold_answer(record), key, corners=False)
        for shape in shapes:
            if max(shape.coordinates) <= 1:
                raise UnreadableError(
                    f"{shape.coordinates} looks normalized, to shares of width and height; allowed: pixels of the "
                    f"original image, {original[0]}×{original[1]}"
                )
        if key == "bbox_2d" and settings_of(record)["gold_boxes"] == "xywh":
            shapes = [_by_corners(shape) for shape in shapes]
        return [_placed(shape, original, original) for shape in shapes]
    except UnreadableError as error:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200}: {error}") from None


def has_points(record: PromptRecord) -> bool:
    """Whether the gold can be read as points, and not as boxes."""
    try:
        read_shapes(_gold_answer(record), "bbox_2d", corners=False)
    except UnreadableError:
        return True
    return False


def verdict(completion: str, record: PromptRecord, key: Key, score: Callable[[Sequence[Shape]], float]) -> Verdict:
    """Calls `score` with the shapes of a reply, in pixels of the original image; `parsed` is the answer as written."""
    original, written = sizes(record)
    try:
        answer = find_answer(completion)
        shapes = [_placed(shape, written, original) for shape in read_shapes(answer, key)]
    except UnreadableError as error:
        return Verdict(0.0, None, "unparsable", str(error))
    return Verdict(score(shapes), answer)


def as_written(record: PromptRecord, shape: Shape) -> list[float] | dict[str, Any]:
    """`shape`, in pixels of the original image, as JSON in the coordinates that replies are written in."""
    original, written = sizes(record)
    numbers = [number * written[i % 2] / original[i % 2] for i, number in enumerate(shape.coordinates)]
    return numbers if shape.label is None else {"bbox_2d": numbers, "label": shape.label}


def boxed(value: Any) -> str:
    r"""`value` as JSON in `\boxed{}`."""
    return rf"\boxed{{{json.dumps(value)}}}"


def reaches(value: float, threshold: float) -> bool:
    """Whether an IoU is at least `threshold`, apart from rounding."""
    return value >= threshold * (1 - TOLERANCE)


def _gold_answer(record: PromptRecord) -> str:
    return (last_boxed(record.gold) or record.gold).strip()


def _by_corners(box: Shape) -> Shape:
    x, y, width, height = box.coordinates
    return replace(box, coordinates=(x, y, x + width, y + height))


def _placed(shape: Shape, written: tuple[float, float], original: tuple[float, float]) -> Shape:
    """`shape`, scaled from an image of the size `written` to one of the size `original`, both [width, height]."""
    numbers = []
    for i, number in enumerate(shape.coordinates):
        side = original[i % 2]
        number = number * side / written[i % 2]
        if not -BORDER * side <= number <= (1 + BORDER) * side:  # NaN fails, too
            raise UnreadableError(f"{shape.coordinates} is outside the image, {written[0]}×{written[1]}")
        numbers.append(min(max(number, 0.0), float(side)))
    if len(numbers) == 4:
        width, height = numbers[2] - numbers[0], numbers[3] - numbers[1]
        if not (width > 0 and height > 0 and width * height > 0):  # the product of tiny sides may round to 0
            raise UnreadableError(f"{shape.coordinates} has no area, or not the upper left corner first")
    return Shape(tuple(numbers), shape.label)
