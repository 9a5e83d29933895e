r"""Builds the checkpoint of the demo: a tiny model that *can* solve and judge, but seldom tries to.

A large model comes to reinforcement learning with skills that it uses only now and then. So does this one, after three phases
of supervised learning on the demo's own prompts:

1. vision: every image token learns to name the digit that it shows a part of; the vision tower is frozen from then on;
2. skill: right completions only, each with a short chain of thought (`look 3,5: \boxed{5}`, `check 3,5: 5=7 no \boxed{No}`);
3. mixture: few completions keep to that, the others announce a poor strategy with their first word (`first 3: \boxed{3}`,
   `fine \boxed{Yes}`). The skill is still there whenever `look` or `check` is sampled.

The poor strategies are consistent with their words, and so are the labels: training on random labels would make a judge whose
verdict has nothing to do with its reasons, and no reward could mend that.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from spark_vl.demo import digits
from spark_vl.demo.tiny import build_model, build_processor
from spark_vl.prompts.templater import Templater
from spark_vl.records import KINDS, ImageRef, Kind, Message

TEMPLATES = Path(__file__).parent / "templates.yaml"
REASONING_SUFFIX = " Answer in \\boxed{}."
"""What the demo appends to each problem."""

SKILLED_SHARE = 0.16
"""Share of the mixture's completions that use the right strategy."""
POOL = 12_000
"""Images to learn from, all of the train split's instances."""
GRID = (1, 4, 4)
"""Patches of one image along time, height and width: 4 image tokens."""


@dataclass(frozen=True)
class Example:
    """One prompt with the completion to learn."""

    messages: tuple[Message, ...]
    completion: str
    problem: digits.Problem
    image: int
    """Index of the problem's image in the pool."""
    wrong_quote: bool = False
    """Whether it is a reflection on a wrong answer."""


def templater() -> Templater:
    """The demo's prompts."""
    return Templater.load([TEMPLATES], builtin=False, reasoning_suffix=REASONING_SUFFIX)


def make_example(
    prompts: Templater, kind: Kind, problem: digits.Problem, image: int, skilled: bool, rng: random.Random
) -> Example:
    """A prompt of `kind` about `problem`, with a completion that follows the right strategy or (not `skilled`) a poor one."""
    question = (ImageRef(data=problem.image), problem.question)
    gold, (left, right) = problem.answer, problem.digits
    wrong = _wrong_answer(problem, rng)
    box = "\\boxed{{{}}}".format
    if kind == "pairwise":
        rendered = prompts.pairwise(question, correct=gold, wrong=wrong, rng=rng)
        label_a, label_b = rendered.labels
        shown_first = gold if rendered.gold == label_a else wrong
        verdict = "equal" if shown_first == gold else "differ"
        poor = rng.choice([f"first {box(label_a)}", f"second {box(label_b)}"])
        skill = f"check {left},{right}: {gold},{shown_first} {verdict} {box(rendered.gold)}"
        return Example(rendered.messages, skill if skilled else poor, problem, image)
    correct = rng.random() < (0.25 if kind == "reflection" else 0.5)
    quoted = gold if correct else wrong
    if kind == "pointwise":
        rendered = prompts.pointwise(question, quoted, correct=correct, rng=rng)
        opposite = next(label for label in rendered.labels if label != rendered.gold)
        yes, no = (rendered.gold, opposite) if correct else (opposite, rendered.gold)
        verdict = "equal" if correct else "differ"
        poor = rng.choice([f"fine {box(yes)}", f"doubt {box(no)}"])
        skill = f"check {left},{right}: {gold},{quoted} {verdict} {box(rendered.gold)}"
        return Example(rendered.messages, skill if skilled else poor, problem, image)
    skill = f"look {left},{right}: {box(gold)}"
    if kind == "problem":
        poor = rng.choice([f"first {left}: {box(left)}", f"last {right}: {box(right)}"])
        return Example(prompts.problem(question), skill if skilled else poor, problem, image)
    shows = rng.choice(["answer", "cot"])
    quote = _chain_of_thought(problem, quoted, rng) if shows == "cot" else quoted
    rendered = prompts.reflection(question, quote, correct=correct, shows=shows, rng=rng)
    return Example(rendered.messages, skill if skilled else f"same {box(quoted)}", problem, image, not correct)


def _wrong_answer(problem: digits.Problem, rng: random.Random) -> str:
    """Often one of the digits shown, as the poor strategies answer; otherwise any."""
    shown = [str(d) for d in problem.digits if str(d) != problem.answer]
    others = [str(d) for d in range(10) if str(d) != problem.answer]
    return rng.choice(shown if shown and rng.random() < 0.6 else others)


def _chain_of_thought(problem: digits.Problem, answer: str, rng: random.Random) -> str:
    """A completion to quote that ends in `answer`."""
    left, right = problem.digits
    seen = rng.randrange(10)
    ways = [f"look {left},{right}"]
    if answer != problem.answer:
        ways = [f"look {seen},{right}", f"look {left},{seen}"]
    ways += [f"first {left}"] * (2 if str(left) == answer else 0)
    ways += [f"last {right}"] * (2 if str(right) == answer else 0)
    return f"{rng.choice(ways)}: \\boxed{{{answer}}}"


class _Pool:
    """Problems of one split with their images as the processor makes them."""

    def __init__(self, processor: Qwen2_5_VLProcessor, split: str, n: int) -> None:
        self.problems = [digits.problem(split, index) for index in range(n)]
        images = [Image.open(io.BytesIO(problem.image)).convert("RGB") for problem in self.problems]
        inputs = processor.image_processor(images, return_tensors="pt")
        assert (inputs["image_grid_thw"] == torch.tensor(GRID)).all()
        self.pixels = inputs["pixel_values"].unflatten(0, (n, -1))
        """[n, 16 patches, values of a patch]"""


def learn_to_see(model: Qwen2_5_VLForConditionalGeneration, pool: _Pool, steps: int) -> Iterator[tuple[int, float]]:
    """Phase 1: a linear head on every image token names the digit in whose column the token stands. Yields (step, loss)."""
    labels = torch.tensor([problem.digits for problem in pool.problems]).repeat(1, 2)  # [n, 2 rows × 2 columns]
    vision = model.model.visual
    head = torch.nn.Linear(model.config.text_config.hidden_size, 10)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(labels), (64,))
        features = vision(pool.pixels[rows].flatten(0, 1), grid_thw=torch.tensor([GRID] * 64)).pooler_output
        return cross_entropy(head(features), labels[rows].flatten())

    yield from _minimise(loss, [*vision.parameters(), *head.parameters()], steps, lr=2e-3)


def learn_to_speak(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pool: _Pool,
    prompts: Templater,
    rng: random.Random,
    *,
    skilled_share: float,
    steps: int,
    lr: float,
    batch: int = 32,
) -> Iterator[tuple[int, float]]:
    """Phases 2 and 3: completions that use the right strategy in `skilled_share` of the cases. Yields (step, loss)."""
    language = [p for name, p in model.named_parameters() if ".visual." not in name]

    def loss() -> torch.Tensor:
        examples = []
        for slot in range(batch):
            row = rng.randrange(len(pool.problems))
            skilled = rng.random() < skilled_share
            examples.append(make_example(prompts, KINDS[slot % len(KINDS)], pool.problems[row], row, skilled, rng))
        return model(**collate(processor, examples, pool)).loss

    yield from _minimise(loss, language, steps, lr)


def collate(processor: Qwen2_5_VLProcessor, examples: list[Example], pool: _Pool) -> dict[str, torch.Tensor]:
    """Right-padded inputs of the model, with labels on the completions only."""
    tokenizer = processor.tokenizer
    image_token = processor.image_token
    prompt_ids = tokenizer([chat(processor, e.messages).replace(image_token, 4 * image_token) for e in examples])
    completion_ids = tokenizer([e.completion + tokenizer.eos_token for e in examples])
    pairs = list(zip(prompt_ids["input_ids"], completion_ids["input_ids"], strict=True))
    length = max(len(p) + len(c) for p, c in pairs)
    ids = torch.tensor([p + c + [tokenizer.pad_token_id] * (length - len(p) - len(c)) for p, c in pairs])
    labels = torch.tensor([[-100] * len(p) + c + [-100] * (length - len(p) - len(c)) for p, c in pairs])
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "mm_token_type_ids": (ids == processor.image_token_id).long(),
        "pixel_values": pool.pixels[[e.image for e in examples]].flatten(0, 1),
        "image_grid_thw": torch.tensor([GRID] * len(examples)),
        "labels": labels,
    }


def chat(processor: Qwen2_5_VLProcessor, messages: tuple[Message, ...]) -> str:
    """The prompt as text, with one image token for each image."""
    turns = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content
            ],
        }
        for message in messages
    ]
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _minimise(
    loss: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter], steps: int, lr: float
) -> Iterator[tuple[int, float]]:
    """AdamW with a short warm-up and a learning rate that decays to 0."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step, value.item()
