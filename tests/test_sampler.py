"""The stream of prompts: every row once an epoch, shared out between ranks, resumed anywhere."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_vl.data.problems import ProblemSet, data_changes
from spark_vl.data.recipes import Columns, Recipe
from spark_vl.data.sampler import PromptSampler
from spark_vl.data.sources import Source
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError

TEMPLATER = Templater.load()


def problem_set(name: str, size: int, bad: tuple[int, ...] = (), weight: float = 1.0) -> ProblemSet:
    rows = [{"q": f"{name} {n}", "a": "" if n in bad else "1"} for n in range(size)]
    source = Source("factory", "m:f")
    recipe = Recipe(name, "", "", source, {"train": "train"}, Columns("q", "a"), "math", per_epoch=weight)
    return ProblemSet(recipe, "train", TEMPLATER, rows, None)


def ids(*sizes: tuple[str, int]) -> list[str]:
    return [f"{name}/train/#{n}" for name, size in sizes for n in range(size)]


def draw(sampler: PromptSampler, count: int) -> list[str]:
    return [sampler[row].id for row in sampler.draw([count])]


def test_every_row_once_an_epoch_in_a_new_order_each() -> None:
    sampler = PromptSampler([problem_set("a", 7), problem_set("b", 1), problem_set("c", 12)], seed=3)
    epochs = [draw(sampler, 20) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(ids(("a", 7), ("b", 1), ("c", 12)))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != ids(("a", 7), ("b", 1), ("c", 12))


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (PromptSampler([problem_set("a", 50)], seed=seed) for seed in (1, 1, 2))
    order = draw(first, 120)
    assert draw(again, 120) == order
    assert draw(other, 120) != order


def test_shuffling_is_even() -> None:
    """Each of 4 rows opens about a quarter of the epochs."""
    sampler = PromptSampler([problem_set("a", 4)], seed=0)
    openers = Counter(draw(sampler, 4)[0] for _ in range(2000))
    assert len(openers) == 4
    assert all(abs(count - 500) < 100 for count in openers.values())  # 5 standard deviations


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 23), shares=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=6))
def test_processes_share_the_stream_and_drop_nothing(rows: int, shares: list[list[int]]) -> None:
    """However different their parts are, together they draw what one process draws."""
    ranks = [PromptSampler([problem_set("a", rows)], seed=1) for _ in range(3)]
    together = []
    for counts in shares:
        parts = [sampler.draw(counts, rank) for rank, sampler in enumerate(ranks)]
        assert [len(part) for part in parts] == counts
        together += chain.from_iterable(parts)
    alone = PromptSampler([problem_set("a", rows)], seed=1)
    assert together == alone.draw([len(together)])
    assert all(sampler.state_dict() == alone.state_dict() for sampler in ranks)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 23), before=st.integers(0, 30))
def test_a_resumed_stream_goes_on_exactly(rows: int, before: int) -> None:
    sampler, resumed = (PromptSampler([problem_set("a", rows)], seed=1) for _ in range(2))
    draw(sampler, before)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.epoch == sampler.epoch
    assert draw(resumed, 30) == draw(sampler, 30)


def test_a_bad_row_is_passed_over_and_resume_does_not_return_to_it() -> None:
    sampler = PromptSampler([problem_set("a", 6, bad=(2,))], seed=0)
    drawn: list[str] = []
    states: list[dict[str, Any]] = []
    for _ in range(12):
        [row] = sampler.draw([1])
        try:
            drawn.append(sampler[row].id)
        except BadRecordError as error:
            drawn.append(error.record_id)
        states.append(sampler.state_dict())
    assert Counter(drawn) == dict.fromkeys(ids(("a", 6)), 2)
    at = drawn.index("a/train/#2")
    resumed = PromptSampler([problem_set("a", 6, bad=(2,))], seed=0)
    resumed.load_state_dict(states[at])
    assert draw(resumed, 1) == drawn[at + 1 : at + 2]


def test_the_epoch_counts_what_all_processes_drew() -> None:
    sampler = PromptSampler([problem_set("a", 8)], seed=0)
    assert sampler.epoch == 0
    sampler.draw([4, 8], 1)
    assert sampler.epoch == 1.5
    assert sampler.state_dict() == {"seed": 0, "rows": 8, "epoch": 1, "position": 4}


def test_a_state_of_other_data_is_refused() -> None:
    state = PromptSampler([problem_set("a", 8)], seed=0).state_dict()
    with pytest.raises(ValueError, match="rows 8, but rows is 9 now"):
        PromptSampler([problem_set("a", 9)], seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, but seed is 1 now"):
        PromptSampler([problem_set("a", 8)], seed=1).load_state_dict(state)


def test_nothing_to_draw_from_is_refused() -> None:
    for sets in ([], [problem_set("a", 0)]):
        with pytest.raises(ValueError, match="no problems"):
            PromptSampler(sets, seed=0)
    assert draw(PromptSampler([problem_set("a", 0), problem_set("b", 2)], seed=0), 2)


def test_an_epoch_that_begins_anew_misses_no_row() -> None:
    sampler = PromptSampler([problem_set("a", 8)], seed=0)
    sampler.draw([21])
    changed = PromptSampler([problem_set("a", 9)], seed=1)
    changed.load_state_dict(sampler.state_dict(), anew=True)
    assert changed.epoch == 2.0
    assert sorted(draw(changed, 9)) == ids(("a", 9))


# ── weights ──

MIXTURE = {"a": (7, 1.0), "b": (4, 2.5), "c": (12, 0.25)}
"""Recipe → rows, weight: 7 + 4 · 2 + 2 + 3 draws an epoch."""


def mixture(seed: int = 3, **changed: tuple[int, float]) -> PromptSampler:
    return PromptSampler(
        [problem_set(name, rows, weight=weight) for name, (rows, weight) in (MIXTURE | changed).items()], seed=seed
    )


def test_without_weights_the_order_is_what_it_was_before_there_were_any() -> None:
    sampler = PromptSampler([problem_set("a", 7), problem_set("b", 12)], seed=5)
    before = [int(row) for epoch in range(3) for row in np.random.default_rng([5, epoch]).permutation(19)]
    assert sampler.draw([57]) == before


def test_rows_are_drawn_as_often_as_their_weight_says() -> None:
    sampler = mixture()
    assert len(sampler) == 20
    epochs = [Counter(draw(sampler, 20)) for _ in range(400)]
    assert sampler.epoch == 400
    for drawn in epochs:
        assert Counter(drawn[row] for row in ids(("a", 7))) == {1: 7}
        assert Counter(drawn[row] for row in ids(("b", 4))) == {2: 2, 3: 2}
        assert Counter(drawn[row] for row in ids(("c", 12))) == {0: 9, 1: 3}
    for name, (rows, weight) in MIXTURE.items():
        # Of 400 draws with p ≤ 1/2, 5 standard deviations are 50.
        assert all(abs(sum(epoch[row] for epoch in epochs) - 400 * weight) < 50 for row in ids((name, rows)))
    chosen = {frozenset(row for row in ids(("c", 12)) if epoch[row]) for epoch in epochs}
    assert len(chosen) > 150  # of 220


def test_draws_of_one_row_are_spread_over_the_epoch() -> None:
    twice = PromptSampler([problem_set("a", 50, weight=2)], seed=0)
    order = draw(twice, 100)
    assert Counter(order) == dict.fromkeys(ids(("a", 50)), 2)
    assert len(set(order[:50])) < 50


@settings(max_examples=50, deadline=None)
@given(before=st.integers(0, 70), counts=st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_a_weighted_stream_goes_on_exactly_and_is_shared(before: int, counts: list[int]) -> None:
    sampler = mixture()
    sampler.draw([before])
    state = json.loads(json.dumps(sampler.state_dict()))
    assert (state["rows"], state["epoch"], state["position"]) == (20, before // 20, before % 20)
    together = sampler.draw([sum(counts)])
    resumed = [mixture() for _ in counts]
    for each in resumed:
        each.load_state_dict(state)
    assert [row for rank, each in enumerate(resumed) for row in each.draw(counts, rank)] == together


def test_a_state_of_other_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="rows 20, but rows is 23 now"):
        mixture(c=(12, 0.5)).load_state_dict(mixture().state_dict())
    old, new = mixture().fingerprints, mixture(a=(7, 2.0), b=(4, 0.75)).fingerprints
    assert data_changes(old, new) == ["a: weight: 1.0 → 2.0", "b: weight: 2.5 → 0.75"]
    del old[0]["weight"]  # as a checkpoint of an earlier version has it
    assert data_changes(old, mixture().fingerprints) == []


def test_a_weight_that_asks_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe c: weight: 0\.04 of 12 rows asks none in an epoch"):
        mixture(c=(12, 0.04))
    assert len(mixture(c=(12, 0.05))) == 18
