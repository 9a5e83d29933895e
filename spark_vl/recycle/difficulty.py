"""How well a judge could do that knows nothing but how easy the question is."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

STEPS = 20
"""Over so many steps the training metric looks back."""


def roc_auc(scored: Iterable[tuple[float, bool]]) -> float | None:
    """Area under the ROC curve of (score, label) pairs: the probability that a true one has a higher score than a false
    one, where equal scores count half (Mann and Whitney's U, divided by the number of pairs). 0.5: the score says
    nothing. None if one label is missing.
    """
    by_label: dict[bool, Counter[float]] = {True: Counter(), False: Counter()}
    for score, label in scored:
        by_label[label][score] += 1
    true, false = by_label[True], by_label[False]
    if not true or not false:
        return None
    below, won = 0, 0.0  # false ones with a lower score
    for score in sorted({*true, *false}):
        won += true[score] * (below + false[score] / 2)
        below += false[score]
    return won / (true.total() * below)


class DifficultyAuc:
    """The area under the ROC curve of the labels of pointwise prompts given the pass rates of the groups that they
    quote, over the last `STEPS` steps. The same on all processes."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, list[tuple[float, bool]]]] = deque()

    def add(self, step: int, labels: Iterable[tuple[float, bool]]) -> None:
        """Take in the labels (`Choice.labels`) of `step`."""
        self._steps.append((step, list(labels)))
        while self._steps[0][0] <= step - STEPS:
            self._steps.popleft()

    @property
    def value(self) -> float | None:
        """The area; None while one label is missing."""
        return roc_auc(pair for _, labels in self._steps for pair in labels)

    def state_dict(self) -> dict[str, Any]:
        """The labels, as JSON values."""
        return {"steps": [[step, [list(pair) for pair in labels]] for step, labels in self._steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made."""
        steps = deque((step, [(rate, label) for rate, label in labels]) for step, labels in state["steps"])
        for step, labels in steps:
            if type(step) is not int or not all(0 <= rate <= 1 and type(label) is bool for rate, label in labels):
                raise ValueError(f"difficulty: step {step!r:.80}: found {labels!r:.80}; allowed: rates and labels")
        self._steps = steps
