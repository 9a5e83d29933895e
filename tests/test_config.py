r"""Settings: every mistake is named before anything is loaded, the defaults are the paper's, files round-trip."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spark_vl.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    EvaluationConfig,
    ModelConfig,
    RolloutConfig,
    TrainConfig,
    config_differences,
    flat,
    save_config,
)
from spark_vl.config_check import check_eval_config, check_train_config
from spark_vl.config_cli import Parser, add_config_arguments, instantiate, parse_train_config
from spark_vl.data.recipes import load_recipe, recipes, usage
from spark_vl.prompts import Templater
from spark_vl.records import KINDS

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "scripts" / "configs").glob("*/*.yaml"))
BENCHMARKS = ROOT / "scripts" / "configs" / "benchmarks.yaml"
RECIPE = "--data.recipes=[digits]"


def error_of(capsys, *arguments: str) -> str:
    """What `arguments` print to stderr when they are refused."""
    with pytest.raises(SystemExit) as exit_:
        parse_train_config(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("argument", "field", "allowed"),
    [
        ("--optimizer.lrr=1", "optimizer.lrr", ""),
        ("--optimzer.lr=1", "optimzer.lr", ""),
        ("--checkpoint.keep=2", "checkpoint.keep", ""),  # no abbreviation of keep_best
        ("--optimizer.lr=fast", "optimizer.lr", "PositiveFloat"),
        ("--optimizer.lr=0", "optimizer.lr", "v>0"),
        ("--optimizer.lr=nan", "optimizer.lr", "v>0"),
        ("--rollout.n=2.5", "rollout.n", "PositiveInt"),
        ("--rollout.n=true", "rollout.n", "PositiveInt"),
        ("--rollout.top_p=1.5", "rollout.top_p", "v<=1"),
        ("--rollout.top_p=0", "rollout.top_p", "v>0"),  # no word would be left to sample
        ("--rollout.temperature=0", "rollout.temperature", "v>0"),
        ("--recycle.pairwise_share=-0.1", "recycle.pairwise_share", "v>=0"),
        ("--recycle.max_judge=-1", "recycle.max_judge", "v>=0"),
        ("--recycle.schedule=parallel", "recycle.schedule", "'merged', 'sequential', 'none'"),
        ("--objective.loss=ppo", "objective.loss", "'grpo', 'dr_grpo', 'dapo', 'gspo'"),
        ("--model.gradient_checkpointing=maybe", "model.gradient_checkpointing", "bool"),
        ("--optimizer.betas=0.9", "optimizer.betas", "list"),
        ("--seed=-1", "seed", "v>=0"),
        ("--steps=0", "steps", "v>0"),
        ("--data.recipes=digits", "data.recipes", "list"),
        ("--objective.refill_rounds={problem: 1.5}", "objective.refill_rounds", "int"),
    ],
)
def test_mistakes_that_types_find_are_named_on_the_command_line(capsys, argument, field, allowed):
    message = error_of(capsys, RECIPE, argument)
    assert field in message
    assert allowed in message


@pytest.mark.parametrize(
    ("text", "field", "allowed"),
    [
        ("optimizer: {lrr: 1}", "'optimizer' does not accept option 'lrr'", ""),
        ("optimzer: {lr: 1}", "'optimzer.lr' is not accepted", ""),
        ("optimizer: {lr: fast}", "optimizer.lr", "PositiveFloat"),
        ("rollout: {n: 0}", "rollout.n", "v>0"),
        ("rollout: {n: true}", "rollout.n", "PositiveInt"),
        ("recycle: {schedule: sometimes}", "recycle.schedule", "'sequential', 'none'"),
        ("model: {path: 3}", "model.path", "str"),
        ("objective: {weights: 3}", "objective.weights", "dict"),
        ("evaluation: {recipes: [null]}", "evaluation.recipes", "str"),
        ("model: [7B]", "model: is ['7B']", "a mapping of settings"),
        ("model:\nseed: 1", "model: is None", "a mapping of settings"),
        ("rollout: {n: null}", "rollout.n: is null", "PositiveInt"),
        ("output_dir: null", "output_dir: is null", "str"),
        ("objective: {weights: null}", "objective.weights: is null", "dict[str, float]"),
        ("[1, 2]", "Unexpected config", ""),
        ("seed: [", "Problems parsing config", ""),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, capsys, text, field, allowed):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = error_of(capsys, "--config", str(file), RECIPE)
    assert field in message
    assert allowed in message


def test_a_setting_without_a_value_may_be_null_where_null_means_something(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: null\nmodel: {revision: null}\n")
    assert parse_train_config(["--config", str(file), RECIPE]) == parse_train_config([RECIPE])


def with_weights(**changes: float) -> str:
    return "--objective.weights=" + str(dict.fromkeys(KINDS, 1.0) | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.recipes: is empty; name at least one recipe"),
        (["--data.recipes=[]"], "data.recipes: is empty"),
        ([RECIPE, "--rollout.top_p=0.9"], "rollout.top_p: is 0.9, but training needs 1: log-probabilities"),
        ([RECIPE, "--rollout.n=1"], "rollout.n: is 1; a group needs at least 2"),
        (
            [RECIPE, "--objective.weights={problem: 1, pairwise: 1}"],
            "objective.weights: lacks pointwise, reflection; all of problem, pointwise, pairwise, reflection are",
        ),
        (
            [RECIPE, with_weights(judge=1)],
            "objective.weights: 'judge' is not a kind of prompt; allowed are problem, pointwise, pairwise, reflection",
        ),
        ([RECIPE, with_weights(pairwise=-1)], "objective.weights.pairwise: is -1.0; allowed are finite numbers from 0"),
        (
            [RECIPE, "--objective.weights={problem: .nan, pointwise: 1, pairwise: 1, reflection: 1}"],
            "objective.weights.problem: is nan",
        ),
        ([RECIPE, "--objective.refill_rounds={problem: -1}"], "objective.refill_rounds.problem: is -1"),
        ([RECIPE, "--objective.refill_rounds={all: 1}"], "objective.refill_rounds: 'all' is not a kind of prompt"),
        (
            [RECIPE, "--model.min_pixels=900", "--model.max_pixels=800"],
            "model.min_pixels: is 900, above model.max_pixels",
        ),
        (
            [RECIPE, "--data.prompts_per_step=2", "--optimizer.updates_per_batch=3"],
            "optimizer.updates_per_batch: is 3, more than data.prompts_per_step (2)",
        ),
        (
            [RECIPE, "--optimizer.warmup_updates=1.5"],
            "optimizer.warmup_updates: is 1.5; allowed are whole numbers, or a share of all updates below 1",
        ),
        (
            [RECIPE, "--optimizer.min_lr_ratio=0.1", "--optimizer.schedule=linear"],
            "optimizer.min_lr_ratio: is 0.1, but only schedule: cosine ends there; optimizer.schedule is linear",
        ),
        ([RECIPE, "--optimizer.betas=[0.9, 1.0]"], "optimizer.betas: is [0.9, 1.0]; allowed are two numbers in [0, 1)"),
        (
            [RECIPE, "--data.max_prompt_tokens=100", "--rollout.max_new_tokens=20", "--optimizer.tokens_per_pack=119"],
            "optimizer.tokens_per_pack: is 119, less than the longest prompt with one completion (120 = ",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(capsys, arguments, message):
    assert error_of(capsys, *arguments).startswith(message)


def test_the_smallest_settings_that_go_together_are_accepted():
    limits = ("--data.max_prompt_tokens=100", "--rollout.max_new_tokens=20", "--optimizer.tokens_per_pack=120")
    least = ("--rollout.n=2", "--data.prompts_per_step=1", with_weights(pairwise=0), "--optimizer.betas=[0, 0.5]")
    config = parse_train_config([RECIPE, *limits, *least])
    assert (config.rollout.n, config.objective.weights["pairwise"]) == (2, 0)


def test_an_evaluation_is_checked_too():
    with pytest.raises(ConfigError, match=r"^evaluation\.recipes: is empty"):
        check_eval_config(EvalConfig())
    evaluation = EvaluationConfig(recipes=["digits"])
    with pytest.raises(ConfigError, match=r"^model\.min_pixels: is 2, above model\.max_pixels \(1\)"):
        check_eval_config(EvalConfig(evaluation=evaluation, model=ModelConfig(min_pixels=2, max_pixels=1)))
    check_eval_config(EvalConfig(evaluation=evaluation, rollout=RolloutConfig(top_p=0.9)))


def paper(config: TrainConfig) -> dict:
    """The sizes of the released SPARK-VL-7B run, as `config` has them."""
    return {
        "prompts a step": config.data.prompts_per_step,
        "rollouts": config.rollout.n,
        "temperature": config.rollout.temperature,
        "prompt": config.data.max_prompt_tokens,
        "completion": config.rollout.max_new_tokens,
        "lr": config.optimizer.lr,
        "KL": config.objective.beta,
        "loss": config.objective.loss,
        "dtype": config.model.dtype,
        "gradient checkpointing": config.model.gradient_checkpointing,
        "epochs": (config.steps, config.epochs),
        "judge, reflection": (config.recycle.max_judge, config.recycle.max_reflection),
        "pairwise share": config.recycle.pairwise_share,
        "max_pixels": config.model.max_pixels,
        "box": r"\boxed{}" in config.prompts.reasoning_suffix,
    }


@pytest.mark.parametrize("arguments", [[RECIPE], ["--config", str(ROOT / "scripts/configs/qwen2_5_vl_7b/spark.yaml")]])
def test_the_defaults_and_the_7b_configuration_keep_to_the_sizes_of_the_paper(arguments):
    assert paper(parse_train_config(arguments)) == {
        "prompts a step": 64,
        "rollouts": 8,
        "temperature": 1.0,
        "prompt": 8192,
        "completion": 768,
        "lr": 5e-7,
        "KL": 0.001,
        "loss": "grpo",
        "dtype": "bfloat16",
        "gradient checkpointing": True,
        "epochs": (None, 2.0),
        "judge, reflection": (32, 32),
        "pairwise share": 0.7,
        "max_pixels": 1048576,
        "box": True,
    }


RELEASED = {
    "data.recipes": ["spark_virl_19k"],
    "epochs": 2.0,
    "recycle.schedule": "sequential",
    "recycle.batch": 64,
    "recycle.pointwise": "one_per_group",
    "recycle.a_is_correct": True,
    "recycle.correct_reflection_share": 0.0,
    "recycle.recycle_truncated": True,
    "objective.loss": "dapo",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.schedule": "cosine",
    "optimizer.min_lr_ratio": 0.1,
    "optimizer.warmup_updates": 0.03,
    "optimizer.updates_per_batch": 8,
    "evaluation.reflection_rounds": 2,
    "evaluation.reflection_claim": "wrong",
    "evaluation.unreadable_judgment": "reflect",
}
"""What the released 7B run does differently from ours; all else is the same (`paper`)."""


def test_the_released_run_differs_from_ours_in_these_settings_and_each_line_says_so():
    folder = ROOT / "scripts/configs/qwen2_5_vl_7b"
    released, ours = (parse_train_config(["--config", str(folder / name)]) for name in ("released.yaml", "spark.yaml"))
    assert paper(released) == paper(ours) | {"loss": "dapo"}
    was, now = flat(asdict(ours)), flat(asdict(released))
    differing = {name: now[name] for name in now if now[name] != was[name] and name != "output_dir"}
    assert differing == {name: value for name, value in RELEASED.items() if value != was[name]}
    assert {name: now[name] for name in RELEASED} == RELEASED
    text = (folder / "released.yaml").read_text()
    group = ""
    commented = set()
    for line in text.splitlines():
        if match := re.match(r"(\w+):$", line):
            group = match[1]
        if (match := re.match(r"  (\w+): [^#]+(#)?", line)) and match[2]:
            commented.add(f"{group}.{match[1]}")
    # The recipe's comment stands above it; the floor belongs to the schedule.
    assert differing.keys() - commented == {"data.recipes", "optimizer.min_lr_ratio"}


ODD_TEXTS = (
    *("null", "off", "1e3", "-1e-3", "007", "._", "1:30", "{a: b}", "# no", " two\n lines ", "~", "${x}", "\\boxed{}"),
)


def may_be_optional(text: str) -> bool:
    """jsonargparse takes a text that is null in YAML, such as "~" or "# no", for null wherever null is allowed."""
    return not re.fullmatch(r"\s*(null|Null|NULL|~|#.*)?\s*", text)


def in_every_text(text: str) -> dict[str, Any]:
    """Overrides that have `text` wherever a setting is a text."""
    overrides = dict.fromkeys(("output_dir", "prompts.system", "prompts.reasoning_suffix"), text)
    overrides |= {"prompts.templates": [text], "data.recipes": [text]}
    return overrides | ({"model.revision": text} if may_be_optional(text) else {})


def with_odd_texts(test: Callable) -> Callable:
    """Each of them is an example, whatever else is drawn."""
    return reduce(lambda each, text: example(overrides=in_every_text(text))(each), ODD_TEXTS, test)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=9) | st.sampled_from(ODD_TEXTS)
optional = st.none() | texts.filter(may_be_optional)
positive, share = st.floats(1e-12, 1e12), st.floats(0, 1)
OVERRIDES = {
    "output_dir": texts,
    "seed": st.integers(0, 2**32 - 1),
    "steps": st.none() | st.integers(1, 10**9),
    "epochs": positive,
    "model.revision": optional,
    "model.dtype": st.sampled_from(["float32", "bfloat16"]),
    "model.gradient_checkpointing": st.booleans(),
    "prompts.system": texts,
    "prompts.reasoning_suffix": texts,
    "prompts.templates": st.lists(texts),
    "data.recipes": st.lists(texts, min_size=1),
    "rollout.temperature": positive,
    "recycle.schedule": st.sampled_from(["merged", "sequential", "none"]),
    "recycle.pairwise_share": share,
    "objective.weights": st.fixed_dictionaries(dict.fromkeys(KINDS, positive)),
    "objective.refill_rounds": st.dictionaries(st.sampled_from(KINDS), st.integers(0, 5)),
    "optimizer.lr": positive,
    "optimizer.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "logging.trackers": st.lists(st.just("tensorboard")),
}


@given(overrides=st.fixed_dictionaries({}, optional=OVERRIDES))
@with_odd_texts
@settings(max_examples=15, deadline=None)
def test_a_saved_configuration_reads_back_equal(tmp_path_factory, overrides):
    config = TrainConfig(data=DataConfig(recipes=["digits"]))
    for path, value in overrides.items():
        *groups, name = path.split(".")
        setattr(reduce(getattr, groups, config), name, value)
    check_train_config(config)
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, file)
    assert parse_train_config(["--config", str(file)]) == config


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    save_config(TrainConfig(data=DataConfig(recipes=["digits"]), seed=3, steps=9), file)
    config = parse_train_config(["--config", str(file), "--seed=4", "--optimizer.lr=1e-3"])
    assert (config.seed, config.steps, config.optimizer.lr) == (4, 9, 1e-3)


def test_numbers_are_plain():
    """Also those that a restricted type has checked; else a checkpoint that holds them cannot be read back."""
    config = asdict(parse_train_config([RECIPE, "--optimizer.lr=1e-3", "--steps=4", with_weights()]))
    leaves = [value for group in config.values() for value in (group.values() if isinstance(group, dict) else [group])]
    assert {type(value) for value in leaves} <= {int, float, str, bool, list, dict, type(None)}


def test_the_shipped_configurations_are_here():
    assert {"digits/spark.yaml", "digits/grpo.yaml", "qwen2_5_vl_7b/spark.yaml", "qwen2_5_7b/spark.yaml"} <= {
        f"{file.parent.name}/{file.name}" for file in SHIPPED
    }


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_configuration_is_complete(file, monkeypatch):
    monkeypatch.chdir(ROOT)  # the paths in them are relative to the repository
    config = parse_train_config(["--config", str(file)])
    splits = [(name, "train") for name in config.data.recipes]
    splits += [(name, config.evaluation.split) for name in config.evaluation.recipes]
    splits += [(name, config.self_judge.split) for name in config.self_judge.recipes]
    for name, split in splits:
        assert split in load_recipe(name).splits
    assert Templater.load(config.prompts.templates, builtin=config.prompts.builtin_templates).templates
    assert config.model.path.startswith("Qwen/Qwen2.5-") or Path(config.model.path, "config.json").is_file()


def test_the_benchmarks_are_evaluated_as_the_released_evaluation_does():
    """2048 tokens, penalty 1.05, greedy, whole sets; and with its test-time reflection, as the comment says."""
    reflection = re.findall(r"^  #   (\w+): (\w+)$", BENCHMARKS.read_text(), re.MULTILINE)
    assert [name for name, _ in reflection] == [
        *("samples", "reflection_rounds", "reflection_claim", "unreadable_judgment")
    ]
    for changes in ((), reflection):
        parser = Parser()
        add_config_arguments(parser, EvalConfig)
        arguments = ["--config", str(BENCHMARKS), *(f"--evaluation.{name}={value}" for name, value in changes)]
        config = instantiate(parser, parser.parse_args(arguments), EvalConfig)
        check_eval_config(config)
    config = instantiate(parser, parser.parse_args(["--config", str(BENCHMARKS)]), EvalConfig)
    asked = config.evaluation
    assert (asked.max_new_tokens, asked.repetition_penalty, asked.problems, asked.samples) == (2048, 1.05, None, 0)
    to_train_on = {"digits", "judgments", "geometry3k", "gsm8k"}
    tests = {name for name in recipes() if "test" in load_recipe(usage(name)).splits}
    assert set(asked.recipes) == tests - to_train_on


def test_the_control_of_the_demo_differs_in_recycling_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = (f"scripts/configs/digits/{name}.yaml" for name in ("spark", "grpo"))
    spark, grpo = (parse_train_config(["--config", file]) for file in files)
    assert spark.recycle.schedule != grpo.recycle.schedule == "none"
    assert asdict(replace(grpo, output_dir=spark.output_dir, recycle=spark.recycle)) == asdict(spark)


@pytest.mark.parametrize(
    ("old", "advice"),
    [("rollout.rows_at_once", "rollout.decode_batch_size"), ("logging.rollouts_every", "spark-vl show RUN")],
)
def test_settings_of_earlier_versions_are_refused_with_what_to_write_instead(old, advice, capsys, tmp_path):
    assert advice in error_of(capsys, RECIPE, f"--{old}=4")
    file = tmp_path / "old.yaml"
    group, name = old.split(".")
    file.write_text(f"{group}:\n  {name}: 4\n")
    assert advice in error_of(capsys, RECIPE, "--config", str(file))


def test_a_list_without_brackets_is_answered_with_brackets(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("data: {recipes: mine.yaml}")
    for arguments in (["--data.recipes", "mine.yaml"], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(SystemExit):
            parse_train_config(arguments)
        assert "A list is written in brackets: --data.recipes '[mine.yaml]'" in capsys.readouterr().err


def test_a_run_resumes_with_servers_that_have_moved_and_not_with_another_engine():
    config = TrainConfig()
    config.rollout.engine, config.rollout.vllm.mode, config.rollout.vllm.servers = "vllm", "server", ["http://a:1"]
    saved = asdict(config)
    config.rollout.vllm.servers, config.rollout.vllm.timeout_s = ["http://b:1", "http://c:1"], 60.0
    assert config_differences(saved, config) == []
    config.rollout.engine, config.rollout.vllm.importance_clip = "transformers", None
    assert sorted(config_differences(saved, config)) == [
        "rollout.engine: 'vllm' → 'transformers'",
        "rollout.vllm.importance_clip: 2.0 → None",
    ]
