"""A Hugging Face Hub on the loopback, for tests: the real clients talk to it, and it misbehaves on demand.

It keeps everything in memory and speaks what huggingface_hub calls with HF_ENDPOINT and HF_HUB_DISABLE_XET=1 in its
environment. Both are read when huggingface_hub is imported, so a client is a subprocess with `HubServer.environment`.
`python -m tests.hub.server --port 8000` serves until interrupted.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg")
LFS_OVER = 10 * 2**20
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
Json = dict[str, Any]
How = Literal["status", "cut", "hang up", "cut_response", "slow", "corrupt", "race", "pause"]


@dataclass(frozen=True)
class File:
    """A file of a commit. `content` is what was stored: the hashes are of that, not of what was sent."""

    content: bytes
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob(self) -> bytes:
        """What git holds: the content, or the pointer to an LFS object."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return pointer.encode() if self.lfs else self.content

    @cached_property
    def git_oid(self) -> str:
        """The SHA-1 of the git blob (of the pointer where it is an LFS object)."""
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares to skip a file: the SHA-256 of an LFS object, else the git blob's SHA-1."""
        return self.sha256 if self.lfs else self.git_oid

    def describe_lfs(self, key: str) -> Json:
        """The entry "lfs" of listings, which call the SHA-256 `key`; none for a regular file."""
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": len(self.blob)}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """`files` are all the files of the repository at this commit; `parent` is None for the first."""

    oid: str
    parent: str | None
    summary: str
    description: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository. `commits` are in order of arrival on all branches; `refs` maps branches and `tags` to oids."""

    kind: str
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects that passed verify, by the client's oid
    pending: dict[str, bytes] = field(default_factory=dict)  # PUT, but not verified
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)  # oids in `pending` and `parts` that verify must let pass

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or an oid (7 digits or more). KeyError where there is none."""
        oid = self.refs.get(revision, revision)
        for commit in self.commits:
            if len(oid) >= 7 and commit.oid.startswith(oid):
                return commit
        raise KeyError(revision)

    def commit(self, summary: str, changes: dict[str, File | None], branch: str = "main", text: str = "") -> Commit:
        """Add `changes` to the branch, or to an empty repository; None removes a file. `text`: the description."""
        parent = self.at(branch) if self.commits else None
        files = (parent.files if parent else {}) | changes
        kept = {path: file for path, file in sorted(files.items()) if file is not None}
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        hashed = (self.kind, self.id, len(self.commits), summary, [(path, file.git_oid) for path, file in kept.items()])
        oid = hashlib.sha1(repr(hashed).encode()).hexdigest()
        self.commits.append(Commit(oid, parent.oid if parent else None, summary, text, date, kept))
        self.refs[branch] = oid
        return self.commits[-1]


@dataclass
class Request:
    """A request that came. `path` has the query, `headers` lower-case names; `status` 0: no whole answer yet."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0


@dataclass
class Rule:
    """What to do to the requests it is for (`HubServer.misbehave`). `reached` is set when the first has come."""

    method: str
    path: re.Pattern[str]
    times: int | None
    how: How
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | str | Json | None = None
    seconds: float = 1.0
    path_in_repo: str = "race.txt"
    content: bytes = b"raced\n"
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    drop: bool = False

    def release(self, drop: bool = False) -> None:
        """Let a paused request be served as if nothing were; with `drop`, reset its connection and do nothing."""
        self.drop = self.drop if self.released.is_set() else drop
        self.released.set()


@dataclass
class Call:
    """A request with its body and the groups of its route, for the functions that answer."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    how: How | None
    groups: dict[str, str] = field(default_factory=dict)

    def json(self) -> Json:
        return json.loads(self.body)


@dataclass(eq=False)
class Answer(Exception):
    """Returned, or raised where it is found deep down. A `body` that is not bytes is sent as JSON."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, code: str | None = None, **more: str) -> Answer:
    """An error as the Hub words it: in the body, and in the headers that the client reads first."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message} | more, headers)


def flip(content: bytes) -> bytes:
    """`content` with one bit of its middle byte changed."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are no text; they may end within a character."""
    try:
        return "\0" in codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True


def front_matter(text: str) -> Any:
    """The metadata of a card, None where it has none. yaml.YAMLError where it cannot be read."""
    block = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, flags=re.DOTALL | re.MULTILINE)
    return yaml.safe_load(block[1]) if block else None


Handler = Callable[["HubServer", Call], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
API = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"
STORE = r"/lfs/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
AT = r"/(?P<revision>[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Handler], Handler]:
    """Answer the requests whose whole path (without query) matches; `Call.groups` has the named groups, unquoted."""

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split("|"))
        return handler

    return register


class HubServer:
    """The Hub. A context manager: it serves inside the `with`, and a bug of its own is raised at the end."""

    WRITE = "hf_" + "w" * 34
    READ = "hf_" + "r" * 34
    NAMESPACES = ("tester", "org")

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.multipart_over: int | None = None  # bytes; also the size of a part
        self.failures: list[Exception] = []
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._rules: list[Rule] = []
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = _Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopping.set()
        self.behave()
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()
        if self.failures and kind is None:
            raise self.failures[0]

    def environment(self, token: str | None = WRITE, **more: str) -> dict[str, str]:
        """The environment of a client: this one without settings of Hugging Face or proxies, and a fresh HF_HOME."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|(http|https|all|no)_proxy$", flags=re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": tempfile.mkdtemp(dir=self._folder.name)}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return kept | ({"HF_TOKEN": token} if token else {}) | more

    def create(self, kind: str, name: str, private: bool = False) -> Repo:
        """Make a repository (in any namespace) with the first commit that the Hub makes."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        lines = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES]
        repo.commit("initial commit", {".gitattributes": File("".join(lines).encode())})
        return repo

    def repo(self, kind: str, name: str) -> Repo:
        """The repository. KeyError where there is none."""
        return self.repos[kind, name]

    def misbehave(self, method: str, path: str, times: int | None = 1, how: How = "status", **how_exactly: Any) -> Rule:
        """Spoil the next `times` requests (None: all) of `method` in whose quoted path and query `path` is found.

        status: answer `status` with `headers` and `body` (dict: JSON; text: {"error": text}; bytes: as they are).
        cut, hang up: read half of the body, then reset the connection. Nothing is stored.
        cut_response: do the right thing, then close after half of the answer's body (an empty one: before it).
        slow: do the right thing after `seconds`.
        corrupt: store the object, part or first regular file of the commit with a byte flipped, and say nothing.
        race: first let a commit with `path_in_repo` = `content` land on the same branch.
        """
        rule = Rule(method, re.compile(path), times, how, **how_exactly)
        with self.lock:
            self._rules.append(rule)
        return rule

    def pause(self, method: str, path: str) -> Rule:
        """Hold up the next such request, before its body is read, until `release`; it has come when `reached`."""
        return self.misbehave(method, path, how="pause")

    def behave(self) -> None:
        """Drop all rules; what is held up is dropped too."""
        with self.lock:
            for rule in self._rules:
                rule.release(drop=True)
            self._rules.clear()

    def rule_for(self, method: str, path: str) -> Rule | None:
        """The first rule that is not used up, and one use of it."""
        with self.lock:
            for rule in self._rules:
                if rule.times != 0 and rule.method == method and rule.path.search(path):
                    rule.times = rule.times and rule.times - 1
                    rule.reached.set()
                    return rule
        return None

    def answer(self, call: Call, rule: Rule | None) -> Answer:
        """Do what was asked, one request at a time."""
        if rule and rule.how == "status":
            body = HTTPStatus(rule.status).phrase if rule.body is None else rule.body
            return Answer(rule.status, {"error": body} if isinstance(body, str) else body, rule.headers)
        for method, pattern, handler in ROUTES:
            if method == call.method and (match := pattern.fullmatch(call.path)):
                call.groups = {name: unquote(value) for name, value in match.groupdict("").items()}
                with self.lock:
                    try:
                        if rule and rule.how == "race":
                            raced = {rule.path_in_repo: File(rule.content)}
                            self._open(call).commit("raced", raced, call.groups.get("revision") or "main")
                        return handler(self, call)
                    except Answer as refused:
                        return refused
        return refusal(404, "Sorry, we can't find the page you are looking for.")

    def _token(self, call: Call, needed: bool = False) -> str | None:
        token = call.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", self.WRITE, self.READ):
            raise refusal(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise refusal(401, "Invalid username or password.")
        return token or None

    def _open(self, call: Call, write: bool = False) -> Repo:
        """The repository of the path, if the token may see it, or write to it."""
        repo, token = self.repos.get((call.groups["kind"] or "model", call.groups["id"])), self._token(call)
        owned = call.groups["id"].split("/")[0] in self.NAMESPACES
        if repo is None or (repo.private and not (token and owned)):
            # With the code: the client takes a bare 401 for a missing repository only from https:// URLs.
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise refusal(status, message, "RepoNotFound")
        if write and not (self._token(call, needed=True) == self.WRITE and owned):
            raise refusal(403, "you must use a write token to upload to a repository.")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.at(revision)
        except KeyError:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        role = "write" if self._token(call, needed=True) == self.WRITE else "read"
        me: Json = {"type": "user", "id": "1", "name": "tester", "fullname": "T. Ester"}
        me["orgs"] = [{"type": "org", "id": "2", "name": "org", "fullname": "Org", "roleInOrg": "write"}]
        me["auth"] = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        return Answer(200, me)

    @route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        wanted = call.json()
        kind, namespace = wanted.get("type") or "model", wanted.get("organization") or "tester"
        if self._token(call, needed=True) != self.WRITE or namespace not in self.NAMESPACES:
            raise refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        url = f"{self.url}/{PREFIXES[kind]}{name}"
        if (kind, name) in self.repos:
            raise refusal(409, f"You already created this {kind} repo", url=url)
        self.create(kind, name, wanted.get("visibility") == "private")
        return Answer(200, {"url": url, "name": name, "id": name})

    @route("GET", API + f"(?:/revision{AT})?")
    def _info(self, call: Call) -> Answer:
        repo = self._open(call)
        commit = self._at(repo, call.groups["revision"] or "main")
        siblings: list[Json] = [{"rfilename": path} for path in commit.files]
        if "blobs" in call.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.git_oid} | file.describe_lfs("sha256")
        data = front_matter(commit.files.get("README.md", File(b"")).content.decode()) or {}
        info = {"author": repo.id.split("/")[0], "sha": commit.oid, "private": repo.private, "gated": False}
        info |= {"createdAt": repo.commits[0].date, "lastModified": commit.date, "disabled": False, "downloads": 0}
        info |= {"likes": 0, "tags": data.get("tags", []), "cardData": data, "siblings": siblings}
        chosen = call.query.get("expand", info)
        return Answer(200, {"id": repo.id} | {key: value for key, value in info.items() if key in chosen})

    @route("GET", API + "/refs")
    def _refs(self, call: Call) -> Answer:
        repo = self._open(call)
        lists: dict[str, list[Json]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, oid in repo.refs.items():
            where, prefix = ("tags", "refs/tags/") if name in repo.tags else ("branches", "refs/heads/")
            lists[where].append({"name": name, "ref": prefix + name, "targetCommit": oid})
        return Answer(200, lists)

    @route("POST", API + f"/(?P<what>tag|branch){AT}")
    def _new_ref(self, call: Call) -> Answer:
        repo, wanted, revision = self._open(call, write=True), call.json(), call.groups["revision"]
        is_tag = call.groups["what"] == "tag"
        name, target = (wanted["tag"], revision) if is_tag else (revision, wanted.get("startingPoint", "main"))
        if name in repo.refs:
            raise refusal(409, f"Reference {name} exists already")
        repo.refs[name] = self._at(repo, target).oid
        repo.tags |= {name} if is_tag else set()
        return Answer(200, {})

    def _entries(self, commit: Commit, paths: Iterable[str]) -> list[Json]:
        """Files and folders as the tree lists them; paths that are neither are left out."""
        entries: list[Json] = []
        for path in paths:
            inside = [(name, file.git_oid) for name, file in commit.files.items() if name.startswith(path + "/")]
            if path in commit.files:
                file = commit.files[path]
                entry = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
                entries.append(entry | file.describe_lfs("oid"))
            elif inside:
                oid = hashlib.sha1(repr(inside).encode()).hexdigest()
                entries.append({"type": "directory", "path": path, "size": 0, "oid": oid})
        return entries

    @route("GET", API + f"/tree{AT}(?:/(?P<folder>.+))?")
    def _tree(self, call: Call) -> Answer:
        commit, folder = self._at(self._open(call), call.groups["revision"]), call.groups["folder"]
        prefix = folder.rstrip("/") + "/" if folder else ""
        inside = [path.removeprefix(prefix).split("/") for path in commit.files if path.startswith(prefix)]
        if prefix and not inside:
            raise refusal(404, f"{folder} does not exist", "EntryNotFound")
        deep = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        paths = {prefix + "/".join(parts[:n]) for parts in inside for n in range(1, len(parts) + 1 if deep else 2)}
        return Answer(200, self._entries(commit, sorted(paths)))

    @route("POST", API + f"/paths-info{AT}")
    def _paths_info(self, call: Call) -> Answer:
        commit = self._at(self._open(call), call.groups["revision"])
        paths = parse_qs(call.body.decode()).get("paths", [])
        return Answer(200, self._entries(commit, (path.rstrip("/") for path in paths)))

    @route("GET|HEAD", WEB + f"/resolve{AT}/(?P<path>.+)")
    def _resolve(self, call: Call) -> Answer:
        commit = self._at(self._open(call), call.groups["revision"])
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        file = commit.files.get(call.groups["path"])
        if file is None:
            missing = refusal(404, "Entry not found", "EntryNotFound")
            raise Answer(404, missing.body, headers | missing.headers)
        headers["ETag"] = f'"{file.etag}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
        if not asked or asked.groups() == ("", ""):
            return Answer(200, file.content, headers)
        first = int(asked[1]) if asked[1] else max(0, file.size - int(asked[2]))
        last = min(int(asked[2]), file.size - 1) if asked[1] and asked[2] else file.size - 1
        if first > last:
            raise Answer(416, b"", headers | {"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        return Answer(206, file.content[first : last + 1], headers)

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        error = None
        try:
            data = front_matter(call.json()["content"])
            if data is not None and not isinstance(data, dict):
                error = '"metadata" must be of type object'
        except yaml.YAMLError as broken:
            error = str(broken)
        if error:
            return Answer(400, {"errors": [{"message": error}], "warnings": []})
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer(200, {"errors": [], "warnings": warnings})

    @route("POST", API + f"/preupload{AT}")
    def _preupload(self, call: Call) -> Answer:
        there, answers = self._at(self._open(call, write=True), call.groups["revision"]).files, []
        for wanted in call.json()["files"]:
            path = wanted["path"]
            big = wanted["size"] > LFS_OVER or is_binary(base64.b64decode(wanted["sample"]))
            mode = "lfs" if big or path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": there[path].etag} if path in there else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return Answer(200, {"files": answers})

    @route("POST", WEB + r"\.git/info/lfs/objects/batch")
    def _batch(self, call: Call) -> Answer:
        repo = self._open(call, write=True)
        objects: list[Json] = []
        transfer = "basic"
        for wanted in call.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if hashlib.sha256(repo.objects.get(oid, b"")).hexdigest() == oid:
                continue  # it is there; one that was corrupted is asked for again
            href = f"{self.url}/lfs/{repo.kind}s/{quote(repo.id)}/{oid}"
            upload: Json = {"href": href}
            if self.multipart_over is not None and size > self.multipart_over:
                transfer = "multipart"
                urls = {f"{n:05d}": f"{href}/{n}" for n in range(1, -(-size // self.multipart_over) + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self.multipart_over)} | urls}
            verify = {"href": f"{self.url}{call.path.removesuffix('batch')}verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return Answer(200, {"transfer": transfer, "objects": objects})

    @route("PUT", STORE + r"(?:/(?P<part>\d+))?")
    def _put(self, call: Call) -> Answer:
        """Without a token, as where the URL itself is signed."""
        repo, oid, content = self._open_store(call), call.groups["oid"], call.body
        if call.how == "corrupt":
            repo.corrupted.add(oid)
            content = flip(content)
        if call.groups["part"]:
            repo.parts.setdefault(oid, {})[int(call.groups["part"])] = content
        else:
            repo.pending[oid] = content
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("POST", STORE + "/complete")
    def _complete(self, call: Call) -> Answer:
        repo, oid = self._open_store(call), call.groups["oid"]
        there, named = repo.parts.get(oid, {}), [part["partNumber"] for part in call.json()["parts"]]
        if named != sorted(there):
            raise refusal(400, f"Parts {named} were named, but {sorted(there)} are there")
        repo.pending[oid] = b"".join(there[number] for number in named)
        return Answer(200, {"success": True})

    def _open_store(self, call: Call) -> Repo:
        try:
            return self.repos[call.groups["kind"], call.groups["id"]]
        except KeyError:  # dropped by a test, while the object was on its way
            raise refusal(404, "Not found") from None

    @route("POST", WEB + r"\.git/info/lfs/objects/verify")
    def _verify(self, call: Call) -> Answer:
        repo, oid = self._open(call, write=True), call.json()["oid"]
        if oid in repo.pending:
            content = repo.pending.pop(oid)
            if oid not in repo.corrupted and hashlib.sha256(content).hexdigest() != oid:
                raise refusal(422, f"The SHA-256 of the uploaded object is not {oid}")
            repo.corrupted.discard(oid)
            repo.parts.pop(oid, None)
            repo.objects[oid] = content
        if oid not in repo.objects:
            raise refusal(404, f"Object {oid} does not exist")
        return Answer(200, {"success": True})

    @route("POST", API + f"/commit{AT}")
    def _commit(self, call: Call) -> Answer:
        repo, branch = self._open(call, write=True), call.groups["revision"]
        head, corrupt = self._at(repo, branch), call.how == "corrupt"
        if "create_pr" in call.query or branch in repo.tags or branch not in repo.refs:
            raise refusal(501, "This Hub commits to branches, not to pull requests, tags or oids.")
        header, *operations = [(line["key"], line["value"]) for line in map(json.loads, call.body.splitlines())]
        if not head.oid.startswith(header[1].get("parentCommit", head.oid)):
            raise refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, File | None] = {}
        for key, value in operations:
            path = value["path"]
            if key == "file":
                content = base64.b64decode(value["content"])
                changes[path] = File(flip(content) if corrupt else content)
                corrupt = False
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise refusal(400, f"An LFS pointer pointed to a file that does not exist: {path}")
                changes[path] = File(repo.objects[value["oid"]], lfs=True)
            else:  # deletedFile, deletedFolder
                gone = [name for name in head.files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes |= dict.fromkeys(gone)
        commit = repo.commit(header[1]["summary"], changes, branch, header[1].get("description", ""))
        url = f"{self.url}/{PREFIXES[repo.kind]}{repo.id}/commit/{commit.oid}"
        return Answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", port), _Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):  # a client may be killed
            self.hub.failures.append(error)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer waits for the acknowledgement of its headers
    server: _Server

    def serve(self) -> None:
        hub, length = self.server.hub, int(self.headers.get("Content-Length", 0))
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        hub.requests.append(request)
        rule = hub.rule_for(self.command, self.path)
        how = rule.how if rule else None
        if rule and how == "pause":
            rule.released.wait()
        if hub.stopping.is_set() or how in ("cut", "hang up") or (rule and rule.drop):
            self.rfile.read(length // 2)
            self.reset()
        if len(body := self.rfile.read(length)) < length:  # the client is gone
            self.reset()
        if rule and how == "slow":
            hub.stopping.wait(rule.seconds)
        parts = urlsplit(self.path)
        call = Call(self.command, parts.path, parse_qs(parts.query), request.headers, body, how)
        try:
            answer = hub.answer(call, rule)
        except Exception as bug:
            hub.failures.append(bug)
            answer = refusal(501, f"A bug of the test server: {bug!r}")  # a status that clients do not try again
        self.send(answer, request, cut=how == "cut_response")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, answer: Answer, request: Request, cut: bool) -> None:
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.close_connection = self.close_connection or cut
        if cut and not content:
            return
        request.status = 0 if cut else answer.status
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "X-Request-Id": f"request-{id(request):x}"} | answer.headers
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def reset(self) -> NoReturn:
        """Close so that the client sees the connection reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()
        raise ConnectionAbortedError

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    with HubServer(parser.parse_args().port) as hub, contextlib.suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN={hub.WRITE}  # or {hub.READ}", flush=True)
        hub.stopping.wait()


if __name__ == "__main__":
    main()
