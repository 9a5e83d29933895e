"""Problems without a right answer: the policy judges its own completions, and is rewarded with its verdict.

That can go wrong: a policy that is rewarded by itself learns to please itself. So it is believed only while it judges
answers well whose correctness is known: at times it answers held-out problems, a verifier says which answers are right,
and its balanced accuracy as a judge of these answers decides (`SelfJudgeConfig.min_accuracy`). What it has judged
itself is no evidence for anything: it is not recycled, and it is not among the figures of problems.

Metrics, as `self_judge/name`: `balanced_accuracy` (the last one measured), `measured` (answers that it was measured
on), `used` (0 or 1), `left_out` (prompts, while not used), `groups`, `reward`, `zero_variance` (share of groups),
`unparsable` (share of judgments without a verdict), `inconsistent` (share of the others, asked in two orders, that do
not lean to the same side in both).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from accelerate import Accelerator

from spark_vl.answers import last_boxed, normalized
from spark_vl.config import SelfJudgeConfig
from spark_vl.log import RunLog
from spark_vl.records import BadRecordError, PromptRecord, Rollout, RolloutGroup, Verdict
from spark_vl.reward.average import AveragedWeights
from spark_vl.reward.judge import Asked, GenerativeReward
from spark_vl.reward.judgment import Judgment, pairs, ranked_by_pairs
from spark_vl.rollout.distributed import DistributedEngine, DistributedVerifiers
from spark_vl.rollout.engine import RolloutEngine, Sampling
from spark_vl.run.sinks import Sink
from spark_vl.verifiers.groups import shaped
from spark_vl.verifiers.pool import VerifierPool


@dataclass
class Measurement:
    """How well the policy judged its own answers to held-out problems, when that was last measured."""

    accuracy: float | None = None
    """Balanced accuracy. None: all answers were right, or all wrong, so there is none."""
    answers: int | None = None
    """So many answers, or pairs of answers, were judged; None: it has not been measured."""

    def state_dict(self) -> dict[str, Any]:
        """It, as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made."""
        self.accuracy, self.answers = state["accuracy"], state["answers"]


class SelfJudge(Sink):
    """`SelfJudging` of a run, and the sink that measures the judge every few steps.

    Args:
        judge: the policy as a judge, which counts votes.
        last: the last measurement, which a checkpoint keeps.
        held_out: verified problems that are not trained on, the same on all processes.
        engine: samples from the policy, for the judge, too.
        average: of the policy's weights, which judges.
        verifiers: verify the answers to them.
        accelerator: knows the other processes.
        sampling: how completions of problems are drawn.
        config: of the run.
        log: is told of all figures.
        seed: of the run.
    """

    def __init__(
        self,
        judge: GenerativeReward,
        held_out: Sequence[PromptRecord],
        last: Measurement,
        *,
        engine: RolloutEngine,
        average: AveragedWeights,
        verifiers: VerifierPool,
        accelerator: Accelerator,
        sampling: Sampling,
        config: SelfJudgeConfig,
        log: RunLog,
        seed: int,
    ) -> None:
        self.judge, self.held_out, self.last, self.average = judge, held_out, last, average
        self.sampling, self.config, self.log, self.seed = sampling, config, log, seed
        # Measures: all processes ask the same.
        self._accelerator = accelerator
        self._together = copy(judge)
        self._together.engine = DistributedEngine(engine, accelerator)
        self._verifiers = DistributedVerifiers(verifiers, accelerator)

    # ── the guard ──

    def is_allowed(self) -> bool:
        """See `SelfJudging.is_allowed`: whether the judge was good enough when it was last measured."""
        if self.last.answers is None:
            self._measure(0)
        accuracy = self.last.accuracy
        allowed = accuracy is not None and accuracy >= self.config.min_accuracy
        self.log.add("self_judge/used", allowed)
        self.log.add("self_judge/measured", self.last.answers or 0)
        if accuracy is not None:
            self.log.add("self_judge/balanced_accuracy", accuracy)
        return allowed

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the weights after `step` into the average, and measure anew where it is time. Collective."""
        self.average.update()
        if step % self.config.every == 0:
            self._measure(step)

    def _measure(self, step: int) -> None:
        """How well the policy judges its own answers to held-out problems."""
        self.log.phase("measuring the judge")
        sampling = replace(self.sampling, seed=_crc(f"{self.seed}/self_judge/{step}"))
        prompts = [self.judge.processor.process(record) for record in self.held_out]
        with self._accelerator.autocast():
            groups = self._together.engine.generate(prompts, self.config.samples, sampling)
        rollouts = [(rollout.answer_text, group.record) for group in groups for rollout in group.rollouts]
        verdicts = iter(self._verifiers.verify(rollouts))
        asked: list[Asked] = []
        truths: list[bool] = []
        for group in groups:
            known = _known_answers(group.verified(tuple(next(verdicts) for _ in group.rollouts)))
            questions: list[tuple[str, ...]] = [(answer,) for answer in known.values()]
            if self.config.ask == "pairwise":
                questions = [(known[True], known[False])] if len(known) == 2 else []
                known = {True: ""}
            for truth, answers in zip(known, questions, strict=False):
                if found := self._ask(group.record, answers):
                    asked.append(found)
                    truths.append(truth)
        with self._accelerator.autocast(), self.average.in_use():
            judged = [_read(each) for each in self._together.judge(asked, seed=sampling.seed)]
        credit: dict[bool, list[float]] = {truth: [] for truth in truths}
        for truth, judgment in zip(truths, judged, strict=True):
            credit[truth].append(_credit(judgment.probability, truth))
        sides = 1 if self.config.ask == "pairwise" else 2
        self.last.accuracy = fmean(map(fmean, credit.values())) if len(credit) == sides else None
        self.last.answers = len(truths)

    # ── verdicts ──

    def verified(self, groups: Sequence[RolloutGroup], *, seed: str) -> list[RolloutGroup]:
        """See `SelfJudging.verified`. A completion without a box scores 0; one whose answer the judge gives no verdict
        on scores as the others of its group do in the mean, so that nothing is learned from it."""
        answers = [_answers(group) for group in groups]
        asked = [
            [self._ask(group.record, question) for question in self._questions(list(of_group.values()))]
            for group, of_group in zip(groups, answers, strict=True)
        ]
        found = [each for of_group in asked for each in of_group if each]
        with self.average.in_use():
            judged = iter(self.judge.judge(found, seed=_crc(f"{seed}/self_judge")))
        verified = []
        for group, of_group, prompts in zip(groups, answers, asked, strict=True):
            judgments = [_read(next(judged)) if each else _NOT_ASKED for each in prompts]
            self._count(judgments)
            scores = dict(zip(of_group, self._scores(len(of_group), judgments), strict=True))
            verdicts = [_verdict(rollout, scores) for rollout in group.rollouts]
            scored = shaped(group, verdicts, self.sampling.max_new_tokens)
            self.log.add("self_judge/reward", sum(scored.rewards), len(scored.rewards))
            self.log.add("self_judge/zero_variance", scored.zero_variance)
            verified.append(scored)
        self.log.count("self_judge", {"groups": len(groups)})
        return verified

    def _questions(self, answers: Sequence[str]) -> list[tuple[str, ...]]:
        """Each answer, or each pair of answers, that is asked about."""
        if self.config.ask == "pointwise":
            return [(answer,) for answer in answers]
        return [(answers[i], answers[j]) for i, j in pairs(len(answers))]

    def _scores(self, n: int, judgments: Sequence[Judgment]) -> Sequence[float | None]:
        """Of `n` answers, from the judgments of their `_questions`."""
        if self.config.ask == "pointwise":
            return [judgment.probability for judgment in judgments]
        return ranked_by_pairs(n, judgments).scores

    def _ask(self, record: PromptRecord, answers: Sequence[str]) -> Asked | None:
        """The prompts about one answer, or about two; None: one of them is too long."""
        try:
            if len(answers) == 1:
                return self.judge.ask_pointwise(record, None, answers[0])
            return self.judge.ask_pairwise(record, None, answers[0], answers[1])
        except BadRecordError:
            return None

    def _count(self, judgments: Sequence[Judgment]) -> None:
        for judgment in judgments:
            self.log.add("self_judge/unparsable", judgment.status == "unparsable")
            if judgment.consistent is not None and len(judgment.orders) > 1:
                self.log.add("self_judge/inconsistent", not judgment.consistent)


_NOT_ASKED = Judgment(((),))
"""Of a prompt that is too long: without a reply, as without a verdict."""


def _read(judged: Judgment | BadRecordError) -> Judgment:
    """What the engine refuses has no verdict."""
    return judged if isinstance(judged, Judgment) else _NOT_ASKED


def _answers(group: RolloutGroup) -> dict[str, str]:
    """The final answers of a group, each once: normalized → as it was first written."""
    boxed = [answer for rollout in group.rollouts if (answer := last_boxed(rollout.answer_text))]
    return {normalized(answer): answer for answer in reversed(boxed)}


def _known_answers(group: RolloutGroup) -> dict[bool, str]:
    """A right and a wrong answer of a verified group, as far as there are any, drawn from those that are different."""
    found: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        answer, is_correct = last_boxed(rollout.answer_text), verdict.is_correct
        if answer and is_correct is not None and verdict.status == "ok":
            found[is_correct].setdefault(normalized(answer), answer)
    rng = random.Random(group.record.id)
    return {
        side: rng.choice(own)
        for side in (True, False)
        if (own := [answer for key, answer in found[side].items() if key not in found[not side]])
    }


def _verdict(rollout: Rollout, scores: Mapping[str, float | None]) -> Verdict:
    """Of a completion, by the scores of the answers of its group."""
    if not (answer := last_boxed(rollout.answer_text)):
        return Verdict(0.0, None, "unparsable", "no box")
    if (score := scores[normalized(answer)]) is not None:
        return Verdict(score, answer)
    known = [score for score in scores.values() if score is not None]
    return Verdict(fmean(known) if known else 0.5, answer, "unparsable", "the judge gives no verdict")


def _credit(probability: float | None, truth: bool) -> float:
    """1: right. 0: wrong, or no verdict. A half: undecided."""
    if probability is None:
        return 0.0
    return 0.5 if probability == 0.5 else float((probability > 0.5) == truth)


def _crc(seed: str) -> int:
    return zlib.crc32(seed.encode())
