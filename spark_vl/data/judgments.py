"""Groups as rows of a dataset, and back: what a run samples and verifies is a dataset that others train and test on.

One row is one prompt with its G completions and their verdicts, as lists: one row per completion would repeat the
images G times. The dataset has one configuration per kind of prompt; that of problems is called `rollouts`. Completions
are stored in full, and so is what verifiers read of a quoted rollout (`completion`), whatever part of it the prompt
shows. Prompts are in the chat format of transformers and TRL, and images are bytes that `encode_image` made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from spark_vl.answers import last_boxed, match_choices
from spark_vl.data.cells import cell, options, text, type_name, unicode
from spark_vl.data.images import ImageError
from spark_vl.data.sources import Row
from spark_vl.records import (
    JUDGMENTS,
    BadRecordError,
    Content,
    ImageRef,
    Message,
    Origin,
    PromptRecord,
    RecycledKind,
    RecycledRecord,
    Rollout,
    RolloutGroup,
    Verdict,
    interleaved,
)
from spark_vl.verifiers.base import SELF_JUDGE, VERIFIERS, check_settings, one_of, public_name

if TYPE_CHECKING:
    import datasets

Config = Literal[RecycledKind, "rollouts"]
CONFIGS: tuple[Config, ...] = get_args(Config)
"""The configurations of a dataset. `rollouts` are the problems, the others recycled prompts of that kind."""

Split = Literal["train", "test"]

_TEST_SHARE = 20
"""One problem in this many is in the split `test`."""

_PLACE = "<image>"
"""What marks the place of an image in the column `question` (see `_marked`)."""

ANSWER_START = "answer_start"
"""The column that says how many characters of each completion are a chain of thought. Older rows do not have it."""

_ROLES = ("system", "user", "assistant")
_STATUSES = ("ok", "unparsable", "timeout", "error")
_FINISHES = ("stop", "length")

_QUOTED: dict[RecycledKind, tuple[str, ...]] = {
    "pointwise": ("completion",),
    "pairwise": ("completion_a", "completion_b"),
    "reflection": ("completion",),
}
"""Columns of the quoted rollouts, in the order in which a prompt shows them."""


def config_of(record: PromptRecord) -> Config:
    """The configuration that `record` belongs to."""
    return record.kind if isinstance(record, RecycledRecord) else "rollouts"


def completions_column(config: Config) -> str:
    """The column with the G completions of the row's own prompt."""
    return "completion" if config == "rollouts" else "judge_completion"


def record_columns(config: Config) -> tuple[str, ...]:
    """The columns that `record_of` reads."""
    common = ("id", "images", "messages", "question", "label", "choices", "verifier", "settings", "license")
    if config == "rollouts":
        return common
    quoted = (*_QUOTED[config], *(() if config == "pairwise" else ("correct",)))
    return (*common, "parent_id", "step", "template", *quoted)


@cache
def features(config: Config) -> datasets.Features:
    """The columns of a configuration and their types, which `datasets` decodes by."""
    from datasets import Features, Image, List, Value  # slow to import

    string, strings = Value("string"), List(Value("string"))
    quoted = {
        "rollouts": {},
        "pairwise": dict.fromkeys(("answer_a", "answer_b", "completion_a", "completion_b"), string),
    }.get(config, {"answer": string, "completion": string, "correct": Value("bool")})
    return Features(
        {
            "id": string,
            "images": List(Image()),
            "messages": List({"role": string, "content": List({"type": string, "text": string})}),
            "question": string,
            "label": string,
            "choices": strings,
            **quoted,
            completions_column(config): strings,
            "reward": List(Value("float32")),
            "parsed": strings,
            "status": strings,
            "finish_reason": strings,
            ANSWER_START: List(Value("int32")),
            "verifier": string,
            "settings": string,
            **({} if config == "rollouts" else {"template": string}),
            "parent_id": string,
            "recipe": string,
            "license": string,
            "model": string,
            "model_revision": string,
            "step": Value("int32"),
        }
    )


def split_of(record: PromptRecord) -> Split:
    """The split of `record`, decided by its question: a problem and all that is recycled from it share a split."""
    digest = hashlib.sha256()
    for part in record.question:
        words = part if isinstance(part, str) else str(part.path)
        data = part.data if isinstance(part, ImageRef) and part.data is not None else words.encode()
        digest.update(len(data).to_bytes(8) + data)
    return "test" if int.from_bytes(digest.digest()[:8]) % _TEST_SHARE == 0 else "train"


# ── group → row ──


def row_of(
    group: RolloutGroup,
    step: int,
    *,
    model: str,
    model_revision: str | None,
    image_bytes: Callable[[ImageRef], bytes],
) -> dict[str, Any]:
    """`group`, verified, as a row of `config_of(group.record)`.

    Args:
        step: training step in which its completions were sampled.
        model: the model that is trained, and `model_revision` its revision on the Hub.
        image_bytes: an image → its file in the dataset, such as `encode_image`.

    Raises:
        BadRecordError: an image cannot be read, or the text of a quoted rollout is not known.
        ValueError: the group has not been verified.
    """
    record = group.record
    if len(group.verdicts) != len(group.rollouts):
        raise ValueError(f"{record.id}: {len(group.verdicts)} verdicts for {len(group.rollouts)} rollouts")
    try:
        images = [{"bytes": image_bytes(ref), "path": None} for ref in record.images]
    except ImageError as error:
        raise BadRecordError(record.id, f"an image: {error}") from error
    recycled_here = isinstance(record, RecycledRecord) and bool(record.origin.rollouts)
    return {
        # A row of a recipe is drawn again in each epoch.
        "id": record.id if recycled_here else f"{record.id}@{step}",
        "images": images,
        "messages": [{"role": message.role, "content": _parts(message.content)} for message in record.messages],
        "question": _marked(record.question),
        "label": record.gold,
        "choices": list(record.choices),
        **(_quoted(record) if isinstance(record, RecycledRecord) else {}),
        completions_column(config_of(record)): [rollout.text for rollout in group.rollouts],
        "reward": group.scores,
        "parsed": [verdict.parsed for verdict in group.verdicts],
        "status": [verdict.status for verdict in group.verdicts],
        "finish_reason": [rollout.finish_reason for rollout in group.rollouts],
        ANSWER_START: [rollout.answer_start for rollout in group.rollouts],
        "verifier": public_name(record.verifier),
        "settings": json.dumps(dict(record.settings)),
        "parent_id": record.parent_id,
        "recipe": record.recipe,
        "license": record.license,
        "model": model,
        "model_revision": model_revision,
        "step": step,
    }


def _marked(content: Content) -> str:
    r"""The text of `content`, with `<image>` where an image stands, and `\<image>` where the text itself has these
    words. Backslashes before either are doubled, so that the content can be read back whatever it is (`_question`)."""
    marked = ""
    for part in content:
        if isinstance(part, str):
            marked += re.sub(rf"(\\*){_PLACE}", rf"\1\1\\{_PLACE}", part)
        else:
            marked += "\\" * (len(marked) - len(marked.rstrip("\\"))) + _PLACE
    return marked


def _parts(content: Content) -> list[dict[str, str | None]]:
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "text": None} for part in content
    ]


def _quoted(record: RecycledRecord) -> dict[str, Any]:
    """The columns that only recycled prompts have: what they quote."""
    columns, origin = _QUOTED[record.kind], record.origin
    if len(origin.completions) != len(columns):
        raise BadRecordError(
            record.id, f"{len(origin.completions)} of the {len(columns)} completions that it quotes are known"
        )
    row: dict[str, Any] = {"template": origin.template}
    for column, completion in zip(columns, origin.completions, strict=True):
        row |= {column: completion, column.replace("completion", "answer"): last_boxed(completion)}
    return row if record.kind == "pairwise" else row | {"correct": origin.quoted_correct}


# ── row → record, group ──


def record_of(
    row: Row,
    config: Config,
    *,
    id: str,
    recipe: str,
    verifiers: Collection[str],
    neutralize: Callable[[str], str],
) -> PromptRecord:
    """The prompt of a row. Rows are not trusted: nothing that a row names is opened or imported.

    Args:
        id, recipe: of the record.
        verifiers: the names that the row may give. A judgment's is always `judgment`.

    Raises:
        ValueError: a cell does not have the type and form that `features` and `row_of` give it; names the column.
    """
    images = _images(row)
    choices, verifier = options(row, "choices"), text(row, "verifier")
    gold = "" if verifier == SELF_JUDGE else text(row, "label")
    allowed = ("judgment",) if config in JUDGMENTS else verifiers
    if (known := one_of(verifier, allowed)) is None:
        raise ValueError(f"'verifier' is {verifier!r:.200}; allowed: {', '.join(sorted(map(public_name, allowed)))}")
    verifier = known
    if verifier == "judgment" and gold not in choices:
        raise ValueError(f"'label' is {gold!r:.100}; allowed are the choices {list(choices)!r:.200}")
    if verifier == "choice" and ", ".join(match_choices(gold, choices)) != gold:
        raise ValueError(
            f"'label' is {gold!r:.100}; the letter of one of the choices {list(choices)!r:.200} is allowed"
        )
    fields: dict[str, Any] = {
        "id": id,
        "messages": _messages(row, images, neutralize),
        "question": _question(text(row, "question"), images),
        "gold": gold,
        "verifier": verifier,
        "recipe": recipe,
        "choices": choices,
        "settings": _verifier_settings(row, verifier),
        "license": text(row, "license"),
    }
    if config == "rollouts":
        return PromptRecord(kind="problem", **fields)
    return RecycledRecord(kind=config, origin=_origin(row, config), **fields)


def group_of(row: Row, config: Config = "rollouts", *, neutralize: Callable[[str], str]) -> RolloutGroup:
    """The verified group of a row of `rollouts` or `reflection`, to be recycled. Its rollouts have no tokens.

    Its record may name any verifier, because recycling runs none: do not run it.

    Raises:
        ValueError: see `record_of`.
    """
    record = record_of(
        row,
        config,
        id=text(row, "parent_id" if config == "rollouts" else "id"),
        recipe=text(row, "recipe"),
        verifiers=(text(row, "verifier"),),
        neutralize=neutralize,
    )
    columns = (completions_column(config), "reward", "parsed", "status", "finish_reason", ANSWER_START)
    lists = [_list(row, column) for column in columns[:-1]]
    lists.append([0] * len(lists[0]) if row.get(ANSWER_START) is None else _list(row, ANSWER_START))
    if len(set(map(len, lists))) != 1:
        raise ValueError(f"{', '.join(map(repr, columns))} are of {', '.join(str(len(of)) for of in lists)} items")
    rollouts, verdicts = [], []
    for completion, reward, parsed, status, finish_reason, answer_start in zip(*lists, strict=True):
        if not isinstance(reward, float) or not 0 <= reward <= 1:
            raise ValueError(f"'reward' holds {type_name(reward)}; numbers in [0, 1] are allowed")
        for column, value, known in (("status", status, _STATUSES), ("finish_reason", finish_reason, _FINISHES)):
            if value not in known:
                raise ValueError(f"{column!r} holds {type_name(value)}; allowed: {', '.join(known)}")
        words = unicode(completion, columns[0])
        if not isinstance(answer_start, int) or not 0 <= answer_start <= len(words):
            raise ValueError(f"{ANSWER_START!r} holds {answer_start!r:.80}; allowed: 0 to the length of the completion")
        rollouts.append(Rollout((), (), words, finish_reason, answer_start))
        verdicts.append(Verdict(reward, None if parsed is None else unicode(parsed, "parsed"), status))
    return RolloutGroup(record, tuple(rollouts), tuple(verdicts))


def _verifier_settings(row: Row, verifier: str) -> tuple[tuple[str, Any], ...]:
    words = text(row, "settings")
    try:
        settings = json.loads(words)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'settings' is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"'settings' is {words!r:.80}; a JSON object is allowed")
    if settings and verifier in VERIFIERS:
        check_settings(verifier, settings)
    return tuple(settings.items())


def _list(row: Row, column: str) -> Sequence[Any]:
    value = cell(row, column)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{column!r} is {type_name(value)}; a list is allowed")
    return value


def _images(row: Row) -> list[ImageRef]:
    images = []
    for item in _list(row, "images"):
        if not isinstance(item, Mapping) or not isinstance(item.get("bytes"), bytes):
            raise ValueError(
                f"'images' holds {type_name(item)}; mappings with bytes are allowed, and paths are never opened"
            )
        images.append(ImageRef(data=item["bytes"]))
    return images


def _messages(row: Row, images: Sequence[ImageRef], neutralize: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with their images; special tokens in their texts are neutralized, as a templater does."""
    refs = iter(images)
    places = 0
    messages = []
    for message in _list(row, "messages"):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise ValueError(f"'messages' holds {type_name(message)}; allowed are the roles {', '.join(_ROLES)}")
        content: list[str | ImageRef] = []
        for part in _list(message, "content"):
            match part:
                case {"type": "image"}:
                    places += 1
                    content += islice(refs, 1)
                case {"type": "text", "text": str(words)} if content and isinstance(content[-1], str):
                    content[-1] += unicode(words, "text")  # joined, so that no special token spans two parts
                case {"type": "text", "text": str(words)}:
                    content.append(unicode(words, "text"))
                case _:
                    raise ValueError(f"'content' holds {type_name(part)}; parts of type text and image are allowed")
        harmless: list[str | ImageRef] = [neutralize(part) if isinstance(part, str) else part for part in content]
        messages.append(Message(message["role"], tuple(harmless)))
    if places != len(images):
        raise ValueError(f"'messages' has places for {places} images, and there are {len(images)}")
    if not any(message.content for message in messages):
        raise ValueError("'messages' is empty")
    return tuple(messages)


def _question(words: str, images: Sequence[ImageRef]) -> Content:
    pieces = [""]
    end = 0
    for mark in re.finditer(rf"(\\*){_PLACE}", words):
        slashes, is_text = divmod(len(mark[1]), 2)
        pieces[-1] += words[end : mark.start()] + "\\" * slashes + _PLACE * is_text
        pieces += [] if is_text else [""]
        end = mark.end()
    pieces[-1] += words[end:]
    if len(pieces) != len(images) + 1:
        raise ValueError(f"'question' has {len(pieces) - 1} places {_PLACE!r} for {len(images)} 'images'")
    return interleaved(pieces, images)


def _origin(row: Row, config: RecycledKind) -> Origin:
    step = cell(row, "step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"'step' is {type_name(step)}; an integer is allowed")
    correct = None if config == "pairwise" else cell(row, "correct")
    if config != "pairwise" and not isinstance(correct, bool):
        raise ValueError(f"'correct' is {type_name(correct)}; true and false are allowed")
    return Origin(
        parent_id=text(row, "parent_id"),
        step=step,
        template=text(row, "template"),
        rollouts=(),
        quoted_correct=correct,
        completions=tuple(unicode(cell(row, column), column) for column in _QUOTED[config]),
    )
