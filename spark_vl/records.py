"""The nouns of the kit: what a prompt is, what was sampled for it, and how it was judged.

One idea keeps the kit small: a recycled prompt is a `PromptRecord` like any other, whose gold answer is known ("Yes",
"B", the gold of its parent) and which names its own verifier. It goes through the same sampling, verifying, advantage
and update path as a problem does.

Records hold *references* to images, never decoded pixels: a processor decodes them late and drops them early.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

RecycledKind = Literal["pointwise", "pairwise", "reflection"]
Kind = Literal["problem", RecycledKind]
"""What a prompt asks for: solve; is this answer right?; which answer is right?; check this answer and solve."""

KINDS: tuple[Kind, ...] = get_args(Kind)
JUDGMENTS: tuple[Kind, ...] = ("pointwise", "pairwise")


_MAX_REASON = 500
"""Characters of the reason why a row cannot be used."""


class BadRecordError(ValueError):
    """One row cannot be used, for a reason in the row itself. Callers quarantine the row and continue.

    Args:
        record_id: the row or record, as `recipe/row`.
        reason: what was found and what is allowed.
    """

    def __init__(self, record_id: str, reason: str) -> None:
        # Reasons quote what is in the row, and go to logs and messages.
        reason = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"
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
        return f"ImageRef({self.path!r:.100})" if self.data is None else f"ImageRef({len(self.data)} bytes)"


@dataclass(frozen=True)
class ImageSize:
    """Pixels of one image, [width, height]."""

    original: tuple[int, int]
    """As displayed: EXIF orientation is applied."""
    processed: tuple[int, int]
    """As the model sees it, after resizing: number of patches times the side of a patch."""


Coordinates = Literal["resized", "thousand", "original"]
"""How a reply points into an image: in pixels of the image as the model sees it, in thousandths of width and height, or
in pixels of the original image."""

Content = tuple[str | ImageRef, ...]
"""Text and images in reading order."""


_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal may obey, or cannot print. Only line breaks and tabs are printed as they are."""


def visible(text: str) -> str:
    """`text`, which may be a stranger's, for a terminal: it gives it no orders."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """For an error message, behind a name that is not known: the one of `known` that is most like it, if any is."""
    alike = get_close_matches(found, known, n=1, cutoff=0.8)
    return f" (did you mean {alike[0]}?)" if alike else ""


def writable(text: str) -> str:
    """`text` with each lone surrogate, which neither a file nor a tokenizer takes, as its escape (`\\ud83d`)."""
    return text.encode(errors="backslashreplace").decode()


def plain_text(content: Content) -> str:
    """The text of `content`, with `<image>` where an image stands."""
    return "".join(part if isinstance(part, str) else "<image>" for part in content)


def interleaved(pieces: Sequence[str], images: Sequence[ImageRef]) -> Content:
    """Texts with an image between each two of them; empty texts are left out."""
    between: list[str | ImageRef] = [*images, ""]
    content = [part for pair in zip(pieces, between, strict=True) for part in pair]
    return tuple(part for part in content if part != "")


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
    """What verifiers read of those rollouts (`Rollout.answer_text`), in the same order, even if the prompt shows only
    their final answers. Empty if no rollout gave the quoted answer."""
    pair: str = ""
    """Two pointwise prompts that are kept or left out together, about a right answer and about a wrong one, have the
    same text here; empty: there is no other. Their questions differ where no group had both answers."""


@dataclass(frozen=True)
class PromptRecord:
    """Something to ask the model, and what a right reply is. Of this type itself: a problem.

    Raises:
        ValueError: `kind` is not one of the type's.
    """

    _kinds: ClassVar[tuple[Kind, ...]] = ("problem",)

    id: str
    """Unique within a run: `recipe/row` for problems, `parent@step#kind` for recycled prompts, with the side that they
    quote in pointwise ones (`parent@step#pointwise_correct`)."""
    kind: Kind
    """"problem" in this type itself; the others in `RecycledRecord`."""
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
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings of the verifier, as pairs of name and value, such as a tolerance. Each verifier defines its own."""
    weight: float = 1.0
    """Weight of the score in the reward."""
    shaping: tuple[tuple[str, float], ...] = ()
    """Names and weights of the reward terms that do not depend on correctness (`verifiers.shaping`)."""
    image_sizes: tuple[ImageSize, ...] = ()
    """Sizes of `images`, in their order, once a processor has processed the record."""
    coordinates: Coordinates | None = None
    """How the model writes coordinates in its replies, once a processor has processed the record."""
    license: str = ""
    """License of the data; recycled records keep their parent's."""
    tags: tuple[tuple[str, str], ...] = ()
    """Names and values that evaluation groups by, such as ("version", "Vision Only"); see `Recipe.tags`. Recycled
    records keep their parent's."""

    def __post_init__(self) -> None:
        if self.kind not in self._kinds:
            allowed = " or ".join(map(repr, self._kinds))
            raise ValueError(f"{self.id}: a {type(self).__name__} is of kind {self.kind!r}; allowed: {allowed}")

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images of the prompt, in the order in which they stand in its messages."""
        return tuple(part for m in self.messages for part in m.content if isinstance(part, ImageRef))

    @property
    def parent_id(self) -> str:
        """Id of the record whose rollouts this one quotes; of a problem, its own."""
        return self.id


@dataclass(frozen=True)
class RecycledRecord(PromptRecord):
    """A prompt about earlier rollouts: a judgment or a reflection."""

    _kinds: ClassVar[tuple[Kind, ...]] = get_args(RecycledKind)

    kind: RecycledKind
    origin: Origin = field(kw_only=True)

    @property
    def parent_id(self) -> str:
        return self.origin.parent_id


Status = Literal["ok", "unparsable", "timeout", "error"]
"""How a verification ended."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about one completion."""

    score: float
    """In [0, 1]; 1 is right. Recycling and evaluation use nothing else."""
    parsed: str | None
    """The answer found in the completion; None if there is none."""
    status: Status = "ok"
    detail: str = ""
    """The reason for any status but `ok`."""
    shaping: tuple[tuple[str, float], ...] = ()
    """Name and unweighted value of each shaping term of the record."""

    @property
    def is_correct(self) -> bool | None:
        """Whether the score says right (1) or wrong (0), to 1e-6; None: it is partial."""
        return None if 1e-6 < self.score < 1 - 1e-6 else self.score > 0.5


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
    answer_start: int = 0
    """Characters of `text` before its answer: a chain of thought that the model marks as such. The length of `text`: it
    never came to an answer."""
    counted: int | None = None
    """How many tokens it has, where they are not kept: `token_ids` is empty."""

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids) if self.counted is None else self.counted

    @property
    def answer_text(self) -> str:
        """What verifiers and judges read: `text` without the marked chain of thought."""
        return self.text[self.answer_start :]


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
    def correctness(self) -> list[float]:
        """[G] the part of `rewards` that the scores make, weighted."""
        return [self.record.weight * score for score in self.scores]

    @property
    def rewards(self) -> list[float]:
        """[G] what the policy is trained on: the weighted sum of score and shaping terms."""
        weights = dict(self.record.shaping)
        return [
            right + sum(weights[name] * value for name, value in verdict.shaping)
            for right, verdict in zip(self.correctness, self.verdicts, strict=True)
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
