"""Any number of boxes: how many of the gold are found, and how many others are given."""

from __future__ import annotations

from collections.abc import Sequence

from spark_vl.answers import normalized
from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.boxes import Shape, iou
from spark_vl.verifiers.grounding import GROUNDING, as_written, boxed, gold_shapes, reaches, share, verdict

SETTINGS = GROUNDING | {"threshold": 0.5}
"""`threshold`: the least IoU at which two boxes match, in (0, 1]. The others: see `GROUNDING`."""


def verify_detection(completion: str, record: PromptRecord) -> Verdict:
    """Any number of boxes `[x1, y1, x2, y2]`: F1 of their precision and recall.

    A box matches one of the gold if their IoU reaches `threshold` and, if that of the gold has a label, the labels are
    the same text (see `normalized`). Boxes are paired one to one so that as many as possible match; the others cost
    precision or recall, so neither copies nor a flood of boxes pays. If the gold is `[]`, only `[]` is right.

    Raises:
        BadRecordError: the gold is not boxes inside the image, the image's size is not known, or a setting is not
            allowed.
    """
    threshold = share(record, "threshold")
    if not threshold:
        raise BadRecordError(record.id, "setting threshold is 0; detection allows numbers in (0, 1]")
    gold = gold_shapes(record, "bbox_2d")
    wanted = [_label(shape) for shape in gold]

    def score(boxes: Sequence[Shape]) -> float:
        labels = [_label(shape) for shape in boxes]
        fitting = [
            [
                j
                for j, box in enumerate(boxes)
                if label in (None, labels[j]) and reaches(iou(one.coordinates, box.coordinates), threshold)
            ]
            for one, label in zip(gold, wanted, strict=True)
        ]
        return 2 * matching_size(fitting) / (len(gold) + len(boxes)) if gold or boxes else 1.0

    return verdict(completion, record, "bbox_2d", score)


def boxed_gold(record: PromptRecord) -> str:
    r"""A right completion: the gold in `\boxed{}`, in the coordinates that the record asks replies for."""
    return boxed([as_written(record, shape) for shape in gold_shapes(record, "bbox_2d")])


def matching_size(fitting: Sequence[Sequence[int]]) -> int:
    """The size of a maximum matching: the most pairs (i, j), j in `fitting[i]`, such that no i or j is in two of them.

    Found by augmenting paths. F1 needs only this number, so the pairs have no weights.
    """
    mate_of_i: dict[int, int] = {}
    mate_of_j: dict[int, int] = {}
    dead: set[int] = set()  # reached by a failed search, so useless for later ones, too
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
        while free is not None:  # back to the root: each i on the path takes the j that it was left by
            i = reached[free]
            mate_of_j[free] = i
            mate_of_i[i], free = free, mate_of_i.get(i)
    return len(mate_of_i)


def _label(shape: Shape) -> str | None:
    return None if shape.label is None else normalized(shape.label)
