"""Figures of reward benchmarks, from the verdicts of a judge alone.

Ours are the same for all: each item is shown in several orders, votes in one order are counted, and a verdict that
cannot be read is wrong. The official rule of each benchmark is beside it where it differs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from spark_vl.evaluation.bootstrap import bootstrap_figures
from spark_vl.evaluation.figures import Estimate, estimate, macro_mean


@dataclass(frozen=True)
class Pick:
    """One verdict on one item."""

    item: str
    """Id of the item: `Preference.id`."""
    category: str
    preferred: int
    """Which of the item's answers is the best."""
    order: tuple[int, ...]
    """Which answer stood in each place of the prompt: (1, 0) shows the second first."""
    place: int | None
    """The place of the answer that the judge picked; None: it picked none, or several, or cannot be read."""

    @cached_property
    def picked(self) -> int | None:
        """The answer that the judge picked, as the item counts them."""
        return None if self.place is None else self.order[self.place]

    @cached_property
    def is_right(self) -> bool:
        """Whether it picked the best one."""
        return self.picked == self.preferred


def orders(answers: int) -> list[tuple[int, ...]]:
    """In which orders to show so many answers: each answer stands in each place once. Both, if there are two."""
    return [tuple((start + place) % answers for place in range(answers)) for start in range(answers)]


def vote(picks: Sequence[Pick]) -> Pick:
    """One verdict from several on one item in one order: the place that most of them pick. Those that pick none have no
    vote; where places have equally many, none is picked.

    Raises:
        ValueError: there is none, or they are of different items or orders.
    """
    if len({(each.item, each.order) for each in picks}) != 1:
        raise ValueError("votes are picks of one item in one order")
    votes = Counter(each.place for each in picks if each.place is not None).most_common(2)
    tied = len(votes) == 2 and votes[0][1] == votes[1][1]
    first = picks[0]
    return Pick(first.item, first.category, first.preferred, first.order, None if not votes or tied else votes[0][0])


def figures(picks: Iterable[Pick]) -> dict[str, Estimate]:
    """Our figures, in all of which `n` counts items.

    | name | |
    |---|---|
    | `accuracy` | share of right verdicts, the mean over items of the mean over orders; one without a pick is wrong |
    | `macro` | the mean of the accuracies of the categories |
    | `category=NAME` | the accuracy in one |
    | `consistency` | share of items with the same answer picked in every order, right or wrong, of those in several |
    | `all_orders` | share of items that are right in every order, of those in several |
    | `first_place` | share of picks that are of the first place; of two answers, .5 is unbiased, and of four .25 |
    | `unparsable` | share of picks, before they vote, of no place |

    Args:
        picks: any number of each item in each order: they vote.

    Raises:
        ValueError: there are none.
    """
    judged = list(picks)
    if not judged:
        raise ValueError("there are no picks")
    items = _by_item(judged)
    right = {item: fmean(verdict.is_right for verdict in verdicts) for item, verdicts in items.items()}
    categories: dict[str, list[float]] = defaultdict(list)
    for item, verdicts in items.items():
        categories[verdicts[0].category].append(right[item])
    each = {name: estimate(fmean(values), len(values)) for name, values in categories.items()}
    several = [verdicts for verdicts in items.values() if len(verdicts) > 1]
    places = [verdict.place for verdicts in items.values() for verdict in verdicts if verdict.place is not None]
    found = {"accuracy": estimate(fmean(right.values()), len(items)), "macro": macro_mean(list(each.values()))}
    found |= {f"category={name}": each[name] for name in sorted(each)}
    if several:
        same = [len({verdict.picked for verdict in of}) == 1 and of[0].picked is not None for of in several]
        found["consistency"] = estimate(fmean(same), len(several))
        found["all_orders"] = estimate(fmean(all(v.is_right for v in of) for of in several), len(several))
    if places:
        found["first_place"] = estimate(fmean(place == 0 for place in places), len(items))
    found["unparsable"] = estimate(fmean(each.place is None for each in judged), len(items))
    return found


# ── the official rules, of the picks of each item ──


def vl_rewardbench(items: Sequence[Sequence[Pick]]) -> dict[str, float]:
    """`overall` and `macro` as `cal.py` of VL-RewardBench: the votes on an item, which are in one order each, drawn for
    each vote, agree or reject, where one has more than half of all votes, also of those that pick none. Accuracy is
    agree / (agree + reject): items on which neither has are not counted (`dropped`, a share)."""
    agree: Counter[str] = Counter()
    reject: Counter[str] = Counter()
    for votes in items:
        half, category = len(votes) / 2, votes[0].category
        agree[category] += sum(each.is_right for each in votes) > half
        reject[category] += sum(each.place is not None and not each.is_right for each in votes) > half
    counted = agree.total() + reject.total()
    if not counted:
        raise ValueError("no item has a majority")
    shares = {name: agree[name] / (agree[name] + reject[name]) for name in agree if agree[name] + reject[name]}
    return {
        "overall": agree.total() / counted,
        "macro": fmean(shares.values()),
        "dropped": 1 - counted / len(items),
    }


def multimodal_rewardbench(items: Sequence[Sequence[Pick]]) -> dict[str, float]:
    """`overall` as the script of Multimodal RewardBench: the order of the dataset alone, one verdict an item, and a
    coin where none can be read. Here such an item counts one half, which is the coin's mean."""
    scores = [_score(each, 1 / 2) for picks in items for each in picks if each.order == (0, 1)]
    if not scores:
        raise ValueError("no item was judged in the order of the dataset")
    return {"overall": fmean(scores)}


def mmrb2(items: Sequence[Sequence[Pick]]) -> dict[str, float]:
    """`overall` as `compute_accuracy.py` of Multimodal RewardBench 2: of all verdicts that can be read, in both orders,
    the share that is right; the first one on an item in each order. The share that cannot be read is `dropped`."""
    first = [each for picks in items for each in {each.order: each for each in reversed(picks)}.values()]
    read = [each.is_right for each in first if each.place is not None]
    if not read:
        raise ValueError("no verdict can be read")
    return {"overall": fmean(read), "dropped": 1 - len(read) / len(first)}


def rewardbench2(items: Sequence[Sequence[Pick]]) -> dict[str, float]:
    """`overall` as the script of RewardBench 2: the mean over subsets of the accuracies; a verdict that cannot be read
    counts a quarter. There, the right answer changes places with one that is drawn for each item; here, the figure is
    over all picks. The subset Ties is not there, so it is not the leaderboard's mean over six."""
    subsets: dict[str, list[float]] = defaultdict(list)
    for picks in items:
        subsets[picks[0].category] += [_score(each, 1 / len(each.order)) for each in picks]
    if not subsets:
        raise ValueError("there are no picks")
    return {"overall": fmean(map(fmean, subsets.values()))}


OFFICIAL: Mapping[str, Callable[[Sequence[Sequence[Pick]]], dict[str, float]]] = {
    "vl_rewardbench": vl_rewardbench,
    "multimodal_rewardbench": multimodal_rewardbench,
    "mmrb2": mmrb2,
    "rewardbench2": rewardbench2,
}
"""Recipe → its official figures, of the picks of each item. They raise a ValueError where nothing can be counted."""


def official(recipe: str, picks: Iterable[Pick]) -> dict[str, Estimate]:
    """The official figures of a reward benchmark, with intervals over resampled items (`bootstrap`).

    Raises:
        ValueError: the picks do not define them.
    """
    votes: dict[str, list[Pick]] = defaultdict(list)
    for pick in picks:
        votes[pick.item].append(pick)
    rule = OFFICIAL[recipe]

    def figures_of(drawn: Sequence[Sequence[Pick]]) -> Mapping[str, float]:
        try:
            return rule(drawn)
        except ValueError:  # none of these can be counted; that of all items is raised below
            return {}

    rule(list(votes.values()))
    return bootstrap_figures(votes, figures_of)


def _score(pick: Pick, unread: float) -> float:
    return unread if pick.place is None else float(pick.is_right)


def _by_item(picks: Iterable[Pick]) -> dict[str, list[Pick]]:
    """Item → its verdicts, one for each order, after the vote."""
    votes: dict[tuple[str, tuple[int, ...]], list[Pick]] = defaultdict(list)
    for pick in picks:
        votes[pick.item, pick.order].append(pick)
    items: dict[str, list[Pick]] = defaultdict(list)
    for (item, _), of_order in votes.items():
        items[item].append(vote(of_order))
    return items
