"""Shards are whole, small and the same after any death; nothing but pixels passes the check before publishing."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_vl.data.images import encode_image, load_image
from spark_vl.data.judgments import CONFIGS, features, split_of
from spark_vl.records import BadRecordError, ImageRef
from spark_vl.run import shards
from spark_vl.run.shards import RowWriter, Shard, ShardError, check_shard, find_shards, read_shard
from spark_vl.show import show_groups
from tests.groups import a_run, contents, make_writer, picture, problem, recycled, sampled, write
from tests.test_images import chunk, location

RUN = a_run(steps=6)
SHORT_RUN = a_run(steps=4, problems=2)
EVERY = 2
"""Steps between the checkpoints of the short run."""


def names(folder: Path) -> list[str]:
    return sorted(contents(folder))


# ── the files ──


def test_files_are_named_by_configuration_split_steps_and_rank(tmp_path: Path):
    writer = make_writer(tmp_path, rank=3)
    group = sampled(problem("p4"), (1, 0))
    assert (split_of(group.record), split_of(problem("p1"))) == ("test", "train")
    judge = next(r for s in range(9) for r in recycled([group], step=8, seed=s).judge if r.kind == "pairwise")
    for step, each in ((7, group), (8, sampled(problem("p1"), (1,))), (8, group), (12, sampled(judge, (1, 0)))):
        writer.add(step, each)
    assert names(tmp_path) == []
    writer.flush()
    writer.add(13, group)
    writer.flush()
    writer.flush()
    assert names(tmp_path) == [
        "pairwise/test-000012-000012-3.parquet",
        "rollouts/test-000007-000008-3.parquet",
        "rollouts/test-000013-000013-3.parquet",
        "rollouts/train-000008-000008-3.parquet",
    ]
    found = find_shards(tmp_path)
    assert found[1] == Shard(tmp_path / names(tmp_path)[1], "rollouts", "test", 7, 8, 3)
    files = {split: str(tmp_path / "rollouts" / f"{split}-*.parquet") for split in ("train", "test")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: loaded[split]["step"] for split in loaded} == {"train": [8], "test": [7, 8, 13]}


def test_files_are_as_the_hub_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 40_000)
    size = (64, 48)  # 9 kB each as noise
    groups = [sampled(problem(f"p{i}", picture(i, size=size), f"What is {i}?"), (1, 0)) for i in range(40)]
    write(tmp_path, {1: groups})
    for shard in find_shards(tmp_path):
        file = pq.ParquetFile(shard.path)
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        assert max(sizes) < 60_000
        assert len(sizes) == -(-file.metadata.num_rows // 4)
        column = file.metadata.row_group(0).column(0)
        assert column.compression == "ZSTD"
        assert column.has_column_index
        stored = json.loads(file.schema_arrow.metadata[b"huggingface"])
        assert stored["info"]["features"]["images"] == {"feature": {"_type": "Image"}, "_type": "List"}


def test_a_row_larger_than_a_row_group_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 10)
    [shard] = find_shards(write(tmp_path, {1: [sampled(problem("p1"), (1,)), sampled(problem("p2"), (1,))]}))
    assert pq.ParquetFile(shard.path).num_row_groups == 2


def test_files_hold_whole_steps_and_about_so_many_bytes(tmp_path: Path):
    of_step = {step: 1 + step**2 % 7 for step in range(1, 80)}
    groups = {step: [sampled(problem("abcdefgh"[step % 8]), (1, 0))] * n for step, n in of_step.items()}
    write(tmp_path, groups, max_bytes=20_000)
    rows = {shard: list(read_shard(shard.path, list(features("rollouts")))) for shard in find_shards(tmp_path)}
    assert len(rows) > 4

    def size(row: dict[str, Any]) -> int:
        text = repr({name: value for name, value in row.items() if name != "images"})
        return len(text) + len(row["images"][0]["bytes"])

    for shard, of_file in rows.items():
        before_last = [row for row in of_file if row["step"] < shard.last_step]
        assert sum(map(size, before_last)) < 2 * 20_000  # no more than that is held, and then a step
        assert sum(map(size, of_file)) > 0.5 * 20_000 or shard.last_step == max(groups)
        assert [row["step"] for row in of_file] == [
            step for step in range(shard.first_step, shard.last_step + 1) for _ in range(of_step[step])
        ]
    assert sorted(row["id"] for of_file in rows.values() for row in of_file) == sorted(
        f"{group.record.id}@{step}" for step, of in groups.items() for group in of
    )


def test_a_file_gets_its_name_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), seen.append(names(tmp_path)))[0])
    writer = make_writer(tmp_path)
    writer.add(1, sampled(problem("a"), (1, 0)))
    writer.flush()
    name = "train-000001-000001-0.parquet"
    assert seen == [[f"rollouts/.{name}.tmp"], [f"rollouts/{name}"]]


def test_an_image_is_encoded_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded = []
    monkeypatch.setattr(shards, "encode_image", lambda ref: encoded.append(ref) or encode_image(ref))
    writer = make_writer(tmp_path)
    group = sampled(problem("a"), (1, 0))
    rows = [group, *(sampled(record, (1, 0)) for record in recycled([group], step=1).judge), group]
    for step in (1, 1, 2):
        for each in rows:
            writer.add(step, each)
    assert encoded == list(group.record.images) * 2


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    assert contents(write(tmp_path / "a", RUN)) == contents(write(tmp_path / "b", RUN))


def test_steps_come_in_order(tmp_path: Path):
    writer = make_writer(tmp_path)
    writer.add(2, sampled(problem("a"), (1,)))
    with pytest.raises(ValueError, match="r/train/a@1: is of step 1, after rows of step 2"):
        writer.add(1, sampled(problem("a"), (1,)))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "must be relative"),
        ("/etc/hostname", "must be relative"),
        ("link.png", "leads out of the media root"),
        ("file:///etc/hostname", "is a URL"),
        ("http://127.0.0.1:1/a.png", "is a URL"),
        ("missing.png", "is not a file"),
        ("text.png", "not an image"),
    ],
)
def test_an_image_that_cannot_be_read_ends_in_no_shard(path: str, reason: str, tmp_path: Path):
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(0).data)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "text.png").write_text("hello")
    (root / "good.png").write_bytes(picture(1).data)
    writer = make_writer(tmp_path / "out")
    good = sampled(problem("good", ImageRef(path="good.png", root=str(root)), "Good?"), (1,))
    bad = sampled(problem("bad", ImageRef(path=path, root=str(root)), "Bad?"), (1,))
    with pytest.raises(BadRecordError, match=f"r/train/bad: an image: .*{reason}"):
        writer.add(1, bad)
    writer.add(1, good)
    writer.flush()
    [shard] = find_shards(tmp_path / "out")
    [row] = read_shard(shard.path, ("id", "images"))
    assert row == {"id": "r/train/good@1", "images": [{"bytes": encode_image(picture(1)), "path": None}]}
    assert check_shard(shard.path) == 1


# ── any death ──


class KilledError(BaseException):
    """The process is no more."""


class Deaths:
    """Counts the moments at which a process may die, and lets it die at the one with number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments, self.at = 0, -1
        fsync, replace_file = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (self(), fsync(fd), self())[1])
        monkeypatch.setattr(Path, "replace", lambda path, to: (self(), replace_file(path, to), self())[1])

    def __call__(self) -> None:
        self.moments += 1
        if self.moments - 1 == self.at:
            raise KilledError


def train(folder: Path, death: Callable[[], None], saved: int | None) -> None:
    """Two processes write `SHORT_RUN` on from the checkpoint `saved`; `checkpoint` names the latest one."""
    writers = [make_writer(folder, rank=rank, resumed=saved, max_bytes=2_000) for rank in (0, 1)]
    for step in range((saved or 0) + 1, len(SHORT_RUN) + 1):
        for i, group in enumerate(SHORT_RUN[step]):
            death()
            writers[i % 2].add(step, group)
        if step % EVERY == 0:
            for writer in writers:
                writer.flush()
            death()
            (folder.parent / "checkpoint").write_text(str(step))
            death()


def resumed_train(folder: Path, death: Callable[[], None]) -> None:
    checkpoint = folder.parent / "checkpoint"
    train(folder, death, int(checkpoint.read_text()) if checkpoint.exists() else None)


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    return Deaths(monkeypatch)


@pytest.fixture
def uninterrupted(tmp_path: Path, deaths: Deaths) -> tuple[dict[str, bytes], int]:
    """The files of a run, and how many moments it has to die in."""
    (tmp_path / "whole").mkdir()
    resumed_train(tmp_path / "whole" / "judgments", deaths)
    files = contents(tmp_path / "whole" / "judgments")
    assert len({name.split("-")[2] for name in files}) > len(SHORT_RUN) / EVERY, "files are cut by size, too"
    assert {name.split("/")[0] for name in files} == set(CONFIGS)
    moments, deaths.moments = deaths.moments, 0
    return files, moments


def test_a_run_that_died_at_any_moment_leaves_the_same_files(tmp_path: Path, deaths: Deaths, uninterrupted):
    expected, moments = uninterrupted
    assert moments > 60
    for at in range(0, moments, 11):
        run = tmp_path / f"killed at {at}"
        run.mkdir()
        deaths.moments, deaths.at = 0, at
        with pytest.raises(KilledError):
            resumed_train(run / "judgments", deaths)
        for file in find_shards(run / "judgments"):
            assert pq.ParquetFile(file.path).metadata.num_rows > 0  # no half-written file bears a shard's name
        deaths.at = -1
        resumed_train(run / "judgments", deaths)
        assert contents(run / "judgments") == expected, f"killed at {at}"


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_run_that_died_three_times_leaves_the_same_files(tmp_path: Path, deaths: Deaths, uninterrupted, third: int):
    expected, moments = uninterrupted
    (tmp_path / "run").mkdir()
    for at in (moments // 4 + third, moments // 3, moments // 5):
        deaths.moments, deaths.at = 0, at
        with pytest.raises(KilledError):
            resumed_train(tmp_path / "run" / "judgments", deaths)
    deaths.at = -1
    resumed_train(tmp_path / "run" / "judgments", deaths)
    assert contents(tmp_path / "run" / "judgments") == expected


def test_only_rank_0_deletes_and_only_what_comes_after(tmp_path: Path):
    run = {1: RUN[1], 2: RUN[2]}
    for rank in (0, 1):
        writer = make_writer(tmp_path, rank=rank)
        for step, groups in run.items():
            for group in groups:
                writer.add(step, group)
            writer.flush()
    before = contents(tmp_path)
    (tmp_path / "rollouts" / ".train-000001-000002-1.parquet.tmp").write_text("half")
    (tmp_path / "rollouts" / "notes.parquet").write_text("of the user's")
    (tmp_path / "README.md").write_text("a card")
    make_writer(tmp_path, rank=1, resumed=1)
    assert len(contents(tmp_path)) == len(before) + 3
    make_writer(tmp_path, rank=0, resumed=1)
    kept = {name: data for name, data in before.items() if "-000001-000001-" in name}
    own = {"rollouts/notes.parquet": b"of the user's", "README.md": b"a card"}
    assert contents(tmp_path) == kept | own
    make_writer(tmp_path)
    assert contents(tmp_path) == own


def test_a_shard_across_the_checkpoint_is_not_guessed_about(tmp_path: Path):
    write(tmp_path, {1: RUN[1], 2: RUN[2]})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"rollouts.*: holds steps before and after 1"):
        make_writer(tmp_path, resumed=1)
    assert contents(tmp_path) == before


# ── the proof before publishing ──


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], schema: pa.Schema | None = None) -> Path:
    """A shard of three rows, of which the second one is changed."""
    groups = [sampled(problem(name), (1, 0)) for name in ("a", "b", "c")]
    assert {split_of(group.record) for group in groups} == {"train"}
    [shard] = find_shards(write(folder, {1: groups}))
    rows = list(read_shard(shard.path, list(features("rollouts"))))
    change(rows[1])
    schema = schema or features("rollouts").arrow_schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), shard.path)
    return shard.path


def with_images(*cells: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(images=list(cells))


def with_text(data: bytes) -> bytes:
    return data[:33] + chunk(b"tEXt", b"Comment\0secret") + data[33:]


CLEAN = encode_image(picture(0))
EXIF_JPEG = io.BytesIO()
load_image(picture(0)).save(EXIF_JPEG, "JPEG", quality=95, subsampling=0, exif=location())


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([{"bytes": None, "path": "/etc/hostname"}], "it is the path '/etc/hostname'; bytes alone are allowed"),
        ([{"bytes": CLEAN, "path": "a.png"}], "it is the path 'a.png'"),
        ([{"bytes": CLEAN}, {"bytes": None, "path": None}], "it is missing"),
        ([None], "it is missing"),
        ([{"bytes": with_text(CLEAN)}], "the PNG has the chunks IHDR, tEXt, IDAT, IEND"),
        ([{"bytes": CLEAN + b"PK"}], "no PNG chunk with a right checksum"),
        ([{"bytes": EXIF_JPEG.getvalue()}], "a segment E1 with b'Exif"),
        ([{"bytes": b"hello"}], "not an image"),
        ([{"bytes": b""}], "0 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_holds_more_than_pixels_is_named(cells: list[Any], reason: str, tmp_path: Path):
    path = rewritten(tmp_path, with_images(*cells))
    with pytest.raises(ValueError, match=r"train-000001-000001-0\.parquet: row 'r/train/b@1': an image") as caught:
        check_shard(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        *(({name: None}, f"{name}: is null") for name in ("id", "messages", "reward", "completion", "step")),
        ({"status": [None, "ok"]}, r"status\[\]: is null"),
        ({"messages": [None]}, r"messages\[\]: is null"),
        ({"messages": [{"role": None, "content": []}]}, r"messages\[\]\.role: is null"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[\]\.content: is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages.*allowed: a text or an image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "x", "text": "x"}]}]},
            "messages.*allowed: a text or an image",
        ),
        (
            {"reward": [1.0]},
            "a row has more of some than of others of answer_start, completion, finish_reason, parsed, reward, status",
        ),
        ({"completion": []}, "a row has more of some"),
    ],
)
def test_cells_that_no_run_leaves_empty_are_named(cells, reason, tmp_path: Path):
    path = rewritten(tmp_path, lambda row: row.update(cells))
    with pytest.raises(ShardError, match=rf"train-000001-000001-0\.parquet: {reason}"):
        check_shard(path)
    with pytest.raises(ShardError, match=reason):
        list(show_groups(tmp_path))


def test_images_are_a_list(tmp_path: Path):
    path = rewritten(tmp_path / "run", lambda row: row.update(images=None))
    for read in (lambda: check_shard(path), lambda: list(show_groups(tmp_path / "run", images=tmp_path / "images"))):
        with pytest.raises(ShardError, match="images: is null"):
            read()


@pytest.mark.parametrize("cells", [[None], [{"bytes": None, "path": None}], [{"bytes": b"", "path": None}]])
def test_an_image_that_is_missing_is_shown_to_be(cells, tmp_path: Path):
    rewritten(tmp_path / "run", with_images(*cells))
    assert "image: missing" in list(show_groups(tmp_path / "run", images=tmp_path / "images"))[1]


def test_a_shard_that_would_fill_the_memory_is_refused_before_it_does(tmp_path: Path):
    """A file of some kilobytes, which stores one text for all rows."""
    path = rewritten(tmp_path, lambda row: None)
    with pq.ParquetFile(path) as file:
        table = file.read()
    question = pa.array(["q" * 2**20] * 600, pa.string())
    columns = [question if name == "question" else table[name].take([0] * 600) for name in table.column_names]
    pq.write_table(pa.Table.from_arrays([*columns], schema=table.schema), path, compression="zstd")
    assert path.stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardError, match=r"row group 0 has .* expands to more than 536870912, which are allowed"):
        check_shard(path)
    assert pa.total_allocated_bytes() - before < 2**20


def test_what_a_run_writes_passes(tmp_path: Path):
    folder = write(tmp_path, RUN)
    counted = {shard: check_shard(shard.path) for shard in find_shards(folder)}
    assert sum(counted.values()) == sum(map(len, RUN.values()))
    assert check_shard(rewritten(tmp_path / "none", with_images())) == 3  # a row without an image


def test_the_same_image_is_proved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checked = []
    monkeypatch.setattr(shards, "check_encoded", checked.append)
    proven: set[bytes] = set()
    for shard in find_shards(write(tmp_path, RUN)):
        check_shard(shard.path, proven)
    assert len(checked) == len(set(checked)) == len(proven)
    assert set(checked) == {encode_image(ref) for of in RUN.values() for group in of for ref in group.record.images}


def changed_schema(change: Callable[[dict[str, Any]], Any]) -> pa.Schema:
    columns = dict(features("rollouts"))
    change(columns)
    return datasets.Features(columns).arrow_schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (changed_schema(lambda c: c.pop("license")), "column 'license': is missing or not of type string"),
        (changed_schema(lambda c: c.update(secret=datasets.Value("string"))), "column 'secret': is not allowed"),
        (
            changed_schema(lambda c: c.update(step=datasets.Value("int64"))),
            "column 'step': is missing or not of type int32",
        ),
        (
            changed_schema(lambda c: c.update(model_revision=c["images"])),
            "column 'model_revision': is missing or not of type string",
        ),
        (features("rollouts").arrow_schema.remove_metadata(), "its metadata lacks the features of 'rollouts'"),
    ],
)
def test_another_schema_is_refused(schema: pa.Schema, reason: str, tmp_path: Path):
    path = rewritten(tmp_path, lambda row: row.update(secret="x"), schema)
    with pytest.raises(ValueError, match=r"rollouts/train-000001-000001-0\.parquet: ") as caught:
        check_shard(path)
    assert reason in str(caught.value)


def test_what_is_no_shard_is_named(tmp_path: Path):
    path = rewritten(tmp_path, with_images())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-000001-000001-0\.parquet: cannot be read as parquet"):
        check_shard(path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is in the folder 'other'; allowed: pointwise, pairwise"):
        check_shard(path.replace(tmp_path / "other" / path.name))


def test_whatever_damage_does_to_a_shard_the_shard_is_named(tmp_path: Path):
    path = rewritten(tmp_path, with_images({"bytes": CLEAN}))
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(8):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        with suppress(ShardError):  # and nothing else
            check_shard(path)
            refused -= 1  # damage may lie where nobody reads
        refused += 1
    assert refused > 75


def test_rows_are_read_a_few_at_a_time(tmp_path: Path):
    """Of one row group of 20 MB, a part is in memory."""
    writer = RowWriter(tmp_path)
    for i in range(300):
        image = {"bytes": random.Random(i).randbytes(70_000), "path": None}
        writer.add("rollouts", "train", {"id": str(i), "step": 1, "images": [image]})
    writer.flush()
    [path] = (shard.path for shard in find_shards(tmp_path))
    assert pq.ParquetFile(path).num_row_groups == 1
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_shard(path, ("id", "images")):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 100_000 < most < 7_000_000


def test_a_pipe_with_the_name_of_a_shard_is_not_waited_for(tmp_path):
    (tmp_path / "rollouts").mkdir()
    os.mkfifo(tmp_path / "rollouts" / "train-000001-000002-0.parquet")
    with pytest.raises(ShardError, match=r"train-000001-000002-0\.parquet: is not a regular file"):
        find_shards(tmp_path)
