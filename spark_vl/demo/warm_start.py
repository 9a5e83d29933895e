r"""Builds the checkpoint of the demo: a tiny model that *can* solve and judge, but seldom tries to.

A large model comes to reinforcement learning with skills that it uses only now and then. So does this one, after three
phases of supervised learning on the demo's own prompts:

1. vision: every image token learns to name the digit that it shows a part of; then the vision tower is frozen;
2. skill: right completions only, each with a short chain of thought, such as `look 3,5: \boxed{5}` for problems and
   reflections and `check 3,5: 5-7=2 wrong \boxed{No}` for judgments;
3. mixture: few completions keep to that, the others announce a poor strategy with their first word, such as
   `first 3: \boxed{3}` or `fine \boxed{Yes}`. The skill is still there whenever `look` or `check` is sampled.

Poor strategies, too, do as they say. A judge trained on random labels would give verdicts that have nothing to do with
its reasons, and no reward could mend that.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from spark_vl.answers import last_boxed
from spark_vl.demo import digits
from spark_vl.demo.tiny import build_model, build_processor
from spark_vl.prompts import Templater
from spark_vl.records import KINDS, ImageRef, Kind, Message

TEMPLATES = Path(__file__).parent / "templates.yaml"
REASONING_SUFFIX = " Answer in \\boxed{}."
"""What the demo appends to each problem."""
SKILLS = ("look", "check")
"""First words of the completions that use the right strategy."""
SKILLED_SHARE = 0.15
"""Share of such completions in the mixture."""

_STEPS = {"vision": 1500, "skill": 1300, "mixture": 450}
_BATCHES: dict[str, dict[Kind, int]] = {  # examples of each kind in a batch
    "skill": {"problem": 6, "pointwise": 10, "pairwise": 10, "reflection": 6},  # judging takes longer to learn
    "mixture": {"problem": 10, "pointwise": 7, "pairwise": 7, "reflection": 8},  # subtracting is forgotten first
}
_POOL = 12_000  # more rows of the train split than the recipe shows, of the same instances
_GRID = (1, 4, 4)  # patches of one image along time, height and width
_IMAGE_TOKENS = 4


@dataclass(frozen=True)
class Example:
    """One prompt, and what to say to it."""

    messages: tuple[Message, ...]
    skilled: str
    """The completion that follows the right strategy."""
    poor: tuple[str, ...]
    """Those that follow poor ones."""
    image: int
    """Index in the pool of its problem."""
    quoted_correct: bool | None
    """Whether the quoted answer is right (pointwise, reflection)."""

    @property
    def gold(self) -> str:
        """The right answer or label."""
        answer = last_boxed(self.skilled)
        assert answer is not None, "a skilled completion ends in its box"
        return answer


def draw(templater: Templater, problems: Sequence[digits.Problem], kind: Kind, rng: random.Random) -> Example:
    """A prompt of `kind` about one of `problems`."""
    image = rng.randrange(len(problems))
    problem = problems[image]
    question = (ImageRef(data=problem.image), problem.question)
    gold, (left, right) = problem.answer, problem.digits
    wrong = _wrong_answer(problem, rng)
    poor: tuple[str, ...]
    if kind == "problem":
        skilled = _boxed(f"look {left},{right}:", gold)
        poor = _boxed(f"first {left}:", left), _boxed(f"last {right}:", right)
        return Example(templater.problem(question), skilled, poor, image, None)
    if kind == "pairwise":
        rendered = templater.pairwise(question, correct=gold, wrong=wrong, rng=rng)
        label_a, label_b = rendered.labels
        skilled = _judgment(problem, gold if rendered.gold == label_a else wrong, str(rendered.gold))
        poor = _boxed("first", label_a), _boxed("second", label_b)
        return Example(rendered.messages, skilled, poor, image, None)
    correct = rng.random() < (0.5 if kind == "pointwise" else 0.25)
    quoted = gold if correct else wrong
    if kind == "pointwise":
        rendered = templater.pointwise(question, quoted, correct=correct, rng=rng)
        skilled = _judgment(problem, quoted, str(rendered.gold))
        says_right, says_wrong = sorted(rendered.labels, key=lambda label: (label == rendered.gold) != correct)
        poor = _boxed("fine", says_right), _boxed("doubt", says_wrong)
    else:
        shows: Literal["answer", "cot"] = rng.choice(["answer", "cot"])
        quote = quoted if shows == "answer" else _chain_of_thought(problem, quoted, rng)
        rendered = templater.reflection(question, quote, correct=correct, shows=shows, rng=rng)
        skilled = _boxed(f"look {left},{right}:", gold)
        poor = (_boxed("same", quoted),)
    return Example(rendered.messages, skilled, poor, image, correct)


def _boxed(words: str, answer: object) -> str:
    return f"{words} \\boxed{{{answer}}}"


def _judgment(problem: digits.Problem, answer: str, label: str) -> str:
    """Subtracts `answer`, the quoted one (of a pair: the first), from the right one before it says `label`."""
    left, right = problem.digits
    difference = abs(int(problem.answer) - int(answer))
    verdict = "wrong" if difference else "right"
    return _boxed(f"check {left},{right}: {problem.answer}-{answer}={difference} {verdict}", label)


def _wrong_answer(problem: digits.Problem, rng: random.Random) -> str:
    """Often one of the digits shown, as the poor strategies answer; otherwise any."""
    shown = [str(digit) for digit in problem.digits if str(digit) != problem.answer]
    others = [str(digit) for digit in range(10) if str(digit) != problem.answer]
    return rng.choice(shown if shown and rng.random() < 0.6 else others)


def _chain_of_thought(problem: digits.Problem, answer: str, rng: random.Random) -> str:
    """A completion to quote that ends in `answer`: of a poor strategy if one says that, or a look that (mis)saw."""
    left, right = problem.digits
    poor = [f"first {left}:"] * (str(left) == answer) + [f"last {right}:"] * (str(right) == answer)
    if answer == problem.answer:
        look = f"look {left},{right}:"
    else:
        look = rng.choice([f"look {rng.randrange(10)},{right}:", f"look {left},{rng.randrange(10)}:"])
    return _boxed(rng.choice([look, *poor, *poor]), answer)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Problems, and the `pixel_values` of their images."""

    problems: list[digits.Problem]
    pixels: torch.Tensor


def build(folder: Path, seed: int = 0) -> None:
    """Build the checkpoint and write it, with its processor, into `folder`; print what it can do."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    templater = Templater.load([TEMPLATES], builtin=False, reasoning_suffix=REASONING_SUFFIX)
    problems = [digits.problem("train", index) for index in range(_POOL)]
    processor = build_processor(_texts(templater, problems, rng))
    model = build_model(processor.tokenizer, hidden=128, layers=3, heads=4, vision_hidden=64, window=112, std=0.05)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    pool = _Pool(problems, pixel_values(processor, problems))
    unseen = [digits.problem("validation", index) for index in range(digits.SPLITS["validation"])]
    held_out = _Pool(unseen, pixel_values(processor, unseen))

    _learn_to_see(model, pool)
    model.model.visual.requires_grad_(False)
    for phase, share, lr in (("skill", 1.0, 2e-3), ("mixture", SKILLED_SHARE, 1e-3)):
        _learn_to_speak(model, processor, templater, pool, rng, phase=phase, skilled_share=share, lr=lr)
        _print_figures(model, processor, templater, held_out)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _texts(templater: Templater, problems: Sequence[digits.Problem], rng: random.Random) -> list[str]:
    """Prompts and completions of every kind and template, for the tokenizer to learn its words from."""
    texts = ["system\nuser\nassistant\n"]
    for kind in KINDS * 200:
        example = draw(templater, problems, kind, rng)
        texts += [part for m in example.messages for part in m.content if isinstance(part, str)]
        texts += [example.skilled, *example.poor]
    return texts


def pixel_values(processor: Qwen2_5_VLProcessor, problems: Sequence[digits.Problem]) -> torch.Tensor:
    """[problems, 16 patches, values of a patch], as the processor makes them."""
    images = [Image.open(io.BytesIO(problem.image)).convert("RGB") for problem in problems]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"].unflatten(0, (len(images), -1))


def _learn_to_see(model: Qwen2_5_VLForConditionalGeneration, pool: _Pool) -> None:
    """A linear head on every image token names the digit in whose column of the image the token stands."""
    labels = torch.tensor([problem.digits for problem in pool.problems]).repeat(1, 2)  # [n, 2 rows of 2 columns]
    vision = model.model.visual
    head = torch.nn.Linear(model.lm_head.in_features, 10)

    def loss() -> torch.Tensor:
        drawn = torch.randint(len(labels), (64,))
        grid = torch.tensor([_GRID] * len(drawn))
        features = vision(pool.pixels[drawn].flatten(0, 1), grid_thw=grid).pooler_output
        return cross_entropy(head(features), labels[drawn].flatten())

    _minimize(loss, [*vision.parameters(), *head.parameters()], "vision", lr=2e-3)


def _learn_to_speak(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    templater: Templater,
    pool: _Pool,
    rng: random.Random,
    *,
    phase: str,
    skilled_share: float,
    lr: float,
) -> None:
    """Completions of every kind, which follow the right strategy in `skilled_share` of the cases."""

    def loss() -> torch.Tensor:
        examples = [draw(templater, pool.problems, kind, rng) for kind, n in _BATCHES[phase].items() for _ in range(n)]
        completions = [e.skilled if rng.random() < skilled_share else rng.choice(e.poor) for e in examples]
        return model(**model_inputs(processor, pool.pixels, examples, completions)).loss

    _minimize(loss, [p for p in model.parameters() if p.requires_grad], phase, lr)


def _minimize(loss: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter], phase: str, lr: float) -> None:
    """AdamW with a short warm-up and a learning rate that decays to 0."""
    steps, start = _STEPS[phase], time.monotonic()
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for _ in track(range(steps), phase):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    print(f"{phase}: {steps} steps in {time.monotonic() - start:.0f} s, last loss {value.item():.4f}", flush=True)


def _print_figures(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, templater: Templater, pool: _Pool
) -> None:
    """For each kind: how often the answer is right, greedily and sampled, and the strategy is."""
    rng = random.Random(0)
    model.eval()
    for kind in KINDS:
        examples = [draw(templater, pool.problems, kind, rng) for _ in range(1000)]
        texts = _complete(model, processor, pool, examples, sample=True)
        skilled = [text.startswith(SKILLS) for text in texts]
        right = [last_boxed(text) == e.gold for text, e in zip(texts, examples, strict=True)]
        greedy = _complete(model, processor, pool, examples, sample=False)
        shares = {
            "greedy": [last_boxed(text) == e.gold for text, e in zip(greedy, examples, strict=True)],
            "sampled": right,
            "skilled": skilled,
            "right when skilled": [r for r, s in zip(right, skilled, strict=True) if s],
        }
        if kind == "reflection":
            shares["repairs"] = [r for r, e in zip(right, examples, strict=True) if not e.quoted_correct]
            shares["keeps"] = [r for r, e in zip(right, examples, strict=True) if e.quoted_correct]
        print(f"  {kind:<10} " + ", ".join(f"{name} {sum(x) / max(len(x), 1):.2f}" for name, x in shares.items()))
    model.train()


@torch.no_grad()
def _complete(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pool: _Pool,
    examples: Sequence[Example],
    *,
    sample: bool,
) -> list[str]:
    inputs = model_inputs(processor, pool.pixels, examples)
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 0} if sample else {}
    settings |= {"max_new_tokens": 32, "do_sample": sample, **inputs}
    output = model.generate(**settings)  # type: ignore[misc]  # transformers types `self` as a protocol that it lacks
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def model_inputs(
    processor: Qwen2_5_VLProcessor,
    pixels: torch.Tensor,
    examples: Sequence[Example],
    completions: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """What `processor` makes of the prompts and images, without processing an image again: left-padded prompts.

    With `completions`: right-padded prompts and completions, with labels on the latter.
    """
    tokenizer = processor.tokenizer
    image_tokens = processor.image_token * _IMAGE_TOKENS
    chats = [chat(processor, e.messages).replace(processor.image_token, image_tokens) for e in examples]
    prompts = tokenizer(chats)["input_ids"]
    if completions is None:
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    else:
        ends = tokenizer([text + tokenizer.eos_token for text in completions])["input_ids"]
        whole = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        batch = tokenizer.pad({"input_ids": whole}, padding_side="right", return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, prompt in enumerate(prompts):
            batch["labels"][row, : len(prompt)] = -100
    return {
        **batch,
        "mm_token_type_ids": (batch["input_ids"] == processor.image_token_id).long(),
        "pixel_values": pixels[[e.image for e in examples]].flatten(0, 1),
        "image_grid_thw": torch.tensor([_GRID] * len(examples)),
    }


def chat(processor: Qwen2_5_VLProcessor, messages: Sequence[Message]) -> str:
    """The prompt as text, with one image token for each image."""
    turns: list[dict[str, Any]] = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
