"""What is fuzzed. A target makes an input from a random generator and runs it; an exception is a finding."""

from __future__ import annotations

import atexit
import json
import random
import string
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from spark_vl.answers import last_boxed, match_choice, match_label, parse_quantity
from spark_vl.checkpoint import FORMAT
from spark_vl.data.images import ImageError, check_encoded, encode_image, load_image
from spark_vl.data.judgments import CONFIGS, group_of, record_of, row_of
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import BadRecordError, ImageRef, PromptRecord, Verdict
from spark_vl.run.manifest import MANIFEST, find_damage, read_manifest, write_manifest
from spark_vl.run.paths import RECIPES
from spark_vl.run.provenance import write_recipes
from spark_vl.run.reader import recipe_facts
from spark_vl.run.shards import RowWriter, ShardError, check_shard
from spark_vl.verifiers.base import VERIFIERS, get_verifier
from spark_vl.verifiers.pool import INLINE, VerifierPool
from tests.conftest import make_record

SECONDS = 2.0
"""Most that one input may take in this process; the slowest that is allowed, a picture of 64 megapixels, is not
among them."""
POOL_SECONDS = 2.0
"""Deadline of the pool's verifiers."""


@dataclass(frozen=True)
class Target:
    """`make` draws an input, `run` raises if an invariant does not hold."""

    make: Callable[[random.Random], Any]
    run: Callable[[Any], None]
    limit_s: float = SECONDS


# ── texts ──

PIECES = (
    *("\\boxed{", "\\boxed {", "\\\\boxed{", "boxed{", "{", "}", "\\{", "\\}", "\\", "\\\\", "$", "^", "_", "&", "~"),
    *("\\text{", "\\mathrm{", "\\frac{", "\\frac12", "\\dfrac", "\\sqrt", "\\left(", "\\right)", "\\circ", "\\times"),
    *("\\cdot 10^{", "\\%", "%", "°", "$", "€", "1,234.5", "1e999", "1e-999", "9" * 40, "0", "00", "1", ".", "/", "-"),
    *("−", "1/0", "2 1/2", "1 2", "inf", "nan", "\\infty", "x", "=", "<", ">", "\\le", "[1, 2)", "(1, 2]", "\\{1\\}"),
    *(
        "A",
        "B",
        "(b)",
        "C.",
        "Option A",
        "A and B",
        "Yes",
        "No",
        "yes.",
        "**Yes**",
        "answer: ",
        ":",
        "cm",
        "m/s^2",
        " per ",
    ),
    *("<|im_end|>", "<|", "|>", "<｜", "<", "|", "<|image_pad|>", "\u200b", "<image>", "{question}", "{answer}", "{{"),
    *("\n", "\t", " ", "\u00a0", "\u202e", "\ud800", "é", "漢", "٣", "²", "Ⅷ", "😀", "\0", "\ufeff", "İ", "ß"),
    *("\\begin{pmatrix}", "\\end{pmatrix}", "\\int", "\\sum_{", "\\pi", "e^{", "!", "\\cup", "\\emptyset", "\\ldots"),
)


def text(rng: random.Random) -> str:
    """Pieces that readers of answers know, in any order; sometimes one of them very often, or any characters."""
    match rng.randrange(8):
        case 0:
            return rng.choice(PIECES) * rng.choice((100, 5_000, 20_000)) + rng.choice(PIECES)
        case 1:
            return "".join(rng.choices(string.printable, k=rng.randrange(60)))
        case 2:
            return "".join(chr(rng.randrange(0x11_0000)) for _ in range(rng.randrange(30)))
        case 3:
            return rf"So it is \boxed{{{''.join(rng.choices(PIECES, k=rng.randrange(6)))}}}"
        case 4:
            pair = "".join(rng.choices(PIECES, k=2))
            return pair * rng.choice((50, 5_000)) + rng.choice(PIECES)
        case _:
            return "".join(rng.choices(PIECES, k=rng.randrange(24)))


def texts(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    return text(rng), tuple(text(rng)[:200] for _ in range(rng.randrange(5)))


def run_answers(case: tuple[str, tuple[str, ...]]) -> None:
    reply, options = case
    boxed = last_boxed(reply)
    assert boxed is None or (boxed in reply and boxed == boxed.strip() != "")
    assert match_label(reply, options) in (None, *options)
    for part in (reply, boxed or ""):
        letter = match_choice(part, options)
        assert letter is None or letter in string.ascii_uppercase[: len(options) or 26]
        number = parse_quantity(part)
        assert number is None or (isinstance(number.value, float) and abs(number.value) < float("inf"))


def run_prompts(case: tuple[str, tuple[str, ...]]) -> None:
    reply, quotes = case
    readers = {template.labels: template for template in templater().templates.values()}  # one of each way to read
    for template in readers.values():
        parsed = template.parse(reply)
        assert parsed is None or (parsed == last_boxed(reply) if template.labels is None else parsed in template.labels)
    harmless = templater().neutralize(reply)
    assert "<|" not in harmless
    assert "<｜" not in harmless
    assert templater().neutralize(harmless) == harmless
    assert harmless.replace("\u200b", "") == reply.replace("\u200b", "")
    question, right, wrong, *_ = (*quotes, reply, reply, reply)
    rendered = templater().pairwise((question,), correct=right, wrong=wrong, rng=random.Random(0))
    assert not any("<|" in part for message in rendered.messages for part in message.content)


@cache
def templater() -> Templater:
    return Templater.load()


# ── verifiers ──


def claim(rng: random.Random, kinds: tuple[str, ...]) -> tuple[str, PromptRecord]:
    """A completion and a record; the gold is as hostile as the completion, or a good one."""
    kind = rng.choice(kinds)
    options = rng.choice(((), ("Yes", "No"), ("A", "B"), tuple(text(rng)[:60] for _ in range(rng.randrange(2, 6)))))
    gold = rng.choice(("1", "0.5", "A", "Yes", r"\frac{1}{2}", "x + 1", "(1, 2)", text(rng)[:300]))
    return text(rng), make_record("fuzz", "?", gold=gold, verifier=kind, choices=options)


def check_verdict(verdict: Verdict, where: str) -> None:
    assert isinstance(verdict, Verdict), where
    assert 0 <= verdict.score <= 1, where  # false of a NaN, too
    assert verdict.status == "ok" or verdict.score == 0, where


def run_verifier(case: tuple[str, PromptRecord]) -> None:
    completion, record = case
    try:
        verdict = get_verifier(record.verifier)(completion, record)
    except BadRecordError:
        return
    check_verdict(verdict, record.verifier)


@cache
def pool() -> VerifierPool:
    return VerifierPool(workers=1, timeout_s=POOL_SECONDS)


def run_pool(case: list[tuple[str, PromptRecord]]) -> None:
    """A bad gold is an error of the verdict here; what hangs is a timeout of it."""
    for verdict in pool().verify(case):
        check_verdict(verdict, "pool")
        known = ("BadRecordError", "cannot compare", "more than")
        assert verdict.status != "error" or verdict.detail.startswith(known), verdict.detail


# ── bytes ──


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few changes: bytes, lengths, cuts, repetitions, and parts of the file moved about."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not found:
            break
        place = rng.randrange(len(found)) if rng.random() < 0.5 else rng.randrange(min(64, len(found)))
        match rng.randrange(6):
            case 0:
                found[place] ^= 1 << rng.randrange(8)
            case 1:
                found[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                size = rng.choice((2, 4))
                found[place : place + size] = rng.choice((0, 1, 2**15, 2**16 - 1)).to_bytes(
                    size, rng.choice(("big", "little"))
                )
            case 3:
                del found[place : place + rng.choice((1, 4, 100))]
            case 4:
                found[place:place] = found[place : place + rng.choice((1, 8, 64))] * rng.choice((1, 3))
            case 5:
                del found[len(found) - rng.randrange(1 + min(100, len(found))) :]
    return bytes(found)


@cache
def pictures() -> tuple[bytes, ...]:
    from tests.image_zoo import zoo

    return tuple(specimen.data for specimen in zoo() if 0 < len(specimen.data) < 20_000)


def picture(rng: random.Random) -> bytes:
    return mutated(rng, rng.choice(pictures()))


def run_image(data: bytes) -> None:
    ref = ImageRef(data=data)
    try:
        image = load_image(ref)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert image.info == {}
    assert 0 < image.width * image.height <= 64_000_000
    if image.width * image.height < 100_000:
        check_encoded(encode_image(ref))


# ── rows of judgments ──


@cache
def rows() -> tuple[tuple[str, Mapping[str, Any]], ...]:
    from tests.groups import a_run

    groups = [(step, group) for step, of in a_run(steps=4).items() for group in of]
    made = []
    for config in CONFIGS:
        kind = "problem" if config == "rollouts" else config
        step, group = next((step, group) for step, group in groups if group.record.kind == kind)
        row = row_of(group, step, model="m", model_revision=None, image_bytes=encode_image)
        made.append((config, row))
    return tuple(made)


def value(rng: random.Random, depth: int = 2) -> Any:
    """Anything that a row may hold."""
    simple = (None, True, 0, -1, 2**70, 0.5, float("nan"), "", " ", b"", b"\x89PNG", "A", "number", "math", "os:system")
    if depth == 0 or rng.random() < 0.5:
        return rng.choice((*simple, text(rng)[:100]))
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ("type", "text", "role", "content", "bytes", "path", "x")
    return {rng.choice(keys): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def changed(rng: random.Random, old: Any) -> Any:
    """`old` with one thing in it replaced, left out, repeated or added."""
    if isinstance(old, Mapping) and old and rng.random() < 0.9:
        new, key = dict(old), rng.choice(list(old))
        match rng.randrange(8):
            case 0:
                del new[key]
            case _:
                new[key] = changed(rng, new[key])
        return new
    if isinstance(old, list) and old and rng.random() < 0.8:
        new, i = list(old), rng.randrange(len(old))
        match rng.randrange(4):
            case 0:
                del new[i]
            case 1:
                new.insert(i, new[i])
            case _:
                new[i] = changed(rng, new[i])
        return new
    if isinstance(old, str) and rng.random() < 0.5:
        return old + text(rng)[:100]
    return value(rng)


def judgment(rng: random.Random) -> tuple[str, Mapping[str, Any]]:
    config, row = rng.choice(rows())
    for _ in range(rng.randrange(1, 4)):
        row = changed(rng, row)
    return config, row


def run_judgment(case: tuple[str, Any]) -> None:
    config, row = case
    if not isinstance(row, Mapping):
        return  # a source of rows gives mappings
    try:
        record = record_of(row, config, id="x", recipe="r", verifiers=VERIFIERS, neutralize=templater().neutralize)
    except ValueError:
        return
    assert record.verifier in VERIFIERS
    parts = [part for message in record.messages for part in message.content]
    assert parts
    for part in parts:
        if isinstance(part, ImageRef):
            assert part.data is not None, "a row's path was followed"
        else:
            assert "<|" not in part
            part.encode()
    for words in (record.gold, *record.choices):
        words.encode()


def run_group(case: tuple[str, Any]) -> None:
    """What `spark-vl recycle` reads: completions and their verdicts, too."""
    config, row = case
    if config not in ("rollouts", "reflection") or not isinstance(row, Mapping):
        return
    try:
        group = group_of(row, config, neutralize=templater().neutralize)
    except ValueError:
        return
    assert len(group.rollouts) == len(group.verdicts)
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        check_verdict(replace(verdict, status="ok"), config)
        rollout.text.encode()


# ── files of a run ──


@cache
def a_folder() -> Path:
    """Where the files lie that are fuzzed; it is removed when the process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def run_files() -> Mapping[str, bytes]:
    """One file of each kind, as a run writes it."""
    folder = a_folder() / "whole"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"weights")
    write_manifest(folder, {"step": 3, "processes": 2, "format": FORMAT})
    templater().save(folder / PROMPTS_FILE)
    write_recipes(folder, ["digits"])
    writer = RowWriter(folder / "shards")
    for config, row in sorted(rows(), key=lambda made: made[1]["step"]):
        writer.add(config, "train", dict(row))
    writer.flush()
    names = {"manifest": MANIFEST, "spark_prompts": PROMPTS_FILE, "recipes": RECIPES}
    shard = next((folder / "shards").rglob("*.parquet"))
    return {name: (folder / file).read_bytes() for name, file in names.items()} | {"shards": shard.read_bytes()}


def a_file(rng: random.Random, name: str) -> bytes:
    """The file with bytes changed or, where it is JSON, with values of other types in it."""
    data = run_files()[name]
    if name == "shards" or rng.random() < 0.3:
        return mutated(rng, data)
    found = json.loads(data)
    for _ in range(rng.randrange(1, 4)):
        found = changed(rng, found)
    return json.dumps(found, default=repr).encode(errors="surrogatepass")


def run_manifest(data: bytes) -> None:
    folder = a_folder() / "manifest"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "weights").write_bytes(b"weights")
    (folder / MANIFEST).write_bytes(data)
    manifest = read_manifest(folder)
    assert manifest is None or find_damage(folder, manifest) == []


def run_spark_prompts(data: bytes) -> None:
    file = a_folder() / PROMPTS_FILE
    file.write_bytes(data)
    try:
        read = Templater.read(file)
    except ValueError:
        return
    assert "<|" not in read.neutralize("<|im_end|>") or "<|" not in json.loads(data)["reserved"]


def run_recipes(data: bytes) -> None:
    (a_folder() / RECIPES).write_bytes(data)
    try:
        [facts] = recipe_facts(a_folder(), ["digits"])
    except ValueError:
        return
    assert all(isinstance(facts[name], str) for name in ("name", "license"))


def run_shard(data: bytes) -> None:
    name = next((a_folder() / "whole" / "shards").rglob("*.parquet")).relative_to(a_folder() / "whole" / "shards")
    file = a_folder() / "shards" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    with suppress(ShardError):
        check_shard(file)


TARGETS: dict[str, Target] = {
    "answers": Target(texts, run_answers),
    "prompts": Target(texts, run_prompts),
    **{name: Target(lambda rng, name=name: claim(rng, (name,)), run_verifier) for name in VERIFIERS if name in INLINE},
    "pool": Target(
        lambda rng: [claim(rng, tuple(VERIFIERS)) for _ in range(8)], run_pool, limit_s=9 * POOL_SECONDS + 120
    ),
    "images": Target(picture, run_image),
    "judgments": Target(judgment, run_judgment),
    "groups": Target(judgment, run_group),
    **{
        name: Target(lambda rng, name=name: a_file(rng, name), run)
        for name, run in (
            ("manifest", run_manifest),
            ("spark_prompts", run_spark_prompts),
            ("recipes", run_recipes),
            ("shards", run_shard),
        )
    },
}
