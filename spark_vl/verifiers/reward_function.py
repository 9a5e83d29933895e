"""A verifier as a reward function, with the signature that TRL's `GRPOTrainer` calls; others can call it, too."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spark_vl.verifiers.base import absolute_name, check_settings
from spark_vl.verifiers.pool import VerifierPool
from spark_vl.verifiers.standalone import bare_record

logger = logging.getLogger(__name__)

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or messages, which may include those of tools. A message has a `role` and a `content`: a text, or parts that
have a `type` and, if that is "text", a `text`."""


class RewardFunction:
    """What `as_trl_reward` returns.

    Args:
        verifier: name of the verifier.
        column: name of the dataset's column of right answers.
        pool: runs the verifier.
        settings: of the verifier.
    """

    def __init__(self, verifier: str, column: str, pool: VerifierPool, settings: Mapping[str, Any]) -> None:
        verifier = absolute_name(verifier, Path.cwd())
        check_settings(verifier, settings)
        self.verifier, self.column, self.pool = verifier, column, pool
        self.settings = settings
        self.__name__ = verifier.rpartition(":")[2]  # under which TRL logs its rewards

    def __call__(
        self, completions: Sequence[Completion], golds: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """One score in [0, 1] for each completion; None, which TRL skips, where the right answer is None.

        A verifier that hangs or crashes, or cannot use the right answer, scores 0; the reason is logged.

        Args:
            completions: texts or messages, of which the model's last one is scored.
            golds: the right answers. None: they are the column `self.column` of `columns`.
            columns: of the dataset, one value for each completion. The function reads `choices` (the options),
                `image_size` and `processed_size` ([width, height] of the image: upright; as the model saw it), where
                given.

        Raises:
            ValueError: there are no right answers, or a column is not as long as `completions`.
        """
        if golds is None:
            if self.column not in columns:
                found = ", ".join(columns) or "none"
                raise ValueError(f"the {self.verifier} reward needs the column {self.column!r}; columns found: {found}")
            golds = columns[self.column]
        read = {"golds": golds}
        for name in ("choices", "image_size", "processed_size"):
            read[name] = columns.get(name, [None] * len(completions))
        for name, values in read.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"the {self.verifier} reward got {len(values)} {name} for {len(completions)} completions"
                )
        rows = list(zip(*read.values(), strict=True))
        judged = [i for i, row in enumerate(rows) if row[0] is not None]
        items = []
        for i in judged:
            gold, choices, image_size, processed_size = rows[i]
            record = bare_record(
                self.verifier,
                gold,
                choices=choices or (),
                image_size=image_size,
                processed_size=processed_size,
                settings=self.settings,
            )
            items.append((completion_text(completions[i]), record))
        verdicts = self.pool.verify(items)
        if errors := [verdict.detail for verdict in verdicts if verdict.status in ("error", "timeout")]:
            logger.warning("%s reward: %d of %d not verified: %s", self.verifier, len(errors), len(rows), errors[0])
        scores = {i: verdict.score for i, verdict in zip(judged, verdicts, strict=True)}
        return [scores.get(i) for i in range(len(rows))]


def as_trl_reward(
    verifier: str, /, *, column: str = "gold", pool: VerifierPool | None = None, **settings: Any
) -> RewardFunction:
    r"""A verifier as a reward function for TRL, or for other code that has completions and right answers.

        GRPOTrainer(..., reward_funcs=as_trl_reward("math", column="answer"))
        as_trl_reward("math")([r"\boxed{0.5}"], [r"\frac{1}{2}"]) == [1.0]

    Right answers are texts, numbers, or bools, lists and mappings, which are taken as JSON. A completion on which the
    verifier exceeds the deadline of the pool (10 s by default) scores 0.

    Args:
        verifier: its name: a key of `VERIFIERS`, `module:function`, or `./file.py:function`.
        column: name of the dataset's column of right answers.
        pool: runs the verifier; the caller closes it. None: a `VerifierPool()` of its own, whose processes start when
            the first completion needs one and end with this process.
        settings: of the verifier, such as `threshold=0.75` of `iou`.

    Raises:
        ValueError: unknown verifier, or a setting that it does not have.
    """
    return RewardFunction(verifier, column, pool or VerifierPool(), settings)


def completion_text(completion: Completion) -> str:
    """What the model says in `completion`: of messages, in its last one."""
    if isinstance(completion, str):
        return completion
    own = [message for message in completion if message["role"] == "assistant"]
    content = own[-1].get("content") or "" if own else ""  # a call of a tool has no content
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
