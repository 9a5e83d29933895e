"""Writes the rows of a run as parquet files, and checks that such a file holds nothing that must not be published.

`folder/<config>/<split>-<first step>-<last step>-<rank>.parquet`: each process writes its own files for each
configuration and split. A file holds whole steps, and appears whole or not at all: a run that is killed and resumed
leaves the same files, byte for byte, as one that was not.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spark_vl.data.images import ImageError, check_encoded, encode_image
from spark_vl.data.judgments import (
    ANSWER_START,
    CONFIGS,
    Config,
    completions_column,
    config_of,
    features,
    row_of,
    split_of,
)
from spark_vl.data.sources import RowLimits, check_row_groups
from spark_vl.records import ImageRef, RolloutGroup
from spark_vl.run.files import unfinished_name, written_whole

MAX_BYTES = 64 * 2**20
"""A file is closed at the end of the step in which it exceeds about this many bytes, images included."""

ROW_GROUP_BYTES = 32 * 2**20
"""About this many bytes of rows are one row group, the smallest unit that some readers load; the Hub's viewer asks for
at most 100 MB."""

_ROWS_AT_ONCE = 16

_LIMITS = RowLimits(bytes=2**29, chars=2**24)
"""The most that a row of a shard may hold: far more than a run's own do, and what a machine has room for."""

_OF_COMPLETIONS = frozenset({"reward", "parsed", "status", "finish_reason", ANSWER_START})
"""Columns with one item for each completion, as the completions' own."""

_MAY_BE_NULL = frozenset(
    {
        *("model_revision", "answer", "answer_a", "answer_b", "parsed[]", "messages[].content[].text"),
        *("images[]", "images[].bytes", "images[].path"),  # these are looked at one by one, see `check_shard`
    }
)
"""Paths of cells that `row_of` can leave empty."""


@dataclass(frozen=True)
class Shard:
    """A file, and what its name tells."""

    path: Path
    config: Config
    split: str
    first_step: int
    last_step: int
    rank: int


def find_shards(folder: Path) -> list[Shard]:
    """The shards of all configurations below `folder`, by configuration, split, rank, and step.

    Raises:
        ShardError: something that has the name of one is no file.
    """
    found = []
    for config in CONFIGS:
        for path in (folder / config).glob("*.parquet"):
            if match := re.fullmatch(r"(train|test)-(\d{6,})-(\d{6,})-(\d+)\.parquet", path.name, re.ASCII):
                if not path.is_file():  # a pipe would be waited for
                    raise ShardError(f"{path}: is not a regular file")
                found.append(Shard(path, config, match[1], int(match[2]), int(match[3]), int(match[4])))
    return sorted(found, key=lambda shard: (shard.config, shard.split, shard.rank, shard.first_step))


class RowWriter:
    """Writes rows into shards. It must be created on all processes before any of them writes.

    Args:
        folder: of the dataset.
        rank: of this process.
        resumed: step of the checkpoint from which the run continues; rank 0 deletes all shards of later steps, of all
            processes. None: the run begins, and rank 0 deletes all shards.
        max_bytes: see `MAX_BYTES`.

    Raises:
        ValueError: a shard holds steps both before and after `resumed`.
    """

    def __init__(self, folder: Path, *, rank: int = 0, resumed: int | None = None, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._rank, self._max_bytes = folder, rank, max_bytes
        self._rows: dict[tuple[Config, str], list[dict[str, Any]]] = defaultdict(list)
        self._bytes = 0
        self._step = 0
        if rank == 0:
            _drop_after(folder, -1 if resumed is None else resumed)

    def add(self, config: Config, split: str, row: dict[str, Any]) -> None:
        """Keep a row (`judgments.row_of`) to be written. Rows must be added in the order of their steps.

        Raises:
            ValueError: its step comes before that of an earlier row.
        """
        if row["step"] < self._step:
            raise ValueError(f"{row['id']}: is of step {row['step']}, after rows of step {self._step}")
        if row["step"] > self._step and self._bytes > self._max_bytes:
            self.flush()
        self._step = row["step"]
        self._rows[config, split].append(row)
        self._bytes += _size(row)

    def flush(self) -> None:
        """Write all rows that are kept. The last step must be complete: no file holds part of a step."""
        for (config, split), rows in self._rows.items():
            name = f"{split}-{rows[0]['step']:06d}-{rows[-1]['step']:06d}-{self._rank}.parquet"
            _write(self._folder / config / name, config, rows)
        self._rows.clear()
        self._bytes = 0


class ShardWriter:
    """Writes the groups of a training run.

    Args:
        folder, rank, resumed, max_bytes: see `RowWriter`.
        model, model_revision: see `row_of`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        model: str,
        model_revision: str | None,
        resumed: int | None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._rows = RowWriter(folder, rank=rank, resumed=resumed, max_bytes=max_bytes)
        self._provenance: dict[str, Any] = {"model": model, "model_revision": model_revision}
        self._encoded: dict[ImageRef, bytes] = {}  # of this step, in which several rows show the same image
        self._step = 0

    def add(self, step: int, group: RolloutGroup) -> None:
        """Keep a verified group, sampled in `step`, to be written; its images are encoded now.

        Raises:
            BadRecordError: see `row_of`.
            ValueError: see `RowWriter.add`.
        """
        if step != self._step:
            self._step = step
            self._encoded.clear()
        row = row_of(group, step, **self._provenance, image_bytes=self._encode)
        self._rows.add(config_of(group.record), split_of(group.record), row)

    def flush(self) -> None:
        """Write all rows that are kept. Call it before each checkpoint, so that a run resumed from it lacks no row."""
        self._rows.flush()

    def _encode(self, ref: ImageRef) -> bytes:
        if ref not in self._encoded:
            self._encoded[ref] = encode_image(ref)
        return self._encoded[ref]


class ShardError(ValueError):
    """A file that cannot be read, or must not be published; the message names it."""


def read_shard(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a shard, a few at a time in memory. Images are mappings of bytes and path, as they are stored.

    Raises:
        ShardError: it is not a parquet file, its columns are not those of its configuration, a cell is empty that may
            not be, or it is much larger in memory than a run's own. Names the shard.
    """
    config = path.parent.name
    if config not in CONFIGS:
        raise ShardError(f"{path}: is in the folder {config!r}; allowed: {', '.join(CONFIGS)}")
    try:
        # By default a whole row group would be held in memory.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            _check_schema(path, file.schema_arrow, config)
            check_row_groups(path, file, _LIMITS, columns)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                _check_cells(path, batch, config)
                yield from batch.to_pylist()
    except ShardError:
        raise
    except Exception as error:  # pyarrow has no common class for the errors that damaged files cause
        raise ShardError(f"{path}: cannot be read as parquet: {error}") from error


def check_shard(
    path: Path,
    proven: set[bytes] | None = None,
    fault_of: Callable[[Mapping[str, Any]], str | None] = lambda row: None,
) -> int:
    """Check, before a shard is published, that its images are nothing but pixels (`check_encoded`) and do not name
    files: `datasets` would embed any file on this machine that a path leads to.

    Args:
        proven: SHA-256 of images that were checked before. It grows: the images of a folder's shards recur.
        fault_of: says what else is wrong with a row; None if nothing is.

    Returns:
        Its number of rows.

    Raises:
        ShardError: names the shard, the row's id, and why it cannot be published; or see `read_shard`.
    """
    proven = set() if proven is None else proven
    rows = 0
    for row in read_shard(path):
        rows += 1
        if fault := fault_of(row):
            raise ShardError(f"{path}: row {row['id']!r}: {fault}")
        for image in row["images"] or ():
            try:
                _check_image(image, proven)
            except ImageError as error:
                raise ShardError(f"{path}: row {row['id']!r}: an image cannot be published: {error}") from error
    return rows


def _check_image(image: Mapping[str, Any] | None, proven: set[bytes]) -> None:
    if image is None or image["bytes"] is None or image["path"] is not None:
        path = None if image is None else image["path"]
        raise ImageError(f"it is {'missing' if path is None else f'the path {path!r:.100}'}; bytes alone are allowed")
    digest = hashlib.sha256(image["bytes"]).digest()
    if digest not in proven:
        check_encoded(image["bytes"])
        proven.add(digest)


def _check_schema(path: Path, found: pa.Schema, config: Config) -> None:
    """Check names and types of the columns, and the features by which `datasets` decodes them."""
    known = features(config)
    if ANSWER_START not in found.names:
        known = type(known)({name: of for name, of in known.items() if name != ANSWER_START})
    expected = known.arrow_schema
    for column in expected:
        if column.name not in found.names or found.field(column.name).type != column.type:
            raise ShardError(f"{path}: column {column.name!r}: is missing or not of type {column.type}")
    if extra := sorted(set(found.names) - set(expected.names)):
        raise ShardError(f"{path}: column {extra[0]!r}: is not allowed")
    if type(known).from_arrow_schema(found) != known:
        raise ShardError(f"{path}: its metadata lacks the features of {config!r}, so images would not be decoded")


def _check_cells(path: Path, rows: pa.RecordBatch, config: Config) -> None:
    """Check that cells are filled, and that each text of a message is one."""
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if (empty := next(_empty_cells(name, column), None)) is not None:
            raise ShardError(f"{path}: {empty}: is null, which is not allowed there")
        if name == "messages":
            for part in column.flatten().field("content").flatten().to_pylist():
                if part["type"] not in ("text", "image") or (part["text"] is None) is (part["type"] == "text"):
                    raise ShardError(f"{path}: messages[].content[]: found {part!r:.80}; allowed: a text or an image")
    names = _OF_COMPLETIONS | {completions_column(config)}
    of_completions = [rows[name] for name in rows.schema.names if name in names]
    if any(not column.value_lengths().equals(of_completions[0].value_lengths()) for column in of_completions[1:]):
        raise ShardError(f"{path}: a row has more of some than of others of {', '.join(sorted(names))}")


def _empty_cells(name: str, cells: pa.Array) -> Iterator[str]:
    """Paths of the cells that are null and may not be."""
    if cells.null_count and name not in _MAY_BE_NULL:
        yield name
    elif pa.types.is_list(cells.type):
        yield from _empty_cells(f"{name}[]", cells.flatten())
    elif pa.types.is_struct(cells.type):
        for field in cells.type:
            yield from _empty_cells(f"{name}.{field.name}", cells.field(field.name))


def _drop_after(folder: Path, step: int) -> None:
    """Delete the shards of steps after `step`, and unfinished files of a killed process."""
    for config in CONFIGS:
        for unfinished in (folder / config).glob(unfinished_name("*.parquet")):
            unfinished.unlink()
    shards = find_shards(folder)
    for shard in shards:
        if shard.first_step <= step < shard.last_step:
            raise ValueError(
                f"{shard.path}: holds steps before and after {step}, from which the run continues; move it away"
            )
    for shard in shards:
        if shard.last_step > step:
            shard.path.unlink()


def _write(path: Path, config: Config, rows: list[dict[str, Any]]) -> None:
    """Write the file, whole or not at all."""
    schema = features(config).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    # A page is cut only after a batch of values; a page of a thousand images would be held whole by its readers.
    settings = {"compression": "zstd", "write_page_index": True, "write_batch_size": 8}
    with written_whole(path) as unfinished, pq.ParquetWriter(unfinished, schema, **settings) as writer:
        for group in _row_groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _row_groups(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        if group and size + _size(row) > ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(row)
        size += _size(row)
    yield group


def _size(value: Any) -> int:
    """About how many bytes a cell takes uncompressed."""
    match value:
        case bytes() | str():
            return len(value)
        case dict():
            return sum(map(_size, value.values()))
        case list():
            return sum(map(_size, value))
    return 8
