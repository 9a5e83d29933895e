"""A judge on the rows of reward benchmarks: what it says of them, as lines of JSON, and the figures of such lines.

A line belongs to one item and one way of asking:

| name | |
|---|---|
| `recipe`, `id`, `category`, `preferred` | of the `Preference` |
| `ask` | `pairwise` or `pointwise` |
| `answers` | how many there are |
| `replies` | all that the judge said |
| `error` | in place of `replies`: why it could not be asked |

Pairwise, each pair of answers is shown in both orders, as often as `GenerativeReward.samples` says: 2 prompts for two
answers, 12 for four. Pointwise, each answer is shown alone. A reply has the fields of `reward.Reply`, and

| name | |
|---|---|
| `shown` | the answers in the order in which the prompt shows them, `[1, 0]` or `[2]` |
| `labels` | the labels that it asks for |
| `favors` | the one of these in favor of the answer or, of two, of the one with the lower number |
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, permutations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from spark_vl.answers import match_label
from spark_vl.data.preferences import Preference
from spark_vl.evaluation import reward_benchmarks
from spark_vl.evaluation.figures import Estimate, estimate
from spark_vl.evaluation.reward_benchmarks import Pick
from spark_vl.records import BadRecordError
from spark_vl.reward.judge import Asked, GenerativeReward
from spark_vl.reward.judgment import Judgment, Reply, pairs

logger = logging.getLogger(__name__)

Ask = Literal["pairwise", "pointwise"]

Line = Mapping[str, Any]


def judge_preferences(
    judge: GenerativeReward, preferences: Sequence[Preference], ask: Sequence[Ask]
) -> list[dict[str, Any]]:
    """The lines of `preferences`, in order, each with all ways of `ask`. All are sampled together: give as many as may
    be lost, and as memory holds the images of.

    Where several judgments are drawn, they depend on which `preferences` are given together.

    Raises:
        EngineError: the judge cannot be asked any more.
    """
    lines: list[dict[str, Any]] = []
    asked: list[list[tuple[tuple[int, ...], Asked]]] = []
    for preference in preferences:
        for way in ask:
            line = {
                "recipe": preference.recipe,
                "id": preference.id,
                "category": preference.category,
                "preferred": preference.preferred,
                "ask": way,
                "answers": len(preference.answers),
            }
            lines.append(line)
            try:
                asked.append(_prompts(judge, preference, way))
            except BadRecordError as error:
                line["error"] = error.reason
                asked.append([])
    seed = zlib.crc32("/".join([str(judge.sampling.seed), *(each.id for each in preferences[:1])]).encode())
    judged = iter(judge.judge([prompts for of_line in asked for _, prompts in of_line], seed=seed))
    judge.processor.forget_images()
    for line, of_line in zip(lines, asked, strict=True):
        replies: list[dict[str, Any]] = []
        for answers, prompts in of_line:
            judgment = next(judged)
            if isinstance(judgment, BadRecordError):
                line.setdefault("error", judgment.reason)
            else:
                replies += _replies(answers, prompts, judgment)
        if "error" not in line:
            line["replies"] = replies
    return lines


def rescored(line: Line) -> dict[str, Any]:
    """`line` with its labels read from the texts again, without a model. Where a label has changed, its probability is
    the vote: 1 in favor, 0 against."""
    if "error" in line:
        return dict(line)
    return {**line, "replies": [_read_again(reply) for reply in line["replies"]]}


def figures(recipe: str, lines: Sequence[Line]) -> dict[str, Estimate]:
    """The figures of the lines of one recipe, in all of which `n` counts items. What could not be asked is wrong.

    | name | |
    |---|---|
    | `reward_accuracy`, `reward_macro`, `reward_category=NAME` | see `reward_benchmarks.figures`; pairwise, as are: |
    | `reward_consistency`, `reward_first_place` | see there; of more than two answers, of all pairs of them |
    | `reward_all_orders` | see there; of two answers alone |
    | `reward_unparsable`, `reward_truncated` | share of replies without a label, and of those that were cut off |
    | `reward_official_NAME` | see `reward_benchmarks.OFFICIAL`; the interval is a bootstrap over items |
    | `reward_pointwise` | share of items whose preferred answer has a higher probability of "correct" than all others |
    | `reward_pointwise_tied` | share of items where it and another one have the highest; they are wrong above |
    | `reward_brier` | mean squared distance from that probability to 1 (preferred) or 0, over all answers |
    | `reward_pointwise_unparsable`, `reward_pointwise_truncated` | as above |

    Of four answers all pairs are compared. The pick is the one with the highest mean probability of being better, over
    the others and both orders, where an unread order is a loss for both; where several have the highest, there is none.

    Pointwise, a verdict on each answer is needed: with an unread one the item is wrong, and its distance in
    `reward_brier` is 1.

    Args:
        recipe: its name, which says what is official. Of another name, nothing is.
    """
    found: dict[str, Estimate] = {}
    if pairwise := [line for line in lines if line["ask"] == "pairwise"]:
        found |= _pairwise(recipe, pairwise)
    if pointwise := [line for line in lines if line["ask"] == "pointwise"]:
        found |= _pointwise(pointwise)
    return {f"reward_{name}": figure for name, figure in found.items()}


def value(line: Line) -> float:
    """Of a pairwise line, the share of its orders in which the preferred answer is picked, after the votes."""
    return reward_benchmarks.figures(_picks(line))["accuracy"]["value"]


# ── calibration ──


@dataclass(frozen=True)
class Bin:
    """Predictions between two bounds."""

    low: float
    high: float
    """They are in [low, high), and in the last bin up to 1."""
    n: int
    predicted: float
    """Their mean."""
    right: float
    """The share of them that came true."""


@dataclass(frozen=True)
class Reliability:
    """How often what was predicted came true."""

    bins: tuple[Bin, ...]
    """Those with predictions."""
    ece: float | None
    """Expected calibration error: the mean over predictions of |`predicted` - `right`| of their bins (Naeini et al.,
    AAAI 2015). 0 is calibrated; few predictions have a larger one by chance. None: there are none."""


def reliability(predictions: Sequence[tuple[float, bool]], bins: int = 10) -> Reliability:
    """The reliability diagram of probabilities and what came true.

    Args:
        bins: of equal width.
    """
    inside: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for probability, came_true in predictions:
        inside[min(int(probability * bins), bins - 1)].append((probability, came_true))
    found = tuple(
        Bin(k / bins, (k + 1) / bins, len(own), fmean(p for p, _ in own), fmean(came_true for _, came_true in own))
        for k, own in sorted(inside.items())
    )
    far = sum(each.n * abs(each.predicted - each.right) for each in found)
    return Reliability(found, far / len(predictions) if predictions else None)


def calibration(lines: Sequence[Line]) -> Reliability:
    """That of the pointwise lines: the probability that an answer is correct, and whether it is the preferred one.
    Answers without a probability are in no bin."""
    return reliability(
        [
            (probability, answer == line["preferred"])
            for line in lines
            if line["ask"] == "pointwise"
            for answer, probability in enumerate(_probabilities(line))
            if probability is not None
        ]
    )


def plot_reliability(lines: Sequence[Line], path: Path) -> None:
    """Draw the `calibration` of `lines` to an image file: a point for each bin, with the 95 % interval of its share."""
    from matplotlib.figure import Figure  # takes half a second

    found = calibration(lines)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#BDBDBD", linewidth=1)
    points = [(each.predicted, estimate(each.right, each.n)) for each in found.bins]
    values = [point["value"] for _, point in points]
    spread = [
        [point["value"] - point["low"] for _, point in points],
        [point["high"] - point["value"] for _, point in points],
    ]
    axes.errorbar([predicted for predicted, _ in points], values, spread, fmt="o", color="#0072B2", capsize=2)
    for each in found.bins:
        axes.annotate(f"{each.n:,}", (each.predicted, each.right), xytext=(5, -10), textcoords="offset points", size=7)
    n = sum(each.n for each in found.bins)
    ece = "" if found.ece is None else f", calibration error {found.ece:.3f}"
    axes.set(
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
        xlabel='probability of "correct"',
        ylabel="share of preferred answers",
        title=f"{n:,} answers{ece}",
    )
    figure.savefig(path, dpi=150)


# ── lines ──


def _prompts(judge: GenerativeReward, preference: Preference, way: Ask) -> list[tuple[tuple[int, ...], Asked]]:
    """What is asked about an item: each answer, or each pair of answers, with its prompts."""
    question, answers = preference.question, preference.answers
    if way == "pointwise":
        return [((i,), judge.ask_pointwise(question, None, answer)) for i, answer in enumerate(answers)]
    return [((i, j), judge.ask_pairwise(question, None, answers[i], answers[j])) for i, j in pairs(len(answers))]


def _replies(answers: tuple[int, ...], prompts: Asked, judgment: Judgment) -> list[dict[str, Any]]:
    shown = [answers, answers[::-1]]  # of one answer, the same
    return [
        {"shown": list(order), "labels": list(prompt.record.choices), "favors": prompt.record.gold, **asdict(reply)}
        for order, prompt, replies in zip(shown, prompts, judgment.orders, strict=False)
        for reply in replies
    ]


def _read_again(reply: Line) -> dict[str, Any]:
    label = match_label(reply["text"][reply["answer_start"] :], tuple(reply["labels"]))
    if label == reply["label"]:
        return dict(reply)
    vote = None if label is None else label == reply["favors"]
    return {**reply, "label": label, "in_favor": vote, "probability": None if vote is None else float(vote)}


def _judgments(line: Line) -> dict[tuple[int, ...], Judgment]:
    """One or two answers → what the judge said of them; {}: it could not be asked."""
    said: dict[tuple[int, ...], dict[tuple[Any, ...], list[Reply]]] = defaultdict(lambda: defaultdict(list))
    for reply in line.get("replies", ()):
        own = Reply(**{field.name: reply[field.name] for field in fields(Reply)})
        said[tuple(sorted(reply["shown"]))][*reply["shown"], reply["favors"]].append(own)
    return {answers: Judgment(tuple(map(tuple, orders.values()))) for answers, orders in said.items()}


def _replied(lines: Sequence[Line]) -> dict[str, Estimate]:
    """How many replies have no label, and how many were cut off; {}: there are no replies."""
    replies = [reply for line in lines for reply in line.get("replies", ())]
    n = sum("error" not in line for line in lines)
    if not replies:
        return {}
    return {
        "unparsable": estimate(fmean(reply["label"] is None for reply in replies), n),
        "truncated": estimate(fmean(reply["finish_reason"] == "length" for reply in replies), n),
    }


# ── pairs ──


def _pairwise(recipe: str, lines: Sequence[Line]) -> dict[str, Estimate]:
    picks = list(chain.from_iterable(map(_picks, lines)))
    found = reward_benchmarks.figures(picks)
    of_pairs = reward_benchmarks.figures(chain.from_iterable(map(_pair_picks, lines)))
    for name in ("consistency", "first_place"):
        found.pop(name, None)
        if name in of_pairs:  # the pairs of an item are not independent
            found[name] = estimate(of_pairs[name]["value"], len(lines))
    del found["unparsable"]
    found |= _replied(lines)
    if recipe in reward_benchmarks.OFFICIAL:
        try:
            official = reward_benchmarks.official(recipe, picks)
        except ValueError as error:
            logger.warning("%s: no official figure: %s", recipe, error)
        else:
            found |= {f"official_{name}": figure for name, figure in official.items()}
    return found


def _picks(line: Line) -> list[Pick]:
    """Of two answers, what each reply picks; of more, the winner of all pairs."""
    if line["answers"] == 2:
        return _pair_picks(line)
    everyone = tuple(range(line["answers"]))
    return [Pick(line["id"], line["category"], line["preferred"], everyone, _winner(line))]


def _pair_picks(line: Line) -> list[Pick]:
    """What each reply picks of the two answers that it was shown. Each pair is an item. Of what could not be asked, no
    place in every order."""

    def pick(shown: Sequence[int], place: int | None) -> Pick:
        return Pick(f"{line['id']}/{sorted(shown)}", line["category"], line["preferred"], tuple(shown), place)

    if "error" in line:
        return [pick(order, None) for order in permutations(range(line["answers"]), 2)]
    return [pick(reply["shown"], _place(reply)) for reply in line["replies"]]


def _place(reply: Line) -> int | None:
    """Of the answer that a reply picks, of two."""
    if reply["in_favor"] is None:
        return None
    first, second = reply["shown"]
    return int((first < second) != reply["in_favor"])


def _winner(line: Line) -> int | None:
    """The answer that is better than the others in the mean."""
    scores = [0.0] * line["answers"]
    for (i, j), judgment in _judgments(line).items():
        for probability in judgment.probabilities:
            if probability is not None:
                scores[i] += probability
                scores[j] += 1 - probability
    return _strictly_highest(scores)


def _strictly_highest(scores: Sequence[float]) -> int | None:
    best = max(range(len(scores)), key=scores.__getitem__)
    return best if sum(score > scores[best] - _ROUNDING for score in scores) == 1 else None


_ROUNDING = 1e-9
"""Sums of the same probabilities in another order may differ by less."""


# ── one by one ──


def _probabilities(line: Line) -> list[float | None]:
    """That each answer is correct."""
    found = _judgments(line)
    return [found[i,].probability if found else None for i in range(line["answers"])]


def _pointwise(lines: Sequence[Line]) -> dict[str, Estimate]:
    right, tied, brier = [], [], []
    for line in lines:
        scores, preferred = _probabilities(line), line["preferred"]
        brier.append(fmean(1 if p is None else (p - (i == preferred)) ** 2 for i, p in enumerate(scores)))
        read = [score for score in scores if score is not None]
        best = _strictly_highest(read) if len(read) == len(scores) else -1
        right.append(best == preferred)
        tied.append(best is None and read[preferred] > max(read) - _ROUNDING)
    found = {
        "pointwise": estimate(fmean(right), len(lines)),
        "pointwise_tied": estimate(fmean(tied), len(lines)),
        "brier": estimate(fmean(brier), len(lines)),
    }
    return found | {f"pointwise_{name}": share for name, share in _replied(lines).items()}
