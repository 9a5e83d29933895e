"""What test_sampling.py runs in every process of a launch: completions by an engine whose weights are sharded.

    sampling.py train FOLDER

Writes `FOLDER/completions.json`: for each way of gathering and each temperature, record id → token ids.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from spark_vl.config_cli import parse_train_config
from spark_vl.distributed.launch import start_accelerator, strategy
from spark_vl.families.registry import find_family
from spark_vl.policy.update import load_updater
from spark_vl.records import RolloutGroup, Verdict
from spark_vl.rollout import Sampling, load_engine
from tests.conftest import make_image, make_record
from tests.distributed.updates import SETTINGS, run_update

QUESTIONS = ["Which digit is larger?", "Which?", "By how much do the digits differ?"]
PROMPTS = [
    make_record(f"r{i}", *(make_image(10 * i + j) for j in range((1, 0, 2)[i % 3])), QUESTIONS[i % 2]) for i in range(7)
]
"""With one image, with none, with two, and so on."""
SHARES = {1: [[0, 1, 2, 3, 4, 5, 6]], 2: [[0, 2, 3, 4, 5, 6], [1]]}
"""The second of two processes has fewer batches, and no image."""


def completions(groups: list[RolloutGroup]) -> dict[str, list[tuple[int, ...]]]:
    """Of all processes."""
    return dict(gather_object([(group.record.id, [r.token_ids for r in group.rollouts]) for group in groups]))


class Interrupted(Exception):
    """Raised while weights are gathered."""


def interrupt(finished: int) -> None:
    """A progress callback."""
    raise Interrupted


def main(folder: Path) -> None:
    """Sample in all ways, also after an exception; then an update, and sample once more."""
    settings = [*SETTINGS, f"--model.path={folder / 'model'}", "--rollout.decode_batch_size=4", "--objective.beta=0"]
    config = parse_train_config(settings)
    processor = find_family(config.model).load_processor(config.model, max_prompt_tokens=120)
    accelerator = start_accelerator(config, folder)
    updater = load_updater(config, accelerator, processor, updates=10)
    share = SHARES[accelerator.num_processes][accelerator.process_index]
    prompts = [processor.process(PROMPTS[i]) for i in share]
    results = {}

    def held() -> int:
        return sum(parameter.numel() for parameter in accelerator.unwrap_model(updater.policy).parameters())

    before = held()
    for gather in ("phase", "layer"):
        engine = load_engine(
            replace(config, rollout=replace(config.rollout, gather=gather)), accelerator, updater, processor
        )
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature=temperature, max_new_tokens=8, seed=accelerator.process_index)
            groups = engine.generate(prompts, 2, sampling)
            results[f"{gather} {temperature:g}"] = completions(groups)
        assert held() == before
        # One process has nothing to sample at all, and none of the others has an image.
        nothing = [] if accelerator.process_index else [p for p in prompts if not p.images]
        assert len(engine.generate(nothing, 2, sampling)) == len(nothing)

    engine = load_engine(config, accelerator, updater, processor)
    sampling = Sampling(temperature=0.0, max_new_tokens=8)
    try:
        engine.generate(prompts, 2, sampling, interrupt)
        raise AssertionError("the callback was not called")
    except Interrupted:
        pass
    assert held() == before, "the weights are still gathered"
    if strategy(accelerator) == "zero3":
        assert before == 0
    results["after an exception"] = completions(engine.generate(prompts, 2, sampling))
    groups = [group.verified((Verdict(1.0, None), Verdict(0.0, None))) for group in groups]
    by_id = {prompt.record.id: prompt for prompt in prompts}
    norms = []
    run_update(updater, groups, by_id, lambda name, total, n: norms.append(total) if "norm" in name else None)
    results["norm"] = norms[0]
    if accelerator.is_main_process:
        (folder / "completions.json").write_text(json.dumps(results))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[-1]))
