"""Checkpoints that are whole or not there: written beside, flushed, renamed, and checked before they are loaded.

A run's `checkpoints/` holds `step-000120/` folders and the files `latest` and `best`, which name one each. A checkpoint
has what a run needs to go on as if it had not been interrupted:

    model.safetensors, optimizer.…, …     weights and optimizer; under DeepSpeed and FSDP2 in the format of the library,
                                          which reads it by pickle (`distributed.state`)
    trainer.rank0.json, …                 of each process: position of the sampler, recycled prompts that wait, counts,
                                          random generators
    config.yaml                           of the run
    model/                                the plain Hugging Face checkpoint: to use, evaluate, publish; with the prompts
                                          that it was trained on
    manifest.json                         format, step, processes, size and SHA-256 of every other
                                          file, and its own SHA-256
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from transformers import PreTrainedModel

from spark_vl import __version__
from spark_vl.config import ConfigError, TrainConfig, config_differences, read_config, save_config
from spark_vl.data.cells import count
from spark_vl.distributed.launch import strategy
from spark_vl.distributed.state import UNPICKLED, load_state, random_state, save_state, set_random_state
from spark_vl.families.base import Processor
from spark_vl.feed import PromptFeed
from spark_vl.prompts.templater import PROMPTS_FILE, Templater
from spark_vl.run.files import flush, written_whole
from spark_vl.run.manifest import MANIFEST, find_damage, read_manifest, write_manifest
from spark_vl.run.paths import ADAPTER, BEST, CONFIG, LATEST, MODEL, TRAINING_FILE, name_of, pointed
from spark_vl.run.provenance import public_name
from spark_vl.run.trained import limits_of

logger = logging.getLogger(__name__)

FORMAT = 4
"""Of the checkpoints that this version writes and reads. 1: before prompts had a feed of their own. 2: before recycled
prompts came in pairs, and before norms and biases were a group of their own in the optimizer. 3: optimizer and random
generators were pickled."""

_SAME_FILES = {"single", "ddp"}
"""Ways of holding weights whose checkpoints do not depend on the number of processes."""


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, or the run cannot be resumed from it; the message names it."""


def claim_folder(folder: Path) -> IO[str]:
    """Make `folder` and keep other runs out of it for as long as the returned file is open, also after a crash.

    Raises:
        ConfigError: it cannot be written to, or through a link that would change files elsewhere; or another run is at
            work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        links = [path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.is_dir()]
        if links:  # a folder on a larger disk is fine
            raise ConfigError(
                f"output_dir: {links[0]} is a symbolic link, through which the run would write; allowed: files of its "
                "own, and links to folders"
            )
        # Nor through a link that is made this very moment.
        lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"output_dir: another run is at work in {folder}") from error
    return lock


class Stateful(Protocol):
    """Something whose state on this process is a part of a checkpoint, as JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on as if it had not been interrupted."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made."""


class BestFigure:
    """The highest value so far of one figure of the evaluations.

    Args:
        name: of the figure (`checkpoint.keep_best`); None: nothing is compared.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.value = -math.inf
        self.step: int | None = None
        """In which it was reached; None: by the untrained model, or it is not known."""

    def update(self, step: int, figures: Mapping[str, Mapping[str, Any]]) -> bool:
        """Take in `figures`, evaluated after `step`; without any, nothing changes. Returns whether it is the best step
        so far; step 0, the untrained model, sets the mark and never is. Nor is a step that lacks a figure which an
        earlier one had: there is no `pointwise_own` once all sampled answers are right.

        Raises:
            ConfigError: there is no such figure, nor ever was.
        """
        if self.name is None or not figures:
            return False
        if self.name not in figures:
            if self.value > -math.inf:
                return False
            raise ConfigError(f"checkpoint.keep_best: there is no figure {self.name!r}; there are {', '.join(figures)}")
        value, before = figures[self.name]["value"], self.value
        if value <= before:
            return False
        self.value, self.step = value, step or None
        return step > 0

    def state_dict(self) -> dict[str, Any]:
        """The figure, its value and its step."""
        return {"name": self.name, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`. The state of another figure says nothing about this one."""
        if state.get("name", self.name) == self.name:  # a checkpoint of an earlier version has no name, and no step
            value, step = state["value"], state.get("step")
            if type(value) not in (int, float) or math.isnan(value):
                raise ValueError(f"best: value: found {value!r:.80}; allowed: a number")
            self.value, self.step = value, None if step is None else count(state, "step")


@dataclass(kw_only=True)
class Checkpoints:
    """Writes and loads the checkpoints of one run. All methods are collective."""

    folder: Path
    accelerator: Accelerator
    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    """As prepared, as is the policy."""
    processor: Processor
    templater: Templater
    config: TrainConfig
    feed: PromptFeed
    """Knows how to deal its state out to another number of processes."""
    best: BestFigure
    parts: Mapping[str, Stateful]
    """What else the run remembers, by name."""
    data_changes: Sequence[str] = ()
    """How the data differ from those of the checkpoint that was loaded, recipe by recipe."""

    def write(self, step: int) -> Path:
        """Write `step-…` on all processes. It counts once `commit` has been called.

        Raises:
            CheckpointError: it cannot be written. What was there before is untouched.
        """
        final = self.folder / name_of(step)
        temporary = self.folder / f".{final.name}.partial"
        needed = _bytes_needed(self.policy, self.folder)
        is_main, rank = self.accelerator.is_main_process, self.accelerator.process_index
        fault = ""
        if is_main:
            for begun in self.folder.glob(".step-*.partial"):  # by a run that was killed, maybe at another step
                shutil.rmtree(begun, ignore_errors=True)
            temporary.mkdir(parents=True)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                fault = f"about {needed:,} bytes are needed, {free:,} are free"
        _raise_together(fault and _unwritten(final, fault))
        state = {"feed": self.feed.state_dict(), "best": self.best.state_dict()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        state["random"] = random_state(self.accelerator.device)
        try:
            save_state(self.accelerator, self.policy, self.optimizer, temporary)
            (temporary / _state_file(rank)).write_text(json.dumps(state))
            dtype = getattr(torch, self.config.model.dtype)
            export_model(self.accelerator, self.policy, self.processor, temporary / MODEL, dtype=dtype)
            if is_main:
                self._describe(temporary, step)
                self._sign(temporary, step)
        except Exception as error:
            if is_main:
                free = shutil.disk_usage(self.folder).free
                shutil.rmtree(temporary, ignore_errors=True)
                fault = f"{error} (about {needed:,} bytes are needed, {free:,} are free)"
            raise CheckpointError(_unwritten(final, fault or str(error))) from error
        self.accelerator.wait_for_everyone()
        if is_main:
            if final.exists():  # written before, by a run that was interrupted and resumed from an earlier one
                shutil.rmtree(final)
            os.replace(temporary, final)
            flush(self.folder)
        return final

    def commit(self, step: int, *, is_best: bool) -> None:
        """Point `latest` (and `best`) at the checkpoint of `step`, then delete what is over the limit."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            point(self.folder, LATEST, self.folder / name_of(step))
            if is_best:
                point(self.folder, BEST, self.folder / name_of(step))
            _delete_old(self.folder, step, self.config.checkpoint.save_total_limit)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path, manifest: Mapping[str, Any], *, allow_config_change: bool = False) -> int:
        """Go on from the checkpoint at `path`, which `check_checkpoint` has looked through. Returns its step.

        Args:
            manifest: what that returned.

        Raises:
            CheckpointError: the data have changed, or what it holds cannot be.
        """
        was, now, rank = manifest["processes"], self.accelerator.num_processes, self.accelerator.process_index
        ranks = [rank] if was == now else range(was)
        try:
            states = [json.loads((path / _state_file(each)).read_text()) for each in ranks]
            feeds = [state["feed"] for state in states]
            changes = self.feed.changes_since(feeds[0])
            if changes and not allow_config_change:
                raise CheckpointError(
                    f"{path}: the run had other data: {'; '.join(changes)}. Give it the old data, or go on with the "
                    "new with --allow-config-change: the epoch that was under way then begins again, shuffled anew"
                )
            anew = bool(changes) or (allow_config_change and feeds[0]["sampler"]["seed"] != self.config.seed)
            self.feed.load_state_dict(feeds[0] if was == now else self.feed.deal_out(feeds, rank, now), anew=anew)
            self.data_changes = changes
            self.best.load_state_dict(states[0]["best"])
            for name, part in self.parts.items():
                part.load_state_dict(states[0][name])
            load_state(self.accelerator, self.policy, self.optimizer, path)
            # Last: nothing that is loaded draws from them. A process that was not there goes on as seeded.
            if rank < was:
                set_random_state(states[0 if was == now else rank]["random"], self.accelerator.device)
        except CheckpointError:
            raise
        except Exception as error:  # somebody may have signed anything
            raise CheckpointError(f"{path}: cannot be resumed from: {type(error).__name__}: {error}") from error
        if self.accelerator.is_main_process:
            self._go_back(path)
        return manifest["step"]

    def _go_back(self, path: Path) -> None:
        """Let `latest` and `best` name what they named when the checkpoint at `path` was written: later ones will be
        written anew, and may turn out worse. What was the best then may be gone; `best` then names nothing."""
        if path.parent == self.folder:
            point(self.folder, LATEST, path)
        best = self.folder / name_of(self.best.step) if self.best.step else None
        if best is not None and path.parent == self.folder and (best / MANIFEST).is_file():
            point(self.folder, BEST, best)
        else:
            (self.folder / BEST).unlink(missing_ok=True)

    def is_latest(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`."""
        return pointed(self.folder, LATEST) == self.folder / name_of(step)

    def copy_model(self, step: int, folder: Path) -> None:
        """Put the plain model of the checkpoint of `step` at `folder`, whole or not at all."""
        if self.accelerator.is_main_process:
            temporary = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(self.folder / name_of(step) / MODEL, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        self.accelerator.wait_for_everyone()  # a process that ended earlier would be taken for dead

    def _describe(self, checkpoint: Path, step: int) -> None:
        """Write what says where the model comes from, and which words it was trained on."""
        self.templater.save(checkpoint / MODEL / PROMPTS_FILE)
        facts = {
            "step": step,
            "spark_vl": __version__,
            "base": public_name(self.config.model.path),
            "base_commit": self.processor.commit,
            "limits": limits_of(self.config),
        }
        (checkpoint / MODEL / TRAINING_FILE).write_text(json.dumps(facts) + "\n")
        save_config(self.config, checkpoint / CONFIG)

    def _sign(self, checkpoint: Path, step: int) -> None:
        """Write the manifest of a checkpoint that has everything else."""
        processes = self.accelerator.num_processes
        missing = [rank for rank in range(processes) if not (checkpoint / _state_file(rank)).exists()]
        if missing:
            raise OSError(
                f"the files of ranks {missing} are missing: output_dir must be on a file system that all share"
            )
        facts = {"format": FORMAT, "step": step, "processes": processes, "strategy": strategy(self.accelerator)}
        write_manifest(checkpoint, facts)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means: `auto` (the latest in `folder`, if any), `none`, or the path of one.

    Raises:
        CheckpointError: the path, or what `latest` names, is not a whole checkpoint.
    """
    if resume == "none":
        return None
    path = pointed(folder, LATEST) if resume == "auto" else Path(resume)
    if path is None:
        return None
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"--resume {resume}: is not a checkpoint (it has no {MANIFEST}); allowed: auto, none, or the folder of one"
        )
    return path


def check_checkpoint(
    accelerator: Accelerator, path: Path, config: TrainConfig, *, allow_config_change: bool = False, trust: bool = False
) -> dict[str, Any]:
    """The manifest of the checkpoint at `path` (`step`, `processes`), which is whole and goes with this run.

    Collective.

    Args:
        trust: read it also where that runs what it holds, wherever it lies.

    Raises:
        CheckpointError: a file is missing or damaged, the checkpoint does not go with this launch or this version, the
            configuration has changed, or reading it could run somebody's code.
    """
    manifest = read_manifest(path) or {}
    damage = [] if manifest else [f"{MANIFEST} has changed"]
    if manifest and accelerator.is_main_process:
        damage = find_damage(path, manifest)
    whole = [other.parent.name for other in sorted(path.parent.glob(f"step-*/{MANIFEST}")) if other.parent != path]
    advice = f"; resume from another one with --resume PATH ({', '.join(whole)})" if whole else ""
    _raise_together(f"{path}: is damaged: {'; '.join(damage)}{advice}" if damage else "")

    if (written := manifest.get("format", 1)) != FORMAT:
        raise CheckpointError(
            f"{path}: has format {written}, and this version of spark-vl reads format {FORMAT}; start a new run from "
            f"its weights: --model.path {path / MODEL}"
        )
    for fact, least in (("step", 0), ("processes", 1)):
        if type(value := manifest.get(fact)) is not int or not least <= value < 2**31:
            raise CheckpointError(f"{path / MANIFEST}: {fact}: found {value!r:.80}; allowed: a number from {least}")
    try:
        changes = config_differences(read_config(path / CONFIG), config)
    except Exception as error:  # somebody may have signed anything
        raise CheckpointError(f"{path / CONFIG}: cannot be read: {type(error).__name__}: {error}") from error
    if changes and not allow_config_change:
        raise CheckpointError(
            f"{path}: the run was configured differently: {'; '.join(changes)}. Give the old values, or go on with the "
            "new ones with --allow-config-change"
        )
    was, now = manifest["processes"], accelerator.num_processes
    here = strategy(accelerator)
    held = str(manifest.get("strategy"))
    if not (held == here or {held, here} <= _SAME_FILES):
        raise CheckpointError(
            f"{path}: was written under {held:.80}, this run is launched under {here}; launch it as "
            f"before, or start a new run from its weights: --model.path {path / MODEL}"
        )
    if was != now and here not in _SAME_FILES:
        raise CheckpointError(
            f"{path}: was written by {was} processes, this run has {now}, and {here} cuts the optimizer's state for a "
            f"fixed number of them; launch {was}, or start a new run from its weights: --model.path {path / MODEL}"
        )
    if here in UNPICKLED and not trust:
        _check_place(path, Path(config.output_dir))
    return manifest


def _check_place(path: Path, output_dir: Path) -> None:
    """Refuse a checkpoint, whose library would run what code it holds, unless all of it lies below `output_dir`.

    Raises:
        CheckpointError: it lies elsewhere, symbolic links resolved, or has one inside.
    """
    root, place = output_dir.resolve(), path.resolve()
    links = [part for part in sorted(place.rglob("*")) if part.is_symlink()]
    if links or not place.is_relative_to(root):
        found = f"the symbolic link {links[0]}" if links else place
        raise CheckpointError(
            f"{path}: under ZeRO and FSDP2 a checkpoint can hold code, which runs when it is read; found {found}, "
            f"allowed: files below output_dir ({root}). If you trust who wrote it, add --trust-checkpoint; or start a "
            f"new run from its weights, which hold no code: --model.path {path / MODEL}"
        )


def export_model(
    accelerator: Accelerator, policy: torch.nn.Module, processor: Processor, folder: Path, *, dtype: torch.dtype
) -> None:
    """Write `policy`, as prepared, and the processor as a plain Hugging Face checkpoint in safetensors of `dtype`.

    Adapters are merged into the weights, and lie beside them in `adapter/` as they are: bfloat16 has 8 bits, and rounds
    most of a small change of a weight away. The checkpoints to resume from keep the optimizer's float32 weights; this
    is what is used and published. Collective.
    """
    state = accelerator.get_state_dict(policy)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(policy)
        if unwrapped.adapters:
            (folder / ADAPTER).mkdir(parents=True)
            unwrapped.adapters.save_pretrained(folder / ADAPTER)
            save_file(unwrapped.adapter_state_dict(state), folder / ADAPTER / "adapter_model.safetensors")
        state = {name: tensor.to(dtype) for name, tensor in unwrapped.plain_state_dict(state).items()}
        unwrapped.model.save_pretrained(folder, state_dict=state)
        # save_pretrained names the type of the weights in memory, and `dtype="auto"` believes it.
        named = {"dtype": str(dtype).removeprefix("torch.")}
        config = (folder / "config.json").read_text()
        config = json.loads(config, object_hook=lambda part: part | named if "dtype" in part else part)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        processor.save(folder)
    accelerator.wait_for_everyone()


def prepare_export(model: PreTrainedModel, processor: Processor) -> None:
    """Make sure that `export_model` can write all that lies beside the weights: a run must not find out at its first
    checkpoint. The generation configuration gets the stop tokens of the run. Where it has sampling settings, which
    transformers does not save without `do_sample: true`, it gets that.

    Raises:
        ConfigError: something cannot be written.
    """
    generation = model.generation_config
    generation.eos_token_id = list(processor.stop_token_ids)
    try:
        generation.validate(strict=True)
    except ValueError as error:
        logger.warning("generation_config.json: do_sample is set to true in what is saved: %.200s", error)
        generation.do_sample = True
    for name, part in (
        ("config.json", model.config.save_pretrained),
        ("generation_config.json", generation.save_pretrained),
        ("the processor", processor.save),
    ):
        with TemporaryDirectory() as folder:
            try:
                part(Path(folder))
            except Exception as error:  # transformers raises what it likes of somebody else's file
                raise ConfigError(f"model.path: {name} could not be saved with the trained model: {error}") from error


def point(folder: Path, pointer: str, checkpoint: Path) -> None:
    """Let `pointer` (`latest`, `best`) name `checkpoint`; at no moment does it name nothing."""
    with written_whole(folder / pointer) as file:
        file.write_text(checkpoint.name)


def _state_file(rank: int) -> str:
    return f"trainer.rank{rank}.json"


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


def _delete_old(folder: Path, step: int, limit: int) -> None:
    """Delete what is over the limit: first checkpoints of steps after `step`, which an earlier start left behind."""
    kept = [pointed(folder, pointer) for pointer in (LATEST, BEST)]
    newest = name_of(step)
    for old in sorted(folder.glob("step-*"), key=lambda path: (path.name <= newest, path.name))[:-limit]:
        if old not in kept:
            shutil.rmtree(old)
