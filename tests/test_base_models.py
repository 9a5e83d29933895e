"""Models that others fine-tuned and saved: what is odd about them is found, or put right, before a run trains."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.families.registry import find_family
from spark_vl.setup import load_trainer
from tests.test_trainer import make_config

IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "base"))


def change(file: Path, **fields) -> None:
    """Set fields of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def load_processor(model: Path):
    config = ModelConfig(path=str(model))
    return find_family(config).load_processor(config, max_prompt_tokens=600)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9, "do_sample": False}, {"min_p": 0.1}]
)
def test_sampling_settings_that_transformers_does_not_save_are_saved(model, tmp_path, settings):
    change(model / "generation_config.json", **settings)
    with suppress(ValueError):  # from transformers 5.24 on it is no trap
        GenerationConfig.from_pretrained(model).save_pretrained(tmp_path / "as-it-is")
        assert Version(transformers.__version__) >= Version("5.24"), "the trap is none"
    load_trainer(make_config(tmp_path / "run", f"--model.path={model}", "--steps=1")).train()
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert saved.do_sample is True
    assert {name: vars(saved)[name] for name in settings} == settings | (
        {"do_sample": True} if "do_sample" in settings else {}
    )
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"length_penalty": 2.0}, "generation_config.json could not be saved .*length_penalty"),
        ({"early_stopping": True}, "generation_config.json could not be saved .*early_stop"),
    ],
)
def test_what_could_not_be_saved_stops_a_run_before_it_trains(model, tmp_path, fields, named):
    change(model / "generation_config.json", **fields)
    with pytest.raises(ConfigError, match=rf"(?s)^model\.path: {named}"):
        load_trainer(make_config(tmp_path / "run", f"--model.path={model}", "--steps=1"))


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, [IM_END]),
        (END_OF_TEXT, [END_OF_TEXT, IM_END]),
        ([END_OF_TEXT], [END_OF_TEXT, IM_END]),
        ([IM_END, END_OF_TEXT], [IM_END, END_OF_TEXT]),
    ],
)
def test_a_turn_of_the_chat_ends_a_completion_whatever_the_generation_config_says(model, tmp_path, named, expected):
    tokenizer = AutoProcessor.from_pretrained(CHECKPOINT).tokenizer
    change(model / "generation_config.json", eos_token_id=named and tokenizer.convert_tokens_to_ids(named))
    processor = load_processor(model)
    assert tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == expected
    # What is exported stops where the run's completions did.
    trainer = load_trainer(make_config(tmp_path / "run", f"--model.path={model}", "--steps=1"))
    trainer.train()
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.convert_ids_to_tokens(saved.eos_token_id) == expected


def test_a_model_that_nothing_stops_is_refused(model):
    change(model / "generation_config.json", eos_token_id=None)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    with pytest.raises(ConfigError, match=r"^model\.path: .*nothing ends a completion: .*eos_token_id"):
        load_processor(model)
