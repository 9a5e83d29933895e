"""What a recipe says of verifier, settings and shaping terms reaches the reward, and each part is logged by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipe
from spark_vl.log import group_metrics
from spark_vl.prompts import Templater
from spark_vl.records import Rollout, RolloutGroup
from spark_vl.run.sinks import Sink
from spark_vl.setup import load_trainer
from spark_vl.verifiers import VerifierPool, verify_groups
from tests.test_trainer import make_config, metrics


def write_recipe(folder: Path, **fields) -> Path:
    """A recipe of two problems without images."""
    rows = [{"question": f"What is {n} and {n}?", "answer": str(2 * n)} for n in (50, 3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "sums", "description": "Sums", "license": "MIT", "source": {"jsonl": str(folder)},
        "splits": {"train": "train.jsonl"}, "columns": {"question": "question", "answer": "answer"}, **fields,
    }  # fmt: skip
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def first(recipe: Path):
    return open_recipe(load_recipe(recipe), "train", Templater.load())[0]


def rollout(text: str, tokens: int = 5, finish_reason: str = "stop") -> Rollout:
    return Rollout(tuple(range(tokens)), (-1.0,) * tokens, text, finish_reason)


def test_settings_and_weights_reach_the_reward(tmp_path):
    verifier = {"number": 2.0, "format": 0.5, "overlong": 1.0}
    record = first(write_recipe(tmp_path, verifier=verifier, settings={"number": {"relative": 0.05}}))
    assert (record.verifier, record.weight) == ("number", 2.0)
    group = RolloutGroup(
        record,
        (
            rollout(r"\boxed{96}"),  # within 5 % of 100
            rollout(r"\boxed{94}"),
            rollout("96"),
            rollout(r"\boxed{100}", tokens=90, finish_reason="length"),  # overlong begins at 80 of 100 tokens
        ),
    )
    with VerifierPool(1) as pool:
        [verified] = verify_groups(pool, [group], max_new_tokens=100)
    assert verified.scores == [1, 0, 0, 1]
    assert verified.rewards == pytest.approx([2 + 0.5, 0.5, 0, 2 - 0.5])
    found = group_metrics([verified]).result()
    assert found["problem/score"] == 0.5
    assert found["problem/reward"] == pytest.approx((2.5 + 0.5 + 0 + 1.5) / 4)
    assert found["problem/format"] == 0.5
    assert found["problem/overlong"] == pytest.approx(-0.5 / 4)


def test_without_weights_the_reward_is_the_score(tmp_path):
    record = first(write_recipe(tmp_path, verifier="number"))
    assert (record.weight, record.shaping, record.settings) == (1.0, (), ())
    with VerifierPool(1) as pool:
        [verified] = verify_groups(pool, [RolloutGroup(record, (rollout(r"\boxed{100}"), rollout(r"\boxed{96}")))])
    assert verified.rewards == verified.scores == [1, 0]


def test_a_term_that_needs_the_limit_says_so(tmp_path):
    record = first(write_recipe(tmp_path, verifier={"number": 1, "overlong": 1}))
    with VerifierPool(1) as pool, pytest.raises(ValueError, match="overlong needs the limit on new tokens"):
        verify_groups(pool, [RolloutGroup(record, (rollout(r"\boxed{100}"),))])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"verifier": {"format": 1.0}},
            r"verifier: found .*; allowed: one verifier and any of the shaping",
        ),
        ({"verifier": {"math": 1, "number": 1}}, r"verifier: found .*; allowed: one verifier and any"),
        ({"verifier": {"math": -1}}, r"verifier\.math: found -1; allowed: a finite weight from 0"),
        ({"verifier": {"math": 1, "format": True}}, r"verifier\.format: found True; allowed: a finite weight"),
        ({"verifier": {"math": 1, "format": float("inf")}}, r"verifier\.format: found inf; allowed"),
        (
            {"verifier": "number", "settings": {"number": {"relativ": 0.1}}},
            r"settings: number: 'relativ' is not a setting; allowed: ",
        ),
        (
            {"verifier": "number", "settings": {"number": {"relative": "5%"}}},
            r"number: relative: found '5%'; allowed: float",
        ),
        (
            {"verifier": "number", "settings": [0.1]},
            r"settings: found \[0\.1\]; allowed: a mapping",
        ),
        ({"verifier": {"train": "number"}, "settings": {"relative": 0.1}}, r"settings stand below the name of their"),
        ({"verifier": "number", "weights": {"format": 1}}, r"weights: is not a field"),
    ],
)
def test_a_mistake_is_named_when_the_recipe_is_read(tmp_path, fields, says):
    with pytest.raises(ValueError, match=says):
        load_recipe(write_recipe(tmp_path, **fields))


def test_a_run_is_trained_on_the_sum_and_recycled_by_the_score(tmp_path):
    """The digits with a bonus for format: rewards go above 1, and what is right stays what the verifier says."""
    recipe = {"base": "digits", "verifier": {"number": 1.0, "format": 0.25}}
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(recipe))
    groups = []

    class Listener(Sink):
        def on_groups(self, step, scored):
            groups.extend(group for _, group in scored)

    config = make_config(tmp_path / "run", f"--data.recipes=[{tmp_path / 'digits.yaml'}]", "--steps=2")
    trainer = load_trainer(config, sinks=lambda accelerator: [Listener()])
    trainer.train()
    problems = [group for group in groups if group.record.kind == "problem"]
    assert any(reward == 1.25 for group in problems for reward in group.rewards)
    for group in groups:
        for score, reward, verdict in zip(group.scores, group.rewards, group.verdicts, strict=True):
            assert reward == pytest.approx(score + 0.25 * dict(verdict.shaping)["format"])
    line = metrics(tmp_path / "run")[0]
    expected = line["problem/score"] + 0.25 * line["problem/format"]
    assert line["problem/reward"] == pytest.approx(expected)
    judged = [group.record for group in groups if group.record.kind == "pointwise"]
    scores = {group.record.id: group.scores for group in problems}
    for record in judged:
        [quoted] = record.origin.rollouts
        assert scores[record.origin.parent_id][quoted] == record.origin.quoted_correct
    assert replace(problems[0].record, image_sizes=()).image_sizes == ()
    assert problems[0].record.image_sizes[0].original == (56, 56)
