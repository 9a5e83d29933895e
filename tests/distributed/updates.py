"""What test_same_numbers.py and test_mixed_batches.py run in every process of a launch: updates on given batches.

    updates.py train FOLDER

`FOLDER/scenarios.json` maps names to {"settings": command-line settings, "shares": for each process the indices of the
groups that it holds, "updates": how many on the batch}. For each, `NAME.json` (metrics) and `NAME.safetensors` (the
exported weights) are written there.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from spark_vl.advantages import group_advantages
from spark_vl.config_cli import parse_train_config
from spark_vl.distributed.launch import start_accelerator, strategy
from spark_vl.families.base import ProcessedPrompt
from spark_vl.families.registry import find_family
from spark_vl.policy.batch import BatchMaker
from spark_vl.policy.head import TokenScores
from spark_vl.policy.update import Add, Updater, load_updater
from spark_vl.records import Rollout, RolloutGroup, Verdict
from tests.conftest import make_image, make_record
from tests.tiny_families import tiny_family

SETTINGS = (
    *("--data.recipes=[digits]", "--model.dtype=float32", "--model.gradient_checkpointing=false"),
    *("--optimizer.lr=1e-3", "--optimizer.tokens_per_pack=200", "--rollout.max_new_tokens=16"),
    *("--data.max_prompt_tokens=120", "--objective.beta=0.05", "--model.max_pixels=50176", "--model.min_pixels=784"),
)


NAMES = ("update/loss", "update/grad_norm", "update/skipped", "update/kl")
"""Of the metrics that are written down."""


def save_model(folder: Path, family: str = "qwen2_5_vl") -> None:
    """The tiny model of a family with random weights, to `FOLDER/model`."""
    tiny_family(family).save(folder / "model")


def make_groups() -> list[RolloutGroup]:
    """Eight groups of ragged completions: with one image, with several, and without any."""
    rng = random.Random(0)
    groups = []
    for i in range(8):
        images = [make_image(10 * i + j, (56, 56 + 28 * j)) for j in ((1,), (2, 0, 1), ())[i % 3]]
        record = make_record(f"g{i}", *images, "Which digit is larger?" * (1 + i % 2))
        rollouts, verdicts = [], []
        for _ in range(4):
            ids = tuple(rng.randrange(30, 90) for _ in range(rng.randrange(2, 16)))
            rollouts.append(Rollout(ids, (-1.0,) * len(ids), "", "stop"))
            verdicts.append(Verdict(float(rng.random() < 0.5), None))
        groups.append(RolloutGroup(record, tuple(rollouts), tuple(verdicts)))
    return groups


def assert_float32(policy: torch.nn.Module, inputs: tuple[Any, ...], scores: TokenScores) -> None:
    """A hook: no library rounds log-probabilities on their way out."""
    assert scores.logprobs.dtype == torch.float32


def run_update(
    updater: Updater,
    groups: Sequence[RolloutGroup],
    prompts: Mapping[str, ProcessedPrompt],
    add: Add,
    *,
    max_new_tokens: int = 16,
) -> None:
    """One update phase on `groups` of this process, as the loop makes it; `prompts` by record id."""
    normalize = updater.objective.loss != "dr_grpo"
    advantages = [group_advantages(group.rewards, group.correctness, normalize=normalize) for group in groups]
    make_batches = BatchMaker(
        accelerator=updater.accelerator,
        processor=updater.processor,
        objective=updater.objective,
        optimizer=updater.settings,
        max_new_tokens=max_new_tokens,
    )
    batches = make_batches([(prompts[g.record.id], g) for g in groups], advantages, seed="0")
    updater.update(batches, first=0, add=add)


def main(folder: Path) -> None:
    """Run all scenarios."""
    scenarios = json.loads((folder / "scenarios.json").read_text())
    processor, accelerator = None, None
    for name, scenario in scenarios.items():
        config = parse_train_config([*SETTINGS, f"--model.path={folder / 'model'}", *scenario["settings"]])
        # One start for all: an accelerator is one for the life of a process.
        processor = processor or find_family(config.model).load_processor(config.model, max_prompt_tokens=120)
        accelerator = accelerator or start_accelerator(config, folder)
        set_seed(0)  # of the adapters' first weights
        updater = load_updater(config, accelerator, processor, updates=10)
        updater.policy.register_forward_hook(assert_float32)
        groups = make_groups()
        mine = [groups[i] for i in scenario["shares"][accelerator.process_index]]
        prompts = {group.record.id: processor.process(group.record) for group in mine}
        metrics = []
        for _ in range(scenario["updates"]):
            sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

            def add(key: str, total: float, weight: float, sums: dict[str, list[float]] = sums) -> None:
                sums[key][0] += total
                sums[key][1] += weight

            run_update(updater, mine, prompts, add)
            totals = torch.tensor([sums[key] for key in NAMES])
            totals = accelerator.reduce(totals.to(accelerator.device))
            metrics.append((totals[:, 0] / totals[:, 1]).tolist())
        state = accelerator.get_state_dict(updater.policy)
        if accelerator.is_main_process:
            plain = accelerator.unwrap_model(updater.policy).plain_state_dict(state)
            save_file(
                {key: tensor.float().contiguous() for key, tensor in plain.items()}, folder / f"{name}.safetensors"
            )
            (folder / f"{name}.json").write_text(json.dumps(metrics))
        if strategy(accelerator) == "fsdp2":  # Accelerate clips only the model that it prepared first
            accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
