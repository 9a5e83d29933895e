"""The model card: valid metadata, only the run's own numbers, snippets that run, nothing of the author's machine."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from spark_vl.config import EvalConfig, EvaluationConfig, ModelConfig, RolloutConfig
from spark_vl.data.images import load_image
from spark_vl.evaluation import evaluate_checkpoint
from spark_vl.hub.benchmarks import read_benchmarks
from spark_vl.hub.cards import write_eval_results, write_model_card
from spark_vl.hub.release import ReleaseError
from spark_vl.hub.run import find_model
from tests.conftest import make_image
from tests.test_trainer import metrics


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


def write_card(checkpoint: Path, path: Path, **settings) -> ModelCard:
    write_model_card(find_model(checkpoint), path, model_id="org/tiny", name="tiny", **settings)
    return ModelCard.load(path)


def change(run: Path, file: str, edit) -> None:
    """Apply `edit` to the YAML or JSON in a file of the run."""
    value = yaml.safe_load((run / file).read_text())
    edit(value)
    (run / file).write_text(json.dumps(value))


def test_metadata_is_what_the_hub_reads(finished_run):
    data = ModelCard.load(finished_run / "model" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.base_model is None, "the tiny checkpoint is a folder, no model of the Hub"
    assert data.datasets is None
    results = {result.metric_name: result for result in data.eval_results}
    summary = json.loads((finished_run / "summary.json").read_text())
    assert set(results) == {"reasoning_greedy", "pointwise_greedy", "pairwise_greedy"}
    for name, result in results.items():
        assert (result.dataset_name, result.dataset_split) == ("digits", "test")
        assert result.metric_value == pytest.approx(100 * summary["after"][name], abs=0.005)


def test_a_base_model_and_datasets_of_the_hub_are_named(run, tmp_path):
    base = {"base": "Qwen/Qwen2.5-VL-7B-Instruct", "base_commit": "b" * 40}
    change(run, "model/spark_training.json", lambda facts: facts.update(base))
    dataset = {"id": "org/problems", "config": None, "revision": "a" * 40}
    change(run, "recipes.json", lambda facts: facts["digits"].update(dataset=dataset))
    card = write_card(run, tmp_path / "README.md", base_license={"license": "apache-2.0"})
    assert (card.data.base_model, card.data.base_model_relation) == ("Qwen/Qwen2.5-VL-7B-Instruct", "finetune")
    assert (card.data.datasets, card.data.license) == (["org/problems"], "apache-2.0")
    assert "https://huggingface.co/datasets/org/problems)): CC-BY-4.0" in card.text
    assert "Qwen2.5-VL-7B-Instruct): apache-2.0" in card.text

    write_eval_results(find_model(run), tmp_path / ".eval_results")
    entries = yaml.safe_load((tmp_path / ".eval_results" / "digits.yaml").read_text())
    [entry] = parse_eval_result_entries(entries)
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("org/problems", "default", "a" * 40)
    summary = json.loads((run / "summary.json").read_text())
    assert entry.value == pytest.approx(100 * summary["after"]["reasoning_greedy"], abs=0.005)


def test_a_relative_folder_is_no_model_of_the_hub(run, tmp_path):
    change(run, "config.yaml", lambda config: config["model"].update(path="runs/first"))
    change(run, "model/spark_training.json", lambda facts: facts.update(base="first"))
    card = write_card(run, tmp_path / "README.md")
    assert card.data.base_model is None
    assert "huggingface.co/runs" not in card.text
    assert "starting from `first`" in card.text


def test_no_leaderboard_hears_of_data_that_are_not_on_the_hub(finished_run, tmp_path):
    write_eval_results(find_model(finished_run), tmp_path / ".eval_results")
    assert not (tmp_path / ".eval_results").exists()


def test_every_number_of_the_evaluation_is_the_runs_own(finished_run):
    card = (finished_run / "model" / "README.md").read_text()
    summary = json.loads((finished_run / "summary.json").read_text())
    rows = dict(re.findall(r"^\| (\w+) \| (\d+ \| .*) \|$", card, flags=re.MULTILINE))
    assert rows.keys() == summary["after"].keys()
    for name, row in rows.items():
        n, before, after = row.split(" | ")
        assert int(n) == summary["n"][name]
        for side, shown in (("before", before), ("after", after)):
            value, low, high = map(float, re.fullmatch(r"([\d.]+) \((\d+)–(\d+)\)", shown).groups())
            assert value == pytest.approx(100 * summary[side][name], abs=0.051)
            assert [low, high] == pytest.approx([100 * x for x in summary["intervals"][side][name]], abs=0.51)


def test_every_number_of_the_training_is_the_runs_own(finished_run):
    card = (finished_run / "model" / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z][\w ,]*) \| (.*) \|$", card, flags=re.MULTILINE))
    lines = metrics(finished_run)

    def total(name: str) -> int:
        return sum(line.get(name, 0) for line in lines)

    assert rows["steps"] == "4" == str(len(lines))
    assert rows["sampled"] == f"{total('rollout/completions')} completions, {total('rollout/tokens'):,} tokens"
    assert rows["recycled, pairwise"] == str(total("recycle/pairwise"))
    assert rows["recycled, pointwise, right answer"] == str(total("recycle/pointwise_correct"))
    assert rows["recycled, reflection on a wrong answer"] == str(total("recycle/reflection_incorrect"))
    # An independent count: what the judgments that were written down say was sampled and recycled. The prompts of the
    # last step wait for one that does not come.
    shards = (finished_run / "judgments").glob("*/*.parquet")
    rewards = [row for shard in shards for row in pq.read_table(shard, columns=["reward"])["reward"].to_pylist()]
    assert sum(map(len, rewards)) == total("rollout/completions")
    environment = json.loads((finished_run / "environment.jsonl").read_text())
    assert rows["hardware"].startswith(f"1 × {environment['device']}, single")
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1])
    own = yaml.safe_load((finished_run / "config.yaml").read_text())
    del own["publish"]
    assert config["optimizer"] == own["optimizer"]
    assert config.keys() == own.keys()
    assert "`digits`: CC-BY-4.0" in card


def test_paths_of_the_authors_machine_are_cut_to_their_last_part(run, tmp_path):
    change(run, "config.yaml", lambda config: config["prompts"].update(templates=["/srv/secret/mine.yaml", "~/b.yaml"]))
    text = write_card(run, tmp_path / "README.md").content
    assert "mine.yaml" in text
    assert "b.yaml" in text
    for private in ("/srv", str(run.parent), str(Path.home()) + "/", "~/"):
        assert private not in text


def test_folders_of_recipes_and_of_the_base_model_are_cut_too(run, tmp_path):
    local = "judgments?repo=/scratch/alice/secret-client/judged&kind=pairwise"
    hub = "judgments?repo=org/judged&kind=pairwise&revision=v1"
    change(run, "config.yaml", lambda config: config["data"].update(recipes=[local, hub, "../alice/mine.yaml"]))
    change(run, "config.yaml", lambda config: config["model"].update(path="../../alice/acme-merger/model"))
    facts = {"dataset": None, "license": "MIT", "description": "", "splits": {}}
    for name in (local, hub, "../alice/mine.yaml"):
        change(run, "recipes.json", lambda all, name=name: all.update({name: facts | {"name": "mine"}}))
    text = write_card(run, tmp_path / "README.md").content
    assert "judgments?repo=judged&kind=pairwise\n" in text
    assert f"{hub}\n" in text
    assert "- mine.yaml\n" in text
    for private in ("alice", "scratch", "secret", "acme", ".."):
        assert private not in text.split("## Training")[1].split("</details>")[0].replace("...", "")


def test_a_checkpoint_is_described_by_its_own_settings_and_changes_are_named(run, tmp_path):
    old = write_card(run / "checkpoints" / "step-000003", tmp_path / "README.md").text
    change(run, "config.yaml", lambda config: config["objective"].update(beta=0.77))
    environment = json.loads((run / "environment.jsonl").read_text())
    environment |= {"step": 3, "changed": ["objective.beta: 0.01 → 0.77", "model.path: '/srv/a/one' → '/srv/b/two'"]}
    with (run / "environment.jsonl").open("a") as lines:
        lines.write(json.dumps(environment) + "\n")
    assert write_card(run / "checkpoints" / "step-000003", tmp_path / "README.md").text == old
    last = write_card(run, tmp_path / "README.md").text
    assert "KL coefficient 0.77" in last
    assert "changed: `objective.beta: 0.01 → 0.77`, `model.path: 'one' → 'two'`" in last
    assert "changed" not in old


def test_a_run_that_was_killed_while_it_wrote_a_line_has_a_card(run, tmp_path):
    whole = write_card(run, tmp_path / "README.md").text
    for name in ("metrics.jsonl", "evaluations.jsonl", "environment.jsonl"):
        with (run / name).open("a") as lines:
            lines.write('{"step": 5, "loss"')
    assert write_card(run, tmp_path / "README.md").text == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.jsonl"])
def test_a_file_that_the_card_needs_and_is_not_there_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(ReleaseError, match=f"{name}: is missing, and the card is written from nothing else"):
        find_model(run)


def test_a_checkpoint_that_was_not_evaluated_says_so_and_knows_no_later_step(finished_run, tmp_path):
    card = write_card(finished_run / "checkpoints" / "step-000003", tmp_path / "README.md")
    assert "These weights (step 3) were not evaluated" in card.text
    assert card.data.eval_results is None
    rows = dict(re.findall(r"^\| ([a-z][\w ,]*) \| (.*) \|$", card.text, flags=re.MULTILINE))
    tokens = sum(line["rollout/tokens"] for line in metrics(finished_run)[:3])
    assert rows["steps"] == "3"
    assert f"{tokens:,} tokens" in rows["sampled"]


def test_a_run_that_recycled_nothing_is_not_called_a_judge(run, tmp_path):
    change(run, "config.yaml", lambda config: config["recycle"].update(schedule="none"))
    assert "judges" not in write_card(run, tmp_path / "README.md").text.split("## Use")[0]


@pytest.mark.parametrize("name", ["", "model", "checkpoints/step-000004", "checkpoints/latest"])
def test_a_model_is_found_by_any_of_its_names(finished_run, name):
    model = find_model(finished_run / name)
    assert (model.step, model.run) == (4, finished_run)
    assert (model.folder / "model.safetensors").is_file()


def test_what_is_no_model_of_a_run_is_refused(finished_run, tmp_path):
    with pytest.raises(ReleaseError, match="holds no trained model; allowed: the folder of a finished run"):
        find_model(tmp_path)
    shutil.copytree(finished_run / "model", tmp_path / "moved")
    with pytest.raises(ReleaseError, match=r"is in no run's folder .*config\.yaml and recipes\.json"):
        find_model(tmp_path / "moved")


def test_the_snippets_run(forked, finished_run, tmp_path):
    code = re.findall(r"```python\n(.*?)```", (finished_run / "model" / "README.md").read_text(), flags=re.DOTALL)
    assert len(code) == 3
    load_image(make_image(1)).save(tmp_path / "picture.png")
    done = forked.python(tmp_path, "-c", "".join(code))
    assert done.returncode == 0, done.stderr
    answer, verdict, reflection = done.stdout.strip().splitlines()
    assert answer.removeprefix("answer: ").strip()
    assert verdict in ("judged right: True", "judged right: False")
    assert reflection.removeprefix("after reflection: ").strip()


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory) -> Path:
    """The folder of an evaluation of the run's model on more problems than in the run."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = EvalConfig(
        model=ModelConfig(path=str(finished_run / "model"), dtype="float32", max_pixels=50176),
        rollout=RolloutConfig(max_new_tokens=4),
        evaluation=EvaluationConfig(
            recipes=["digits"], problems=9, samples=0, judging=False, reflection_rounds=0, repetition_penalty=1.05
        ),
    )
    evaluate_checkpoint(config, folder)
    return folder


def test_an_evaluation_outside_of_the_run_is_in_card_and_results(run, evaluated, tmp_path):
    evaluation = shutil.copytree(evaluated, tmp_path / "evaluation")
    dataset = {"id": "org/problems", "config": None, "revision": "a" * 40}
    for folder in (run, evaluation):
        change(folder, "recipes.json", lambda facts: facts["digits"].update(dataset=dataset))
    model = find_model(run)
    with pytest.raises(ReleaseError, match=r"is an evaluation of .*tiny-run/model, not of"):  # that of the run copied
        read_benchmarks(evaluation, model.folder)
    change(evaluation, "config.yaml", lambda config: config["model"].update(path=str(run / "model")))
    found = read_benchmarks(evaluation, model.folder)
    measured = json.loads((evaluation / "results.json").read_text())["reasoning_greedy"]
    [benchmark] = found
    assert (benchmark.result, benchmark.figure, benchmark.split) == (measured, "reasoning_greedy", "test")
    model = replace(model, benchmarks=found)
    write_eval_results(model, tmp_path / ".eval_results")
    [entry] = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "digits.yaml").read_text()))
    assert entry.value == pytest.approx(100 * measured["value"], abs=0.005)
    assert entry.notes.startswith("greedy, at most 4 new tokens, repetition penalty 1.05, 9 problems of split test")
    write_model_card(model, tmp_path / "README.md", model_id="org/tiny", name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert f"| digits | test | 9 | reasoning_greedy | {100 * measured['value']:.1f} (" in text
    with pytest.raises(ReleaseError, match="is not a finished evaluation"):
        read_benchmarks(run, model.folder)
