"""Rows of a reward benchmark: a question and answers to it, of which people prefer one. Answers may hold images.

Rows are untrusted: each becomes a `Preference`, or an error that says why not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from spark_vl.data.benchmarks import PREFERENCES
from spark_vl.data.cells import identifier, unicode
from spark_vl.data.problems import checked_row, chosen_rows, ids_of_repeats, image_of, open_images, open_split
from spark_vl.data.recipes import PreferenceColumns, Recipe
from spark_vl.data.sources import DEFAULT_LIMITS, RowLimits, Rows, read_column
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Content, ImageRef


@dataclass(frozen=True)
class Preference:
    """A question, answers to it, and which one is the best."""

    id: str
    """`recipe/split/row`."""
    question: Content
    answers: tuple[Content, ...]
    """Two or four, in the order of the dataset, which may be the same in all rows (RewardBench 2 has the best first):
    show them in several orders (`reward_benchmarks.orders`)."""
    preferred: int
    """The place of the best answer in `answers`."""
    category: str
    recipe: str
    license: str = ""

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Those of the question and of the answers, in the order of the dataset."""
        return tuple(part for part in chain(self.question, *self.answers) if isinstance(part, ImageRef))


def open_preferences(
    recipe: Recipe, split: str, templater: Templater, limits: RowLimits = DEFAULT_LIMITS
) -> PreferenceSet:
    """The rows of one split of a reward benchmark.

    Args:
        templater: takes the effect from special tokens in texts of rows.
        limits: larger rows cannot be used.

    Raises:
        ValueError: the recipe is not one of a reward benchmark, or has no such split, or its source has no such file,
            split or column.
    """
    if not isinstance(recipe.columns, PreferenceColumns):
        raise ValueError(f"recipe {recipe.name}: is not a reward benchmark (columns.preferences)")
    rows, _ = open_split(recipe, split, limits)
    return PreferenceSet(recipe, split, templater, rows, limits)


class PreferenceSet:
    """The rows of one split of a reward benchmark, each made when it is asked for. No two have the same id.

    Raises:
        ValueError: the recipe's filter leaves no row.
    """

    def __init__(
        self, recipe: Recipe, split: str, templater: Templater, rows: Rows, limits: RowLimits = DEFAULT_LIMITS
    ) -> None:
        assert isinstance(recipe.columns, PreferenceColumns)
        self.recipe, self.split = recipe, split
        self._templater, self._rows, self._limits = templater, rows, limits
        self._adapter = PREFERENCES[recipe.columns.preferences]
        try:
            self._chosen = chosen_rows(rows, recipe.filter)
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name}: {error}") from error
        column = next(name for name in self._adapter.reads if name in ("id", "ID", "pair_id"))
        self.renamed = ids_of_repeats(read_column(rows, column), column, 1000)
        """Row of the source → the id that it has in place of the one in its cell, which an earlier row has."""

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Preference:
        """Row `index`, of those that the recipe's filter leaves.

        Raises:
            BadRecordError: the row cannot be used. Its images are not opened.
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} of {self.recipe.name}/{self.split}")
        number = self._chosen[index]
        record_id = f"{self.recipe.name}/{self.split}/#{number}"
        try:
            made = self._adapter.make(checked_row(self._rows, number, self._limits, None))
            record_id = f"{self.recipe.name}/{self.split}/{self.renamed.get(number) or identifier(made, 'id')}"
            return Preference(
                id=record_id,
                question=self._content(made["question"], "the question"),
                answers=tuple(self._content(content, "an answer") for content in made["answers"]),
                preferred=made["preferred"],
                category=unicode(made["category"], "category"),
                recipe=self.recipe.name,
                license=self.recipe.license,
            )
        except ValueError as error:
            raise BadRecordError(record_id, str(error)) from error

    def _content(self, parts: Sequence[Any], what: str) -> Content:
        content = tuple(
            image_of(part[0], None, what) if isinstance(part, list) else self._templater.neutralize(unicode(part, what))
            for part in parts
            if part != ""
        )
        if not any(isinstance(part, ImageRef) or part.strip() for part in content):
            raise ValueError(f"{what} is empty")
        return content


def check_preferences(preferences: PreferenceSet) -> Iterator[Preference | BadRecordError]:
    """Each row in order, as it is or as the error in it. Images are decoded."""
    for index in range(len(preferences)):
        try:
            row = preferences[index]
            open_images(row.id, row.images)
            yield row
        except BadRecordError as error:
            yield error
