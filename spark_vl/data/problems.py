"""Rows of a recipe as problems, one at a time. Rows are untrusted: each becomes a `PromptRecord`, or says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from spark_vl.answers import last_boxed, match_choice
from spark_vl.data.images import ImageError, image_path, load_image
from spark_vl.data.recipes import Recipe
from spark_vl.data.sources import Row, open_rows
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Content, ImageRef, PromptRecord


def open_recipe(recipe: Recipe, split: str, templater: Templater) -> ProblemSet:
    """The problems of one split (`train`, `validation`, `test`).

    Raises:
        ValueError: the recipe has no such split, or its source has no such file, split or column.
    """
    if split not in recipe.splits:
        raise ValueError(f"recipe {recipe.name}: splits: found {split!r}; allowed: {', '.join(recipe.splits)}")
    try:
        rows, root = open_rows(recipe.source, recipe.splits[split], recipe.columns.used)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: source: {error}") from error
    root = root if recipe.media_root is None else Path(recipe.media_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"recipe {recipe.name}: media_root: found {str(root)!r}, which is no folder")
    problems = ProblemSet(recipe, split, templater, rows, root)
    if recipe.source.kind == "hub" and root is None and problems.has_image_paths:
        raise ValueError(
            f"recipe {recipe.name}: media_root: is missing, and the column {recipe.columns.images!r} holds paths; "
            f"unpack the images and name their folder, for instance in a recipe file with base: {recipe.name}"
        )
    return problems


class ProblemSet:
    """The problems of one split of a recipe, made one at a time when asked for.

    Args:
        rows: the rows; one that cannot be read raises ValueError.
        root: folder that image paths are relative to; None: paths are refused.
    """

    def __init__(
        self, recipe: Recipe, split: str, templater: Templater, rows: Sequence[Row], root: Path | None
    ) -> None:
        self.recipe, self.split = recipe, split
        self._templater, self._rows, self._root = templater, rows, root

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
            if self.recipe.columns.id is not None:
                record_id = f"{self.recipe.name}/{self.split}/{_id(row, self.recipe.columns.id)}"
            return self._record(row, record_id)
        except ValueError as error:
            raise BadRecordError(record_id, str(error)) from error

    @property
    def has_image_paths(self) -> bool:
        """Whether the first row holds its images as paths."""
        column = self.recipe.columns.images
        return column is not None and len(self) > 0 and any(isinstance(i, str) for i in _list(self._rows[0][column]))

    def _record(self, row: Row, record_id: str) -> PromptRecord:
        recipe, columns = self.recipe, self.recipe.columns
        text, gold = _text(row, columns.question).strip(), _gold(_text(row, columns.answer))
        options = _options(row, columns.choices)
        if columns.verifier is not None and _cell(row, columns.verifier) is not None:
            verifier = _text(row, columns.verifier)
        elif options or (recipe.verifier_of(self.split) == "math" and _is_lettered(text, gold)):
            verifier = "choice"
        else:
            verifier = recipe.verifier_of(self.split)
        if verifier == "choice":
            gold = _letter(gold, options)
        if options and not _shows(text, options):
            text += "".join(f"\n{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
        question = self._question(text, self._images(row))
        return PromptRecord(
            id=record_id,
            kind="problem",
            messages=self._templater.problem(question),
            question=question,
            gold=gold,
            verifier=verifier,
            recipe=recipe.name,
            choices=options,
        )

    def _images(self, row: Row) -> list[ImageRef]:
        column = self.recipe.columns.images
        return [] if column is None else [self._image(item) for item in _list(_cell(row, column))]

    def _image(self, item: Any) -> ImageRef:
        match item:
            case bytes(data) | {"bytes": bytes(data)}:
                return ImageRef(data=data)
            case str(path) | {"bytes": None, "path": str(path)}:
                pass
            case _:
                raise ValueError(
                    f"an image is {_kind(item)}; bytes, a path, or a mapping of bytes and path are allowed"
                )
        if self._root is None:
            raise ValueError(
                f"an image is the path {path!r}, but the recipe has no media_root that paths are relative to"
            )
        ref = ImageRef(path=path, root=str(self._root))
        image_path(ref)
        return ref

    def _question(self, text: str, images: list[ImageRef]) -> Content:
        pieces = text.split(self.recipe.image_placeholder)
        if len(pieces) == 1:
            return (*images, text)
        if not any(piece.strip() for piece in pieces):
            raise ValueError("the question has no words")
        if len(pieces) != len(images) + 1:
            raise ValueError(
                f"the question has {len(pieces) - 1} placeholders {self.recipe.image_placeholder!r} "
                f"for {len(images)} images"
            )
        content = [part for pair in zip(pieces, [*images, ""], strict=True) for part in pair]
        return tuple(part for part in content if part != "")


def check(problems: ProblemSet) -> Iterator[PromptRecord | BadRecordError]:
    """Every row in order, as its record or as what is wrong with it; images are decoded and ids compared too."""
    seen: set[str] = set()
    for index in range(len(problems)):
        try:
            record = problems[index]
            for ref in record.images:
                load_image(ref)
            if record.id in seen:
                raise BadRecordError(record.id, f"row {index} has the id of an earlier row")
            seen.add(record.id)
            yield record
        except ImageError as error:
            yield BadRecordError(record.id, str(error))
        except BadRecordError as error:
            yield error


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _cell(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {_kind(value)}; text is allowed")
    if not value.strip():
        raise ValueError(f"{column!r} is empty")
    return _unicode(value, column)


def _unicode(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column!r} is not valid Unicode: {error}") from error
    return text


def _id(row: Row, column: str) -> str:
    value = _cell(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(row, column)
    if not text.isprintable():
        raise ValueError(f"{column!r} is {text!r}; printable text is allowed")
    return text


def _list(cell: Any) -> list[Any]:
    return [] if cell is None else list(cell) if isinstance(cell, list | tuple) else [cell]


def _options(row: Row, column: str | None) -> tuple[str, ...]:
    if column is None:
        return ()
    cell = _cell(row, column)
    if cell is None or cell == []:
        return ()
    if not isinstance(cell, list | tuple) or not all(isinstance(item, str) and item.strip() for item in cell):
        raise ValueError(f"{column!r} is {cell!r:.80}; a list of texts that are not empty is allowed")
    if not 2 <= len(cell) <= len(ascii_uppercase):
        raise ValueError(f"{column!r} has {len(cell)} options; 2 to {len(ascii_uppercase)} are allowed")
    return tuple(_unicode(item.strip(), column) for item in cell)


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


def _letter(gold: str, options: tuple[str, ...]) -> str:
    letter = match_choice(gold, options)
    if letter is None:
        raise ValueError(
            f"the answer {gold!r:.80} names no single option{f' of {list(options)!r:.200}' if options else ''}"
        )
    return letter


def _kind(value: Any) -> str:
    """A value's type, for messages; never the bytes of an image."""
    if isinstance(value, dict):
        return (
            f"a mapping of {', '.join(f'{key!r}: {type(item).__name__}' for key, item in value.items()) or 'nothing'}"
        )
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
