"""Publishing the demo; that what is published runs is seen in test_space.py."""

from __future__ import annotations

import json

import pytest
import yaml

from spark_vl.hub.space import stage_space
from tests.hub.driver import Refused
from tests.hub.server import File


def test_a_space_arrives_whole_and_once(hub, call, tmp_path):
    model = hub.create("model", "org/tiny")
    model.refs["step-4"] = model.commit("tiny", {"spark_prompts.json": File(b"{}")}).oid
    published = call("publish_space", model="org/tiny", repo="org/demo", model_revision="step-4")
    repo = hub.repo("space", "org/demo")
    assert repo.private
    assert published["url"] == f"{hub.url}/spaces/org/demo"
    staged = stage_space(tmp_path / "staged", model="org/tiny", revision="step-4")
    expected = {str(file.relative_to(staged)): file.read_bytes() for file in staged.rglob("*") if file.is_file()}
    files = {path: file.content for path, file in repo.at().files.items() if path != ".gitattributes"}
    assert files == expected
    assert json.loads(files["space.json"]) == {"model": "org/tiny", "revision": "step-4"}
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["org/tiny"])
    assert not call("publish_space", model="org/tiny", repo="org/demo", model_revision="step-4")["changed"]


def test_the_command_shows_what_it_would_publish(hub, spark_vl):
    done = spark_vl("publish", "space", "--model", "org/tiny", "--repo", "org/demo", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not hub.repos
    for name in ("app.py", "requirements.txt", "space.json", "spark_vl/data/images.py"):
        assert f"  {name}\n" in done.stdout


def test_a_model_that_is_no_repository_is_refused(hub, call):
    with pytest.raises(Refused, match="--model: found 'tiny'; allowed: ORG/NAME"):
        call("publish_space", model="tiny", repo="org/demo")
    assert not hub.requests
    with pytest.raises(Refused, match="--model: there is no model 'org/tiny' that the token can see"):
        call("publish_space", model="org/tiny", repo="org/demo")
    hub.create("model", "org/tiny")
    with pytest.raises(Refused, match=r"--model: 'org/tiny' has no spark_prompts\.json, so it was not published by"):
        call("publish_space", model="org/tiny", repo="org/demo")
    words = {"spark_prompts.json": File(b"{}"), "README.md": File(b"---\npipeline_tag: text-generation\n---\n")}
    hub.repo("model", "org/tiny").commit("words", words)
    with pytest.raises(Refused, match=r"--model: 'org/tiny' is a text-generation model; .* asks about an image"):
        call("publish_space", model="org/tiny", repo="org/demo")
    assert ("space", "org/demo") not in hub.repos
