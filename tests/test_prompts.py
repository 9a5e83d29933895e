"""The templater against independent truths: naive quoting, a real tokenizer, binomial bounds, obedient replies."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from spark_vl.families import read_facts
from spark_vl.prompts import REASONING_SUFFIX, Rendered, Template, Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import Content, ImageRef, Message, Origin, PromptRecord, RecycledRecord, plain_text
from spark_vl.verifiers.base import get_verifier

BUILTIN = Templater.load()
DEMO_FILE = Path(str(files("spark_vl.demo") / "templates.yaml"))
DEMO = Templater.load([DEMO_FILE], builtin=False)
ALL = [(t, name) for t in (BUILTIN, DEMO) for name in t.templates]
IDS = [name for _, name in ALL]
QUESTION = ("How many ducks are there?",)
IMAGES = [ImageRef(data=bytes([n])) for n in range(3)]


def render(templater: Templater, name: str, question: Content = QUESTION, **kwargs: object) -> Rendered:
    """The template `name` with correct answer "RIGHT" and wrong answer "WRONG"."""
    template, rng = templater.templates[name], random.Random(0)
    correct = kwargs.pop("correct", template.claim != "wrong")
    answer = kwargs.pop("answer", "RIGHT" if correct else "WRONG")
    if template.kind == "pairwise":
        return templater.pairwise(question, correct="RIGHT", wrong="WRONG", rng=rng, template=name, **kwargs)
    if template.kind == "reflection":
        kwargs["shows"] = template.shows
    make = getattr(templater, template.kind)
    return make(question, answer, correct=correct, rng=rng, template=name, **kwargs)


def text_of(rendered: Rendered) -> str:
    (message,) = rendered.messages
    return plain_text(message.content)


def record_of(rendered: Rendered, kind: str) -> PromptRecord:
    return RecycledRecord(
        id="r/0@1#x",
        kind=kind,
        messages=rendered.messages,
        question=QUESTION,
        gold=rendered.gold,
        verifier="judgment",
        recipe="r",
        choices=rendered.labels,
        origin=Origin("r/0", 1, rendered.template, (0,)),
    )


def cases(templater: Templater, name: str) -> list[dict]:
    """Every way to render a template that can change its gold."""
    template = templater.templates[name]
    first = (True, False) if template.kind == "pairwise" or template.options else (None,)
    side = (True, False) if template.kind == "pointwise" else (None,)
    return [{k: v for k, v in (("correct_first", f), ("correct", s)) if v is not None} for f in first for s in side]


# ── the shipped sets ──


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("pointwise_yes_no", {("pointwise", False, None, None): 12}),
        ("pointwise_ab", {("pointwise", True, None, None): 12}),
        ("pairwise", {("pairwise", False, None, None): 20}),
        (
            "reflection_cot",
            {("reflection", False, "cot", "check"): 20, ("reflection", False, "cot", "wrong"): 10},
        ),
        (
            "reflection_answer",
            {("reflection", False, "answer", "check"): 20, ("reflection", False, "answer", "wrong"): 10},
        ),
    ],
)
def test_each_shipped_file_holds_enough_of_its_kind_and_no_other(file, counts):
    rows = yaml.safe_load((files("spark_vl.prompts.templates") / f"{file}.yaml").read_text("utf-8"))
    found = Counter((r["kind"], "options" in r, r.get("shows"), r.get("claim")) for r in rows)
    assert found.keys() == counts.keys()
    assert all(found[key] >= n for key, n in counts.items())
    if file.startswith("reflection"):
        check, wrong = (n for _, n in sorted(found.items()))
        assert check == 2 * wrong
    assert {r["name"] for r in rows} <= BUILTIN.templates.keys()


def test_shipped_wordings_are_all_different():
    words = Counter(" ".join(re.findall(r"\w+", t.text.lower())) for t in BUILTIN.templates.values())
    assert max(words.values()) == 1


def test_every_shipped_template_delimits_what_it_quotes():
    same = ('"""', "-----", "=====", "~~~")
    for template in BUILTIN.templates.values():
        for slot in re.findall(r"\{answer\w*\}", template.text):
            before, after = template.text.split(slot)
            if before.endswith('"') and not before.endswith('"""'):
                assert template.shows == "answer", template.name  # short enough to be quoted within a line
                assert after.startswith('"'), template.name
                continue
            opened, closed = before.split("\n")[-2], after.split("\n")[1]
            marks = (opened, closed)
            assert (
                (opened == closed and opened in same)
                or marks in (("<<<", ">>>"), ("«", "»"))
                or re.fullmatch(r"<(\w+)> </\1>", " ".join(marks))
                or re.fullmatch(r"\[(?:BEGIN )?([A-Z ]+)\] \[(?:END OF |END |/)\1\]", " ".join(marks))
            ), (template.name, marks)


def test_the_demo_set_is_short():
    assert all(len(t.text.split()) <= 12 for t in DEMO.templates.values())
    found = Counter((t.kind, t.options is not None, t.shows, t.claim) for t in DEMO.templates.values())
    assert found == {
        ("pointwise", False, None, None): 2,
        ("pointwise", True, None, None): 2,
        ("pairwise", False, None, None): 2,
        ("reflection", False, "answer", "check"): 2,
        ("reflection", False, "answer", "wrong"): 1,
        ("reflection", False, "cot", "check"): 2,
        ("reflection", False, "cot", "wrong"): 1,
    }


# ── wording and parser agree ──


@pytest.mark.parametrize(("templater", "name"), ALL, ids=IDS)
def test_what_a_prompt_asks_for_scores_1_and_its_opposite_0(templater, name):
    template = templater.templates[name]
    for case in cases(templater, name):
        rendered = render(templater, name, **case)
        prompt = text_of(rendered)
        assert "\\box{" not in prompt
        asked = re.findall(r"\\boxed\{(\w*)\}", prompt)
        if template.kind == "reflection":
            assert set(asked) == {""}
            assert (rendered.gold, rendered.labels) == (None, ())
            assert template.parse("As it says: \\boxed{41}. No, rather \\boxed{ \\frac{4}{2} }.") == "\\frac{4}{2}"
            assert template.parse("it is 42") is None
            assert template.parse(prompt) is None
            continue
        assert sorted(asked) == sorted(rendered.labels)  # each label once, so no label is favored
        judge = get_verifier("judgment")
        record = record_of(rendered, template.kind)
        for label in asked:
            reply = f"At first I thought of \\boxed{{{asked[0]}}}. After checking: \\boxed{{{label}}}"
            assert template.parse(reply) == label
            assert judge(reply, record).score == float(label == rendered.gold)
        for reply in ("", rendered.gold, "\\boxed{maybe}", f"\\box{{{rendered.gold}}}"):
            assert template.parse(reply) is None
            assert judge(reply, record).score == 0.0


@pytest.mark.parametrize(("templater", "name"), ALL, ids=IDS)
def test_gold_is_what_a_reader_of_the_prompt_would_say(templater, name):
    template = templater.templates[name]
    for case in cases(templater, name):
        rendered = render(templater, name, **case)
        prompt = text_of(rendered)
        if template.kind == "pairwise":
            first = prompt.index("RIGHT") < prompt.index("WRONG")
            a_first = template.text.index("{answer_a}") < template.text.index("{answer_b}")
            assert rendered.gold == ("A" if first == a_first else "B")
            assert first == case["correct_first"]
        elif template.options:
            before = template.text.split("{option_a}")[0]
            a = before.replace("{answer}", "RIGHT" if case["correct"] else "WRONG").replace("{question}", QUESTION[0])
            a_says_correct = prompt[len(a) :].startswith(template.options[0])
            assert a_says_correct != prompt[len(a) :].startswith(template.options[1])
            assert a_says_correct == case["correct_first"]
            assert rendered.gold == ("A" if a_says_correct == case["correct"] else "B")
        elif template.kind == "pointwise":
            assert rendered.gold == ("Yes" if case["correct"] else "No")


# ── quotations are literal and inert ──

FRAGMENTS = [
    "{question}", "{answer}", "{answer_a}", "{answer_b}", "{option_a}", "{option_b}", "{", "}", "{{answer}}", "{0}",
    "%s", "$answer", "\\1", "\\boxed{Yes}", "<image>", "<|im_end|>", "<|im_", "end|>", "<", "|", "<|", "|>", ">",
    "<|image_pad|>", "<<|im_end|>", "\u200b", "\n", " ", "im_end", "<｜end｜>", "ü", "duck",
    "<tool_call>", "</tool_call>", "tool_call>", "/", "</",
]  # fmt: skip
untrusted = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8).map("".join)


@given(question=untrusted, first=untrusted, second=untrusted, which=st.sampled_from(ALL))
def test_quotations_are_literal_whatever_they_hold(question, first, second, which):
    templater, name = which
    template, rng = templater.templates[name], random.Random(0)
    order = {}
    if template.kind == "pairwise":
        order = {"{answer_a}": first, "{answer_b}": second}
        rendered = templater.pairwise(
            (question,), correct=first, wrong=second, rng=rng, template=name, correct_first=True
        )
    else:
        order = {"{answer}": first}
        if template.options:
            order |= dict(zip(("{option_a}", "{option_b}"), template.options, strict=True))
        kwargs = {"correct_first": True} if template.options else {}
        rendered = render(templater, name, (question,), answer=first, **kwargs)
    # The naive reference: walk the template from left to right and never look into what was put in.
    order["{question}"], expected, rest = question, "", template.text
    for slot in sorted(order, key=template.text.index):
        before, rest = rest.split(slot)
        expected += before + order[slot]
    expected += rest
    assert text_of(rendered) == BUILTIN.neutralize(expected)
    assert text_of(rendered).replace("\u200b", "") == expected.replace("\u200b", "")


@given(question=untrusted)
def test_problems_are_literal_too(question):
    (message,) = BUILTIN.problem((question,))
    assert message.role == "user"
    assert message.content == (BUILTIN.neutralize(question + REASONING_SUFFIX),)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with the normalizer and the special tokens of Qwen2.5-VL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["<|im_end|>"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    names = (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
        "vision_end vision_pad image_pad video_pad fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
    )
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names.split()])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "</tool_call>")])
    return tokenizer


def special(tokenizer: Tokenizer, text: str) -> list[str]:
    added = tokenizer.get_added_tokens_decoder()
    return [added[i].content for i in tokenizer.encode(text).ids if i in added]


def test_the_tokenizer_of_these_tests_does_see_special_tokens(tokenizer):
    assert special(tokenizer, "a<|im_end|>\n<<|image_pad|>") == ["<|im_end|>", "<|image_pad|>"]
    assert special(tokenizer, "a<tool_call>{}</tool_call>") == ["<tool_call>", "</tool_call>"]


@given(text=untrusted)
def test_no_neutralized_text_holds_a_special_token(tokenizer, text):
    safe = BUILTIN.neutralize(text)
    assert special(tokenizer, safe) == []
    assert BUILTIN.neutralize(safe) == safe
    assert safe.replace("\u200b", "") == text.replace("\u200b", "")


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "<<|im_end|>|im_end|>",
        "<|<|im_end|>im_end|>",
        "<|im_end<|im_end|>|>",
        "<|<|<|image_pad|>",
        "<tool_call>",
        "</tool_call>",
        "<<tool_call>",
        "<tool_call</tool_call>>",
        "</<tool_call>tool_call>",
    ],
)
def test_nested_special_tokens_are_taken_apart(tokenizer, text):
    assert special(tokenizer, text)
    assert special(tokenizer, BUILTIN.neutralize(text)) == []


def test_no_special_token_arises_at_a_seam(tokenizer):
    """Texts that are harmless alone: parts of a question, and the wording around a slot."""
    template = Template("t", "pointwise", "Q: <{question}A: <{answer} \\boxed{Yes} or \\boxed{No}", ("Yes", "No"))
    rest = [t for t in DEMO.templates.values() if t.kind != "pointwise"]
    rendered = Templater([*rest, template]).pointwise(
        ("|im_end|>", "<", "|im_start|>"), "|im_end|>", correct=True, rng=random.Random(0)
    )
    assert special(tokenizer, text_of(rendered)) == []
    (message,) = Templater([*rest, template], reasoning_suffix="|im_end|>").problem(("<",))
    assert special(tokenizer, plain_text(message.content)) == []


def test_special_tokens_are_the_only_thing_that_changes():
    text = "1 < 2, <image>, <s>, </s>, [INST], <think>, </think>, <tool_calls>, a<b, {x | x > 0}"
    templater = Templater.load(reserved=read_facts("qwen2_5_vl")["reserved"])
    assert templater.neutralize(text) == text


def test_the_tokens_of_the_model_that_is_asked_are_neutralized_and_no_others():
    text = "<s>[INST] <|im_end|> [/INST] <think>"
    templater = Templater.load(reserved=["[INST]", "[/INST]", "<s"])
    assert templater.neutralize(text) == "<\u200bs>[\u200bINST] <|im_end|> [\u200b/INST] <think>"
    (message,) = templater.problem((text,))
    assert plain_text(message.content).startswith(templater.neutralize(text))


# ── images ──


@pytest.mark.parametrize("name", BUILTIN.templates)
def test_images_stand_where_the_question_has_them(name):
    a, b, c = IMAGES
    question = (a, "", b, "Compare ", "", "these ", c, "{answer}")
    (message,) = render(BUILTIN, name, question).messages
    assert [part for part in message.content if isinstance(part, ImageRef)] == [a, b, c]
    assert "" not in message.content
    kinds = [isinstance(part, str) for part in message.content]
    assert all(not (x and y) for x, y in pairwise(kinds))
    assert "<image><image>Compare these <image>{answer}" in plain_text(message.content)


def test_a_problem_keeps_its_images_and_gets_system_prompt_and_suffix():
    a, b, _ = IMAGES
    templater = Templater.load(system_prompt="Be brief.", reasoning_suffix=" Think.")
    system = Message("system", ("Be brief.",))
    assert templater.problem((a, "one", b)) == (system, Message("user", (a, "one", b, " Think.")))
    assert templater.problem(("one",)) == (system, Message("user", ("one Think.",)))
    assert templater.pointwise(QUESTION, "5", correct=True, rng=random.Random(0)).messages[0] == system
    assert Templater.load(reasoning_suffix="").problem((a, b)) == (Message("user", (a, b)),)
    assert "\\boxed{}" in REASONING_SUFFIX


# ── drawing ──

N = 2000


def balanced(n: int, of: int) -> bool:
    """Whether `n` heads are within 4 standard deviations of what a fair coin gives."""
    return abs(n - of / 2) < 4 * math.sqrt(of) / 2


@pytest.mark.parametrize("correct", [True, False])
def test_polarity_is_drawn(correct):
    drawn = [BUILTIN.pointwise(QUESTION, "x", correct=correct, rng=random.Random(s)) for s in range(N)]
    ab = [r for r in drawn if r.labels == ("A", "B")]
    assert balanced(len(ab), N)  # both ways to ask are equally likely
    assert balanced(sum(r.gold == "A" for r in ab), len(ab))
    assert {r.gold for r in drawn if r.labels != ("A", "B")} == {"Yes" if correct else "No"}
    assert {r.template for r in drawn} == {n for n, t in BUILTIN.templates.items() if t.kind == "pointwise"}


def test_positions_are_drawn():
    drawn = [BUILTIN.pairwise(QUESTION, correct="x", wrong="y", rng=random.Random(s)) for s in range(N)]
    assert balanced(sum(r.gold == "A" for r in drawn), N)
    assert {r.template for r in drawn} == {n for n, t in BUILTIN.templates.items() if t.kind == "pairwise"}
    by_template = Counter((r.template, r.gold) for r in drawn)
    assert len(by_template) == 2 * len({r.template for r in drawn})


def test_the_wording_does_not_give_the_gold_away():
    """All that changes with the correctness of the answer is the gold."""
    for seed in range(100):
        right, wrong = (BUILTIN.pointwise(QUESTION, "x", correct=c, rng=random.Random(seed)) for c in (True, False))
        assert right.messages == wrong.messages
        assert {right.gold, wrong.gold} == set(right.labels)
    for seed in range(100):
        a, b = (
            BUILTIN.pairwise(QUESTION, correct=c, wrong=w, rng=random.Random(seed), correct_first=f)
            for c, w, f in (("x", "y", True), ("y", "x", False))
        )
        assert a.messages == b.messages
        assert (a.gold, b.gold) == ("A", "B")


@pytest.mark.parametrize("shows", ["answer", "cot"])
def test_a_correct_answer_is_never_called_wrong(shows):
    for correct, claims in ((True, {"check"}), (False, {"check", "wrong"})):
        drawn = {
            BUILTIN.reflection(QUESTION, "5", correct=correct, shows=shows, rng=random.Random(s)).template
            for s in range(1000)
        }
        fitting = {n for n, t in BUILTIN.templates.items() if t.shows == shows and t.claim in claims}
        assert drawn == fitting
    with pytest.raises(ValueError, match=r"found 'reflection/cot_wrong_01'; allowed is a reflection .*check"):
        BUILTIN.reflection(
            QUESTION,
            "5",
            correct=True,
            shows="cot",
            rng=random.Random(0),
            template="reflection/cot_wrong_01",
        )


@pytest.mark.parametrize("shows", ["answer", "cot"])
def test_a_claim_can_be_asked_for_but_not_that_a_correct_answer_is_wrong(shows):
    for claim in ("check", "wrong"):
        rendered = [
            BUILTIN.reflection(QUESTION, "5", correct=False, claim=claim, shows=shows, rng=random.Random(s))
            for s in range(50)
        ]
        found = {BUILTIN.templates[r.template] for r in rendered}
        assert len(found) > 1
        assert {(t.shows, t.claim) for t in found} == {(shows, claim)}
    with pytest.raises(ValueError, match="claim: found 'wrong' for a correct answer; allowed: 'check'"):
        BUILTIN.reflection(QUESTION, "5", correct=True, claim="wrong", shows=shows, rng=random.Random(0))


def test_the_same_seed_gives_the_same_prompt():
    def prompts(seed: int) -> list[Rendered]:
        templater, rng = Templater.load(), random.Random(seed)
        return [
            render
            for _ in range(5)
            for render in (
                templater.pointwise(QUESTION, "x", correct=True, rng=rng),
                templater.pairwise(QUESTION, correct="x", wrong="y", rng=rng),
                templater.reflection(QUESTION, "x", correct=False, shows="cot", rng=rng),
            )
        ]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_a_template_of_another_kind_cannot_be_asked_for():
    with pytest.raises(ValueError, match=r"found 'pairwise/01'; allowed is a pointwise: .*pointwise/ab_01"):
        BUILTIN.pointwise(QUESTION, "x", correct=True, rng=random.Random(0), template="pairwise/01")


# ── users' files ──

YES_NO = {
    "name": "mine/1",
    "kind": "pointwise",
    "labels": ["Yes", "No"],
    "text": "{question} Got {answer}. \\boxed{Yes} or \\boxed{No}?",
}
AB = YES_NO | {
    "labels": ["A", "B"],
    "options": ["ok", "bad"],
    "text": "{question} {answer} A {option_a} B {option_b} \\boxed{A} or \\boxed{B}?",
}
REFLECTION = {
    "name": "mine/2",
    "kind": "reflection",
    "shows": "cot",
    "claim": "check",
    "text": "{question} {answer} \\boxed{}",
}


def write(tmp_path: Path, rows: object, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else yaml.safe_dump(rows), "utf-8")
    return path


def test_a_file_adds_and_replaces(tmp_path):
    replaced = {**YES_NO, "name": "pointwise/yes_no_01"}
    first = write(tmp_path, [YES_NO, replaced])
    second = write(tmp_path, [{**YES_NO, "text": "2nd " + YES_NO["text"]}], "second.yaml")
    templater = Templater.load([first, str(second)])
    assert templater.templates.keys() == BUILTIN.templates.keys() | {"mine/1"}
    assert templater.templates["pointwise/yes_no_01"].text == YES_NO["text"]
    assert templater.templates["mine/1"].text.startswith("2nd ")
    drawn = {templater.pointwise(QUESTION, "x", correct=True, rng=random.Random(s)).template for s in range(1000)}
    assert "mine/1" in drawn


def test_literal_braces_are_allowed(tmp_path):
    text = "In the set {x} or {1, 2}, \\frac{ab}{cd} \\text{cm} {a: 1} {{}} " + YES_NO["text"]
    templater = Templater.load([write(tmp_path, [{**YES_NO, "text": text}])])
    assert text_of(render(templater, "mine/1", ("Q",))) == text.replace("{question}", "Q").replace("{answer}", "RIGHT")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (YES_NO | {"color": "red"}, r"'mine/1': found color; allowed: name, kind, text, labels"),
        (YES_NO | {"name": ""}, r"template '': name: found ''; allowed: a text"),
        (YES_NO | {"name": 7}, r"name: found 7"),
        ({k: v for k, v in YES_NO.items() if k != "kind"}, r"kind: found None; allowed: pointwise or pairwise or"),
        (YES_NO | {"kind": "problem"}, r"kind: found 'problem'"),
        (YES_NO | {"kind": {}}, r"kind: found \{\}"),
        ({k: v for k, v in YES_NO.items() if k != "text"}, r"text: found None; allowed: a text"),
        (YES_NO | {"labels": [True, False]}, r"labels: found \(True, False\); allowed: \['Yes', 'No'\], in quotes"),
        (YES_NO | {"labels": ["No", "Yes"]}, r"labels: found \('No', 'Yes'\)"),
        (YES_NO | {"labels": ["A", "B"]}, r"labels: found .*'B'\); allowed: \['Yes', 'No'\]"),
        ({k: v for k, v in YES_NO.items() if k != "labels"}, r"labels: found None"),
        (AB | {"labels": ["Yes", "No"]}, r"labels: found .*'No'\); allowed: \['A', 'B'\]"),
        (AB | {"options": ["ok", "ok"]}, r"options: found \('ok', 'ok'\); allowed: two different texts"),
        (AB | {"options": "ok"}, r"options: found 'ok'; allowed: two"),
        (AB | {"options": ["ok", True]}, r"options: found \('ok', True\); allowed: two"),
        (AB | {"text": AB["text"].replace("{option_b}", "bad")}, r"text: found .*\{option_b\}, each once"),
        (YES_NO | {"options": ["ok", "bad"]}, r"labels: found .*allowed: \['A', 'B'\]"),
        (REFLECTION | {"options": ["ok", "bad"]}, r"options: found .*allowed: none in a reflection template"),
        (REFLECTION | {"labels": ["Yes", "No"]}, r"labels: found .*allowed: none"),
        (REFLECTION | {"shows": "all"}, r"shows: found 'all'; allowed: answer or cot in a reflection"),
        ({k: v for k, v in REFLECTION.items() if k != "claim"}, r"claim: found None; allowed: check or wrong"),
        (YES_NO | {"shows": "cot"}, r"shows: found 'cot'; allowed: none in a pointwise"),
        (YES_NO | {"claim": "check"}, r"claim: found 'check'; allowed: none in a pointwise"),
        (
            YES_NO | {"text": "{question} \\boxed{Yes} \\boxed{No}"},
            r"text: found \['\{question\}'\]; allowed: the slots \{question\}, \{answer\}, each once",
        ),
        (YES_NO | {"text": YES_NO["text"] + "{answer}"}, r"text: found .*allowed: the slots"),
        (YES_NO | {"text": YES_NO["text"] + "{answer_b}"}, r"text: found .*\{answer_b\}.*allowed: the slots"),
        (YES_NO | {"text": YES_NO["text"] + "{hint}"}, r"text: found .*\{hint\}.*allowed: the slots"),
        (YES_NO | {"text": YES_NO["text"] + "\\box{}"}, r"text: found .*allowed: \\boxed\{"),
        (
            YES_NO | {"text": "{question} {answer} \\boxed{Yes}"},
            r"text: found .*asks for \\boxed\{Yes\} and \\boxed\{No\}",
        ),
        (REFLECTION | {"text": "{question} {answer}"}, r"text: found .*asks for \\boxed\{"),
        ("text", r"found 'text'; allowed: a mapping with name, kind"),
    ],
)
def test_a_bad_template_is_named_with_file_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"mine\.yaml: entry 2: .*" + message):
        Templater.load([write(tmp_path, [YES_NO | {"name": "fine"}, row])])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([YES_NO, YES_NO], r"name: more than one template is named mine/1"),
        ("a: [", r"is not valid YAML"),
        (b"\xff\xff", r"is not valid YAML"),
        ({"templates": []}, r"found dict; allowed: a list of templates"),
        ([], r"found list; allowed: a list of templates, not empty"),
        ("", r"found NoneType"),
    ],
)
def test_a_bad_file_is_named(tmp_path, rows, message):
    path = write(tmp_path, "" if isinstance(rows, bytes) else rows)
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    with pytest.raises(ValueError, match=r"mine\.yaml: " + message):
        Templater.load([path])
    with pytest.raises(FileNotFoundError):
        Templater.load([tmp_path / "none.yaml"])


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ({"kind": "pointwise"}, "there is no pointwise"),
        ({"kind": "pairwise"}, "there is no pairwise"),
        ({"shows": "answer"}, "there is no reflection that shows: answer;"),
        ({"shows": "cot", "claim": "check"}, "there is no reflection that shows: cot, claim: check;"),
    ],
)
def test_a_set_that_lacks_a_kind_fails_at_once(left_out, message):
    kept = [t for t in DEMO.templates.values() if any(getattr(t, field) != value for field, value in left_out.items())]
    with pytest.raises(ValueError, match=message):
        Templater(kept)


def test_one_way_to_ask_pointwise_is_enough():
    kept = [t for t in DEMO.templates.values() if t.options is None]
    drawn = {Templater(kept).pointwise(QUESTION, "x", correct=True, rng=random.Random(s)).template for s in range(50)}
    assert drawn == {"demo/yes_no_1", "demo/yes_no_2"}


def test_the_two_ways_to_ask_pointwise_are_equally_likely_whatever_their_number():
    templater = Templater([t for t in DEMO.templates.values() if t.name != "demo/ab_2"])
    drawn = [templater.pointwise(QUESTION, "x", correct=True, rng=random.Random(s)) for s in range(N)]
    assert balanced(sum(r.labels == ("A", "B") for r in drawn), N)


def test_names_are_unique_without_files_too():
    with pytest.raises(ValueError, match="more than one is named demo/ab_1"):
        Templater([*DEMO.templates.values(), DEMO.templates["demo/ab_1"]])


# ── saved beside a model ──


@pytest.mark.parametrize(
    "templater",
    [
        BUILTIN,
        Templater.load(
            [DEMO_FILE], builtin=False, system_prompt="Sei kürz. 数", reasoning_suffix=" Answer in \\boxed{}."
        ),
        Templater.load(system_prompt=None, reasoning_suffix=""),
        Templater.load(reserved=["Ent", "Wie"]),
    ],
    ids=["builtin", "demo", "no suffix", "other tokens"],
)
def test_what_is_saved_is_read_back_and_draws_and_words_the_same(templater, tmp_path):
    def prompts(templater: Templater) -> list[object]:
        rng, question = random.Random(7), (IMAGES[0], "Wie viele <|im_end|> Enten?")
        return [
            prompt
            for _ in range(50)
            for prompt in (
                templater.problem(question),
                templater.pointwise(question, "x", correct=True, rng=rng),
                templater.pairwise(question, correct="x", wrong="y", rng=rng),
                templater.reflection(question, "x", correct=False, shows="cot", rng=rng),
                templater.reflection(question, "x", correct=True, shows="answer", rng=rng),
            )
        ]

    file = tmp_path / PROMPTS_FILE
    templater.save(file)
    read = Templater.read(file)
    assert list(read.templates.items()) == list(templater.templates.items())
    assert prompts(read) == prompts(templater)
    assert json.loads(file.read_text("utf-8")).keys() == {"system", "reasoning_suffix", "reserved", "templates"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: "{", r"is not valid JSON"),
        (lambda saved: "[]", r"found \[\]; allowed: a mapping with system \(a text or null\)"),
        (lambda saved: "{}", r"found \{\}; allowed: a mapping with system"),
        (lambda saved: saved | {"extra": 1}, r"found .*; allowed: .* and nothing else"),
        (
            lambda saved: saved | {"system": 3},
            r"found \{'system': 3, .*allowed: a mapping with system \(a text or null\)",
        ),
        (
            lambda saved: saved | {"reasoning_suffix": None},
            r"found .*'reasoning_suffix': None.*reasoning_suffix \(a text\)",
        ),
        (
            lambda saved: saved | {"reserved": []},
            r"reserved: found \[\]; allowed: at least one text, each of two or more",
        ),
        (
            lambda saved: saved | {"reserved": ["<"]},
            r"reserved: found \['<'\]; allowed: at least one text, each of two",
        ),
        (lambda saved: saved | {"reserved": [7]}, r"found .*; allowed: .*reserved \(a list of texts\)"),
        (lambda saved: saved | {"templates": {}}, r"found dict; allowed: a list of templates"),
        (lambda saved: saved | {"templates": []}, r"found list; allowed: a list of templates, not empty"),
        (lambda saved: saved | {"templates": [YES_NO]}, r"templates: there is no pairwise"),
        (lambda saved: saved | {"templates": [YES_NO, YES_NO]}, r"name: more than one template is named mine/1"),
        (
            lambda saved: saved | {"templates": [YES_NO | {"labels": ["No", "Yes"]}]},
            r"entry 1: template 'mine/1': labels: found \('No', 'Yes'\)",
        ),
    ],
)
def test_a_bad_saved_file_is_named(change, message, tmp_path):
    file = tmp_path / PROMPTS_FILE
    DEMO.save(file)
    changed = change(json.loads(file.read_text("utf-8")))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed), "utf-8")
    with pytest.raises(ValueError, match=r"spark_prompts\.json: " + message):
        Templater.read(file)
