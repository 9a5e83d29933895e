"""What each model family has to show, on a tiny random model of transformers' own classes. A family is a row of `TINY`.

The truth is transformers: its `generate`, its forward pass of each completion alone, its processor and its positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, PreTrainedModel

from spark_vl.config import LoraConfig, ModelConfig
from spark_vl.data.images import load_image
from spark_vl.demo import digits
from spark_vl.estimate import weights
from spark_vl.estimate.shape import load_shape
from spark_vl.families.base import ProcessedPrompt, Processor
from spark_vl.families.registry import get_family
from spark_vl.policy.packing import PackItem, pack_items
from spark_vl.policy.policy import Policy, load_policy
from spark_vl.rollout import Sampling, TransformersEngine
from spark_vl.setup import load_trainer
from tests.conftest import make_image, make_record
from tests.padded_reference import padded_logprobs, plain_inputs
from tests.test_trainer import make_config, metrics, write_rows
from tests.tiny_families import TINY, TinyFamily

RAGGED = [[5, 9, 12], [30], [7, 7, 7, 8, 90, 101, 44], [60, 61], [11, 12, 13, 14, 15]]
EXACT = {"rtol": 1e-6, "atol": 1e-9}
"""In float64."""
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_k": None}
"""Whatever generation_config.json asks for."""


@dataclass
class Case:
    """A family with its checkpoint on disk."""

    family: TinyFamily
    config: ModelConfig

    @cached_property
    def processor(self) -> Processor:
        return self.family.load_processor(self.config)

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        return self.family.make(dtype=dtype)[0]

    def policy(self, dtype: torch.dtype = torch.float64, suppress: bool = False) -> Policy:
        suppressed = self.processor.suppressed_token_ids if suppress else ()
        return Policy(self.model(dtype), attention="sdpa", temperature=1.0, suppressed_token_ids=suppressed)

    def trained(self, **settings) -> Policy:
        config = replace(self.config, gradient_checkpointing=False, **settings)
        return load_policy(config, dtype=torch.float32, trained=torch.float32, temperature=1.0, suppressed_token_ids=())

    def prompt(self, images: int, length: int = 1) -> ProcessedPrompt:
        """A question about so many images of different sizes, asked `length` times."""
        sides = ((2, 2), (4, 2), (3, 5))
        unit = self.family.merged_patch
        shown = [make_image(1 + i, (unit * w, unit * h)) for i, (w, h) in enumerate(sides[:images])]
        return self.processor.process(make_record(f"{images} {length}", *shown, "Which digit is larger?" * length))

    @property
    def prompts(self) -> list[ProcessedPrompt]:
        """Three, each longer than the one before it, and one that shares its image with the first."""
        images = self.family.images
        return [self.prompt(n, 1 + i) for i, n in enumerate((*images, images[0]))]

    def pack(self, items, tokens_per_pack=4096):
        return pack_items(items, tokens_per_pack=tokens_per_pack, padding=self.processor.padding)


@pytest.fixture(scope="module", params=TINY, ids=str)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, request.param.save(tmp_path_factory.mktemp(str(request.param))))


WITH_IMAGES = pytest.mark.parametrize("case", [each for each in TINY if each.merged_patch], ids=str, indirect=True)


# ── sampling ──


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3])
def test_greedy_tokens_and_logprobs_equal_generate(case, penalty):
    """Also where a batch has no image, and where several prompts are padded and decoded together."""
    policy, plain, prompts = case.policy(suppress=True), case.model(), case.prompts
    sampled = [
        TransformersEngine(policy, case.processor, decode_batch_size=size).generate(
            prompts, 2, Sampling(temperature=0, max_new_tokens=16, repetition_penalty=penalty)
        )
        for size in (256, 1)
    ]
    for prompt, *groups in zip(prompts, *sampled, strict=True):
        output = plain.generate(
            **plain_inputs(plain, prompt),
            max_new_tokens=16,
            suppress_tokens=list(case.processor.suppressed_token_ids) or None,
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, "repetition_penalty": penalty},
        )
        ids = output.sequences[0, len(prompt.input_ids) :]
        logprobs = torch.stack(output.scores)[:, 0].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for rollout in [rollout for group in groups for rollout in group.rollouts]:
            assert rollout.token_ids == tuple(ids.tolist())
            assert rollout.logprobs == pytest.approx(logprobs.tolist(), rel=1e-5, abs=1e-6)
    assert len({group.rollouts[0].token_ids for group in sampled[0]}) > 1, "the model does not read its prompt"


def test_sampled_logprobs_equal_the_updates(case):
    """Of several batches that are decoded in step with other processes."""
    policy, prompts = case.policy(suppress=True), case.prompts
    engine = TransformersEngine(policy, case.processor, decode_batch_size=8, any_process=bool)
    groups = engine.generate(prompts, 4, Sampling(max_new_tokens=16, seed=3))
    sampled = [rollout for group in groups for rollout in group.rollouts]
    assert len({rollout.token_ids for rollout in sampled}) > len(sampled) / 2, "little would be compared"
    items = [
        PackItem(p, [r.token_ids for r in g.rollouts], range(4 * i, 4 * i + 4))
        for i, (p, g) in enumerate(zip(prompts, groups, strict=True))
    ]
    (pack,) = case.pack(items)
    expected = torch.tensor([value for rollout in sampled for value in rollout.logprobs], dtype=torch.float64)
    torch.testing.assert_close(policy(pack).logprobs, expected, rtol=1e-5, atol=1e-6)


@WITH_IMAGES
def test_each_image_is_encoded_once_and_alone_in_step_too(case):
    """A process without an image runs the tower as often as the others, and samples what it would have sampled."""
    policy, encoded = case.policy(), []
    policy.model.model.visual.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    prompts, sampling = case.prompts, Sampling(temperature=0, max_new_tokens=8)
    alone = TransformersEngine(policy, case.processor, decode_batch_size=256)
    alone.generate(prompts, 4, sampling)
    unique = {image for prompt in prompts for image in prompt.images}
    assert encoded == [sum(len(image.pixel_values) for image in unique)]
    assert len(unique) < sum(len(prompt.images) for prompt in prompts), "no image is shown twice"

    text = [prompt for prompt in prompts if not prompt.images]
    encoded.clear()
    expected = alone.generate(text, 2, sampling)
    assert encoded == []
    in_step = TransformersEngine(policy, case.processor, decode_batch_size=256, any_process=bool)
    got = in_step.generate(text, 2, sampling)
    assert encoded == [len(case.processor.padding.images[0].pixel_values)]
    assert [g.rollouts for g in got] == [g.rollouts for g in expected]


# ── packing ──


def test_packed_logprobs_and_gradients_equal_each_completion_alone(case):
    """In one pack, and cut into several."""
    plain, items, row = case.model(), [], 0
    for prompt, completions in zip(case.prompts, (RAGGED, RAGGED[:2], RAGGED[2:]), strict=False):
        items.append(PackItem(prompt, completions, range(row, row + len(completions))))
        row += len(completions)
    expected = [each for item in items for each in padded_logprobs(plain, item.prompt, item.completions)]
    weighting = torch.randn(sum(map(len, expected)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (torch.cat(expected) * weighting).sum().backward()
    compared = dict(plain.named_parameters())

    longest = max(len(item.prompt.input_ids) for item in items) + max(map(len, RAGGED))
    for tokens_per_pack in (4096, longest):
        packs = case.pack(items, tokens_per_pack)
        assert len(packs) == 1 if tokens_per_pack == 4096 else len(packs) > len(items)
        policy, got = case.policy(), {}
        for pack in packs:
            logprobs = policy(pack).logprobs
            got |= {row: logprobs[pack.row_N == row] for row in pack.row_N.unique().tolist()}
        for i, want in enumerate(expected):
            torch.testing.assert_close(got[i], want, **EXACT)
        (torch.cat([got[i] for i in range(row)]) * weighting).sum().backward()
        found = dict(policy.model.named_parameters())
        assert found.keys() == compared.keys()
        for name, parameter in compared.items():
            scale = float(parameter.grad.norm())
            assert scale > 0, f"{name} has no gradient: nothing would be compared"
            assert float((found[name].grad - parameter.grad).norm()) <= 1e-6 * scale, name


@WITH_IMAGES
def test_a_pack_without_an_image_runs_the_whole_tower_and_is_not_changed_by_it(case):
    """Under ZeRO-3 its modules are called, and get gradients, as on a process whose packs have images."""
    policy, plain, prompt, called = case.policy(), case.model(), case.prompt(0), []
    (pack,) = case.pack([PackItem(prompt, RAGGED, range(5))])
    assert pack.images == case.processor.padding.images
    for name, module in policy.model.model.visual.named_modules():
        module.register_forward_hook(lambda *call, name=name: called.append(name))
    logprobs = policy(pack).logprobs
    without = called.copy()
    torch.testing.assert_close(logprobs, torch.cat(padded_logprobs(plain, prompt, RAGGED)), **EXACT)
    logprobs.sum().backward()
    tower = {name: p.grad for name, p in policy.model.model.visual.named_parameters()}
    assert all(grad is not None and not grad.any() for grad in tower.values())
    called.clear()
    policy(case.pack([PackItem(case.prompt(1), RAGGED, range(5))])[0])
    assert called == without


@pytest.mark.slow  # what is compiled takes seconds
def test_flex_attention_scores_as_sdpa_does(case):
    policy = case.policy(torch.float32)
    (pack,) = case.pack([PackItem(case.prompts[0], RAGGED, range(5))])
    with torch.no_grad():
        expected = policy(pack).logprobs
        policy.attention = "flex"
        policy.use_attention("flex")
        torch.testing.assert_close(policy(pack).logprobs, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [each for each in TINY if each.make_wide], ids=str, indirect=True)
def test_realistic_widths_and_a_real_vocabulary(case):
    """In float32: packed = alone = sampled = `generate`, to its rounding."""
    model, _ = case.family.make_wide()
    policy = Policy(model, attention="sdpa", temperature=1.0, suppressed_token_ids=())
    engine = TransformersEngine(policy, case.processor, decode_batch_size=256)
    prompts = case.prompts
    groups = engine.generate(prompts, 2, Sampling(temperature=0, max_new_tokens=6))
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            completions = [RAGGED[2], list(group.rollouts[0].token_ids), RAGGED[0]]
            alone = padded_logprobs(model, prompt, completions)
            (pack,) = case.pack([PackItem(prompt, completions, range(3))])
            torch.testing.assert_close(policy(pack).logprobs, torch.cat(alone), rtol=1e-5, atol=1e-4)
            assert group.rollouts[0].logprobs == pytest.approx(alone[1].tolist(), abs=1e-4)
            plain = model.generate(**plain_inputs(model, prompt), max_new_tokens=6, **GREEDY)
            assert group.rollouts[0].token_ids == tuple(plain[0, len(prompt.input_ids) :].tolist())


# ── processing ──


def test_inputs_are_those_of_the_hugging_face_processor(case):
    hf = case.processor.hf
    for prompt, images in zip(case.prompts, case.family.images, strict=False):
        record = prompt.record
        chat = [case.processor.chat_message(message) for message in record.messages]
        text = hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        shown = {"images": [load_image(ref) for ref in record.images]} if images else {}
        expected = hf(text=[text], return_tensors="pt", **shown)
        assert torch.equal(prompt.input_ids, expected["input_ids"][0])
        assert len(prompt.images) == images
        assert record.coordinates == case.family.coordinates
        if images:
            assert torch.equal(torch.stack([image.grid_thw for image in prompt.images]), expected["image_grid_thw"])
            assert torch.equal(torch.cat([image.pixel_values for image in prompt.images]), expected["pixel_values"])


def test_positions_are_those_of_the_model(case):
    """That is, those with which the model calls its language model when it is left to find them itself."""
    model, seen = case.model(torch.float32), []
    rotary = next(module for name, module in model.named_modules() if re.search(r"(?<!visual)\.rotary_emb$", name))
    rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    for prompt in case.prompts:
        with torch.no_grad():
            model(**plain_inputs(model, prompt))
        found = seen.pop()[..., 0, :]
        assert torch.equal(prompt.position_ids, found)
        assert prompt.next_position == int(found.max()) + 1


@WITH_IMAGES
@pytest.mark.parametrize("size", [(640, 480), (100, 75), (57, 60), (60, 300), (33, 31)])
def test_an_image_of_any_size_is_cut_as_by_the_exported_processor(case, tmp_path, size):
    case.processor.save(tmp_path)
    exported = AutoProcessor.from_pretrained(tmp_path)
    image = make_image(0, size)
    (processed,) = case.processor.process(make_record("r", image, "?")).images
    inputs = exported.image_processor(images=[load_image(image)], return_tensors="pt")
    assert processed.grid_thw.tolist() == inputs["image_grid_thw"][0].tolist()
    assert all(side % case.family.merged_patch == 0 for side in processed.size.processed)
    assert processed.size.original == size


def test_tokens_of_a_chat_can_neither_be_sampled_nor_smuggled_in(case):
    tokens = case.processor.tokenizer.added_tokens_decoder
    reserved = get_family(case.family.model_type).reserved
    for token in tokens.values():
        assert token.content.startswith(reserved), token
    names = {i: token.content for i, token in tokens.items()}
    vision = {i for i, name in names.items() if re.search("vision|image|video", name)}
    assert set(case.processor.suppressed_token_ids) == (vision if case.family.merged_patch else set())
    assert {names[i] for i in case.processor.stop_token_ids} == {"<|im_end|>", "<|endoftext|>"}


# ── what is trained, and what is exported ──


@WITH_IMAGES
def test_a_frozen_vision_tower_has_no_gradient_and_nothing_else_is_frozen(case):
    policy = case.trained(freeze=["vision"])
    policy(case.pack([PackItem(case.prompt(1), RAGGED, range(5))])[0]).logprobs.sum().backward()
    tower = {name for name, _ in policy.named_parameters() if ".visual." in name}
    assert tower
    assert {name for name, p in policy.named_parameters() if p.grad is None} == tower


def test_adapters_are_on_the_linear_layers_of_the_language_model_alone_and_are_merged_on_export(case):
    policy = case.trained(lora=LoraConfig(rank=4, alpha=8.0))
    adapted = {name.split(".lora_")[0] for name, _ in policy.named_parameters() if ".lora_" in name}
    layers = policy.model.get_decoder().layers
    inside = {name for name, module in policy.named_modules() if type(module) is torch.nn.Linear or name in adapted}
    inside = {name for name in inside if re.search(r"\.layers\.\d+\.\w+\.\w+$", name) and "visual" not in name}
    assert adapted == inside
    assert len(adapted) == 7 * len(layers)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert load_shape(case.config.path).adapters(4) == trained

    merged, prompt = case.model(torch.float32), case.prompts[0]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        (pack,) = case.pack([PackItem(prompt, RAGGED, range(5))])
        before = torch.cat(padded_logprobs(merged, prompt, RAGGED))
        merged.load_state_dict(policy.plain_state_dict(policy.state_dict()), strict=False)
        expected = torch.cat(padded_logprobs(merged, prompt, RAGGED))
        assert float((expected - before).abs().max()) > 0.1
        torch.testing.assert_close(policy.eval()(pack).logprobs, expected, rtol=1e-4, atol=1e-4)


def test_the_estimate_counts_the_weights_of_the_family(case):
    shape, model = load_shape(case.config.path), case.model()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    if case.family.merged_patch:
        assert shape.vision.parameters == sum(p.numel() for p in model.model.visual.parameters())
        assert shape.vision.block == sum(p.numel() for p in model.model.visual.blocks[0].parameters())
        assert shape.vision.image_tokens(case.family.merged_patch**2) == 1
        freezing = replace(case.config, freeze=["vision"])
        assert weights.trained_parameters(shape, freezing) == shape.parameters - shape.vision.parameters


def test_a_run_ends_in_a_model_that_transformers_loads(case, tmp_path):
    """Two steps, checked at the start and recycled, then loaded by its own class: the same logits as the policy's."""
    rows = [{"question": "Which digit is larger?", "answer": "5", "images": []} for _ in range(8)]
    columns = {"question": "question", "answer": "answer"}
    if case.family.merged_patch:
        columns["images"] = "images"
        for i, row in enumerate(rows[:6]):  # two have none
            row["images"] = [f"{i}.png"]
            (tmp_path / f"{i}.png").write_bytes(digits.problem("train", i).image)
    recipe = write_rows(
        tmp_path,
        rows,
        verifier="tests.misbehaving:half_are_right",
        source={"jsonl": str(tmp_path)},
        splits={"train": "rows/train.jsonl"},
        columns=columns,
    )
    settings = (
        f"--model.path={case.config.path}",
        f"--data.recipes=[{recipe}]",
        "--steps=2",
        "--recycle.recycle_truncated=true",
    )
    trainer = load_trainer(make_config(tmp_path / "run", *settings))
    trainer.train()
    last = metrics(tmp_path / "run")[-1]
    assert any(name.startswith(("pointwise/", "pairwise/")) for name in last), "nothing was recycled"
    assert last["update/grad_norm"] > 0
    before = load_file(Path(case.config.path) / "model.safetensors")
    exported = tmp_path / "run" / "model"
    after = load_file(exported / "model.safetensors")
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after), "nothing was trained"

    model_class = type(case.model())
    model, loading = model_class.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = case.family.load_processor(replace(case.config, path=str(exported)))
    prompt = processor.process(case.prompts[0].record)
    (pack,) = case.pack([PackItem(prompt, RAGGED, range(5))])
    with torch.no_grad():
        trained = trainer.updater.policy.eval()
        trained.suppressed = trained.suppressed[:0]
        got = trained(pack).logprobs
        expected = torch.cat(padded_logprobs(model.eval(), prompt, RAGGED))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
