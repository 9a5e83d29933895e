"""The judge as a reward function, with the signature that TRL's `GRPOTrainer` calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spark_vl.answers import last_boxed
from spark_vl.families.base import ProcessedPrompt
from spark_vl.records import BadRecordError, Content, ImageRef
from spark_vl.reward.asked import as_content, as_image
from spark_vl.reward.judgment import Judgment
from spark_vl.verifiers.reward_function import Completion, completion_text

if TYPE_CHECKING:
    from spark_vl.reward.judge import GenerativeReward

logger = logging.getLogger(__name__)


class JudgeReward:
    """What `GenerativeReward.as_trl_reward` returns.

    Args:
        judge: is asked.
        column: of the dataset, with the questions; None: they are the prompts.
    """

    def __init__(self, judge: GenerativeReward, column: str | None) -> None:
        self.judge, self.column = judge, column
        self.__name__ = "judge"  # under which TRL logs its rewards

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """The probability that each completion's final answer is correct; None, which TRL skips, where the judge gives
        no verdict, or cannot be asked (the prompt is too long, an image cannot be read). How many there were is logged.

        Args:
            prompts: what was asked: texts, or messages, of which the last one of the user counts.
            completions: texts or messages. A judge sees what their last box holds, or, without a box, all of it.
            columns: of the dataset. The function reads `self.column` and, where they are, `images` or `image`.

        Raises:
            ValueError: there is no column `self.column`, or a prompt and its images do not go together.
        """
        if self.column is not None:
            if self.column not in columns:
                found = ", ".join(columns) or "none"
                raise ValueError(f"the judge's reward needs the column {self.column!r}; columns found: {found}")
            prompts = columns[self.column]
        images = columns.get("images") or columns.get("image") or [None] * len(prompts)
        asked: dict[int, tuple[ProcessedPrompt, ...]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = completion_text(completion)
            try:
                asked[i] = self.judge.ask_pointwise(_question(prompt, images[i]), None, last_boxed(text) or text)
            except BadRecordError as error:
                logger.warning("judge reward: a completion is not judged: %s", error)
        judged: dict[int, Judgment] = {}
        for i, judgment in zip(asked, self.judge.judge(list(asked.values())), strict=True):
            if isinstance(judgment, Judgment):
                judged[i] = judgment
            else:
                logger.warning("judge reward: a completion is not judged: %s", judgment)
        self.judge.processor.forget_images()
        if unread := sum(judgment.status == "unparsable" for judgment in judged.values()):
            logger.warning("judge reward: %d of %d judgments give no verdict", unread, len(judged))
        return [judged[i].probability if i in judged else None for i in range(len(completions))]


def _question(prompt: str | Sequence[Mapping[str, Any]], images: Any) -> Content:
    """What the user asks."""
    own = [as_image(image) for image in ([] if images is None else images if isinstance(images, list) else [images])]
    if isinstance(prompt, str):
        return as_content(prompt, own)
    asked = [message for message in prompt if message["role"] == "user"][-1]["content"]
    if isinstance(asked, str):
        return as_content(asked, own)
    parts: list[str | ImageRef] = []
    for part in asked:
        if part["type"] == "text":
            parts.append(part["text"])
        elif part["type"] == "image":
            shown = part.get("image")  # None: it is the next one of the column
            if shown is None and not own:
                raise ValueError("a prompt shows more images than its row has")
            parts.append(own.pop(0) if shown is None else as_image(shown))
    return tuple(parts)
