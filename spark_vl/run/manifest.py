"""The list of a folder's files with their hashes: a folder with one is whole, and damage to it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os.path import isfile  # that of a Path raises where a name is too long
from pathlib import Path
from typing import Any

from spark_vl.run.files import flush

MANIFEST = "manifest.json"


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts`, size and SHA-256 of every file in `folder`, and a SHA-256 of all this; then flush everything."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in _digests(paths)
    }
    manifest = {**facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=1))
    for path in folder.rglob("*"):
        flush(path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None if it has been changed since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    digest = manifest.pop("sha256", None)
    return manifest if digest == _digest_of(manifest) else None


def find_damage(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files that `manifest` lists, and what lies in `folder` that no reader gets to the end of,
    such as a pipe. No path that leads out of `folder` is read."""
    files = manifest["files"]
    inside = [folder / name for name in files if not (Path(name).is_absolute() or ".." in Path(name).parts)]
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in _digests([path for path in inside if isfile(path)])
    }
    missing = [f"{name} is missing" for name in files if name not in found]
    odd = [path for path in sorted(folder.rglob("*")) if not isfile(path) and not path.is_dir()]
    missing += [f"{path.relative_to(folder)} is not a regular file" for path in odd]
    return missing + [f"{name} has changed" for name in files if name in found and files[name] != found[name]]


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _digests(paths: list[Path]) -> Iterable[tuple[Path, str]]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        return zip(paths, list(threads.map(digest, paths)), strict=True)
