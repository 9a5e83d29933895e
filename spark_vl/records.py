"""The nouns of the kit: what a prompt is, what was sampled for it, and how it was judged.

One idea keeps the kit small: a recycled judgment is an ordinary `PromptRecord` whose gold answer we happen to know
("Yes", "B", the gold of the parent problem) and which names its own verifier. It goes through the same sampling,
verifying, advantage and update path as a problem does.

Records hold *references* to images, never decoded pixels: those are made late, by a processor, and dropped early.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["problem", "pointwise", "pairwise", "reflection"]
"""What a prompt asks for: solve; is this answer right?; which answer is right?; check this answer and solve."""

KINDS: tuple[Kind, ...] = ("problem", "pointwise", "pairwise", "reflection")
JUDGMENTS: tuple[Kind, ...] = ("pointwise", "pairwise")


class BadRecordError(ValueError):
    """One row cannot be used, for a reason in the row itself. Callers quarantine the row and go on.

    Args:
        record_id: the row or record, as `recipe/row`.
        reason: what was found and what is allowed.
    """

    def __init__(self, record_id: str, reason: str) -> None:
        super().__init__(f"{record_id}: {reason}")
        self.record_id = record_id
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.record_id, self.reason)


@dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of one image are: in a file below a media root, or in memory. Never pixels.

    Either `data`, or `path` with `root`.
    """

    path: str | None = None
    """File path relative to `root`."""
    root: str | None = None
    """Folder that the file must stay inside, symbolic links resolved."""
    data: bytes | None = None
    """An encoded image file (PNG, JPEG, ...)."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None) or (self.path is None) != (self.root is None):
            raise ValueError("an ImageRef holds either data, or path and root")

    def __repr__(self) -> str:
        return f"ImageRef({self.path!r})" if self.data is None else f"ImageRef({len(self.data)} bytes)"


@dataclass(frozen=True)
class ImageSize:
    """Pixels of one image, [width, height]."""

    original: tuple[int, int]
    """As displayed: EXIF orientation is applied."""
    processed: tuple[int, int]
    """As the model sees it, after resizing: patches times their side."""


Coordinates = Literal["resized", "thousand", "original"]
"""How a reply points into an image: in pixels of the image as the model sees it, in thousandths of width and height, or
in pixels of the original image."""

Content = tuple[str | ImageRef, ...]
"""Text and images in reading order."""


def plain_text(content: Content) -> str:
    """The text of `content`, with `<image>` where an image stands."""
    return "".join(part if isinstance(part, str) else "<image>" for part in content)


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Content


@dataclass(frozen=True)
class Origin:
    """What a recycled record was made from."""

    parent_id: str
    """Id of the record whose rollouts it quotes."""
    step: int
    """Training step in which those rollouts were sampled."""
    template: str
    """Name of the template that worded it."""
    rollouts: tuple[int, ...]
    """Indices, in the parent's group, of the quoted rollouts, in the order in which the prompt shows them."""
    quoted_correct: bool | None = None
    """Whether the quoted answer is right (pointwise, reflection); None for pairwise."""
    completions: tuple[str, ...] = ()
    """The whole text of those rollouts, in the same order, also where the prompt shows only their final answers. Empty
    where an answer is quoted that no rollout gave."""


@dataclass(frozen=True)
class PromptRecord:
    """Something to ask the model, and what a right reply is."""

    id: str
    """Unique within a run: `recipe/row` for problems, `parent@step#kind` for recycled prompts."""
    kind: Kind
    messages: tuple[Message, ...]
    """The whole prompt as the model sees it, before the model family's chat template."""
    question: Content
    """The problem's own words and images, which recycling quotes (no system prompt, no suffix)."""
    gold: str
    """The right answer: of the problem, or the right label of a judgment."""
    verifier: str
    """Name of the verifier that scores completions against `gold`."""
    recipe: str
    """Name of the recipe that the problem came from; recycled records keep their parent's."""
    choices: tuple[str, ...] = ()
    """Options of a choice question in order (A, B, ...), or the two labels of a judgment; otherwise empty."""
    origin: Origin | None = None
    """Set on recycled records only."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the verifier, as pairs of name and value, such as a tolerance; what it allows, it says itself."""
    weight: float = 1.0
    """Of the score in the reward."""
    shaping: tuple[tuple[str, float], ...] = ()
    """Names and weights of what is added to the reward and says nothing of correctness (`verifiers.shaping`)."""
    image_sizes: tuple[ImageSize, ...] = ()
    """Of `images`, in their order, once a processor has processed the record."""
    coordinates: Coordinates | None = None
    """How the model writes coordinates in its replies, once a processor has processed the record."""
    license: str = ""
    """Of the data, which what is recycled from it carries on."""

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images of the prompt, in the order in which they stand in its messages."""
        return tuple(part for m in self.messages for part in m.content if isinstance(part, ImageRef))


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion."""

    score: float
    """In [0, 1]; 1 is right. Recycling and evaluation go by it alone."""
    parsed: str | None
    """The answer found in the completion, None where there is none."""
    status: Literal["ok", "unparsable", "timeout", "error"] = "ok"
    detail: str = ""
    """Why, for any status but `ok`."""
    shaping: tuple[tuple[str, float], ...] = ()
    """Name and value, not weighted, of each shaping term of the record."""


@dataclass(frozen=True)
class Rollout:
    """One completion, as sampled."""

    token_ids: tuple[int, ...]
    """Completion tokens; the last is the stop token unless `finish_reason` is `length`."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the distribution that it was sampled from, before top-p."""
    text: str
    """The decoded completion without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut off by the limit on new tokens."""


@dataclass(frozen=True)
class RolloutGroup:
    """The G completions of one prompt and, once verified, their verdicts."""

    record: PromptRecord
    rollouts: tuple[Rollout, ...]
    """[G]"""
    verdicts: tuple[Verdict, ...] = ()
    """[G], empty until the group is verified."""

    @property
    def scores(self) -> list[float]:
        """[G] scores of the verdicts, in [0, 1]."""
        return [verdict.score for verdict in self.verdicts]

    @property
    def rewards(self) -> list[float]:
        """[G] what the policy is trained on: weighted scores and shaping terms."""
        weight, weights = self.record.weight, dict(self.record.shaping)
        return [
            weight * verdict.score + sum(weights[name] * value for name, value in verdict.shaping)
            for verdict in self.verdicts
        ]

    @property
    def zero_variance(self) -> bool:
        """Whether all rewards are equal: such a group has no gradient."""
        return len(set(self.rewards)) <= 1

    def verified(self, verdicts: tuple[Verdict, ...]) -> RolloutGroup:
        """This group with its verdicts."""
        if len(verdicts) != len(self.rollouts):
            raise ValueError(f"{self.record.id}: {len(verdicts)} verdicts for {len(self.rollouts)} rollouts")
        return replace(self, verdicts=verdicts)


# ── JSON, for the recycled-prompt cache in checkpoints and for rollout logs ──


def record_to_json(record: PromptRecord) -> dict[str, Any]:
    """`record` as JSON values, image bytes in base64; without `image_sizes` and `coordinates`, which processing
    finds out again."""
    origin = record.origin
    return {
        "id": record.id,
        "kind": record.kind,
        "messages": [{"role": m.role, "content": _content_to_json(m.content)} for m in record.messages],
        "question": _content_to_json(record.question),
        "gold": record.gold,
        "verifier": record.verifier,
        "recipe": record.recipe,
        "choices": list(record.choices),
        "settings": dict(record.settings),
        "weight": record.weight,
        "shaping": dict(record.shaping),
        "license": record.license,
        "origin": None
        if origin is None
        else {**vars(origin), "rollouts": list(origin.rollouts), "completions": list(origin.completions)},
    }


def record_from_json(data: dict[str, Any]) -> PromptRecord:
    """The record that `record_to_json` was given, not processed."""
    origin = data["origin"]
    return PromptRecord(
        **{
            **data,
            "messages": tuple(Message(m["role"], _content_from_json(m["content"])) for m in data["messages"]),
            "question": _content_from_json(data["question"]),
            "choices": tuple(data["choices"]),
            "settings": tuple(data["settings"].items()),
            "shaping": tuple(data["shaping"].items()),
            "origin": None
            if origin is None
            else Origin(**{**origin, **{name: tuple(origin[name]) for name in ("rollouts", "completions")}}),
        }
    )


def group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """A verified group for a log: where its prompt comes from, and each completion with its verdict."""
    record = group.record
    return {
        "id": record.id,
        "kind": record.kind,
        "gold": record.gold,
        "origin": None if record.origin is None else asdict(record.origin),
        "completions": [
            {
                "text": rollout.text,
                "finish_reason": rollout.finish_reason,
                **asdict(verdict),
                "shaping": dict(verdict.shaping),
            }
            for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
        ],
    }


def _content_to_json(content: Content) -> list[Any]:
    return [
        part
        if isinstance(part, str)
        else {"path": part.path, "root": part.root}
        if part.data is None
        else {"data": base64.b64encode(part.data).decode()}
        for part in content
    ]


def _content_from_json(parts: list[Any]) -> Content:
    return tuple(
        part
        if isinstance(part, str)
        else ImageRef(data=base64.b64decode(part["data"]))
        if "data" in part
        else ImageRef(**part)
        for part in parts
    )
