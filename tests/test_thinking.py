"""A chain of thought that a model marks as such is no answer: to no verifier, no judge, and in no quotation."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch

from spark_vl.config import RecycleConfig
from spark_vl.data.judgments import ANSWER_START, features, group_of
from spark_vl.evaluation.prompts import judge_own
from spark_vl.families.base import ProcessedPrompt
from spark_vl.prompts import Templater
from spark_vl.records import Rollout, RolloutGroup
from spark_vl.recycle import recycle
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.run.codec import group_from_json, group_to_json
from spark_vl.run.shards import find_shards, read_shard
from spark_vl.verifiers import verify_groups
from tests.conftest import make_record
from tests.groups import TEMPLATER, problem, write
from tests.tiny_families import THINKING_TEMPLATE, qwen3_vl_processor, tiny_family

TEXTS = {
    # completion: answer where nothing has begun a thought, and where the chat template has
    r"so \boxed{5}": (r"so \boxed{5}", ""),
    r"I see 3 \boxed{3}</think>" + "\n\n" + r"\boxed{5}": (r"\boxed{5}", r"\boxed{5}"),
    r"<think>\boxed{3}</think>\boxed{5}": (r"\boxed{5}", r"\boxed{5}"),
    r"<think>\boxed{3}": ("", ""),
    r"\boxed{3}<think>": ("", ""),
    r"<think>a</think>\boxed{3}<think>b</think> \boxed{5}": (r"\boxed{5}", r"\boxed{5}"),
    r"<think>a</think>\boxed{3}<think>b": ("", ""),
    r"<think>\boxed{3}</think>": ("", ""),
    "": ("", ""),
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Of Qwen3-VL as its instructed checkpoints are, and as those that think."""
    family = tiny_family("qwen3_vl")
    loaded = []
    for name in ("instruct", "thinking"):
        folder = tmp_path_factory.mktemp(name)
        config = family.save(folder)
        if name == "thinking":
            qwen3_vl_processor(chat_template=THINKING_TEMPLATE).save_pretrained(folder)
        loaded.append(family.load_processor(config))
    return loaded


def completion(text: str, start: int = 0) -> Rollout:
    return Rollout((1,), (-0.5,), text, "stop", start)


@pytest.mark.parametrize("text", TEXTS)
def test_the_answer_stands_behind_the_last_thought(processors, processor, text):
    for one, expected in zip(processors, TEXTS[text], strict=True):
        assert completion(text, one.answer_start(text)).answer_text == expected
    assert processor.answer_start(text) == 0, "Qwen2.5-VL marks no thoughts"


def test_the_marks_are_tokens_that_completions_keep(processors):
    for text in ("<think>", "</think>"):
        (token,) = processors[0].tokenizer(text)["input_ids"]
        assert processors[0].decode([token]) == text


def test_what_is_sampled_knows_where_its_answer_begins(processors, make_policy):
    """A model that says nothing but the end of a thought and a 5, and one that never ends its thought."""
    for processor, began in zip(processors, (False, True), strict=True):
        engine = TransformersEngine(make_policy(suppress=False), processor, decode_batch_size=8)
        ids = processor.tokenizer("3</think>\n5")["input_ids"]
        for tokens, expected in ((ids, "5"), (ids[:1], "" if began else "3")):
            texts = iter([processor.decode(tokens)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(processor, "decode", lambda ids, texts=texts: next(texts))
                (group,) = engine.generate([text_only()], 1, Sampling(max_new_tokens=2))
            assert group.rollouts[0].answer_text == expected


def text_only() -> ProcessedPrompt:
    """A prompt that the engine of any tiny model takes."""
    ids = torch.arange(30, 36)
    return ProcessedPrompt(
        record=make_record("r", "?"), input_ids=ids, position_ids=torch.arange(6).expand(3, -1), images=()
    )


@pytest.mark.parametrize(
    ("kind", "gold", "verifier", "choices"),
    [
        ("problem", "5", "number", ()),
        ("pointwise", "Yes", "judgment", ("Yes", "No")),
        ("pairwise", "A", "judgment", ("A", "B")),
    ],
)
def test_a_box_inside_a_thought_is_no_answer(pool, kind, gold, verifier, choices):
    record = make_record("r", "?", gold=gold, kind=kind, verifier=verifier, choices=choices)
    wrong = {"5": "6", "Yes": "No", "A": "B"}[gold]
    inside = rf"<think>\boxed{{{gold}}}</think>"
    texts = (inside, inside + rf"\boxed{{{wrong}}}", inside + rf"\boxed{{{gold}}}", inside)
    starts = (len(inside),) * 3 + (0,)
    (group,) = verify_groups(pool, [RolloutGroup(record, tuple(map(completion, texts, starts)))], 10)
    assert group.scores == [0, 0, 1, 1], "the last is what would be read without `answer_start`"
    assert group.verdicts[0].status == "unparsable"


@pytest.fixture
def verified(pool) -> RolloutGroup:
    """One right and one wrong answer, each behind a thought that is about the other."""
    record = problem("a", gold="5")
    texts = [rf"<think>SECRET \boxed{{{9 - i}}}</think>Clearly \boxed{{{i}}}" for i in (5, 4)]
    rollouts = tuple(completion(text, text.index("Clearly")) for text in texts)
    (group,) = verify_groups(pool, [RolloutGroup(record, rollouts)], 10)
    assert group.scores == [1, 0]
    return group


@pytest.mark.parametrize("sees", ["answer", "cot"])
def test_judges_and_reflections_see_nothing_of_a_thought(verified, sees):
    config = RecycleConfig(judge_sees=sees, reflection_cot_share=float(sees == "cot"), max_judge=9, max_reflection=9)
    for seed in range(4):
        recycled = recycle([verified], TEMPLATER, config, step=1, seed=seed)
        records = recycled.judge + recycled.reflection
        assert records
        for record in records:
            words = "".join(part for message in record.messages for part in message.content if isinstance(part, str))
            assert "SECRET" not in words
            assert all(text.startswith("Clearly") for text in record.origin.completions)
    for record in judge_own(verified, TEMPLATER):
        assert all(text.startswith("Clearly") for text in record.origin.completions)


def test_a_thought_is_kept_where_groups_are_written_down(verified, tmp_path):
    assert group_from_json(group_to_json(verified)) == verified
    folder = write(tmp_path, {1: [verified]})
    (shard,) = find_shards(folder)
    (row,) = read_shard(shard.path, list(features("rollouts")))
    assert [text.startswith("<think>SECRET") for text in row["completion"]] == [True, True]
    back = group_of(row, neutralize=Templater.load().neutralize)
    assert [rollout.answer_text for rollout in back.rollouts] == [r.answer_text for r in verified.rollouts]
    with pytest.raises(ValueError, match="'answer_start' holds 1000; allowed: 0 to the length"):
        group_of(row | {ANSWER_START: [0, 1000]}, neutralize=str)

    # A shard of the time before there was the column.
    table = pq.read_table(shard.path)
    known = features("rollouts")
    older = type(known)({name: of for name, of in known.items() if name != ANSWER_START})
    pq.write_table(table.drop_columns([ANSWER_START]).replace_schema_metadata(older.arrow_schema.metadata), shard.path)
    (row,) = read_shard(shard.path, list(features("rollouts")))
    assert [rollout.answer_start for rollout in group_of(row, neutralize=str).rollouts] == [0, 0]
