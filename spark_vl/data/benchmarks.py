"""Benchmarks whose rows a recipe cannot name column by column: what turns them into rows that it can.

An adapter is named in a recipe (`adapter: mathvista`, `columns: {preferences: mmrb2}`) and is code of the kit; a
dataset chooses none. Rows are untrusted: an adapter that does not find what it expects raises ValueError, which makes a
bad row. Nothing in a row is ever run as Python.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from spark_vl.answers import parse_quantity
from spark_vl.data.cells import answer, cell, items, optional, text, type_name, unicode
from spark_vl.data.sources import DigestedRows, Row, Rows, digest_rows, read_column


@dataclass(frozen=True)
class Adapter:
    """Turns one row of a dataset into one that a recipe reads.

    Args:
        reads: the columns of the source that `make` needs.
        makes: the columns that it adds.
        make: row → those columns. Raises ValueError: the row is not as the dataset's authors describe it.
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    make: Callable[[Row], dict[str, Any]]


class AdaptedRows:
    """Rows with the columns that an adapter makes, beside those of the source. Each is made when it is asked for."""

    def __init__(self, source: Rows, adapter: Adapter) -> None:
        self.source, self._adapter = source, adapter

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Row:
        row = self.source[index]
        if not isinstance(row, Mapping):
            raise ValueError(f"the row is {type_name(row)}; a mapping of columns is allowed")
        return {**row, **self._adapter.make(row)}

    def column(self, name: str) -> Iterator[Any]:
        """See `read_column`."""
        if name not in self._adapter.makes:
            yield from read_column(self.source, name)
            return
        for index in range(len(self)):
            try:
                yield self[index][name]
            except ValueError:
                yield None

    def digest(self, images: str | None) -> str:
        """See `digest_rows`; of the rows of the source."""
        if isinstance(self.source, DigestedRows):
            return self.source.digest(images)
        return digest_rows(self.source, self._adapter.reads, images)


# ── problems ──


def _mathvista(row: Row) -> dict[str, Any]:
    """The rule by the type of the answer: an option, a whole number (decimals are cut off), a number with so many
    decimals, a list. See `evaluation/calculate_score.py` of the benchmark."""
    kind = text(row, "answer_type")
    if text(row, "question_type") == "multi_choice":
        gold, options = text(row, "answer"), items(cell(row, "choices"))
        if gold not in options:
            raise ValueError(f"the answer {gold!r:.80} is none of the options {options!r:.200}")
        letter = ascii_uppercase[options.index(gold)]  # the text may be the letter of another option
        return {
            "answer": f"{letter}. {gold}",
            "verifier": "choice",
            "settings": {"letter_first": True, "nearest": True},
        }
    if kind == "float":
        precision = cell(row, "precision")
        if not isinstance(precision, int | float) or not 1 <= precision <= 10 or precision != int(precision):
            raise ValueError(f"'precision' is {type_name(precision)}; a whole number from 1 to 10 is allowed")
        return {"answer": row.get("answer"), "verifier": "number", "settings": {"decimals": int(precision)}}
    rules: dict[str, dict[str, Any]] = {
        "integer": {"verifier": "number", "settings": {"truncate": True}},
        "list": {"verifier": "list", "settings": None},
        "text": {"verifier": "text", "settings": None},
    }
    if kind not in rules:
        raise ValueError(f"'answer_type' is {kind!r:.80}; allowed: integer, float, list, text")
    return {"answer": row.get("answer"), **rules[kind]}


def _mathvision(row: Row) -> dict[str, Any]:
    """Without options, two decimals decide."""
    return {"settings": None if items(row.get("options")) else {"decimals": 2}}


def _by_type(column: str, verifiers: Mapping[str, str]) -> Callable[[Row], dict[str, Any]]:
    """The verifier that `verifiers` has for the type in `column`."""

    def make(row: Row) -> dict[str, Any]:
        kind = text(row, column).strip()
        if kind not in verifiers:
            raise ValueError(f"{column!r} is {kind!r:.80}; allowed: {', '.join(verifiers)}")
        return {"verifier": verifiers[kind]}

    return make


_OPTION = re.compile(r"(?:^|[;；]\s*)\(?([A-H])[.．、)]\s*")


def _wemath(row: Row) -> dict[str, Any]:
    """The options, which stand in one text: "A. 5 cm; B. 6 cm; C. No correct answer"."""
    words = text(row, "option").strip()
    letter, *found = _OPTION.split(words)
    letters, options = "".join(found[::2]), [option.strip().rstrip(";；").strip() for option in found[1::2]]
    if letter or len(options) < 2 or not "ABCDEFGH".startswith(letters) or not all(options):
        raise ValueError(f"'option' is {words!r:.200}; options from A on, as in 'A. 5 cm; B. 6 cm', are allowed")
    return {"choices": options, "answer": _lettered(text(row, "answer"), options)}


def _lettered(letter: str, options: Sequence[str]) -> str:
    """An answer that is a letter, with the text of its option: the letter may be the text of another."""
    place = ascii_uppercase.find(letter.strip())
    return f"{letter.strip()}. {options[place]}" if len(letter.strip()) == 1 and 0 <= place < len(options) else letter


def _literal(words: str, column: str) -> list[str]:
    """A list of texts or numbers in a text, as Python writes it. It is parsed, and not run."""
    try:
        found = ast.literal_eval(words)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{column!r} is {words!r:.200}; a list of texts is allowed") from error
    if not isinstance(found, list) or not all(isinstance(item, str | int | float) for item in found):
        raise ValueError(f"{column!r} is {words!r:.200}; a list of texts is allowed")
    return [str(item) for item in found]


MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_MMMU_MARK = re.compile(r"<image (\d+)>")


def _mmmu(row: Row) -> dict[str, Any]:
    """Question and options with `<image>` where they have `<image 2>`, and the images in that order; those that neither
    names stand first. The answer to an open question is a number, to two decimals, or one of some texts."""
    question, options = text(row, "question"), _literal(text(row, "options"), "options")
    is_open = text(row, "question_type") == "open"
    shown = [] if is_open else options
    numbers = [int(number) for words in (question, *shown) for number in _MMMU_MARK.findall(words)]
    held = {number: row.get(f"image_{number}") for number in range(1, 8)}
    if missing := [number for number in numbers if held.get(number) is None]:
        raise ValueError(f"the question names <image {missing[0]}>, and 'image_{missing[0]}' is null")
    first = [number for number, image in held.items() if image is not None and number not in numbers]
    made: dict[str, Any] = {
        "question": "<image>" * len(first) * bool(numbers) + _MMMU_MARK.sub("<image>", question),
        "choices": [_MMMU_MARK.sub("<image>", option) for option in shown],
        "images": [held[number] for number in (*first, *numbers)],
        "answer": text(row, "answer"),
        "verifier": "choice",
        "settings": {"letter_first": True},
    }
    if not is_open:
        made["answer"] = _lettered(made["answer"], made["choices"])
    else:
        listed = made["answer"].startswith("[")
        golds = _literal(made["answer"], "answer") if listed else [made["answer"]]
        number = len(golds) == 1 and parse_quantity(golds[0]) is not None
        made |= {"answer": golds[0] if len(golds) == 1 else golds, "verifier": "math" if number else "text"}
        made["settings"] = {"decimals": 2} if number else None
    return made


def _chartqa(row: Row) -> dict[str, Any]:
    """A number, within 5 %, where the answer is one as a computer writes it; else a text."""
    try:
        number = float(text(row, "answer").strip().removesuffix("%"))
    except ValueError:
        return {"verifier": "text"}
    return {"verifier": "number" if abs(number) < float("inf") else "text"}


def _number(row: Row, column: str) -> int:
    """A whole number, or one that is written as a text."""
    value = cell(row, column)
    if isinstance(value, str) and value.isdecimal() and value.isascii():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{column!r} is {type_name(value)}; a whole number is allowed")
    return value


def _numbered(row: Row, options: Sequence[str]) -> str:
    """The answer that a row names by its place, counted from 0, as a letter with the text of its option."""
    place = _number(row, "answer")
    if place >= len(options):
        raise ValueError(f"'answer' is {place}, of {len(options)} options, which are counted from 0")
    return _lettered(ascii_uppercase[place], options)


def _hinted(row: Row) -> str:
    """The question, behind its hint if it has one; tables write none as "nan"."""
    hint = optional(row, "hint")
    shown = "" if hint is None else unicode(hint, "hint").strip()
    return text(row, "question") if shown in ("", "nan") else f"{shown}\n{text(row, 'question')}"


ROTATION = 1_000_000
"""Added to the index of a question of MMBench, as often as its options were rotated."""


def _mmbench(row: Row) -> dict[str, Any]:
    """Options in columns, and the question that a row is a rotation of."""
    index = _number(row, "index")
    found = [optional(row, letter) for letter in "ABCD"]
    choices = [unicode(each, "ABCD"[place]) for place, each in enumerate(found) if each is not None and each != "nan"]
    return {
        "question": _hinted(row),
        "choices": choices,
        "answer": _lettered(text(row, "answer"), choices),
        "base": str(index % ROTATION),
        "rotation": str(index // ROTATION),
    }


def _scienceqa(row: Row) -> dict[str, Any]:
    return {"question": _hinted(row), "answer": _numbered(row, items(cell(row, "choices")))}


def _ai2d(row: Row) -> dict[str, Any]:
    return {"answer": _numbered(row, items(cell(row, "options")))}


def _seedbench(row: Row) -> dict[str, Any]:
    choices = [text(row, f"choice_{letter}") for letter in "abcd"]
    return {"choices": choices, "answer": _lettered(text(row, "answer"), choices)}


def _realworldqa(row: Row) -> dict[str, Any]:
    """A letter of an option, a number, or words."""
    gold = text(row, "answer").strip()
    return {"verifier": "choice" if gold in tuple("ABCD") else "number" if gold.isdecimal() else "text"}


def _hallusionbench(row: Row) -> dict[str, Any]:
    """The answer as a word, and what the row has in common with others: its figure, its question."""
    answers = {"0": "no", "1": "yes"}
    gold = text(row, "gt_answer").strip()
    if gold not in answers:
        raise ValueError(f"'gt_answer' is {gold!r:.80}; allowed: 0, 1")
    of_set = "/".join(text(row, column) for column in ("category", "subcategory", "set_id"))
    return {
        "answer": answers[gold],
        "figure": f"{of_set}/{text(row, 'figure_id')}",
        "asked": f"{of_set}/{text(row, 'question_id')}",
    }


ADAPTERS: dict[str, Adapter] = {
    "mathvista": Adapter(
        ("question_type", "answer_type", "precision", "choices", "answer"),
        ("answer", "verifier", "settings"),
        _mathvista,
    ),
    "mathverse": Adapter(
        ("question_type",), ("verifier",), _by_type("question_type", {"multi-choice": "choice", "free-form": "math"})
    ),
    "mathvision": Adapter(("options",), ("settings",), _mathvision),
    "wemath": Adapter(("option", "answer"), ("choices", "answer"), _wemath),
    "dynamath": Adapter(
        ("answer_type",),
        ("verifier",),
        _by_type("answer_type", {"float": "number", "multiple choice": "choice", "text": "text"}),
    ),
    "mmmu": Adapter(
        ("question", "options", "answer", "question_type", *MMMU_IMAGES),
        ("question", "choices", "images", "answer", "verifier", "settings"),
        _mmmu,
    ),
    "chartqa": Adapter(("answer",), ("verifier",), _chartqa),
    "mmbench": Adapter(
        ("index", "hint", "question", "A", "B", "C", "D", "answer"),
        ("question", "choices", "answer", "base", "rotation"),
        _mmbench,
    ),
    "scienceqa": Adapter(("hint", "question", "choices", "answer"), ("question", "answer"), _scienceqa),
    "seedbench": Adapter(("choice_a", "choice_b", "choice_c", "choice_d", "answer"), ("choices", "answer"), _seedbench),
    "realworldqa": Adapter(("answer",), ("verifier",), _realworldqa),
    "ai2d": Adapter(("options", "answer"), ("answer",), _ai2d),
    "hallusionbench": Adapter(
        ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer"),
        ("answer", "figure", "asked"),
        _hallusionbench,
    ),
}
"""By the name that a recipe gives."""


# ── answers to compare ──

_MARK = re.compile(r"<image_\d+>")


def _marked(words: str, images: Sequence[Any]) -> list[Any]:
    """Text with images where its marks `<image_1>` stand, in order; without a mark, they stand last. An image is in a
    list of its own, so that its path is not taken for a text."""
    pieces = _MARK.split(words)
    if len(pieces) == 1:
        return [words, *([image] for image in images)]
    if len(pieces) - 1 != len(images):
        raise ValueError(f"a text has {len(pieces) - 1} marks <image_…> for {len(images)} images")
    content: list[Any] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        content += [[image], piece]
    return content


_VL_SOURCES = {
    "mathverse": "reasoning",
    "mmmu": "reasoning",
    "hallucination": "hallucination",
    "rlhf": "hallucination",
    "rlaif": "hallucination",
}
"""How the id of a row begins → its category; all others, such as those of VLFeedback and WildVision, are general."""


def _vl_rewardbench(row: Row) -> dict[str, Any]:
    ranking, answers = items(cell(row, "human_ranking")), items(cell(row, "response"))
    if sorted(ranking) != [0, 1] or len(answers) != 2:
        raise ValueError(
            f"'human_ranking' is {ranking!r:.80} of {len(answers)} responses; [0, 1] or [1, 0] of 2 is allowed"
        )
    name = text(row, "id")
    return {
        "id": name,
        "question": [*([image] for image in items(row.get("image"))), text(row, "query")],
        "answers": [[text({"response": each}, "response")] for each in answers],
        "preferred": ranking.index(0),
        "category": _VL_SOURCES.get(re.split("[-_]", name)[0].lower(), "general"),
    }


def _multimodal_rewardbench(row: Row) -> dict[str, Any]:
    """Safety and reasoning are two categories each, by the id, as in the authors' script."""
    name, category, better = text(row, "ID"), text(row, "Category").lower(), text(row, "Better")
    if better not in ("Output1", "Output2"):
        raise ValueError(f"'Better' is {better!r:.80}; allowed: Output1, Output2")
    if category == "safety":
        category += "/bias" if name.lower().startswith("pairs") else "/toxicity"
    elif category == "reasoning":
        category += "/math" if name.lower().startswith("math") else "/coding"
    return {
        "id": name,
        "question": [*([image] for image in items(optional(row, "Image"))), text(row, "Text")],
        "answers": [[text(row, "Output1")], [text(row, "Output2")]],
        "preferred": int(better == "Output2"),
        "category": category,
    }


def _mmrb2(row: Row) -> dict[str, Any]:
    chosen = text(row, "chosen").upper()
    if chosen not in ("A", "B"):
        raise ValueError(f"'chosen' is {chosen!r:.80}; allowed: A, B")

    def content(name: str) -> list[Any]:
        words, images = row.get(f"{name}_text") or "", items(row.get(f"{name}_images"))
        if not isinstance(words, str) or not (words.strip() or images):
            raise ValueError(f"'{name}_text' is {type_name(words)} without an image; a text or images are allowed")
        return _marked(words, images)

    return {
        "id": text(row, "pair_id"),
        "question": content("prompt"),
        "answers": [content("response_a"), content("response_b")],
        "preferred": int(chosen == "B"),
        "category": row.get("prompt_source") or "unknown",
    }


def _rewardbench2(row: Row) -> dict[str, Any]:
    """The one right answer first; a judge has to be shown it in other places, too (`reward_benchmarks.orders`)."""
    chosen, rejected = items(cell(row, "chosen")), items(cell(row, "rejected"))
    if len(chosen) != 1 or len(rejected) != 3:
        raise ValueError(f"the row has {len(chosen)} chosen and {len(rejected)} rejected answers; 1 and 3 are allowed")
    return {
        "id": answer(row, "id"),
        "question": [text(row, "prompt")],
        "answers": [[text({"answer": each}, "answer")] for each in (*chosen, *rejected)],
        "preferred": 0,
        "category": text(row, "subset"),
    }


_MADE = ("id", "question", "answers", "preferred", "category")
_MMRB2_TEXTS = ("prompt", "response_a", "response_b")

PREFERENCES: dict[str, Adapter] = {
    "vl_rewardbench": Adapter(("id", "query", "response", "image", "human_ranking"), _MADE, _vl_rewardbench),
    "multimodal_rewardbench": Adapter(
        ("ID", "Text", "Image", "Output1", "Output2", "Better", "Category"), _MADE, _multimodal_rewardbench
    ),
    "mmrb2": Adapter(
        (
            *("pair_id", "chosen", "prompt_source"),
            *(f"{name}_{part}" for name in _MMRB2_TEXTS for part in ("text", "images")),
        ),
        _MADE,
        _mmrb2,
    ),
    "rewardbench2": Adapter(("id", "prompt", "chosen", "rejected", "subset"), _MADE, _rewardbench2),
}
"""What reads the rows of a reward benchmark, by the name that a recipe gives. `question` and each of `answers` are a
list of texts and of images, each image in a list of its own; `preferred` is the place of the best answer."""
