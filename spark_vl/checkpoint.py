"""Checkpoints that are whole or not there: written beside, flushed, renamed, and checked before they are loaded.

A run's `checkpoints/` holds `step-000120/` folders and the files `latest` and `best`, which name one each. A checkpoint
has what a run needs to go on as if it had not been interrupted:

    model.safetensors, optimizer.bin, …   weights, optimizer, schedule, random generators, as Accelerate or DeepSpeed
                                          writes them for the way in which they are held
    trainer.rank0.json, …                 of each process: position of the sampler, recycled prompts that wait
    config.yaml                           of the run
    model/                                the plain Hugging Face checkpoint: to use, evaluate, publish; with the prompts
                                          that it was trained on
    manifest.json                         step, processes, size and SHA-256 of every other file, and its own SHA-256
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from spark_vl import __version__
from spark_vl.config import ConfigError, TrainConfig, config_differences, save_config
from spark_vl.distributed.launch import strategy
from spark_vl.families import Processor
from spark_vl.prompts.templater import PROMPTS_FILE, Templater
from spark_vl.run.files import flush, written_whole
from spark_vl.run.paths import BEST, CONFIG, LATEST, MODEL, TRAINING_FILE, name_of, pointed
from spark_vl.run.provenance import public_name

MANIFEST = "manifest.json"

_SAME_FILES = {"single", "ddp"}
"""Ways of holding weights whose checkpoints do not depend on the number of processes."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written, or not be resumed from; the message names it."""


def claim_folder(folder: Path) -> IO[str]:
    """Make `folder` and keep other runs out of it for as long as the returned file is open, also after a crash.

    Raises:
        ConfigError: it cannot be written to, or another run is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"output_dir: another run is at work in {folder}") from error
    return lock


def save_checkpoint(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    processor: Processor,
    templater: Templater,
    config: TrainConfig,
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    best: bool = False,
) -> Path:
    """Write `folder/step-…` on all processes, point `latest` (and `best`) at it, then delete what is over the limit.

    Args:
        policy: as prepared.
        state: of the trainer on this process, as JSON.
        best: whether this is the best one so far.

    Raises:
        CheckpointError: it cannot be written. What was there before is untouched.
    """
    final = folder / name_of(step)
    temporary = folder / f".{final.name}.partial"
    needed = _bytes_needed(policy, folder)
    problem = ""
    if accelerator.is_main_process:
        for begun in folder.glob(".step-*.partial"):  # by a run that was killed, maybe at a step not saved again
            shutil.rmtree(begun, ignore_errors=True)
        temporary.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            problem = f"about {needed:,} bytes are needed, {free:,} are free"
    _raise_together(problem and _unwritten(final, problem))
    try:
        accelerator.save_state(temporary)
        (temporary / _state_file(accelerator.process_index)).write_text(json.dumps(state))
        export_model(accelerator, policy, processor, temporary / MODEL, dtype=getattr(torch, config.model.dtype))
        if accelerator.is_main_process:
            templater.save(temporary / MODEL / PROMPTS_FILE)
            base = {"base": public_name(config.model.path), "base_commit": processor.commit}
            facts = json.dumps({"step": step, "spark_vl": __version__, **base})
            (temporary / MODEL / TRAINING_FILE).write_text(facts + "\n")
            save_config(config, temporary / CONFIG)
            _write_manifest(accelerator, temporary, step)
    except Exception as error:
        if accelerator.is_main_process:
            free = shutil.disk_usage(folder).free
            shutil.rmtree(temporary, ignore_errors=True)
            problem = f"{error} (about {needed:,} bytes are needed, {free:,} are free)"
        raise CheckpointError(_unwritten(final, problem or str(error))) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # written before, by a run that was interrupted and resumed from an earlier one
            shutil.rmtree(final)
        os.replace(temporary, final)
        flush(folder)
        point(folder, LATEST, final)
        if best:
            point(folder, BEST, final)
        _delete_old(folder, config.checkpoint.save_total_limit)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means: `auto` (the latest in `folder`, if any), `none`, or the path of one.

    Raises:
        CheckpointError: the path, or what `latest` names, is no whole checkpoint.
    """
    if resume == "none":
        return None
    path = pointed(folder, LATEST) if resume == "auto" else Path(resume)
    if path is None:
        return None
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: is no checkpoint (it has no {MANIFEST})")
    return path


def load_checkpoint(
    accelerator: Accelerator, path: Path, config: TrainConfig, *, allow_config_change: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check the checkpoint at `path`, and load what Accelerate or DeepSpeed saved.

    Returns:
        The manifest (`step`, `processes`), and the trainer's states: only this process's own, or those of all processes
        that wrote it where their number was another one.

    Raises:
        CheckpointError: a file is missing or damaged, the checkpoint does not go with this launch, or the
            configuration has changed.
    """
    manifest = _read_manifest(path / MANIFEST)
    damage = [f"{MANIFEST} has changed"]
    if manifest:
        damage = _damage(path, manifest["files"]) if accelerator.is_main_process else []
    whole = [other.parent.name for other in sorted(path.parent.glob(f"step-*/{MANIFEST}")) if other.parent != path]
    advice = f"; resume from another one with --resume PATH ({', '.join(whole)})" if whole else ""
    _raise_together(f"{path}: is damaged: {'; '.join(damage)}{advice}" if damage else "")

    changes = config_differences(yaml.safe_load((path / CONFIG).read_text()), config)
    if changes and not allow_config_change:
        raise CheckpointError(
            f"{path}: the run was configured differently: {'; '.join(changes)}. Give the old values, or go on with the "
            "new ones with --allow-config-change"
        )
    was, now = manifest["processes"], accelerator.num_processes
    here = strategy(accelerator)
    if not (manifest["strategy"] == here or {manifest["strategy"], here} <= _SAME_FILES):
        raise CheckpointError(
            f"{path}: was written under {manifest['strategy']}, this run is launched under {here}; launch it as "
            f"before, or start a new run from its weights: --model.path {path / MODEL}"
        )
    if was != now and here not in _SAME_FILES:
        raise CheckpointError(
            f"{path}: was written by {was} processes, this run has {now}, and {here} cuts the optimizer's state for a "
            f"fixed number of them; launch {was}, or start a new run from its weights: --model.path {path / MODEL}"
        )
    accelerator.load_state(path)
    ranks = [accelerator.process_index] if was == now else range(was)
    return manifest, [json.loads((path / _state_file(rank)).read_text()) for rank in ranks]


def export_model(
    accelerator: Accelerator, policy: torch.nn.Module, processor: Processor, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write `policy`, as prepared, and the processor as a plain Hugging Face checkpoint in safetensors of `dtype`.

    Adapters are merged into the weights. The checkpoints to resume from keep the optimizer's float32 weights; this is
    what is used and published. Collective.
    """
    state = accelerator.get_state_dict(policy)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(policy)
        state = {name: tensor.to(dtype) for name, tensor in model.plain_state_dict(state).items()}
        model.model.save_pretrained(folder, state_dict=state)
        # save_pretrained names the type of the weights in memory, and `dtype="auto"` believes it.
        named = {"dtype": str(dtype).removeprefix("torch.")}
        config = (folder / "config.json").read_text()
        config = json.loads(config, object_hook=lambda part: part | named if "dtype" in part else part)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        processor.save(folder)
    accelerator.wait_for_everyone()


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Put the plain model of `checkpoint` at `folder`, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / MODEL, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def is_latest(folder: Path, step: int) -> bool:
    """Whether the newest checkpoint in `folder` is that of `step`."""
    return pointed(folder, LATEST) == folder / name_of(step)


def point(folder: Path, pointer: str, checkpoint: Path) -> None:
    """Let `pointer` (`latest`, `best`) name `checkpoint`; at no moment does it name nothing."""
    with written_whole(folder / pointer) as file:
        file.write_text(checkpoint.name)


def _state_file(rank: int) -> str:
    return f"trainer.rank{rank}.json"


def _write_manifest(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Flush all files, then write down what they are; without a manifest there is no checkpoint."""
    missing = [rank for rank in range(accelerator.num_processes) if not (folder / _state_file(rank)).exists()]
    if missing:
        raise OSError(f"the files of ranks {missing} are not there: output_dir must be on a file system that all share")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in _digests(paths)
    }
    manifest = {
        "step": step,
        "processes": accelerator.num_processes,
        "strategy": strategy(accelerator),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=1))
    for path in folder.rglob("*"):
        flush(path)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest; None: it is not what was written."""
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
    except (ValueError, KeyError):
        return None
    return manifest if digest == _digest_of(manifest) else None


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _damage(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the files that the manifest lists."""
    missing = [name for name in files if not (folder / name).is_file()]
    present = [folder / name for name in files if name not in missing]
    changed = [
        name for path, digest in _digests(present) if digest != files[name := str(path.relative_to(folder))]["sha256"]
    ]
    return [f"{name} is missing" for name in missing] + [f"{name} has changed" for name in changed]


def _digests(paths: list[Path]) -> Iterable[tuple[Path, str]]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter's lock to others
        return zip(paths, list(threads.map(digest, paths)), strict=True)


def _bytes_needed(policy: torch.nn.Module, folder: Path) -> int:
    """Size of a checkpoint: as the last one, or else float32 weights and AdamW's two moments, and the plain model."""
    if last := pointed(folder, LATEST):
        return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    sizes = [(_size(p), p.requires_grad) for p in policy.parameters()]
    return sum(size * (8 + 8 * trained) for size, trained in sizes)


def _size(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter on all processes together."""
    # ZeRO-3 leaves an empty tensor where it has taken a parameter away, and notes its size.
    return vars(parameter).get("ds_numel", parameter.numel())


def _raise_together(problem: str) -> None:
    """Raise on all processes what the main one has found, so that none waits for another. Empty: it found nothing."""
    [problem] = broadcast_object_list([problem])
    if problem:
        raise CheckpointError(problem)


def _unwritten(path: Path, problem: str) -> str:
    return f"{path}: the checkpoint could not be written: {problem}. Earlier ones are untouched"


def _delete_old(folder: Path, limit: int) -> None:
    kept = [pointed(folder, pointer) for pointer in (LATEST, BEST)]
    for old in sorted(folder.glob("step-*"))[:-limit]:
        if old not in kept:
            shutil.rmtree(old)
