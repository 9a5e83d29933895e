"""`spark-vl eval` with real models: in chunks, resumed, scored again, compared, on every benchmark."""

from __future__ import annotations

import errno
import json
import re
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from datasets import Dataset, Features
from scipy.stats import binomtest

import spark_vl.demo
from spark_vl import cli
from spark_vl.config import (
    ConfigError,
    EvalConfig,
    EvaluationConfig,
    ModelConfig,
    OpenAIConfig,
    PromptConfig,
    RolloutConfig,
    VerifierConfig,
    save_config,
)
from spark_vl.data.recipes import load_recipe
from spark_vl.evaluation import Evaluator, checkpoint, evaluate_checkpoint, prompts, rescore_folder, shares
from spark_vl.evaluation.results import pass_at, sample_figures
from spark_vl.families.registry import find_family
from spark_vl.policy.policy import load_policy
from spark_vl.prompts import Templater
from spark_vl.prompts.templater import PROMPTS_FILE
from spark_vl.records import ImageRef, Rollout, RolloutGroup, Verdict
from spark_vl.rollout import EngineError, TransformersEngine
from spark_vl.rollout.load import load_sampler
from spark_vl.run.jsonl import append_lines, read_lines
from spark_vl.verifiers import VerifierPool
from tests.command import command
from tests.conftest import make_record
from tests.test_benchmarks import SCHEMAS, picture, rows_of
from tests.test_openai_engine import Said, reply, serving

DEMO = Path(spark_vl.demo.__file__).parent
SUFFIX = " Answer in \\boxed{}."
PROMPTS = PromptConfig(reasoning_suffix=SUFFIX, templates=[str(DEMO / "templates.yaml")], builtin_templates=False)


def settings(tmp_path, recipes=("digits",), **evaluation) -> EvalConfig:
    return EvalConfig(
        output=str(tmp_path / "out"),
        model=ModelConfig(path=str(DEMO / "checkpoint"), dtype="float32", min_pixels=784, max_pixels=50176),
        prompts=PROMPTS,
        evaluation=EvaluationConfig(recipes=list(recipes), **{"problems": 10, "samples": 2} | evaluation),
        rollout=RolloutConfig(max_new_tokens=12),
        verifier=VerifierConfig(workers=1),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PROBLEMS", 3)


def greedy(figures):
    return {name: figure for name, figure in figures.items() if not re.search("sampled|own|@|majority", name)}


# ── what is asked ──


def test_it_gives_the_figures_of_the_evaluation_within_a_run(tmp_path):
    config = settings(tmp_path)
    found = evaluate_checkpoint(config, tmp_path / "out")
    family = find_family(config.model)
    processor = family.load_processor(config.model, max_prompt_tokens=config.max_prompt_tokens)
    policy = load_policy(config.model, dtype=None, temperature=1.0, suppressed_token_ids=processor.suppressed_token_ids)
    engine = TransformersEngine(policy, processor, decode_batch_size=256)
    evaluator = Evaluator(config.evaluation, Templater.from_config(PROMPTS), rollout=config.rollout, seed=0)
    with VerifierPool(workers=1) as verifiers:
        expected = evaluator(engine, processor, verifiers)
    assert {name: found[name] for name in expected} == expected
    assert {name for name in found if name not in expected} == {
        *("pass@2", "majority@2", "tokens_greedy", "tokens_sampled"),
        *("tokens_test_time_reflection", "tokens_test_time_majority"),
    }
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == found
    assert {file.name for file in out.iterdir()} == {
        *("samples.jsonl", "results.json", "results.md", "config.yaml", "recipes.json", "environment.jsonl"),
        PROMPTS_FILE,
    }
    lines = read_lines(out / "samples.jsonl")
    assert len({line["id"] for line in lines}) == len(lines) == 10
    assert {len(line["groups"]["greedy"]) for line in lines} == {7}
    assert "| reasoning, greedy | 10 |" in (out / "results.md").read_text()


def test_benchmarks_are_solved_and_nothing_else(tmp_path):
    found = evaluate_checkpoint(settings(tmp_path, samples=0, judging=False, reflection_rounds=0), tmp_path / "out")
    assert found.keys() == {"reasoning_greedy", "reasoning_unparsable", "unusable", "tokens_greedy"}
    [line, *_] = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [len(groups) for groups in line["groups"].values()] == [1]


def test_chunks_change_no_greedy_answer(tmp_path, small_chunks):
    chunked = evaluate_checkpoint(settings(tmp_path), tmp_path / "out")
    prompts.MOST_PROBLEMS = 256
    whole = evaluate_checkpoint(settings(tmp_path), tmp_path / "whole")
    assert greedy(chunked).keys() == greedy(whole).keys()
    for name, figure in greedy(whole).items():
        assert chunked[name] == figure, name


def test_chunks_hold_no_more_images_than_they_may(tmp_path, monkeypatch):
    config = settings(tmp_path)
    processor = find_family(config.model).load_processor(config.model, max_prompt_tokens=256)
    records = [make_record(f"p/{i}", ImageRef(data=picture(f"{56 + i}x56 red")["bytes"])) for i in range(10)]
    one = processor.process(records[0]).images[0].nbytes
    assert one == 56 * 56 * prompts.BYTES_OF_A_PIXEL  # also of the others, which are resized
    monkeypatch.setattr(prompts, "MOST_PIXELS", 3 * one)
    chunks = [len(chunk) for chunk in prompts.in_chunks(records, processor, lambda problem: [])]
    processor.forget_images()
    assert chunks == [3, 3, 3, 1]


class Watched:
    """Prompts whose decoded images are counted while they are held."""

    def __init__(self, made):
        self.made, self.held, self.most = made, weakref.WeakSet(), 0

    def process(self, record):
        prompt = self.made.process(record)
        self.held.update(prompt.images)
        self.most = max(self.most, len(self.held))
        return prompt

    def forget_images(self):
        self.made.forget_images()


def test_the_images_of_a_chunk_are_gone_before_those_of_the_next_come(tmp_path, monkeypatch):
    watched = []

    def watching(*arguments, **options):
        loaded = load_sampler(*arguments, **options)
        watched.append(Watched(loaded.prompts))
        return replace(loaded, prompts=watched[0])

    monkeypatch.setattr(checkpoint, "load_sampler", watching)
    monkeypatch.setattr(prompts, "MOST_PROBLEMS", 3)
    evaluate_checkpoint(settings(tmp_path, samples=0), tmp_path / "out")
    assert watched[0].most == 3  # of ten, each with an image of its own
    assert not watched[0].held


# ── killed, and started again ──


class Dying:
    """A sampler that fails at call `at`, and notes what it was asked."""

    def __init__(self, sampler, at, asked):
        self.sampler, self.left, self.asked = sampler, at, asked

    def generate(self, prompts, n, sampling, *heard):
        if self.left == 0:
            raise EngineError("the power went")
        self.left -= 1
        self.asked.update((prompt.record.id, n) for prompt in prompts)
        return self.sampler.generate(prompts, n, sampling, *heard)

    def close(self):
        self.sampler.close()


def test_a_killed_evaluation_asks_no_finished_problem_again(tmp_path, small_chunks, monkeypatch):
    config, out = settings(tmp_path, samples=0), tmp_path / "out"
    asked: Counter = Counter()
    left = 3 + 1  # greedy, judgments, revisions; it dies in the second chunk of three problems

    def dying(*arguments, **options):
        loaded = load_sampler(*arguments, **options)
        return replace(loaded, sampler=Dying(loaded.sampler, left, asked))

    monkeypatch.setattr(checkpoint, "load_sampler", dying)
    with pytest.raises(EngineError, match="the power went"):
        evaluate_checkpoint(config, out)
    finished = {line["id"] for line in read_lines(out / "samples.jsonl")}
    assert len(finished) == 3
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"recipe": "digits", "row": 1')  # torn
    left = 10**6
    asked.clear()
    resumed = evaluate_checkpoint(config, out)
    assert not finished & {id.split("#")[0] for id, _ in asked}
    assert set(asked.values()) == {1}
    left = 0  # nothing is asked now
    assert evaluate_checkpoint(config, out) == resumed
    left = 10**6
    assert evaluate_checkpoint(config, tmp_path / "at once") == resumed


def test_files_of_several_processes_are_put_together(tmp_path):
    config, out = settings(tmp_path, samples=0, judging=False), tmp_path / "out"
    whole = evaluate_checkpoint(config, out)
    lines = read_lines(out / "samples.jsonl")
    (out / "samples.jsonl").unlink()
    append_lines(out / "samples-0.jsonl", lines[:4])
    append_lines(out / "samples-1.jsonl", lines[3:7])  # one of them twice
    assert evaluate_checkpoint(config, out) == whole
    assert sorted(file.name for file in out.glob("samples*")) == ["samples.jsonl"]
    assert len(read_lines(out / "samples.jsonl")) == 10


def test_another_evaluation_is_not_mixed_in(tmp_path):
    config, out = settings(tmp_path, samples=0, judging=False), tmp_path / "out"
    evaluate_checkpoint(config, out)
    config.rollout.decode_batch_size = 7  # changes no answer
    evaluate_checkpoint(config, out)
    config.evaluation.max_new_tokens = 3
    with pytest.raises(ConfigError, match=r"output: .*evaluation\.max_new_tokens: None → 3.*--overwrite"):
        evaluate_checkpoint(config, out)
    evaluate_checkpoint(config, out, overwrite=True)
    lengths = {line["groups"]["greedy"][0]["completions"][0]["tokens"] for line in read_lines(out / "samples.jsonl")}
    assert max(lengths) <= 3


# ── rows that cannot be asked ──


def test_rows_that_cannot_be_used_are_counted_and_not_replaced(tmp_path):
    rows = [{"id": i, "q": f"What is {i} + 1?", "a": str(i + 1)} for i in range(6)]
    rows += [
        {"id": 6, "q": "", "a": "1"},
        {"id": 7, "q": "No number?", "a": "blue"},
        {"id": 8, "q": "x" * 9999, "a": "1"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        **{"name": "rows", "description": "x", "license": "MIT", "source": {"jsonl": str(tmp_path)}},
        **{"splits": {"test": "rows.jsonl"}, "verifier": "number"},
        "columns": {"id": "id", "question": "q", "answer": "a"},
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(recipe))
    config = settings(tmp_path, [str(tmp_path / "rows.yaml")], problems=None, samples=0)
    config.max_prompt_tokens = 256
    found = evaluate_checkpoint(config, tmp_path / "out")
    assert (found["unusable"]["value"], found["unusable"]["n"]) == (pytest.approx(3 / 9), 9)
    assert found["reasoning_greedy"]["n"] == 6
    reasons = {
        line["id"]: line["unusable"] for line in read_lines(tmp_path / "out" / "samples.jsonl") if "unusable" in line
    }
    assert reasons.keys() == {"rows/test/6", "rows/test/7", "rows/test/8"}
    assert "256" in reasons["rows/test/8"]
    assert evaluate_checkpoint(config, tmp_path / "out") == found


# ── every benchmark ──


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Name of a benchmark → path of a recipe of its fixture."""
    folder = tmp_path_factory.mktemp("benchmarks")
    paths = {}
    for name, schema in SCHEMAS.items():
        rows, place = rows_of(name), folder / name / "data"
        place.mkdir(parents=True)
        cells = {
            column: [picture(row[column]) if is_image(kind) else row[column] for row in rows]
            for column, kind in schema.items()
        }
        table = Dataset.from_dict(cells, features=Features(schema))
        for split in set(load_recipe(name).splits.values()):
            table.to_parquet(place / f"{split}-00000-of-00001.parquet")
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({"base": name, "source": {"hub": {"id": str(place.parent)}}}))
    return paths


def is_image(kind) -> bool:
    return isinstance(getattr(kind, "feature", kind), datasets.Image)


def test_every_benchmark_runs_offline_and_can_be_scored_again(tmp_path, copies, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = settings(tmp_path, map(str, copies.values()), problems=None, samples=0, judging=False, reflection_rounds=0)
    config.evaluation.max_new_tokens = 4
    config.max_prompt_tokens = 4096
    out = tmp_path / "out"
    found = evaluate_checkpoint(config, out)
    lines = read_lines(out / "samples.jsonl")
    assert {line["recipe"] for line in lines} == set(copies)
    assert Counter(line["recipe"] for line in lines if "unusable" not in line).keys() == set(copies)
    for name in ("wemath/strict", "wemath/loose", "dynamath/worst", "mathverse/versions"):
        assert name in found
    for name in copies:
        assert found[f"{name}/unusable"]["value"] == 0, name
    for name in ("vl_rewardbench", "multimodal_rewardbench", "mmrb2", "rewardbench2"):
        assert {f"{name}/reward_accuracy", f"{name}/reward_pointwise", f"{name}/reward_brier"} <= found.keys()
    with VerifierPool(workers=1):
        again, differences = rescore_folder(out, config.verifier)
    assert (again, differences) == (found, [])


# ── by a server ──


def by_server(tmp_path, server) -> EvalConfig:
    config = settings(tmp_path, samples=2, problems=6)
    config.rollout.engine = "openai"
    config.rollout.openai = OpenAIConfig(base_url=server.url, model="somebody's", retries=0)
    return config


def test_a_model_behind_a_server_is_evaluated_without_weights_and_resumed(tmp_path, monkeypatch):
    """It says 7 to everything, and goes away after so many requests."""
    left = [50]

    def answer(body):
        left[0] -= 1
        if left[0] < 0:
            raise Said(401, "gone")
        return reply(r"\boxed{7}", tokens=4)

    monkeypatch.setattr(prompts, "MOST_PROBLEMS", 1)
    out = tmp_path / "out"
    with serving(answer) as server:
        config = by_server(tmp_path, server)
        with pytest.raises(EngineError, match="401"):
            evaluate_checkpoint(config, out)
        finished = {line["id"]: line for line in read_lines(out / "samples.jsonl")}
        assert 0 < len(finished) < 6
        left[0], server.asked[:] = 10**6, []
        found = evaluate_checkpoint(config, out)
        lines = read_lines(out / "samples.jsonl")
        assert [line for line in lines if line["id"] in finished] == list(finished.values())
        assert len(lines) == 6
        image = server.asked[0]["messages"][-1]["content"][0]
        assert image["image_url"]["url"].startswith("data:image/")
        left[0] = 0
        config.rollout.openai.concurrency = 1
        assert evaluate_checkpoint(config, out) == found
        config.rollout.openai.model = "another one's"
        with pytest.raises(ConfigError, match=r"rollout\.openai\.model: \"somebody's\" → \"another one's\""):
            evaluate_checkpoint(config, out)
    golds = [line["groups"]["greedy"][0]["gold"] for line in lines]
    assert found["reasoning_greedy"]["value"] == pytest.approx(golds.count("7") / 6)
    assert found["tokens_greedy"]["value"] == 4
    assert found["pointwise_greedy"]["value"] == 0  # 7 is no verdict


# ── figures of the samples ──


def attempts(*verdicts: bool, tokens: int = 5) -> RolloutGroup:
    rollouts = tuple(Rollout((), (), "", "stop", counted=tokens) for _ in verdicts)
    return RolloutGroup(
        make_record("p/1", "q"), rollouts, tuple(Verdict(float(right), "1" if right else "2") for right in verdicts)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(k):
    from itertools import combinations
    from statistics import fmean

    verdicts = (True, False, False, True)
    assert pass_at(k, attempts(*verdicts)) == pytest.approx(fmean(any(some) for some in combinations(verdicts, k)))


def test_figures_of_samples_by_hand():
    groups = {"greedy": [attempts(True)], "sampled": [attempts(True, True, False), attempts(False, False, True)]}
    found = sample_figures(groups)
    assert {name: figure["value"] for name, figure in found.items()} == {
        **{"pass@2": pytest.approx((1 + 2 / 3) / 2), "pass@3": 1.0, "majority@3": 0.5},
        **{"tokens_greedy": 5.0, "tokens_sampled": 5.0},
    }


# ── the command ──


@pytest.fixture(scope="module")
def run():
    with command("spark_vl.evaluation", "spark_vl.report") as started:
        yield started


def test_the_command_evaluates_resumes_and_scores_again(tmp_path, run):
    config = settings(tmp_path)
    save_config(config, tmp_path / "eval.yaml")
    arguments = ("eval", f"--config={tmp_path / 'eval.yaml'}", "--recipes", "digits", "--engine=transformers")

    def spark_vl(*arguments):
        return run(tmp_path, *arguments)

    ended = spark_vl(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert "reasoning, greedy" in ended.stdout
    again = spark_vl(*arguments)
    assert "10 of 10 rows have been asked before" in again.stdout
    scored = spark_vl("eval", "--rescore", str(tmp_path / "out"))
    assert scored.returncode == 0, scored.stderr
    assert "none of" in scored.stdout


def test_two_evaluations_are_compared_item_by_item(tmp_path, run):
    folders = {}
    for name, tokens in (("whole", 12), ("cut off", 2)):  # no box fits into two tokens
        folders[name] = tmp_path / name
        evaluate_checkpoint(
            settings(tmp_path, samples=0, judging=False, reflection_rounds=0, max_new_tokens=tokens), folders[name]
        )
    right, all_wrong = (json.loads((f / "results.json").read_text())["reasoning_greedy"] for f in folders.values())
    solved = round(10 * right["value"])
    assert solved > 1
    assert all_wrong["value"] == 0
    ended = run(tmp_path, "eval", "--compare", "whole", "cut off", "--changed=changed.jsonl")
    assert ended.returncode == 0, ended.stderr
    row = next(line for line in ended.stdout.splitlines() if line.split()[:1] == ["digits"]).split()
    assert (row[1], row[2], row[3]) == ("10", f"{100 * right['value']:.1f}", "0.0")
    assert row[-2:] == ["0", str(solved)]
    assert float(row[-3]) == pytest.approx(binomtest(0, solved).pvalue, abs=5e-4)
    assert "asked otherwise: evaluation.max_new_tokens: 12 in A, 2 in B" in ended.stdout
    changed = read_lines(tmp_path / "changed.jsonl")
    assert len(changed) == solved
    assert {item["change"] for item in changed} == {"lost"}
    assert all(item["a"] == item["gold"] and item["b"] is None for item in changed)


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def no_space(path, lines):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shares, "append_lines", no_space)
    config = settings(tmp_path, samples=0, judging=False, reflection_rounds=0)
    with pytest.raises(SystemExit, match=r"stopped: .*/out: .*No space left on device; the same command goes on"):
        cli.evaluate(config)
