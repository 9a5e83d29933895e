"""Recycled judgments: run → Hub → `load_dataset` → recipe → training and evaluation, and what never gets there."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, PngImagePlugin

from spark_vl import cli
from spark_vl.data.recipes import load_recipe
from spark_vl.hub import publish
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.run.shards import find_shards
from tests.hub.driver import Refused
from tests.hub.fixtures import ROOT, digests
from tests.hub.server import File
from tests.test_trainer import TEMPLATES, make_config, metrics

CONFIGS = ("pointwise", "pairwise", "reflection", "rollouts")


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


def rows_of(run: Path, config: str, split: str = "train") -> list[dict]:
    """The rows on disk, in the order in which `datasets` reads the files."""
    return [
        row
        for file in sorted((run / "judgments" / config).glob(f"{split}-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


LOAD = """
import hashlib, json, sys
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

repo = sys.argv[1]
found = {}
for config in get_dataset_config_names(repo):
    loaded = load_dataset(repo, config)
    streamed = load_dataset(repo, config, split="train", streaming=True)
    row = loaded["train"][0]
    found[config] = {
        "rows": {split: part.num_rows for split, part in loaded.items()},
        "columns": loaded["train"].column_names,
        "features": {name: repr(feature) for name, feature in loaded["train"].features.items()},
        "pixels": [[image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()] for image in row["images"]],
        "row": {name: value for name, value in row.items() if name != "images"},
        "streamed": [image.size for image in next(iter(streamed))["images"]],
    }
print(json.dumps(found))
"""


def test_datasets_loads_what_the_run_wrote(hub, call, finished_run):
    before = digests(finished_run)
    published = call("publish_judgments", run=finished_run, repo="org/judged")
    repo = hub.repo("dataset", "org/judged")
    assert repo.private
    assert published["url"] == f"{hub.url}/datasets/org/judged"
    assert repo.at().files.keys() - {".gitattributes", "README.md"} == {
        str(shard.path.relative_to(finished_run / "judgments")) for shard in find_shards(finished_run / "judgments")
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "org/judged"], env=hub.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(CONFIGS)
    common = {"images", "messages", "question", "label", "reward", "parent_id", "recipe", "license", "model", "step"}
    own = {
        "pointwise": {"answer", "completion", "judge_completion"},
        "pairwise": {"answer_a", "answer_b", "judge_completion"},
        "reflection": {"answer", "completion", "judge_completion"},
        "rollouts": {"completion"},
    }
    for config, facts in found.items():
        assert set(facts["columns"]) > common | own[config] | {"model_revision"}
        assert facts["features"]["images"].startswith("List(Image(")
        rows = rows_of(finished_run, config)
        assert facts["rows"]["train"] == len(rows)
        first = rows[0]
        image = Image.open(io.BytesIO(first["images"][0]["bytes"]))
        assert facts["pixels"] == [["RGB", list(image.size), hashlib.sha256(image.tobytes()).hexdigest()]]
        assert facts["streamed"] == [list(image.size)]
        assert facts["row"] == {name: value for name, value in first.items() if name != "images"}
    assert digests(finished_run) == before


def test_publishing_twice_makes_no_second_commit_and_later_steps_are_added(hub, call, run):
    shards = find_shards(run / "judgments")
    late = [shard for shard in shards if shard.first_step == 4]
    for shard in late:
        shard.path.rename(run / f"{shard.config}-{shard.path.name}")
    call("publish_judgments", run=run, repo="org/judged")
    assert not call("publish_judgments", run=run, repo="org/judged")["changed"]
    for shard in late:
        (run / f"{shard.config}-{shard.path.name}").rename(shard.path)
    puts = len([request for request in hub.requests if request.method == "PUT"])
    assert call("publish_judgments", run=run, repo="org/judged")["changed"]
    assert len([request for request in hub.requests if request.method == "PUT"]) == puts + len(late)
    # A run that was resumed from an earlier checkpoint has other shards; those that it does not have any more go.
    for shard in late:
        shard.path.unlink()
    call("publish_judgments", run=run, repo="org/judged")
    files = hub.repo("dataset", "org/judged").at().files
    assert not [path for path in files if "-000004-" in path]


def test_judgments_of_the_hub_are_trained_on_and_judges_evaluated(hub, spark_vl, call, finished_run, tmp_path):
    call("publish_judgments", run=finished_run, repo="org/judged")
    commit = call("publish_model", checkpoint=finished_run, repo="org/tiny")["commit"]
    recipe = "judgments?repo=org/judged&kind=pairwise"
    settings = ["--model.path=org/tiny", "--model.dtype=float32", "--rollout.max_new_tokens=24"]
    prompts = [f"--prompts.templates=[{TEMPLATES}]", "--prompts.builtin_templates=false"]
    done = spark_vl(
        "train", f"--output_dir={tmp_path / 'again'}", f"--data.recipes=['{recipe}']", *settings, *prompts,
        "--steps=1", "--data.prompts_per_step=4", "--rollout.n=4", "--data.max_prompt_tokens=512",
        "--optimizer.lr=1e-4", "--optimizer.tokens_per_pack=1024", "--model.gradient_checkpointing=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = metrics(tmp_path / "again")
    assert 0 <= line["pairwise/reward"] <= 1
    assert "problem/reward" not in line
    assert line["update/grad_norm"] > 0
    # The judgments that were trained on are kept as what they are, and say of which problem they are.
    rows = rows_of(tmp_path / "again", "pairwise")
    assert {row["recipe"] for row in rows} == {"judgments-pairwise"}
    assert {(row["model"], row["model_revision"]) for row in rows} == {("org/tiny", commit)}
    assert {row["license"] for row in rows} == {load_recipe("digits").license}
    originals = {row["parent_id"] for row in rows_of(finished_run, "pairwise")}
    assert {row["parent_id"] for row in rows} <= originals

    done = spark_vl(
        "eval", f"--output={tmp_path / 'eval'}", f"--evaluation.recipes=['{recipe}']", *settings,
        "--evaluation.split=train", "--evaluation.samples=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["pairwise_greedy"]["n"] == len(originals)
    assert "reasoning_greedy" not in results
    # Nothing was said about the prompts: they are worded as those that the model was trained on.
    assert (tmp_path / "eval" / PROMPTS_FILE).read_text() == (finished_run / "model" / PROMPTS_FILE).read_text()


def test_recycling_offline_gives_what_can_be_published(hub, spark_vl, call, finished_run, tmp_path):
    done = spark_vl(
        "recycle", finished_run, f"--output={tmp_path / 'recycled'}", f"--prompts.templates=[{TEMPLATES}]",
        "--prompts.builtin_templates=false", "--recycle.max_judge=100", "--recycle.judge_sees=cot",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"spark-vl publish judgments {tmp_path / 'recycled'} --repo ORG/NAME" in done.stdout
    config = yaml.safe_load((tmp_path / "recycled" / "config.yaml").read_text())
    assert config["recycle"]["judge_sees"] == "cot"
    again = spark_vl("recycle", finished_run, f"--output={finished_run}")
    assert f"output: {finished_run} holds a run already; name another folder" in again.stderr
    nothing = [f"--recycle.max_{of}=0" for of in ("judge", "reflection")]
    none = spark_vl("recycle", finished_run / "judgments", f"--output={tmp_path / 'none'}", *nothing)
    assert none.returncode != 0
    assert "the rollouts give no judgments under these settings" in none.stderr
    call("publish_judgments", run=tmp_path / "recycled", repo="org/recycled")
    files = hub.repo("dataset", "org/recycled").at().files
    assert not [path for path in files if path.startswith("rollouts/")]
    card = files["README.md"].content.decode()
    assert f"in training ({finished_run.name})" in card
    assert "without replies: the rollouts of a run were recycled once more" in card
    rows = rows_of(tmp_path / "recycled", "pairwise")
    sources = {row["parent_id"]: row["completion"] for row in rows_of(finished_run, "rollouts")}
    assert rows
    for row in rows:
        assert row["judge_completion"] == []
        assert {row["completion_a"], row["completion_b"]} <= set(sources[row["parent_id"]])
        shown = "".join(part["text"] or "" for part in row["messages"][-1]["content"])
        assert row["completion_a"] in shown, "judge_sees: cot"


def test_a_run_without_judgments_says_so(hub, call, run):
    shutil.rmtree(run / "judgments")
    with pytest.raises(Refused, match=r"judgments: holds no judgments; .* unless logging\.judgments is off"):
        call("publish_judgments", run=run, repo="org/judged")


# ── what never gets there ──


@pytest.mark.parametrize("name", ["pairwise/train-extra.parquet", "secrets/train-000001-000001-0.parquet", "a.parquet"])
def test_a_file_that_no_run_writes_there_is_refused(hub, call, run, name):
    (run / "judgments" / name).parent.mkdir(exist_ok=True)
    shutil.copy(find_shards(run / "judgments")[0].path, run / "judgments" / name)
    with pytest.raises(Refused, match=f"{name}: is not a file that a run writes"):
        call("publish_judgments", run=run, repo="org/judged")
    assert not hub.repos


def test_what_a_run_writes_while_it_is_looked_through_is_not_published(hub, run, tmp_path, monkeypatch):
    """A run that goes on writes shards at any moment."""
    known = {f"{shard.config}/{shard.path.name}" for shard in find_shards(run / "judgments")}
    real = publish.check_shard

    def while_another_is_written(*arguments):
        shutil.copy(
            find_shards(run / "judgments")[0].path, run / "judgments" / "pairwise" / "train-000009-000009-0.parquet"
        )
        return real(*arguments)

    monkeypatch.setattr(publish, "check_shard", while_another_is_written)
    (tmp_path / "generated").mkdir()
    release = publish.prepare_judgments(tmp_path / "generated", run=run, repo="org/judged")
    assert {file.path for file in release.files} == known | {"README.md"}


@pytest.mark.parametrize(
    ("column", "text", "says"),
    [
        ("question", f"Is hf_{'k' * 34} a token?", "'question' holds a token of the Hub"),
        ("id", "{run}/scan.png@1", "'id' holds '.*', a path of this machine"),
        ("parent_id", "{run}/scan.png", "'parent_id' holds '.*', a path of this machine"),
    ],
)
def test_texts_of_the_author_are_refused_with_their_row(hub, call, run, column, text, says):
    row = spoil(run, **{column: text.replace("{run}", str(run))})
    with pytest.raises(Refused, match=says) as refused:
        call("publish_judgments", run=run, repo="org/judged")
    assert repr(row) in str(refused.value)
    assert not hub.repos


def test_files_of_other_datasets_stay_and_shards_of_earlier_releases_go(hub, call, run):
    repo = hub.create("dataset", "org/judged", private=True)
    mine = {"data/precious.parquet": File(b"mine"), "pairwise/notes.txt": File(b"mine")}
    repo.commit("by hand", mine | {"pairwise/train-000001-000009-7.parquet": File(b"old")})
    published = call("publish_judgments", run=run, repo="org/judged")
    assert published["deleted"] == ["pairwise/train-000001-000009-7.parquet"]
    assert mine.keys() <= repo.at().files.keys()


def test_a_run_is_called_by_its_name_wherever_one_stands(hub, spark_vl, run):
    for where, name in ((ROOT, run), (run, "."), (run / "judgments", "..")):
        done = spark_vl("publish", "judgments", name, "--repo", "org/judged", folder=where)
        assert done.returncode == 0, done.stderr
    repo = hub.repo("dataset", "org/judged")
    assert [commit.summary for commit in repo.commits[1:]] == [f"Judgments of {run.name}"]


SECRET = b"the author's private key"


def spoil(run: Path, **cells) -> str:
    """Put `cells` into the first row of a shard; returns the row's id."""
    shard = find_shards(run / "judgments")[0].path
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0] |= cells
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    return rows[0]["id"]


def foreign_images(folder: Path) -> dict[str, bytes]:
    """Files that hold more than pixels."""
    picture = Image.new("RGB", (56, 56), "teal")

    def saved(*arguments, **settings) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, *arguments, **settings)
        return buffer.getvalue()

    text = PngImagePlugin.PngInfo()
    text.add_text("comment", SECRET.decode())
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("key", SECRET)
    return {
        "a text chunk": saved("PNG", pnginfo=text),
        "EXIF": saved("JPEG", exif=exif),
        "an archive behind the end": saved("PNG") + archive.getvalue(),
        "no image": SECRET,
        "another format": saved("BMP"),
        "nothing": b"",
    }


@pytest.mark.parametrize(
    "what", ["a text chunk", "EXIF", "an archive behind the end", "no image", "another format", "nothing"]
)
def test_a_cell_that_is_more_than_pixels_is_refused_with_its_row(hub, call, run, tmp_path, what):
    row = spoil(run, images=[{"bytes": foreign_images(tmp_path)[what], "path": None}])
    with pytest.raises(Refused, match="an image cannot be published") as refused:
        call("publish_judgments", run=run, repo="org/judged")
    assert repr(row) in str(refused.value)
    assert not hub.repos, "nothing was sent, not even the name"


@pytest.mark.parametrize("path", ["{secret}", "../secret", "file://{secret}", "http://127.0.0.1/secret", "secret"])
@pytest.mark.parametrize("data", [None, b""])
def test_a_cell_that_names_a_file_is_refused_with_its_row(hub, call, run, tmp_path, path, data):
    (tmp_path / "secret").write_bytes(SECRET)
    row = spoil(run, images=[{"bytes": data, "path": path.replace("{secret}", str(tmp_path / "secret"))}])
    with pytest.raises(Refused, match="bytes alone are allowed") as refused:
        call("publish_judgments", run=run, repo="org/judged")
    assert repr(row) in str(refused.value)
    assert not hub.repos


def test_source_rows_that_name_foreign_files_never_become_judgments(hub, call, tmp_path):
    """From the source on: the rows of a dataset name files of this machine; a run is trained on it and published."""
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = Image.new("RGB", (56, 56), (1, 2, 3))
    secret.save(outside / "private.png")
    media = tmp_path / "media"
    media.mkdir()
    Image.new("RGB", (56, 56), "white").save(media / "good.png")
    (media / "link.png").symlink_to(outside / "private.png")
    hostile = {
        "absolute": str(outside / "private.png"),
        "climbs": "../outside/private.png",
        "link": "link.png",
        "scheme": f"file://{outside / 'private.png'}",
        "url": f"{hub.url}/private.png",
        "mapping": {"bytes": None, "path": str(outside / "private.png")},
    }
    rows = [
        {"id": name, "question": "Which digit is larger?", "answer": "3", "images": [image]}
        for name, image in hostile.items()
    ]
    rows += [
        {"id": f"good-{i}", "question": "Which digit is larger?", "answer": str(i), "images": ["good.png"]}
        for i in range(4)
    ]
    (media / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "hostile", "description": "Rows that name files", "license": "MIT", "source": {"jsonl": str(media)},
        "splits": {"train": "train.jsonl"}, "verifier": "number",
        "columns": {"question": "question", "answer": "answer", "images": "images", "id": "id"},
    }  # fmt: skip
    (tmp_path / "hostile.yaml").write_text(yaml.safe_dump(recipe))
    overrides = (f"--data.recipes=[{tmp_path / 'hostile.yaml'}]", "--steps=3", "--data.max_quarantined_fraction=1")
    cli.train(make_config(tmp_path / "run", *overrides), "none")

    quarantined = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in quarantined} == {f"hostile/train/{name}" for name in hostile}
    call("publish_judgments", run=tmp_path / "run", repo="org/judged")
    seen = set()
    for path, file in hub.repo("dataset", "org/judged").at().files.items():
        if path.endswith(".parquet"):
            for row in pq.read_table(io.BytesIO(file.content)).to_pylist():
                assert not row["parent_id"].startswith(tuple(f"hostile/train/{name}" for name in hostile))
                seen |= {Image.open(io.BytesIO(image["bytes"])).getpixel((0, 0)) for image in row["images"]}
    assert seen == {(255, 255, 255)}
