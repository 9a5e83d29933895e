"""What a judge has said, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal


@dataclass(frozen=True)
class Reply:
    """One judgment as the model wrote it.

    "In favor" means: of the answer, that it is correct; of a pair, that the first of the two answers is the better one,
    wherever the prompt showed it.
    """

    text: str
    """Its rationale and, at the end, its verdict."""
    label: str | None
    """The label in its last box, as the prompt asked for it ("Yes", "A"); None: it says none of them."""
    in_favor: bool | None
    """What that label says; None: there is none."""
    probability: float | None
    """Probability of the label in favor, of the two labels, behind this rationale. Of a judge that counts votes: 1 or
    0, its vote. None: there is no label."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut off by the limit on new tokens."""
    tokens: int
    """How many it has."""
    answer_start: int = 0
    """Characters of `text` before its answer, which alone is read: see `Rollout.answer_start`."""


@dataclass(frozen=True)
class Judgment:
    """What the model says of one answer, or of a pair."""

    orders: tuple[tuple[Reply, ...], ...]
    """[orders][samples]. A pair is asked about in both orders, the first answer first; an answer in one, or, where the
    template has the options A and B, with either of them at A."""

    @property
    def probabilities(self) -> list[float | None]:
        """[orders] the mean over those replies of an order that have a verdict; None: none has."""
        return [_mean([reply.probability for reply in order]) for order in self.orders]

    @property
    def probability(self) -> float | None:
        """That the answer is correct, or that the first of two is the better one: the mean over the orders. None if an
        order has no verdict: that of the other alone would be of the position, too."""
        of_orders = self.probabilities
        return None if None in of_orders else _mean(of_orders)

    @property
    def status(self) -> Literal["ok", "unparsable"]:
        """`unparsable`: there is no probability, because no reply to one of the prompts holds a label."""
        return "unparsable" if self.probability is None else "ok"

    @property
    def consistent(self) -> bool | None:
        """Whether all orders lean to the same side, none of them exactly in the middle; None: unparsable."""
        sides = {None if p is None else (p > 0.5) - (p < 0.5) for p in self.probabilities}
        return None if None in sides else len(sides) == 1 and 0 not in sides

    @property
    def rationale(self) -> str:
        """The first reply to the first prompt."""
        return self.orders[0][0].text


@dataclass(frozen=True)
class Ranking:
    """Answers to one question, compared."""

    order: tuple[int, ...]
    """Indices of the answers, the best first. Equal scores keep the order in which they were given."""
    scores: tuple[float | None, ...]
    """Of each answer: the probability that it is correct or, in pairs, the mean probability that it is better than
    another one. None: no judgment of it could be read; it is ranked last."""
    table: tuple[tuple[float | None, ...], ...] = ()
    """[i][j]: the probability that answer i is better than answer j; None on the diagonal, and where the judgment could
    not be read. Empty where answers were judged one by one."""


def ranked(scores: Sequence[float | None], table: Sequence[Sequence[float | None]] = ()) -> Ranking:
    """The ranking by `scores`."""

    def place(index: int) -> tuple[bool, float]:
        score = scores[index]
        return score is None, -(score or 0.0)

    return Ranking(tuple(sorted(range(len(scores)), key=place)), tuple(scores), tuple(map(tuple, table)))


def ranked_by_pairs(n: int, judgments: Sequence[Judgment]) -> Ranking:
    """The ranking of `n` answers by the judgments of `pairs(n)`, in their order."""
    table: list[list[float | None]] = [[None] * n for _ in range(n)]
    for (i, j), judgment in zip(pairs(n), judgments, strict=True):
        if (probability := judgment.probability) is not None:
            table[i][j], table[j][i] = probability, 1 - probability
    return ranked([_mean(row) for row in table], table)


def pairs(n: int) -> list[tuple[int, int]]:
    """All pairs of `n` answers, each once."""
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
