"""The test Hub against the real clients. Its misbehaviors are seen at work in `tests/test_publish_faults.py`."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_image
from tests.hub.server import File, HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def client(hub: HubServer, script: str, *arguments: str | Path, token: str | None = HubServer.WRITE) -> Any:
    """Run `script` with the real clients; the JSON of the last line that it printed. AssertionError where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=hub.environment(token, HF_HUB_DISABLE_PROGRESS_BARS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def send(hub: HubServer, method: str, path: str, body: bytes | dict = b"", **headers: str) -> tuple[int, bytes]:
    """One request with the token that may write; (status, body)."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, content, {"Authorization": f"Bearer {hub.WRITE}"} | headers)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def put(hub: HubServer, content: bytes, claimed: bytes | None = None) -> tuple[int, int]:
    """PUT and verify `content` under the oid of `claimed`; the two statuses."""
    oid = sha256(content if claimed is None else claimed).hexdigest()
    first, _ = send(hub, "PUT", f"/lfs/models/org/name/{oid}", content)
    body = {"oid": oid, "size": len(content)}
    return first, send(hub, "POST", "/org/name.git/info/lfs/objects/verify", body)[0]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROUND_TRIP = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

api, folder, found = HfApi(), sys.argv[1], {}
found["who"] = api.whoami()["name"]
for kind in ("model", "dataset", "space"):
    where = {"repo_id": "org/name", "repo_type": kind}
    api.create_repo(**where, private=kind == "dataset", space_sdk="gradio" if kind == "space" else None)
    first = api.upload_folder(**where, folder_path=folder)
    found[kind] = {"again": api.upload_folder(**where, folder_path=folder).oid == first.oid}
    found[kind]["snapshot"] = api.snapshot_download(**where, local_dir=f"{sys.argv[2]}/{kind}")
    found[kind]["checked"] = api.verify_repo_checksums(**where, local_dir=folder).mismatches
    api.create_tag(**where, tag="v1.0")
    api.create_branch(**where, branch="dev/x")
    found[kind]["files"] = api.list_repo_files(**where, revision="v1.0")
    found[kind]["tree"] = [entry.path for entry in api.list_repo_tree(**where)]
    info = api.repo_info(**where, files_metadata=True)
    lfs = [sibling.rfilename for sibling in info.siblings if sibling.lfs]
    found[kind]["info"] = [info.sha == first.oid, info.card_data["license"], len(lfs)]
    found[kind]["paths"] = [type(p).__name__ for p in api.get_paths_info(**where, paths=["data", "empty.txt", "none"])]
    api.delete_folder(**where, path_in_repo="data")
    found[kind]["refs"] = [[r.name, r.target_commit == first.oid] for r in api.list_repo_refs(**where).branches]
    try:
        operations = [CommitOperationAdd("late.txt", b"late")]
        api.create_commit(**where, operations=operations, commit_message="late", parent_commit=first.oid)
    except HfHubHTTPError as error:
        found[kind]["late"] = error.response.status_code, error.server_message, error.request_id is not None
try:
    HfApi(token=False).dataset_info("org/name")
except RepositoryNotFoundError as error:
    found["private"] = error.response.status_code
print(json.dumps(found))
"""


def test_round_trip_of_all_kinds(hub, tmp_path):
    folder = tmp_path / "folder"
    contents = {
        "README.md": b"---\nlicense: mit\n---\nHello\n",
        "data/ä b/名 #1.json": '{"名": "ü"}'.encode() * 60,
        "data/weights.safetensors": os.urandom(3000),
        "data/ä b/100%.dat": bytes(range(256)),
        "empty.txt": b"",
    }
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    found = client(hub, ROUND_TRIP, folder, tmp_path)
    assert (found["who"], found["private"]) == ("tester", 401)
    for kind in ("model", "dataset", "space"):
        repo = hub.repo(kind, "org/name")
        initial, uploaded, deleted = repo.commits
        stored = {path: file.content for path, file in uploaded.files.items()}
        downloaded = read_folder(Path(found[kind]["snapshot"]))
        assert (
            {path: downloaded[path] for path in stored}
            == stored
            == contents | {".gitattributes": initial.files[".gitattributes"].content}
        )
        lfs = {path for path, file in uploaded.files.items() if file.lfs}
        assert lfs == {"data/weights.safetensors", "data/ä b/100%.dat"}
        assert deleted.files.keys() == {"README.md", "empty.txt", ".gitattributes"}
        assert repo.refs == {"main": deleted.oid, "v1.0": uploaded.oid, "dev/x": uploaded.oid}
        assert found[kind] == {
            "again": True,
            "snapshot": str(tmp_path / kind),
            "checked": [],
            "files": sorted(stored),
            "tree": [".gitattributes", "README.md", "data", "empty.txt"],
            "info": [True, "mit", 2],
            "paths": ["RepoFolder", "RepoFile"],
            "refs": [["main", False], ["dev/x", True]],
            "late": [412, "A commit has happened since. Please refresh and try again.", True],
        }
    assert hub.repo("dataset", "org/name").private
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert len(puts) == 6
    assert all("authorization" not in request.headers for request in puts)


LOAD = """
import io, json
from datasets import load_dataset
from PIL import Image

shown = []
for streaming in (False, True):
    rows = list(load_dataset("org/name", "small", split="train", streaming=streaming))
    shown.append([[row["text"], row["image"].size, row["image"].getpixel((3, 4))] for row in rows])
print(json.dumps(shown))
"""


def test_load_dataset_with_images(hub, tmp_path):
    import datasets
    from PIL import Image

    images = [make_image(seed).data for seed in (1, 2)]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = {"text": ["a", "b"], "image": [{"bytes": image, "path": None} for image in images]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/train-*.parquet\n---\n"
    )
    changes = {"README.md": File(card.encode()), "other.parquet": File(b"not parquet", lfs=True)}
    changes["small/train-0.parquet"] = File((tmp_path / "x.parquet").read_bytes(), lfs=True)
    hub.create("dataset", "org/name").commit("data", changes)
    plain, streamed = client(hub, LOAD)
    assert plain == streamed
    assert [row[0] for row in plain] == ["a", "b"]
    assert [row[1:] for row in plain] == [
        [[56, 56], list(Image.open(io.BytesIO(image)).getpixel((3, 4)))] for image in images
    ]


MULTIPART = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="a.safetensors", repo_id="org/name")
print(len(open(api.hf_hub_download("org/name", "a.safetensors"), "rb").read()))
"""


def test_multipart_upload(hub, tmp_path):
    content = os.urandom(2500)
    (tmp_path / "a").write_bytes(content)
    hub.create("model", "org/name")
    hub.multipart_over = 1000
    assert client(hub, MULTIPART, tmp_path / "a") == 2500
    assert hub.repo("model", "org/name").at().files["a.safetensors"] == File(content, lfs=True)
    parts = [request.headers["content-length"] for request in hub.requests if request.method == "PUT"]
    assert parts == ["1000", "1000", "500"]


@pytest.fixture
def repo(hub):
    return hub.create("model", "org/name")


def test_ranges(hub, repo):
    repo.commit("file", {"ä.bin": File(b"0123456789", lfs=True)})
    url = "/org/name/resolve/main/%C3%A4.bin"
    for asked, expected in {
        "bytes=2-4": (206, b"234"),
        "bytes=7-": (206, b"789"),
        "bytes=-2": (206, b"89"),
        "bytes=8-99": (206, b"89"),
        "bytes=10-": (416, b""),
    }.items():
        assert send(hub, "GET", url, Range=asked) == expected
    assert send(hub, "GET", url) == (200, b"0123456789")
    assert send(hub, "HEAD", url) == (200, b"")


def test_who_may_read_what_is_private(hub):
    hub.create("model", "org/private", private=True)
    hub.create("model", "foreign/private", private=True)
    statuses = [
        send(hub, "GET", f"/api/models/{name}", Authorization=token)[0]
        for name in ("org/private", "foreign/private", "org/absent")
        for token in (f"Bearer {hub.WRITE}", f"Bearer {hub.READ}", "")
    ]
    assert statuses == [200, 200, 401, 404, 404, 401, 404, 404, 401]


def test_an_object_that_is_not_its_hash_is_refused(hub, repo):
    assert put(hub, b"cut of", claimed=b"cut off") == (200, 422)
    assert not repo.objects
    assert put(hub, b"whole") == (200, 200)
    assert list(repo.objects.values()) == [b"whole"]


def test_command():
    command = [sys.executable, "-m", "tests.hub.server", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:")
