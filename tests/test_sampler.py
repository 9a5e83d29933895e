"""The stream of prompts: every row once an epoch, shared out between ranks, resumed anywhere."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_vl.data.problems import ProblemSet
from spark_vl.data.recipes import Columns, Recipe
from spark_vl.data.sampler import PromptSampler
from spark_vl.data.sources import Source
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError

TEMPLATER = Templater.load()


def problem_set(name: str, size: int, bad: tuple[int, ...] = ()) -> ProblemSet:
    rows = [{"q": f"{name} {n}", "a": "" if n in bad else "1"} for n in range(size)]
    recipe = Recipe(name, "", "", Source("factory", "m:f"), {"train": "train"}, Columns("q", "a"), "math")
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
