"""Rows of a recipe as problems, one at a time. Rows are untrusted: each becomes a `PromptRecord`, or an error that says
why not.

Those of a judgment dataset are prompts already, and become records of their own kind.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL.Image import Image

from spark_vl.answers import last_boxed, match_choices
from spark_vl.data.cells import answer, cell, identifier, items, options, text, type_name, unicode
from spark_vl.data.images import ImageError, encode_pixels, image_in_text, image_path, load_image
from spark_vl.data.judgments import record_of
from spark_vl.data.recipes import JudgmentColumns, Recipe
from spark_vl.data.sources import DEFAULT_LIMITS, Row, RowLimits, Rows, digest_rows, open_rows, read_column
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Content, ImageRef, ImageSize, PromptRecord
from spark_vl.verifiers import VERIFIERS, VerifierPool, check_golds

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64


def open_recipe(recipe: Recipe, split: str, templater: Templater, limits: RowLimits = DEFAULT_LIMITS) -> ProblemSet:
    """The problems of one split (`train`, `validation`, `test`).

    Args:
        limits: larger rows cannot be used.

    Raises:
        ValueError: the recipe has no such split, or its source has no such file, split or column.
    """
    if split not in recipe.splits:
        raise ValueError(f"recipe {recipe.name}: splits: found {split!r}; allowed: {', '.join(recipe.splits)}")
    try:
        rows, root = open_rows(recipe.source, recipe.splits[split], recipe.columns.used, limits)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: source: {error}") from error
    root = root if recipe.media_root is None else Path(recipe.media_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"recipe {recipe.name}: media_root: found {str(root)!r}, which is not a folder")
    problems = ProblemSet(recipe, split, templater, rows, root, limits)
    if recipe.source.type in ("hub", "factory") and root is None and problems.has_image_paths:
        raise ValueError(
            f"recipe {recipe.name}: media_root: is missing, and the column {recipe.columns.images!r} holds paths; "
            f"unpack the images and name their folder, for instance in a recipe file with base: {recipe.name}"
        )
    return problems


class ProblemSet:
    """The problems of one split of a recipe, made one at a time when asked for. No two have the same id.

    Args:
        rows: the rows; one that cannot be read raises ValueError.
        root: folder that image paths are relative to; None: paths are refused.
        limits: larger rows cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        templater: Templater,
        rows: Rows,
        root: Path | None,
        limits: RowLimits = DEFAULT_LIMITS,
    ) -> None:
        self.recipe, self.split = recipe, split
        self._templater, self._rows, self.root, self._limits = templater, rows, root, limits
        self.verifiers = frozenset({*VERIFIERS, *({own} if (own := recipe.verifier_of(split)) else ())})
        """That records may name. A dataset does not choose which code is imported: beside `VERIFIERS`, only the
        recipe's own `module:function`."""
        column = recipe.columns.id
        # A run adds to the id of a problem what it made of it, and that to what somebody makes of its judgments.
        self._longest_id = 4000 if isinstance(recipe.columns, JudgmentColumns) else 1000
        cells = () if column is None else read_column(rows, column)
        self.renamed: dict[int, str] = _ids_of_repeats(cells, str(column), self._longest_id)
        """Row → the id of its own that it has in place of the one in its cell, which an earlier row has."""
        if self.renamed:
            row, name = next(iter(self.renamed.items()))
            logger.warning(
                "%s/%s: %s of %s rows have the id of an earlier row; each has the number of its row added to its id, "
                "such as %r in row %s",
                *(recipe.name, split, len(self.renamed), len(rows), name, row),
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PromptRecord:
        """The problem in row `index`.

        Raises:
            BadRecordError: the row cannot be used. Its images are looked for, but not opened.
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} of {self.recipe.name}/{self.split}")
        record_id = f"{self.recipe.name}/{self.split}/#{index}"
        try:
            row = self._rows[index]
            if not isinstance(row, Mapping):
                raise ValueError(f"the row is {type_name(row)}; a mapping of columns is allowed")
            self._limits.check(row, self._image_column)
            if self.recipe.columns.id is not None:
                name = self.renamed.get(index) or identifier(row, self.recipe.columns.id, self._longest_id)
                record_id = f"{self.recipe.name}/{self.split}/{name}"
            return self._record(row, record_id)
        except ValueError as error:
            raise BadRecordError(record_id, str(error)) from error

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What these problems are, as JSON values: `recipe` (its name), `rows` (how many), `digest` (of their content,
        see `digest_rows`), and the fields of the recipe that decide what becomes of a row."""
        recipe, columns = self.recipe, self.recipe.columns
        facts = {
            "recipe": recipe.name,
            "rows": len(self),
            "digest": digest_rows(self._rows, columns.used, self._image_column),
            "columns": {name: column for name, column in vars(columns).items() if column is not None},
            "verifier": recipe.verifier_of(self.split),
            "settings": dict(recipe.settings),
            "weights": dict(recipe.weights),
            "image_placeholder": recipe.image_placeholder,
        }
        return json.loads(json.dumps(facts, default=str))

    @property
    def _image_column(self) -> str | None:
        columns = self.recipe.columns
        return "images" if isinstance(columns, JudgmentColumns) else columns.images

    @property
    def has_image_paths(self) -> bool:
        """Whether the first row holds its images as paths."""
        column = self.recipe.columns.images
        if column is None or not len(self):
            return False
        try:
            row = self._rows[0]
        except ValueError:  # which is said when the row is drawn
            return False
        return isinstance(row, Mapping) and any(_is_path(item) for item in items(row.get(column)))

    def _record(self, row: Row, record_id: str) -> PromptRecord:
        recipe, columns = self.recipe, self.recipe.columns
        if isinstance(columns, JudgmentColumns):
            return record_of(
                row,
                columns.judgments,
                id=record_id,
                recipe=recipe.name,
                verifiers=self.verifiers,
                neutralize=self._templater.neutralize,
            )
        question, gold = text(row, columns.question).strip(), _gold(answer(row, columns.answer))
        choices = () if columns.choices is None else options(row, columns.choices)
        if columns.verifier is not None and cell(row, columns.verifier) is not None:
            verifier = text(row, columns.verifier)
            if verifier not in self.verifiers:
                raise ValueError(
                    f"{columns.verifier!r} is {verifier!r:.100}; allowed: null, {', '.join(sorted(self.verifiers))}"
                )
        elif choices or (recipe.verifier_of(self.split) == "math" and _is_lettered(question, gold)):
            verifier = "choice"
        else:
            # A recipe of problems names one (`load_recipe`); only a judgment dataset's rows name theirs.
            verifier = str(recipe.verifier_of(self.split))
        if verifier == "choice":
            text(row, columns.answer)  # a number may count the options from 0 or from 1
            gold = _letters(gold, choices)
        if choices and not _shows(question, choices):
            lettered = zip(ascii_uppercase, choices, strict=False)
            question += "".join(f"\n{letter}. {option}" for letter, option in lettered)
        content = self._content(question, self._images(row))
        return PromptRecord(
            id=record_id,
            kind="problem",
            messages=self._templater.problem(content),
            question=content,
            gold=gold,
            verifier=verifier,
            recipe=recipe.name,
            choices=choices,
            settings=tuple(recipe.settings.items()) if verifier == recipe.verifier else (),
            weight=recipe.weight,
            shaping=tuple(recipe.shaping.items()),
            license=recipe.license,
        )

    def _images(self, row: Row) -> list[ImageRef]:
        column = self.recipe.columns.images
        return [] if column is None else [self._image(item) for item in items(cell(row, column))]

    def _image(self, item: Any) -> ImageRef:
        match item:
            case bytes() | bytearray() | memoryview() | {"bytes": bytes() | bytearray() | memoryview()}:
                return ImageRef(data=bytes(item["bytes"] if isinstance(item, Mapping) else item))
            case Image():
                return ImageRef(data=encode_pixels(item))
            case {"bytes": str(text)}:
                if (data := image_in_text(text)) is None:
                    raise ValueError(f"the bytes of an image are the text {text!r:.60}, which is not base64")
                return ImageRef(data=data)
            case str(path) | {"bytes": None, "path": str(path)} | {"path": str(path)}:
                if (data := image_in_text(path)) is not None:
                    return ImageRef(data=data)
            case _:
                raise ValueError(
                    f"an image is {type_name(item)}; allowed are bytes, a path, base64, a data URL, a mapping of bytes "
                    "and path, or an image of Pillow"
                )
        unicode(path, str(self.recipe.columns.images))
        if self.root is None:
            raise ValueError(
                f"an image is the path {path!r:.100}, but the recipe has no media_root that paths are relative to"
            )
        ref = ImageRef(path=path, root=str(self.root))
        image_path(ref)
        return ref

    def _content(self, question: str, images: list[ImageRef]) -> Content:
        pieces = question.split(self.recipe.image_placeholder)
        if len(pieces) == 1:
            return (*images, question)
        if not any(piece.strip() for piece in pieces):
            raise ValueError("the question has no words")
        if len(pieces) != len(images) + 1:
            raise ValueError(
                f"the question has {len(pieces) - 1} placeholders {self.recipe.image_placeholder!r} "
                f"for {len(images)} images"
            )
        between: list[str | ImageRef] = [*images, ""]
        content = [part for pair in zip(pieces, between, strict=True) for part in pair]
        return tuple(part for part in content if part != "")


def data_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """How problem sets differ from earlier ones, recipe by recipe, from the fingerprints of both."""
    was, now = ({each["recipe"]: each for each in fingerprints} for fingerprints in (old, new))
    changes = [f"{name}: is gone" for name in was if name not in now]
    for name, fields in now.items():
        if name not in was:
            changes.append(f"{name}: is new")
            continue
        before = was[name]
        if before["rows"] != fields["rows"]:
            changes.append(f"{name}: {before['rows']} rows → {fields['rows']} rows")
        elif before["digest"] != fields["digest"]:
            changes.append(f"{name}: as many rows as before, with other content")
        for field in fields:
            if field not in ("rows", "digest") and field in before and before[field] != fields[field]:
                changes.append(f"{name}: {field}: {before[field]!r:.100} → {fields[field]!r:.100}")
    if not changes and list(was) != list(now):
        changes.append(f"the order of the recipes: {', '.join(was)} → {', '.join(now)}")
    return changes


def check(problems: ProblemSet, verifiers: VerifierPool) -> Iterator[PromptRecord | BadRecordError]:
    """Each row in order, as its record or as the error in it. Images are decoded, and golds given to their
    verifiers."""
    for start in range(0, len(problems), _ROWS_AT_ONCE):
        rows: list[PromptRecord | BadRecordError] = []
        sized: list[PromptRecord] = []
        for index in range(start, min(start + _ROWS_AT_ONCE, len(problems))):
            try:
                record = problems[index]
                sizes = [load_image(ref).size for ref in record.images]
                image_sizes = tuple(ImageSize(size, size) for size in sizes)
                sized.append(replace(record, image_sizes=image_sizes, coordinates="original"))
                rows.append(record)
            except ImageError as error:
                rows.append(BadRecordError(record.id, str(error)))
            except BadRecordError as error:
                rows.append(error)
        faults = iter(check_golds(verifiers, sized))
        for row in rows:
            yield row if isinstance(row, BadRecordError) else next(faults) or row


def _is_path(item: Any) -> bool:
    """Whether an image is a text that names a file; one that cannot be read is left to its row's own error."""
    try:
        return isinstance(item, str) and image_in_text(item) is None
    except ImageError:
        return False


def _ids_of_repeats(cells: Iterable[Any], column: str, longest: int) -> dict[int, str]:
    """Row → an id of its own, `ID#ROW`, for each row whose cell has the id of an earlier row.

    Args:
        cells: of `column`, one for each row. Those that hold no id are left to the row's own error.
    """
    taken: set[str] = set()
    repeats: dict[int, str] = {}
    for index, value in enumerate(cells):
        try:
            name = identifier({column: value}, column, longest)
        except ValueError:
            continue
        if name in taken:
            repeats[index] = name
        taken.add(name)
    for index, name in repeats.items():
        repeats[index] = f"{name}#{index}"
        while repeats[index] in taken:  # as a cell; two repeats differ, since they end in the numbers of their rows
            repeats[index] += f"#{index}"
    return repeats


def _shows(question: str, options: tuple[str, ...]) -> bool:
    """Whether a question shows its options: each after its letter ("A. 5", "(A) 5", "A) 5", "A: 5"), or in the picture
    only (options that are nothing but their letters)."""
    pairs = list(zip(ascii_uppercase, options, strict=False))
    return all(letter == option for letter, option in pairs) or all(
        any(f"{letter}{mark} {option}" in question for mark in ".):") for letter, option in pairs
    )


def _is_lettered(question: str, answer: str) -> bool:
    """Whether an answer is one of the letters of the options that a question lists."""
    return re.fullmatch("[A-Z]", answer) is not None and all(
        re.search(rf"(?<![A-Za-z0-9]){letter}\s*[.):、．：]", question) for letter in {"A", "B", answer}
    )


def _gold(answer: str) -> str:
    boxed = last_boxed(answer)
    if boxed is None and "\\boxed" in answer:
        raise ValueError(f"the answer's box is empty or does not close: {answer!r:.80}")
    return answer.strip() if boxed is None else boxed


def _letters(gold: str, options: tuple[str, ...]) -> str:
    letters = match_choices(gold, options, letter_first=False)  # it may be meant as either
    if not letters:
        of = f" of {list(options)!r:.200}" if options else ""
        raise ValueError(f"the answer {gold!r:.80} does not name any option{of}")
    return ", ".join(letters)
