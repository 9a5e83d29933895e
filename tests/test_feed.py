"""What waits between two phases: recycled, taken in batches, refilled in pairs, remembered."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from spark_vl.config import RecycleConfig
from spark_vl.data.problems import FilteredRowError
from spark_vl.log import group_metrics
from spark_vl.records import BadRecordError, RolloutGroup, Verdict
from spark_vl.recycle.difficulty import DifficultyAuc
from spark_vl.rollout import Collector, Sampling
from spark_vl.run.quarantine import TooManyBadRowsError
from tests.conftest import make_record
from tests.distributed.feeding import Records, make_feed, make_groups
from tests.test_recycle import MIXED, RIGHT, WRONG, group, many

PAIRS = RecycleConfig(pairwise_share=0, unanimous_share=0, max_reflection=0)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def feed(accelerator, tmp_path):
    return lambda config, **settings: make_feed(accelerator, tmp_path, config, **settings)


def scored(groups):
    return [(None, each) for each in groups]


def ids(prompts):
    return [prompt.record.id for prompt in prompts]


def test_batches_take_the_oldest_and_fewer_wait(feed):
    config = RecycleConfig(max_judge=10, max_reflection=0, batch=10, pairwise_share=1)
    waits = feed(config)
    waits.recycle(scored(many(MIXED, 6, "first")), 1)
    assert waits.next("recycled") == []
    waits.recycle(scored(many(MIXED, 8, "second")), 2)
    taken = ids(waits.next("recycled"))
    assert len(taken) == 10
    assert sum("first" in each for each in taken) == 6
    assert waits.next("recycled") == []
    waits.recycle(scored(many(MIXED, 6, "third")), 3)
    assert sum("second" in each for each in ids(waits.next("recycled"))) == 4
    assert waits.next("recycled") == []

    # A place that a pair does not fit into goes to a single prompt, and the pair waits.
    odd = feed(replace(config, batch=5, max_judge=5, pairwise_share=0.5))
    odd.recycle(scored(many(MIXED, 40)), 1)
    kinds = Counter(prompt.record.kind for prompt in odd.next("recycled"))
    assert kinds.total() == 5
    assert kinds["pointwise"] % 2 == 0


def test_without_a_batch_all_that_waits_is_taken(feed):
    waits = feed(PAIRS)
    waits.recycle(scored(many(MIXED, 3)), 1)
    assert len(waits.next("both")) == 64 + 6
    assert waits.next("recycled") == []


def test_what_waits_and_the_labels_of_the_last_steps_are_in_the_checkpoint(feed):
    first = feed(PAIRS, refills=("pointwise",))
    for step in (1, 2):
        first.recycle(scored(many(MIXED, 30, str(step))), step)
    state = first.state_dict()
    again = feed(PAIRS, refills=("pointwise",))
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert again.metrics() == first.metrics()
    assert again.metrics()["pointwise/difficulty_auc"] == 0.5
    assert ids(again.next("recycled")) == ids(first.next("recycled"))
    assert ids(again.more("pointwise", 5)) == ids(first.more("pointwise", 5))


def test_another_number_of_processes_is_dealt_whole_pairs(feed):
    first = feed(PAIRS)
    first.recycle(scored(many(MIXED, 16)), 1)
    states = [first.deal_out([first.state_dict()], rank, 3) for rank in range(3)]
    dealt = []
    for state in states:
        part = feed(PAIRS)
        part.load_state_dict(state)
        prompts = part.next("recycled")
        pairs = Counter(prompt.record.origin.pair for prompt in prompts)
        assert set(pairs.values()) == {2}
        dealt += ids(prompts)
        assert part.metrics()["pointwise/difficulty_auc"] == 0.5
    assert sorted(dealt) == sorted(ids(first.next("recycled")))


def test_a_prompt_that_cannot_be_used_takes_the_other_of_its_pair_with_it(feed):
    class TooLong(Records):
        def process(self, record):
            if record.id == bad:
                raise BadRecordError(record.id, "too long")
            return super().process(record)

    groups = many(MIXED, 5)
    bad = f"{groups[2].record.id}@1#pointwise_correct"
    waits = feed(PAIRS, processor=TooLong())
    waits.recycle(scored(groups), 1)
    kept = ids(waits.next("recycled"))
    assert len(kept) == 8
    assert not any(each.startswith(groups[2].record.id + "@") for each in kept)
    assert waits.counts()["quarantined_prompts"] == 2


def test_more_gives_whole_pairs_up_to_the_number_asked_for(feed):
    waits = feed(replace(PAIRS, max_judge=4), refills=("pointwise",))
    waits.recycle(scored(many(MIXED, 6)), 1)
    first, second = waits.more("pointwise", 5), waits.more("pointwise", 99)
    assert (len(first), len(second)) == (4, 4)
    assert waits.more("pointwise", 99) == waits.more("reflection", 9) == []
    pairs = Counter(prompt.record.origin.pair for prompt in first + second)
    assert set(pairs.values()) == {2}
    # Nothing is written that nobody may ask for.
    unasked = feed(replace(PAIRS, max_judge=4))
    unasked.recycle(scored(many(MIXED, 6)), 1)
    assert unasked.more("pointwise", 99) == []


def test_counts_of_a_phase_without_problems_and_of_no_recycling(feed):
    waits = feed(replace(PAIRS, max_judge=999))
    assert waits.recycle(scored(make_groups(1)), 1)["judge_unfilled"] > 900
    assert not any(waits.recycle([], 1).values())
    assert feed(RecycleConfig(schedule="none")).recycle(scored(make_groups(1)), 1) == {}


# ── refilling pairs ──


def judged(scores_of_pairs, prefix=""):
    """Groups of matched pairs: [pairs][2] lists of scores."""
    chosen = []
    for i, pair in enumerate(scores_of_pairs):
        for side, scores in zip((True, False), pair, strict=True):
            source = group(scores, name=f"{prefix}{i}{side}", kind="pointwise")
            origin = replace(source.record.origin, pair=f"{prefix}{i}", quoted_correct=side, parent_id=f"{prefix}{i}")
            chosen.append(replace(source, record=replace(source.record, origin=origin)))
    return chosen


def test_refilling_replaces_a_pair_as_a_whole_by_one_with_more_variance(accelerator):
    def timed(name):
        return nullcontext()

    asked = []
    collector = Collector(
        engine=None,
        verifiers=None,
        accelerator=accelerator,
        log=SimpleNamespace(timed=timed),
        sampling=Sampling(),
        n=4,
        refill_rounds={"pointwise": 2},
        refused=None,
    )
    fresh = [
        judged([(RIGHT, WRONG), (MIXED, RIGHT), (MIXED, MIXED)], "fresh"),
        judged([(MIXED, MIXED)], "later"),
    ]

    def more(kind, n):
        asked.append((kind, n))
        return fresh[len(asked) - 1]

    collector.sample_and_verify = lambda prompts, *, seed: scored(prompts)
    start = judged([(MIXED, RIGHT), (MIXED, MIXED), (WRONG, WRONG), (RIGHT, WRONG)])
    sampled, chosen = collector.refill(scored(start), more, seed="s")
    # Three of the four pairs can be better; after the first round two still can.
    assert asked == [("pointwise", 6), ("pointwise", 4)]
    assert len(sampled) == 8 + 6 + 2
    pairs = [each.record.origin.pair for _, each in chosen]
    assert pairs[0::2] == pairs[1::2]
    assert pairs[0::2] == ["later0", "1", "fresh2", "fresh1"]
    assert sum(each.zero_variance for _, each in chosen) == 1
    assert [each.record.origin.quoted_correct for _, each in chosen] == [True, False] * 4


# ── metrics ──


def test_both_right_is_about_matched_pairs():
    groups = judged([([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]), (RIGHT, RIGHT)])
    couple = judged([(RIGHT, RIGHT)], "couple")
    couple[1] = replace(
        couple[1], record=replace(couple[1].record, origin=replace(couple[1].record.origin, parent_id="x"))
    )
    means = group_metrics(groups + couple + many(MIXED, 2)).result()
    assert means["pointwise/both_right"] == pytest.approx((0.75 * 0.25 + 1) / 2)
    assert "pointwise/both_right" not in group_metrics(couple).result()


def test_the_area_looks_back_twenty_steps():
    area = DifficultyAuc()
    assert area.value is None
    area.add(1, [(0.9, False), (0.1, True)])
    assert area.value == 0.0
    for step in range(2, 21):
        area.add(step, [(0.9, True), (0.1, False)])
    assert 0.9 < area.value < 1
    area.add(21, [])
    assert area.value == 1.0
    again = DifficultyAuc()
    again.load_state_dict(area.state_dict())
    assert again.state_dict() == area.state_dict()


def test_groups_of_a_failing_verifier_are_quarantined_once(feed):
    waits = feed(PAIRS)
    broken = RolloutGroup(group(WRONG).record, group(WRONG).rollouts, (Verdict(0.0, None, "error", "it broke"),) * 4)
    assert waits.recycle(scored([broken]), 1)["rollouts_unverified"] == 4
    assert waits.counts()["quarantined"] == 1


# ── rows that the recipe leaves out ──


class Rows:
    """Stands in for a sampler: two rows are bad, odd ones are left out."""

    roots = frozenset()
    verifiers = frozenset()
    recipes = frozenset({"test"})
    fingerprints = ()
    epoch = 0.0
    rows = 10

    def __init__(self, *, filters=True):
        self.filters, self.place = filters, 0

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row in (0, 10):
            raise BadRecordError("test/0", "bad")
        if row % 2 and self.filters:
            raise FilteredRowError(f"test/{row}", "too small")
        return make_record(f"test/{row}", "?")

    def draw(self, counts, rank=0):
        first = self.place + sum(counts[:rank])
        self.place += sum(counts)
        return list(range(first, first + counts[rank]))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state, *, anew=False):
        self.place = state["place"]


def test_rows_left_out_are_replaced_and_counted_and_not_bad(feed):
    waits = feed(PAIRS)
    waits.sampler = Rows()
    assert ids(waits.more("problem", 4)) == ["test/2", "test/4", "test/6", "test/8"]
    assert waits.counts() == {"quarantined": 1, "quarantined_prompts": 0, "filtered": 4}
    assert waits.quarantine.rows_seen == 5
    state = waits.state_dict()
    again = feed(PAIRS)
    again.sampler = Rows()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert ids(again.more("problem", 4)) == ids(waits.more("problem", 4))
    assert again.counts() == waits.counts() == {"quarantined": 2, "quarantined_prompts": 0, "filtered": 9}
    here = again.state_dict()
    again.next("both")
    assert again.counts()["filtered"] > 60
    again.rewind()
    assert again.state_dict() == here
    parts = [feed(PAIRS).deal_out([state, state], rank, 3)["filtered"] for rank in range(3)]
    assert parts == [8, 0, 0]
    del state["filtered"]  # as a checkpoint of an earlier version has it
    again.load_state_dict(state)
    assert again.counts()["filtered"] == 0


def test_without_a_filter_there_is_no_count_of_it(feed):
    assert feed(PAIRS).counts().keys() == {"quarantined", "quarantined_prompts"}


def test_a_filter_that_leaves_nothing_stops_the_run(feed):
    class Nothing(Rows):
        def __getitem__(self, row):
            return super().__getitem__(1)

    waits = feed(PAIRS)
    waits.sampler = Nothing()
    with pytest.raises(TooManyBadRowsError, match="none of 11 rows can be used: test/1: too small"):
        waits.more("problem", 1)
