"""Samples the prompts of an evaluation, and lets the model judge and revise its own answers."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from spark_vl.answers import last_boxed, normalized
from spark_vl.config import EvaluationConfig, RolloutConfig, blamed_on
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipes
from spark_vl.evaluation.figures import Estimate, estimate, score
from spark_vl.evaluation.prompts import (
    draw_problems,
    in_chunks,
    judge_own,
    process_all,
    prompts_about,
    wrong_answers,
)
from spark_vl.families.base import ProcessedPrompt, Prompts
from spark_vl.prompts import Templater
from spark_vl.records import PromptRecord, RecycledRecord, RolloutGroup
from spark_vl.rollout import PromptsRefusedError, Sampler, Sampling
from spark_vl.verifiers import VerifierPool, verify_groups

logger = logging.getLogger(__name__)

Ask = Callable[[Iterable[PromptRecord]], list[RolloutGroup]]
"""Records → a verified group of one greedy completion for each that can be processed."""

Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a progress bar: name and size of a phase → advance(how many more are done)."""


def no_progress(name: str, total: int) -> Callable[[int], None]:
    """Who does not watch."""
    return lambda finished: None


class Evaluator:
    """Evaluates a policy on held-out problems, or judgments that a run has published, always the same ones.

    Args:
        config: which problems, how many, how often sampled.
        templater: words the prompts.
        rollout: temperature, top-p and the limit on new tokens.
        seed: of the sampled completions; which prompts are drawn does not depend on it.

    Raises:
        ConfigError: a recipe cannot be used, or two have the same name; no template has the reflection claim.
        ValueError: a recipe cannot be opened.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        templater: Templater,
        *,
        rollout: RolloutConfig,
        seed: int,
    ) -> None:
        self.config, self.templater = config, templater
        self.sampling = Sampling(
            rollout.temperature,
            rollout.top_p,
            config.max_new_tokens or rollout.max_new_tokens,
            seed,
            config.repetition_penalty,
        )
        with blamed_on("evaluation.recipes"):
            self.sets = [open_recipe(recipe, config.split, templater) for recipe in load_recipes(config.recipes)]
        if config.reflection_rounds:
            with blamed_on("evaluation.reflection_claim"):
                shows: Literal["answer", "cot"]
                for shows in ("answer", "cot"):  # fails now, not after hours of sampling
                    rng = random.Random(0)
                    templater.reflection((), "", correct=False, claim=config.reflection_claim, shows=shows, rng=rng)
        self._problems: list[PromptRecord] | None = None  # until the first evaluation
        self._wrong: dict[str, str] = {}  # answers to them
        self._drawn = 0  # rows

    def __call__(
        self,
        engine: Sampler,
        processor: Prompts,
        verifiers: VerifierPool,
        progress: Progress = no_progress,
    ) -> dict[str, Estimate]:
        """The figures of `score`, and `unusable`, the share of the rows drawn that could not be used.

        Args:
            progress: counts completions, in each phase of the evaluation.

        Raises:
            ValueError: a recipe has no row that can be used.
        """
        if self._problems is None:
            self._problems = self._draw(processor, verifiers)
        groups: dict[str, list[RolloutGroup]] = defaultdict(list)
        done = 0
        for problems in in_chunks(self._problems, processor, self.about):
            for mode, found in self.ask(engine, processor, verifiers, problems, done, progress).items():
                groups[mode] += found
            done += len(problems)
            problems.clear()  # their images go before those of the next ones come
        return score(groups) | {"unusable": estimate(1 - len(self._problems) / self._drawn, self._drawn)}

    def about(self, problem: PromptRecord) -> list[RecycledRecord]:
        """What the policy is asked to judge and revise of a processed problem, beside its own answers."""
        return prompts_about(problem, self._wrong, self.templater)

    def find_wrong_answers(self, problems: Sequence[PromptRecord], verifiers: VerifierPool) -> None:
        """Find what `about` quotes, from the golds of all processed problems of one recipe."""
        if self.config.judging:
            self._wrong |= wrong_answers(problems, verifiers)

    def ask(
        self,
        engine: Sampler,
        processor: Prompts,
        verifiers: VerifierPool,
        problems: Sequence[Sequence[ProcessedPrompt]],
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> dict[str, list[RolloutGroup]]:
        """All that is asked about some problems: verified groups by mode, see `score`, and `test_time_steps`, the
        judgments and reflections on the way. A prompt that the engine refuses is left out, with a warning.

        The engine is called equally often for any number of problems, none included, so that processes which share one
        stay together.

        Args:
            problems: each with the prompts about it (`about`), or a row of a judgment dataset alone.
            seed: is added to that of the sampled completions.
        """

        def generate(phase: str, prompts: Sequence[ProcessedPrompt], n: int, temperature: float) -> list[RolloutGroup]:
            sampling = replace(self.sampling, temperature=temperature, seed=self.sampling.seed + seed)
            advance = progress(f"evaluating, {phase}", n * len(prompts))
            try:
                groups = engine.generate(prompts, n, sampling, advance)
            except PromptsRefusedError as error:
                for reason in error.reasons.values():
                    logger.warning("left out of the evaluation: %s", reason)
                groups = [group for group in error.groups if group is not None]
            return verify_groups(verifiers, groups, self.sampling.max_new_tokens)

        def ask(records: Iterable[PromptRecord], phase: str = "reflection") -> list[RolloutGroup]:
            return generate(phase, process_all(records, processor), 1, 0.0)

        prompts = [prompts[0] for prompts in problems] + [prompt for prompts in problems for prompt in prompts[1:]]
        greedy = generate("greedy", prompts, 1, 0.0)
        groups = {"greedy": greedy}
        answers = [group for group in greedy if group.record.kind == "problem"]
        attempts: list[RolloutGroup] = []
        if self.config.samples:
            # Of reflections on right answers only the greedy figure is reported.
            prompts = [prompt for prompt in prompts if not _keeps(prompt.record)]
            groups["sampled"] = generate("sampled", prompts, self.config.samples, self.sampling.temperature)
            attempts = [group for group in groups["sampled"] if group.record.kind == "problem"]
        if self.config.reflection_rounds:
            revised, steps = self._revise(answers, ask)
            groups |= {"test_time_reflection": revised, "test_time_steps": steps}
            groups["test_time_majority"] = [
                majority(group, budget)
                for group, budget in zip(attempts, tokens_spent(attempts, answers + steps), strict=True)
            ]
        if self.config.samples and self.config.judging:
            about = (record for group in attempts for record in judge_own(group, self.templater))
            groups["own_answers"] = ask(about, "own answers")
        processor.forget_images()
        return groups

    def _draw(self, processor: Prompts, verifiers: VerifierPool) -> list[PromptRecord]:
        drawn: list[PromptRecord] = []
        for problem_set in self.sets:
            records, rows = draw_problems(problem_set, self.config.problems, processor, verifiers)
            self.find_wrong_answers(records, verifiers)
            self._drawn += rows
            drawn += records
        return drawn

    def _revise(self, answers: Sequence[RolloutGroup], ask: Ask) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Test-time reflection: the last answer to each problem, and the judgments and reflections on the way.

        In each round the model judges its own answer and, where it judges it wrong, answers again with it at hand,
        until it judges an answer correct, at most `reflection_rounds` times. A completion without an answer counts as
        judged wrong; of a judgment without a verdict `unreadable_judgment` decides. Where the prompt of a judgment or a
        reflection would be too long, the answer stays.
        """
        latest = {group.record.id: group for group in answers}
        steps: list[RolloutGroup] = []
        pending = list(answers)
        for turn in range(1, self.config.reflection_rounds + 1):
            unanswered = {group.record.id for group in pending if group.verdicts[0].status == "unparsable"}
            judgments = ask(self._judge(group, turn) for group in pending if group.record.id not in unanswered)
            wrong = unanswered | {judgment.record.parent_id for judgment in judgments if self._rejects(judgment)}
            reflections = ask(self._reflect(group, turn) for group in pending if group.record.id in wrong)
            pending = []
            for reflection in reflections:
                problem = latest[reflection.record.parent_id].record
                latest[problem.id] = replace(reflection, record=problem)
                pending.append(latest[problem.id])
            steps += judgments + reflections
        return list(latest.values()), steps

    def _judge(self, answer: RolloutGroup, turn: int) -> RecycledRecord:
        """Whether `answer` is right; gold is the label that says so."""
        problem = answer.record
        rng = random.Random(f"{problem.id}/judge/{turn}")
        rendered = self.templater.pointwise(problem.question, _quote(answer), correct=True, rng=rng)
        return rendered.record(problem, "pointwise", id=f"{problem.id}#pointwise_own_{turn}")

    def _rejects(self, judgment: RolloutGroup) -> bool:
        verdict = judgment.verdicts[0]
        if verdict.parsed is None:
            return self.config.unreadable_judgment == "reflect"
        return verdict.score == 0

    def _reflect(self, answer: RolloutGroup, turn: int) -> RecycledRecord:
        """Another attempt, with `answer` at hand."""
        problem = answer.record
        rng = random.Random(f"{problem.id}/reflect/{turn}")
        shows: Literal["answer", "cot"] = "answer" if last_boxed(answer.rollouts[0].answer_text) else "cot"
        claim = self.config.reflection_claim
        rendered = self.templater.reflection(
            problem.question, _quote(answer), correct=False, claim=claim, shows=shows, rng=rng
        )
        return rendered.record(problem, "reflection", id=f"{problem.id}#reflection_own_{turn}")


def _keeps(record: PromptRecord) -> bool:
    """Whether `record` is a reflection on a right answer."""
    return isinstance(record, RecycledRecord) and record.kind == "reflection" and bool(record.origin.quoted_correct)


def _quote(answer: RolloutGroup) -> str:
    """The final answer of a group's one completion, or the whole of it where it has no box."""
    text = answer.rollouts[0].answer_text
    return last_boxed(text) or text


def tokens_spent(attempts: Sequence[RolloutGroup], budget: Iterable[RolloutGroup]) -> list[int]:
    """For the problem of each of `attempts`, the new tokens of those groups of `budget` that are about it."""
    tokens: Counter[str] = Counter()
    for group in budget:
        tokens[group.record.parent_id] += sum(rollout.tokens for rollout in group.rollouts)
    return [tokens[group.record.id] for group in attempts]


def voters(sampled: RolloutGroup, budget: float) -> int:
    """How many samples of one problem, in order and at least one, fit into `budget` new tokens."""
    spent = 0
    for number, rollout in enumerate(sampled.rollouts):
        spent += rollout.tokens
        if number and spent > budget:
            return number
    return len(sampled.rollouts)


def majority(sampled: RolloutGroup, budget: float) -> RolloutGroup:
    """The baseline of test-time reflection: the sample of one problem with the answer that most of them give.

    As many samples vote as fit into `budget` (`voters`). The earlier answer wins a tie; a sample without an answer has
    no vote.
    """
    verdicts = sampled.verdicts[: voters(sampled, budget)]
    answers = [None if verdict.parsed is None else normalized(verdict.parsed) for verdict in verdicts]
    votes = Counter(answer for answer in answers if answer is not None).most_common(1)
    winner = answers.index(votes[0][0]) if votes else 0
    return replace(sampled, rollouts=(sampled.rollouts[winner],), verdicts=(sampled.verdicts[winner],))
