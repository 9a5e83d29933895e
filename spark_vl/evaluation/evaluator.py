"""Samples the prompts of an evaluation, and lets the model judge and revise its own answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from spark_vl.answers import last_boxed, normalized
from spark_vl.config import EvaluationConfig, RolloutConfig, blamed_on
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipes
from spark_vl.evaluation.figures import Estimate, estimate, score
from spark_vl.evaluation.prompts import draw_problems, judge_and_reflect, judge_own, process_all, wrong_answers
from spark_vl.evaluation.samples import append_samples
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.prompts import Templater
from spark_vl.records import PromptRecord, RecycledRecord, RolloutGroup
from spark_vl.rollout import RolloutEngine, Sampling
from spark_vl.verifiers import VerifierPool, verify_groups

Ask = Callable[[Iterable[PromptRecord]], list[RolloutGroup]]
"""Records → a verified group of one greedy completion for each that can be processed."""

Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a progress bar: name and size of a phase → advance(how many more are done)."""


class Evaluator:
    """Evaluates a policy on held-out problems, or judgments that a run has published, always the same ones.

    Args:
        config: which problems, how many, how often sampled.
        templater: words the prompts.
        rollout: temperature, top-p and the limit on new tokens.
        seed: of the sampled completions; which prompts are drawn does not depend on it.
        samples_file: JSONL to which every completion is appended; given to one process only.

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
        samples_file: Path | None = None,
    ) -> None:
        self.config, self.templater, self.rollout, self.seed = config, templater, rollout, seed
        self.max_new_tokens = config.max_new_tokens or rollout.max_new_tokens
        self.samples_file = samples_file
        with blamed_on("evaluation.recipes"):
            self._sets = [open_recipe(recipe, config.split, templater) for recipe in load_recipes(config.recipes)]
        with blamed_on("evaluation.reflection_claim"):
            shows: Literal["answer", "cot"]
            for shows in ("answer", "cot"):  # fails now, not after hours of sampling
                rng = random.Random(0)
                templater.reflection((), "", correct=False, claim=config.reflection_claim, shows=shows, rng=rng)
        self._records: list[PromptRecord] | None = None  # until the first evaluation
        self._drawn = 0  # rows
        self._used = 0  # those of them that are among `_records`

    def __call__(
        self,
        engine: RolloutEngine,
        processor: Processor,
        verifiers: VerifierPool,
        progress: Progress = lambda name, total: lambda finished: None,
    ) -> dict[str, Estimate]:
        """The figures of `score`, and `unusable`, the share of the rows drawn that could not be used.

        Args:
            progress: counts completions, in each phase of the evaluation.

        Raises:
            ValueError: a recipe has no row that can be used.
        """
        prompts = self._prompts(processor, verifiers)

        def generate(phase: str, prompts: Sequence[ProcessedPrompt], n: int, temperature: float) -> list[RolloutGroup]:
            sampling = Sampling(temperature, self.rollout.top_p, self.max_new_tokens, self.seed)
            advance = progress(f"evaluating, {phase}", n * len(prompts))
            groups = engine.generate(prompts, n, sampling, advance)
            return verify_groups(verifiers, groups, self.max_new_tokens)

        def ask(records: Iterable[PromptRecord], phase: str = "reflection") -> list[RolloutGroup]:
            return generate(phase, process_all(records, processor), 1, 0.0)

        greedy = generate("greedy", prompts, 1, 0.0)
        # Of reflections on right answers only the greedy figure is reported.
        prompts = [prompt for prompt in prompts if not _keeps(prompt.record)]
        sampled = generate("sampled", prompts, self.config.samples, self.rollout.temperature)
        answers = [group for group in greedy if group.record.kind == "problem"]
        revised, steps = self._revise(answers, ask)
        attempts = [group for group in sampled if group.record.kind == "problem"]
        judged = ask((record for group in attempts for record in judge_own(group, self.templater)), "own answers")
        groups = {
            "greedy": greedy,
            "sampled": sampled,
            "own_answers": judged,
            "test_time_reflection": revised,
            "test_time_majority": _majority(attempts, answers + steps),
        }
        if self.samples_file is not None:
            append_samples(self.samples_file, groups | {"test_time_steps": steps})
        processor.forget_images()
        return score(groups) | {"unusable": estimate(1 - self._used / self._drawn, self._drawn)}

    def _prompts(self, processor: Processor, verifiers: VerifierPool) -> list[ProcessedPrompt]:
        """All prompts; which ones is decided at the first evaluation."""
        if self._records is not None:
            return [processor.process(record) for record in self._records]
        prompts = []
        for problem_set in self._sets:
            chosen, drawn = draw_problems(problem_set, self.config.problems, processor, verifiers)
            self._drawn += drawn
            self._used += len(chosen)
            prompts += chosen
            # The rows of a judgment dataset are asked as they are.
            problems = [prompt.record for prompt in chosen if prompt.record.kind == "problem"]
            wrong = wrong_answers(problems, verifiers)
            for problem in problems:
                if problem.id not in wrong:
                    continue
                records = judge_and_reflect(problem, wrong[problem.id], self.templater)
                processed = process_all(records, processor)
                if len(processed) == len(records):  # all or none, which keeps the labels balanced
                    prompts += processed
        self._records = [prompt.record for prompt in prompts]
        return prompts

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


def _majority(sampled: Sequence[RolloutGroup], budget: Iterable[RolloutGroup]) -> list[RolloutGroup]:
    """The baseline of test-time reflection: for each problem a sample with the answer that most of them give.

    As many samples vote, in order and at least one, as fit into the new tokens that the groups of `budget` took for the
    same problem, or all if there are fewer. The earlier answer wins a tie; a sample without an answer has no vote.
    """
    tokens: Counter[str] = Counter()
    for group in budget:
        tokens[group.record.parent_id] += sum(len(r.token_ids) for r in group.rollouts)
    chosen = []
    for group in sampled:
        answers: list[str | None] = []
        spent = 0
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
            spent += len(rollout.token_ids)
            if answers and spent > tokens[group.record.id]:
                break
            answers.append(None if verdict.parsed is None else normalized(verdict.parsed))
        votes = Counter(answer for answer in answers if answer is not None).most_common(1)
        winner = answers.index(votes[0][0]) if votes else 0
        chosen.append(replace(group, rollouts=(group.rollouts[winner],), verdicts=(group.verdicts[winner],)))
    return chosen
