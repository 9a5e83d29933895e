"""What test_same_numbers.py runs in every process of a launch: recycling the groups of two steps, without a model.

    feeding.py train FOLDER

`SETTINGS` names what is recycled how. For each, every process writes `NAME.rank….json`: for each phase the JSON of the
records that it was dealt, and of what was left for dynamic sampling; its part of the counts; and the metrics.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed

from spark_vl.config import DataConfig, RecycleConfig
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.data.sampler import PromptSampler
from spark_vl.families.base import ProcessedPrompt
from spark_vl.feed import PromptFeed
from spark_vl.prompts import Templater
from spark_vl.records import Rollout, RolloutGroup, Verdict
from spark_vl.run.codec import record_to_json
from spark_vl.run.quarantine import Quarantine
from tests.conftest import make_image, make_record

SETTINGS = {
    "matched": RecycleConfig(max_judge=12, max_reflection=6),
    "whole": RecycleConfig(max_judge=99, max_reflection=99, judge_sees="mixed", unanimous_share=0.3),
    "released": RecycleConfig(max_judge=12, max_reflection=6, batch=18, pointwise="one_per_group", a_is_correct=True),
}
STEPS, GROUPS = 3, 24


class Records:
    """Stands in for a processor: its prompts are empty. What a process decodes is not what is tested here."""

    def process(self, record):
        return ProcessedPrompt(input_ids=None, position_ids=None, images=(), record=record)

    def forget_images(self):
        pass


def make_groups(step: int) -> list[RolloutGroup]:
    """Verified groups of problems with images; mixed ones are common."""
    rng = random.Random(step)
    groups = []
    for i in range(GROUPS):
        record = make_record(f"test/{step}-{i}", make_image(100 * step + i), f"Question {i}?")
        p = rng.betavariate(0.8, 0.8)
        right = [rng.random() < p for _ in range(6)]
        rollouts = tuple(Rollout((1,), (0.0,), rf"So \boxed{{{5 if r else -j}}}", "stop") for j, r in enumerate(right))
        groups.append(RolloutGroup(record, rollouts, tuple(Verdict(float(r), None) for r in right)))
    return groups


def make_feed(accelerator: Accelerator, folder: Path, config: RecycleConfig, **settings: Any) -> PromptFeed:
    """The feed of this process."""
    templater = Templater.load()
    return PromptFeed(
        PromptSampler([open_recipe(load_recipe("digits"), "train", templater)], seed=0),
        settings.pop("processor", Records()),
        templater,
        Quarantine(folder / f"quarantine.rank{accelerator.process_index}.jsonl", 0.05),
        accelerator,
        DataConfig(),
        config,
        seed=0,
        **settings,
    )


def as_text(record) -> str:
    """All of a record but its images, which are given as their digests, as JSON."""
    data = record_to_json(record)
    data["images"] = [hashlib.sha256(ref.data).hexdigest() for ref in record.images]
    return json.dumps(
        {name: value for name, value in data.items() if name not in ("messages", "question")}
        | {"text": [[part for part in m.content if isinstance(part, str)] for m in record.messages]}
    )


def main(folder: Path) -> None:
    PartialState(cpu=True)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    rank, processes = accelerator.process_index, accelerator.num_processes
    for name, config in SETTINGS.items():
        feed = make_feed(accelerator, folder, config, refills=("pointwise",))
        seen: dict[str, Any] = {"dealt": [], "surplus": [], "counts": [], "metrics": []}
        for step in range(1, STEPS + 1):
            groups = make_groups(step)
            # The shares are not alike, and one process has none in the first step.
            cuts = [0] if step == 1 and processes > 1 else []
            cuts += [round(GROUPS * (i / processes) ** 1.5) for i in range(len(cuts), processes)] + [GROUPS]
            mine = groups[cuts[rank] : cuts[rank + 1]]
            seen["counts"].append(feed.recycle([(None, group) for group in mine], step))
            seen["dealt"].append([as_text(prompt.record) for prompt in feed.next("recycled")])
            seen["surplus"].append([as_text(prompt.record) for prompt in feed.more("pointwise", 999)])
            seen["metrics"].append({k: v for k, v in feed.metrics().items() if k != "data/epoch"})
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
