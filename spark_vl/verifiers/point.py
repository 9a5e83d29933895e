"""One point: whether it is at the right place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spark_vl.records import BadRecordError, PromptRecord, Verdict
from spark_vl.verifiers.boxes import Shape
from spark_vl.verifiers.grounding import GROUNDING, as_written, boxed, gold_shapes, has_points, share, sizes, verdict

SETTINGS = GROUNDING | {"distance": 0.0}
"""`distance`: how far a point may be from a gold that is a point, as a share of the image's diagonal. One value then
fits images of all sizes; a number of pixels would be strict for a photograph and lax for an icon. The others: see
`GROUNDING`."""


def verify_point(completion: str, record: PromptRecord) -> Verdict:
    """One point `[x, y]`: 1 if it is inside the gold, a box, or within `distance` of the gold, a point.

    Several points are wrong, even if one of them is right.

    Raises:
        BadRecordError: the gold is neither one box nor one point inside the image, it is a point and `distance` is not
            set, the image's size is not known, or a setting is not allowed.
    """
    distance = share(record, "distance")
    gold = _gold(record)
    if len(gold) == 2 and not distance:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} is a point, for which distance must be set")

    def score(points: Sequence[Shape]) -> float:
        if len(points) != 1:
            return 0.0
        x, y = points[0].coordinates
        if len(gold) == 4:
            return float(gold[0] <= x <= gold[2] and gold[1] <= y <= gold[3])
        original, _ = sizes(record)
        return float(math.dist((x, y), gold) <= distance * math.hypot(*original))

    return verdict(completion, record, "point_2d", score)


def boxed_gold(record: PromptRecord) -> str:
    r"""A right completion: the gold or its center in `\boxed{}`, in the coordinates that replies are asked for."""
    place = _gold(record)
    if len(place) == 4:
        place = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    return boxed(as_written(record, Shape(place)))


def _gold(record: PromptRecord) -> tuple[float, ...]:
    """`[x1, y1, x2, y2]` or `[x, y]`."""
    gold = gold_shapes(record, "point_2d" if has_points(record) else "bbox_2d")
    if len(gold) != 1:
        raise BadRecordError(record.id, f"gold {record.gold!r:.200} holds {len(gold)} boxes or points; point takes one")
    return gold[0].coordinates
