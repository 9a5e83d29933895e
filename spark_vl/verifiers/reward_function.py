"""A verifier as a reward function: with the signature that TRL's `GRPOTrainer` calls, and plain enough for others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from spark_vl.verifiers.base import bare_record, check_settings
from spark_vl.verifiers.pool import VerifierPool

logger = logging.getLogger(__name__)

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or the messages that the model wrote, `role` and `content`, a text or parts of `type` and `text`; tools may
have answered in between."""


class RewardFunction:
    """What `as_trl_reward` returns.

    Args:
        kind: name of the verifier.
        column: name of the dataset's column of right answers.
        pool: runs the verifier.
        settings: of the verifier.
    """

    def __init__(self, kind: str, column: str, pool: VerifierPool, settings: Mapping[str, Any]) -> None:
        check_settings(kind, settings)
        self.kind, self.column, self.pool = kind, column, pool
        self.settings = settings
        self.__name__ = kind.rpartition(":")[2]  # under which TRL logs its rewards

    def __call__(
        self, completions: Sequence[Completion], golds: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """One score in [0, 1] for each completion; None, which TRL leaves out, where there is no right answer.

        A hang, a crash and a right answer that means nothing to the verifier score 0; what was wrong is logged.

        Args:
            completions: texts or messages, of which the model's last one counts.
            golds: the right answers. None: the column of that name is among `columns`.
            columns: of the dataset, a value for each completion. Read are, where given, `choices` (the options),
                `image_size` and `processed_size` ([width, height] of the image: upright; as the model saw it).

        Raises:
            ValueError: there are no right answers, or not as many of something as there are completions.
        """
        if golds is None:
            if self.column not in columns:
                found = ", ".join(columns) or "none"
                raise ValueError(f"the {self.kind} reward needs the column {self.column!r}; columns found: {found}")
            golds = columns[self.column]
        read = {"golds": golds}
        for name in ("choices", "image_size", "processed_size"):
            read[name] = columns.get(name, [None] * len(completions))
        for name, values in read.items():
            if len(values) != len(completions):
                raise ValueError(f"the {self.kind} reward got {len(values)} {name} for {len(completions)} completions")
        rows = list(zip(*read.values(), strict=True))
        judged = [i for i, row in enumerate(rows) if row[0] is not None]
        items = []
        for i in judged:
            gold, choices, image_size, processed_size = rows[i]
            record = bare_record(
                self.kind,
                json.dumps(gold, ensure_ascii=False) if isinstance(gold, list | Mapping) else str(gold),
                choices=choices or (),
                image_size=image_size,
                processed_size=processed_size,
                settings=self.settings,
            )
            items.append((_text(completions[i]), record))
        verdicts = self.pool.verify(items)
        if errors := [verdict.detail for verdict in verdicts if verdict.status in ("error", "timeout")]:
            logger.warning("%s reward: %d of %d not verified: %s", self.kind, len(errors), len(rows), errors[0])
        scores = {i: verdict.score for i, verdict in zip(judged, verdicts, strict=True)}
        return [scores.get(i) for i in range(len(rows))]


def as_trl_reward(
    kind: str, *, column: str = "gold", pool: VerifierPool | None = None, **settings: Any
) -> RewardFunction:
    r"""The verifier `kind` as a reward function for TRL, and for whoever has completions and right answers.

        GRPOTrainer(..., reward_funcs=as_trl_reward("math", column="answer"))
        as_trl_reward("math")([r"\boxed{0.5}"], [r"\frac{1}{2}"]) == [1.0]

    Right answers are texts, lists and mappings, which become JSON, or what `str` makes texts of: numbers.

    Args:
        kind: name of the verifier: a key of `VERIFIERS`, or `module:function`.
        column: name of the dataset's column of right answers.
        pool: runs the verifier, and whoever made it closes it. None: one of its own, as `VerifierPool()`, whose
            processes start when the first completion needs one, and end with this process.
        settings: of the verifier, such as `threshold=0.75` of `iou`.

    Raises:
        ValueError: unknown verifier, or a setting that it does not have.
    """
    return RewardFunction(kind, column, pool or VerifierPool(), settings)


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    own = [message for message in completion if message["role"] == "assistant"]
    content = own[-1].get("content") or "" if own else ""  # a call of a tool has no content
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
