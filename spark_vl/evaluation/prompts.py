"""The prompts of an evaluation. Those of `judge_own` quote the policy's own answers and change with it; the others do
not depend on the policy, so that their figures compare over time and runs.

A judge is shown each problem's gold answer and a wrong one, which is the gold of another problem (for a choice
question, another letter). Which problems, answers, templates and labels are drawn is fixed by the ids of the rows.
The prompts of a published judgment dataset are asked as they are.

The gold of another problem is easy to reject, a wrong answer of the policy's own is not; test-time reflection depends
on how well those are judged.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import ascii_uppercase

from spark_vl.answers import last_boxed
from spark_vl.config import ConfigError
from spark_vl.data.preferences import PreferenceSet
from spark_vl.data.problems import FilteredRowError, ProblemSet
from spark_vl.families.base import ProcessedImage, ProcessedPrompt, Prompts
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, Kind, PromptRecord, RecycledRecord, RolloutGroup, plain_text
from spark_vl.recycle.evidence import quotable_answer
from spark_vl.verifiers import VerifierPool, boxed_gold, check_golds

logger = logging.getLogger(__name__)


MOST_PIXELS = 2**30
"""Bytes of decoded images, and their patches, that a chunk of problems may hold: some 40 images of a megapixel."""

BYTES_OF_A_PIXEL = 27
"""RGB as bytes, and twice as 32-bit floats: the patches repeat an image as two frames of a video."""

MOST_PROBLEMS = 256
"""Of a chunk."""


def row_order(problems: ProblemSet | PreferenceSet) -> list[int]:
    """All rows, in the order in which they are drawn."""
    order = list(range(len(problems)))
    random.Random(f"{problems.recipe.name}/{problems.split}").shuffle(order)
    return order


def in_chunks(
    problems: Iterable[PromptRecord],
    processor: Prompts,
    about: Callable[[PromptRecord], Sequence[RecycledRecord]],
    refuse: Callable[[BadRecordError], None] | None = None,
) -> Iterator[list[list[ProcessedPrompt]]]:
    """Processed problems, each with the prompts that are asked about it, as many at a time as may be held in memory.

    Where one of the prompts about a problem cannot be processed, none is asked, which keeps the labels balanced.

    Args:
        about: processed problem → what is asked about it.
        refuse: is told of problems that cannot be processed. None: they are raised.
    """
    chunk: list[list[ProcessedPrompt]] = []
    images: set[ProcessedImage] = set()
    for record in problems:
        try:
            problem = processor.process(record)
        except BadRecordError as error:
            if refuse is None:
                raise
            refuse(error)
            continue
        records = about(problem.record)
        processed = process_all(records, processor)
        chunk.append([problem, *(processed if len(processed) == len(records) else ())])
        images.update(problem.images)
        if len(chunk) == MOST_PROBLEMS or sum(image.nbytes for image in images) >= MOST_PIXELS:
            yield chunk
            chunk, images = [], set()
    if chunk:
        yield chunk


def draw_problems(
    problems: ProblemSet, n: int | None, processor: Prompts, verifiers: VerifierPool
) -> tuple[list[PromptRecord], int]:
    """`n` processed problems, or all if there are fewer or `n` is None, and how many rows were drawn for them,
    without those that the recipe's `pixels` leave out.

    A row that cannot be used (see `BadRecordError`), or whose verifier does not give its own gold full marks, is
    replaced, with a warning.

    Raises:
        ValueError: no row can be used.
    """
    order = row_order(problems)
    n = len(order) if n is None else n
    usable: list[PromptRecord] = []
    drawn = filtered = 0
    while len(usable) < n and drawn < len(order):
        records = []
        rows = order[drawn : drawn + n - len(usable)]
        drawn += len(rows)
        for row in rows:
            try:
                records.append(processor.process(problems[row]).record)
            except FilteredRowError:
                filtered += 1
            except BadRecordError as error:
                logger.warning("left out of the evaluation: %s", error)
            processor.forget_images()
        faults = check_golds(verifiers, records)
        for record, fault in zip(records, faults, strict=True):
            if fault is None:
                usable.append(record)
            else:
                logger.warning("left out of the evaluation: %s", fault)
    if not usable:
        left_out = f" ({filtered} have images of other sizes than the recipe's pixels want)" if filtered else ""
        raise ConfigError(
            f"evaluation.recipes: {problems.recipe.name}/{problems.split}: none of its {drawn} rows can be evaluated "
            f"on; the warnings say why{left_out}"
        )
    return usable, drawn - filtered


def process_all(records: Iterable[PromptRecord], processor: Prompts) -> list[ProcessedPrompt]:
    """Those of `records` that can be processed; the others are left out with a warning."""
    prompts = []
    for record in records:
        try:
            prompts.append(processor.process(record))
        except BadRecordError as error:
            logger.warning("left out of the evaluation: %s", error)
    return prompts


def wrong_answers(records: Sequence[PromptRecord], verifiers: VerifierPool) -> dict[str, str]:
    """Id of each problem → an answer that its verifier reads and finds wrong. A problem that has none is left out.

    It is drawn from the other letters of a choice question; else from the golds of problems with the same question,
    as often as they occur; failing that, of problems with the same verifier.
    """
    problems = [record for record in records if record.kind == "problem"]
    golds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for problem in problems:
        golds[problem.verifier,].append(_answer(problem))
        golds[problem.verifier, plain_text(problem.question)].append(_answer(problem))

    def candidates(problem: PromptRecord) -> list[str]:
        """Last is best."""
        rng = random.Random(f"{problem.id}/wrong")
        pools = [golds[problem.verifier,], golds[problem.verifier, plain_text(problem.question)]]
        if problem.choices:
            pools = [list(ascii_uppercase[: len(problem.choices)])]
        shuffled = [answer for pool in pools for answer in rng.sample(pool, len(pool))]
        return [answer for answer in dict.fromkeys(reversed(shuffled)) if answer != _answer(problem)][::-1]

    left = [(problem, candidates(problem)) for problem in problems]
    found: dict[str, str] = {}
    while left := [(problem, answers) for problem, answers in left if answers and problem.id not in found]:
        tried = [(problem, answers.pop()) for problem, answers in left]
        verdicts = verifiers.verify([(rf"\boxed{{{answer}}}", problem) for problem, answer in tried])
        for (problem, answer), verdict in zip(tried, verdicts, strict=True):
            if verdict.status == "ok" and verdict.score == 0:
                found[problem.id] = answer
    return found


def _answer(problem: PromptRecord) -> str:
    """The gold as an answer is written: coordinates are those that the model is asked for."""
    return last_boxed(boxed_gold(problem)) or problem.gold


def prompts_about(problem: PromptRecord, wrong: Mapping[str, str], templater: Templater) -> list[RecycledRecord]:
    """`judge_and_reflect`, for a problem that has a wrong answer; a row of a judgment dataset is asked as it is.

    Args:
        wrong: of `wrong_answers`.
    """
    return judge_and_reflect(problem, wrong[problem.id], templater) if problem.id in wrong else []


def judge_and_reflect(problem: PromptRecord, wrong: str, templater: Templater) -> list[RecycledRecord]:
    """The six prompts made from one problem and a wrong answer to it.

    Both pointwise prompts have the same template and polarity, and so have both orders of the pair: a judge that always
    says the same is right in exactly half of them.
    """

    def rng(kind: Kind) -> random.Random:
        return random.Random(f"{problem.id}/{kind}")

    records = []
    gold = _answer(problem)
    for correct, answer in ((True, gold), (False, wrong)):
        side = "correct" if correct else "wrong"
        judge = templater.pointwise(problem.question, answer, correct=correct, rng=rng("pointwise"))
        pair = templater.pairwise(
            problem.question, correct=gold, wrong=wrong, rng=rng("pairwise"), correct_first=correct
        )
        reflection = templater.reflection(
            problem.question, answer, correct=correct, shows="answer", rng=rng("reflection")
        )
        records += [
            judge.record(problem, "pointwise", id=f"{problem.id}#pointwise_{side}", quoted_correct=correct),
            pair.record(problem, "pairwise", id=f"{problem.id}#pairwise_{side}_first"),
            reflection.record(problem, "reflection", id=f"{problem.id}#reflection_{side}", quoted_correct=correct),
        ]
    return records


def judge_own(sampled: RolloutGroup, templater: Templater) -> list[RecycledRecord]:
    """Pointwise prompts, at most two, about the policy's own answers to one problem: one right, one wrong, if it gave
    both; they differ in nothing but the answer.

    Drawn from the completions that finished, whose answer can be quoted, and whose score is 0 or 1. An answer that got
    both scores (some verifiers read more than the answer) is not quoted.

    Args:
        sampled: a verified group of completions to a problem.
    """
    problem = sampled.record
    answers: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for index, (rollout, verdict) in enumerate(zip(sampled.rollouts, sampled.verdicts, strict=True)):
        answer, is_correct = quotable_answer(rollout.answer_text, verdict).strip(), verdict.is_correct
        if rollout.finish_reason == "stop" and verdict.status == "ok" and answer and is_correct is not None:
            answers[is_correct].append((index, answer))
    ambiguous = {answer for _, answer in answers[True]} & {answer for _, answer in answers[False]}
    rng = random.Random(f"{problem.id}/own")
    records = []
    for correct, side in ((True, "correct"), (False, "wrong")):
        quotable = [(index, answer) for index, answer in answers[correct] if answer not in ambiguous]
        if quotable:
            index, answer = rng.choice(quotable)
            same = random.Random(f"{problem.id}/own/pointwise")  # the same template and polarity for both
            rendered = templater.pointwise(problem.question, answer, correct=correct, rng=same)
            records.append(
                rendered.record(
                    problem,
                    "pointwise",
                    id=f"{problem.id}#pointwise_sampled_{side}",
                    rollouts=(index,),
                    quoted_correct=correct,
                    completions=(sampled.rollouts[index].answer_text,),
                )
            )
    return records
