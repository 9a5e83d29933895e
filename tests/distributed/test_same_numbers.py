"""Whoever holds the weights, an update on the same batch gives the same loss, gradient and weights.

The truth is one process. Tolerances: sums over tokens are made in another order, so float32 results differ by its
rounding: loss and gradient norm to 1e-6 (seen: 3e-7). An AdamW update divides each gradient by its own size, so where
a gradient is next to nothing its rounding counts: the movement of a parameter differs by up to 1e-3 (seen: 2e-4).
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed import feeding
from tests.distributed.launching import launch
from tests.distributed.updates import save_model
from tests.tiny_families import TINY

pytestmark = pytest.mark.distributed

ALL = list(range(8))
# Groups 0, 3 and 6 show one image, 1, 4 and 7 several, 2 and 5 none (updates.make_groups).
EVEN = [[0, 1, 2, 3], [4, 5, 6, 7]]
SCENARIOS = {
    "start": {"settings": [], "shares": EVEN, "updates": 0},
    "even": {"settings": [], "shares": EVEN, "updates": 2},
    "more_packs": {"settings": ["--optimizer.tokens_per_pack=140"], "shares": EVEN, "updates": 2},
    "no_image_on_one": {"settings": [], "shares": [[0, 1, 3, 4, 6, 7], [2, 5]], "updates": 2},
    "nothing_on_one": {"settings": [], "shares": [ALL, []], "updates": 2},
    "nothing_on_the_main_one": {
        "settings": ["--objective.loss=dapo", "--optimizer.weight_decay=1"],
        "shares": [[], ALL],
        "updates": 2,
    },
    "frozen_vision": {"settings": ["--model.freeze=[vision]"], "shares": EVEN, "updates": 2},
    "adapters": {"settings": ["--model.lora.rank=4"], "shares": [[0, 1, 2], [3, 4, 5, 6, 7]], "updates": 2},
    "checkpointing": {"settings": ["--model.gradient_checkpointing=true"], "shares": EVEN, "updates": 2},
}


def run(folder: Path, n: int, strategy: str, scenarios: dict, family: str = "qwen2_5_vl") -> Path:
    """Run `scenarios` on `n` processes."""
    folder.mkdir()
    save_model(folder, family)
    if n == 1:
        scenarios = {name: s | {"shares": [sorted(chain(*s["shares"]))]} for name, s in scenarios.items()}
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    ended = launch(n, strategy, str(folder), module="tests.distributed.updates", deadline_s=600.0)
    assert ended.returncode == 0, ended.stdout[-5000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """What one process computes."""
    return run(tmp_path_factory.mktemp("one") / "run", 1, "single", SCENARIOS)


def assert_same_numbers(folder: Path, truth: Path, name: str, *, rel: float, movement: float) -> None:
    """Metrics to `rel`, and how each parameter has moved to `movement`, both relative."""
    found, expected = (json.loads((path / f"{name}.json").read_text()) for path in (folder, truth))
    for (loss, norm, skipped, kl), (true_loss, true_norm, _, true_kl) in zip(found, expected, strict=True):
        # On-policy the first loss is 0, the rest of a sum of terms of size 1.
        assert loss == pytest.approx(true_loss, rel=rel, abs=rel)
        assert norm == pytest.approx(true_norm, rel=rel)
        assert kl == pytest.approx(true_kl, rel=rel, abs=rel)
        assert true_norm > 0.1
        assert skipped == 0
    weights, true_weights = (load_file(path / f"{name}.safetensors") for path in (folder, truth))
    start = load_file(truth / "start.safetensors")
    assert weights.keys() == true_weights.keys() == start.keys()
    for key, weight in weights.items():
        moved = float((true_weights[key] - start[key]).norm())
        assert float((weight - true_weights[key]).norm()) <= movement * moved, key
    assert any((true_weights[key] != start[key]).any() for key in start)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_two_processes_give_the_numbers_of_one(tmp_path, one_process, strategy):
    folder = run(tmp_path / "run", 2, strategy, SCENARIOS)
    for name in SCENARIOS.keys() - {"start"}:
        assert_same_numbers(folder, one_process, name, rel=1e-6, movement=1e-3)


OTHER_FAMILIES = [tiny.model_type for tiny in TINY if tiny.merged_patch and tiny.model_type != "qwen2_5_vl"]


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def other_family(request, tmp_path_factory) -> tuple[str, dict, Path]:
    """A family, some scenarios, and what one process computes."""
    names = ("start", "no_image_on_one", "nothing_on_one", "frozen_vision", "adapters", "checkpointing")
    scenarios = {name: SCENARIOS[name] for name in names}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, scenarios, run(folder, 1, "single", scenarios, request.param)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_processes_give_the_numbers_of_one_for_other_families(tmp_path, other_family, strategy):
    family, scenarios, truth = other_family
    """Their models have more layers, so more is rounded (seen: 1.5e-6 of the norm, 6e-4 of a movement)."""
    folder = run(tmp_path / "run", 2, strategy, scenarios, family)
    for name in scenarios.keys() - {"start"}:
        assert_same_numbers(folder, truth, name, rel=3e-6, movement=1e-3)


def test_where_packs_are_cut_and_what_is_checkpointed_changes_no_number(one_process):
    for name in ("more_packs", "no_image_on_one", "checkpointing"):  # on one process all hold the same groups
        found, expected = (json.loads((one_process / f"{each}.json").read_text()) for each in (name, "even"))
        assert [*chain(*found)] == pytest.approx([*chain(*expected)], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bfloat16_stays_near(tmp_path, one_process, strategy):
    # 8 bits of mantissa, through a dozen layers: a few percent.
    low = {"bfloat16": SCENARIOS["even"] | {"settings": ["--model.dtype=bfloat16"], "updates": 1}}
    folder = run(tmp_path / "run", 2, strategy, low)
    [[loss, norm, skipped, kl]] = json.loads((folder / "bfloat16.json").read_text())
    [_, expected, _, _] = json.loads((one_process / "even.json").read_text())[0]
    assert loss == pytest.approx(0.0, abs=1e-3)
    assert norm == pytest.approx(expected, rel=0.1)
    assert norm != pytest.approx(expected, rel=1e-6), "that was float32"
    assert kl == pytest.approx(0.0, abs=1e-6), "the reference computes otherwise than the policy"
    assert skipped == 0


@pytest.mark.slow
def test_an_optimizer_in_host_memory_gives_the_same_numbers(tmp_path, one_process):
    """DeepSpeed compiles its AdamW for CPUs first."""
    folder = run(tmp_path / "run", 2, "zero3_offload", {name: SCENARIOS[name] for name in ("even", "adapters")})
    for name in ("even", "adapters"):
        assert_same_numbers(folder, one_process, name, rel=1e-5, movement=1e-2)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_updates_in_parts_do_not_wait_for_a_process_that_has_fewer(tmp_path, strategy):
    parts = {
        "parts": {
            "settings": ["--optimizer.updates_per_batch=3", "--optimizer.tokens_per_pack=140"],
            "shares": [[0, 1, 3, 4, 5, 6, 7], [2]],
            "updates": 2,
        }
    }
    folder = run(tmp_path / "run", 2, strategy, parts)
    for _loss, norm, skipped, _kl in json.loads((folder / "parts.json").read_text()):
        assert 0 < norm < float("inf")
        assert skipped == 0


def test_any_number_of_processes_recycles_what_one_does(tmp_path):
    """The same prompts, written alike, with their images; each process gets as many; pairs stay together."""
    found = {}
    for n in (1, 2, 4):
        folder = tmp_path / str(n)
        folder.mkdir()
        ended = launch(n, "single" if n == 1 else "ddp", str(folder), module="tests.distributed.feeding")
        assert ended.returncode == 0, ended.stdout[-5000:]
        for name in feeding.SETTINGS:
            seen = [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(n)]
            assert all(each["metrics"] == seen[0]["metrics"] for each in seen)
            for step in range(feeding.STEPS):
                dealt = [[json.loads(record) for record in each["dealt"][step]] for each in seen]
                loads = [len(records) for records in dealt]
                assert max(loads) - min(loads) <= 3
                for records in dealt:
                    pairs = Counter(record["origin"]["pair"] for record in records if record["origin"]["pair"])
                    assert set(pairs.values()) <= {2}
            found[n, name] = [
                {
                    "dealt": sorted(chain(*(each["dealt"][step] for each in seen))),
                    "surplus": sorted(chain(*(each["surplus"][step] for each in seen))),
                    "counts": sum((Counter(each["counts"][step]) for each in seen), Counter()),
                    "metrics": seen[0]["metrics"][step],
                }
                for step in range(feeding.STEPS)
            ]
    for name in feeding.SETTINGS:
        assert found[2, name] == found[4, name] == found[1, name]
        assert sum(len(step["dealt"]) for step in found[1, name]) >= 36
    assert [len(step["dealt"]) for step in found[1, "released"]] == [18] * 3
    assert found[1, "matched"][2]["surplus"], "there were no more than the caps allow"
