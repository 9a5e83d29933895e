"""Checkpoints that are whole or not there: written beside, flushed to disk, renamed.

A run's `checkpoints/` holds `step-000120/` folders and the file `latest`, which names the newest whole one. A
checkpoint has what a run needs to go on as if it had not been interrupted: weights, optimizer, learning-rate schedule
and the states of the random generators
(written by Accelerate), and `trainer.json` (step, position of the sampler, recycled prompts that wait for the next
step).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spark_vl.config import ConfigError
from spark_vl.processors import Processor

STATE_FILE = "trainer.json"
LATEST = "latest"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be resumed from; the message names it."""


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `folder/step-…` on all processes, point `latest` at it, then delete all but the newest `keep`."""
    final = folder / f"step-{step:06d}"
    temporary = folder / f".step-{step:06d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state}))
        for path in temporary.rglob("*"):
            _flush(path)
        if final.exists():  # written before by a run that was interrupted right here
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(folder)
        pointer = folder / f".{LATEST}.partial"
        pointer.write_text(final.name)
        _flush(pointer)
        os.replace(pointer, folder / LATEST)
        _flush(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means: `auto` (the latest in `folder`, if any), `none`, or the path of one.

    Raises:
        CheckpointError: the path, or what `latest` names, is no whole checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        if not (folder / LATEST).exists():
            return None
        path = folder / (folder / LATEST).read_text().strip()
    else:
        path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(f"{path}: is no checkpoint (it has no {STATE_FILE})")
    return path


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Load what Accelerate saved at `path`, and return the trainer's own state."""
    accelerator.load_state(path)
    return json.loads((path / STATE_FILE).read_text())


def export_model(
    accelerator: Accelerator, policy: torch.nn.Module, processor: Processor, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write `policy`, as prepared, and the processor as a plain Hugging Face checkpoint in safetensors of `dtype`.

    The checkpoints to resume from keep the optimizer's float32 weights; this is what is used and published.
    """
    state = accelerator.get_state_dict(policy)
    if accelerator.is_main_process:
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in state.items()}
        accelerator.unwrap_model(policy).model.save_pretrained(folder, state_dict=state)
        # save_pretrained names the type of the weights in memory, and `dtype="auto"` believes it.
        named = {"dtype": str(dtype).removeprefix("torch.")}
        config = (folder / "config.json").read_text()
        config = json.loads(config, object_hook=lambda part: part | named if "dtype" in part else part)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        processor.save(folder)
    accelerator.wait_for_everyone()


def _flush(path: Path) -> None:
    """Make sure that `path` is on the disk, not only in the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
