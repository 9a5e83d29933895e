"""The judge as TRL's reward: a real `GRPOTrainer` of the demo's model, with images, rewarded by the demo's model."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from trl import GRPOTrainer

from spark_vl import GenerativeReward, PromptConfig
from spark_vl.answers import last_boxed
from spark_vl.demo import digits
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import REASONING_SUFFIX, TEMPLATES
from tests.conftest import make_image
from tests.grpo import two_steps
from tests.test_reward import against, in_favor, shown, votes


def test_trl_trains_on_the_probability_that_the_judge_gives(tmp_path: Path) -> None:
    prompts = PromptConfig(templates=[str(TEMPLATES)], builtin_templates=False, reasoning_suffix=REASONING_SUFFIX)
    judge = GenerativeReward.from_pretrained(str(CHECKPOINT), dtype="float32", max_new_tokens=32, prompts=prompts)
    calls = []

    class Recorder(GRPOTrainer):
        """Keeps what TRL calls with, and what it makes of the answer."""

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            calls.append((inputs, completions, rewards.flatten().tolist()))
            return rewards

    problems = [digits.problem("train", i) for i in range(4)]
    rows = [
        {
            "prompt": [{"role": "user", "content": p.question + REASONING_SUFFIX}],
            "images": [Image.open(io.BytesIO(p.image))],
            "question": p.question,
        }
        for p in problems
    ]
    trainer = Recorder(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT),
        reward_funcs=judge.as_trl_reward(column="question"),
        args=two_steps(tmp_path, num_generations=2, per_device_train_batch_size=4, max_completion_length=16),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(CHECKPOINT),
    )
    trainer.train()

    assert len(calls) == 2
    for inputs, completions, rewards in calls:
        assert len(rewards) == 4
        for row, [completion], reward in zip(inputs, completions, rewards, strict=True):
            text = completion["content"]
            judgment = judge.pointwise(row["question"], row["images"], last_boxed(text) or text)
            assert reward == pytest.approx(judgment.probability, rel=1e-3)
    logged = [line["rewards/judge/mean"] for line in trainer.state.log_history if "rewards/judge/mean" in line]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for *_, rewards in calls])


def test_questions_come_from_the_prompt_or_from_a_column(processor) -> None:
    judge = votes(processor, lambda record, i: in_favor(record) if '"7"' in shown(record) else against(record))
    reward = judge.as_trl_reward()
    one, two = make_image(1), make_image(2)
    parts = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image", "image": two.data}]
    chats = [
        [
            {"role": "user", "content": "no"},
            {"role": "assistant", "content": "?"},
            {"role": "user", "content": "Which?"},
        ],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}],
    ]
    replies = [[{"role": "assistant", "content": text}] for text in (r"so \boxed{7}", r"\boxed{3}")]
    assert reward(chats, replies, images=[None, [one.data]]) == [1.0, 0.0]
    first, second = judge.engine.asked
    assert shown(first) == r'Which? Answer: "7". Right? \boxed{Yes} or \boxed{No}'
    assert second.messages[-1].content[:3] == (one, " or ", two)

    column = judge.as_trl_reward(column="question")
    assert column(["x"] * 2, ["7", "no box"], question=["<image> Q"] * 2, image=[one.data] * 2) == [1.0, 0.0]
    assert judge.engine.asked[-1].question == (one, " Q")
    assert 'Answer: "no box"' in shown(judge.engine.asked[-1])
    with pytest.raises(ValueError, match="needs the column 'question'; columns found: image"):
        column(["x"], ["7"], image=[None])
    with pytest.raises(ValueError, match="shows more images than its row has"):
        reward(chats[1:], replies[1:])


def test_no_verdict_is_no_reward_and_is_said(processor, caplog) -> None:
    judge = votes(processor, lambda record, i: in_favor(record) if '"7"' in shown(record) else "?")
    assert judge.as_trl_reward()(["Q", "Q", "Q " * 5000], ["7", "3", "7"]) == [1.0, None, None]
    assert "a completion is not judged: judge: the prompt has" in caplog.text
    assert "1 of 2 judgments give no verdict" in caplog.text
