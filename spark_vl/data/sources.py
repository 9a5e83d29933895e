"""Where the rows of a recipe come from: the Hub, files, or a function. A row is read when it is asked for."""

from __future__ import annotations

import importlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]


class Rows(Protocol):
    """The rows of a split, each read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@runtime_checkable
class ColumnarRows(Rows, Protocol):
    """Rows of which one column can be read without the others."""

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`."""


SourceType = Literal["hub", "jsonl", "parquet", "folder", "factory"]


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    type: SourceType
    location: str
    """`hub`: id of a dataset, or a local copy of its repository. `jsonl`, `parquet`: the folder of the files. `folder`:
    the folder of the splits' folders, each with images and a `metadata.jsonl`. `factory`: `module:function`, called
    with `split=`, which returns a sequence of rows; one that cannot be made raises ValueError. Where making a row is
    slow, the sequence should be `ColumnarRows`: the ids of all rows are read when the split is opened."""
    config: str | None = None
    """`hub`: name of the dataset's configuration."""
    revision: str | None = None
    """`hub`: commit, tag or branch."""


def open_rows(source: Source, split: str, columns: Sequence[str]) -> tuple[Rows, Path | None]:
    """The rows of `split`, and the folder that their image paths are relative to (None: they have no such folder).

    Args:
        split: `hub`, `factory`: the source's name of the split. `jsonl`: its file. `parquet`: its file, or a pattern
            such as `data/train-*.parquet`. `folder`: its folder.
        columns: the columns that are read; the others of a `hub` or `parquet` source are left alone.

    Raises:
        ValueError: the file, split, column or function is not there.
    """
    match source.type:
        case "factory":
            return _call_factory(source.location, split), None
        case "jsonl":
            return _JsonLines(_files(source.location, split)[0]), Path(source.location)
        case "folder":
            folder = Path(source.location, split)
            return _JsonLines(_files(folder, "metadata.jsonl")[0]), folder
        case "parquet":
            import datasets  # slow to import

            files = [str(file) for file in _files(source.location, split)]
            return _ArrowRows(datasets.Dataset.from_parquet(files), columns), Path(source.location)
        case "hub":
            return _ArrowRows(_open_repository(source, split), columns), None


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


def _open_repository(source: Source, split: str) -> datasets.Dataset:
    """As `datasets.load_dataset`, of files in the repository alone: its README.md can name any other as well.

    Raises:
        ValueError, OSError: it cannot be opened.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.location, source.config, revision=source.revision)
        for files in (builder.config.data_files or {}).values():
            for file in files:
                if not _is_inside(str(file), source.location):
                    raise ValueError(
                        f"{source.location!r}: data_files in its README.md: found {str(file)!r:.200}; allowed: files "
                        "of the same repository"
                    )
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except (ValueError, OSError):
        raise
    except Exception as error:  # datasets has no common class for what odd metadata cause
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source.location!r}: its README.md or its files cannot be read: {reason:.500}") from error


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


def _call_factory(location: str, split: str) -> Rows:
    module, _, function = location.partition(":")
    return getattr(importlib.import_module(module), function)(split=split)


class _ArrowRows:
    """A memory-mapped table. Rows come as they are stored: images are neither decoded nor looked up on disk."""

    def __init__(self, table: datasets.Dataset, columns: Sequence[str]) -> None:
        if missing := set(columns) - set(table.column_names):
            raise ValueError(f"no column {', '.join(sorted(missing))}; the columns are {', '.join(table.column_names)}")
        self._table = table.select_columns(list(columns)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        return self._table[index].to_pylist()[0]

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`."""
        for rows in self._table.select_columns([name]).iter(batch_size=1000):
            yield from rows[name].to_pylist()


class _JsonLines:
    """One JSON object a line; only the offsets of the lines are held in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offsets = array("q")
        with file.open("rb") as lines:
            offset = 0
            for line in lines:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        """The row.

        Raises:
            ValueError: the line is not a JSON object.
        """
        with self._file.open("rb") as lines:
            lines.seek(self._offsets[index])
            return _json_object(lines.readline())

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`. Reads the file once, from its beginning to its end."""
        with self._file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    try:
                        row = _json_object(line)
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
