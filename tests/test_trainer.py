"""The loop: it goes on after an interruption as if there had been none, and each schedule does what it says."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from spark_vl.checkpoint import CheckpointError, find_checkpoint
from spark_vl.config import ConfigError, RecycleConfig, TrainConfig
from spark_vl.config_cli import parse_train_config
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.offline import recycle_rollouts
from spark_vl.prompts import Templater
from spark_vl.run.manifest import read_manifest, write_manifest
from spark_vl.run.quarantine import TooManyBadRowsError
from spark_vl.run.shards import find_shards, read_shard
from spark_vl.run.sinks import Sink
from spark_vl.setup import load_trainer
from spark_vl.show import show_groups
from tests.distributed.launching import judgments

TEMPLATES = Path(CHECKPOINT).parent / "templates.yaml"


SMALL = (
    *("--data.prompts_per_step=1", "--rollout.n=2", "--rollout.max_new_tokens=2"),
    *("--recycle.schedule=none", "--objective.beta=0"),
)
"""Steps in which as little happens as can, for tests of what happens between steps."""


def make_arguments(output: Path, *overrides: str) -> list[str]:
    """Of `spark-vl train`: a run of seconds on the shipped checkpoint; `overrides` as on the command line."""
    return [
        f"--output_dir={output}",
        "--data.recipes=[digits]",
        f"--model.path={CHECKPOINT}",
        "--model.dtype=float32",
        "--model.gradient_checkpointing=false",
        f"--prompts.templates=[{TEMPLATES}]",
        "--prompts.builtin_templates=false",
        "--data.prompts_per_step=4",
        "--data.max_prompt_tokens=512",
        "--rollout.n=4",
        "--rollout.max_new_tokens=24",
        "--recycle.max_judge=3",
        "--recycle.max_reflection=2",
        "--optimizer.lr=1e-4",
        "--optimizer.tokens_per_pack=1024",
        "--objective.beta=0.01",
        "--checkpoint.every=3",
        "--steps=6",
        *overrides,
    ]


def make_config(output: Path, *overrides: str) -> TrainConfig:
    """`make_arguments` as they are read."""
    return parse_train_config(make_arguments(output, *overrides))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        ("--recycle.schedule=merged", "--data.recipes=[digits?weight=0.002]"),  # 12 rows an epoch
        ("--recycle.schedule=sequential", "--recycle.judge_reflections=true", "--optimizer.updates_per_batch=2"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, overrides, capsys):
    overrides += ("--checkpoint.every=2", "--steps=4")
    load_trainer(make_config(tmp_path / "whole", *overrides)).train()

    # The interrupted run: its folder is as a run leaves it that is killed in step 3, after the checkpoint of step 2.
    load_trainer(make_config(tmp_path / "cut", *overrides, "--steps=3")).train()
    checkpoints = tmp_path / "cut" / "checkpoints"
    shutil.rmtree(checkpoints / "step-000003")
    (checkpoints / "latest").write_text("step-000002")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "half a li')
    capsys.readouterr()
    load_trainer(make_config(tmp_path / "cut", *overrides), resume="auto", allow_config_change=True).train()
    assert "goes on after step 2 of 4" in capsys.readouterr().out

    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    load_trainer(make_config(tmp_path / "cut", *overrides), resume="auto", allow_config_change=True).train()
    assert "all 4 steps are done" in capsys.readouterr().out
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    start = load_file(CHECKPOINT / "model.safetensors")
    assert whole.keys() == cut.keys() == start.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole), "nothing was trained"


def test_epochs_count_rows_as_often_as_they_are_drawn(tmp_path):
    settings = ("--steps=null", "--epochs=1.5", "--data.recipes=[digits?weight=0.002]")  # 1.5 · 12 / 4 prompts a step
    assert load_trainer(make_config(tmp_path / "run", *settings)).steps == 5


def test_the_prompts_that_wait_are_in_the_checkpoint(tmp_path):
    trainer = load_trainer(make_config(tmp_path / "run", "--steps=3"))
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    state = json.loads((checkpoint / "trainer.rank0.json").read_text())["feed"]
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 3
    assert state == trainer.feed.state_dict()
    assert state["waiting"], "the run recycled nothing"
    resumed = load_trainer(make_config(tmp_path / "run", "--steps=3"), resume=str(checkpoint))
    assert resumed.feed.state_dict() == state
    assert [prompt.record.id for prompt in resumed.feed.next("recycled")] == [
        record["id"] for each in state["waiting"] for record in each["records"]
    ]


def test_a_checkpoint_of_an_older_format_is_refused_in_words(tmp_path):
    load_trainer(make_config(tmp_path / "run", *SMALL, "--steps=1")).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    manifest = read_manifest(checkpoint)
    facts = {name: value for name, value in manifest.items() if name not in ("format", "files")}
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, facts)  # as the first format had it
    with pytest.raises(CheckpointError, match=r"has format 1, .* reads format \d+; start a new run .*--model\.path"):
        load_trainer(make_config(tmp_path / "run", *SMALL, "--steps=1"), resume="auto")


def test_gradient_checkpointing_changes_nothing_and_bfloat16_little(tmp_path):
    runs = {
        "plain": (),
        "checkpointing": ("--model.gradient_checkpointing=true",),
        "bfloat16": ("--model.gradient_checkpointing=true", "--model.dtype=bfloat16"),
    }
    first = {}
    for name, overrides in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
        load_trainer(make_config(tmp_path / name, *overrides, "--steps=1", "--recycle.schedule=none")).train()
        first[name] = metrics(tmp_path / name)[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert first["checkpointing"]["update/grad_norm"] == pytest.approx(first["plain"]["update/grad_norm"], rel=1e-5)
    assert first["checkpointing"]["rollout/sampler_logprob_gap"] < 1e-6
    assert first["bfloat16"]["update/grad_norm"] == pytest.approx(first["plain"]["update/grad_norm"], rel=0.3)
    assert 1e-6 < first["bfloat16"]["rollout/sampler_logprob_gap"] < 0.05
    assert first["bfloat16"]["update/kl"] == pytest.approx(0.0, abs=1e-6)  # the reference has the policy's numerics
    # Steps of 5e-7 need float32 to resume from; what is published is in the type that was asked for.
    kept = load_file(tmp_path / "bfloat16" / "checkpoints" / "step-000001" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path / "bfloat16").values()} == {torch.bfloat16}
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "bfloat16" / "model", dtype="auto")
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}
    assert "float32" not in (tmp_path / "bfloat16" / "model" / "config.json").read_text()


def test_evaluations_are_before_after_and_every_so_many_steps(tmp_path):
    seen = []

    def evaluate(engine, processor, verifiers, progress):
        seen.append(trainer.step)
        return {"figure": {"value": trainer.step / 10, "low": 0.0, "high": 1.0, "n": 5}}

    config = make_config(tmp_path / "run", *SMALL, "--steps=5", "--evaluation.every=2")
    trainer = load_trainer(config, evaluate=evaluate)
    trainer.train()
    assert seen == [0, 2, 4, 5]
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["results"]["figure"]["value"]) for line in lines] == [(s, s / 10) for s in seen]


def test_schedules_sample_what_they_say(tmp_path, monkeypatch):
    kinds = {}
    for schedule in ("none", "merged", "sequential"):
        trainer = load_trainer(make_config(tmp_path / schedule, f"--recycle.schedule={schedule}", "--steps=2"))
        calls = []

        def generate(prompts, *args, calls=calls, engine=trainer.engine, **kwargs):
            calls.append([prompt.record.kind for prompt in prompts])
            return type(engine).generate(engine, prompts, *args, **kwargs)

        monkeypatch.setattr(trainer.engine, "generate", generate)
        trainer.train()
        kinds[schedule] = [sorted(set(call)) for call in calls]
    assert kinds["none"] == [["problem"], ["problem"]]
    assert kinds["merged"][0] == ["problem"]  # nothing is waiting yet
    assert "problem" in kinds["merged"][1]
    assert "reflection" in kinds["merged"][1]
    assert len(kinds["merged"]) == 2
    assert [call == ["problem"] for call in kinds["sequential"]] == [True, False, True, False]
    assert all("problem" not in call for call in kinds["sequential"][1::2])


def test_the_learning_rate_counts_optimizer_updates(tmp_path):
    overrides = ("--steps=4", "--optimizer.schedule=linear", "--optimizer.updates_per_batch=2", "--optimizer.lr=1e-4")
    trainer = load_trainer(make_config(tmp_path / "run", *overrides, "--recycle.schedule=none"))
    trainer.train()
    # The mean of a step's two rates: 8 updates from 1e-4 down to 1e-4/8.
    expected = [(2 * 8 - 4 * step - 1) / 16 * 1e-4 for step in range(4)]
    assert [line["update/lr"] for line in metrics(tmp_path / "run")] == pytest.approx(expected)


def test_phases_and_parts_that_are_empty_do_not_delay_the_learning_rate(tmp_path, monkeypatch):
    curve = ("--optimizer.schedule=cosine", "--optimizer.min_lr_ratio=0.1", "--optimizer.updates_per_batch=2")
    # At most one recycled prompt, none in every other step: of four updates that are planned one or two are left out.
    scarce = ("--recycle.schedule=sequential", "--recycle.max_judge=1", "--recycle.max_reflection=0")
    scarce += ("--recycle.pointwise=one_per_group",)
    trainer = load_trainer(make_config(tmp_path / "run", *curve, *scarce, "--steps=4"))
    rates, step, take = {}, trainer.updater.optimizer.step, trainer.feed.next

    def alternating(phase):
        prompts = take(phase)
        return [] if phase == "recycled" and trainer.step % 2 else prompts

    def watched(*args):
        rates.setdefault(trainer.step, []).append({group["lr"] for group in trainer.updater.optimizer.param_groups})
        return step(*args)

    monkeypatch.setattr(trainer.feed, "next", alternating)
    monkeypatch.setattr(trainer.updater.optimizer, "step", watched)
    trainer.train()
    plan = [1e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2) for i in range(16)]
    made = [[rate for both_groups in rates[i] for rate in both_groups] for i in range(4)]
    assert made == [pytest.approx(plan[4 * i :][:n]) for i, n in enumerate((3, 2, 3, 2))]


def test_dynamic_sampling_replaces_groups_without_variance(tmp_path, monkeypatch):
    rounds = "--objective.refill_rounds={problem: 3}"
    settings = (rounds, "--rollout.n=2", "--recycle.max_judge=50", "--recycle.max_reflection=50", "--steps=4")
    trainer = load_trainer(make_config(tmp_path / "run", *settings))
    sizes, trained, told = [], [], []
    sample, make_batches = trainer.collector.sample_and_verify, trainer.make_batches

    def counted(prompts, *, seed):
        sizes.append(len(prompts))
        return sample(prompts, seed=seed)

    def watched(scored, advantages, *, seed):
        trained.append([group for _, group in scored if group.record.kind == "problem"])
        return make_batches(scored, advantages, seed=seed)

    class Listener(Sink):
        def on_groups(self, step, scored):
            told.append([group for _, group in scored])

    monkeypatch.setattr(trainer.collector, "sample_and_verify", counted)
    monkeypatch.setattr(trainer, "make_batches", watched)
    trainer.sinks.append(Listener())
    trainer.train()
    assert all(len(groups) == 4 for groups in trained)
    flat_at_first = [line["problem/zero_variance"] for line in metrics(tmp_path / "run")]
    flat_trained = sum(group.zero_variance for groups in trained for group in groups) / 16
    assert len(sizes) > 4, "no group was refilled"
    assert len(sizes) <= 4 * (1 + 3)
    assert flat_trained < sum(flat_at_first) / 4
    # All that was sampled is told and recycled, also what is not trained on.
    assert sum(map(len, told)) == sum(sizes)
    assert any(len(all_of) > 4 for all_of in told)
    parents = {group.record.origin.parent_id for groups in told for group in groups if group.record.kind != "problem"}
    kept = {group.record.id for groups in trained for group in groups}
    replaced = {g.record.id for groups in told for g in groups if g.record.kind == "problem"} - kept
    assert parents & replaced, "nothing was recycled from the groups that were replaced"


def test_rows_that_share_an_id_are_told_apart_from_sampling_to_publishing(tmp_path):
    rows = [{"id": "same", "question": f"Which is larger, {i} or 5?", "answer": str(max(i, 5))} for i in range(16)]
    recipe = write_rows(
        tmp_path, rows, verifier="number", columns={"question": "question", "answer": "answer", "id": "id"}
    )
    settings = (f"--data.recipes=[{recipe}]", "--data.prompts_per_step=8", "--checkpoint.every=2", "--steps=4")
    load_trainer(make_config(tmp_path / "whole", *settings)).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    assert max(line["rollout/sampler_logprob_gap"] for line in metrics(tmp_path / "whole")) <= 1e-6

    # Resumed from half way, it asks the same rows by the same names.
    (tmp_path / "cut" / "checkpoints" / "latest").write_text("step-000002")
    load_trainer(make_config(tmp_path / "cut", *settings), resume="auto").train()
    assert judgments(tmp_path / "cut") == judgments(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")

    own = {"mine/train/same", *(f"mine/train/same#{i}" for i in range(1, 16))}
    stored = [row for rows in judgments(tmp_path / "whole").values() for row in rows]
    asked = [row for row in stored if row["parent_id"] == row["id"].removesuffix(f"@{row['step']}")]
    assert {row["parent_id"] for row in asked} == own
    question = {row["parent_id"]: row["question"] for row in asked}
    assert len(set(question.values())) == 16
    recycled = [row for row in stored if row not in asked]
    assert recycled, "nothing was recycled"
    assert all(row["question"] == question[row["parent_id"]] for row in recycled)
    assert len({row["id"] for row in stored}) == len(stored)

    # Offline, each judgment is made of its own row's rollouts, and `show` prints it below its own group.
    counts = recycle_rollouts(
        tmp_path / "whole", tmp_path / "again", templater=Templater.load(), config=RecycleConfig(), seed=0
    )
    assert counts["pointwise"] + counts["pairwise"] + counts["reflection"] > 0
    again = [row for shard in find_shards(tmp_path / "again") for row in read_shard(shard.path)]
    assert all(row["question"] == question[row["parent_id"]] for row in again)
    shown = list(show_groups(tmp_path / "whole", step=1, kind="problem"))
    assert len({text.split(" · ")[2] for text in shown}) == 8


def test_the_exported_model_loads_with_plain_transformers_and_sees(tmp_path, processor):
    load_trainer(make_config(tmp_path / "run", "--steps=1")).train()
    folder = tmp_path / "run" / "model"
    model, hf_processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    from spark_vl.data.images import load_image
    from tests.conftest import make_image

    chat = hf_processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is larger?"}]}],
        add_generation_prompt=True,
    )
    inputs = hf_processor(text=[chat], images=[load_image(make_image(1))], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert not list(folder.glob("*.bin"))


def test_trackers_get_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    load_trainer(make_config(tmp_path / "run", "--steps=2", "--logging.trackers=[tensorboard]")).train()
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.*") if path.parent.name == "tensorboard"}
    accumulator = EventAccumulator(str(events)).Reload()
    tracked = [event.value for event in accumulator.Scalars("problem/reward")]
    assert tracked == pytest.approx([line["problem/reward"] for line in metrics(tmp_path / "run")])


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    config = make_config(tmp_path / "run", *SMALL, "--steps=1")
    load_trainer(config).train()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume auto"):
        load_trainer(config)


def test_no_half_written_checkpoint_is_resumed_from(tmp_path):
    load_trainer(
        make_config(tmp_path / "run", *SMALL, "--steps=3", "--checkpoint.every=1", "--checkpoint.save_total_limit=2")
    ).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000002", "step-000003"]
    (checkpoints / ".step-000004.partial").mkdir()
    assert find_checkpoint(checkpoints, "auto").name == "step-000003"
    assert find_checkpoint(checkpoints, "none") is None
    assert find_checkpoint(tmp_path / "nothing", "auto") is None
    with pytest.raises(CheckpointError, match=r"partial: is not a checkpoint .*; allowed: auto, none, or "):
        find_checkpoint(checkpoints, str(checkpoints / ".step-000004.partial"))


def test_bad_rows_are_quarantined_and_too_many_stop_the_run(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    from tests.conftest import make_image

    (images / "good.png").write_bytes(make_image(1).data)
    (images / "bad.png").write_bytes(b"no image")
    rows = [{"question": "Which is larger?", "answer": "5", "image": "good.png"} for _ in range(30)]
    rows[7]["image"] = "bad.png"
    rows[11]["image"] = "../../etc/passwd"
    (images / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\ndescription: test rows\nlicense: none\n"
        f"source: {{jsonl: {images}}}\nsplits: {{train: train.jsonl}}\n"
        "columns: {question: question, answer: answer, images: image}\nverifier: number\n"
    )
    run = ("--steps=7", f"--data.recipes=[{recipe}]", "--recycle.schedule=none")
    trainer = load_trainer(make_config(tmp_path / "run", *run, "--data.max_quarantined_fraction=0.2"))
    trainer.train()
    bad = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(bad) == 2
    assert metrics(tmp_path / "run")[-1]["data/quarantined"] == 2
    with pytest.raises(TooManyBadRowsError, match=r"quarantine\.jsonl"):
        load_trainer(make_config(tmp_path / "strict", *run, "--data.max_quarantined_fraction=0")).train()


def write_rows(folder: Path, rows: list[dict], **fields) -> Path:
    """A recipe with those rows."""
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "mine", "description": "test rows", "license": "none", "source": {"jsonl": str(folder / "rows")},
        "splits": {"train": "train.jsonl"}, "columns": {"question": "question", "answer": "answer"},
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe | fields))
    return folder / "mine.yaml"


def test_a_run_without_any_row_that_can_be_used_ends(tmp_path):
    recipe = write_rows(tmp_path, [{"question": "", "answer": "5"}] * 5, verifier="number")
    settings = (f"--data.recipes=[{recipe}]", "--data.max_quarantined_fraction=1", "--steps=1")
    with pytest.raises(TooManyBadRowsError, match=r"none of 6 rows can be used: .*'question' is empty"):
        load_trainer(make_config(tmp_path / "run", *settings)).train()


def test_rows_whose_verifier_fails_on_every_completion_are_bad(tmp_path):
    rows = [{"question": "Which is larger, 3 or 5?", "answer": "blue" if i % 2 else "5"} for i in range(8)]
    recipe = write_rows(tmp_path, rows, verifier="number")
    settings = (f"--data.recipes=[{recipe}]", "--data.max_quarantined_fraction=0.2", "--steps=20")
    with pytest.raises(TooManyBadRowsError, match=r"number verifier fails on every completion: .*gold 'blue' is not"):
        load_trainer(make_config(tmp_path / "run", *settings)).train()
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in listed} <= {f"mine/train/#{i}" for i in (1, 3, 5, 7)}


OWN = {"lucky": "return len(completion) % 2", "broken": "raise KeyError('my [bug]\\n' + record.gold)"}


def test_a_verifier_of_ones_own_is_found_again_on_resume(tmp_path):
    """What waits in the checkpoint names it, too."""
    rows = [{"question": f"Which is larger, 3 or {i}?", "answer": i} for i in range(4, 8)]
    recipe = write_rows(tmp_path, rows, verifier="./own.py:lucky")
    (tmp_path / "own.py").write_text(f"def lucky(completion, record): {OWN['lucky']}")
    settings = (f"--data.recipes=[{recipe}]", "--recycle.recycle_truncated=true")
    for resume, steps in (("none", 1), ("auto", 2)):
        config = make_config(tmp_path / "run", *settings, f"--steps={steps}")
        assert load_trainer(config, resume=resume, allow_config_change=True).train()
    first, second = metrics(tmp_path / "run")
    assert 0 < first["problem/score"] < 1
    assert second["reflection/failed"] == 0
    assert first["data/quarantined"] == second["data/quarantined"] == 0


def test_a_verifier_that_always_fails_is_said_at_once_and_in_each_steps_line(tmp_path, capsys):
    rows = [{"question": f"Which is larger, 3 or {i}?", "answer": i} for i in range(4, 8)]
    recipe = write_rows(tmp_path, rows, verifier="./own.py:broken")
    (tmp_path / "own.py").write_text(f"def broken(completion, record): {OWN['broken']}")
    settings = (
        f"--data.recipes=[{recipe}]",
        "--steps=2",
        "--data.max_quarantined_fraction=1",
        "--recycle.schedule=none",
    )
    load_trainer(make_config(tmp_path / "run", *settings)).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    n = int(metrics(tmp_path / "run")[0]["rollout/completions"])
    why = r"KeyError: .*my \[bug\].*"
    assert len(said) == 3
    assert re.fullmatch(
        f"step 1: the verifier own.py:broken failed on all {n} completions; the first: error: {why}", said[0]
    )
    bad = r"quarantined: \d, the first: mine/train/#\d: the own.py:broken verifier fails on every completion: " + why
    for step, line in enumerate(said[1:], 1):
        assert re.fullmatch(rf"step {step}/2 .* s  {bad}", line)
