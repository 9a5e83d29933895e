"""An endless shuffled stream of problems, shared out between processes and resumable anywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from spark_vl.data.cells import count
from spark_vl.data.problems import ProblemSet
from spark_vl.records import PromptRecord


class PromptSampler:
    """Draws from all problem sets together: each row once per epoch, in an order that the seed and the epoch determine.

    A recipe may have a weight W (`Recipe.per_epoch`): each of its rows is drawn ⌊W⌋ times per epoch, and a part of
    them, W - ⌊W⌋, once more; which ones is drawn anew for each epoch. So all epochs have the same length.

    The epochs' permutations, one after the other, form one endless sequence of rows. All processes are at the same
    position in it: they draw together, each its share of the next rows, however large. So no row is repeated or missed,
    even if the number of processes changes on resume.

    Args:
        problem_sets: what to draw from, always in the same order.
        seed: of the order.
    """

    def __init__(self, problem_sets: Sequence[ProblemSet], *, seed: int) -> None:
        self._sets, self._seed = list(problem_sets), seed
        self.verifiers = frozenset().union(*(problems.verifiers for problems in self._sets))
        """That the records may name."""
        self.roots = {str(problems.root) for problems in self._sets if problems.root is not None}
        """Folders that image paths may be relative to."""
        self._ends = list(accumulate(len(problems) for problems in self._sets))
        if not self._ends or self._ends[-1] == 0:
            raise ValueError("there are no problems to draw from")
        self._shares = [_share(problems) for problems in self._sets]
        """Of each set: so often is each row drawn in an epoch, and so many of them once more."""
        self._position = 0  # rows drawn by all processes together
        self._shuffled: tuple[int, np.ndarray] = 0, self._permutation(0)
        self._length = len(self._shuffled[1])

    @property
    def fingerprints(self) -> list[dict[str, Any]]:
        """Of the problem sets, in order (`ProblemSet.fingerprint`)."""
        return [problems.fingerprint for problems in self._sets]

    @property
    def rows(self) -> int:
        """All rows, each once."""
        return self._ends[-1]

    @property
    def filters(self) -> bool:
        """Whether a recipe leaves out rows when they are drawn (`FilteredRowError`)."""
        return any(problems.recipe.pixels is not None for problems in self._sets)

    @property
    def recipes(self) -> set[str]:
        """The names of the recipes."""
        return {problems.recipe.name for problems in self._sets}

    def __len__(self) -> int:
        """Rows in an epoch; one that is drawn twice in it counts twice."""
        return self._length

    def __getitem__(self, row: int) -> PromptRecord:
        """The problem in `row`, counted through all sets.

        Raises:
            BadRecordError: the row cannot be used (FilteredRowError: nobody wants it).
        """
        chosen = bisect_right(self._ends, row)
        return self._sets[chosen][row - self._ends[chosen] + len(self._sets[chosen])]

    @property
    def epoch(self) -> float:
        """Epochs drawn so far: 1.5 is half way through the second one."""
        return self._position / len(self)

    def draw(self, counts: Sequence[int], rank: int = 0) -> list[int]:
        """Advance by `sum(counts)` rows, of which process i gets `counts[i]`, and return those of process `rank`."""
        first = self._position + sum(counts[:rank])
        self._position += sum(counts)
        return [self._row(position) for position in range(first, first + counts[rank])]

    def state_dict(self) -> dict[str, Any]:
        """The position; the same on all processes."""
        epoch, position = divmod(self._position, len(self))
        return {"seed": self._seed, "rows": len(self), "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any], *, anew: bool = False) -> None:
        """Continue where `state_dict` was called.

        Args:
            anew: the rows are others, or are shuffled otherwise: begin the epoch that was under way again. So none is
                left out of it, and some may be drawn twice in it.

        Raises:
            ValueError: the state is of another seed or of another number of rows, and not `anew`; or its numbers are
                none.
        """
        epoch, position = count(state, "epoch"), count(state, "position")
        if anew:
            self._position = epoch * len(self)
            return
        for name, found, here in (("seed", state["seed"], self._seed), ("rows", state["rows"], len(self))):
            if found != here:
                raise ValueError(f"the sampler's state was saved with {name} {found}, but {name} is {here} now")
        if position >= len(self):
            raise ValueError(f"position: found {position}; allowed: less than the {len(self)} rows of an epoch")
        self._position = epoch * len(self) + position

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, self._permutation(epoch)
        return int(self._shuffled[1][offset])

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        drawn = []
        for problems, end, (times, more) in zip(self._sets, self._ends, self._shares, strict=True):
            rows = np.arange(end - len(problems), end)
            drawn += [rows] * times
            if more:
                drawn.append(rng.choice(rows, more, replace=False))
        return rng.permutation(np.concatenate(drawn))


def _share(problems: ProblemSet) -> tuple[int, int]:
    weight, rows = problems.recipe.per_epoch, len(problems)
    times = int(weight)
    more = round((weight - times) * rows)
    if rows and not times and not more:
        raise ValueError(f"recipe {problems.recipe.name}: weight: {weight:g} of {rows} rows asks none in an epoch")
    return times, more
