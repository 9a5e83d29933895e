"""What a release must not hold, in every spelling, and that what is uploaded is what was looked through."""

from __future__ import annotations

import json
import os
import re
import time
from html import escape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from spark_vl.hub import upload
from spark_vl.hub.client import HubError
from spark_vl.hub.release import Release, ReleaseError, Secrets, below, make_release

TOKEN = "hf_" + "aB3" * 12
LINES = f"first line\n{TOKEN}\nlast line"
ANY = re.compile(".*")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of this process's own variables, of which one might be in a text by chance."""
    for name in os.environ:
        if name != "PATH":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/alice")


def released(folder: Path, name: str, content: str | bytes, *, title: str = "Step 1", **settings) -> Release:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return make_release("model", title, {name: file}, secrets=Secrets([Path.home()], **settings), replaces=ANY)


def unicode_escaped(text: str) -> str:
    return "".join(f"\\u{ord(character):04x}" for character in text)


SPELLINGS = {
    "in JSON, at the start of a line": json.dumps({"notes": LINES}),
    "in JSON in JSON": json.dumps({"notes": json.dumps({"notes": LINES})}),
    "a key of JSON": json.dumps({LINES: 1}),
    "in YAML, at the start of a line": yaml.safe_dump({"notes": LINES + "\x07"}),
    "in YAML, folded": f'notes: "{TOKEN[:9]}\\\n    {TOKEN[9:]}"',
    "after a name": f"KEY_{TOKEN}",
    "after a letter": f"n{TOKEN}",
    "percent-escaped": quote(TOKEN).replace("_", "%5F"),
    "percent-escaped, all of it": "".join(f"%{ord(character):02x}" for character in TOKEN),
    "percent-escaped twice": TOKEN.replace("_", "%255F"),
    "unicode-escaped": f'{{"notes": "{unicode_escaped(TOKEN)}"}}',
    "one character unicode-escaped": f'{{"notes": "{TOKEN.replace("f", chr(92) + "u0066", 1)}"}}',
    "as in JavaScript": TOKEN.replace("h", "\\u{68}", 1),
    "with bytes escaped": TOKEN.replace("h", "\\x68", 1),
    "in Markdown": TOKEN.replace("_", "\\_"),
    "in HTML": TOKEN.replace("_", "&lowbar;"),
    "in HTML, by numbers": TOKEN.replace("h", "&#104;").replace("_", "&#x5f;"),
    "of OAuth": "hf_oauth_" + "eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVlfQ.a-b_c",
    "of OAuth, opaque": "hf_oauth_" + "x1" * 20,
    "a JWT": "hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVlfQ.a-b_c",
    "of a kind to come": "hf_app_" + "x1" * 20,
    "of an organization": "api_org_" + "x1" * 17,
    "OpenAI": "sk-" + "a1" * 24,
    "OpenAI, of a project": "KEY_sk-proj-" + "a1_-" * 12,
    "Anthropic": "sk-ant-api03-" + "a1_-" * 12,
    "AWS": "AKIA" + "ABCD2345" * 2,
    "AWS, at the start of a line": json.dumps("\nASIA" + "ABCD2345" * 2),
    "AWS, the secret one": 'aws_secret_access_key = "' + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY" + '"',
    "wandb": "WANDB_API_KEY=" + "0123456789" * 4,
    "wandb, in .netrc": json.dumps("machine api.wandb.ai\n  login user\n  password " + "0123456789" * 4),
    "wandb, the newer kind": "wandb_v1_" + "aB3_" * 20,
    "GitHub": "ghp_" + "a1" * 18,
    "GitHub, fine-grained": "github_pat_" + "a1_" * 27,
    "GitLab": "glpat-" + "a1" * 10,
    "Google": "AIza" + "a1_-b" * 7,
    "Slack": "xoxb-" + "123456789-" * 4,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_a_token_is_found_in_every_spelling(tmp_path, text):
    with pytest.raises(ReleaseError, match=r"notes\.json: .* holds a.*; remove it, and revoke it"):
        released(tmp_path, "notes.json", text)
    assert Secrets([]).token_in(text), "in a row"


INNOCENT = {
    "commits": json.dumps({"model_revision": "0123456789" * 4, "base_commit": "a" * 40, "_commit_hash": "b" * 40}),
    "names": "hf_hub_download, hf_processor_of_a_model_family_with_a_long_name; task-specific-sub-task-number-one",
    "math": r"\frac{1}{2} \\ \hfill 100% \times \theta \newline hf_{12}",
    "a digest": "task-0123456789abcdef0123456789abcdef",
    "settings": yaml.safe_dump({"eos_token": "<|im_end|>", "pad_token_id": 151643, "key": "value", "tokens": [1, 2]}),
    "shapes of keys": "sk-learn hf_ AKIA hf_oauth_ gpt-sk- ghp_ -----BEGIN CERTIFICATE-----",
}


@pytest.mark.parametrize("text", INNOCENT.values(), ids=INNOCENT)
def test_what_is_no_token_is_uploaded(tmp_path, text):
    [file] = released(tmp_path, "notes.json", text).files
    assert file.content == text.encode()


def with_header(path: Path, words: str) -> None:
    save_file({"weight": np.zeros(3)}, path, metadata={"notes": words})


def with_text_chunk(path: Path, words: str, *, compressed: bool = True) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", words, zip=compressed)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def with_metadata(path: Path, words: str) -> None:
    table = pa.table({"a": [1]}).replace_schema_metadata({"notes": words})
    pq.write_table(table, path)


def with_metadata_of_a_column(path: Path, words: str) -> None:
    pq.write_table(pa.table({"a": [1]}, pa.schema([pa.field("a", pa.int64(), metadata={"notes": words})])), path)


@pytest.mark.parametrize(
    ("repo_type", "name", "write"),
    [
        ("model", "model.safetensors", with_header),
        ("model", "picture.png", with_text_chunk),
        ("dataset", "pairwise/train-000001-000001-0.parquet", with_metadata),
        ("dataset", "pairwise/train-000001-000001-0.parquet", with_metadata_of_a_column),
    ],
)
@pytest.mark.parametrize("words", [LINES, "at\n/home/alice/secret"])
def test_what_is_not_a_text_is_looked_through_where_it_holds_words(tmp_path, repo_type, name, write, words):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    for said, holds in (("nothing", None), (words, "a token of the Hub|a path of this machine")):
        write(file, said)
        if holds is None:
            make_release(repo_type, "title", {name: file}, secrets=Secrets([Path.home()]), replaces=ANY)
        else:
            with pytest.raises(ReleaseError, match=holds):
                make_release(repo_type, "title", {name: file}, secrets=Secrets([Path.home()]), replaces=ANY)


def test_names_and_titles_are_looked_through(tmp_path):
    with pytest.raises(ReleaseError, match="holds a token of the Hub"):
        released(tmp_path, f"{TOKEN}.json", "{}")
    with pytest.raises(ReleaseError, match="message of the commit and holds a token of the Hub"):
        released(tmp_path, "a.json", "{}", title=f"Step 1 of {TOKEN}")


@pytest.mark.parametrize("content", [LINES.encode("utf-16"), b"\xff\xfe" + LINES.encode(), b"\x1f\x8b\x08\x00\xc3\x28"])
def test_a_text_is_utf_8(tmp_path, content):
    with pytest.raises(ReleaseError, match=r"notes\.json: would be uploaded as notes\.json and cannot be read"):
        released(tmp_path, "notes.json", content)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "MY_TOKEN", "db_password", "SESSION_SECRET", "AWS_CREDENTIALS"])
@pytest.mark.parametrize("value", ["correct horse battery", 'a"b\\c/d+e=f&g <h> i'])
def test_what_the_environment_keeps_secret_stays_here(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for text in (f"x{value}y", json.dumps(f"\n{value}"), quote(value, safe=""), escape(value), unicode_escaped(value)):
        with pytest.raises(ReleaseError, match=f"the value of the environment variable {name}; remove it") as refused:
            released(tmp_path, "notes.json", text)
        assert value not in str(refused.value)
    monkeypatch.setenv(name, "short")
    released(tmp_path, "notes.json", f"x{value}y short")


def test_the_token_that_the_upload_itself_uses_stays_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "of-a-mirror-0123")
    (tmp_path / "secret").write_text("of-a-mirror-4567\n")
    released(tmp_path, "notes.json", "of-a-mirror-0123 of-a-mirror-4567")
    for source, value in (("env:MINE", "of-a-mirror-0123"), (f"file:{tmp_path / 'secret'}", "of-a-mirror-4567")):
        with pytest.raises(ReleaseError, match="holds a token of the Hub"):
            released(tmp_path, "notes.json", value, token_from=source)


@pytest.mark.parametrize(
    "text",
    [
        "/home/alice",
        "I was at /home/alice.",
        json.dumps("first\n/home/alice/x"),
        json.dumps("/home/alice/x").replace("/", "\\/"),
        yaml.safe_dump({"notes": "first\x07\n/home/alice/x"}),
        quote("file:///home/alice/x", safe=""),
        "KEY_/home/alice",
        "/home//alice",
        unicode_escaped("/home/alice"),
        "/home/ali\\u0063e",
    ],
)
def test_a_path_is_found_in_every_spelling(tmp_path, text):
    with pytest.raises(ReleaseError, match="holds '/home/alice', a path of this machine"):
        released(tmp_path, "notes.json", text)


@pytest.mark.parametrize("text", ["/home/alice-b", "/home/alice2", "https://example.org/home/alice", "../home/alice"])
def test_another_path_is_not_this_machines(tmp_path, text):
    released(tmp_path, "notes.json", text)


def test_a_path_is_known_by_its_other_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    secrets = Secrets([tmp_path / "link"])
    assert secrets.path_in(f"{tmp_path}/real/x")
    assert secrets.path_in(f"{tmp_path}/link/x")


@pytest.mark.parametrize("text", ["hf_", "hf_a_", "\\", "%25", "/home/", "hf_jwt_", "sk-ant-", "key ", "-----BEGIN "])
def test_looking_takes_time_in_proportion(text):
    start = time.process_time()
    Secrets([Path.home()]).token_in(text * (300_000 // len(text)))
    Secrets([Path.home()]).path_in(text * (300_000 // len(text)))
    assert time.process_time() - start < 10


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "notes.json")
    with pytest.raises(ReleaseError, match="is not a regular file"):
        make_release("model", "t", {"notes.json": tmp_path / "notes.json"}, secrets=Secrets([]), replaces=ANY)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "link/x"])
def test_nothing_is_written_outside(tmp_path, name):
    folder = tmp_path / "generated"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ReleaseError, match="would be written outside"):
        below(folder, name)
    assert below(folder, "a/x") == folder / "a" / "x"


# ── what is uploaded is what was looked through ──


class FakeHub:
    """Takes a commit; `before` is done when the commit has begun."""

    repo, repo_type = "org/tiny", "model"

    def __init__(self, before=lambda: None) -> None:
        self.api, self.before, self.sent = SimpleNamespace(create_commit=self.create_commit), before, {}

    def create_commit(self, repo, operations, **settings):
        self.before()
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()

    def call(self, doing, function, *arguments, **settings):
        raise AssertionError("the Hub is asked only what it holds after the file was found to be the same")


@pytest.fixture
def release(tmp_path) -> Release:
    with_header(tmp_path / "model.safetensors", "nothing")
    (tmp_path / "notes.json").write_text('{"notes": "nothing"}')
    files = {name: tmp_path / name for name in ("model.safetensors", "notes.json")}
    return make_release("model", "title", files, secrets=Secrets([]), replaces=ANY)


def test_a_text_that_changes_is_uploaded_as_it_was_looked_through(release, tmp_path):
    hub = FakeHub(lambda: (tmp_path / "notes.json").write_text(LINES))
    upload._commit(hub, release, None, "0" * 40, ())
    assert hub.sent["notes.json"] == b'{"notes": "nothing"}'


def test_weights_that_changed_are_not_uploaded(release, tmp_path):
    with_header(tmp_path / "model.safetensors", LINES)
    hub = FakeHub()
    with pytest.raises(HubError, match=r"model\.safetensors: has changed since it was looked through"):
        upload._commit(hub, release, None, "0" * 40, ())
    assert not hub.sent


def test_weights_that_change_while_they_are_uploaded_are_no_success(release, tmp_path):
    hub = FakeHub(lambda: with_header(tmp_path / "model.safetensors", LINES))
    upload._commit(hub, release, None, "0" * 40, ())
    assert TOKEN.encode() in hub.sent["model.safetensors"]
    with pytest.raises(HubError, match=r"model\.safetensors: changed while it was uploaded.* delete that commit"):
        upload._verify(hub, "c" * 40, release.files)
