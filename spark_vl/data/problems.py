"""Rows of a recipe as problems, one at a time. Rows are untrusted: each becomes a `PromptRecord`, or an error that says
why not.

Those of a judgment dataset are prompts already, and become records of their own kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL.Image import Image

from spark_vl.answers import last_boxed, match_choices, plain
from spark_vl.data.benchmarks import ADAPTERS, AdaptedRows
from spark_vl.data.cells import answer, identifier, items, optional, options, text, type_name, unicode
from spark_vl.data.images import ImageError, count_pixels, encode_pixels, image_in_text, image_path, load_image
from spark_vl.data.judgments import record_of
from spark_vl.data.recipes import Columns, JudgmentColumns, PreferenceColumns, Range, Recipe, check_verifiers
from spark_vl.data.sources import (
    DEFAULT_LIMITS,
    PlacedRows,
    Row,
    RowLimits,
    Rows,
    column_names,
    digest_rows,
    open_rows,
    read_column,
)
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Content, ImageRef, ImageSize, PromptRecord, interleaved
from spark_vl.verifiers import VERIFIERS, VerifierPool, check_golds
from spark_vl.verifiers.base import SELF_JUDGE, check_settings, one_of, public_name

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64


class FilteredRowError(BadRecordError):
    """Nothing is wrong with the row, but the recipe's `pixels` leave it out."""


def open_recipe(
    recipe: Recipe, split: str, templater: Templater, limits: RowLimits = DEFAULT_LIMITS, *, weighted: bool = False
) -> ProblemSet:
    """The problems of one split (`train`, `validation`, `test`).

    Args:
        limits: larger rows cannot be used.
        weighted: they will be drawn as often as the recipe's `weight` says; elsewhere it is refused.

    Raises:
        ValueError: the recipe has no such split, its source has no such file, split or column, a verifier of the user's
            own cannot be used (`check_verifiers`), or it has a weight and is not `weighted`.
    """
    if recipe.per_epoch != 1 and not weighted:
        raise ValueError(
            f"recipe {recipe.name}: weight: says how often rows are drawn in an epoch of training, and is allowed in "
            "data.recipes only; here each row counts once"
        )
    if isinstance(recipe.columns, PreferenceColumns):
        raise ValueError(
            f"recipe {recipe.name}: is a reward benchmark: its rows are answers to compare, not problems to solve; "
            "`spark-vl eval` asks it"
        )
    check_verifiers(recipe)
    rows, root = open_split(recipe, split, limits)
    if recipe.adapter is not None:
        rows = AdaptedRows(rows, ADAPTERS[recipe.adapter])
    root = root if recipe.media_root is None else Path(recipe.media_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"recipe {recipe.name}: media_root: found {str(root)!r}, which is not a folder")
    if not len(rows):
        raise ValueError(f"recipe {recipe.name}: splits: {split}: {recipe.splits[split]!r} has no rows")
    problems = ProblemSet(recipe, split, templater, rows, root, limits)
    if recipe.source.type in ("hub", "factory") and root is None and problems.has_image_paths:
        raise ValueError(
            f"recipe {recipe.name}: media_root: is missing, and the column {recipe.columns.images!r} holds paths; "
            f"unpack the images and name their folder, for instance in a recipe file with base: {recipe.name}"
        )
    return problems


def open_split(recipe: Recipe, split: str, limits: RowLimits) -> tuple[Rows, Path | None]:
    """The rows of one split, and the folder that their images are below, if the source has one.

    Raises:
        ValueError: the recipe has no such split, or its source has no such file, split or column.
    """
    if split not in recipe.splits:
        raise ValueError(f"recipe {recipe.name}: splits: found {split!r}; allowed: {', '.join(recipe.splits)}")
    try:
        return open_rows(recipe.source, recipe.splits[split], recipe.columns_read, limits)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: source: {error}") from error


class ProblemSet:
    """The problems of one split of a recipe, made one at a time when asked for. No two have the same id.

    Args:
        rows: the rows; one that cannot be read raises ValueError.
        root: folder that image paths are relative to; None: paths are refused.
        limits: larger rows cannot be used.

    Raises:
        ValueError: the recipe's filter leaves no row.
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
        try:
            self._chosen = chosen_rows(rows, recipe.filter)
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name}: {error}") from error
        self.verifiers = recipe.own_verifiers | {*VERIFIERS, SELF_JUDGE}
        """That records may name. A dataset does not choose which code is imported: beside `VERIFIERS` and `SELF_JUDGE`,
        only what the recipe itself names."""
        column = recipe.columns.id
        # A run adds to the id of a problem what it made of it, and that to what somebody makes of its judgments.
        self._longest_id = 4000 if isinstance(recipe.columns, JudgmentColumns) else 1000
        cells = () if column is None else read_column(rows, column)
        self.renamed: dict[int, str] = ids_of_repeats(cells, str(column), self._longest_id)
        """Row of the source → the id that it has in place of the one in its cell, which an earlier row has."""
        if self.renamed:
            row, name = next(iter(self.renamed.items()))
            logger.warning(
                "%s/%s: %s of %s rows have the id of an earlier row; each has the number of its row added to its id, "
                "such as %r in row %s",
                *(recipe.name, split, len(self.renamed), len(rows), name, row),
            )
        if recipe.exclude is not None:
            self._exclude(Path(recipe.exclude), column)

    def _exclude(self, file: Path, column: str | None) -> None:
        """Leave out the rows whose ids stand in `file`."""
        where = f"recipe {self.recipe.name}: exclude"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: {file} cannot be read: {error}") from error
        start = f"{self.recipe.name}/{self.split}/"
        unwanted = {line.removeprefix(start) for line in lines if line.startswith(start)}
        cells = [None] * len(self._rows) if column is None else list(read_column(self._rows, column))
        left = array("q")
        for number in self._chosen:
            try:
                name = self.renamed.get(number) or _name(cells[number], str(column), number, self._longest_id)
            except ValueError:  # a bad row, which is said when it is drawn
                name = f"#{number}"
            if name in unwanted:
                unwanted.discard(name)
            else:
                left.append(number)
        if unwanted:
            raise ValueError(f"{where}: {file}: no row has the id {start}{min(unwanted)}; the data may be another one")
        if not left:
            raise ValueError(f"{where}: {file}: leaves no row")
        self._chosen = left

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> PromptRecord:
        """The problem in row `index`, of those that the recipe's filter leaves.

        Raises:
            BadRecordError: the row cannot be used. Its images are looked for, but not opened, unless the recipe filters
                by `pixels`.
            FilteredRowError: the recipe's `pixels` leave the row out.
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} of {self.recipe.name}/{self.split}")
        number = self._chosen[index]
        record_id = f"{self.recipe.name}/{self.split}/#{number}"
        try:
            row = checked_row(self._rows, number, self._limits, self._image_column)
            if self.recipe.columns.id is not None:
                column = self.recipe.columns.id
                name = self.renamed.get(number) or _name(row.get(column), column, number, self._longest_id)
                record_id = f"{self.recipe.name}/{self.split}/{name}"
            record = self._record(row, record_id)
            unwanted = self._unwanted_pixels(record)
        except ValueError as error:
            raise self.placed(BadRecordError(record_id, str(error)), index) from error
        if unwanted is not None:
            raise FilteredRowError(record_id, f"an image has {unwanted} pixels, not in {self.recipe.pixels}")
        return record

    def _unwanted_pixels(self, record: PromptRecord) -> int | None:
        """Those of the first image that has more or fewer than the recipe wants."""
        wanted = self.recipe.pixels
        if wanted is None:
            return None
        return next((pixels for pixels in map(count_pixels, record.images) if pixels not in wanted), None)

    @property
    def unused(self) -> list[str]:
        """Columns of the data, as far as the first row shows them, that the recipe does not name. Those of judgments
        are fixed."""
        if isinstance(self.recipe.columns, JudgmentColumns):
            return []
        rows = self._rows.source if isinstance(self._rows, AdaptedRows) else self._rows
        return [name for name in column_names(rows) if name not in self.recipe.columns_read]

    def placed(self, error: BadRecordError, index: int) -> BadRecordError:
        """`error`, of row `index` as `__getitem__` counts, with the place where a person finds that row."""
        if not isinstance(self._rows, PlacedRows):
            return error
        return BadRecordError(error.record_id, f"{error.reason} ({self._rows.place(self._chosen[index])})")

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
            "answer_after": recipe.answer_after,
            "filter": dict(recipe.filter),
            "exclude": None if recipe.exclude is None else hashlib.sha256(bytes(array("q", self._chosen))).hexdigest(),
            "adapter": recipe.adapter,
            "tags": dict(recipe.tags),
            "pixels": recipe.pixels,
            "weight": recipe.per_epoch,
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
            row = self._rows[self._chosen[0]]
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
        assert isinstance(columns, Columns)  # `open_recipe` refuses the others
        question = text(row, columns.question).strip()
        named = optional(row, columns.verifier)
        if named is None:
            named = recipe.verifier_of(self.split)
        without_gold = named == SELF_JUDGE  # its answer is not looked at
        gold = "" if without_gold else _gold(answer(row, str(columns.answer)), recipe.answer_after)
        choices = () if optional(row, columns.choices) is None else options(row, str(columns.choices))
        default = recipe.verifier_of(self.split)
        if columns.verifier is not None and optional(row, columns.verifier) is not None:
            named = text(row, columns.verifier)
            if (verifier := one_of(named, self.verifiers)) is None:
                allowed = ", ".join(sorted(map(public_name, self.verifiers)))
                raise ValueError(f"{columns.verifier!r} is {named!r:.200}; allowed: null, {allowed}")
        elif (choices and not without_gold) or (default == "math" and _is_lettered(question, gold)):
            verifier = "choice"
        else:
            if default is None:
                raise ValueError(f"{columns.verifier!r} is null, and the recipe has no verifier")
            verifier = default
        if verifier == "choice":
            text(row, str(columns.answer))  # a number may count the options from 0 or from 1
            letters = _letters(gold, choices)
            gold = letters if choices or len(letters) > 1 else plain(gold)
        if choices and not _shows(question, choices):
            lettered = zip(ascii_uppercase, choices, strict=False)
            question += "".join(f"\n{letter}. {option}" for letter, option in lettered)
        if not question.replace(recipe.image_placeholder, "").strip():
            raise ValueError("the question has no words")
        content = place_images(question, self._images(row), recipe.image_placeholder)
        return PromptRecord(
            id=record_id,
            kind="problem",
            messages=self._templater.problem(content),
            question=content,
            gold=gold,
            verifier=verifier,
            recipe=recipe.name,
            choices=choices,
            settings=self._settings(row, columns.settings, verifier),
            weight=recipe.weight,
            shaping=tuple(recipe.shaping.items()),
            license=recipe.license,
            tags=tuple(
                (name, _tag(row, column)) for name, column in recipe.tags.items() if row.get(column) is not None
            ),
        )

    def _settings(self, row: Row, column: str | None, verifier: str) -> tuple[tuple[str, Any], ...]:
        """Those of the recipe for `verifier`, with the row's, in `column`, in their place."""
        own = optional(row, column)
        if own is None:
            return tuple(self.recipe.settings.get(verifier, {}).items())
        if not isinstance(own, Mapping):
            raise ValueError(f"{column!r} is {type_name(own)}; a mapping of settings is allowed")
        own = {str(name): value for name, value in own.items() if value is not None}
        if verifier in VERIFIERS:
            check_settings(verifier, own)
        return tuple((dict(self.recipe.settings.get(verifier, {})) | own).items())

    def _images(self, row: Row) -> list[ImageRef]:
        column = self.recipe.columns.images
        images = items(optional(row, column))
        if column is not None:
            self._limits.check({column: images}, column)  # a list that was the text of one
        return [image_of(item, self.root, column) for item in images]


def image_of(item: Any, root: Path | None, name: str | None) -> ImageRef:
    """The image that a cell holds: bytes, a path, base64, a data URL, a mapping of bytes and path, or one of Pillow.

    Args:
        root: folder that paths are relative to and cannot leave; None: paths are refused.
        name: of the column.

    Raises:
        ValueError: it is none of these. Files are looked for, but not opened.
    """
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
    unicode(path, str(name))
    if root is None:
        raise ValueError(f"an image is the path {path!r:.100}, but there is no media_root that paths are relative to")
    if Path(path).is_absolute():
        path = _below(path, root)
    ref = ImageRef(path=path, root=str(root))
    image_path(ref)
    return ref


def checked_row(rows: Rows, number: int, limits: RowLimits, image_column: str | None) -> Row:
    """Row `number`, of the size that is allowed.

    Raises:
        ValueError: it is larger, or cannot be read.
    """
    row = rows[number]
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {type_name(row)}; a mapping of columns is allowed")
    limits.check(row, image_column)
    return row


def place_images(text: str, images: Sequence[ImageRef], placeholder: str = "<image>") -> Content:
    """`text` with each image where a placeholder stands for it; without placeholders, images go first.

    Raises:
        ValueError: there are more placeholders than images, or fewer.
    """
    pieces = text.split(placeholder)
    if len(pieces) == 1:
        return (*images, text)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"the text has {len(pieces) - 1} placeholders {placeholder!r} for {len(images)} images")
    return interleaved(pieces, images)


def _tag(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str | int | float):
        raise ValueError(f"{column!r} is {type_name(value)}; a text or a number is allowed as a tag")
    return unicode(str(value), column)


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
    """Each row in order, as its record or as the error in it (`FilteredRowError`: none). Images are decoded, and golds
    given to their verifiers."""
    for start in range(0, len(problems), _ROWS_AT_ONCE):
        rows: list[PromptRecord | BadRecordError] = []
        sized: list[PromptRecord] = []
        places: list[int] = []
        for index in range(start, min(start + _ROWS_AT_ONCE, len(problems))):
            try:
                record = problems[index]
                sizes = [load_image(ref).size for ref in record.images]
                image_sizes = tuple(ImageSize(size, size) for size in sizes)
                rows.append(record)
                if record.verifier != SELF_JUDGE:
                    sized.append(replace(record, image_sizes=image_sizes, coordinates="original"))
                    places.append(index)
            except ImageError as error:
                rows.append(problems.placed(BadRecordError(record.id, str(error)), index))
            except BadRecordError as error:
                rows.append(error)
        found = zip(check_golds(verifiers, sized), places, strict=True)
        faults = iter([fault and problems.placed(fault, index) for fault, index in found])
        for row in rows:
            has_gold = not isinstance(row, BadRecordError) and row.verifier != SELF_JUDGE
            yield (next(faults) or row) if has_gold else row


def open_images(record_id: str, images: Sequence[ImageRef]) -> None:
    """Raises a BadRecordError about `record_id` where one of its images cannot be opened."""
    try:
        for ref in images:
            load_image(ref)
    except ImageError as error:
        raise BadRecordError(record_id, str(error)) from error


def chosen_rows(rows: Rows, wanted: Mapping[str, tuple[Any, ...] | Range]) -> Sequence[int]:
    """The numbers of the rows that have one of the wanted values in each column. A row that cannot be read is among
    them: it is a bad row, not one that nobody wanted.

    Raises:
        ValueError: there are rows, but none of those.
    """
    chosen: Sequence[int] = range(len(rows))
    for column, values in wanted.items():
        cells = list(read_column(rows, column))
        left = array("q", (i for i in chosen if cells[i] in values or (cells[i] is None and not _is_readable(rows, i))))
        if chosen and not left:
            found = ", ".join(islice(dict.fromkeys(f"{cells[i]!r:.40}" for i in chosen), 10))
            allowed = f"a value in {values}" if isinstance(values, Range) else f"one of {list(values)}"
            raise ValueError(f"filter: none of {len(chosen)} rows has in {column!r} {allowed}; found: {found}")
        chosen = left
    return chosen


def _is_readable(rows: Rows, index: int) -> bool:
    try:
        rows[index]
    except ValueError:
        return False
    return True


def _is_path(item: Any) -> bool:
    """Whether an image is a text that names a file; one that cannot be read is left to its row's own error."""
    try:
        return isinstance(item, str) and image_in_text(item) is None
    except ImageError:
        return False


def ids_of_repeats(cells: Iterable[Any], column: str, longest: int) -> dict[int, str]:
    """Row → an id of its own, `ID#ROW`, for each row whose cell has the id of an earlier row.

    Args:
        cells: of `column`, one for each row. Those that hold no id are left to the row's own error.
    """
    taken: set[str] = set()
    repeats: dict[int, str] = {}
    for index, value in enumerate(cells):
        try:
            name = _name(value, column, index, longest)
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


def _name(value: Any, column: str, index: int, longest: int) -> str:
    """The id of row `index`, whose cell of `column` is `value`: its number where it has none."""
    return f"#{index}" if value is None else identifier({column: value}, column, longest)


def _below(path: str, root: Path) -> str:
    """`path`, which is absolute, from `root`. A folder of which either is a link may be written as it is or as it is
    called; where the file really is decides `image_path`."""
    for folder in dict.fromkeys((root.absolute(), root.resolve())):
        if Path(path).is_relative_to(folder):
            return str(Path(path).relative_to(folder))
    raise ValueError(
        f"an image is the path {path!r:.200}, which is not below the media root {str(root)!r}; set media_root to a "
        "folder that all images are in"
    )


def _shows(question: str, options: tuple[str, ...]) -> bool:
    """Whether a question shows its options: each after its letter ("A. 5", "(A) 5", "A) 5", "A: 5"), or in the picture
    only (options that are nothing but their letters)."""
    pairs = list(zip(ascii_uppercase, options, strict=False))
    return all(letter == option for letter, option in pairs) or all(
        any(f"{letter}{mark} {option}" in question for mark in ".):") for letter, option in pairs
    )


def _is_lettered(question: str, answer: str) -> bool:
    """Whether an answer names options that a question lists in order, by letter ("B", "(B)", "B. 5 cm", "AC")."""
    letters = match_choices(answer) if re.match(r"\(?[A-Z]", plain(answer)) else ()
    end = 0
    for letter in sorted({"A", "B", *letters}):
        listed = re.compile(rf"(?<![A-Za-z0-9]){letter}\s*[.):、．：]").search(question, end)
        if listed is None:
            return False
        end = listed.end()
    return letters != ()


def _gold(answer: str, after: str | None) -> str:
    if after is not None:
        _, found, final = answer.rpartition(after)
        if not found or not final.strip():
            raise ValueError(f"nothing stands behind {after!r} in the answer {answer!r:.80}")
        answer = final
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
