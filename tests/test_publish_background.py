"""Publishing while a run goes on: a Hub that is down neither stops nor changes the run, and nothing is lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from spark_vl.config import ConfigError, PublishConfig
from spark_vl.hub.background import BackgroundPublisher, check_publish_config
from tests.test_trainer import make_arguments, make_config, metrics, weights


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "publish.jsonl").read_text().splitlines()]


def test_a_run_publishes_its_checkpoints_and_is_not_changed_by_it(hub, spark_vl, finished_run, tmp_path):
    done = spark_vl("train", *make_arguments(tmp_path / "run", "--steps=4", "--publish.repo=org/live"))
    assert done.returncode == 0, done.stderr
    repo = hub.repo("model", "org/live")
    assert repo.private
    assert repo.at().files["model.safetensors"].content == (tmp_path / "run/model/model.safetensors").read_bytes()
    assert b"| steps | 4 |" in repo.at().files["README.md"].content
    assert re.search(r"published \d checkpoints to org/live\n", done.stdout)
    assert lines(tmp_path / "run")[-1] | {"seconds": 0} == {
        "checkpoint": "step-000004", "ok": True, "seconds": 0, "fault": ""
    }  # fmt: skip
    assert metrics(tmp_path / "run") == metrics(finished_run), "the same run without publishing"
    assert all((a == b).all() for a, b in zip(weights(tmp_path / "run").values(), weights(finished_run).values()))  # noqa: B905
    assert not (tmp_path / "run" / "release" / "queue").exists()


def test_the_hub_is_down_all_the_time(hub, spark_vl, finished_run, tmp_path):
    settings = ("--steps=4", "--publish.repo=org/live", "--publish.wait_s=1")
    # Of the processes that publish; the one that trains could ask the Hub, and does not.
    done = spark_vl("train", *make_arguments(tmp_path / "run", *settings), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert metrics(tmp_path / "run") == metrics(finished_run)
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    assert f"spark-vl publish model {folder} --repo org/live" in done.stdout, "what is left to do is said"
    assert "published 0 checkpoints" in done.stdout


@pytest.fixture
def publisher(hub, finished_run, tmp_path, monkeypatch):
    """A publisher for a copy of a finished run, which asks the loopback and is not patient."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)  # of the processes that it starts

    def make(**settings) -> BackgroundPublisher:
        return BackgroundPublisher(PublishConfig(repo="org/live", **settings), run, waits_s=(0.2,))

    return make


def test_failures_are_retried_counted_and_reported(hub, publisher, capsys):
    hub.misbehave("POST", "/api/repos/create", times=1, status=403, body="not yet")
    it = publisher()
    start = time.monotonic()
    it.on_checkpoint(3, it.run / "checkpoints" / "step-000003")
    assert time.monotonic() - start < 0.5, "training does not wait"
    it.finish(wait=True)
    assert (it.published, it.failures) == (1, 1)
    first, second = lines(it.run)
    assert (first["ok"], second["ok"]) == (False, True)
    assert re.search(r"403: the token from HF_TOKEN .*may not do that", first["fault"])
    said = capsys.readouterr().out
    assert "publishing step-000003 failed, training goes on: " in said
    assert re.search(r"published 1 checkpoints to org/live; 1 tries failed, the last one because: .*403", said)


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits_and_deleted_files_are_kept(hub, publisher):
    it = publisher()
    paused = hub.pause("POST", "/api/repos/create")
    it.on_checkpoint(3, it.run / "checkpoints" / "step-000003")
    assert paused.reached.wait(60)
    shutil.rmtree(it.run / "checkpoints" / "step-000003")  # the run keeps only the newest
    it.on_checkpoint(4, it.run / "checkpoints" / "step-000004")
    paused.release()
    it.finish(wait=True)
    assert [line["checkpoint"] for line in lines(it.run)] == ["step-000003", "step-000004"]
    assert it.failures == 0
    steps = [
        json.loads(c.files["spark_training.json"].content)["step"] for c in hub.repo("model", "org/live").commits[1:]
    ]
    assert steps == [3, 4]


def test_every_so_many_checkpoints_and_the_last_one(hub, publisher):
    it = publisher(every=2)
    it.on_checkpoint(3, it.run / "checkpoints" / "step-000003")
    assert it._target is None
    it.finish(wait=True)
    assert [line["checkpoint"] for line in lines(it.run)] == ["step-000003"]


def test_a_run_that_is_told_to_stop_does_not_wait(hub, publisher, capsys):
    it = publisher()
    paused = hub.pause("POST", "/api/repos/create")
    it.on_checkpoint(4, it.run / "checkpoints" / "step-000004")
    assert paused.reached.wait(60)
    start = time.monotonic()
    it.finish(wait=False)
    assert time.monotonic() - start < 5
    assert "The last checkpoint is not published; publish it with" in capsys.readouterr().out


def test_files_that_cannot_be_kept_are_a_failure_of_publishing_only(hub, publisher, capsys):
    it = publisher()
    it.on_checkpoint(99, it.run / "checkpoints" / "step-000099")
    it.finish(wait=True)
    [line] = lines(it.run)
    assert line["fault"].startswith("its files cannot be kept: ")
    assert "step-000099 --repo org/live" in capsys.readouterr().out, "what is left to do is said"


def test_files_are_copied_where_they_cannot_be_linked(hub, publisher, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", link)
    it = publisher()
    it.on_checkpoint(4, it.run / "checkpoints" / "step-000004")
    it.finish(wait=True)
    assert (it.published, it.failures) == (1, 0)


def test_neither_a_full_disk_nor_a_full_process_table_reaches_training(hub, publisher, monkeypatch, capsys):
    it = publisher()
    (it.run / "publish.jsonl").mkdir()  # cannot be written
    started = []

    def start(*arguments, **settings):
        started.append(arguments)
        if len(started) == 1:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return real(*arguments, **settings)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    it.on_checkpoint(4, it.run / "checkpoints" / "step-000004")
    it.finish(wait=True)
    assert (it.published, it.failures) == (1, 1)
    said = capsys.readouterr().out
    assert "no more processes" in said
    assert "publish.jsonl cannot be written" in said


def test_a_repository_that_cannot_be_is_found_before_anything_is_loaded(tmp_path):
    with pytest.raises(SystemExit):
        make_config(tmp_path / "run", "--publish.repo=just-a-name")
    from spark_vl.config import TrainConfig
    from spark_vl.config_check import check_train_config

    config = TrainConfig()
    config.data.recipes = ["digits"]
    config.publish.repo = "a/b/c"
    with pytest.raises(ConfigError, match=r"publish\.repo: is 'a/b/c'; allowed is ORG/NAME"):
        check_train_config(config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"repo": "org/ti--ny"}, r"^publish\.repo: "),
        ({"repo": "org/tiny", "token_from": "hf_" + "q" * 34}, r"^publish\.token_from: found a token itself; allowed"),
        ({"repo": "org/tiny", "token_from": "HF_TOKEN"}, r"^publish\.token_from: found 'HF_TOKEN'; allowed: env:NAME"),
        ({"repo": "org/tiny", "token_from": "env:NOT_SET"}, r"^publish\.token_from: .*'NOT_SET' is not set"),
    ],
)
def test_a_run_does_not_begin_that_could_publish_nothing(settings, says):
    with pytest.raises(ConfigError, match=says):
        check_publish_config(PublishConfig(**settings))
