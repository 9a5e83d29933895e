"""The estimate as a table, with what would help where it does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spark_vl.config import ConfigError, LoraConfig, TrainConfig
from spark_vl.estimate.memory import (
    GIB,
    Estimate,
    batches,
    colocated,
    estimate,
    prompt_tokens,
    vllm_bytes,
    vllm_share,
)
from spark_vl.estimate.shape import Shape
from spark_vl.estimate.weights import Phases, Setup, trained_parameters

NOTICEABLE = GIB // 10
"""Bytes that a change has to save to be named."""


@dataclass(frozen=True)
class Change:
    """Something that may save memory."""

    option: str
    value: str
    """As they are typed in a shell: `--option value`."""
    config: TrainConfig
    setup: Setup
    """What it makes of them."""
    harmless: bool
    """Whether the run learns the same on the same GPUs."""

    def __str__(self) -> str:
        return f"--{self.option} {shlex.quote(self.value)}"


def print_estimate(shape: Shape, config: TrainConfig, setup: Setup, console: Console) -> bool:
    """Print what a run needs, whether it fits, and if not, what would help.

    Returns:
        Whether it fits.

    Raises:
        ConfigError: the parts of `setup` do not go together.
    """
    needed = estimate(shape, config, setup)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    trained, images = trained_parameters(shape, config.model), setup.images if shape.vision.depth else 0
    say(
        f"{shape.name}: {shape.parameters:,} weights, {'all' if trained == shape.parameters else f'{trained:,}'} "
        f"trained, on {_way(config, setup)}."
    )
    say(
        f"Assumed: prompts of {prompt_tokens(shape, config, setup)} tokens (images: {images}, text: "
        f"{setup.text_tokens} tokens), {_sampled(shape, config, setup)}."
    )
    rows = [(name, *map(_gib, row)) for name, row in needed.rows.items() if any(row)]
    _print_table(console, ("GiB on each GPU", *Phases._fields), [*rows, ("sum", *map(_gib, needed.total))])
    processes = min(setup.gpus, setup.gpus_per_machine)
    each = sum(needed.host.values())
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.host.items() if size)
    say(f"Host memory of a machine: {_gib(each * processes)} GiB, {processes} × {_gib(each)} ({parts}).")
    lacking = _lacking(needed, setup)
    if lacking:
        say(f"It does not fit: {'; '.join(lacking)}.")
        _print_help(shape, config, setup, needed, console)
    else:
        say(f"It fits: at most {_gib(max(needed.total))} of {setup.gpu_memory:g} GiB.")
    say("Activations and the rollout are estimates, most of them upper bounds; see docs/memory.md.")
    return not lacking


def changes(config: TrainConfig, setup: Setup) -> Iterator[Change]:
    """All that may save memory, whether it does or not."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    settings: dict[str, Any] = {
        "optimizer.tokens_per_pack": max(longest, config.optimizer.tokens_per_pack // 2),
        "model.max_pixels": max(config.model.min_pixels, config.model.max_pixels // 2),
        "rollout.decode_batch_size": max(config.rollout.n, _rows(config, setup) // 2),
        "rollout.gather": "layer",
        "objective.beta": 0,
        "model.attention": "flex",
        "model.gradient_checkpointing": True,
        "model.dtype": "bfloat16",
        "model.freeze": ["vision"],
        "model.lora": LoraConfig(),
    }
    for option, value in settings.items():
        group, name = option.split(".")
        shown = {"model.freeze": "[vision]", "model.lora": "{rank: 64}"}.get(option, str(value).lower())
        changed = replace(config, **{group: replace(getattr(config, group), **{name: value})})
        harmless = group in ("optimizer", "rollout") or name in ("attention", "gradient_checkpointing")
        yield Change(option, shown, changed, setup, harmless)
    for option, values in {
        "zero": range(setup.zero + 1, 4),
        "offload": ("optimizer", "optimizer+weights"),
        "gpus": (2 * setup.gpus,),
    }.items():
        for value in values:
            changed_setup = replace(setup, **{option: value})
            yield Change(option, str(value), config, changed_setup, option != "gpus")


def enough(shape: Shape, config: TrainConfig, setup: Setup) -> list[Change] | None:
    """Harmless changes that make it fit together, found greedily; None where they do not."""
    taken: dict[str, Change] = {}
    short = _shortage(estimate(shape, config, setup), setup)
    while short:
        tried = [
            (_shortage(then, change.setup), change)
            for change, then in _estimated(shape, config, setup)
            if change.harmless
        ]
        least, best = min(tried, key=lambda pair: pair[0])
        if least >= short:
            return None
        short, config, setup = least, best.config, best.setup
        taken[best.option] = best
    return list(taken.values())


def _print_help(shape: Shape, config: TrainConfig, setup: Setup, needed: Estimate, console: Console) -> None:
    limit = setup.gpu_memory * GIB
    found = []
    for change, then in _estimated(shape, config, setup):
        saved = [before - after for before, after in zip(needed.total, then.total, strict=True)]
        if any(total > limit and gain >= NOTICEABLE for total, gain in zip(needed.total, saved, strict=True)):
            fits = "no" if _lacking(then, change.setup) else "yes"
            found.append((fits == "no", max(then.total), (str(change), *map(_gib, saved), fits)))
    if found:
        rows = [row for *_, row in sorted(found)]
        _print_table(console, ("alone saves, GiB", *Phases._fields, "fits then"), rows)
    if all(does_not for does_not, *_ in found) and (together := enough(shape, config, setup)):
        console.print(f"Together enough: {' '.join(map(str, together))}", soft_wrap=True, markup=False, highlight=False)


def _estimated(shape: Shape, config: TrainConfig, setup: Setup) -> Iterator[tuple[Change, Estimate]]:
    """The changes that are possible, and what is needed with each."""
    for change in changes(config, setup):
        try:
            yield change, estimate(shape, change.config, change.setup)
        except ConfigError:  # such as weights in host memory without ZeRO-3
            continue


def _lacking(needed: Estimate, setup: Setup) -> list[str]:
    """What does not fit, in words."""
    lacking = [
        f"the {phase} needs {_gib(total)} of {setup.gpu_memory:g} GiB"
        for phase, total in zip(Phases._fields, needed.total, strict=True)
        if total > setup.gpu_memory * GIB
    ]
    host = sum(needed.host.values()) * min(setup.gpus, setup.gpus_per_machine)
    if setup.host_memory is not None and host > setup.host_memory * GIB:
        lacking.append(f"a machine needs {_gib(host)} of {setup.host_memory:g} GiB of host memory")
    if needed.share_lacks:
        lacking.append(
            f"rollout.vllm.memory_share lacks {_gib(needed.share_lacks)} GiB for the weights and one completion: "
            "raise it, or rollout.vllm.tensor_parallel"
        )
    return lacking


def _sampled(shape: Shape, config: TrainConfig, setup: Setup) -> str:
    if config.rollout.engine != "vllm":
        return f"{_rows(config, setup)} completions decoded together to the full length"
    if not colocated(config):
        return "sampled by servers on other GPUs, which are not counted"
    weights, token = vllm_bytes(shape, config)
    tokens = max(0, vllm_share(config, setup) - weights) // token
    return (
        f"sampled by vLLM: its share holds {_gib(weights)} GiB of weights and the keys and values of at most "
        f"{tokens:,} tokens, less what it computes with"
    )


def _shortage(needed: Estimate, setup: Setup) -> float:
    """Bytes that are lacking in all phases and in host memory."""
    host = sum(needed.host.values()) * min(setup.gpus, setup.gpus_per_machine)
    short = [total - setup.gpu_memory * GIB for total in needed.total]
    if setup.host_memory is not None:
        short.append(host - setup.host_memory * GIB)
    short.append(needed.share_lacks)
    return sum(max(0.0, lacking) for lacking in short)


def _rows(config: TrainConfig, setup: Setup) -> int:
    """Completions that are decoded together, at most."""
    return max(prompts * n for prompts, n in batches(config, setup))


def _way(config: TrainConfig, setup: Setup) -> str:
    if setup.fsdp:
        way = "FSDP2"
    elif setup.zero:
        way = f"ZeRO-{setup.zero}"
    else:
        way = "a copy on each (DDP)" if setup.gpus > 1 else "no sharding"
    offload = "" if setup.offload == "none" else f", {setup.offload} in host memory"
    return f"{setup.gpus} GPU{'s' if setup.gpus > 1 else ''} with {way}{offload}, {config.model.dtype}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _print_table(console: Console, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """As Markdown where it is not for a terminal."""
    table = Table(box=box.SIMPLE if console.is_terminal else box.MARKDOWN)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
