"""Texts from outside that no file, terminal or tokenizer takes: lone surrogates are made writable where they enter, or
refused there in words."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from spark_vl import cli
from spark_vl.config import ConfigError, PromptConfig
from spark_vl.data.recipes import load_recipe
from spark_vl.log import RunLog
from spark_vl.prompts import Templater
from spark_vl.records import BadRecordError, writable
from spark_vl.run.shards import find_shards, read_shard
from spark_vl.setup import load_trainer
from spark_vl.verifiers.base import run_verifier
from tests.conftest import make_record
from tests.test_trainer import make_config

HALF = "\ud83d"


def own_digits(tmp_path: Path, verifier: str) -> str:
    """A recipe of the digits that are scored by `verifier`."""
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"base": "digits", "name": "own", "verifier": verifier}))
    return str(file)


def test_writable_changes_lone_surrogates_alone():
    for text in ("", "a\U0001f600 ½\0", "\\ud83d"):
        assert writable(text) == text
    assert writable(f"a{HALF}b\udc80") == r"a\ud83db\udc80"


def test_what_a_verifier_says_is_writable():
    record = make_record("r", "?", verifier="tests.misbehaving:half_a_character")
    verdict = run_verifier("cat", record)
    assert (verdict.parsed, verdict.detail) == (r"cat\ud83d", r"half \udc80")
    verdict = run_verifier("cat", make_record("r", "?", verifier="tests.misbehaving:complains_of_half_a_character"))
    assert re.fullmatch(r"ValueError: half \\ud83d \(misbehaving\.py, line \d+\)", verdict.detail)


@pytest.mark.parametrize("verifier", ["half_a_character", "complains_of_half_a_character"])
def test_a_run_whose_verifier_parses_half_a_character_goes_on(tmp_path, verifier):
    recipe = own_digits(tmp_path, f"tests.misbehaving:{verifier}")
    settings = ("--steps=2", f"--data.recipes=[{recipe}]", "--data.max_quarantined_fraction=1")
    trainer = load_trainer(make_config(tmp_path / "run", *settings))
    trainer.train()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    shards = find_shards(tmp_path / "run" / "judgments")
    rows = [row for shard in shards if shard.config == "rollouts" for row in read_shard(shard.path)]
    assert len(rows) == 8
    if verifier == "half_a_character":
        assert all(parsed.endswith(r"\ud83d") for row in rows for parsed in row["parsed"])
        assert "reflection/reward" in steps[1], "nothing was quoted"


def test_a_prompt_that_is_not_text_costs_that_prompt(processor):
    record = make_record("r", f"Is it {HALF}?")
    with pytest.raises(BadRecordError, match=r"^r: the prompt is not valid Unicode"):
        processor.process(record)


@pytest.mark.parametrize(
    "prompts",
    [{"system": f"Be {HALF}"}, {"reasoning_suffix": f"Box it {HALF}"}],
    ids=lambda prompts: next(iter(prompts)),
)
def test_settings_that_are_not_text_are_refused_before_anything_loads(prompts):
    with pytest.raises(ConfigError, match=rf"{next(iter(prompts))}: found .*allowed: valid Unicode"):
        Templater.from_config(PromptConfig(**prompts))


def test_templates_that_are_not_text_are_refused(tmp_path):
    row = {"name": "p", "kind": "reflection", "shows": "answer", "claim": "check"}
    text = json.dumps(f"{HALF} {{question}} {{answer}} \\boxed{{}}")  # YAML reads it too, escape and all
    (tmp_path / "t.yaml").write_text(yaml.safe_dump([row]) + f"  text: {text}\n")
    with pytest.raises(ValueError, match=r"template 'p': found .*allowed: valid Unicode"):
        Templater.load([tmp_path / "t.yaml"])


def test_recipes_that_are_not_text_are_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(r'{base: digits, name: own, license: "half \ud83d"}')
    with pytest.raises(ValueError, match=r"own.yaml: license: found .*allowed: valid Unicode"):
        load_recipe(file)


def test_a_log_writes_what_its_terminal_can(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    log = RunLog(Accelerator(cpu=True), tmp_path, steps=9)
    log.say(f"½ {HALF} [red]1[/blue] :smile:")
    sys.stdout.flush()
    assert buffer.getvalue().decode() == "\\xbd \\ud83d [red]1[/blue] :smile:\n"


def test_rows_are_printed_on_any_terminal(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "½ or 五?", "a": "2"}) + "\n" + r'{"q": "\ud83d", "a": "2"}')
    fields = {"name": "own", "description": "d", "license": "mit", "source": {"jsonl": "."}, "verifier": "number"}
    fields |= {"splits": {"train": "rows.jsonl"}, "columns": {"question": "q", "answer": "a"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(fields))
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["recipes", str(tmp_path / "own.yaml")])
    sys.stdout.flush()
    printed = buffer.getvalue().decode()
    assert r"\xbd or \u4e94?" in printed
    assert "'q' is not valid Unicode" in printed
    assert "1 of 2 rows" in printed
