"""Publishing the run of somebody else, whose files say what they like: nothing is written or read outside, and in a
card their words are words."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from spark_vl import cli
from spark_vl.config_cli import Parser
from spark_vl.hub import cards, publish
from spark_vl.hub.cards import save_card, write_eval_results
from spark_vl.hub.publish import prepare_judgments, prepare_model
from spark_vl.hub.release import ReleaseError
from spark_vl.hub.run import find_model
from spark_vl.prompts import Templater
from spark_vl.run.paths import pointed
from spark_vl.run.reader import recipe_facts
from spark_vl.run.shards import find_shards
from tests.hub.driver import drawing_once
from tests.test_cards import change

FACTS = {"name": "digits", "description": "d", "license": "MIT", "dataset": None, "splits": {"train": "train"}}
QUOTED = ("metrics", "evaluations", "environment")
DATASET = {"id": "org/problems", "config": None, "revision": None}


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


def prepared(run: Path, folder: Path, checkpoint: str = ""):
    folder.mkdir()
    return prepare_model(folder, checkpoint=run / checkpoint, repo="org/tiny", dry_run=True)


# ── names ──


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        *((FACTS | {"name": name}, "name: found") for name in ("../../x", "/etc/x", "", ".", "a/b", "a\n", "é", 5)),
        *(
            (FACTS | {"dataset": DATASET | {"id": id}}, r"dataset\.id: found")
            for id in ("../x", "org/../x", "a/b/c", "x)](https://evil.org", "https://evil.org", ".x", None)
        ),
        (FACTS | {"dataset": DATASET | {"config": 5}}, r"dataset\.config: found 5"),
        (FACTS | {"dataset": {"id": "org/problems"}}, "dataset: found"),
        (FACTS | {"dataset": "org/problems"}, "dataset: found"),
        (FACTS | {"license": None}, "license: found None"),
        (FACTS | {"splits": ["train"]}, "splits: found"),
        (FACTS | {"splits": {"train": 5}}, "splits: found"),
        ([], "found \\[\\]"),
        (None, "found None"),
    ],
)
def test_facts_about_recipes_are_checked_where_they_are_read(tmp_path, facts, says):
    (tmp_path / "recipes.json").write_text(json.dumps({"digits": facts}))
    with pytest.raises(ValueError, match=rf"recipes\.json: 'digits': {says}.*; allowed: "):
        recipe_facts(tmp_path, ["digits"])
    (tmp_path / "recipes.json").write_text(json.dumps({"digits": FACTS | {"dataset": DATASET}}))
    assert recipe_facts(tmp_path, ["digits"]) == [FACTS | {"dataset": DATASET}]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_facts_that_are_none_are_said_to_be(tmp_path, text):
    (tmp_path / "recipes.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipes\.json: "):
        recipe_facts(tmp_path, ["digits"])


def test_a_recipe_whose_name_is_a_path_writes_nothing(run, tmp_path):
    change(run, "recipes.json", lambda facts: facts["digits"].update(name="../../escaped", dataset=DATASET))
    before = {str(path) for path in tmp_path.rglob("*")}
    for prepare in (
        lambda: prepared(run, tmp_path / "generated"),
        lambda: prepare_judgments(tmp_path / "generated", run=run, repo="org/judged"),
    ):
        with pytest.raises(ReleaseError, match=r"recipes\.json: 'digits': name: found '../../escaped'"):
            prepare()
    new = {str(path) for path in tmp_path.rglob("*")} - before
    assert all(path.startswith(str(tmp_path / "generated")) for path in new)


def test_what_is_generated_stays_in_its_folder_whatever_its_name(tmp_path):
    """Also for a name that no check has seen."""
    results = {"reasoning_greedy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}
    model = SimpleNamespace(
        evaluation={}, step=4, evaluations=[{"step": 4, "results": results}], config={"evaluation": {"split": "test"}},
        benchmarks=(), evaluated_on=[FACTS | {"name": "../../escaped", "dataset": DATASET, "splits": {"test": "test"}}],
    )  # fmt: skip
    (tmp_path / "generated").mkdir()
    with pytest.raises(ReleaseError, match="would be written outside"):
        write_eval_results(model, tmp_path / "generated" / ".eval_results")
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("name", ["../../other/checkpoints/step-000001", "/etc", ".", "", "step-1", "step-000001/../x"])
def test_a_pointer_names_a_checkpoint(tmp_path, name):
    (tmp_path / "best").write_text(name)
    with pytest.raises(ValueError, match=r"best: found .*; allowed: the name of a checkpoint, such as step-000120"):
        pointed(tmp_path, "best")


def test_shards_have_the_names_that_a_run_gives_them(tmp_path):
    (tmp_path / "pairwise").mkdir()
    for name in ("train-٠٠٠٠٠١-000001-0.parquet", "train-000001-000001-0.parquet\n", "../pairwise/x.parquet"):
        (tmp_path / "pairwise" / name).touch()
    assert find_shards(tmp_path) == []


@pytest.mark.parametrize(
    "facts",
    [
        {"step": "4", "base": "x", "base_commit": None},
        {"step": 4, "base": "", "base_commit": None},
        {"step": 4, "base": "org/x)](https://evil.org", "base_commit": "a" * 40},
        {"step": 4, "base": "../x", "base_commit": "a" * 40},
        {"step": 4, "base": "org/x", "base_commit": "main"},
        [],
    ],
)
def test_what_training_started_from_is_checked(run, facts):
    (run / "model" / "spark_training.json").write_text(json.dumps(facts))
    with pytest.raises((ReleaseError, publish.HubError), match=r"spark_training\.json"):
        find_model(run)


# ── files that are elsewhere ──


@pytest.mark.parametrize("name", ["config.yaml", "recipes.json", *(f"{of}.jsonl" for of in QUOTED)])
def test_a_card_does_not_quote_files_from_elsewhere(run, tmp_path, name):
    (run / name).rename(tmp_path / "private")
    (run / name).symlink_to(tmp_path / "private")
    for prepare in (
        lambda: prepared(run, tmp_path / "generated"),
        lambda: prepare_judgments(tmp_path / "generated", run=run, repo="org/judged"),
    ):
        with pytest.raises(ReleaseError, match=f"{name}: is a symbolic link"):
            prepare()


@pytest.mark.parametrize("link", ["model", "checkpoints/step-000004", "checkpoints/step-000004/config.yaml"])
def test_a_model_from_elsewhere_is_not_published(run, finished_run, tmp_path, link):
    private = shutil.copytree(finished_run, tmp_path / "private")
    if (run / link).is_dir():
        shutil.rmtree(run / link)
    else:
        (run / link).unlink()
    (run / link).symlink_to(private / link)
    with pytest.raises(ReleaseError, match="symbolic link"):
        prepared(run, tmp_path / "generated", "" if link == "model" else "checkpoints/latest")


@pytest.mark.parametrize("link", ["judgments", "judgments/pairwise"])
def test_judgments_from_elsewhere_are_not_published(run, finished_run, tmp_path, link):
    private = shutil.copytree(finished_run, tmp_path / "private")
    shutil.rmtree(run / link)
    (run / link).symlink_to(private / link)
    (tmp_path / "generated").mkdir()
    with pytest.raises(ReleaseError, match="lies behind a symbolic link"):
        prepare_judgments(tmp_path / "generated", run=run, repo="org/judged")


def test_a_shard_that_changes_while_it_is_looked_through_is_not_published(run, tmp_path, monkeypatch):
    real = publish.check_shard

    def changing(path, *arguments):
        rows = real(path, *arguments)
        table = pq.read_table(path)
        cells = [{**row, "question": f"hf_{'a' * 34}"} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(cells, schema=table.schema), path)
        return rows

    monkeypatch.setattr(publish, "check_shard", changing)
    (tmp_path / "generated").mkdir()
    with pytest.raises(ReleaseError, match=r"parquet: has changed since it was looked through"):
        prepare_judgments(tmp_path / "generated", run=run, repo="org/judged")


# ── words ──

HOSTILE = [
    "MIT](https://evil.org) [x](https://evil.org",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![x](https://evil.org/x.png)",
    "MIT\n\n# Heading\n\n- item\n\n[x]: https://evil.org\n[x]",
    "`code` **bold** _it_ ~~no~~ <https://evil.org> &lt;b&gt;",
    "MIT\n\n```\n\n# Heading\n\n```",
    "a | b | c\u202e\u2028d\\",
    "\\[x](https://evil.org)",
]


def rendered(path: Path) -> list:
    """All tokens of the card's text, by another's parser of Markdown."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(ModelCard.load(path).text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def shape(path: Path) -> list[tuple]:
    """The card without its words."""
    return [(token.type, token.attrs) for token in rendered(path) if token.type not in ("text", "text_special")]


@pytest.mark.parametrize("words", HOSTILE)
def test_words_are_words(tmp_path, words, monkeypatch):
    template = "---\n{{ card_data }}\n---\n# {{ a }}\n\nIs {{ a }}.\n\n| a | b |\n|---|---|\n"
    template += "| {{ a }} | {{ code(a) }} |\n"
    monkeypatch.setattr(cards.resources, "files", lambda _: tmp_path)
    (tmp_path / "card.md").write_text(template)
    shapes = []
    for text in ("MIT", words):
        save_card(ModelCard, tmp_path / "README.md", ModelCardData(tags=["a"]), "card.md", a=text)
        shapes.append(shape(tmp_path / "README.md"))
        shown = "".join(token.content for token in rendered(tmp_path / "README.md") if token.type.startswith("text"))
        spoken = "".join(character if character.isprintable() else " " for character in text)
        assert " ".join(spoken.split()) in " ".join(shown.split())
    assert shapes[0] == shapes[1]


DRAW = drawing_once(publish.plot_diagnostics)


@pytest.mark.parametrize("words", HOSTILE)
def test_a_card_of_a_foreign_run_has_the_form_of_any_card(run, tmp_path, words, monkeypatch):
    monkeypatch.setattr(publish, "plot_diagnostics", DRAW)
    assert prepared(run, tmp_path / "before").card
    change(run, "recipes.json", lambda facts: facts["digits"].update(license=words))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["objective"]["loss"] = config["evaluation"]["split"] = words
    config["prompts"]["system"] = config["seed"] = words  # the latter is dumped with less indentation
    for folder in (run, run / "checkpoints" / "step-000004"):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    change(run, "recipes.json", lambda facts: facts["digits"]["splits"].update({words: "test"}))
    environment = json.loads((run / "environment.jsonl").read_text()) | {"device": words, "changed": [words]}
    (run / "environment.jsonl").write_text(json.dumps(environment) + "\n")
    facts = {"step": 4, "base": words, "base_commit": None}
    (run / "model" / "spark_training.json").write_text(json.dumps(facts))
    prepared(run, tmp_path / "after")
    plain = [part for part in shape(tmp_path / "before" / "README.md")]
    assert [part for part in shape(tmp_path / "after" / "README.md") if part[0] != "code_inline"] == [
        part for part in plain if part[0] != "code_inline"
    ]
    assert not [part for part in shape(tmp_path / "after" / "README.md") if part[0] == "html_inline"]
    data = ModelCard.load(tmp_path / "after" / "README.md").data.to_dict()
    assert data.keys() == ModelCard.load(tmp_path / "before" / "README.md").data.to_dict().keys()


def test_a_setting_does_not_become_code(run, tmp_path):
    for file in ("config.yaml", "checkpoints/step-000004/config.yaml"):
        change(run, file, lambda config: config["rollout"].update(max_new_tokens="64); import os; os.system('x'"))
    with pytest.raises(ReleaseError, match=r"config\.yaml: rollout\.max_new_tokens: found .*; allowed: an integer"):
        prepared(run, tmp_path / "generated")


# ── what a terminal would obey ──

ORDERS = "\x1b]0;x\x07\x1b[31m\u202ered"


@pytest.mark.parametrize("name", [f"{ORDERS}.json", f"{ORDERS}.bin", f"{ORDERS}-token.json", os.fsdecode(b"\xff.json")])
def test_names_of_files_give_a_terminal_no_orders(run, capsys, name):
    (run / "model" / name).write_text(f"hf_{'aB3' * 12}" if "token" in name else "{}")
    said = ""
    try:
        cli.main(["publish", "model", str(run), "--repo", "org/tiny", "--dry-run"])
    except SystemExit as refused:
        said = str(refused)
    said += "".join(capsys.readouterr())
    assert not set(said) & {"\x1b", "\x07", "\u202e", "\udcff"}


def test_rows_and_errors_give_a_terminal_no_orders(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"q": f"? {ORDERS}", "a": a}) + "\n" for a in (ORDERS, "1")))
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndescription: d\nlicense: none\nsource: {{jsonl: {tmp_path}}}\nsplits: {{train: t.jsonl}}\n"
        "columns: {question: q, answer: a}\nverifier: text\n"
    )
    with contextlib.suppress(SystemExit):  # 1, if there is a row that cannot be used
        cli.main(["recipes", str(tmp_path / "r.yaml")])
    with pytest.raises(SystemExit):
        Parser().exit(2, ORDERS)
    said = "".join(capsys.readouterr())
    assert said.count("\\x1b[31m\\u202ered") >= 3
    assert not set(said) & {"\x1b", "\x07", "\u202e"}


# ── files that hold anything ──

DEEP = "[" * 100_000
ODD = {
    "config.yaml": ["[]", "{}", "a: [", "[" * 5000, "a: &a [x]\nb: *a", "!!python/object/apply:os.system ['true']"],
    "metrics.jsonl": [f"{DEEP}\n", "x\n", "[]\n", "{}\n", '{"step": 1, "problem/reward": "x"}\n'],
    "evaluations.jsonl": [f"{DEEP}\n", "x\n", "[]\n", "{}\n"],
    "environment.jsonl": [f"{DEEP}\n", "x\n", "[]\n", "{}\n"],
    "model/spark_training.json": [DEEP, "x"],
    "model/spark_prompts.json": [DEEP, "x"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in ODD.items() for text in texts])
def test_a_run_that_holds_anything_is_an_error_in_words(run, tmp_path, name, text):
    (run / name).write_text(text)
    with pytest.raises(ReleaseError, match="are not as a run writes them"):
        prepared(run, tmp_path / "generated")
    if name == "config.yaml":
        with pytest.raises(ReleaseError, match="are not as a run writes them"):
            prepare_judgments(tmp_path / "generated", run=run, repo="org/judged")


@pytest.mark.parametrize("name", ["evaluations.jsonl", "model/spark_prompts.json"])
def test_a_pipe_in_a_run_is_not_waited_for(run, tmp_path, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(ReleaseError, match=f"{name}: is no file"):
        prepared(run, tmp_path / "generated")


def test_prompts_that_are_nested_deeply_are_an_error_in_words(tmp_path):
    (tmp_path / "spark_prompts.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"spark_prompts\.json: is not valid JSON"):
        Templater.read(tmp_path / "spark_prompts.json")
