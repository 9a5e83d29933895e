"""The command line in processes of its own: quick help, mistakes named before anything heavy is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoProcessor

from spark_vl import __version__
from spark_vl.cli import main
from spark_vl.config import PromptConfig
from spark_vl.data.problems import open_recipe
from spark_vl.data.recipes import load_recipe, recipes, usage
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.prompts import Templater
from tests.command import Command, command
from tests.test_processor import hugging_face, hugging_face_chat

GOOD = ("train", "--data.recipes=[digits]")
EVAL = ("eval", "--evaluation.recipes=[digits]")


@pytest.fixture(scope="module")
def spark_vl() -> Iterator[Command]:
    """Run `spark-vl` with these arguments in this folder."""
    with command() as run:
        yield run


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What `spark-vl *arguments`, in this process, prints to stderr when it refuses them."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["", "train", "serve-rollouts", "eval", "judge", "recipes", "show", "doctor", "estimate"]
)
def test_help_loads_nothing_heavy(spark_vl, tmp_path, name):
    status, output, _, loaded = spark_vl(tmp_path, *name.split(), "--help")
    assert (status, loaded) == (0, set())
    assert output.startswith(f"usage: spark-vl {name}".rstrip())


def test_help_names_every_command_and_its_settings(spark_vl, tmp_path):
    commands = spark_vl(tmp_path, "--help").stdout
    assert all(name in commands for name in ("train", "eval", "recipes"))
    train = spark_vl(tmp_path, "train", "--help").stdout
    assert "--config" in train
    assert "--resume" in train
    assert "--optimizer.lr" in train


def test_a_checkpoint_that_is_none_is_named(capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("?")
    error = refusal(capsys, *GOOD, f"--model.path={tmp_path}", f"--output_dir={tmp_path}/run")
    assert f"spark-vl train: error: model.path: {tmp_path} cannot be loaded (AutoConfig): " in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "data.recipes: is empty; name at least one recipe"),
        ((*GOOD, "--optimizer.learning_rate=1"), "optimizer.learning_rate: it is called optimizer.lr"),
        ((*GOOD, "--allow_config_change"), "(did you mean allow-config-change?)"),
        ((*GOOD, "--optimizer.lrr=1"), "optimizer.lrr=1 (did you mean optimizer.lr?)"),
        ((*GOOD, "--optimizer.lr=fast"), 'Parser key "optimizer.lr"'),
        ((*GOOD, "--optimizer.lr=-1"), "v>0"),
        ((*GOOD, "--recycle.schedule=never"), "'merged', 'sequential', 'none'"),
        ((*GOOD, "--rollout.n=1"), "rollout.n: is 1; a group needs at least 2 completions"),
        (
            (*GOOD, "--objective.weights={problem: 1}"),
            "objective.weights: lacks pointwise, pairwise, reflection",
        ),
        ((*GOOD, "--optimizer.tokens_per_pack=9"), "optimizer.tokens_per_pack: is 9"),
        ((*GOOD, "--config=none.yaml"), "none.yaml"),
        ((*GOOD, "--config=broken.yaml"), "rollout: is [8]; allowed is a mapping of settings"),
        (
            ("train", "--data.recipes=[digit]"),
            "data.recipes: no recipe 'digit' (did you mean digits?); allowed: ai2d, chartqa, ",
        ),
        (("train", "--data.recipes=[mine.yaml]"), "data.recipes: mine.yaml: description: is missing"),
        (("train", "--data.recipes=[mathvista]"), "data.recipes: mathvista has no split 'train'; allowed: test"),
        ((*GOOD, "--evaluation.recipes=[nothing]"), "evaluation.recipes: no recipe 'nothing'; allowed: "),
        (
            (*GOOD, "--evaluation.recipes=[digits]", "--evaluation.split=dev"),
            "evaluation.recipes: digits has no split 'dev'; allowed: train, validation, test",
        ),
        ((*GOOD, "--prompts.templates=[none.yaml]"), "prompts.templates: [Errno 2] No such file"),
        (
            (*GOOD, "--prompts.templates=[templates.yaml]"),
            "prompts.templates: templates.yaml: entry 1: template 'judge': text: ",
        ),
        ((*GOOD, "--prompts.builtin_templates=false"), "prompts.templates: templates: there is no pointwise"),
        (("train", "--data.recipes=[digits,digits]"), "data.recipes: more than one is named digits; names are unique"),
        (("eval",), "evaluation.recipes: is empty; name at least one recipe"),
        (("eval", "--evaluation.recipes=[digit]"), "evaluation.recipes: no recipe 'digit' (did you mean digits?)"),
        (("eval", "--rollout.n=0"), 'Parser key "rollout.n"'),
        ((*GOOD, "--logging.trackers=[wandb]"), "logging.trackers: wandb is not installed: pip install wandb"),
        ((*GOOD, "--logging.trackers=[tensorbord]"), "logging.trackers: found 'tensorbord'; allowed: aim, clearml, "),
        ((*GOOD, "--model.path=mine.yaml"), "model.path: mine.yaml is a file; allowed: a Hub id, or the folder of"),
        ((*GOOD, "--model.path=runs"), "model.path: there is no folder runs in /"),
        ((*GOOD, "--model.path=./org/name"), "model.path: there is no folder ./org/name"),
        ((*EVAL, "--config=no_yaml.yaml"), "Problems parsing config"),
        ((*EVAL, "--config=nulls.yaml"), "model: is None; allowed is a mapping of settings"),
        ((*EVAL, "--model.path=/"), "model.path: / holds no model: there is no config.json in it or in its model/"),
        (("recipes", "digit"), "no recipe 'digit' (did you mean digits?); allowed: ai2d, chartqa"),
        (("recipes", "digits", "--split=dev"), "recipe digits: splits: found 'dev'; allowed: train, validation, test"),
        (("recipes", "no_rows.yaml"), "recipe no_rows: source: no file 'train.jsonl'"),
        (("recipes", "no_rows.yaml", "--split=test"), "recipe no_rows: splits: test: 'empty.jsonl' has no rows"),
        (("trian",), "invalid choice: 'trian'"),
        ((), "{train,eval,judge,recycle,publish, ..."),
    ],
)
def test_a_mistake_is_named_before_anything_is_loaded_or_written(spark_vl, tmp_path, arguments, message):
    files = {
        "broken.yaml": "rollout: [8]",
        "no_yaml.yaml": "rollout: [",
        "nulls.yaml": "{output_dir: x, data: , model: }",
        "mine.yaml": "name: mine",
        "no_rows.yaml": "{name: no_rows, description: none, license: none, source: {jsonl: .}, verifier: number, "
        "splits: {train: train.jsonl, test: empty.jsonl}, columns: {question: q, answer: a}}",
        "empty.jsonl": "\n",
        "templates.yaml": r"[{name: judge, kind: pointwise, labels: ['Yes', 'No'], text: '{question} \boxed{Yes}'}]",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    status, output, error, loaded = spark_vl(tmp_path, *arguments)
    assert status == 2
    assert output == ""
    assert message in error
    prog = " ".join(("spark-vl", *arguments[:1])) if arguments and arguments[0] != "trian" else "spark-vl"
    assert error.startswith(f"{prog}: error: ")
    assert error.endswith(f"(all settings: {prog} --help)\n")
    assert "usage:" not in error
    assert loaded == set()
    assert {path.name for path in tmp_path.iterdir()} == set(files), "something was written"


def test_the_module_is_the_command():
    version = subprocess.check_output([sys.executable, "-m", "spark_vl", "--version"], text=True)
    assert version == f"spark-vl {__version__}\n"


def test_recipes_are_listed_with_their_licenses(spark_vl, tmp_path):
    status, output, _, loaded = spark_vl(tmp_path, "recipes")
    assert (status, loaded) == (0, set())
    lines = output.splitlines()
    written = [usage(name) for name in recipes()]
    assert [line.split()[0] for line in lines] == written
    for line, name in zip(lines, written, strict=True):
        assert line.split()[1] == load_recipe(name).license
        assert line.endswith(load_recipe(name).description)


def test_rows_of_a_recipe_are_printed_and_counted(spark_vl, tmp_path):
    """Also shows that what a command loads is seen: the digits come with scikit-learn."""
    status, output, _, loaded = spark_vl(tmp_path, "recipes", "digits", "--split", "test", "--show", "2")
    *rows, count = output.splitlines()
    assert status == 0
    assert loaded == {"sklearn"}
    assert [row for row in rows if row.startswith("── ")] == ["── digits/test/test-0", "── digits/test/test-1"]
    assert [row.startswith("<image>") for row in rows[1::3]] == [True, True]
    assert all(row.endswith("(number)") for row in rows[2::3])
    assert count.startswith("1000 of 1000 rows can be used (license of the data: CC-BY-4.0); not checked: train, ")


def test_rows_that_cannot_be_used_are_printed_with_the_reason(spark_vl, tmp_path):
    rows = [{"q": "How many?", "a": "3"}, {"q": "", "a": "3"}, {"q": "How many?", "a": "4"}, {"a": "4"}]
    rows = [row | {"n": name, "image": None} for row, name in zip(rows, "xyxz", strict=True)]
    first, *others = map(json.dumps, rows)
    (tmp_path / "train.jsonl").write_text("\n".join([first, "", *others]))
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, description: none, license: none, source: {jsonl: .}, verifier: number, "
        "splits: {train: train.jsonl}, columns: {question: q, answer: a, id: n}}"
    )
    status, output, _, loaded = spark_vl(tmp_path, "recipes", "mine.yaml", "--show=2")
    assert (status, loaded) == (1, set())
    assert output.splitlines() == [
        "── mine/train/x",
        "How many?",
        "→ 3   (number)",
        "── mine/train/x#2",
        "How many?",
        "→ 4   (number)",
        "cannot be used: mine/train/y: 'q' is empty (train.jsonl, line 3)",
        "cannot be used: mine/train/z: no column 'q'; the row has 'a', 'n', 'image' (train.jsonl, line 5)",
        "the recipe uses no column image",
        "1 rows have the id of an earlier row; the number of the row is added to it",
        "2 of 4 rows can be used (license of the data: none)",
    ]


def test_reasons_are_grouped_the_most_frequent_first_and_the_rest_is_counted(spark_vl, tmp_path):
    rows = [{"q": "How many?", "a": "3"}, {"q": "", "a": "3"}, *({"q": "?", "a": f"{i} or {i}"} for i in range(5))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, description: none, license: none, source: {jsonl: .}, verifier: number, "
        "splits: {train: train.jsonl}, columns: {question: q, answer: a}}"
    )
    status, output, _, _ = spark_vl(tmp_path, "recipes", "mine.yaml", "--show=0")
    *faults, count = output.splitlines()
    assert status == 1
    assert [fault.split(": ")[1] for fault in faults if ": " in fault] == [
        *(f"mine/train/#{row}" for row in (2, 3, 4)),
        "mine/train/#1",
    ]
    assert faults[3] == "    and 2 more for the same reason"
    assert count.startswith("1 of 7 rows")


@pytest.mark.parametrize(("settings", "warned"), [((), False), (("--prompts.reasoning_suffix=",), True)])
def test_a_prompt_that_asks_for_no_box_is_warned_of(capsys, tmp_path, settings, warned):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("?")  # so that the command ends where the model is loaded
    error = refusal(capsys, *GOOD, *settings, f"--model.path={tmp_path}/model", f"--output_dir={tmp_path}/run")
    assert ("asks for an answer inside \\boxed{}" in error) == warned


@pytest.mark.parametrize("after", [0.02, 0.3, 2.5])
def test_ctrl_c_is_one_line(tmp_path, after):
    """While the command is being imported, and while it works."""
    program = f"""
import signal, sys
from spark_vl.__main__ import main
signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
signal.setitimer(signal.ITIMER_REAL, {after})
sys.argv = ["spark-vl", "recipes", "digits"]
main()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) in ((0, ""), (130, "\nspark-vl: interrupted\n"))
    assert run.returncode or after > 1, "it was over before"


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_rows_are_rendered_as_the_model_gets_them(capsys, tmp_path, system):
    """Against the chat template of a model that adds a system prompt of its own, as Qwen2.5-VL's does."""
    model = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    own = "{%- if messages[0].role != 'system' -%}<|im_start|>system\nYou help.<|im_end|>\n{%- endif -%}\n"
    (model / "chat_template.jinja").write_text(own + (model / "chat_template.jinja").read_text())
    arguments = ("recipes", "digits", "--split=test", "--show=1", "--render", f"--model.path={model}")
    main([*arguments, f"--prompts.system={system}"])
    _, *shown, count, gold, _ = capsys.readouterr().out.splitlines()

    with_images = AutoProcessor.from_pretrained(model)
    problem = open_recipe(load_recipe("digits"), "test", Templater.from_config(PromptConfig(system=system)))[0]
    text = hugging_face_chat(with_images, problem)
    ids = hugging_face(with_images, problem)["input_ids"][0].tolist()
    images = ids.count(with_images.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    assert "\n".join(shown) == text.replace("<|image_pad|>", f"<|image_pad|>×{images}")
    assert shown[0] == "<|im_start|>system"
    assert shown[1].startswith(f"{system or 'You help.'}<|im_end|>")
    assert count == f"[{len(ids)} tokens, {images} of them of images]"
    assert gold == f"→ {problem.gold}   (number)"


def test_a_row_that_is_too_long_to_be_asked_says_so(capsys):
    arguments = ("recipes", "digits", "--split=test", "--show=1", "--render", f"--model.path={CHECKPOINT}")
    main([*arguments, "--data.max_prompt_tokens=9"])
    output = capsys.readouterr().out
    assert "cannot be asked: " in output
    assert "at most 9 are allowed" in output


def test_to_render_takes_a_model(capsys):
    assert "model.path: nowhere" in refusal(capsys, "recipes", "digits", "--render", "--model.path=nowhere")
