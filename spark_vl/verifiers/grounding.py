r"""Grounding: the reply points at the right place in an image.

The gold is in pixels of the original image, upright. A model writes coordinates in the system that it was trained with
(Qwen2.5-VL: https://github.com/QwenLM/Qwen2.5-VL/blob/main/cookbooks/spatial_understanding.ipynb), and the setting
`coordinates` says which that is. No other system is tried, so none is picked because it scores best.

Every coordinate of a reply is scaled to pixels of the original image, must then lie inside it or within `BORDER` of its
side, and is moved to the border if it is beyond. A reply with a single box that is not such, or has its corners
swapped or no area, is unparsable as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from spark_vl.answers import last_boxed, normalised
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.base import settings_of
from spark_vl.verifiers.boxes import Key, Shape, UnreadableError, find_answer, iou, read_shapes

SETTINGS = {
    "image": 0,
    "coordinates": ("resized", "thousand", "original"),
    "threshold": 0.5,
    "distance": 0.0,
}
"""`image`: index of the image that is pointed at, among those of the prompt.

`coordinates`: how replies are written: in pixels of the image as the model saw it (`resized`: Qwen2.5-VL), in
thousandths of width and height (`thousand`: Qwen2-VL, Qwen3-VL), or in pixels of the original image (`original`).

`threshold`, of `iou` and `detection`: the IoU from which on a box is right, in (0, 1]. For `iou`, 0 is allowed too: the
score is then the IoU itself.

`distance`, of `point`: how far a point may be from a gold that is a point, as a share of the image's diagonal. One
value then fits images of all sizes, where a count of pixels is strict on a photograph and gives an icon away.
"""

BORDER = 0.05
"""How far beyond the image a coordinate may be, as a share of the image's width or height."""

TOLERANCE = 1e-6
"""By how much, relative to it, an IoU may miss a threshold, or 1: scaling there and back costs the last bits."""


def verify_iou(completion: str, record: PromptRecord) -> Verdict:
    """One box `[x1, y1, x2, y2]`: 1 if its IoU with the gold reaches `threshold`, which 0.5 makes Acc@0.5 of RefCOCO;
    the IoU itself if `threshold` is 0.

    Several boxes are wrong, whatever is among them. `parsed` is the answer as written, for all three verifiers.

    Raises:
        BadRecordError: the gold is not one box inside the image, the image's size is not known, or a setting is not
            allowed.
    """
    threshold = _settings(record, without="distance")["threshold"]
    gold = _gold(record, "bbox_2d")
    if len(gold) != 1:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} holds {len(gold)} boxes; iou compares one")

    def score(boxes: Sequence[Shape]) -> float:
        if len(boxes) != 1:
            return 0.0
        value = iou(boxes[0].coordinates, gold[0].coordinates)
        if threshold:
            return float(_reaches(value, threshold))
        return 1.0 if _reaches(value, 1) else value

    return _verdict(completion, record, "bbox_2d", score)


def verify_point(completion: str, record: PromptRecord) -> Verdict:
    """One point `[x, y]`: 1 if it is inside the gold, a box, or within `distance` of the gold, a point.

    Several points are wrong, whatever is among them.

    Raises:
        BadRecordError: the gold is neither one box nor one point inside the image, it is a point and `distance` is not
            set, the image's size is not known, or a setting is not allowed.
    """
    distance = _settings(record, without="threshold")["distance"]
    gold = _one_place(record)
    if len(gold) == 2 and not distance:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is a point, for which distance must be set")

    def score(points: Sequence[Shape]) -> float:
        if len(points) != 1:
            return 0.0
        x, y = points[0].coordinates
        if len(gold) == 4:
            return float(gold[0] <= x <= gold[2] and gold[1] <= y <= gold[3])
        original, _ = _sizes(record)
        return float(math.dist((x, y), gold) <= distance * math.hypot(*original))

    return _verdict(completion, record, "point_2d", score)


def verify_detection(completion: str, record: PromptRecord) -> Verdict:
    """Any number of boxes `[x1, y1, x2, y2]`: F1 of their precision and recall.

    A box matches one of the gold if their IoU reaches `threshold` and, where that of the gold has a label, their labels
    are the same text (see `normalised`). Each matches at most one, paired so that the most are matched; the others
    count against precision or recall, so neither copies nor a flood of boxes pay. Where the gold is `[]`, `[]` alone
    is right.

    Raises:
        BadRecordError: the gold is not boxes inside the image, the image's size is not known, or a setting is not
            allowed.
    """
    threshold = _settings(record, without="distance")["threshold"]
    if not threshold:
        raise BadRecordError(record.id, "setting threshold is 0; detection allows numbers in (0, 1]")
    gold = _gold(record, "bbox_2d")
    wanted = [_label(shape) for shape in gold]

    def score(boxes: Sequence[Shape]) -> float:
        labels = [_label(shape) for shape in boxes]
        fitting = [
            [
                j
                for j, box in enumerate(boxes)
                if label in (None, labels[j]) and _reaches(iou(one.coordinates, box.coordinates), threshold)
            ]
            for one, label in zip(gold, wanted, strict=True)
        ]
        return 2 * matching_size(fitting) / (len(gold) + len(boxes)) if gold or boxes else 1.0

    return _verdict(completion, record, "bbox_2d", score)


def matching_size(fitting: Sequence[Sequence[int]]) -> int:
    """The most pairs (i, j), j in `fitting[i]`, such that no i and no j is in two of them: a maximum matching.

    Found by augmenting paths. F1 asks for no more than this number, so there are no weights to assign by.
    """
    mate_of_i: dict[int, int] = {}
    mate_of_j: dict[int, int] = {}
    dead: set[int] = set()  # what a failed search has reached leads nowhere later either
    for root in range(len(fitting)):
        reached: dict[int, int] = {}  # j → the i that it was reached from
        waiting, free = [root], None
        while waiting and free is None:
            i = waiting.pop()
            for j in fitting[i]:
                if j not in reached and j not in dead:
                    reached[j] = i
                    if j not in mate_of_j:
                        free = j
                        break
                    waiting.append(mate_of_j[j])
        if free is None:
            dead.update(reached)
        while free is not None:  # back to the root: each i on the way takes the j that the path came by
            i = reached[free]
            mate_of_j[free] = i
            mate_of_i[i], free = free, mate_of_i.get(i)
    return len(mate_of_i)


def boxed_gold(record: PromptRecord) -> str:
    r"""A right completion: the gold in `\boxed{}`, in the coordinates that the record asks replies for.

    For `point` and a gold that is a box, its centre.
    """
    shapes = [Shape(_one_place(record))] if record.verifier == "point" else _gold(record, "bbox_2d")
    original, written = _sizes(record)
    values: list[Any] = []
    for shape in shapes:
        place = shape.coordinates
        if record.verifier == "point" and len(place) == 4:
            place = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        numbers = [number * written[i % 2] / original[i % 2] for i, number in enumerate(place)]
        values.append(numbers if shape.label is None else {"bbox_2d": numbers, "label": shape.label})
    return rf"\boxed{{{json.dumps(values if record.verifier == 'detection' else values[0])}}}"


def _verdict(completion: str, record: PromptRecord, key: Key, score: Callable[[Sequence[Shape]], float]) -> Verdict:
    original, written = _sizes(record)
    try:
        answer = find_answer(completion)
        shapes = [_placed(shape, written, original) for shape in read_shapes(answer, key)]
    except UnreadableError as error:
        return Verdict(0.0, None, "unparsable", str(error))
    return Verdict(score(shapes), answer)


def _placed(shape: Shape, written: tuple[float, float], original: tuple[float, float]) -> Shape:
    """`shape`, of an image of the size `written`, in pixels of `original`, both [width, height]."""
    numbers = []
    for i, number in enumerate(shape.coordinates):
        side = original[i % 2]
        number = number * side / written[i % 2]
        if not -BORDER * side <= number <= (1 + BORDER) * side:  # also what is not a number
            raise UnreadableError(f"{shape.coordinates} is outside the image, {written[0]}×{written[1]}")
        numbers.append(min(max(number, 0.0), float(side)))
    if len(numbers) == 4:
        width, height = numbers[2] - numbers[0], numbers[3] - numbers[1]
        if not (width > 0 and height > 0 and width * height > 0):  # the product of tiny sides is rounded to 0
            raise UnreadableError(f"{shape.coordinates} has no area, or not the upper left corner first")
    return Shape(tuple(numbers), shape.label)


def _gold(record: PromptRecord, key: Key) -> list[Shape]:
    """The boxes or points of the gold, in pixels of the original image."""
    original, _ = _sizes(record)
    try:
        return [_placed(shape, original, original) for shape in read_shapes(_gold_answer(record), key)]
    except UnreadableError as error:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200}: {error}") from None


def _gold_answer(record: PromptRecord) -> str:
    return (last_boxed(record.gold) or record.gold).strip()


def _one_place(record: PromptRecord) -> tuple[float, ...]:
    """The gold of `point`: `[x1, y1, x2, y2]` or `[x, y]`."""
    key: Key = "bbox_2d"
    try:
        read_shapes(_gold_answer(record), key)
    except UnreadableError:
        key = "point_2d"
    gold = _gold(record, key)
    if len(gold) != 1:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} holds {len(gold)} boxes or points; point takes one")
    return gold[0].coordinates


def _sizes(record: PromptRecord) -> tuple[tuple[int, int], tuple[int, int]]:
    """[width, height] of the original image, and of the one that replies are written for."""
    settings = settings_of(record)
    index, count = settings["image"], len(record.image_sizes)
    if not 0 <= index < count:
        raise BadRecordError(
            record.id,
            f"the size of image {index} is missing, which {record.verifier} needs: the record has the sizes of {count} "
            "images, and a record that no processor has processed has none",
        )
    size = record.image_sizes[index]
    written = {"resized": size.processed, "thousand": (1000, 1000), "original": size.original}
    return size.original, written[settings["coordinates"]]


def _settings(record: PromptRecord, *, without: str) -> dict[str, Any]:
    """Of the record, in range; the module's settings are those of three verifiers, and this one is `without` one."""
    if without in dict(record.settings):
        raise BadRecordError(record.id, f"{record.verifier} has no setting {without}")
    settings = settings_of(record)
    for name in ("threshold", "distance"):
        if not 0 <= settings[name] <= 1:
            raise BadRecordError(record.id, f"setting {name} is {settings[name]}; allowed: numbers in [0, 1]")
    return settings


def _reaches(value: float, threshold: float) -> bool:
    return value >= threshold * (1 - TOLERANCE)


def _label(shape: Shape) -> str | None:
    return None if shape.label is None else normalised(shape.label)
