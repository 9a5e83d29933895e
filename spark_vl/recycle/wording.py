"""Writes the prompts that were chosen, each on the process that sampled what it quotes."""

from __future__ import annotations

from collections.abc import Sequence

from spark_vl.config import RecycleConfig
from spark_vl.prompts.templater import Rendered, Templater
from spark_vl.records import RecycledRecord
from spark_vl.recycle.choose import Part, Unit, named
from spark_vl.recycle.evidence import Evidence, Quote


def word(
    part: Part, unit: Unit, evidence: Sequence[Evidence], templater: Templater, config: RecycleConfig, *, step: int
) -> RecycledRecord:
    """The prompt `part` of `unit`.

    Args:
        evidence: of this process, which is `part.process`.
    """
    source = evidence[part.index]
    question, is_correct = source.record.question, part.quoted_correct
    rng = source.rng(unit.kind)
    quotes = source.quotes["reflection" if unit.kind == "reflection" else "judge"]
    if unit.kind == "pairwise":
        correct, wrong = rng.choice(quotes.pairs)
        rendered = templater.pairwise(question, correct=correct.text, wrong=wrong.text, rng=rng)
        shown: tuple[Quote, ...] = (correct, wrong) if rendered.gold == rendered.labels[0] else (wrong, correct)
        return _record(part, unit, source, rendered, shown, step)

    assert is_correct is not None, "only a pairwise prompt quotes both sides"
    matched = len({other.parent_id for other in unit.parts}) < len(unit.parts)
    if matched:
        # Both prompts of the pair make the same draws: answers, template and polarity.
        quote = rng.choice(quotes.pairs)[0 if is_correct else 1]
    else:
        quote = rng.choice(quotes.correct if is_correct else quotes.wrong)
    if unit.kind == "pointwise":
        correct_first = True if config.a_is_correct else None
        rendered = templater.pointwise(question, quote.text, correct=is_correct, rng=rng, correct_first=correct_first)
    else:
        rendered = templater.reflection(question, quote.text, correct=is_correct, shows=quotes.shows, rng=rng)
    return _record(part, unit, source, rendered, (quote,), step)


def _record(
    part: Part, unit: Unit, source: Evidence, rendered: Rendered, quotes: tuple[Quote, ...], step: int
) -> RecycledRecord:
    name = named(unit.kind, part.quoted_correct if unit.kind == "pointwise" else None)
    return rendered.record(
        source.record,
        unit.kind,
        id=f"{source.record.id}@{step}#{name}",
        step=step,
        rollouts=tuple(quote.index for quote in quotes),
        quoted_correct=part.quoted_correct,
        completions=tuple(quote.completion for quote in quotes),
        pair=unit.pair and f"{unit.pair}@{step}",
    )
