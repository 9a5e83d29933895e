"""Memory, cores, disks and limits."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from spark_vl.doctor.finding import GIB, Finding, fault, ok, warning

_SHM = Path("/dev/shm")
_DEMO_GIB = 2
"""What the demo needs: 1.2 GiB measured, and its verifiers."""


def memory() -> Iterator[Finding]:
    """RAM, cores and shared memory."""
    ram = psutil.virtual_memory()
    limit = min(_memory_limit(), ram.total)
    found = f"{ram.available / GIB:.1f} of {ram.total / GIB:.1f} GiB available"
    if limit < ram.total:
        found += f"; this container or job may use {limit / GIB:.1f} GiB"
    if min(limit, ram.available) < _DEMO_GIB * GIB:
        yield warning("RAM", found, follows=f"the system may kill a run; even the demo needs {_DEMO_GIB} GiB")
    else:
        yield ok("RAM", found)
    yield ok("CPU cores", f"{usable_cores()}")
    if not _SHM.exists():
        return
    size = shutil.disk_usage(_SHM).total / GIB
    if size < 1:
        yield warning(
            f"{_SHM}",
            f"{size:.2f} GiB",
            follows="NCCL and data loaders die when it is full, some with nothing but 'bus error'",
            fix="docker run --ipc=host, or --shm-size=8g",
        )
    else:
        yield ok(f"{_SHM}", f"{size:.1f} GiB")


def _memory_limit() -> float:
    """Bytes that the control groups of this process allow: those of a container, of a job on a cluster."""
    if sys.platform != "linux":
        return float("inf")
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = [Path("/sys/fs/cgroup", line[3:].strip("/")) for line in groups if line.startswith("0::")]
    files = [folder / "memory.max" for group in own for folder in (group, *group.parents)]
    files.append(Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # version 1, in a container
    texts = [file.read_text().strip() for file in files if file.exists()]
    return min((float(text) for text in texts if text != "max"), default=float("inf"))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def folders() -> Iterator[Finding]:
    """Room and rights where runs write, and where models and datasets are kept."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    datasets = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    elsewhere = "export HF_HOME=/another/disk"
    yield _folder("current folder", Path.cwd(), 20, "a checkpoint of a 7B model takes 100 GB", "cd /another/disk")
    yield _folder("Hub cache", Path(constants.HF_HUB_CACHE), 20, "models are kept there, 7B takes 17 GB", elsewhere)
    yield _folder("datasets cache", datasets, 5, "datasets are kept there", elsewhere)


def temporary() -> Iterator[Finding]:
    """The folder of temporary files. Fails where there is none that can be written."""
    yield _folder("temporary files", Path(tempfile.gettempdir()), 1, "compilers write there", "export TMPDIR=/a/disk")


def _folder(subject: str, path: Path, enough: int, why: str, fix: str) -> Finding:
    """Whether one can write at `path`, which need not be there yet, and whether `enough` GiB are free."""
    try:
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        with tempfile.TemporaryDirectory(dir=there):  # rights alone do not tell: read-only disks, root, quotas
            free = shutil.disk_usage(there).free / GIB
    except OSError as error:
        return fault(subject, f"{path} cannot be written: {error.strerror}", follows=why, fix=fix)
    found = f"{path}, {free:.1f} GiB free"
    return ok(subject, found) if free >= enough else warning(subject, found, follows=why, fix=fix)


def limits() -> Iterator[Finding]:
    """How many files a process may have open."""
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield ok("open files", "no limit")
    elif soft < 1024:
        follows = "runs with many processes and workers stop with 'Too many open files'"
        yield warning("open files", f"{soft} at most", follows=follows, fix="ulimit -n 65536")
    else:
        yield ok("open files", f"{soft} at most")
