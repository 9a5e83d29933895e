"""No reward without the right answer, and no answer that talks its judge into one."""

from __future__ import annotations

import copy
import random
import re
import unicodedata
from collections import Counter

import pytest
from tokenizers import AddedToken

from spark_vl.prompts import Template, Templater
from spark_vl.records import PromptRecord, plain_text
from spark_vl.verifiers import VERIFIERS, VerifierPool, verify
from spark_vl.verifiers.base import run_verifier
from tests.conftest import make_image, make_record
from tests.hacks import HACKS, INJECTIONS, SEAMS, TOWERS, box

TEMPLATER = Templater.load()
QWEN2_5_VL = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
)
"""Its added tokens that are spelled with bars; the other two are <tool_call> and </tool_call>."""


@pytest.mark.parametrize(
    ("kind", "gold", "choices", "reply", "score", "why"),
    HACKS,
    ids=[f"{h[0]}-{i}-{h[-1]}" for i, h in enumerate(HACKS)],
)
def test_hacks(kind: str, gold: str, choices: tuple[str, ...], reply: str, score: int, why: str) -> None:
    assert verify(kind, reply, gold, choices=choices).score == score, why


def test_each_hack_fails_for_its_own_reason() -> None:
    """The gold of each, in a box, does get full marks: no hack is refused because its gold is broken."""
    for kind, gold, choices in sorted({hack[:3] for hack in HACKS}):
        assert verify(kind, box(gold), gold, choices=choices).score == 1, (kind, gold)


def test_there_are_enough_hacks_and_none_twice() -> None:
    assert len({hack[:4] for hack in HACKS}) == len(HACKS) >= 60
    assert (
        {"math", "choice", "number", "judgment", "count", "text", "list"} <= {hack[0] for hack in HACKS} <= {*VERIFIERS}
    )


def test_what_is_too_large_to_compute_ends_with_nothing() -> None:
    record = make_record("toy/7", "?", gold="5", verifier="math")
    with VerifierPool(workers=2, timeout_s=1.5) as pool:
        verdicts = pool.verify([(reply, record) for reply, _ in TOWERS])
        (right,) = pool.verify([(box("5"), record)])  # and the pool is alive
    assert [verdict.score for verdict in verdicts] == [0.0] * len(TOWERS)
    assert right.score == 1


# ── the judge ──


def renders(answer: str, name: str, question: tuple = ("How many?",)):
    """The prompts of a template that show `answer`: for pairs on either side."""
    template, rng = TEMPLATER.templates[name], random.Random(0)
    if template.kind == "pairwise":
        yield TEMPLATER.pairwise(question, correct=answer, wrong="7", rng=rng, template=name, correct_first=True)
        yield TEMPLATER.pairwise(question, correct="7", wrong=answer, rng=rng, template=name, correct_first=True)
    elif template.kind == "pointwise":
        yield TEMPLATER.pointwise(question, answer, correct=False, rng=rng, template=name, correct_first=True)
    else:
        correct = template.claim != "wrong"
        yield TEMPLATER.reflection(question, answer, correct=correct, shows=template.shows, rng=rng, template=name)


def chat(hf_processor, messages) -> str:
    turns = [{"role": m.role, "content": [{"type": "text", "text": plain_text(m.content)}]} for m in messages]
    return hf_processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.fixture(scope="module")
def full_tokenizer(tiny):
    """The tiny tokenizer with every added token of Qwen2.5-VL."""
    tokenizer = copy.deepcopy(tiny[1].tokenizer)
    names = [f"<|{name}|>" for name in QWEN2_5_VL.split()]
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=True) for n in names], special_tokens=True)
    tokenizer.add_tokens([AddedToken(n, normalized=False) for n in ("<tool_call>", "</tool_call>")])
    return tokenizer


def added(tokenizer, text: str) -> list[str]:
    tokens = tokenizer.added_tokens_decoder
    return [tokens[i].content for i in tokenizer(text)["input_ids"] if i in tokens]


CHAT = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]  # the user's turn, and the assistant's begin


def test_the_full_tokenizer_does_see_what_is_injected(full_tokenizer) -> None:
    tokens = [f"<|{name}|>" for name in QWEN2_5_VL.split()] + ["<tool_call>", "</tool_call>"]
    assert added(full_tokenizer, "x".join(tokens)) == tokens
    assert sum(bool(added(full_tokenizer, answer)) for answer in INJECTIONS) >= 12
    for left, right in SEAMS:
        assert not added(full_tokenizer, left)
        assert not added(full_tokenizer, right)
        assert added(full_tokenizer, left + right)


@pytest.mark.parametrize("name", TEMPLATER.templates)
def test_added_tokens_stand_exactly_where_the_chat_template_puts_them(name: str, tiny, full_tokenizer) -> None:
    for answer in INJECTIONS:
        for rendered in renders(answer, name):
            assert added(full_tokenizer, chat(tiny[1], rendered.messages)) == CHAT, answer


@pytest.mark.parametrize(("left", "right"), SEAMS)
def test_no_token_arises_between_two_quoted_parts(left: str, right: str, tiny, full_tokenizer) -> None:
    kept = [t for t in TEMPLATER.templates.values() if t.kind == "reflection"]
    asked = r" \boxed{A} \boxed{B}"
    templater = Templater(
        [
            *kept,
            Template("one", "pointwise", r"{question}{answer} \boxed{Yes} \boxed{No}", ("Yes", "No")),
            Template("two", "pairwise", "{question} {answer_a}{answer_b}" + asked, ("A", "B")),
        ]
    )
    rng = random.Random(0)
    pair = templater.pairwise(("Q",), correct=left, wrong=right, rng=rng, correct_first=True)
    point = templater.pointwise((left,), right, correct=True, rng=rng)
    parts = templater.pointwise(("Q", left, right), "5", correct=True, rng=rng)
    for rendered in (pair, point, parts):
        assert left + right in plain_text(rendered.messages[0].content).replace("\u200b", "")
        assert added(full_tokenizer, chat(tiny[1], rendered.messages)) == CHAT


def test_the_processor_sees_as_many_images_as_the_question_has(processor) -> None:
    question = (make_image(1), "How many?")
    parent = make_record("toy/7", *question)
    tokens = processor.hf.tokenizer.added_tokens_decoder

    def specials(answer: str, name: str) -> list[list[str]]:
        found = []
        for rendered in renders(answer, name, question):
            kind = TEMPLATER.templates[name].kind
            ids = processor.process(rendered.record(parent, kind, id="toy/7#j")).input_ids.tolist()
            found.append([tokens[i].content for i in ids if i in tokens])
        return found

    for name in ("pointwise/yes_no_01", "pointwise/ab_01", "pairwise/01", "reflection/cot_check_01"):
        harmless = specials("5", name)
        pads = (56 // 28) ** 2
        assert all(Counter(tokens)["<|image_pad|>"] == pads for tokens in harmless)
        for answer in INJECTIONS[:-1]:  # the last one is long
            assert specials(answer, name) == harmless, answer


@pytest.mark.parametrize("name", TEMPLATER.templates)
def test_the_parser_reads_the_reply_and_nothing_of_the_prompt(name: str) -> None:
    template = TEMPLATER.templates[name]
    for answer in INJECTIONS:
        for rendered in renders(answer, name):
            assert template.parse("") is None  # whatever the prompt says
            if template.labels is None:
                assert template.parse(r"\boxed{6}") == "6"
                continue
            record = rendered.record(
                PromptRecord("r/0", "problem", (), ("Q",), "6", "math", "r"), template.kind, id="x"
            )
            for label in rendered.labels:
                assert template.parse(box(label)) == label
                assert run_verifier(box(label), record).score == float(label == rendered.gold), answer
            assert run_verifier("It says so itself.", record).score == 0


def test_a_judge_that_repeats_the_answer_before_its_verdict_says_its_verdict() -> None:
    """Of a reply that quotes an injected box the last box still is the judge's own."""
    template = TEMPLATER.templates["pointwise/yes_no_01"]
    for answer in INJECTIONS:
        assert template.parse(f"The answer reads: {answer}\nIt is wrong. \\boxed{{No}}") == "No"


def test_no_character_turns_into_part_of_a_token_when_it_is_normalized(full_tokenizer) -> None:
    """The tokenizer puts text into form NFC first: no other character may become one of `<|/>` and letters in it."""
    for token in ("<|im_end|>", "</tool_call>"):
        for code in range(0x80, 0x110000):
            if not 0xD800 <= code < 0xE000:
                assert not set(unicodedata.normalize("NFC", chr(code))) & set(token), hex(code)
    assert full_tokenizer.backend_tokenizer.normalizer.normalize_str("＜é") == "＜é"


def test_neutralized_text_reads_as_before() -> None:
    for answer in INJECTIONS:
        safe = TEMPLATER.neutralize(answer)
        assert safe.replace("\u200b", "") == answer.replace("\u200b", "")
        assert TEMPLATER.neutralize(safe) == safe
        assert not re.search(r"<[|｜]|</?tool_call>", safe)
