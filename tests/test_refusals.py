"""Models that would train on something silently wrong are refused by name; the check at the start is the net below."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.cache_utils import LinearAttentionLayer

from spark_vl.config import ConfigError, ModelConfig
from spark_vl.families import registry
from spark_vl.families.refusals import refusal
from spark_vl.families.registry import find_family
from spark_vl.policy.check import LogprobGapError
from spark_vl.policy.packing import PackItem, pack_items
from spark_vl.policy.policy import Policy
from spark_vl.setup import load_trainer
from tests.padded_reference import padded_logprobs
from tests.test_every_family import EXACT, RAGGED, Case
from tests.test_trainer import make_config, write_rows
from tests.tiny_families import TinyFamily, qwen3_vl_processor, qwen3_vl_settings, stops


def saved(folder, model_type: str, **settings) -> ModelConfig:
    CONFIG_MAPPING[model_type](**settings).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("qwen3_5", {}, r"24 of 32 layers are linear-attention \(recurrent\) layers, which carry a state"),
        ("qwen3_5_moe", {}, r"linear-attention \(recurrent\) layers"),
        ("qwen3_next", {}, r"linear-attention \(recurrent\) layers"),
        ("mamba", {}, r"linear-attention \(recurrent\) layers"),
        ("zamba", {}, "(partly recurrent|linear-attention)"),
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
            "1 of 2 layers are convolutional",
        ),
        ("gemma3", {}, "sliding-window attention layers, which see a window"),
        ("mistral", {"sliding_window": 4096}, "it has sliding-window attention layers"),
        ("qwen3_vl_moe", {}, "a mixture of experts: it has not been shown to train on several processes"),
    ],
)
def test_a_model_is_refused_with_its_reason_before_anything_is_loaded(tmp_path, model_type, settings, reason):
    config = saved(tmp_path, model_type, **settings)
    with pytest.raises(ConfigError, match=rf"holds a '{model_type}' model: .*{reason}.*; allowed: 'qwen2'"):
        find_family(config)
    with pytest.raises(ConfigError, match=reason):
        load_trainer(make_config(tmp_path / "run", f"--model.path={tmp_path}"))


def text_config(**settings):
    return {"text_config": {"num_hidden_layers": 2, "max_window_layers": 1, **settings}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (text_config(use_sliding_window=False, sliding_window=32768), None),  # as the published ones are
        (text_config(use_sliding_window=True, sliding_window=4096), "1 of 2 layers are sliding-window"),
        (text_config(use_sliding_window=True, sliding_window=4096, max_window_layers=2), None),  # none has a window
        (text_config(layer_types=["full_attention", "sliding_attention"]), "1 of 2 layers are sliding-window"),
        (text_config(ngram_size=3), r"n-gram layers \(ngram_size\)"),
    ],
)
def test_a_model_of_a_known_family_is_refused_for_its_layers(tmp_path, settings, reason):
    config = saved(tmp_path, "qwen2_5_vl", **settings)
    if reason is None:
        find_family(config)
        return
    with pytest.raises(ConfigError, match=rf"holds a 'qwen2_5_vl' model: .*{reason}"):
        find_family(config)


def test_layers_of_a_kind_that_is_not_known_are_refused():
    """transformers of today neither saves nor loads such a kind."""
    config = AutoConfig.for_model("qwen2_5_vl", **text_config())
    config.text_config.__dict__["layer_types"] = ["full_attention", "kda_attention"]
    assert refusal(config) == (
        "1 of 2 layers are of kind 'kda_attention', which is not known to keep completions of a group apart"
    )


# ── the net below ──


def tiny_qwen3_5(seed: int = 0, dtype: torch.dtype = torch.float32):
    processor = qwen3_vl_processor()
    settings = qwen3_vl_settings(processor, vocab_size=len(processor.tokenizer), head_dim=32, heads=4)
    del settings["vision_config"]["deepstack_visual_indexes"]
    settings["text_config"] |= {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2},
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**settings)).to(dtype)
    return stops(model, processor.tokenizer), processor


def repeat(layer: LinearAttentionLayer, repeats: int) -> None:
    """What the caches of recurrent layers lack today, and may have tomorrow: without it sampling fails by itself."""
    for states in (layer.conv_states, layer.recurrent_states):
        states |= {i: state.repeat_interleave(repeats, dim=0) for i, state in states.items()}


def select(layer: LinearAttentionLayer, indices: torch.Tensor) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        states |= {i: state[indices] for i, state in states.items()}


def test_a_recurrent_model_that_slips_through_is_stopped_by_the_check_at_the_start(tmp_path, monkeypatch):
    config = TinyFamily("qwen3_5", tiny_qwen3_5, merged_patch=32).save(tmp_path / "model")
    monkeypatch.setitem(registry.FAMILIES, "qwen3_5", "tests.tiny_families:Qwen3_5")
    monkeypatch.setattr(registry, "refusal", lambda config: None)
    monkeypatch.setattr("spark_vl.setup.check_recipes", lambda *_: None)  # it has no facts
    rows = [{"question": f"Which digit is larger, {i} or 5?", "answer": "5"} for i in range(4)]
    recipe = write_rows(tmp_path, rows, verifier="number")
    monkeypatch.setattr(LinearAttentionLayer, "batch_repeat_interleave", repeat, raising=False)
    monkeypatch.setattr(LinearAttentionLayer, "batch_select_indices", select, raising=False)
    trainer = load_trainer(
        make_config(tmp_path / "run", f"--model.path={config.path}", f"--data.recipes=[{recipe}]", "--steps=1")
    )
    with pytest.raises(LogprobGapError, match="packed ≠ alone = sampler: the model ignores the mask or the positions"):
        trainer.train()


def tiny_qwen3_vl_moe(seed: int = 0, dtype: torch.dtype = torch.float32):
    processor = qwen3_vl_processor()
    settings = qwen3_vl_settings(processor, vocab_size=len(processor.tokenizer))
    settings["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**settings)).to(dtype)
        for parameter in model.parameters():
            if parameter.dim() == 3:  # transformers draws those of the experts smaller
                torch.nn.init.normal_(parameter, std=0.125)
    return stops(model, processor.tokenizer), processor


def test_a_mixture_of_experts_would_be_exact_when_packed(tmp_path, monkeypatch):
    """Which expert a token goes to depends on that token alone: it is for several processes that they are refused."""
    monkeypatch.setitem(registry.FAMILIES, "qwen3_vl_moe", "tests.tiny_families:Qwen3VLMoe")
    monkeypatch.setattr(registry, "refusal", lambda config: None)
    family = TinyFamily("qwen3_vl_moe", tiny_qwen3_vl_moe, merged_patch=32)
    case = Case(family, family.save(tmp_path))
    items = [PackItem(case.prompt(images), RAGGED, range(5 * i, 5 * i + 5)) for i, images in enumerate((1, 0, 3))]
    (pack,) = pack_items(items, tokens_per_pack=4096, padding=case.processor.padding)
    model, plain = case.model(), case.model()
    for one in (model, plain):
        one.set_experts_implementation("eager")  # the default has no float64
    policy = Policy(model, attention="sdpa", temperature=1.0, suppressed_token_ids=())
    expected = [each for item in items for each in padded_logprobs(plain, item.prompt, item.completions)]
    torch.testing.assert_close(policy(pack).logprobs, torch.cat(expected), **EXACT)
