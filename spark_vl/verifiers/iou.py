"""One box: how much it overlaps with the gold."""

from __future__ import annotations

from collections.abc import Sequence

from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.boxes import Shape, iou
from spark_vl.verifiers.grounding import GROUNDING, as_written, boxed, gold_shapes, reaches, share, verdict

SETTINGS = GROUNDING | {"threshold": 0.5}
"""`threshold`: the least IoU at which a box is right, in [0, 1]; 0.5 is Acc@0.5 of RefCOCO. 0: the score is the IoU
itself. The others: see `GROUNDING`."""


def verify_iou(completion: str, record: PromptRecord) -> Verdict:
    """One box `[x1, y1, x2, y2]`: 1 if its IoU with the gold reaches `threshold`; the IoU itself if `threshold` is 0.

    Several boxes are wrong, even if one of them is right.

    Raises:
        BadRecordError: the gold is not one box inside the image, the image's size is not known, or a setting is not
            allowed.
    """
    threshold = share(record, "threshold")
    gold = _gold(record)

    def score(boxes: Sequence[Shape]) -> float:
        if len(boxes) != 1:
            return 0.0
        value = iou(boxes[0].coordinates, gold.coordinates)
        if threshold:
            return float(reaches(value, threshold))
        return 1.0 if reaches(value, 1) else value

    return verdict(completion, record, "bbox_2d", score)


def boxed_gold(record: PromptRecord) -> str:
    r"""A right completion: the gold in `\boxed{}`, in the coordinates that the record asks replies for."""
    return boxed(as_written(record, _gold(record)))


def _gold(record: PromptRecord) -> Shape:
    gold = gold_shapes(record, "bbox_2d")
    if len(gold) != 1:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} holds {len(gold)} boxes; iou compares one")
    return gold[0]
