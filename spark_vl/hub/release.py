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

_TEXT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".jinja", ".py")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Their words may look like paths."""
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


class ReleaseError(ValueError):
    """Something that must not, or cannot, be uploaded; the message names the file."""


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
    left_out: Sequence[str] = ()
    """Files that lie beside them and are of no kind that is uploaded."""
    replaces: Sequence[str] = ()
    """Patterns of files that a release owns: those in the repository that it does not hold any more are deleted."""

    @property
    def card(self) -> str:
        """The text of its README.md."""
        return next(file.file for file in self.files if file.path == "README.md").read_text(encoding="utf-8")

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def make_release(
    repo_type: RepoType,
    title: str,
    folders: Iterable[Path],
    *,
    private: Iterable[Path],
    replaces: Sequence[str] = (),
) -> Release:
    """The files of `folders` that may be uploaded, a later folder's before an earlier one's of the same name.

    Args:
        private: folders of this machine, whose paths no text may hold.

    Raises:
        ReleaseError: a file is a symbolic link, or holds a token or the path of a folder of `private`.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        found |= {str(file.relative_to(folder)): file for file in _files(folder)}
    chosen = {path: file for path, file in found.items() if is_of_kind(path, KINDS_OF_FILES[repo_type])}
    token = get_token()
    for path, file in chosen.items():
        if file.is_symlink():
            raise ReleaseError(f"{file}: is a symbolic link; only files that lie there themselves are uploaded")
        _check_text(path, file, private, token)
    return Release(repo_type, title, _manifest(chosen), sorted(found.keys() - chosen.keys()), replaces)


def is_of_kind(path: str, patterns: Iterable[str]) -> bool:
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


def _check_text(path: str, file: Path, private: Iterable[Path], token: str | None) -> None:
    """Raises:
    ReleaseError: see `make_release`.
    """
    if file.suffix not in _TEXT:
        return
    text = file.read_bytes()
    if _TOKEN.search(text) or (token and token.encode() in text):
        raise ReleaseError(f"{file}: holds a token of the Hub; remove it, and revoke it if others may have seen it")
    if file.name in _VOCABULARIES:
        return
    for folder in private:
        where = str(folder.absolute())
        if folder.parent != folder and re.search(rb"(?<![\w.])" + re.escape(where).encode() + rb"(?![\w.-])", text):
            raise ReleaseError(f"{file}: holds {where!r}, a path of this machine, and would be uploaded as {path}")
