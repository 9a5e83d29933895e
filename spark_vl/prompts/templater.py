"""Words prompts and reads the replies to them: a template is wording and reply parser in one object.

What a prompt quotes (questions, answers) comes from datasets and models and is not trusted: it is put in literally,
in one pass, so that a slot inside a quotation stays text, and `Templater.neutralize` takes the effect from special
tokens in it. Images stand where the question has them, in any number.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml

from spark_vl.answers import last_boxed, match_label
from spark_vl.config import DEFAULT_REASONING_SUFFIX as REASONING_SUFFIX
from spark_vl.config import PromptConfig, blamed_on
from spark_vl.records import JUDGMENTS, Content, Message, Origin, PromptRecord, RecycledKind, RecycledRecord, writable

PROMPTS_FILE = "spark_prompts.json"
"""What `Templater.save` writes into the folder of a model, so that the model is asked in the words that it was trained
on."""

_SLOTS = {
    "pointwise": ("{question}", "{answer}"),
    "pairwise": ("{question}", "{answer_a}", "{answer_b}"),
    "reflection": ("{question}", "{answer}"),
}
_OPTION_SLOTS = ("{option_a}", "{option_b}")
_SLOT = re.compile(r"(\{(?:question|answer|answer_a|answer_b|option_a|option_b)\})")
# A word in braces is a misspelled slot, unless it is the argument of a command, as in `\text{cm}` or `\frac{ab}{cd}`.
_UNKNOWN_SLOT = re.compile(r"(?<![\w}])\{[a-z_]{2,}\}")


@dataclass(frozen=True)
class Template:
    """One way to ask for a judgment or a reflection, and how to read the reply.

    Raises:
        ValueError: a field is not as described here. Names the template, the field, what was found and what is allowed.
    """

    name: str
    """Unique, such as `pointwise/yes_no_03`."""
    kind: Literal["pointwise", "pairwise", "reflection"]
    text: str
    r"""The wording, with each of these slots once and no other: `{question}`; `{answer}`, in pairs `{answer_a}` and
    `{answer_b}`; `{option_a}` and `{option_b}` if there are `options`. Other braces stand for themselves. A judgment
    asks for each of its labels as `\boxed{label}`, a reflection for its answer in `\boxed{}`."""
    labels: tuple[str, str] | None = None
    """Pointwise: ("Yes", "No"), for a correct and an incorrect answer, or ("A", "B"), for the `options`. Pairwise:
    ("A", "B"), for the answers. Reflection: None."""
    options: tuple[str, str] | None = None
    """Pointwise A/B only: what is said of a correct and of an incorrect answer. Which is A is drawn for each prompt."""
    shows: Literal["answer", "cot"] | None = None
    """Reflection only: whether the final answer is quoted or the whole chain of thought."""
    claim: Literal["check", "wrong"] | None = None
    """Reflection only: "check this answer", or "this answer is wrong", which is never shown with a correct one."""

    def __post_init__(self) -> None:
        reflection, options, text = self.kind == "reflection", self.options, str(self.text)
        labels = None if reflection else ("Yes", "No") if self.kind == "pointwise" and options is None else ("A", "B")
        slots = _SLOTS.get(str(self.kind), ()) + (() if options is None else _OPTION_SLOTS)
        found = _SLOT.findall(text)
        found += [slot for slot in _UNKNOWN_SLOT.findall(text) if slot not in found]
        asked = ["\\boxed{"] if labels is None else [f"\\boxed{{{label}}}" for label in labels]
        shows, claim = (("answer", "cot"), ("check", "wrong")) if reflection else ((None,), (None,))
        for field, value, ok, allowed in (
            ("name", self.name, isinstance(self.name, str) and self.name.strip(), "a text that is not empty"),
            ("kind", self.kind, self.kind in tuple(_SLOTS), _either(_SLOTS)),
            ("options", options, options is None or self.kind == "pointwise", f"none in a {self.kind} template"),
            ("options", options, options is None or _two_texts(options), "two different texts"),
            ("labels", self.labels, self.labels == labels, f"{list(labels)}, in quotes" if labels else "none"),
            ("shows", self.shows, self.shows in shows, f"{_either(shows)} in a {self.kind} template"),
            ("claim", self.claim, self.claim in claim, f"{_either(claim)} in a {self.kind} template"),
            ("text", self.text, isinstance(self.text, str), "a text"),
            ("text", found, Counter(found) == Counter(slots), f"the slots {', '.join(slots)}, each once"),
            ("text", "\\box{", "\\box{" not in text, "\\boxed{, the only box that replies are read from"),
            ("text", text, all(box in text for box in asked), f"a text that asks for {' and '.join(asked)}"),
        ):
            if not ok:
                raise ValueError(f"template {self.name!r}: {field}: found {value!r:.500}; allowed: {allowed}")

    def parse(self, reply: str) -> str | None:
        """The label in the last box of `reply`, for a reflection the answer in it; None if there is none."""
        return last_boxed(reply) if self.labels is None else match_label(reply, self.labels)


@dataclass(frozen=True)
class Rendered:
    """A prompt made from a template."""

    messages: tuple[Message, ...]
    gold: str | None
    """The right label, with options and answers standing where they do; None for a reflection."""
    labels: tuple[str, ...]
    """The labels of a judgment, for `PromptRecord.choices`; () for a reflection."""
    template: str
    """Name of the template."""

    def record(
        self,
        parent: PromptRecord,
        kind: RecycledKind,
        *,
        id: str,
        step: int = 0,
        rollouts: tuple[int, ...] = (),
        quoted_correct: bool | None = None,
        completions: tuple[str, ...] = (),
        pair: str = "",
    ) -> RecycledRecord:
        """This prompt, made from `parent`: a reflection is scored as its parent is, a judgment by its label.

        For `step`, `rollouts`, `quoted_correct`, `completions` and `pair` see `Origin`.
        """
        own: dict[str, Any] = {
            "id": id,
            "kind": kind,
            "messages": self.messages,
            "image_sizes": (),
            "coordinates": None,
            "origin": Origin(parent.id, step, self.template, rollouts, quoted_correct, completions, pair),
        }
        if kind in JUDGMENTS:
            own |= {"gold": self.gold, "verifier": "judgment", "choices": self.labels, "settings": ()}
        return RecycledRecord(**vars(parent) | own)


class Templater:
    """Words problems, judgments and reflections.

    Args:
        templates: at least one pointwise, one pairwise and, for each `shows`, one reflection that claims "check".
        system_prompt: opens every prompt. None: the model's chat template may put one of its own there.
        reasoning_suffix: appended to every problem as it is.
        reserved: texts, each of two characters or more, that are or begin a special token of the model that is asked.
            None: that is not known, so those of all model families count.

    Raises:
        ValueError: two templates have the same name, one that is needed is missing, a text is not valid Unicode, or
            `reserved` is not as described.
    """

    def __init__(
        self,
        templates: Sequence[Template],
        *,
        system_prompt: str | None = None,
        reasoning_suffix: str = REASONING_SUFFIX,
        reserved: Sequence[str] | None = None,
    ) -> None:
        if repeated := _repeated(templates):
            raise ValueError(f"templates: more than one is named {', '.join(repeated)}; names are unique")
        for where, text in (("system", system_prompt or ""), ("reasoning_suffix", reasoning_suffix)):
            _check_unicode(where, text)
        for template in templates:
            for text in (template.name, template.text, *(template.options or ())):
                _check_unicode(f"template {template.name!r}", text)
        self.templates: Mapping[str, Template] = {template.name: template for template in templates}
        """By name, to parse replies to what was rendered."""
        self._system_prompt = system_prompt
        self._system = () if system_prompt is None else (Message("system", (system_prompt,)),)
        self._suffix = reasoning_suffix
        self._reserved = _all_reserved() if reserved is None else tuple(reserved)
        if not self._reserved or any(len(text) < 2 for text in self._reserved):
            raise ValueError(
                f"reserved: found {list(self._reserved)}; allowed: at least one text, each of two or more characters"
            )
        self._special = re.compile("|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in self._reserved))
        pointwise = [t for t in templates if t.kind == "pointwise"]
        reflection = [t for t in templates if t.kind == "reflection"]
        # The templates to draw from: by what is asked, in sets that are equally likely.
        self._sets = {
            "pointwise": ([t for t in pointwise if t.options is None], [t for t in pointwise if t.options]),
            "pairwise": ([t for t in templates if t.kind == "pairwise"],),
        }
        for shows in ("answer", "cot"):
            shown = [t for t in reflection if t.shows == shows]
            self._sets[f"reflection that shows: {shows}"] = (shown,)
            for claim in ("check", "wrong"):
                self._sets[f"reflection that shows: {shows}, claim: {claim}"] = (
                    [t for t in shown if t.claim == claim],
                )
        for purpose in self._sets:
            if not purpose.endswith("claim: wrong"):  # needed only where one is asked for
                self._sets_for(purpose)

    @classmethod
    def load(
        cls,
        files: Sequence[Path | str] = (),
        *,
        builtin: bool = True,
        system_prompt: str | None = None,
        reasoning_suffix: str = REASONING_SUFFIX,
        reserved: Sequence[str] | None = None,
    ) -> Templater:
        """The templates of YAML `files`, beside the shipped ones if `builtin`.

        A file is a list of mappings with the fields of `Template`. A template replaces one of the same name that was
        shipped or read from an earlier file.

        Raises:
            ValueError: a template is not as it should be. Names file, template and field.
        """
        found = package_files("spark_vl.prompts.templates").iterdir() if builtin else ()
        shipped = sorted((file for file in found if file.name.endswith(".yaml")), key=lambda file: file.name)
        templates = {t.name: t for file in (*shipped, *map(Path, files)) for t in _read(file)}
        return cls(
            list(templates.values()),
            system_prompt=system_prompt,
            reasoning_suffix=reasoning_suffix,
            reserved=reserved,
        )

    @classmethod
    def from_config(cls, config: PromptConfig, reserved: Sequence[str] | None = None) -> Templater:
        """The templates of a run whose model has the texts `reserved`.

        Raises:
            ConfigError: a template file cannot be used.
        """
        with blamed_on("prompts.templates"):
            return cls.load(
                config.templates,
                builtin=config.builtin_templates,
                system_prompt=config.system or None,
                reasoning_suffix=config.reasoning_suffix,
                reserved=reserved,
            )

    @classmethod
    def read(cls, file: Path) -> Templater:
        """The templater that `save` wrote.

        Raises:
            ValueError: the file is not as `save` writes it. Names it and what is wrong.
        """
        try:
            saved = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:  # not JSON, or not text
            raise ValueError(f"{file}: is not valid JSON: {error}") from error
        if not (
            isinstance(saved, dict)
            and saved.keys() == {"system", "reasoning_suffix", "reserved", "templates"}
            and isinstance(saved["system"], str | None)
            and isinstance(saved["reasoning_suffix"], str)
            and isinstance(saved["reserved"], list)
            and all(isinstance(text, str) for text in saved["reserved"])
        ):
            raise ValueError(
                f"{file}: found {saved!r:.200}; allowed: a mapping with system (a text or null), reasoning_suffix "
                "(a text), reserved (a list of texts), templates (a list) and nothing else"
            )
        templates = _templates(saved["templates"], file)
        try:
            return cls(
                templates,
                system_prompt=saved["system"],
                reasoning_suffix=saved["reasoning_suffix"],
                reserved=saved["reserved"],
            )
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, file: Path) -> None:
        """Write everything that words prompts as JSON: `read` gives a templater that draws and words the same."""
        saved = {
            "system": self._system_prompt,
            "reasoning_suffix": self._suffix,
            "reserved": list(self._reserved),
            "templates": [asdict(template) for template in self.templates.values()],
        }
        file.write_text(json.dumps(saved, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def neutralize(self, text: str) -> str:
        """`text` with a zero-width space after the first character of each reserved text, so that no part of it is read
        as a special token, also where tokens are nested or overlap. Idempotent."""
        return self._special.sub("\\g<0>\u200b", text)

    def problem(self, question: Content) -> tuple[Message, ...]:
        """The prompt that asks `question`."""
        return self._messages((*question, self._suffix))

    def pointwise(
        self,
        question: Content,
        answer: str | Content,
        *,
        correct: bool,
        rng: random.Random,
        template: str | None = None,
        correct_first: bool | None = None,
    ) -> Rendered:
        """Asks whether `answer`, a final answer or a chain of thought, is right. Yes/No and A/B are equally likely.
        Answers may hold images, here and in `pairwise`.

        Args:
            correct: whether it is. Changes `gold` alone; where it is not known, give True, and `gold` is the label that
                calls the answer correct.
            template: name of the template; drawn when None.
            correct_first: in A/B templates, whether A is the option that calls the answer correct; drawn when None.
        """
        chosen = self._choose("pointwise", template, rng)
        first, second = _labels(chosen)
        if chosen.options is None:
            return self._render(chosen, question, first if correct else second, {"{answer}": answer})
        says_correct, says_incorrect = chosen.options
        correct_first = rng.random() < 0.5 if correct_first is None else correct_first
        option_a, option_b = (says_correct, says_incorrect) if correct_first else (says_incorrect, says_correct)
        slots: dict[str, str | Content] = {"{answer}": answer, "{option_a}": option_a, "{option_b}": option_b}
        return self._render(chosen, question, first if correct == correct_first else second, slots)

    def pairwise(
        self,
        question: Content,
        *,
        correct: str | Content,
        wrong: str | Content,
        rng: random.Random,
        template: str | None = None,
        correct_first: bool | None = None,
    ) -> Rendered:
        """Asks which of two answers is right. To ask in both orders, fix `template` and give both `correct_first`.

        Args:
            correct: the right answer; where it is not known, `gold` is the label of the answer given here.
            template: name of the template; drawn when None.
            correct_first: whether `correct` is answer A; drawn when None.
        """
        chosen = self._choose("pairwise", template, rng)
        correct_first = rng.random() < 0.5 if correct_first is None else correct_first
        answer_a, answer_b = (correct, wrong) if correct_first else (wrong, correct)
        slots = {"{answer_a}": answer_a, "{answer_b}": answer_b}
        return self._render(chosen, question, _labels(chosen)[0 if correct_first else 1], slots)

    def reflection(
        self,
        question: Content,
        answer: str,
        *,
        correct: bool,
        shows: Literal["answer", "cot"],
        rng: random.Random,
        template: str | None = None,
        claim: Literal["check", "wrong"] | None = None,
    ) -> Rendered:
        """Asks for the right answer, given an earlier one.

        Args:
            answer: a final answer or a whole chain of thought, as `shows` says.
            correct: whether it is right; if so, the prompt never claims that it is wrong. Where it is not known, give
                False and a `claim`.
            template: name of the template; drawn when None.
            claim: what the prompt claims (see `Template`); when None, anything that is true.

        Raises:
            ValueError: the claim is that a correct answer is wrong, or the template is not one of these.
        """
        if correct and claim == "wrong":
            raise ValueError("claim: found 'wrong' for a correct answer; allowed: 'check' or None")
        claim = "check" if correct else claim
        purpose = f"reflection that shows: {shows}" + (f", claim: {claim}" if claim else "")
        return self._render(self._choose(purpose, template, rng), question, None, {"{answer}": answer})

    def _sets_for(self, purpose: str) -> list[list[Template]]:
        """The sets of templates to draw from that have any."""
        sets = [templates for templates in self._sets[purpose] if templates]
        if not sets:
            raise ValueError(f"templates: there is no {purpose}; at least one is needed")
        return sets

    def _choose(self, purpose: str, name: str | None, rng: random.Random) -> Template:
        sets = self._sets_for(purpose)
        if name is None:
            return rng.choice(rng.choice(sets))
        allowed = {template.name: template for templates in sets for template in templates}
        if name not in allowed:
            raise ValueError(f"template: found {name!r}; allowed is a {purpose}: {', '.join(allowed)}")
        return allowed[name]

    def _render(
        self, template: Template, question: Content, gold: str | None, slots: Mapping[str, str | Content]
    ) -> Rendered:
        quoted = {slot: (content,) if isinstance(content, str) else content for slot, content in slots.items()}
        values: dict[str, Content] = {"{question}": question, **quoted}
        parts = (part for piece in _SLOT.split(template.text) for part in values.get(piece, (piece,)))
        return Rendered(self._messages(parts), gold, template.labels or (), template.name)

    def _messages(self, parts: Iterable[Any]) -> tuple[Message, ...]:
        """The system prompt and a user's turn: adjacent texts are merged, then neutralized, so that no seam matters."""
        content: list[Any] = []
        for part in parts:
            if content and isinstance(part, str) and isinstance(content[-1], str):
                content[-1] += part
            elif part != "":
                content.append(part)
        merged = tuple(self.neutralize(part) if isinstance(part, str) else part for part in content)
        return (*self._system, Message("user", merged))


@cache
def _all_reserved() -> tuple[str, ...]:
    """The reserved texts of all model families, from the YAML files beside their code."""
    found = sorted(package_files("spark_vl.families").iterdir(), key=lambda file: file.name)
    families = [yaml.safe_load(file.read_text("utf-8")) for file in found if file.name.endswith(".yaml")]
    return tuple(dict.fromkeys(text for family in families for text in family["reserved"]))


def _read(file: Path | Traversable) -> list[Template]:
    """The templates of one YAML file."""
    try:
        rows = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: is not valid YAML: {error}") from error
    return _templates(rows, file)


def _labels(template: Template) -> tuple[str, str]:
    """The labels of a judgment's template, which has them (`Template.__post_init__`)."""
    assert template.labels is not None
    return template.labels


def _templates(rows: Any, file: Path | Traversable) -> list[Template]:
    """The templates of the mappings `rows`, which were found in `file`."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: found {type(rows).__name__}; allowed: a list of templates, not empty")
    allowed = [field.name for field in fields(Template)]
    templates = []
    for number, row in enumerate(rows, 1):
        where = f"{file}: entry {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {row!r:.200}; allowed: a mapping with {', '.join(allowed)}")
        if unknown := [str(key) for key in row if key not in allowed]:
            raise ValueError(
                f"{where}: template {row.get('name')!r}: found {', '.join(unknown)}; allowed: {', '.join(allowed)}"
            )
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        try:
            templates.append(Template(**{"name": None, "kind": None, "text": None, **values}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if repeated := _repeated(templates):
        raise ValueError(f"{file}: name: more than one template is named {', '.join(repeated)}; names are unique")
    return templates


def _check_unicode(where: str, text: str) -> None:
    """YAML and JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if writable(text) != text:
        raise ValueError(f"{where}: found {text!r:.200}; allowed: valid Unicode")


def _repeated(templates: Sequence[Template]) -> list[str]:
    return [name for name, count in Counter(template.name for template in templates).items() if count > 1]


def _either(values: Iterable[str | None]) -> str:
    return " or ".join("none" if value is None else value for value in values)


def _two_texts(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(text, str) and text.strip() for text in value)
        and value[0] != value[1]
    )
