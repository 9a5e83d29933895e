"""Groups as a run samples them: problems with images, and what is recycled from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from spark_vl.config import RecycleConfig
from spark_vl.data.images import load_image
from spark_vl.data.judgments import CONFIGS
from spark_vl.prompts import Templater
from spark_vl.records import ImageRef, PromptRecord, Rollout, RolloutGroup, Verdict
from spark_vl.recycle import Recycled, recycle
from spark_vl.run.shards import ShardWriter

TEMPLATER = Templater.load(system_prompt="Be exact.")
UNCAPPED = RecycleConfig(max_judge=1000, max_reflection=1000)
LICENSES = {"r": "MIT", "s": "CC-BY-4.0"}


def picture(seed: int, format: str = "PNG", size: tuple[int, int] = (12, 8)) -> ImageRef:
    """Noise, in a file that `encode_image` would not give: it has metadata."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, dpi=(72, 72))
    return ImageRef(data=buffer.getvalue())


def problem(name: str, *question: str | ImageRef, recipe: str = "r", gold: str = "5", **fields) -> PromptRecord:
    """A problem as a recipe gives it."""
    question = question or (picture(sum(name.encode())), f"What is {name}?")
    return PromptRecord(
        id=f"{recipe}/train/{name}",
        kind="problem",
        messages=TEMPLATER.problem(question),
        question=question,
        gold=gold,
        verifier=fields.pop("verifier", "number"),
        recipe=recipe,
        license=LICENSES[recipe],
        **fields,
    )


def sampled(record: PromptRecord, scores: Sequence[float], text: str = "") -> RolloutGroup:
    """A verified group; rollout i thinks about i, and then boxes the gold or -i."""
    rollouts, verdicts = [], []
    for i, score in enumerate(scores):
        answer = record.gold if score == 1 else f"-{i + 1}"
        rollouts.append(Rollout((7, 8), (-0.5, -0.25), rf"Idea {i} of {record.id}. {text}\boxed{{{answer}}}", "stop"))
        verdicts.append(Verdict(float(score), answer))
    return RolloutGroup(record, tuple(rollouts), tuple(verdicts))


def recycled(groups: Sequence[RolloutGroup], *, step: int, config: RecycleConfig = UNCAPPED, seed: int = 0) -> Recycled:
    return recycle(groups, TEMPLATER, config, step=step, seed=seed)


def a_run(steps: int, problems: int = 4) -> dict[int, list[RolloutGroup]]:
    """Step (from 1) → its groups, as the merged schedule samples them: problems, and what the last step gave."""
    groups: dict[int, list[RolloutGroup]] = {}
    waiting: list[PromptRecord] = []
    for step in range(1, steps + 1):
        drawn = [problem(f"p{(step * problems + i) % 11}", recipe="rs"[i % 2]) for i in range(problems)]
        solved = [sampled(record, [(i + j + step) % 3 == 0 for j in range(4)]) for i, record in enumerate(drawn)]
        groups[step] = solved + [sampled(record, (1, 0)) for record in waiting]
        once_more = recycled(solved, step=step)
        waiting = once_more.judge + once_more.reflection
    return groups


def make_writer(folder: Path, **settings) -> ShardWriter:
    defaults = {"rank": 0, "model": "org/model", "model_revision": None, "resumed": None}
    return ShardWriter(folder, **(defaults | settings))


def write(folder: Path, groups: dict[int, list[RolloutGroup]], **settings) -> Path:
    """`groups` as the shards of one process, and a card that names them as `datasets` wants it."""
    writer = make_writer(folder, **settings)
    for step, of_step in groups.items():
        for group in of_step:
            writer.add(step, group)
    writer.flush()
    configs = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": f"{config}/{split}-*.parquet"}
                for split in ("train", "test")
                if list((folder / config).glob(f"{split}-*"))
            ],
        }
        for config in CONFIGS
        if (folder / config).is_dir()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def pixels(refs: Sequence[ImageRef]) -> list[bytes]:
    return [image.tobytes() + str(image.size).encode() for image in map(load_image, refs)]


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of every file, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
