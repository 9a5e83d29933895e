"""What is uploaded, file by file, and the proof that nothing private is among it."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq
from huggingface_hub import get_token
from PIL import Image

from spark_vl.hub.client import RepoType, find_token

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

_LARGE = (".safetensors", ".parquet")
"""They are not held in memory. Of a parquet file only what is not in its rows is looked through here."""
_MAX_HEADER = 100_000_000
"""Bytes; that of safetensors itself."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Their words may look like paths."""

# Without a boundary on the left: a token may follow any character, such as the n of an escaped line break.
_TOKENS = {
    what: re.compile(pattern)
    for what, pattern in {
        "a token of the Hub": r"hf_(?:[a-z]{1,20}_){0,3}[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[\w.-]{20,}"
        r"|api_org_[A-Za-z0-9]{30,}",
        "an API key (sk-…)": r"sk-(?:proj|svcacct|admin|ant|or|lf)-[\w-]{20,}|(?<![A-Za-z0-9])sk-[A-Za-z0-9]{32,}",
        "an access key of AWS": r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Z0-9])"
        r"|(?i:aws_?secret_?(?:access_?)?key)\W{1,8}[A-Za-z0-9/+]{40}",
        "a key of Weights & Biases": r"wandb_v1_\w{40,}|(?i:key|token|secret|password)\W{1,8}[0-9a-f]{40}(?![0-9a-f])",
        "a token of GitHub": r"gh[opusr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}",
        "a token of GitLab": r"glpat-[\w-]{20,}",
        "a key of Google": r"AIza[\w-]{35}",
        "a token of Slack": r"xox[abeoprs]-[A-Za-z0-9-]{20,}",
        "a private key": r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----",
    }.items()
}
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL", re.IGNORECASE)

_ESCAPE = re.compile(
    r"\\(?:u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|U([0-9A-Fa-f]{8})|x([0-9A-Fa-f]{2})|(?P<fold>\r?\n[ \t]*)"
    r"|(?P<character>.))|%([0-9A-Fa-f]{2})|(?P<entity>&#?\w{1,32};)"
)
"""As JSON, YAML, Markdown, URLs and HTML write a character; a line that YAML folds goes on without its break."""
_CONTROLS = dict(zip("abefnrtv0", "\a\b\x1b\f\n\r\t\v\0", strict=True))
_DECODED = 8


class ReleaseError(ValueError):
    """A file must not, or cannot, be uploaded; the message names it."""


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release."""

    path: str
    """In the repository."""
    file: Path
    size: int
    """Bytes."""
    sha256: str
    """Of the bytes that were looked through."""
    content: bytes | None
    """Those bytes; None where they are many: `file` holds them."""


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
        return next(file.content.decode() for file in self.files if file.path == "README.md" and file.content)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)


class Secrets:
    """What no release may contain: tokens of the Hub and of other services, what this process's environment variables
    hold (16 characters or more) whose names speak of a token, key, password or secret, and paths of this machine.

    A text is searched as it stands and with its escapes decoded (of JSON, YAML, URLs and HTML; also those of texts in
    texts, `_DECODED` times over).

    Args:
        folders: of this machine.
        token_from: what the upload's own token is read from (`find_token`).
    """

    def __init__(self, folders: Iterable[Path], token_from: str | None = None) -> None:
        values = {
            value: f"the value of the environment variable {name}"
            for name, value in os.environ.items()
            if _SECRET_NAME.search(name)
        }
        if token := find_token(token_from).value if token_from else get_token():
            values[token] = "a token of the Hub"
        # A value may itself hold what looks like an escape, and is then decoded with the text around it.
        self._values = {view: what for value, what in values.items() for view in _views(value) if len(view) >= 16}
        places = {str(place): None for folder in folders for place in (folder.absolute(), folder.resolve())}
        self._folders = [
            # Not "path/" of ".../mypath/", nor "path" of "path-2".
            (where, re.compile(r"(?<![A-Za-z0-9.])/+" + "/+".join(map(re.escape, parts)) + r"(?![\w-]|\.\w)"))
            for where in places
            if (parts := Path(where).parts[1:])
        ]

    def token_in(self, text: str) -> str | None:
        """Why `text` must not be published. None: it contains no token."""
        for view in _views(text):
            found = next((what for value, what in self._values.items() if value in view), None)
            found = found or next((what for what, pattern in _TOKENS.items() if pattern.search(view)), None)
            if found:
                return f"{found}; remove it, and revoke it if others may have seen it"
        return None

    def path_in(self, text: str) -> str | None:
        """As `token_in`, of paths."""
        for view in _views(text):
            for where, pattern in self._folders:
                if pattern.search(view):
                    return f"{where!r}, a path of this machine"
        return None


def _views(text: str) -> Iterator[str]:
    """`text`, then with its escapes decoded once, twice, …, while that changes anything."""
    yield text
    for _ in range(_DECODED):
        decoded = _ESCAPE.sub(_decoded, text)
        if decoded == text:
            return
        yield (text := decoded)


def _decoded(escape: re.Match[str]) -> str:
    if escape["entity"]:
        return html.unescape(escape["entity"])
    if escape["character"]:
        return _CONTROLS.get(escape["character"], escape["character"])
    if escape["fold"]:
        return ""
    number = int(next(filter(None, escape.groups())), 16)
    return chr(number) if number <= sys.maxunicode else ""


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
        ReleaseError: a file is no regular one or not what its name says, or it, its name or the title holds one of
            `secrets`. Texts are UTF-8.
    """
    chosen = {path: file for path, file in files.items() if _is_of_kind(path, KINDS_OF_FILES[repo_type])}
    if found := secrets.token_in(title) or secrets.path_in(title):
        raise ReleaseError(f"{title!r}: would be the message of the commit and holds {found}")
    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter's lock to others
        read = list(threads.map(lambda path: _read(path, chosen[path], secrets), sorted(chosen)))
    return Release(repo_type, title, read, sorted(files.keys() - chosen.keys()), replaces)


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


def _read(path: str, file: Path, secrets: Secrets) -> ReleaseFile:
    """Look through a file, and hash the very bytes that were looked through.

    Raises:
        ReleaseError: see `make_release`.
    """
    try:
        # A pipe would be waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a symbolic link; only regular files are uploaded" if file.is_symlink() else str(error)
        raise ReleaseError(f"{file}: {what}") from error
    with open(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ReleaseError(f"{file}: is not a regular file; only regular files are uploaded")
        begin = _header(opened) if file.suffix == ".safetensors" else opened.read()
        digest = hashlib.sha256(begin)
        while block := opened.read(2**20):
            digest.update(block)
        size = opened.tell()
    try:
        text = _text_of(file, begin)
    except Exception as error:  # neither pyarrow nor Pillow has a common class for what damaged files cause
        raise ReleaseError(f"{file}: would be uploaded as {path} and cannot be read: {error}") from error
    for where in (path, text):
        if found := secrets.token_in(where) or (file.name not in _VOCABULARIES and secrets.path_in(where)):
            raise ReleaseError(f"{file}: would be uploaded as {path} and holds {found}")
    return ReleaseFile(path, file, size, digest.hexdigest(), None if file.suffix in _LARGE else begin)


def _header(file: IO[bytes]) -> bytes:
    """The length of a safetensors file's header and the header; what follows are numbers."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def _text_of(file: Path, content: bytes) -> str:
    """The words in a file that others can read.

    Raises:
        Exception: it is not what its name says.
    """
    match file.suffix:
        case ".safetensors":
            return content[8:].decode()
        case ".parquet":
            with pq.ParquetFile(io.BytesIO(content)) as table:
                schema = table.schema_arrow
                noted = [table.metadata.metadata, schema.metadata, *(field.metadata for field in schema)]
                words = [word for facts in noted for item in (facts or {}).items() for word in item]
                return b"\n".join(words).decode(errors="replace")
        case ".png":
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                image.load()  # some texts come after the pixels
                return "\n".join([content.decode("latin-1"), *map(str, image.info.values())])
        case _:
            return content.decode()


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def below(folder: Path, name: str) -> Path:
    """The file `name` in `folder`, to be written.

    Raises:
        ReleaseError: it would lie outside.
    """
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ReleaseError(f"{name!r}: would be written outside of {folder}")
    return file
