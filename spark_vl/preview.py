"""Prints the recipes, or the rows of one as a run would get them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from spark_vl.config import ConfigError, TrainConfig
from spark_vl.data.duplicates import find_duplicates
from spark_vl.data.preferences import PreferenceSet, check_preferences, open_preferences
from spark_vl.data.problems import FilteredRowError, ProblemSet, check, open_images, open_recipe
from spark_vl.data.recipes import SPLITS, PreferenceColumns, load_recipe, load_recipes, recipes, usage
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, PromptRecord, plain_text, visible
from spark_vl.verifiers import VerifierPool
from spark_vl.verifiers.base import public_name

_SHOWN_ALIKE = 3
"""Of rows that cannot be used for the same reason."""


def preview(name: str | None, split: str | None, show: int, settings: TrainConfig, *, render: bool) -> bool:
    """`spark-vl recipes [NAME]`: list the recipes, or print and check the rows of one. Returns whether all rows can be
    used.

    Args:
        settings: of a run that would use it.
        render: print rows as the model of this run gets them.
    """
    if name is None:
        for written in map(usage, recipes()):
            recipe = load_recipe(written)
            print(f"{written:20} {recipe.license:12} {recipe.description}")
        return True
    try:
        templater, rendered = _renderer(settings) if render else (Templater.load(), None)
        recipe = load_recipe(name)
        split = split or next(each for each in SPLITS if each in recipe.splits)
        if isinstance(recipe.columns, PreferenceColumns):
            return _show_preferences(open_preferences(recipe, split, templater), show)
        problems = open_recipe(recipe, split, templater)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    bad: list[BadRecordError] = []
    rows = filtered = 0
    limits = settings.verifier
    with VerifierPool(limits.workers, limits.timeout_s, limits.memory_mb) as verifiers:
        for found in check(problems, verifiers):
            if isinstance(found, FilteredRowError):
                filtered += 1
                continue
            rows += 1
            if isinstance(found, BadRecordError):
                bad.append(found)
            elif rows - len(bad) <= show:
                shown = plain_text(found.question) if rendered is None else rendered(found)
                print(visible(f"── {found.id}\n{shown}\n→ {found.gold}   ({public_name(found.verifier)})"))
    _print_faults(bad)
    if problems.unused:
        print(visible(f"the recipe uses no column {', '.join(problems.unused):.300}"))
    if problems.renamed:
        print(f"{len(problems.renamed)} rows have the id of an earlier row; the number of the row is added to it")
    if filtered:
        print(f"{filtered} more rows have an image with another number of pixels than the recipe wants")
    others = [each for each in recipe.splits if each != split]
    rest = f"; not checked: {', '.join(others)} (--split {others[0]})" if others else ""
    print(f"{rows - len(bad)} of {rows} rows can be used (license of the data: {recipe.license}){rest}")
    return not bad


def duplicates(name: str, split: str | None, against: Sequence[str], file: str | None) -> bool:
    """`spark-vl recipes NAME --against A,B`: print the rows that benchmarks ask, too. Returns whether there are none.

    Args:
        against: recipes, of whose split `test` each row is compared.
        file: gets the ids of the duplicates, for `exclude` of a recipe.
    """
    templater = Templater.load()
    try:
        recipe = load_recipe(name)
        split = split or next(each for each in SPLITS if each in recipe.splits)
        problems = open_recipe(recipe, split, templater)
        benchmarks = [open_recipe(each, "test", templater) for each in load_recipes(against)]
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    bad: list[BadRecordError] = []
    same, images = [], 0
    asked = chain.from_iterable(_usable(each, bad) for each in benchmarks)
    for found in find_duplicates(_usable(problems, bad), asked):
        if found.kind == "same":
            same.append(found.id)
            print(visible(f"{found.id} is {found.of}"))
        else:
            images += 1
    if file is not None:
        Path(file).write_text("".join(f"{each}\n" for each in same), encoding="utf-8")
    _print_faults(bad)
    print(
        f"{len(same)} of {len(problems)} rows are in {', '.join(against)}; {images} more share an image with one there"
    )
    return not same


def _usable(problems: ProblemSet, bad: list[BadRecordError]) -> Iterator[PromptRecord]:
    """The rows whose images can be opened; the others are added to `bad`."""
    for index in range(len(problems)):
        try:
            record = problems[index]
            open_images(record.id, record.images)
        except FilteredRowError:
            continue
        except BadRecordError as error:
            bad.append(error)
        else:
            yield record


def _show_preferences(preferences: PreferenceSet, show: int) -> bool:
    """Print and check the rows of a reward benchmark. Returns whether all can be used."""
    bad: list[BadRecordError] = []
    for number, found in enumerate(check_preferences(preferences)):
        if isinstance(found, BadRecordError):
            bad.append(found)
        elif number - len(bad) < show:
            answers = "".join(
                f"\n── answer {place}{', preferred' if place == found.preferred else ''}\n{plain_text(answer)}"
                for place, answer in enumerate(found.answers)
            )
            print(visible(f"── {found.id} ({found.category})\n{plain_text(found.question)}{answers}"))
    _print_faults(bad)
    rows, recipe = len(preferences), preferences.recipe
    print(f"{rows - len(bad)} of {rows} rows can be used (license of the data: {recipe.license})")
    return not bad


def _print_faults(bad: Sequence[BadRecordError]) -> None:
    for faults in _alike(bad):
        for fault in faults[:_SHOWN_ALIKE]:
            print(visible(f"cannot be used: {fault}"))
        if (more := len(faults) - _SHOWN_ALIKE) > 0:
            print(f"    and {more} more for the same reason")


def _alike(faults: Sequence[BadRecordError]) -> list[list[BadRecordError]]:
    """Those with the same reason together, the most frequent reason first. Numbers and what is quoted from a row do not
    make another reason."""
    groups: dict[str, list[BadRecordError]] = defaultdict(list)
    for fault in faults:
        groups[re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", fault.reason)].append(fault)
    return sorted(groups.values(), key=len, reverse=True)


def _renderer(config: TrainConfig) -> tuple[Templater, Callable[[PromptRecord], str]]:
    """The templater of a run with these settings, and what says what its model gets."""
    from spark_vl.families.registry import find_family

    family = find_family(config.model)
    processor = family.load_processor(config.model, max_prompt_tokens=config.data.max_prompt_tokens)

    def rendered(record: PromptRecord) -> str:
        try:
            prompt = processor.process(record)
        except BadRecordError as error:
            return f"cannot be asked: {error.reason}"
        images = sum(image.tokens for image in prompt.images)
        return f"{processor.render(prompt)}\n[{len(prompt.input_ids)} tokens, {images} of them of images]"

    return Templater.from_config(config.prompts, family.reserved), rendered
