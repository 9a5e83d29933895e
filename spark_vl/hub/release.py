"""What is uploaded, file by file, and the proof that nothing private is among it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import get_token

from spark_vl.hub.client import RepoType

KINDS_OF_FILES: Mapping[RepoType, Sequence[str]] = {
    "model": (
        *("README.md", "LICENSE*", "*.safetensors", "*.json", "*.jsonl", "*.jinja", "*.png"),
        *("merges.txt", "vocab.txt", ".eval_results/*.yaml"),
    ),
    "dataset": ("README.md", "*/*.parquet"),
    "space": ("README.md", "requirements.txt", "space.json", "*.py", "*.yaml"),
}
"""The only files that are uploaded. Pickles (*.bin, *.pt, *.pth, *.pkl), and with them optimizer state and
`training_args.bin`, which holds the author's token, are in none of them."""

_BINARY = (".safetensors", ".parquet", ".png")
"""All others are texts. Images are proven to be pixels, and texts in parquet are looked through row by row."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Their words may look like paths."""
_TOKEN = rb"\bhf_[A-Za-z0-9]{30,}"


class ReleaseError(ValueError):
    """A file must not, or cannot, be uploaded; the message names it."""


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release."""

    path: str
    """In the repository."""
    file: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Release:
    """What goes to one repository."""

    repo_type: RepoType
    title: str
    """First line of the commit's message."""
    files: Sequence[ReleaseFile]
    """Sorted by path."""
    left_out: Sequence[str]
    """Files beside them that are not among `KINDS_OF_FILES`."""
    replaces: re.Pattern[str]
    """Whole paths that are files of releases: those in the repository that this one does not hold are deleted."""

    @property
    def card(self) -> str:
        """The text of its README.md."""
        return next(file.file for file in self.files if file.path == "README.md").read_text(encoding="utf-8")

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


class Secrets:
    """What no release may contain: tokens of the Hub, and paths of this machine.

    Args:
        folders: of this machine.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        tokens = [_TOKEN, *([re.escape(token.encode())] if (token := get_token()) else [])]
        self._token = re.compile(b"|".join(tokens))
        self._folders = [
            (where, re.compile(rb"(?<![\w.])" + re.escape(where).encode() + rb"(?![\w.-])"))
            for where, folder in ((str(folder.absolute()), folder) for folder in folders)
            if folder.parent != folder
        ]

    def token_in(self, text: bytes) -> str | None:
        """Why `text` must not be published. None: it contains no token."""
        found = self._token.search(text)
        return "a token of the Hub; remove it, and revoke it if others may have seen it" if found else None

    def path_in(self, text: bytes) -> str | None:
        """As `token_in`, of paths."""
        return next((f"{where!r}, a path of this machine" for where, it in self._folders if it.search(text)), None)


def make_release(
    repo_type: RepoType,
    title: str,
    files: Mapping[str, Path],
    *,
    secrets: Secrets,
    replaces: re.Pattern[str],
) -> Release:
    """Those of `files` (path in the repository → file) that may be uploaded.

    Raises:
        ReleaseError: a file is a symbolic link, or a text holds one of `secrets`.
    """
    chosen = {path: file for path, file in files.items() if _is_of_kind(path, KINDS_OF_FILES[repo_type])}
    for path, file in chosen.items():
        if file.is_symlink():
            raise ReleaseError(f"{file}: is a symbolic link; only regular files are uploaded")
        if file.suffix in _BINARY:
            continue
        text = file.read_bytes()
        if found := secrets.token_in(text) or (file.name not in _VOCABULARIES and secrets.path_in(text)):
            raise ReleaseError(f"{file}: would be uploaded as {path} and holds {found}")
    return Release(repo_type, title, _manifest(chosen), sorted(files.keys() - chosen.keys()), replaces)


def files_of(*folders: Path) -> dict[str, Path]:
    """All files below `folders`, by their paths in there; where two have
    the same path, that of the later folder counts."""
    return {str(file.relative_to(folder)): file for folder in folders for file in _files(folder)}


def _is_of_kind(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path`, or its last part, matches one of `patterns`."""
    return any(fnmatchcase(path if "/" in pattern else path.rpartition("/")[2], pattern) for pattern in patterns)


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`; links are named, not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _manifest(files: Mapping[str, Path]) -> list[ReleaseFile]:
    def entry(item: tuple[str, Path]) -> ReleaseFile:
        path, file = item
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return ReleaseFile(path, file, file.stat().st_size, digest)

    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter's lock to others
        return list(threads.map(entry, sorted(files.items())))
