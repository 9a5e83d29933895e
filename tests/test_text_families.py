"""Language models alone, Qwen2.5 and Qwen3: no images, positions that count tokens, the same loop."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen3Config

from spark_vl import cli
from spark_vl.config import ConfigError, EvalConfig, EvaluationConfig, LoraConfig, ModelConfig, RolloutConfig
from spark_vl.demo.tiny import CHAT_TEMPLATE, build_processor
from spark_vl.estimate.activations import activation_bytes
from spark_vl.estimate.shape import load_shape
from spark_vl.evaluation.checkpoint import evaluate_checkpoint
from spark_vl.families.registry import find_family
from spark_vl.hub.cards import write_model_card
from spark_vl.hub.run import find_model
from spark_vl.policy.packing import PROMPT, PackItem, make_pack, pack_items
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, ImageRef, Message
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.setup import load_trainer
from tests.conftest import make_image, make_record
from tests.test_estimate import allocated
from tests.test_trainer import make_config

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
OWN = {"qwen2": {"tie_word_embeddings": True}, "qwen3": {"tie_word_embeddings": False, "head_dim": 24}}
"""Tied embeddings, as the small models have; heads that are wider than their share of the hidden size (64 / 4)."""
QUESTIONS = ("What is 12 times 3?", "Add 4 and 5, then double the sum. What do you get?", "Name a digit.")
RAGGED = [[5, 9, 12], [30], [7, 7, 7, 8, 90, 101, 44], [60, 61], [11, 12, 13, 14, 15]]


def save_tiny(model_type: str, folder: Path, **fields: int) -> Path:
    """A random model that depends on its prompt, with a tokenizer and, as on the Hub, settings for sampling."""
    tokenizer = build_processor(list(QUESTIONS), vocab_size=320).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    config = CONFIGS[model_type](
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} | fields,
        **{"vocab_size": len(tokenizer), "num_hidden_layers": 3, "num_key_value_heads": 2, "initializer_range": 0.125},
        **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        **{name: value for name, value in OWN[model_type].items() if name not in fields},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=0.1, top_k=1, repetition_penalty=3.0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def load_processor(folder: Path, **settings):
    config = ModelConfig(path=str(folder), **settings)
    return find_family(config).load_processor(config, max_prompt_tokens=400)


@pytest.fixture
def processor(folder):
    return load_processor(folder)


@pytest.fixture
def prompts(processor):
    return [processor.process(make_record(str(i), question)) for i, question in enumerate(QUESTIONS)]


def plain(folder: Path, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def policy_of(folder: Path, processor, dtype=torch.float64) -> Policy:
    suppressed = processor.suppressed_token_ids
    return Policy(plain(folder, dtype), attention="sdpa", temperature=1.0, suppressed_token_ids=suppressed)


def logprobs_alone(model, prompt, completion):
    """Of one completion behind its prompt, as anybody would compute them."""
    ids = torch.cat([prompt.input_ids, torch.tensor(completion)])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1]
    return log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


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


def test_layers_with_a_sliding_window_are_refused(tmp_path):
    folder = save_tiny("qwen2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="sliding"):
        load_processor(folder)


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


# ── packing ──


@pytest.mark.parametrize("cut", [False, True])
def test_packed_logprobs_and_gradients_equal_each_completion_alone(folder, processor, prompts, cut):
    items, row = [], 0
    for prompt, completions in zip(prompts, (RAGGED, RAGGED[:2], RAGGED[2:]), strict=True):
        items.append(PackItem(prompt, completions, range(row, row + len(completions))))
        row += len(completions)
    policy, reference = policy_of(folder, processor), plain(folder)
    expected = [logprobs_alone(reference, item.prompt, completion) for item in items for completion in item.completions]
    longest = max(len(prompt.input_ids) for prompt in prompts) + max(map(len, RAGGED))
    packs = pack_items(items, tokens_per_pack=longest if cut else 4096, padding=processor.padding)
    assert len(packs) > len(items) if cut else len(packs) == 1
    assert all(pack.position_ids.shape == pack.input_ids.shape and not pack.images for pack in packs)
    rows: list = [None] * row
    for pack in packs:
        logprobs = policy(pack).logprobs
        for number in pack.row_N.unique().tolist():
            rows[number] = logprobs[pack.row_N == number]
    for got, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)

    weights = torch.randn(sum(map(len, rows)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (torch.cat(rows) * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    got = dict(policy.model.named_parameters())
    for name, parameter in reference.named_parameters():
        # A bias of all keys moves all scores of a query alike, which the softmax does not see.
        assert float(parameter.grad.norm()) > (0 if "k_proj.bias" in name else 1e-6), name
        assert float((got[name].grad - parameter.grad).norm()) <= 1e-6 * float(parameter.grad.norm()) + 1e-12, name
    assert len(got) == len(dict(reference.named_parameters()))


@pytest.mark.slow  # what is compiled takes seconds
def test_flex_attention_scores_as_sdpa_does(tmp_path):
    folder = save_tiny("qwen3", tmp_path)  # the other type has the same code
    processor = load_processor(folder)
    prompts = [processor.process(make_record("one", QUESTIONS[2]))]
    policy = policy_of(folder, processor, torch.float32)
    pack = make_pack([PackItem(prompts[0], RAGGED, range(5))], padding=processor.padding)
    with torch.no_grad():
        expected = policy(pack).logprobs
        policy.attention = "flex"
        policy.use_attention("flex")
        torch.testing.assert_close(policy(pack).logprobs, expected, rtol=1e-4, atol=2e-5)


def test_padding_is_one_token_at_weight_0_and_runs(folder, processor):
    item = PackItem(processor.padding, [processor.stop_token_ids[:1]], [0])
    pack = make_pack([item], padding=processor.padding)
    assert pack.position_ids.tolist() == [[0, 1]]
    assert pack.segment_T.tolist() == [PROMPT, 0]
    assert policy_of(folder, processor)(pack).logprobs.isfinite().all()


# ── sampling ──


def test_greedy_tokens_and_logprobs_equal_generate(folder, processor, prompts):
    policy, model = policy_of(folder, processor), plain(folder)
    engine = TransformersEngine(policy, processor, decode_batch_size=256)
    groups = engine.generate(prompts, 2, Sampling(temperature=0, max_new_tokens=24))
    # What generation_config.json asks for is not applied.
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_k": None}
    for prompt, group in zip(prompts, groups, strict=True):
        ids = prompt.input_ids[None]
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            output_logits=True,
            return_dict_in_generate=True,
            **greedy,
        )
        expected = output.sequences[0, ids.shape[1] :]
        scores = log_softmax(torch.cat(output.logits), -1).gather(-1, expected[:, None])[:, 0]
        for rollout in group.rollouts:
            assert rollout.token_ids == tuple(expected.tolist())
            torch.testing.assert_close(torch.tensor(rollout.logprobs), scores.float(), rtol=1e-5, atol=1e-6)
    assert len({group.rollouts[0].token_ids for group in groups}) > 1, "the model does not read its prompt"


@pytest.mark.parametrize("in_step", [False, True])
def test_sampled_logprobs_are_those_of_the_update(folder, processor, prompts, in_step):
    policy = policy_of(folder, processor)
    together = {"any_process": bool} if in_step else {}
    engine = TransformersEngine(policy, processor, decode_batch_size=8, **together)
    groups = engine.generate(prompts, 4, Sampling(max_new_tokens=12, seed=3))
    assert len({rollout.token_ids for group in groups for rollout in group.rollouts}) > 8
    model = plain(folder).requires_grad_(False)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group.rollouts:
            expected = logprobs_alone(model, prompt, rollout.token_ids)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected.float(), rtol=1e-4, atol=1e-5)


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


def always_boxed(text: str) -> str:
    """Random weights box nothing; what a run recycles has to come from somewhere."""
    return text + f" \\boxed{{{len(text) % 5}}}"


def test_a_run_recycles_updates_and_exports(folder, tmp_path, monkeypatch):
    from spark_vl.families.qwen_text import QwenTextProcessor

    decode = QwenTextProcessor.decode
    monkeypatch.setattr(QwenTextProcessor, "decode", lambda self, ids: always_boxed(decode(self, ids)))
    config = make_config(
        tmp_path / "run",
        f"--model.path={folder}",
        f"--data.recipes=[{text_recipe(tmp_path)}]",
        "--steps=2",
        "--recycle.recycle_truncated=true",
        "--rollout.max_new_tokens=8",
    )
    load_trainer(config).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"pointwise", "reflection"} <= {name.partition("/")[0] for name in lines[1]}, "nothing was recycled"
    assert max(line["rollout/sampler_logprob_gap"] for line in lines) < 1e-4
    saved = tmp_path / "run" / "model"
    model, base = plain(saved, torch.float32), plain(folder, torch.float32)
    assert model.config.model_type == base.config.model_type
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert model.state_dict().keys() == base.state_dict().keys()
    ids = AutoTokenizer.from_pretrained(saved)(QUESTIONS[0], return_tensors="pt")["input_ids"]
    assert not torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits), "nothing was trained"
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    for name, weight in checkpoint.items():
        torch.testing.assert_close(model.state_dict()[name.removeprefix("model.")], weight, rtol=0, atol=0)


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


def test_an_evaluation_of_a_text_model(folder, tmp_path):
    config = EvalConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        rollout=RolloutConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(recipes=[str(text_recipe(tmp_path))], problems=4, samples=2),
    )
    assert evaluate_checkpoint(config, tmp_path)["reasoning_greedy"]["n"] == 4


def test_adapters_go_to_all_linear_layers_and_are_merged_on_export(folder, processor):
    pytest.importorskip("peft")
    config = ModelConfig(path=str(folder), lora=LoraConfig(rank=4))
    policy = load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())
    trained = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layers += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert trained == {f"model.model.layers.{i}.{layer}" for i in range(3) for layer in layers}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        ids = processor.process(make_record("one", QUESTIONS[0])).input_ids[None]
        expected = policy.eval().model.model(input_ids=ids).last_hidden_state
        merged = plain(folder, torch.float32)
        merged.load_state_dict(policy.plain_state_dict(policy.state_dict()), strict=False)
        torch.testing.assert_close(merged.model(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


# ── memory ──


PUBLISHED = {
    **{"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688},
    **{"qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352},
    **{"qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976},
    **{"qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200},
    "qwen3-32b": 32_762_123_264,
}
"""As the Hub states them, but for tied embeddings, which count once."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_the_shipped_shapes_are_those_of_transformers(name, tmp_path):
    shape = load_shape(name)
    assert shape.parameters == PUBLISHED[name]
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    config = CONFIGS["qwen3" if "qwen3" in name else "qwen2"](**{number: vars(shape)[number] for number in numbers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    config.save_pretrained(tmp_path)
    assert replace(load_shape(str(tmp_path)), name=name) == shape


def test_estimate_of_a_model_without_images(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["estimate", "--model", "qwen3-8b", "--zero", "3", "--gpus", "8"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "8,190,735,360 weights, all trained" in printed
    assert "(images: 0, text: 1024 tokens)" in printed
    assert "pixels" not in printed


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_a_pass_allocates(tmp_path, checkpointing):
    """With heads that are together twice as wide as the hidden states, and norms of queries and keys."""
    folder = save_tiny("qwen3", tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=64)
    processor = load_processor(folder)
    config = ModelConfig(path=str(folder), dtype="float32", gradient_checkpointing=checkpointing)
    policy = load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    item = PackItem(processor.process(make_record("one", QUESTIONS[0] * 10)), [[40] * 48] * 4, range(4))

    def run() -> None:
        scores = policy(make_pack([item], padding=processor.padding))
        (scores.logprobs.sum() + 0 * scores.entropy.sum()).backward()

    estimated = activation_bytes(load_shape(str(folder)), config, tokens=item.tokens, patches=0, cast=False)
    assert 0.93 < estimated / allocated(run) < 1.25
