"""`spark-vl train | eval | recipes | doctor | estimate`. The command line composes the parts; what they do is theirs.

Everything heavy is imported inside a command, so that `--help` and a mistake in a setting answer at once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from spark_vl import __version__
from spark_vl.config import (
    ConfigError,
    EvalConfig,
    TrainConfig,
    add_config_arguments,
    blamed_on,
    check_eval_config,
    check_train_config,
    instantiate,
    save_config,
)
from spark_vl.data.problems import check, open_recipe
from spark_vl.data.quarantine import TooManyBadRowsError
from spark_vl.data.recipes import load_recipe, recipes
from spark_vl.estimate.shape import load_shape
from spark_vl.estimate.weights import Setup
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, plain_text

TRAIN_HELP = "train a policy that is its own generative reward"
EVAL_HELP = "evaluate a checkpoint as solver, judge and reflector"
RECIPES_HELP = "list the shipped data recipes, or check the rows of one"
DOCTOR_HELP = "say what will not work on this machine, and the fix"
ESTIMATE_HELP = "say whether a run fits into memory, and what would help; exits with 1 if it does not"


class Parser(ArgumentParser):
    """Whole option names only, and errors without the page of usage that would push them off the screen."""

    def __init__(self, **settings: str) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Print `message` and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n(all settings: {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with status 2 on a bad setting, before anything heavy is loaded."""
    parser = Parser(prog="spark-vl", description="Train and use a vision-language model that answers and judges.")
    parser.add_argument("--version", action="version", version=f"spark-vl {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    train_parser = Parser(description=TRAIN_HELP)
    add_config_arguments(train_parser, TrainConfig)
    train_parser.add_argument(
        "--resume",
        default="none",
        help="auto: from the run's latest checkpoint, if it has one; none; or the path of a checkpoint",
    )
    train_parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume although the checkpoint was written under other settings",
    )

    eval_parser = Parser(description=EVAL_HELP)
    add_config_arguments(eval_parser, EvalConfig)

    recipes_parser = Parser(description=RECIPES_HELP)
    recipes_parser.add_argument("name", nargs="?", help="name of a shipped recipe, or path of a recipe file")
    recipes_parser.add_argument("--split", default="train", help="train, validation or test")
    recipes_parser.add_argument("--show", type=int, default=3, help="how many rows to print")

    parsers = {"train": train_parser, "eval": eval_parser, "recipes": recipes_parser}
    parsers["doctor"] = Parser(description=DOCTOR_HELP)
    parsers["estimate"] = estimate_parser = Parser(description=ESTIMATE_HELP)
    estimate_parser.add_argument(
        "--shape",
        metavar="MODEL",
        help="3b, 7b, 32b, 72b, or a folder with a config.json; null: that of model.path. `--model 7b` is the same",
    )
    estimate_parser.add_argument("--fsdp", action="store_true", help="PyTorch's FSDP2 in place of DeepSpeed")
    estimate_parser.add_class_arguments(Setup, as_group=True, skip={"fsdp"})
    add_config_arguments(estimate_parser, TrainConfig)
    for name, command_parser in parsers.items():
        commands.add_subcommand(name, command_parser, help=command_parser.description)
        command_parser.prog = f"{parser.prog} {name}"  # a command that can be typed, for messages

    parsed = parser.parse_args(_shape_for_model(sys.argv[1:] if arguments is None else arguments))
    command = parsed[parsed.command]
    try:
        match parsed.command:
            case "train":
                config = instantiate(train_parser, command, TrainConfig)
                train(config, command.resume, allow_config_change=command.allow_config_change)
            case "eval":
                evaluate(instantiate(eval_parser, command, EvalConfig))
            case "recipes":
                show_recipes(command.name, command.split, command.show)
            case "doctor":
                parser.exit(diagnose())
            case "estimate":
                config, setup = (instantiate(estimate_parser, command, part) for part in (TrainConfig, Setup))
                parser.exit(0 if estimate(command.shape, config, setup) else 1)
    except ConfigError as error:
        parsers[parsed.command].error(str(error))
    except TooManyBadRowsError as error:
        parser.exit(1, f"spark-vl: stopped: {error}\n")


def train(config: TrainConfig, resume: str, *, allow_config_change: bool = False) -> None:
    """`spark-vl train`: train, evaluate before and after, and print what changed."""
    check_train_config(config)
    _check_recipes("data.recipes", config.data.recipes, "train")
    _check_recipes("evaluation.recipes", config.evaluation.recipes, config.evaluation.split)
    templater = Templater.from_config(config.prompts)

    from spark_vl.evaluation import Evaluator
    from spark_vl.hub.cards import write_model_card
    from spark_vl.policy.update import NonFiniteUpdateError
    from spark_vl.report import plot_curves, print_summary, summarise
    from spark_vl.trainer import Trainer

    evaluator = None
    if config.evaluation.recipes:
        with blamed_on("evaluation.recipes"):
            evaluator = Evaluator(config.evaluation, templater, rollout=config.rollout, seed=config.seed)
    trainer = Trainer(config, evaluator, resume, allow_config_change=allow_config_change)
    try:
        finished = trainer.train()
    except NonFiniteUpdateError as error:
        raise SystemExit(f"spark-vl: stopped: {error}") from error
    if finished and trainer.accelerator.is_main_process:
        if evaluator:
            summarise(trainer.folder)
            plot_curves(trainer.folder)
            print_summary(trainer.folder, trainer.log.console)
        write_model_card(trainer.folder)


def evaluate(config: EvalConfig) -> None:
    """`spark-vl eval`: evaluate a checkpoint and write `results.json` and `samples.jsonl`."""
    check_eval_config(config)
    _check_recipes("evaluation.recipes", config.evaluation.recipes, config.evaluation.split)
    templater = Templater.from_config(config.prompts)

    from rich.console import Console

    from spark_vl.evaluation import evaluate_checkpoint
    from spark_vl.report import print_results

    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    results = evaluate_checkpoint(config, templater, folder / "samples.jsonl")
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print_results(results, Console())


def estimate(model: str | None, config: TrainConfig, setup: Setup) -> bool:
    """`spark-vl estimate`: print what a run needs of memory, and say whether it fits.

    Args:
        model: short name or folder of the shape; None: that of `config.model.path`.
    """
    from rich.console import Console

    from spark_vl.estimate.report import print_estimate

    with blamed_on("model.path" if model is None else "--model"):
        shape = load_shape(config.model.path if model is None else model)
    return print_estimate(shape, config, setup, Console())


def show_recipes(name: str | None, split: str, show: int) -> None:
    """`spark-vl recipes [NAME]`: list the recipes, or print and check the rows of one."""
    if name is None:
        for shipped in recipes():
            recipe = load_recipe(shipped)
            print(f"{recipe.name:16} {recipe.license:12} {recipe.description}")
        return
    try:
        problems = open_recipe(load_recipe(name), split, Templater.load())
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    bad: list[BadRecordError] = []
    rows = 0
    for found in check(problems):
        rows += 1
        if isinstance(found, BadRecordError):
            bad.append(found)
        elif rows - len(bad) <= show:
            print(f"── {found.id}\n{plain_text(found.question)}\n→ {found.gold}   ({found.verifier})")
    for error in bad[:20]:
        print(f"cannot be used: {error}")
    print(f"{rows - len(bad)} of {rows} rows can be used")


def diagnose() -> int:
    """`spark-vl doctor`: print what will not work on this machine. Returns the exit status."""
    from spark_vl.doctor import examine

    return examine()


def _shape_for_model(arguments: Sequence[str]) -> list[str]:
    """`estimate --model 7b` as `estimate --shape 7b`: to the parser of settings, `--model` is a file with all of
    `model.path`, `model.dtype`, ..."""
    if list(arguments[:1]) != ["estimate"]:
        return list(arguments)
    return [re.sub(r"^--model(?==|$)", "--shape", argument) for argument in arguments]


def _check_recipes(setting: str, names: Sequence[str], split: str) -> None:
    """Read the recipes that `setting` names, so that a mistake in one is found now."""
    for name in names:
        with blamed_on(setting):
            recipe = load_recipe(name)
        if split not in recipe.splits:
            raise ConfigError(f"{setting}: {name} has no split {split!r}; allowed: {', '.join(recipe.splits)}")
