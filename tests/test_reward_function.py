"""Verifiers as reward functions, called by TRL's own trainer and by hand."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import datasets
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from spark_vl.demo.tiny import CHAT_TEMPLATE, build_processor
from spark_vl.verifiers import VerifierPool, as_trl_reward, verify
from tests.grpo import two_steps

EVEN = "tests.misbehaving:even"


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.mark.parametrize("conversational", [True, False], ids=["messages", "texts"])
def test_trl_trains_on_the_scores_of_the_verifier(conversational: bool, pool: VerifierPool, tmp_path: Path) -> None:
    reward = as_trl_reward(EVEN, column="answer", pool=pool)
    calls = []

    class Recorder(GRPOTrainer):
        """Keeps what TRL calls with, and what it makes of the answer."""

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            calls.append(([row["answer"] for row in inputs], completions, rewards.flatten().tolist()))
            return rewards

    tokenizer = build_processor(["What is one and one?"], vocab_size=300).tokenizer
    tokenizer.padding_side, tokenizer.chat_template = "left", CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt = [{"role": "user", "content": "What?"}] if conversational else "What?"
    rows = [{"prompt": prompt, "answer": "x" * i, "choices": ["Yes", "No"], "level": i} for i in range(4)]
    trainer = Recorder(
        model=Qwen2ForCausalLM(config),
        reward_funcs=reward,
        args=two_steps(tmp_path, num_generations=4, per_device_train_batch_size=8, max_completion_length=6),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()

    assert len(calls) == 2
    for golds, completions, rewards in calls:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        assert isinstance(completions[0], list) == conversational
        expected = [verify(EVEN, text, gold).score for text, gold in zip(texts, golds, strict=True)]
        assert rewards == expected
    assert set(chain.from_iterable(rewards for *_, rewards in calls)) == {0.0, 1.0}
    logged = [line["rewards/even/mean"] for line in trainer.state.log_history if "rewards/even/mean" in line]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for *_, rewards in calls])


def test_it_is_a_plain_function(pool: VerifierPool) -> None:
    completions = [r"\boxed{0.5}", r"\boxed{2}", "no box"]
    reward = as_trl_reward("math", pool=pool)
    assert reward(completions, ["1/2"] * 3) == [1.0, 0.0, 0.0]
    assert reward(completions=completions, gold=["1/2"] * 3, completion_ids=[[1]] * 3, prompts=["?"] * 3) == [1, 0, 0]
    assert as_trl_reward("number")([r"\boxed{5}"], [5]) == [1.0]
    choices = [["red", "blue"], ["blue", "red"]]
    assert as_trl_reward("choice")([r"\boxed{red}"] * 2, ["A"] * 2, choices=choices) == [1.0, 0.0]


def test_of_messages_the_models_last_counts() -> None:
    call = {"role": "assistant", "tool_calls": []}
    reply = {"role": "assistant", "content": r"\boxed{5}"}
    tool = {"role": "tool", "content": r"\boxed{5}"}
    reward = as_trl_reward("number")
    assert reward([[call, tool, reply], [reply], [call, tool], [tool]], ["5"] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "reply", "gold", "score"),
    [
        ("text", r"\boxed{NYC}", ["New York", "NYC"], 1.0),
        ("text", r"\boxed{LA}", ["New York", "NYC"], 0.0),
        ("text", r"\boxed{Zürich}", ["Zürich"], 1.0),
        ("list", r"\boxed{1, 2}", [1, 2], 1.0),
        ("list", r"\boxed{2, 1}", [1, 2], 0.0),
        ("json_field", r'\boxed{{"answer": "cat"}}', {"answer": "cat"}, 1.0),
        ("json_field", r'\boxed{{"answer": "dog"}}', {"answer": "cat"}, 0.0),
    ],
)
def test_lists_and_mappings_are_right_answers(kind: str, reply: str, gold: object, score: float) -> None:
    assert as_trl_reward(kind)([reply], [gold]) == [score]


def test_parts_of_a_text_are_one_text() -> None:
    picture = {"type": "image", "image": None}
    parts = [{"type": "text", "text": "So "}, picture, {"type": "text", "text": r"\box"}]
    replies = [[{"role": "assistant", "content": [*parts, {"type": "text", "text": f"ed{{{n}}}"}]}] for n in (5, 6)]
    silent = [[{"role": "assistant", "content": [picture]}], [{"role": "assistant", "content": []}]]
    assert as_trl_reward("number")(replies + silent, ["5"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_sizes_and_settings_reach_the_verifier(pool: VerifierPool) -> None:
    rows = {"image_size": [[100, 50], None], "processed_size": [[56, 28], None], "choices": [["a"], None]}
    reward = as_trl_reward("tests.misbehaving:what_it_needs", pool=pool, threshold=0.25)
    assert reward(["x"] * 2, ["5", "5"], **rows) == [0.25, 0.0]


def test_where_there_is_no_right_answer_there_is_no_reward() -> None:
    assert as_trl_reward("number")([r"\boxed{5}"] * 3, ["5", None, "4"]) == [1.0, None, 0.0]


def test_what_cannot_be_verified_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert as_trl_reward("number")([r"\boxed{5}"] * 2, ["a few", "5"]) == [0.0, 1.0]
    assert "number reward: 1 of 2 not verified: BadRecordError: verify: gold 'a few'" in caplog.text


def test_mistakes_of_the_caller_are_said() -> None:
    with pytest.raises(ValueError, match="unknown verifier 'maths'"):
        as_trl_reward("maths")
    with pytest.raises(ValueError, match="number: 'tolerance_of_typos' is not a setting"):
        as_trl_reward("number", tolerance_of_typos=1)
    reward = as_trl_reward("number", column="answer")
    with pytest.raises(ValueError, match="number reward needs the column 'answer'; columns found: prompts, solution"):
        reward(completions=["x"], prompts=["?"], solution=["5"])
    with pytest.raises(ValueError, match="number reward got 1 golds for 2 completions"):
        reward(["x", "y"], ["5"])


def test_neither_trl_nor_a_worker_is_needed_to_make_one() -> None:
    code = (
        "import subprocess, sys; subprocess.Popen = None; from spark_vl.verifiers import as_trl_reward;"
        "assert as_trl_reward('math') and as_trl_reward('number')([r'\\boxed{5}'], ['5']) == [1.0];"
        "assert not {'trl', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
