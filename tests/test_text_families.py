"""Language models alone, Qwen2.5 and Qwen3: no images, positions that count tokens, the same loop."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from spark_vl import cli
from spark_vl.config import ConfigError, EvalConfig, EvaluationConfig, ModelConfig, RolloutConfig
from spark_vl.evaluation.checkpoint import evaluate_checkpoint
from spark_vl.families.registry import find_family
from spark_vl.hub.cards import write_model_card
from spark_vl.hub.run import find_model
from spark_vl.policy.policy import load_policy
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef, Message
from spark_vl.setup import load_trainer
from tests.conftest import make_image, make_record
from tests.test_trainer import make_config
from tests.tiny_families import tiny_family


@pytest.fixture(scope="module", params=("qwen2", "qwen3"))
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_family(request.param).save(folder)
    return folder


def load_processor(folder: Path, **settings):
    config = ModelConfig(path=str(folder), **settings)
    return find_family(config).load_processor(config, max_prompt_tokens=400)


@pytest.fixture
def processor(folder):
    return load_processor(folder)


# ── prompts ──


def test_tokens_are_those_of_the_tokenizers_own_chat(folder, processor):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = (Message("system", ("You add.",)), Message("user", ("What is ", "2+2?")))
    prompt = processor.process(make_record("sum", messages=messages))
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "You add."}, {"role": "user", "content": "What is 2+2?"}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert prompt.input_ids.tolist() == expected
    assert prompt.position_ids.tolist() == list(range(len(expected)))
    assert prompt.next_position == len(expected)
    assert prompt.images == ()
    assert processor.padding.images == ()
    assert processor.render(prompt).endswith("What is 2+2?<|im_end|>\n<|im_start|>assistant\n")


def test_a_record_with_an_image_or_too_many_tokens_is_bad(processor):
    with pytest.raises(BadRecordError, match="shows 1 images, and the model has no vision tower"):
        processor.process(make_record("seen", make_image(1), "Which digit?"))
    with pytest.raises(BadRecordError, match=r"the prompt has \d+ tokens; at most 400 .*max_prompt_tokens"):
        processor.process(make_record("long", "Name a digit. " * 200))


def test_of_the_two_qwen3_alone_marks_its_thoughts(folder, processor):
    text = "<think>It is 4.</think>\n\nIt is 5."
    assert text[processor.answer_start(text) :] == ("It is 5." if "qwen3" in folder.name else text)


@pytest.mark.parametrize("settings", [{"freeze": ["vision"]}, {"max_pixels": 5000}, {"min_pixels": 1}])
def test_settings_of_images_are_refused_where_they_are_set(folder, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"^model\.{name}: found .*no vision tower"):
        load_processor(folder, **settings)


def test_a_vision_tower_that_is_not_there_cannot_be_frozen(folder):
    config = ModelConfig(path=str(folder), freeze=["vision"])
    with pytest.raises(ConfigError, match=r"^model\.freeze: .*no vision tower"):
        load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())


@pytest.mark.parametrize("recycled", ["pointwise", "reflection"])
def test_prompts_about_a_text_problem_show_no_image(processor, recycled):
    word = getattr(Templater.load(), recycled)
    settings = {} if recycled == "pointwise" else {"claim": "check", "shows": "answer"}
    rendered = word(("What is 2+2?",), "5", correct=False, rng=random.Random(0), **settings)
    messages = rendered.messages
    assert not any(isinstance(part, ImageRef) for message in messages for part in message.content)
    text = processor.render(processor.process(make_record("recycled", messages=messages)))
    assert "What is 2+2?" in text
    assert not re.search(r"<image|<\|vision", text)


# ── runs ──


def text_recipe(folder: Path) -> Path:
    """A recipe of sums, all text."""
    rows = [{"q": f"What is {a}+{b}?", "a": a + b} for a in range(4) for b in range(5)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **{"name": "sums", "description": "sums", "license": "CC0-1.0", "source": {"jsonl": str(folder)}},
        **{"splits": {"train": "train.jsonl", "test": "test.jsonl"}, "verifier": "number"},
        "columns": {"question": "q", "answer": "a"},
    }
    file = folder / "sums.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_the_card_of_a_text_model_runs_and_speaks_of_no_image(folder, tmp_path, capsys):
    config = make_config(
        tmp_path / "run",
        f"--model.path={folder}",
        f"--data.recipes=[{text_recipe(tmp_path)}]",
        "--steps=1",
        "--prompts.system=You add.",
        "--rollout.max_new_tokens=4",
    )
    load_trainer(config).train()
    saved, file = tmp_path / "run" / "model", tmp_path / "README.md"
    write_model_card(find_model(tmp_path / "run"), file, model_id=str(saved), name="sums")
    card = ModelCard.load(file)
    assert card.data.pipeline_tag == "text-generation"
    assert not re.search("image|vision-language|picture|PIL", card.text.partition("## Evaluation")[0], re.IGNORECASE)
    code = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(code) == 3
    names: dict = {}
    exec("".join(code), names)
    assert "after reflection:" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["data.recipes", "evaluation.recipes"])
def test_a_run_with_images_is_refused_before_rows_or_weights_are_loaded(folder, tmp_path, setting, monkeypatch):
    for name in ("spark_vl.data.problems.open_rows", "spark_vl.policy.policy.load_part"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("something was loaded"))
    recipes = {"data.recipes": text_recipe(tmp_path), "evaluation.recipes": text_recipe(tmp_path), setting: "digits"}
    config = make_config(
        tmp_path / "run", f"--model.path={folder}", *(f"--{name}=[{recipe}]" for name, recipe in recipes.items())
    )
    message = rf"^{setting}: digits has images \(columns\.images: image\), and model\.path: {folder} is a 'qwen[23]'"
    with pytest.raises(ConfigError, match=message):
        cli.train(config)
    if setting == "data.recipes":
        with pytest.raises(ConfigError, match=message):
            load_trainer(config)
        return
    evaluation = EvalConfig(model=config.model, evaluation=config.evaluation)
    with pytest.raises(ConfigError, match=message):
        evaluate_checkpoint(evaluation, tmp_path)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_an_evaluation_of_a_text_model(folder, tmp_path):
    config = EvalConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        rollout=RolloutConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(recipes=[str(text_recipe(tmp_path))], problems=4, samples=2),
    )
    assert evaluate_checkpoint(config, tmp_path)["reasoning_greedy"]["n"] == 4


# ── memory ──


def test_estimate_of_a_model_without_images(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["estimate", "--model", "qwen3-8b", "--zero", "3", "--gpus", "8"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "8,190,735,360 weights, all trained" in printed
    assert "(images: 0, text: 1024 tokens)" in printed
    assert "pixels" not in printed
