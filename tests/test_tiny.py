"""The tiny models through transformers' own entry points, and the warm start's prompts against the processor's."""

from __future__ import annotations

import io
import random

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from spark_vl.answers import last_boxed, match_label
from spark_vl.demo import digits
from spark_vl.demo.tiny import CHECKPOINT, SPECIAL_TOKENS, random_tiny
from spark_vl.demo.warm_start import REASONING_SUFFIX, SKILLS, TEMPLATES, chat, draw, model_inputs, pixel_values
from spark_vl.prompts import Templater
from spark_vl.records import KINDS, plain_text


@pytest.fixture(scope="module")
def templater():
    return Templater.load([TEMPLATES], builtin=False, reasoning_suffix=REASONING_SUFFIX)


@pytest.fixture(scope="module")
def problems():
    return [digits.problem("validation", i) for i in range(digits.SPLITS["validation"])]


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module", params=["shipped", "random"])
def tiny(request, shipped):
    return shipped if request.param == "shipped" else random_tiny()


def picture(problem):
    return Image.open(io.BytesIO(problem.image)).convert("RGB")


def inputs_of(processor, problem, text="Which digit is larger?"):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    return processor(text=[prompt], images=[picture(problem)], return_tensors="pt")


def test_the_shipped_checkpoint_is_small_and_plain():
    weights = list(CHECKPOINT.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) <= 4_000_000
    allowed = {".json", ".jinja", ".safetensors", ".py"}
    assert {file.suffix for file in CHECKPOINT.iterdir() if file.is_file()} == allowed
    assert AutoConfig.from_pretrained(CHECKPOINT).architectures == ["Qwen2_5_VLForConditionalGeneration"]


def test_special_tokens_are_single_ids_that_the_config_names(tiny):
    model, processor = tiny
    tokenizer, config = processor.tokenizer, model.config
    ids = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    assert all(len(i) == 1 for i in ids)
    by_name = {token: i[0] for token, i in zip(SPECIAL_TOKENS, ids, strict=True)}
    assert len(set(by_name.values())) == len(SPECIAL_TOKENS)
    assert tokenizer.decode(list(by_name.values()), skip_special_tokens=True) == ""
    assert config.image_token_id == by_name["<|image_pad|>"] == processor.image_token_id
    assert config.video_token_id == by_name["<|video_pad|>"]
    assert config.vision_start_token_id == by_name["<|vision_start|>"]
    assert config.vision_end_token_id == by_name["<|vision_end|>"]
    assert model.generation_config.eos_token_id == [by_name["<|im_end|>"], by_name["<|endoftext|>"]]
    assert config.text_config.vocab_size == len(tokenizer) == max(tokenizer.get_vocab().values()) + 1


def test_rotary_sections_fill_half_a_head(tiny):
    config = tiny[0].config.text_config
    head = config.hidden_size // config.num_attention_heads
    assert sum(config.rope_parameters["mrope_section"]) == head // 2


def test_any_text_survives_the_tokenizer_and_digits_stand_alone(tiny, templater):
    tokenizer = tiny[1].tokenizer
    texts = [template.text for template in templater.templates.values()]
    texts += ["  two  spaces\n\n\ttab", "π ≈ 3.14159, 日本語, 🙂", "\\boxed{\\frac{1}{2}}", ""]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234567890")["input_ids"]) == 10


def test_the_chat_template_writes_qwen_turns(tiny):
    image, text = {"type": "image"}, {"type": "text", "text": "Which?"}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, image, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "\\boxed{1}"}]},
    ]
    box = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nWhich?{box}{box}<|im_end|>\n"
        "<|im_start|>assistant\n\\boxed{1}<|im_end|>\n"
    )
    write = tiny[1].apply_chat_template
    assert write(turns, tokenize=False) == expected
    assert write(turns, tokenize=False, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_an_image_of_the_demo_is_four_tokens_and_changes_what_is_said(tiny, problems):
    model, processor = tiny
    said = set()
    for problem in problems[:12]:
        inputs = inputs_of(processor, problem)
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 4
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said.add(tuple(output[0, inputs["input_ids"].shape[1] :].tolist()))
    assert len(said) > 4


def test_random_models_are_equal_for_equal_seeds_only():
    state = torch.get_rng_state()
    one, same, other = (random_tiny(seed)[0].state_dict() for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state is left alone"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert random_tiny(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_model_and_its_processor_survive_a_round_trip(tmp_path, problems):
    model, processor = random_tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model_2 = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor_2 = AutoProcessor.from_pretrained(tmp_path)
    inputs, inputs_2 = inputs_of(processor, problems[0]), inputs_of(processor_2, problems[0])
    assert inputs.keys() == inputs_2.keys()
    assert all(torch.equal(inputs[name], inputs_2[name]) for name in inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model_2(**inputs_2).logits, rtol=0, atol=0)


def test_the_warm_start_sees_what_the_processor_makes(shipped, templater, problems):
    processor = shipped[1]
    pixels, rng = pixel_values(processor, problems[:40]), random.Random(0)
    for kind in KINDS * 5:
        example = draw(templater, problems[:40], kind, rng)
        ours = model_inputs(processor, pixels, [example])
        images = [picture(problems[example.image])]
        theirs = processor(text=[chat(processor, example.messages)], images=images, return_tensors="pt")
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_labels_of_the_warm_start_cover_the_completion_alone(shipped, templater, problems):
    tokenizer, rng = shipped[1].tokenizer, random.Random(1)
    examples = [draw(templater, problems, kind, rng) for kind in KINDS]
    completions = [example.skilled for example in examples]
    batch = model_inputs(shipped[1], pixel_values(shipped[1], problems), examples, completions)
    for labels, completion in zip(batch["labels"], completions, strict=True):
        assert tokenizer.decode(labels[labels != -100]) == completion + "<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_completions_to_learn_are_short_and_as_right_as_they_say(shipped, templater, problems, kind):
    tokenizer, rng = shipped[1].tokenizer, random.Random(2)
    poor_right = []
    for _ in range(300):
        example = draw(templater, problems, kind, rng)
        problem, prompt = problems[example.image], plain_text(example.messages[-1].content)
        assert example.skilled.startswith(SKILLS)
        assert len(tokenizer(example.skilled)["input_ids"]) <= 24
        assert len(tokenizer(chat(shipped[1], example.messages))["input_ids"]) <= 80
        assert not any(poor.startswith(SKILLS) for poor in example.poor)
        if kind in ("problem", "reflection"):
            assert last_boxed(example.skilled) == example.gold == problem.answer
        else:
            assert match_label(example.skilled, ("Yes", "No", "A", "B")) == example.gold
            assert len({last_boxed(poor) for poor in example.poor}) == 2, "one for each label"
        if kind == "pointwise":
            verdict = "right" if example.quoted_correct else "wrong"
            assert example.gold == ("Yes" if example.quoted_correct else "No") or f"{example.gold}: {verdict}" in prompt
            assert f'"{problem.answer}"' in prompt if example.quoted_correct else f'"{problem.answer}"' not in prompt
        if kind == "pairwise":
            assert f'{example.gold}: "{problem.answer}"' in prompt
        if kind == "reflection":
            assert last_boxed(example.poor[0]) == problem.answer if example.quoted_correct else True
            assert "is wrong" not in prompt or not example.quoted_correct
        poor_right += [last_boxed(poor) == example.gold for poor in example.poor]
    assert 0.2 < sum(poor_right) / len(poor_right) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_model_has_the_skill_but_seldom_uses_it(shipped, templater, problems, kind):
    model, processor = shipped
    rng = random.Random(3)
    torch.manual_seed(0)
    examples = [draw(templater, problems, kind, rng) for _ in range(200)]
    inputs = model_inputs(processor, pixel_values(processor, problems), examples)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=True, temperature=1.0, top_k=0)
    texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [last_boxed(text) == example.gold for text, example in zip(texts, examples, strict=True)]
    skilled = [r for r, text in zip(right, texts, strict=True) if text.startswith(SKILLS)]
    assert 0.07 < len(skilled) / len(texts) < 0.3
    assert sum(skilled) / len(skilled) > 0.8
    assert sum(right) / len(right) < 0.67
