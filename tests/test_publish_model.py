"""Publishing a model to a Hub on the loopback, by the real client: what arrives, and what does not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from spark_vl.data.images import load_image
from tests.conftest import make_image
from tests.hub.driver import Refused
from tests.hub.fixtures import ROOT, digests
from tests.hub.server import File, HubServer


def test_what_arrives_is_the_model_the_card_the_curves_and_nothing_else(hub, call, finished_run):
    before = digests(finished_run)
    published = call("publish_model", checkpoint=finished_run, repo="org/tiny")
    repo = hub.repo("model", "org/tiny")
    assert repo.private
    assert published["changed"]
    assert published["url"] == f"{hub.url}/org/tiny"
    files = repo.at().files
    assert published["commit"] == repo.at().oid
    assert files.keys() == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"),
        *("spark_prompts.json", "spark_training.json", "curves.png", "metrics.jsonl", "evaluations.jsonl"),
    }
    for name in ("model.safetensors", "tokenizer.json", "spark_prompts.json"):
        assert files[name].content == (finished_run / "model" / name).read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        own = [json.loads(line) for line in (finished_run / name).read_text().splitlines()]
        assert [json.loads(line) for line in files[name].content.splitlines()] == own
    assert files["curves.png"].content.startswith(b"\x89PNG")
    assert b'from_pretrained("org/tiny"' in files["README.md"].content
    everything = b"".join(file.content for file in files.values())
    for private in (str(finished_run), str(ROOT), HubServer.WRITE):
        assert private.encode() not in everything
    assert digests(finished_run) == before


def test_publishing_twice_makes_no_second_commit(hub, call, finished_run):
    first = call("publish_model", checkpoint=finished_run, repo="org/tiny")
    puts = sum(request.method == "PUT" for request in hub.requests)
    again = call("publish_model", checkpoint=finished_run / "model", repo="org/tiny")
    assert (again["commit"], again["changed"]) == (first["commit"], False)
    assert len(hub.repo("model", "org/tiny").commits) == 2  # the Hub's own, and the release
    assert sum(request.method == "PUT" for request in hub.requests) == puts > 0


def test_a_later_checkpoint_replaces_weights_in_other_files_and_leaves_what_is_the_users(hub, call, finished_run):
    call("publish_model", checkpoint=finished_run / "checkpoints" / "step-000003", repo="org/tiny")
    repo = hub.repo("model", "org/tiny")
    of_a_release = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", ".eval_results/digits.yaml")
    of_the_user = ("NOTES.md", "adapter_model.safetensors", "adapters/lora.safetensors", "old/model.safetensors")
    repo.commit("by hand", {path: File(path.encode()) for path in (*of_a_release, *of_the_user)})
    published = call("publish_model", checkpoint=finished_run, repo="org/tiny")
    files = repo.at().files
    assert set(published["deleted"]) == set(of_a_release), "they would speak of these weights"
    assert not set(of_a_release) & files.keys()
    assert {path: files[path].content for path in of_the_user} == {path: path.encode() for path in of_the_user}
    assert b"| steps | 4 |" in files["README.md"].content


def test_a_branch_is_made_and_main_is_left_alone(hub, call, finished_run):
    call("publish_model", checkpoint=finished_run, repo="org/tiny", revision="step-4")
    repo = hub.repo("model", "org/tiny")
    assert "model.safetensors" in repo.at("step-4").files
    assert "model.safetensors" not in repo.at("main").files


def test_public_is_public_and_a_repository_does_not_change_who_sees_it(hub, call, finished_run):
    call("publish_model", checkpoint=finished_run, repo="org/open", public=True)
    assert not hub.repo("model", "org/open").private
    head = hub.repo("model", "org/open").at().oid
    with pytest.raises(Refused, match=r"exists and is public, but private .*--public.* was asked for"):
        call("publish_model", checkpoint=finished_run / "checkpoints" / "step-000003", repo="org/open")
    assert hub.repo("model", "org/open").at().oid == head


def test_the_license_of_the_base_model_is_read_from_its_card(hub, spark_vl, call, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    facts = json.loads((run / "model" / "spark_training.json").read_text())
    facts |= {"base": "org/base", "base_commit": "b" * 40}
    (run / "model" / "spark_training.json").write_text(json.dumps(facts))
    hub.create("model", "org/base").commit("card", {"README.md": File(b"---\nlicense: apache-2.0\n---\n# Base\n")})
    call("publish_model", checkpoint=run, repo="org/tiny")
    card = hub.repo("model", "org/tiny").at().files["README.md"].content.decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    license = b"---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://q.org/l\n---\n# Base\n"
    hub.repo("model", "org/base").commit("another license", {"README.md": File(license)})
    call("publish_model", checkpoint=run, repo="org/tiny")
    card = hub.repo("model", "org/tiny").at().files["README.md"].content.decode()
    data = yaml.safe_load(card.split("---")[1])
    assert [data[name] for name in ("license", "license_name", "license_link")] == [
        "other",
        "qwen-research",
        "https://q.org/l",
    ]
    assert "org/base): qwen-research" in card
    head = hub.repo("model", "org/tiny").at().oid
    hub.misbehave("GET", "/api/models/org/base", times=None, status=503)
    with pytest.raises(Refused, match="looking at org/base: the Hub answered 503"):  # not a card that says less
        call("publish_model", checkpoint=run, repo="org/tiny")
    shown = spark_vl("publish", "model", run, "--repo", "org/tiny", "--dry-run")
    assert shown.returncode == 0
    assert "the license of the base model is not in this card" in shown.stderr
    hub.behave()
    assert hub.repo("model", "org/tiny").at().oid == head
    hub.repos.pop(("model", "org/base"))
    call("publish_model", checkpoint=run, repo="org/other")
    card = hub.repo("model", "org/other").at().files["README.md"].content.decode()
    assert "license" not in yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.json", f'{{"token": "hf_{"a" * 34}"}}', r"notes\.json: .*holds a token of the Hub"),
        ("LICENSE-notes", f"hf_{'a' * 34}", r"LICENSE-notes: .*holds a token of the Hub"),
        ("notes.json", "{run}/checkpoints", r"notes\.json: .*holds '.*', a path of this machine"),
    ],
)
def test_tokens_and_paths_of_this_machine_stay_here(hub, call, finished_run, tmp_path, name, content, says):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "model" / name).write_text(content.replace("{run}", str(run)))
    with pytest.raises(Refused, match=says) as refused:
        call("publish_model", checkpoint=run, repo="org/tiny")
    assert refused.value.kind == "ReleaseError"
    assert not hub.repos


def test_links_are_refused_and_pickles_left_out(hub, call, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("optimizer.bin", "training_args.bin", "scaler.pt", "old.pth", "state.pkl", "notes.docx"):
        (run / "model" / name).write_bytes(b"\x80\x04pickle")
    call("publish_model", checkpoint=run, repo="org/tiny")
    names = " ".join(hub.repo("model", "org/tiny").at().files)
    assert not re.search(r"\.(bin|pt|pth|pkl|docx)\b", names)
    (run / "model" / "extra.json").symlink_to("/etc/hostname")
    with pytest.raises(Refused, match=r"extra\.json: is a symbolic link"):
        call("publish_model", checkpoint=run, repo="org/other")


def test_the_command_shows_a_manifest_and_uploads_only_then(hub, spark_vl, finished_run):
    shown = spark_vl("publish", "model", finished_run, "--repo", "org/tiny", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert not hub.repos
    content = (finished_run / "model" / "model.safetensors").read_bytes()
    assert f"{hashlib.sha256(content).hexdigest()}  {len(content):>14,}  model.safetensors" in shown.stdout
    assert "# tiny" in shown.stdout
    assert "pipeline_tag: image-text-to-text" in shown.stdout

    (finished_run / "token").write_text(HubServer.WRITE + "\n")
    token = f"file:{finished_run / 'token'}"
    done = spark_vl("publish", "model", finished_run, "--repo", "org/tiny", "--token-from", token, HF_TOKEN="")
    (finished_run / "token").unlink()
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/tiny  commit {hub.repo('model', 'org/tiny').at().oid}" in done.stdout


def test_the_published_model_loads_and_its_card_runs(forked, hub, call, finished_run, tmp_path):
    call("publish_model", checkpoint=finished_run, repo="org/tiny")
    card = hub.repo("model", "org/tiny").at().files["README.md"].content.decode()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    load_image(make_image(1)).save(tmp_path / "picture.png")
    done = forked.python(tmp_path, "-c", "".join(code))
    assert done.returncode == 0, done.stderr
    assert re.search(r"answer: .*\njudged right: (True|False)\nafter reflection: ", done.stdout)


def test_killed_in_the_middle_of_an_upload_and_run_again(hub, call, finished_run):
    before = digests(finished_run)
    large = hub.pause("PUT", "lfs|object|upload|store|/")
    command = [sys.executable, "-m", "spark_vl", "publish", "model", str(finished_run), "--repo", "org/tiny"]
    with subprocess.Popen(command, env=hub.environment(), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        assert large.reached.wait(60)
        process.send_signal(signal.SIGKILL)
    large.release(drop=True)
    assert "model.safetensors" not in hub.repo("model", "org/tiny").at().files
    call("publish_model", checkpoint=finished_run, repo="org/tiny")
    files = hub.repo("model", "org/tiny").at().files
    assert files["model.safetensors"].content == (finished_run / "model" / "model.safetensors").read_bytes()
    call("publish_model", checkpoint=finished_run, repo="org/undisturbed")
    undisturbed = hub.repo("model", "org/undisturbed").at().files
    different = {path for path in files if files[path].content != undisturbed[path].content}
    assert different == {"README.md"}, "which names the repository"
    assert digests(finished_run) == before
