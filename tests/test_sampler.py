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
    return [sampler.draw().id for _ in range(count)]


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
@given(rows=st.integers(1, 23), world_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_ranks_share_the_stream_and_drop_nothing(rows: int, world_size: int, seed: int) -> None:
    alone = draw(PromptSampler([problem_set("a", rows)], seed=seed), 6 * world_size)
    ranks = [
        PromptSampler([problem_set("a", rows)], seed=seed, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert list(chain.from_iterable(zip(*(draw(rank, 6) for rank in ranks), strict=True))) == alone


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 23), world_size=st.integers(1, 5), before=st.integers(0, 30))
def test_a_resumed_stream_goes_on_exactly(rows: int, world_size: int, before: int) -> None:
    for rank in range(world_size):
        sampler, resumed = (
            PromptSampler([problem_set("a", rows)], seed=1, rank=rank, world_size=world_size) for _ in range(2)
        )
        draw(sampler, before)
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        assert resumed.epoch == sampler.epoch
        assert draw(resumed, 30) == draw(sampler, 30)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 23), old=st.integers(1, 5), new=st.integers(1, 5), before=st.integers(0, 9))
def test_the_number_of_ranks_may_change_on_resume(rows: int, old: int, new: int, before: int) -> None:
    """Together, the ranks before and after draw what one process draws."""
    was = [PromptSampler([problem_set("a", rows)], seed=1, rank=r, world_size=old) for r in range(old)]
    first = list(chain.from_iterable(zip(*(draw(rank, before) for rank in was), strict=True)))
    state = was[0].state_dict()
    assert all(rank.state_dict() == state for rank in was)
    now = [PromptSampler([problem_set("a", rows)], seed=1, rank=r, world_size=new) for r in range(new)]
    for rank in now:
        rank.load_state_dict(state)
    rest = list(chain.from_iterable(zip(*(draw(rank, 5) for rank in now), strict=True)))
    assert first + rest == draw(PromptSampler([problem_set("a", rows)], seed=1), old * before + new * 5)


def test_a_bad_row_is_passed_over_and_resume_does_not_return_to_it() -> None:
    sampler = PromptSampler([problem_set("a", 6, bad=(2,))], seed=0)
    drawn: list[str] = []
    states: list[dict[str, Any]] = []
    for _ in range(12):
        try:
            drawn.append(sampler.draw().id)
        except BadRecordError as error:
            drawn.append(error.record_id)
        states.append(sampler.state_dict())
    assert Counter(drawn) == dict.fromkeys(ids(("a", 6)), 2)
    at = drawn.index("a/train/#2")
    resumed = PromptSampler([problem_set("a", 6, bad=(2,))], seed=0)
    resumed.load_state_dict(states[at])
    assert resumed.draw().id == drawn[at + 1]


def test_the_epoch_counts_what_all_ranks_drew() -> None:
    sampler = PromptSampler([problem_set("a", 8)], seed=0, rank=1, world_size=2)
    assert sampler.epoch == 0
    draw(sampler, 6)
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
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        PromptSampler([problem_set("a", 3)], seed=0, rank=2, world_size=2)
    assert draw(PromptSampler([problem_set("a", 0), problem_set("b", 2)], seed=0), 2)
