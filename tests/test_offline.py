"""Recycling a run's rollouts again, from its shards alone."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_vl import offline
from spark_vl.config import RecycleConfig
from spark_vl.data.judgments import features, split_of
from spark_vl.data.problems import check, open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.offline import recycle_rollouts
from spark_vl.records import PromptRecord, plain_text
from spark_vl.recycle import recycle
from spark_vl.run.shards import check_shard, find_shards, read_shard
from tests.groups import TEMPLATER, UNCAPPED, a_run, contents, make_writer, picture, pixels, problem, sampled, write

RUN = a_run(steps=5, problems=6)


def again(rollouts: Path, output: Path, config: RecycleConfig = UNCAPPED, *, seed: int = 0, **settings):
    return recycle_rollouts(rollouts, output, templater=TEMPLATER, config=config, seed=seed, **settings)


def rows(folder: Path) -> dict[str, dict]:
    found = [(s, row) for s in find_shards(folder) for row in read_shard(s.path, list(features(s.config)))]
    assert len({row["id"] for _, row in found}) == len(found)
    return {row["id"]: row | {"config": shard.config, "split": shard.split} for shard, row in found}


def two_processes(folder: Path) -> Path:
    """`RUN` as two processes write it, with files cut by size."""
    writers = [make_writer(folder, rank=rank, max_bytes=10_000) for rank in (0, 1)]
    for step, groups in RUN.items():
        for i, group in enumerate(groups):
            writers[i % 2].add(step, group)
    for writer in writers:
        writer.flush()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    two_processes(folder / "judgments")
    assert {shard.split for shard in find_shards(folder / "judgments")} == {"train", "test"}
    assert len(find_shards(folder / "judgments")) > 20
    return folder


CONFIGS = [
    UNCAPPED,
    replace(UNCAPPED, judge_sees="cot", pointwise="one_per_group"),
    replace(UNCAPPED, judge_reflections=True, pairwise_share=0.0),
    replace(UNCAPPED, max_judge=2, max_reflection=1),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", [0, 7])
def test_it_gives_what_recycling_the_live_groups_gives(run: Path, tmp_path: Path, config: RecycleConfig, seed: int):
    counts = again(run, tmp_path, config, seed=seed)
    expected: dict[str, PromptRecord] = {}
    for step, groups in RUN.items():
        live = recycle(groups, TEMPLATER, config, step=step, seed=seed)
        expected |= {record.id: record for record in live.judge + live.reflection}
    found = rows(tmp_path)
    assert found.keys() == expected.keys()
    assert Counter(row["config"] for row in found.values()) + Counter() == Counter(counts) + Counter()
    for record in expected.values():
        row = found[record.id]
        assert row["config"] == record.kind
        assert row["split"] == split_of(record)
        content = [part["text"] or "" for message in row["messages"] for part in message["content"]]
        assert content == [p if isinstance(p, str) else "" for m in record.messages for p in m.content]
        assert (row["label"], tuple(row["choices"]), row["verifier"]) == (record.gold, record.choices, record.verifier)
        assert (row["parent_id"], row["template"]) == (record.origin.parent_id, record.origin.template)
        quoted = [row[name] for name in ("completion", "completion_a", "completion_b") if name in row]
        assert tuple(quoted) == record.origin.completions
        assert row.get("correct") == record.origin.quoted_correct
        assert (row["step"], row["recipe"]) == (record.origin.step, record.recipe)
        assert row["license"] == {"r": "MIT", "s": "CC-BY-4.0"}[record.recipe]
        assert [row[name] for name in ("judge_completion", "reward", "parsed", "status", "finish_reason")] == [[]] * 5


def test_caps_and_other_settings_give_other_judgments(run: Path, tmp_path: Path):
    few = again(run, tmp_path / "few", replace(UNCAPPED, max_judge=1, max_reflection=0))
    assert few["pointwise"] + few["pairwise"] == len(RUN)
    assert few["reflection"] == few["unusable"] == 0
    assert set(again(run, tmp_path / "a")) == {"pointwise", "pairwise", "reflection", "unusable"}
    again(run, tmp_path / "b", seed=1)
    assert rows(tmp_path / "a") != rows(tmp_path / "b")


def test_it_is_deterministic_and_takes_any_folder_of_the_run(run: Path, tmp_path: Path):
    for name, folder in (("a", run), ("b", run / "judgments"), ("c", run / "judgments" / "rollouts")):
        again(folder, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c") != {}


def test_what_it_writes_can_be_published_and_trained_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    counts = again(run, tmp_path / "out")
    assert sum(check_shard(shard.path) for shard in find_shards(tmp_path / "out")) == sum(counts.values())
    found = 0
    for config in ("pointwise", "pairwise", "reflection"):
        for split in ("train", "test"):
            if not list((tmp_path / "out" / config).glob(f"{split}-*")):
                continue
            recipe = load_recipe(f"judgments?repo={tmp_path / 'out'}&kind={config}")
            records = list(check(open_recipe(recipe, split, TEMPLATER), pool))
            assert all(isinstance(record, PromptRecord) for record in records)
            found += len(records)
    assert found == sum(counts.values())


def test_images_are_not_encoded_again(tmp_path: Path):
    group = sampled(problem("a", picture(3, "JPEG", (40, 40)), "What?"), (1, 0))
    again(write(tmp_path / "run", {1: [group]}), tmp_path / "out")
    [image] = {row["images"][0]["bytes"] for row in rows(tmp_path / "run").values()}
    made = rows(tmp_path / "out")
    assert len(made) == 4
    assert {row["images"][0]["bytes"] for row in made.values()} == {image}


def test_a_problem_that_came_twice_in_a_step_is_recycled_once(tmp_path: Path):
    group = sampled(problem("a"), (1, 0))
    write(tmp_path / "run", {1: [group, group], 2: [group]})
    again(tmp_path / "run", tmp_path / "out")
    assert {row["step"] for row in rows(tmp_path / "out").values()} == {1, 2}
    assert len(rows(tmp_path / "out")) == 8


def test_steps_are_read_one_after_the_other(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    heard: list[int] = []
    read: list[int] = []
    seen = {}

    def reading(path: Path, columns):
        for row in read_shard(path, columns):
            read.append(row["step"])
            yield row

    def recycling(groups, *arguments, step: int, seed: int):
        seen[step] = sum(heard), len(groups)
        # of each of the four streams (two splits, two processes) one row is known
        assert sum(other > step for other in read) <= 4
        return recycle(groups, *arguments, step=step, seed=seed)

    monkeypatch.setattr(offline, "recycle", recycling)
    monkeypatch.setattr(offline, "read_shard", reading)
    again(run, tmp_path, progress=heard.append)
    assert seen == {step: (6 * step, 6) for step in RUN}


# ── what is wrong with it ──


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    said = replace(problem("b", picture(1), "What?"), license=" ")
    groups = [sampled(record, (1, 0)) for record in (problem("a"), said, problem("c"))]
    write(tmp_path / "run", {1: groups})
    with caplog.at_level(logging.WARNING):
        counts = again(tmp_path / "run", tmp_path / "out")
    assert counts["unusable"] == 1
    assert {row["parent_id"] for row in rows(tmp_path / "out").values()} == {"r/train/a", "r/train/c"}
    assert "row 'r/train/b@1': 'license' is empty" in caplog.text


def test_a_question_with_the_words_of_a_place_is_recycled(tmp_path: Path):
    said = problem("b", picture(1), "What does <image> mean here?")
    write(tmp_path / "run", {1: [sampled(said, (1, 0))]})
    counts = again(tmp_path / "run", tmp_path / "out")
    assert counts["unusable"] == 0
    found = list(rows(tmp_path / "out").values())
    assert found
    for row in found:
        asked = "".join(part["text"] or "[picture]" for message in row["messages"] for part in message["content"])
        assert "[picture]What does <image> mean here?" in asked


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "file:///etc/hostname", "http://127.0.0.1:1/a.png"])
def test_a_path_in_a_foreign_shard_ends_in_no_shard(path: str, tmp_path: Path):
    [shard] = find_shards(write(tmp_path / "run", {1: [sampled(problem("a"), (1, 0)), sampled(problem("c"), (1, 0))]}))
    foreign = list(read_shard(shard.path, list(features("rollouts"))))
    foreign[0]["images"] = [{"bytes": None, "path": path}]
    pq.write_table(pa.Table.from_pylist(foreign, schema=features("rollouts").arrow_schema), shard.path)
    assert again(tmp_path / "run", tmp_path / "out")["unusable"] == 1
    assert {row["parent_id"] for row in rows(tmp_path / "out").values()} == {"r/train/c"}


def test_steps_out_of_order_are_an_error(tmp_path: Path):
    groups = [sampled(problem(name), (1, 0)) for name in "ac"]
    [shard] = find_shards(write(tmp_path / "run", {1: groups}))
    foreign = list(read_shard(shard.path, list(features("rollouts"))))
    foreign[1]["step"] = 0
    pq.write_table(pa.Table.from_pylist(foreign, schema=features("rollouts").arrow_schema), shard.path)
    with pytest.raises(ValueError, match="row 'r/train/c@1': its step is 0, after 1"):
        again(tmp_path / "run", tmp_path / "out")


def test_folders_are_checked(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no rollouts; a run's folder does, in judgments/rollouts"):
        again(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no rollouts"):
        again(run / "judgments" / "pairwise", tmp_path / "out")
    before = contents(run)
    with pytest.raises(ValueError, match=r"already holds shards, such as pairwise/.*; name another"):
        again(run, run / "judgments")
    assert contents(run) == before
    again(run, tmp_path / "out")
    with pytest.raises(ValueError, match="already holds shards"):
        again(run, tmp_path / "out")


def test_the_pixels_are_those_of_the_problem(run: Path, tmp_path: Path):
    again(run, tmp_path)
    questions = {g.record.id: g.record for groups in RUN.values() for g in groups}
    for row in rows(tmp_path).values():
        parent = questions[row["parent_id"]]
        assert row["question"] == plain_text(parent.question)
        assert pixels([type(ref)(data=row["images"][0]["bytes"]) for ref in parent.images]) == pixels(parent.images)
