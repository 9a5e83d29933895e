"""`spark-vl train | serve-rollouts | eval | judge | recycle | show | publish | recipes | doctor | estimate`. The
command line composes the parts; what they do is theirs.

Everything heavy is imported inside a command, so that `--help` and a mistake in a setting answer at once.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import Namespace

from spark_vl import __version__
from spark_vl.config import (
    ConfigError,
    EvalConfig,
    JudgeConfig,
    ModelConfig,
    OfflineConfig,
    PromptConfig,
    TrainConfig,
    blamed_on,
    dump_config,
)
from spark_vl.config_check import check_eval_config, check_judge_config, check_train_config, check_vllm_installed
from spark_vl.config_cli import Parser, add_config_arguments, instantiate, shape_for_model, short_names
from spark_vl.data.recipes import load_recipes
from spark_vl.estimate.shape import load_shape
from spark_vl.estimate.weights import Setup
from spark_vl.preview import duplicates, preview
from spark_vl.prompts import Templater
from spark_vl.records import KINDS, visible
from spark_vl.run.paths import CONFIG, model_folder
from spark_vl.run.quarantine import TooManyBadRowsError
from spark_vl.run.trained import evaluation_settings, saved_limits

TRAIN_HELP = "train a policy that is its own generative reward"
SERVE_HELP = "serve rollouts to a run whose rollout.vllm.mode is server, with vLLM, on devices of its own"
EVAL_HELP = "evaluate a checkpoint as solver, judge and reflector"
JUDGE_HELP = "let a model judge answers, alone or in pairs: JSON lines in, JSON lines out"
RECYCLE_HELP = "recycle the rollouts of a run anew, without a model"
SHOW_HELP = "print the rollouts of a run: prompts, completions, verdicts, what was recycled"
PUBLISH_HELP = "publish a model, judgments, or a demo on the Hugging Face Hub; private unless --public"
RECIPES_HELP = "list the shipped data recipes, or check the rows of one"
DOCTOR_HELP = "say what will not work on this machine, and the fix"
ESTIMATE_HELP = "say whether a run fits into memory, and what would help; exits with 1 if it does not"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with status 2 on a bad setting, before anything heavy is loaded."""
    arguments = short_names(shape_for_model(sys.argv[1:] if arguments is None else arguments))
    command_name = arguments[0] if arguments else ""

    def add_settings(command_parser: Parser, name: str, config_class: type) -> None:
        """Nothing for the other commands: to read the settings' names and help takes longer than all else here."""
        if name == command_name:
            add_config_arguments(command_parser, config_class)

    parser = Parser(prog="spark-vl", description="Train and use a vision-language model that answers and judges.")
    parser.add_argument("--version", action="version", version=f"spark-vl {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    train_parser = Parser(description=TRAIN_HELP)
    add_settings(train_parser, "train", TrainConfig)
    train_parser.add_argument(
        "--resume",
        default="none",
        help="auto: from the run's latest checkpoint, if it has one; none; or the path of a checkpoint",
    )
    train_parser.add_argument(
        "--allow-config-change",
        action="store_true",
        help="resume although the checkpoint was written under other settings or with other data",
    )
    train_parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="under ZeRO and FSDP2, resume also from a checkpoint outside output_dir, which can hold code that runs",
    )

    eval_parser = Parser(description=EVAL_HELP)
    add_settings(eval_parser, "eval", EvalConfig)
    eval_parser.add_argument("--overwrite", action="store_true", help="begin anew, rather than go on with `output`")
    eval_parser.add_argument(
        "--rescore", metavar="DIR", help="make the figures of an evaluation again, without a model"
    )
    eval_parser.add_argument(
        "--compare", metavar=("A", "B"), nargs=2, help="compare two evaluations, item by item, without a model"
    )
    eval_parser.add_argument("--changed", metavar="FILE", help="with --compare: write all items that changed")

    serve_parser = Parser(description=SERVE_HELP)
    add_settings(serve_parser, "serve-rollouts", TrainConfig)
    serve_parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all, for a run on other machines"
    )
    serve_parser.add_argument("--port", type=int, default=8000)

    judge_parser = Parser(description=JUDGE_HELP)
    judge_parser.add_argument("rows", help="file of JSON lines with question, images, and answer or answer_a, answer_b")
    add_settings(judge_parser, "judge", JudgeConfig)
    judge_parser.add_argument("--overwrite", action="store_true", help="replace `output`, rather than go on with it")

    recycle_parser = Parser(description=RECYCLE_HELP)
    recycle_parser.add_argument("run", help="folder of a run that kept its rollouts (logging.judgments)")
    add_settings(recycle_parser, "recycle", OfflineConfig)

    show_parser = Parser(description=SHOW_HELP)
    show_parser.add_argument("run", help="folder of a run that kept its rollouts (logging.judgments)")
    show_parser.add_argument("--step", type=int, help="in which they were sampled; null: the latest that is stored")
    show_parser.add_argument("--kind", choices=KINDS, help="of the prompts; null: all kinds")
    show_parser.add_argument("--wrong", action="store_true", help="only groups with a wrong completion")
    show_parser.add_argument("--images", metavar="DIR", help="write their images to this folder, and print the paths")
    show_parser.add_argument("--limit", type=int, default=10, help="how many groups at most; 0: all")

    publish_parser = Parser(description=PUBLISH_HELP)
    publish_parsers = _publish_parsers()

    recipes_parser = Parser(description=RECIPES_HELP)
    recipes_parser.add_argument("name", nargs="?", help="name of a shipped recipe, or path of a recipe file")
    recipes_parser.add_argument("--split", help="train, validation or test; null: the first of these that there is")
    recipes_parser.add_argument("--show", type=int, default=3, help="how many rows to print")
    recipes_parser.add_argument(
        "--render",
        action="store_true",
        help="print them as the model of model.path gets them, chat template and special tokens included",
    )
    recipes_parser.add_argument(
        "--against", metavar="A,B", help="print the rows that these benchmarks ask, too: same question and images"
    )
    recipes_parser.add_argument(
        "--write", metavar="FILE", help="with --against: write their ids, for exclude in a recipe"
    )
    add_settings(recipes_parser, "recipes", TrainConfig)

    parsers = {"train": train_parser, "eval": eval_parser, "judge": judge_parser, "recycle": recycle_parser}
    parsers |= {"publish": publish_parser, "recipes": recipes_parser, "show": show_parser}
    parsers["serve-rollouts"] = serve_parser
    parsers["doctor"] = Parser(description=DOCTOR_HELP)
    parsers["estimate"] = estimate_parser = Parser(description=ESTIMATE_HELP)
    estimate_parser.add_argument(
        "--shape",
        metavar="MODEL",
        help="3b, 7b, 32b, …, or a folder with a config.json; null: that of model.path. `--model 7b` is the same",
    )
    estimate_parser.add_argument("--fsdp", action="store_true", help="PyTorch's FSDP2 in place of DeepSpeed")
    estimate_parser.add_class_arguments(Setup, as_group=True, skip={"fsdp"})
    add_settings(estimate_parser, "estimate", TrainConfig)
    for name, command_parser in parsers.items():
        commands.add_subcommand(name, command_parser, help=command_parser.description)
        command_parser.prog = f"{parser.prog} {name}"  # a command that can be typed, for messages
    publish_commands = publish_parser.add_subcommands(dest="what", required=True)
    for name, command_parser in publish_parsers.items():
        publish_commands.add_subcommand(name, command_parser, help=command_parser.description)
        command_parser.prog = f"{publish_parser.prog} {name}"

    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what is printed quotes data, and a terminal may know ASCII
    arguments = _evaluation_of_a_run(arguments)
    parsed = parser.parse_args(arguments)
    command = parsed[parsed.command]

    def read_within_limits(command_parser: Parser, model: ModelConfig) -> Namespace:
        """The limits that a model was trained within are the defaults, so the settings are read once more."""
        command_parser.set_defaults(saved_limits(model_folder(model.path), model.revision))
        return parser.parse_args(arguments)[parsed.command]

    try:
        match parsed.command:
            case "train":
                config = instantiate(train_parser, command, TrainConfig)
                train(
                    config,
                    command.resume,
                    allow_config_change=command.allow_config_change,
                    trust_checkpoint=command.trust_checkpoint,
                )
            case "serve-rollouts":
                config = instantiate(serve_parser, command, TrainConfig)
                serve(config, host=command.host, port=command.port)
            case "eval":
                config = instantiate(eval_parser, command, EvalConfig)
                if command.rescore is not None:
                    rescore(command.rescore, config)
                elif command.compare is not None:
                    compare(*command.compare, changed=command.changed)
                else:
                    _check_evaluation(config)  # before the Hub is asked
                    command = read_within_limits(eval_parser, config.model)
                    evaluate(instantiate(eval_parser, command, EvalConfig), overwrite=command.overwrite)
            case "judge":
                config = instantiate(judge_parser, command, JudgeConfig)
                _check_judge(command.rows, config)
                command = read_within_limits(judge_parser, config.model)
                config = instantiate(judge_parser, command, JudgeConfig)
                parser.exit(0 if judge(command.rows, config, overwrite=command.overwrite) else 1)
            case "recycle":
                recycle_offline(command.run, instantiate(recycle_parser, command, OfflineConfig))
            case "show":
                show(command)
            case "publish":
                publish(command.what, command[command.what])
            case "recipes":
                if command.against is not None or command.write is not None:
                    if command.name is None or command.against is None:
                        raise ConfigError("--against and --write need a NAME, and --write needs --against")
                    parser.exit(not duplicates(command.name, command.split, command.against.split(","), command.write))
                settings = instantiate(recipes_parser, command, TrainConfig)
                if not preview(command.name, command.split, command.show, settings, render=command.render):
                    parser.exit(1)
            case "doctor":
                parser.exit(diagnose())
            case "estimate":
                config, setup = (instantiate(estimate_parser, command, part) for part in (TrainConfig, Setup))
                parser.exit(0 if estimate(command.shape, config, setup) else 1)
    except ConfigError as error:
        parsers[parsed.command].error(str(error))
    except TooManyBadRowsError as error:
        parser.exit(1, f"spark-vl: stopped: {error}\n")


def train(
    config: TrainConfig, resume: str = "none", *, allow_config_change: bool = False, trust_checkpoint: bool = False
) -> None:
    """`spark-vl train`: train, evaluate before and after, and print what changed."""
    check_train_config(config)
    config.model.path = model_folder(config.model.path)
    _check_recipes("data.recipes", config.data.recipes, "train")
    _check_recipes("evaluation.recipes", config.evaluation.recipes, config.evaluation.split)
    _check_recipes("self_judge.recipes", config.self_judge.recipes, config.self_judge.split)
    Templater.from_config(config.prompts)  # a mistake there is found before anything heavy is loaded
    _warn_without_box(config.prompts)

    from accelerate import Accelerator

    from spark_vl.evaluation import Evaluator
    from spark_vl.families.registry import check_recipes, find_family
    from spark_vl.hub.background import BackgroundPublisher, check_publish_config
    from spark_vl.hub.cards import write_model_card
    from spark_vl.hub.run import find_model
    from spark_vl.policy.check import LogprobGapError
    from spark_vl.policy.update import NonFiniteUpdateError
    from spark_vl.report import check_figure, plot_curves, plot_diagnostics, print_files, print_summary, summarize
    from spark_vl.rollout.engine import EngineError
    from spark_vl.setup import load_trainer

    check_publish_config(config.publish)
    check_recipes("data.recipes", config.data.recipes, config.model)
    evaluator = None
    if config.evaluation.recipes:
        check_recipes("evaluation.recipes", config.evaluation.recipes, config.model)
        templater = Templater.from_config(config.prompts, find_family(config.model).reserved)
        evaluator = Evaluator(config.evaluation, templater, rollout=config.rollout, seed=config.seed)
    check_figure(config.checkpoint.keep_best)
    folder = Path(config.output_dir)
    publishers: list[BackgroundPublisher] = []  # one on the main process, if it is asked for

    def sinks(accelerator: Accelerator) -> list[BackgroundPublisher]:
        if config.publish.repo and accelerator.is_main_process:
            publishers.append(BackgroundPublisher(config.publish, folder))
        return publishers

    try:
        trainer = load_trainer(
            config,
            evaluate=evaluator,
            sinks=sinks,
            resume=resume,
            allow_config_change=allow_config_change,
            trust_checkpoint=trust_checkpoint,
        )
    except EngineError as error:
        raise SystemExit(visible(f"spark-vl: {error}")) from error
    is_main = trainer.accelerator.is_main_process
    finished = False
    try:
        finished = trainer.train()
    except (NonFiniteUpdateError, LogprobGapError, EngineError) as error:
        raise SystemExit(visible(f"spark-vl: stopped: {error}")) from error
    finally:
        for publisher in publishers:
            publisher.finish(wait=finished)
    if finished and is_main:
        if evaluator:
            summarize(folder)
            plot_curves(folder)
            print_summary(folder, trainer.log.console)
        print_files(folder, trainer.log.console)
        plot_diagnostics(folder, folder / "model" / "curves.png")
        card = folder / "model" / "README.md"
        write_model_card(find_model(folder), card, model_id=str(folder / "model"), name=folder.name)


def serve(config: TrainConfig, *, host: str, port: int) -> None:
    """`spark-vl serve-rollouts`: becomes a vLLM server."""
    check_vllm_installed()
    config.model.path = model_folder(config.model.path)

    from spark_vl.rollout.serve import serve_rollouts

    serve_rollouts(config, host=host, port=port)


def evaluate(config: EvalConfig, *, overwrite: bool = False) -> None:
    """`spark-vl eval`: evaluate a checkpoint, and print and write the figures.

    Args:
        config: checked (`_check_evaluation`).
        overwrite: whether an evaluation in the folder is deleted first.
    """
    config.model.path = model_folder(config.model.path)
    if config.prompts != PromptConfig():
        _warn_without_box(config.prompts)

    from rich.console import Console

    from spark_vl.evaluation import evaluate_checkpoint
    from spark_vl.evaluation.tables import print_results
    from spark_vl.rollout.engine import EngineError

    print(f"evaluates {config.model.path}")
    try:
        results = evaluate_checkpoint(config, Path(config.output), overwrite=overwrite)
    except EngineError as error:
        raise SystemExit(visible(f"spark-vl: stopped: {error}; the same command goes on from here")) from error
    except OSError as error:  # of a disk that is full, most likely
        where = error.filename or config.output
        raise SystemExit(visible(f"spark-vl: stopped: {where}: {error}; the same command goes on from here")) from error
    if os.environ.get("RANK", "0") == "0":
        print_results(results, Console())
        print(f"results are in {config.output}")


def rescore(folder: str, config: EvalConfig) -> None:
    """`spark-vl eval --rescore DIR`: print the figures of the answers in a folder, and where they differ from those
    that it has.

    Args:
        config: names the recipes whose own verifiers may run, if there are any.
    """
    from rich.console import Console

    from spark_vl.evaluation import rescore_folder
    from spark_vl.evaluation.tables import print_results

    own = {name for recipe in load_recipes(config.evaluation.recipes) for name in recipe.own_verifiers}
    with blamed_on("--rescore"):
        results, differences = rescore_folder(Path(folder), config.verifier, own)
    print_results(results, Console())
    for difference in differences:
        print(difference)
    print(f"{len(differences) or 'none'} of {len(results)} figures differ from {folder}/results.json")


def compare(a: str, b: str, *, changed: str | None = None) -> None:
    """`spark-vl eval --compare A B`: print how much better the evaluation in folder B is than that in A, and some items
    that changed.

    Args:
        changed: file that gets all of them as JSON lines.
    """
    from rich.console import Console

    from spark_vl.evaluation.compare import changes, compare_evaluations, different_settings
    from spark_vl.evaluation.tables import print_comparison
    from spark_vl.run.jsonl import append_lines

    with blamed_on("--compare"):
        comparison, lines = compare_evaluations(Path(a), Path(b))
        settings = different_settings(Path(a), Path(b))
    print(f"A: {a}\nB: {b}")
    print_comparison(comparison, Console())
    for setting in settings:
        print(f"asked otherwise: {setting}")
    items = changes(comparison, *lines)
    for item in items[:_CHANGES_SHOWN]:
        answers = f": {item['a']!r:.80} → {item['b']!r:.80}, gold {item['gold']!r:.80}" if "gold" in item else ""
        print(visible(f"{item['change']}  {item['id']}{answers}"))
    if len(items) > _CHANGES_SHOWN and changed is None:
        print(f"and {len(items) - _CHANGES_SHOWN} more; --changed FILE writes all")
    if changed is not None:
        Path(changed).unlink(missing_ok=True)
        append_lines(Path(changed), items)


_CHANGES_SHOWN = 10
"""Items that a comparison prints."""


def judge(rows: str, config: JudgeConfig, *, overwrite: bool = False) -> bool:
    """`spark-vl judge ROWS`: write the judgment of each row, print how many there are of each kind, and say whether any
    row could be judged.

    Args:
        config: checked (`_check_judge`).
        overwrite: whether earlier judgments in `config.output` are replaced.
    """
    config.model.path = model_folder(config.model.path)
    if overwrite:
        Path(config.output).unlink(missing_ok=True)

    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from spark_vl.reward import GenerativeReward, judge_file
    from spark_vl.rollout.engine import EngineError

    def load() -> GenerativeReward:
        print(f"asks {config.model.path}", flush=True)
        return GenerativeReward.from_config(config)

    with Progress(TextColumn("{task.completed} rows judged"), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=None)
        try:
            counts = judge_file(Path(rows), config, load, lambda done: bar.advance(task, done))
        except EngineError as error:
            raise SystemExit(visible(f"spark-vl: stopped: {error}; the same command goes on from here")) from error
    for name, n in counts.items():
        print(f"{name:12}{n:>10,}")
    print(f"judgments are in {config.output}")
    return counts["ok"] > 0 or counts["error"] + counts["unparsable"] == 0


def recycle_offline(run: str, config: OfflineConfig) -> None:
    """`spark-vl recycle RUN`: write the judgments that the run's rollouts give, and print how many."""
    templater = Templater.from_config(config.prompts)
    output = Path(config.output)

    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from spark_vl.offline import recycle_rollouts
    from spark_vl.run.provenance import copy_provenance
    from spark_vl.run.reader import find_run

    with blamed_on("run"):
        source = find_run(Path(run))
    if (output / CONFIG).exists():
        raise ConfigError(f"output: {output} holds a run already; name another folder")
    columns = (TextColumn("{task.completed} rollout groups read"), TimeElapsedColumn())
    with blamed_on("run"), Progress(*columns) as bar:
        task = bar.add_task("", total=None)
        counts = recycle_rollouts(
            Path(run),
            output / "judgments",
            templater=templater,
            config=config.recycle,
            seed=config.seed,
            progress=lambda rows: bar.advance(task, rows),
        )
        copy_provenance(source, output, config)
    for name, n in counts.items():
        print(f"{name:12}{n:>10,}")
    if not any(n for name, n in counts.items() if name != "unusable"):
        raise SystemExit("spark-vl: the rollouts give no judgments under these settings (--recycle.…)")
    print(f"{output} can be published: spark-vl publish judgments {output} --repo ORG/NAME")


def show(options: Namespace) -> None:
    """`spark-vl show RUN`: print the groups that the run stored of one step."""
    from spark_vl.show import show_groups

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as it ends other tools
    if options.limit < 0:
        raise ConfigError(f"--limit: is {options.limit}; 0 and more are allowed")
    images = None if options.images is None else Path(options.images)
    if not Path(options.run).is_dir():
        raise ConfigError(f"run: there is no folder {options.run}")
    choice = {"step": options.step, "kind": options.kind, "wrong": options.wrong, "limit": options.limit}
    with blamed_on("run"):
        for text in show_groups(Path(options.run), images=images, **choice):
            print(text, end="\n\n")


def publish(what: str, options: Namespace) -> None:
    """`spark-vl publish model | judgments | space`: upload, or with `--dry-run` print what would be uploaded.

    Raises:
        SystemExit: with what the Hub refused, or what must not be uploaded.
    """
    from huggingface_hub.utils import disable_progress_bars
    from rich.console import Console

    from spark_vl.hub import HubError, ReleaseError
    from spark_vl.hub.publish import check_model_is_there, prepare_judgments, prepare_model, prepare_space
    from spark_vl.hub.upload import print_release, upload

    console = Console(highlight=False)
    if not console.is_terminal:
        disable_progress_bars()
    place = {"repo": options.repo, "token_from": options.token_from}
    try:
        with TemporaryDirectory() as folder:
            generated = Path(folder)
            match what:
                case "model":
                    checkpoint = options.checkpoint
                    shown = {"evaluation": options.evaluation, "dry_run": options.dry_run}
                    release = prepare_model(generated, checkpoint=checkpoint, **shown, **place)
                case "judgments":
                    release = prepare_judgments(generated, run=options.run, **place)
                case "space":
                    model = {"model": options.model, "model_revision": options.model_revision}
                    release = prepare_space(generated, **model, **place)
            print_release(release, console, whole=options.dry_run)
            if options.dry_run:
                return
            if what == "space":
                check_model_is_there(options.model, options.model_revision, options.token_from)
            published = upload(release, revision=options.revision, public=options.public, **place)
    except (HubError, ReleaseError) as error:
        raise SystemExit(visible(f"spark-vl: not published: {error}")) from error
    except KeyboardInterrupt:
        raise SystemExit("spark-vl: not published: interrupted; publishing again goes on from there") from None
    if published.deleted:
        console.print(f"deleted, of earlier releases: {', '.join(published.deleted)}", soft_wrap=True, markup=False)
    words = "commit" if published.changed else "nothing had changed since commit"
    console.print(f"{published.url}  {words} {published.commit}", soft_wrap=True, markup=False)


def _publish_parsers() -> dict[str, Parser]:
    """The commands below `publish`."""
    parsers = {
        "model": Parser(description="a model of a run, with its card, curves and evaluation results"),
        "judgments": Parser(description="the recycled judgments and rollouts of a run, as a dataset"),
        "space": Parser(description="a demo of a published model, as a gradio Space"),
    }
    parsers["model"].add_argument(
        "checkpoint", help="a run's folder, its model/, one of its checkpoints/step-*/, or its checkpoints/best"
    )
    parsers["model"].add_argument(
        "--evaluation", metavar="DIR", help="an evaluation of it by `spark-vl eval`, whose figures the card shows"
    )
    parsers["judgments"].add_argument("run", help="a run's folder, or one that `spark-vl recycle` wrote")
    parsers["space"].add_argument("--model", metavar="ORG/NAME", required=True, help="the model that it shows")
    parsers["space"].add_argument("--model-revision", help="branch, tag or commit of the model; null: main")
    for parser in parsers.values():
        parser.add_argument("--repo", metavar="ORG/NAME", required=True, help="where to; made if it is not there")
        parser.add_argument("--revision", help="branch, made if it is not there; null: main")
        parser.add_argument("--public", action="store_true", help="let everybody see a repository that is made")
        parser.add_argument("--dry-run", action="store_true", help="print each file and the card, and upload nothing")
        parser.add_argument("--token-from", help="env:NAME or file:PATH; null: HF_TOKEN, or that of `hf auth login`")
    return parsers


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


def diagnose() -> int:
    """`spark-vl doctor`: print what will not work on this machine. Returns the exit status."""
    from spark_vl.doctor import examine

    return examine()


def _quiet_libraries() -> None:
    """Keep back what libraries print that alarms without a cause, and bars where nobody sees them move."""
    # Of calls in torch's and DeepSpeed's own code, several in each step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed says so whenever there is no GPU, also in a run that does not use it.
    logging.getLogger("DeepSpeed").addFilter(
        lambda line: not line.getMessage().startswith("Setting accelerator to CPU")
    )
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _evaluation_of_a_run(arguments: Sequence[str]) -> list[str]:
    """`eval --config FILE`, where FILE is the configuration of a training run, with those of its settings that an
    evaluation has in place of the file's name: jsonargparse takes either."""
    arguments = [part for argument in arguments for part in re.split(r"(?<=^--config)=", argument, maxsplit=1)]
    if arguments[:1] == ["eval"]:
        for place in (i + 1 for i, argument in enumerate(arguments[:-1]) if argument == "--config"):
            if (settings := evaluation_settings(Path(arguments[place]))) is not None:
                arguments[place] = dump_config(settings)
    return arguments


def _warn_without_box(prompts: PromptConfig) -> None:
    if "\\boxed" not in prompts.system + prompts.reasoning_suffix:
        print(
            "warning: neither prompts.reasoning_suffix nor prompts.system asks for an answer inside \\boxed{}, and the "
            "kit's verifiers look for it nowhere else: unless the questions ask for it, every answer scores 0",
            file=sys.stderr,
        )


def _check_evaluation(config: EvalConfig) -> None:
    """Find mistakes before anything heavy is loaded."""
    check_eval_config(config)
    _check_recipes("evaluation.recipes", config.evaluation.recipes, config.evaluation.split)
    Templater.from_config(config.prompts)


def _check_judge(rows: str, config: JudgeConfig) -> None:
    """As `_check_evaluation`."""
    check_judge_config(config)
    Templater.from_config(config.prompts)
    if not Path(rows).is_file():
        raise ConfigError(f"rows: there is no file {rows}")
    if config.media_root is not None and not Path(config.media_root).is_dir():
        raise ConfigError(f"media_root: there is no folder {config.media_root}")


def _check_recipes(setting: str, names: Sequence[str], split: str) -> None:
    """Read the recipes that `setting` names, so that a mistake in one is found now."""
    with blamed_on(setting):
        loaded = load_recipes(names)
    for name, recipe in zip(names, loaded, strict=True):
        if split not in recipe.splits:
            raise ConfigError(f"{setting}: {name} has no split {split!r}; allowed: {', '.join(recipe.splits)}")
