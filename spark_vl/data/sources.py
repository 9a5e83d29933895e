"""Where the rows of a recipe come from: the Hub, files, or a function. A row is read when it is asked for."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

Row = Mapping[str, Any]


class Rows(Protocol):
    """The rows of a split, each read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@runtime_checkable
class PlacedRows(Rows, Protocol):
    """Rows of a file that a person may open."""

    def place(self, index: int) -> str:
        """Where the row stands, such as `train.jsonl, line 4`."""


@runtime_checkable
class ColumnarRows(Rows, Protocol):
    """Rows of which one column can be read without the others."""

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`."""


@runtime_checkable
class DigestedRows(Rows, Protocol):
    """Rows that know a digest of their content."""

    def digest(self, images: str | None) -> str:
        """See `digest_rows`."""


@dataclass(frozen=True)
class RowLimits:
    """The most that a row may hold. `DataConfig` says why; the defaults are the same."""

    bytes: int = 2**27
    chars: int = 1_000_000
    images: int = 256

    def check(self, row: Row, images: str | None) -> None:
        """Refuse a row that holds more.

        Args:
            images: the column with the images.

        Raises:
            ValueError: says which limit, what was found and what is allowed.
        """
        if images is not None and isinstance(found := row.get(images), list | tuple) and len(found) > self.images:
            raise ValueError(
                f"{images!r} holds {len(found)} images; {self.images} are allowed in a row (data.max_row_images)"
            )
        size, chars = 0, 0
        for is_image, cells in ((False, [v for k, v in row.items() if k != images]), (True, [row.get(str(images))])):
            waiting = [cells]
            while waiting:
                for value in waiting.pop():
                    if isinstance(value, str) and not is_image:
                        chars += len(value)
                    elif isinstance(value, str | bytes | bytearray):  # the texts of images are their bytes, in base64
                        size += len(value)
                    elif isinstance(value, Mapping):
                        waiting.append([*value, *value.values()])
                    elif isinstance(value, list | tuple):
                        waiting.append(list(value))
                    chars += 1
                self.check_size(size, chars)

    def check_size(self, size: int, chars: int = 0) -> None:
        """Refuse a row of `size` bytes, or of `chars` characters and values."""
        if size > self.bytes:
            raise ValueError(f"the row has {size} bytes or more; {self.bytes} are allowed (data.max_row_bytes)")
        if chars > self.chars:
            raise ValueError(
                f"the row has {chars} characters and values or more; {self.chars} are allowed (data.max_row_chars)"
            )


DEFAULT_LIMITS = RowLimits()

SourceType = Literal["hub", "jsonl", "csv", "parquet", "folder", "factory"]
FILES = ("jsonl", "csv", "parquet", "folder")
"""Those whose location is a folder here."""


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    type: SourceType
    location: str
    """`hub`: id of a dataset, or a local copy of its repository. `jsonl`, `csv`, `parquet`: the folder of the files.
    `folder`: the folder of the splits' folders, each with images and a `metadata.jsonl`. `factory`: `module:function`,
    called with `split=`, which returns a sequence of rows, or a `datasets.Dataset`; a row that cannot be made raises
    ValueError. Where making a row is slow, the sequence should be `ColumnarRows`: the ids of all rows are read when the
    split is opened."""
    config: str | None = None
    """`hub`: name of the dataset's configuration."""
    revision: str | None = None
    """`hub`: commit, tag or branch."""


def open_rows(
    source: Source, split: str, columns: Sequence[str], limits: RowLimits = DEFAULT_LIMITS
) -> tuple[Rows, Path | None]:
    """The rows of `split`, and the folder that their image paths are relative to (None: they have no such folder).

    Args:
        split: `hub`, `factory`: the source's name of the split; of a local `hub` folder without a README.md, as a run
            leaves it, the beginning of its files' names (`<config>/<split>-*.parquet`). `jsonl`, `csv`: its file.
            `parquet`: its file, or a pattern such as `data/train-*.parquet`. `folder`: its folder.
        columns: the columns that are read; the others of a `hub`, `csv` or `parquet` source are left alone.
        limits: a row of a file that is larger raises ValueError when it is asked for, and is not expanded.

    Raises:
        ValueError: the file, split, column or function is not there; or a parquet file's rows are on average
            larger than `limits` allow.
    """
    match source.type:
        case "factory":
            return _with_columns(_call_factory(source.location, split, columns, limits), columns), None
        case "jsonl":
            rows = _JsonLines(_files(source.location, split)[0], limits)
            return _with_columns(rows, columns), Path(source.location)
        case "folder":
            folder = Path(source.location, split)
            return _with_columns(_JsonLines(_files(folder, "metadata.jsonl")[0], limits), columns), folder
        case "csv":
            return _ArrowRows(_read_csv(_files(source.location, split)[0]), columns, limits), Path(source.location)
        case "parquet":
            return _ArrowRows(_read_parquet(source.location, split, limits), columns, limits), Path(source.location)
        case "hub":
            folder = Path(source.location)
            if source.config and folder.is_dir() and not (folder / "README.md").exists():  # judgments of a run
                pattern = f"{source.config}/{split}-*.parquet"
                return _ArrowRows(_read_parquet(source.location, pattern, limits), columns, limits), None
            return _ArrowRows(_open_repository(source, split), columns, limits), None


def _with_columns(rows: Rows, columns: Sequence[str]) -> Rows:
    """`rows`, in each of which a column may be missing, but not in all of them: its name would be wrong.

    Raises:
        ValueError: no row that can be read has one of `columns`.
    """
    missing, found = set(columns), dict[str, None]()
    for index in range(len(rows)):  # mostly, the first row has them all
        if not missing:
            return rows
        try:
            row = rows[index]
        except ValueError:  # which is said when the row is drawn
            continue
        missing -= set(row)
        found |= dict.fromkeys(islice(row, 100))
    if found and missing:
        names = ", ".join(islice(found, 100))
        raise ValueError(f"no row has a column {', '.join(sorted(missing))}; the columns are {names:.500}")
    return rows


def read_column(rows: Rows, name: str) -> Iterator[Any]:
    """The cells of column `name`, one for each row; None where the row cannot be read or lacks it."""
    if isinstance(rows, ColumnarRows):
        yield from rows.column(name)
        return
    for index in range(len(rows)):
        try:
            row = rows[index]
        except ValueError:
            yield None
        else:
            yield row.get(name)


def column_names(rows: Rows) -> list[str]:
    """Names of the columns of a table, those too that are left alone; else of the first row that can be read."""
    if isinstance(rows, _ArrowRows):
        return rows.column_names
    for index in range(len(rows)):
        with suppress(ValueError):
            return [str(name) for name in rows[index]]
    return []


_ROWS_SAMPLED = 64
"""Rows of a factory that its digest reads: each may take long to make."""


def digest_rows(rows: Rows, columns: Sequence[str], images: str | None) -> str:
    """SHA-256 that tells rows from others in seconds, for any number of them. It covers their texts, and of the images
    their paths or sizes in bytes, never their pixels; of what a factory makes, 64 rows without the images.

    Args:
        columns: those that are used.
        images: the one of the images.
    """
    if isinstance(rows, DigestedRows):
        return rows.digest(images)
    digest = hashlib.sha256()
    count = len(rows)
    all_of_them = isinstance(rows, list | tuple) or count <= _ROWS_SAMPLED
    for index in (
        range(count) if all_of_them else (i * (count - 1) // (_ROWS_SAMPLED - 1) for i in range(_ROWS_SAMPLED))
    ):
        try:
            row = rows[index]
            cells = [row.get(name) for name in columns if name != images] if isinstance(row, Mapping) else None
        except ValueError as error:
            cells = [str(error)]
        # What is not JSON may show itself with its address in memory.
        digest.update(json.dumps(cells, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def _read_parquet(folder: str, pattern: str, limits: RowLimits) -> datasets.Dataset:
    import datasets  # slow to import

    files = _files(folder, pattern)
    for file in files:
        _check_parquet(file, limits)
    with _read_in_words(folder):
        return datasets.Dataset.from_parquet([str(file) for file in files])


def _open_repository(source: Source, split: str) -> datasets.Dataset:
    """As `datasets.load_dataset`, of files in the repository alone: its README.md can name any other as well.

    Raises:
        ValueError, OSError: it cannot be opened.
    """
    import datasets

    with _read_in_words(source.location):
        builder = datasets.load_dataset_builder(source.location, source.config, revision=source.revision)
        for files in (builder.config.data_files or {}).values():
            for file in files:
                if not _is_inside(str(file), source.location):
                    raise ValueError(
                        f"{source.location!r}: data_files in its README.md: found {str(file)!r:.200}; allowed: files "
                        "of the same repository"
                    )
        builder.download_and_prepare()
        splits = builder.info.splits or {}
        if re.split(r"[\[+]", split)[0] not in splits:
            few = "; of judgments, one problem in 20 is in 'test'" if split == "test" else ""
            raise ValueError(f"{source.location!r} has no split {split!r}; allowed: {', '.join(splits)}{few}")
        return builder.as_dataset(split)


@contextmanager
def _read_in_words(location: str) -> Iterator[None]:
    """Turn what `datasets` raises into a ValueError; it has no common class for what odd metadata cause."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{location!r}: its README.md or its files cannot be read: {reason:.500}") from error


def _is_inside(file: str, repository: str) -> bool:
    """Whether a file is one of a repository, which is an id on the Hub or a folder."""
    folder = Path(repository)
    if not folder.is_dir():
        return file.startswith(f"hf://datasets/{repository}@")
    if "://" in file:
        return False
    folder = folder.resolve()
    # The Hub's cache keeps the files of a snapshot beside it.
    places = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(Path(file).resolve().is_relative_to(place) for place in places)


def _files(folder: str | Path, pattern: str) -> list[Path]:
    try:
        files = sorted(file for file in Path(folder).glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"found {pattern!r}; allowed: a file or a pattern below {str(folder)!r} ({error})") from error
    if not files:
        raise ValueError(f"no file {pattern!r} in {str(folder)!r}")
    return files


def _call_factory(location: str, split: str, columns: Sequence[str], limits: RowLimits) -> Rows:
    module, _, function = location.partition(":")
    found = getattr(importlib.import_module(module), function)(split=split)
    # Who returns one has imported it.
    if "datasets" in sys.modules and isinstance(found, sys.modules["datasets"].Dataset):
        return _ArrowRows(found, columns, limits)
    is_frame = "pandas" in sys.modules and isinstance(found, sys.modules["pandas"].DataFrame)
    if is_frame or isinstance(found, Mapping | str) or not isinstance(found, Sized) or not isinstance(found, _Indexed):
        advice = "; to_dict('records') is one" if is_frame else ""
        raise ValueError(
            f"{location} returned {type(found).__name__}; allowed: a sequence of rows, such as a list of mappings or a "
            f"datasets.Dataset of one split{advice}"
        )
    return found


@runtime_checkable
class _Indexed(Protocol):
    def __getitem__(self, index: int, /) -> Any: ...


_MAX_EXPANDED_BYTES = 2**29
"""Largest size in memory of what is small in a parquet file; `datasets` holds nearly twice as much at a time."""
_SMALL_BYTES = 16 * 2**20
"""A column of a row group is small if it has at most so many bytes in the file. Of larger ones the size is believed."""


def _check_parquet(file: Path, limits: RowLimits) -> None:
    """Refuse a file whose rows, as it says itself, are too large, and one that is much larger in memory than on disk: a
    value that is stored once may stand for all cells of a row group, which is expanded as a whole."""
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: is not a parquet file: {error}") from error
    with opened:
        check_row_groups(file, opened, limits)


def check_row_groups(
    file: Path, opened: pq.ParquetFile, limits: RowLimits, read: Collection[str] | None = None
) -> None:
    """See `_check_parquet`.

    Args:
        read: columns that are going to be; the others are not expanded. None: all.

    Raises:
        ValueError: names the file, and which limit.
    """
    metadata = opened.metadata
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        rows, values = max(1, group.num_rows), max((column.num_values for column in columns), default=0)
        try:
            limits.check_size(group.total_byte_size // rows, values // rows)
        except ValueError as error:
            raise ValueError(f"{file}: on average, {error}") from error
        small = [
            column.path_in_schema
            for column in columns
            if column.total_compressed_size <= _SMALL_BYTES
            and (read is None or column.path_in_schema.partition(".")[0] in read)
        ]
        expanded = 0
        for batch in opened.iter_batches(100, row_groups=[number], columns=small):
            expanded += batch.nbytes
            if expanded > _MAX_EXPANDED_BYTES:
                raise ValueError(
                    f"{file}: row group {number} has {group.total_byte_size} bytes and expands to more than "
                    f"{_MAX_EXPANDED_BYTES}, which are allowed; write smaller row groups"
                )


def _read_csv(file: Path) -> datasets.Dataset:
    """A table of texts, as RFC 4180 has them: commas, double quotes, a first line with the names of the columns. An
    empty cell is null. It is held in memory, since it has no images in it.

    Raises:
        ValueError: it is not such a table; says which row.
    """
    import datasets
    import pyarrow as pa
    from pyarrow import csv

    options = {
        "read_options": csv.ReadOptions(block_size=2**24),  # a row must fit
        "parse_options": csv.ParseOptions(newlines_in_values=True),
    }
    try:
        with csv.open_csv(file, **options) as reader:
            texts = dict.fromkeys(reader.schema.names, pa.string())
        convert = csv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
        table = csv.read_csv(file, **options, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{file}: is not a CSV file, with commas between cells and texts in UTF-8: {error!s:.300}"
        ) from error
    if len(texts) < len(table.column_names):
        raise ValueError(f"{file}: two columns have the same name; the columns are {', '.join(table.column_names)}")
    return datasets.Dataset(table)


def _values(array: pa.Array) -> int:
    """How many values an array expands to, its lists and the items in them counted."""
    import pyarrow as pa

    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray | pa.MapArray):
        items = (
            array.flatten()
            if not isinstance(array, pa.MapArray)
            else pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        )
        return len(array) + _values(items)
    if isinstance(array, pa.StructArray):
        return len(array) + sum(map(_values, array.flatten()))
    return len(array)


def _outline(array: pa.Array) -> list[Any]:
    """Lengths of lists and bytes in an array of images, and the beginnings of texts, which may be paths or base64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return [pc.list_value_length(array).to_pylist(), _outline(array.flatten())]
    if isinstance(array, pa.StructArray):
        return [array.is_valid().to_pylist(), *map(_outline, array.flatten())]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return [pc.binary_length(array).to_pylist(), pc.utf8_slice_codeunits(array, 0, 200).to_pylist()]
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return pc.binary_length(array).to_pylist()
    return array.to_pylist()


class _ArrowRows:
    """A memory-mapped table. Rows come as they are stored: images are neither decoded nor looked up on disk."""

    def __init__(self, table: datasets.Dataset, columns: Sequence[str], limits: RowLimits) -> None:
        if missing := set(columns) - set(table.column_names):
            raise ValueError(f"no column {', '.join(sorted(missing))}; the columns are {', '.join(table.column_names)}")
        self._limits = limits
        self.column_names: list[str] = table.column_names
        """Those of the whole table."""
        self._table = table.select_columns(list(columns)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """The row.

        Raises:
            ValueError: it is larger than the limits allow.
        """
        row = self._table[index]
        # Texts count as bytes here, since they are not characters yet.
        self._limits.check_size(row.nbytes, sum(_values(chunk) for column in row.columns for chunk in column.chunks))
        return row.to_pylist()[0]

    def digest(self, images: str | None) -> str:
        """See `digest_rows`."""
        digest = hashlib.sha256()
        for rows in self._table.iter(batch_size=1000):
            for name in rows.column_names:
                chunks = [_outline(chunk) for chunk in rows[name].chunks] if name == images else rows[name].to_pylist()
                digest.update(repr(chunks).encode(errors="backslashreplace"))
        return digest.hexdigest()

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`."""
        for rows in self._table.select_columns([name]).iter(batch_size=1000):
            yield from rows[name].to_pylist()


_BASE64 = re.compile(rb"[A-Za-z0-9+/=_\\-]{1000,}+")
"""A text in base64, or anything else that is one value in JSON."""


class _JsonLines:
    """One JSON object a line; only the offsets and numbers of the lines are held in memory."""

    def __init__(self, file: Path, limits: RowLimits) -> None:
        self._file = file
        self._most_text = 4 * limits.chars  # bytes of a line without its images: a character has at most four
        self._most = self._most_text + limits.bytes
        self._offsets, self._numbers = array("q"), array("q")
        digest = hashlib.sha256()
        with file.open("rb") as lines:
            for number, (offset, line) in enumerate(self._lines(lines), 1):
                if line.strip():
                    self._offsets.append(offset)
                    self._numbers.append(number)
                    digest.update(line)
        self._digest = digest.hexdigest()

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
        """Where each line begins, and its first `_most` + 1 bytes. The rest of a longer line is skipped."""
        offset = 0
        while line := file.readline(self._most + 1):
            yield offset, line
            while len(line) > self._most and not line.endswith(b"\n"):
                line = file.readline(2**20) or b"\n"
            offset = file.tell()

    def _row(self, line: bytes) -> Row:
        if len(line) > self._most:
            raise ValueError(
                f"the line has more than {self._most} bytes (4 × data.max_row_chars, and data.max_row_bytes for images)"
            )
        # Parsed, other text takes many times its size in memory.
        if len(line) > self._most_text and len(_BASE64.sub(b"", line)) > self._most_text:
            raise ValueError(f"the line has more than {self._most_text} bytes besides images (4 × data.max_row_chars)")
        return _json_object(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        """The row.

        Raises:
            ValueError: the line is not a JSON object, or is longer than the limits allow.
        """
        with self._file.open("rb") as lines:
            lines.seek(self._offsets[index])
            return self._row(lines.readline(self._most + 1))

    def place(self, index: int) -> str:
        """Where a person finds the row."""
        return f"{self._file.name}, line {self._numbers[index]}"

    def digest(self, images: str | None) -> str:
        """See `digest_rows`; of the whole lines, which were read anyway."""
        return self._digest

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`. Reads the file once, from its beginning to its end."""
        with self._file.open("rb") as lines:
            for _, line in self._lines(lines):
                if line.strip():
                    try:
                        row = self._row(line)
                    except ValueError:
                        yield None
                    else:
                        yield row.get(name)


def _json_object(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"the line is a JSON {type(row).__name__}; an object is allowed")
    return row
