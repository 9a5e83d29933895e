"""An exponential average of the weights that are trained, for a policy that judges itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_KEY = "average"


class AveragedWeights:
    """The average lies in the optimizer's state, beside the moments of each weight: a checkpoint holds it, exactly, as
    it holds these. It costs as much memory as the trained weights. A weight that has never been updated has none, and
    is its own average.

    All processes have the same average if they have the same weights; sharded ones are not supported.

    Args:
        optimizer: of the weights.
        decay: share of the old average in the new one. None: there is no average, the weights are as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float | None) -> None:
        self.optimizer, self.decay = optimizer, decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now. The average begins with the first ones."""
        for parameter, state in self._states():
            if self.decay is None:
                state.pop(_KEY, None)  # of an earlier configuration
            elif _KEY in state:
                state[_KEY].lerp_(parameter, 1 - self.decay)
            else:
                state[_KEY] = parameter.detach().clone()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the average is in the place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        if self.decay is None:
            return
        for parameter, state in self._states():
            if _KEY in state:
                parameter.data, state[_KEY] = state[_KEY], parameter.data
        torch.clear_autocast_cache()  # it may hold the other ones in lower precision

    def _states(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
        """The weights that have been updated, with what the optimizer keeps of each."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if state := self.optimizer.state.get(parameter):
                    yield parameter, state
