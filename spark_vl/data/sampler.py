"""An endless shuffled stream of problems, shared out between processes and resumable anywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from spark_vl.data.problems import ProblemSet
from spark_vl.records import PromptRecord


class PromptSampler:
    """Draws from all problem sets together: every row once an epoch, in an order given by the seed and the epoch.

    The epochs' permutations, one after the other, are one endless sequence of rows. Process `rank` takes every
    `world_size`-th of them, so an epoch's last rows are never dropped, whatever the number of processes.

    Args:
        problem_sets: what to draw from, always in the same order.
        seed: of the order.
        rank, world_size: this process, and how many there are.
    """

    def __init__(self, problem_sets: Sequence[ProblemSet], *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}; 0 to {world_size - 1} are allowed")
        self._sets, self._seed, self._rank, self._world_size = list(problem_sets), seed, rank, world_size
        self._ends = list(accumulate(len(problems) for problems in self._sets))
        if not self._ends or self._ends[-1] == 0:
            raise ValueError("there are no problems to draw from")
        self._position = 0  # rows drawn by all processes, if each has drawn as often as this one
        self._shuffled: tuple[int, np.ndarray] = 0, self._permutation(0)

    def __len__(self) -> int:
        """Rows in an epoch, over all processes."""
        return self._ends[-1]

    @property
    def epoch(self) -> float:
        """Epochs drawn by all processes together: 1.5 is half way through the second one."""
        return self._position / len(self)

    def next_index(self) -> int:
        """Advances, and returns the next row of this process, counted through all sets."""
        epoch, offset = divmod(self._position + self._rank, len(self))
        self._position += self._world_size
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, self._permutation(epoch)
        return int(self._shuffled[1][offset])

    def draw(self) -> PromptRecord:
        """Advances, and returns the next problem of this process.

        Raises:
            BadRecordError: its row cannot be used; the next call draws another one.
        """
        index = self.next_index()
        chosen = bisect_right(self._ends, index)
        return self._sets[chosen][index - self._ends[chosen] + len(self._sets[chosen])]

    def state_dict(self) -> dict[str, Any]:
        """Where this process is.

        Every process that loads its own state goes on exactly. Where the number of processes changes, all load the same
        state (that of rank 0): nothing is repeated or missed, except for the rows by which processes were apart because
        some met bad rows and drew again.
        """
        epoch, position = divmod(self._position, len(self))
        return {"seed": self._seed, "rows": len(self), "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was made.

        Raises:
            ValueError: the state is of another seed or of another number of rows.
        """
        for name, found, here in (("seed", state["seed"], self._seed), ("rows", state["rows"], len(self))):
            if found != here:
                raise ValueError(f"the sampler's state was saved with {name} {found}, but {name} is {here} now")
        self._position = state["epoch"] * len(self) + state["position"]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))
