"""One release → one commit, or none if the repository holds it already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from rich.console import Console

from spark_vl import __version__
from spark_vl.hub.client import Hub, HubError, Info, check_repo_name, find_token
from spark_vl.hub.release import Release, ReleaseFile, digest_of
from spark_vl.records import visible

_RACES = 3
"""How often a commit is tried, when another one comes before it."""

_PATHS_AT_ONCE = 500


@dataclass(frozen=True)
class Published:
    """The result of publishing."""

    url: str
    """Of the repository."""
    commit: str
    """In which the release is whole."""
    changed: bool
    """Whether that commit is new."""
    deleted: tuple[str, ...]
    """Files of earlier releases that it does not hold any more."""


def upload(
    release: Release, *, repo: str, revision: str | None = None, public: bool = False, token_from: str | None = None
) -> Published:
    """Make the repository hold `release`, in one commit, and check what it then holds.

    It can be killed at any moment and called again: files that the Hub has are not sent twice, and if nothing is left
    to change, no commit is made.

    Args:
        repo: `ORG/NAME`; made if it is not there.
        revision: branch; made if it is not there. None: main.
        public: whether everybody can see a repository that is made. An existing one must already be as this says.
        token_from: see `find_token`.

    Raises:
        HubError: what failed, and what to do.
    """
    check_repo_name(repo)
    hub = Hub(find_token(token_from), repo, release.repo_type)
    _open(hub, revision, public)
    for _ in range(_RACES):
        head = hub.info(revision)
        if head is None or head.sha is None:
            raise HubError(f"{repo} has disappeared, or the token may no longer see it; publish again")
        stale = _stale(release, head)
        commit = hub.call(f"uploading to {repo}", _commit, hub, release, revision, head.sha, stale)
        if commit is not None:
            _verify(hub, commit.oid, release.files)
            url = f"{hub.api.endpoint}/{'' if hub.repo_type == 'model' else f'{hub.repo_type}s/'}{repo}"
            return Published(url, commit.oid, commit.oid != head.sha, stale)
    raise HubError(f"{repo}: other commits came first {_RACES} times; publish again")


def print_release(release: Release, console: Console, *, whole: bool) -> None:
    """Print how much will be uploaded; if `whole`, each file with its size and SHA-256, and the card."""
    if whole:
        for file in release.files:
            console.print(f"{file.sha256}  {file.size:>14,}  {visible(file.path)}", soft_wrap=True, markup=False)
    console.print(f"{len(release.files)} files, {release.bytes:,} bytes", soft_wrap=True)
    if release.left_out:
        console.print(visible(f"left out: {', '.join(release.left_out)}"), soft_wrap=True, markup=False)
    if whole:
        console.print(visible(f"\n{release.card}"), soft_wrap=True, markup=False)


def _open(hub: Hub, revision: str | None, public: bool) -> None:
    """Make the repository and the branch, where they are not there."""
    info = hub.info()
    if info is None:
        hub.call(
            f"creating {hub.repo}",
            hub.api.create_repo,
            hub.repo,
            repo_type=hub.repo_type,
            private=not public,
            exist_ok=True,  # made by an attempt whose answer was lost, or by somebody else in the meantime
            space_sdk="gradio" if hub.repo_type == "space" else None,
        )
        info = hub.info()
        if info is None:
            raise HubError(f"{hub.repo} was created but cannot be seen; the token also needs the scope 'read'")
    if info.private == public:
        found, wanted = ("private", "public") if public else ("public", "private (the default; --public allows it)")
        raise HubError(
            f"{hub.repo} exists and is {found}, but {wanted} was asked for; nothing was uploaded. Change who can "
            "see it in its settings on the Hub, because that shows or hides everything in it"
        )
    if revision is not None:
        hub.call(
            f"creating branch {revision}",
            hub.api.create_branch,
            hub.repo,
            repo_type=hub.repo_type,
            branch=revision,
            exist_ok=True,
        )


def _stale(release: Release, head: Info) -> tuple[str, ...]:
    """The files of earlier releases at `head` that `release` does not hold."""
    paths = {file.path for file in release.files}
    there = (sibling.rfilename for sibling in head.siblings or ())
    return tuple(path for path in there if path not in paths and release.replaces.fullmatch(path))


def _commit(hub: Hub, release: Release, revision: str | None, parent: str, stale: Sequence[str]) -> CommitInfo | None:
    """Upload what is not there, and commit on top of `parent`. None: somebody else's commit came first."""
    added = []
    for file in release.files:
        added.append(CommitOperationAdd(file.path, file.file if file.content is None else file.content))
        if added[-1].upload_info.sha256.hex() != file.sha256:
            raise HubError(f"{file.file}: has changed since it was looked through; publish again")
    try:
        # Not `upload_folder`, which may make several commits of one release.
        return hub.api.create_commit(
            hub.repo,
            [*added, *(CommitOperationDelete(path) for path in stale)],
            repo_type=hub.repo_type,
            revision=revision,
            commit_message=release.title,
            commit_description=f"Published by spark-vl {__version__}.",
            parent_commit=parent,
        )
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            return None
        raise


def _verify(hub: Hub, commit: str, files: Sequence[ReleaseFile]) -> None:
    """Compare the hashes of what the Hub stored with those of what was meant. A large file is hashed once more: the
    Hub may know only the hash that it was told before the file was sent.

    Raises:
        HubError: a file is missing or another one, or it changed while it was sent.
    """
    for file in files:
        if file.content is None and digest_of(file.file) != file.sha256:
            raise HubError(
                f"{file.file}: changed while it was uploaded, and what {hub.repo} now holds at commit {commit} was not "
                "looked through; delete that commit, and publish again"
            )
    there: dict[str, RepoFile] = {}
    for start in range(0, len(files), _PATHS_AT_ONCE):
        paths = [file.path for file in files[start : start + _PATHS_AT_ONCE]]
        place = {"repo_type": hub.repo_type, "revision": commit}
        found = hub.call(f"checking {hub.repo}", hub.api.get_paths_info, hub.repo, paths, **place)
        there |= {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
    wrong = [file.path for file in files if file.path not in there or not _same(there[file.path], file)]
    if wrong:
        raise HubError(
            f"{hub.repo}: {len(wrong)} of {len(files)} files do not have the hash of what was sent "
            f"({', '.join(wrong[:5])}): damaged on the way; publish again"
        )


def _same(there: RepoFile, file: ReleaseFile) -> bool:
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.file.read_bytes() if file.content is None else file.content
    return there.blob_id == hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
