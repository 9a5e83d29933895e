"""The programs in `scripts/examples`, run as their first lines say, on the model that is installed with the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spark_vl.demo import digits
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import REASONING_SUFFIX, TEMPLATES
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from tests.command import Command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the examples find beside them, so that they write nothing into the repository."""
    for folder in ("scripts/examples", "scripts/configs/digits", "spark_vl/demo"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


@pytest.fixture
def run(forked: Command, tree: Path) -> Callable[..., str]:
    """The output of `python ARGUMENTS`, or `spark-vl ARGUMENTS`, called in `tree`."""

    def output(*arguments: str) -> str:
        program, *others = arguments
        done = forked(tree, *others) if program == "spark-vl" else forked.python(tree, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return output


def test_a_dataset_of_ones_own_is_trained_on_with_plain_grpo(run, tree):
    assert run("scripts/examples/own_dataset.py").startswith("8 rows: ")
    checked = run("spark-vl", "recipes", "scripts/examples/own_dataset.yaml", "--show=8")
    assert "8 of 8 rows can be used (license" in checked.splitlines()[-1]
    assert [line.split()[1] for line in checked.splitlines() if line.startswith("→")] == list("12345678")

    settings = ("--steps=1", "--data.prompts_per_step=8", "--rollout.n=2", "--evaluation.recipes=[]")
    size = ("--data.max_prompt_tokens=400", "--optimizer.tokens_per_pack=1024")
    run("scripts/examples/plain_grpo.py", "--data.recipes=[scripts/examples/own_dataset.yaml]", *settings, *size)
    [line] = (tree / "runs/plain-grpo/metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["rollout/completions"] == 16
    assert not any(name.startswith(("recycle/", "pointwise/")) for name in metrics)
    assert (tree / "runs/plain-grpo/model/model.safetensors").is_file()


def test_the_verifier_of_ones_own_gives_half_marks_to_a_neighbor(run, tree):
    """Under the name that its recipe gives it, and that a script does."""
    code = r"""
from spark_vl import load_recipe, verify
verifier = load_recipe("scripts/examples/own_verifier.yaml").verifier
print(*[verify(verifier, rf"\boxed{{{answer}}}", 4).score for answer in (4, 5, 3, 6, "four")])
print(*[verify("scripts/examples/own_verifier.py:exactly", rf"\boxed{{{answer}}}", 4).score for answer in (4, 5)])
"""
    assert run("-c", code).split() == ["1.0", "0.5", "0.5", "0.0", "0.0", "1.0", "0.0"]
    checked = run("spark-vl", "recipes", "scripts/examples/own_verifier.yaml", "--split=test", "--show=1")
    assert "own_verifier.py:nearly)" in checked


def test_the_judge_gives_a_verdict_in_the_words_that_its_model_was_trained_on(run, tree):
    """Whether it is the right one is as good as a coin before training; in other words there would be none."""
    model = tree / "runs/digits/model"
    shutil.copytree(CHECKPOINT, model)
    templater = Templater.load([TEMPLATES], builtin=False, reasoning_suffix=REASONING_SUFFIX)
    templater.save(model / PROMPTS_FILE)
    problem = digits.problem("test", 0)
    (tree / "picture.png").write_bytes(problem.image)
    said = run("scripts/examples/judge.py", str(model), "picture.png", problem.question, problem.answer)
    assert said.split()[-2] in ("right", "wrong")
