"""Which prompts a step recycles: decided over the candidates of all processes, the same on each of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import floor

from spark_vl.config import RecycleConfig
from spark_vl.records import RecycledKind
from spark_vl.recycle.evidence import Candidate


@dataclass(frozen=True)
class Part:
    """One prompt that is to be written."""

    process: int
    """The process that sampled the group that is quoted."""
    index: int
    """Of the group among the candidates of that process."""
    parent_id: str
    quoted_correct: bool | None
    """Whether the quoted answer is right (pointwise, reflection); None for pairwise."""
    pass_rate: float
    """Of the group."""


@dataclass(frozen=True)
class Unit:
    """Prompts that are kept or left out together: one, or two pointwise ones, a right answer and a wrong one."""

    kind: RecycledKind
    parts: tuple[Part, ...]

    @property
    def pair(self) -> str:
        """What the two prompts of a pair have in common (`Origin.pair`); empty where there is one."""
        return "&".join(part.parent_id for part in self.parts) if len(self.parts) == 2 else ""


@dataclass(frozen=True)
class Choice:
    """What a step recycles, in the order in which it was chosen."""

    judge: list[Unit]
    """`max_judge` prompts at most."""
    reflection: list[Unit]
    """`max_reflection` prompts at most."""
    surplus: list[Unit]
    """What the caps leave out. Dynamic sampling refills in this order."""
    counts: dict[str, int] = field(default_factory=dict)
    """See `Recycled.counts`."""

    @property
    def labels(self) -> list[tuple[float, bool]]:
        """Of each pointwise prompt, the pass rate of the quoted group, and whether the quoted answer is right."""
        parts = [part for unit in self.judge if unit.kind == "pointwise" for part in unit.parts]
        return [(part.pass_rate, bool(part.quoted_correct)) for part in parts]


@dataclass(frozen=True)
class _Place:
    """A candidate, and where its group is."""

    process: int
    index: int
    candidate: Candidate

    def part(self, quoted_correct: bool | None) -> Part:
        return Part(self.process, self.index, self.candidate.id, quoted_correct, self.candidate.pass_rate)


def choose(candidates: Sequence[Sequence[Candidate]], config: RecycleConfig, *, step: int, seed: int) -> Choice:
    """What to recycle from the groups of a step.

    Args:
        candidates: [processes][groups of that process].
    """
    first: dict[str, _Place] = {}
    repeated = 0
    for process, of_process in enumerate(candidates):
        for index, candidate in enumerate(of_process):
            repeated += candidate.id in first
            first.setdefault(candidate.id, _Place(process, index, candidate))

    places = list(first.values())
    by_judge = sorted(places, key=lambda p: (p.candidate.judge.place, p.candidate.id))
    by_reflection = sorted(places, key=lambda p: (p.candidate.reflection.place, p.candidate.id))
    coin = random.Random(f"{seed}:{step}").random()
    judge_units = _matched(by_judge, config, coin) if config.pointwise == "matched_pairs" else _one_each(by_judge)
    reflection_units = _reflections([p for p in by_reflection if p.candidate.kind == "problem"], config, coin)
    judge, judge_surplus = _cut(judge_units, config.max_judge)
    reflection, reflection_surplus = _cut(reflection_units, config.max_reflection)

    counts = dict.fromkeys((f"{kind}_{side}" for kind in ("pointwise", "reflection") for side in _SIDES.values()), 0)
    counts |= {"pairwise": 0, "groups_repeated": repeated}
    for unit in judge + reflection:
        for part in unit.parts:
            counts[named(unit.kind, part.quoted_correct)] += 1
    # A phase that sampled no problems (`sequential`) has nothing to fill places with.
    counts["judge_unfilled"] = config.max_judge - sum(len(unit.parts) for unit in judge) if places else 0
    return Choice(judge, reflection, judge_surplus + reflection_surplus, counts)


_SIDES = {True: "correct", False: "incorrect"}


def named(kind: RecycledKind, quoted_correct: bool | None) -> str:
    """The kind with the side that is quoted, such as `pointwise_correct`; None: without."""
    return kind if quoted_correct is None else f"{kind}_{_SIDES[quoted_correct]}"


def _matched(places: Sequence[_Place], config: RecycleConfig, coin: float) -> list[Unit]:
    """Pairwise prompts and matched pairs from mixed groups, and couples of unanimous groups.

    First each mixed group gives the kind that was drawn for it, then the other one. Wherever the list is cut, couples
    are at most `unanimous_share` of the pointwise prompts; `coin`, uniform in [0, 1), rounds their number.
    """
    problems = [place for place in places if place.candidate.kind == "problem"]
    right = [p.part(True) for p in problems if p.candidate.judge.correct and not p.candidate.judge.wrong]
    wrong = [p.part(False) for p in problems if p.candidate.judge.wrong and not p.candidate.judge.correct]
    couples = [Unit("pointwise", couple) for couple in zip(right, wrong, strict=False)]
    couples_per_pair = config.unanimous_share / (1 - config.unanimous_share)

    mixed = [place for place in places if place.candidate.judge.both]
    pairwise = [place.candidate.kind == "problem" and place.candidate.prefers_pairwise for place in mixed]
    drawn = list(zip(mixed, pairwise, strict=True))
    if 0 < config.pairwise_share < 1:
        drawn += [(place, not was) for place, was in drawn if place.candidate.kind == "problem"]
    units: list[Unit] = []
    pairs = used = 0
    for place, is_pairwise in drawn:
        if is_pairwise:
            units.append(Unit("pairwise", (place.part(None),)))
            continue
        units.append(Unit("pointwise", (place.part(True), place.part(False))))
        pairs += 1
        allowed = floor(pairs * couples_per_pair + coin)
        units += couples[used:allowed]
        used = max(used, allowed)
    return units


def _one_each(places: Sequence[_Place]) -> list[Unit]:
    """One prompt from each group that can be quoted, as the released code does."""
    units = []
    for place in places:
        candidate, quotable = place.candidate, place.candidate.judge
        if candidate.kind == "problem" and quotable.both and candidate.prefers_pairwise:
            units.append(Unit("pairwise", (place.part(None),)))
        elif quotable.correct or quotable.wrong:
            either = quotable.correct and quotable.wrong
            is_correct = candidate.prefers_correct if either else quotable.correct
            units.append(Unit("pointwise", (place.part(is_correct),)))
    return units


def _reflections(places: Sequence[_Place], config: RecycleConfig, coin: float) -> list[Unit]:
    """Reflections on wrong answers, one from each group that has any, of which `correct_reflection_share` quote a right
    answer instead.

    First the groups that quote a right answer are chosen, in their order, as many as the share asks for; `coin`,
    uniform in [0, 1), rounds that number. Then both sides are merged so that any cap keeps the share.
    """
    share = config.correct_reflection_share
    correct: list[_Place] = []
    n_wrong = sum(place.candidate.reflection.wrong for place in places)
    for place in places if n_wrong else ():
        if place.candidate.reflection.correct:
            n_wrong_then = n_wrong - place.candidate.reflection.wrong
            if len(correct) + 1 > share * (len(correct) + 1 + n_wrong_then) + coin:
                break
            correct.append(place)
            n_wrong = n_wrong_then
    wrong = [place for place in places if place.candidate.reflection.wrong and place not in correct]

    def n_correct(n: int) -> int:
        """How many of the first `n` reflections quote a right answer."""
        return max(min(len(correct), floor(share * n + coin)), n - len(wrong))

    units = []
    for n in range(len(correct) + len(wrong)):
        is_correct = n_correct(n + 1) > n_correct(n)
        place = correct[n_correct(n)] if is_correct else wrong[n - n_correct(n)]
        units.append(Unit("reflection", (place.part(is_correct),)))
    return units


def _cut(units: Iterable[Unit], cap: int) -> tuple[list[Unit], list[Unit]]:
    """The first units that make up `cap` prompts at most, and the others. Where a pair does not fit, a single prompt
    behind it may."""
    kept: list[Unit] = []
    left_out: list[Unit] = []
    room = cap
    for unit in units:
        fits = len(unit.parts) <= room
        (kept if fits else left_out).append(unit)
        room -= len(unit.parts) if fits else 0
    return kept, left_out


def deal(units: Sequence[Unit], loads: Sequence[int]) -> list[int]:
    """The process that gets each unit: every kind is spread evenly, and so is the whole.

    A unit goes to a process that has the fewest prompts of its kind; among those, to one that has the fewest in all;
    among those, to the one that sampled it.

    Args:
        loads: prompts that wait already on each process.
    """
    total = list(loads)
    of_kind: dict[str, list[int]] = {unit.kind: [0] * len(total) for unit in units}
    dealt = []
    for unit in units:
        mine = of_kind[unit.kind]
        home = unit.parts[0].process
        to = min(range(len(total)), key=lambda p: (mine[p], total[p], p != home, p))
        mine[to] += len(unit.parts)
        total[to] += len(unit.parts)
        dealt.append(to)
    return dealt
