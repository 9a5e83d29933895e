"""A run's stored groups, printed for a person: everything that was sampled of a step, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spark_vl.data.images import encode_image
from spark_vl.data.judgments import config_of
from spark_vl.records import RecycledRecord, Rollout, RolloutGroup, Verdict, plain_text
from spark_vl.run.shards import find_shards
from spark_vl.show import show_groups
from tests.command import Command, command
from tests.groups import UNCAPPED, a_run, make_writer, picture, problem, recycled, sampled, write

RUN = a_run(steps=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`RUN` as two processes store it, in files of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    writers = [make_writer(folder / "judgments", rank=rank, max_bytes=10_000) for rank in (0, 1)]
    for step, groups in RUN.items():
        for i, group in enumerate(groups):
            writers[i % 2].add(step, group)
    for writer in writers:
        writer.flush()
    return folder


def ids(texts: list[str]) -> list[str]:
    return [text.split(" · ")[2] for text in texts]


def test_a_group_by_hand(tmp_path: Path):
    record = problem("a", "Look: ", picture(1), " How many?", gold="5")
    verdicts = (Verdict(1.0, "5"), Verdict(0.25, "6"), Verdict(0.0, None, "unparsable"))
    texts = (r"Five. \boxed{5}", "Six.\nSo \\boxed{6}", "It is")
    rollouts = tuple(
        Rollout((1,), (-1.0,), t, reason) for t, reason in zip(texts, ("stop", "stop", "length"), strict=True)
    )
    group = RolloutGroup(record, rollouts, verdicts)
    [judge] = recycled([sampled(record, (1,))], step=3, config=replace(UNCAPPED, pointwise="one_per_group")).judge
    said = [Verdict(1.0, judge.gold), Verdict(0.0, "Other"), Verdict(1.0, judge.gold), Verdict(0.0, None, "unparsable")]
    judged = RolloutGroup(judge, rollouts[:1] * 4, tuple(said))
    write(tmp_path / "judgments", {3: [group], 4: [judged]})
    [text] = show_groups(tmp_path, step=3)
    prompt = plain_text(record.messages[-1].content)
    assert prompt.startswith("Look: <image> How many?")
    assert text == (
        "══ step 3 · problem · r/train/a · recipe r\n"
        "system: Be exact.\n"
        f"user: {prompt}\n"
        "gold: 5 (verifier number)\n"
        "── 1: score 1 · answer 5 · ok · finished by stop\n"
        "Five. \\boxed{5}\n"
        "── 2: score 0.25 · answer 6 · ok · finished by stop\n"
        "Six.\nSo \\boxed{6}\n"
        "── 3: score 0 · no answer · unparsable · finished by length\n"
        "It is\n"
        f"recycled: pointwise · template {judge.origin.template} · gold {judge.gold} · "
        f"in step 4 the model said {judge.gold} × 2, Other × 1, no answer × 1; mean score 0.50"
    )
    [text] = show_groups(tmp_path)
    assert text.startswith(
        f"══ step 4 · pointwise · r/train/a@3#pointwise_correct · recipe r · template {judge.origin.template}"
    )


@pytest.mark.parametrize("step", [None, *RUN])
def test_every_group_of_a_step_is_shown_problems_first(run: Path, step: int | None):
    shown = list(show_groups(run, step=step))
    groups = RUN[step or max(RUN)]
    assert sorted(ids(shown)) == sorted(group.record.id for group in groups)
    kinds = [text.split(" · ")[1] for text in shown]
    assert kinds == sorted(kinds, key=("problem", "pointwise", "pairwise", "reflection").index)
    for group in groups:
        [text] = (text for text in shown if f" · {group.record.id} · " in text)
        assert all(rollout.text in text for rollout in group.rollouts)


def test_what_was_recycled_stands_with_the_group_that_it_quotes(run: Path):
    found = 0
    for step in range(1, max(RUN)):
        later = [group for group in RUN[step + 1] if isinstance(group.record, RecycledRecord)]
        for text in show_groups(run, step=step, kind="problem"):
            parent = ids([text])[0]
            made = {group.record for group in later if group.record.parent_id == parent}
            lines = [line for line in text.splitlines() if line.startswith("recycled: ")]
            assert sorted(line.split(" · ")[:3] for line in lines) == sorted(
                [f"recycled: {r.kind}", f"template {r.origin.template}", f"gold {r.gold}"] for r in made
            )
            assert all(f"in step {step + 1} the model said " in line for line in lines)
            found += len(lines)
    assert found == sum(isinstance(g.record, RecycledRecord) for step, of in RUN.items() if step > 1 for g in of)


def test_kinds_wrong_groups_and_a_limit(run: Path):
    step = 4
    of_kind = [group.record.id for group in RUN[step] if group.record.kind == "reflection"]
    assert sorted(ids(list(show_groups(run, step=step, kind="reflection")))) == sorted(of_kind) != []
    everything = list(show_groups(run, step=step))
    assert list(show_groups(run, step=step, limit=len(everything))) == everything
    *first, note = show_groups(run, step=step, limit=2)
    assert (first, note) == (everything[:2], "Stopped after 2; --limit 0 shows all.")


def test_only_groups_with_a_wrong_completion(tmp_path: Path):
    scores = {"right": (1, 1), "mixed": (1, 0), "partial": (1, 0.5), "wrong": (0, 0)}
    write(tmp_path, {1: [sampled(problem(name), of) for name, of in scores.items()], 2: [sampled(problem("x"), (1,))]})
    wrong = [f"r/train/{name}" for name in scores if name != "right"]
    assert sorted(ids(list(show_groups(tmp_path, step=1, wrong=True)))) == sorted(wrong)
    assert list(show_groups(tmp_path, wrong=True)) == ["Step 2: none of the groups has a wrong completion (1 read)."]


def test_images_are_written_once_and_named(tmp_path: Path):
    png, jpeg = picture(1), picture(2, "JPEG")
    groups = [sampled(problem("a", png, jpeg, "Which?"), (1, 0)), sampled(problem("b", png, "What?"), (1, 0))]
    write(tmp_path / "run", {1: groups})
    shown = list(show_groups(tmp_path / "run", images=tmp_path / "images"))
    paths = {
        ids([text])[0]: [line.removeprefix("image: ") for line in text.splitlines() if line.startswith("image: ")]
        for text in shown
    }
    assert paths["r/train/a"][0] == paths["r/train/b"][0]
    for id, refs in (("r/train/a", (png, jpeg)), ("r/train/b", (png,))):
        assert [Path(path).read_bytes() for path in paths[id]] == [encode_image(ref) for ref in refs]
    assert sorted(path.suffix for path in (tmp_path / "images").iterdir()) == [".jpg", ".png"]
    assert "image: " not in "".join(show_groups(tmp_path / "run"))


def test_a_terminal_is_not_told_what_to_do(tmp_path: Path):
    group = sampled(problem("a"), (1,))
    rollout = replace(group.rollouts[0], text="one\ttwo\nthree \x1b[2J\x07\x9b31m\r")
    write(tmp_path, {1: [replace(group, rollouts=(rollout,))]})
    [text] = show_groups(tmp_path)
    assert "one\ttwo\nthree \\x1b[2J\\x07\\x9b31m\\r" in text
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\r"}


def test_judgments_without_completions_are_shown(tmp_path: Path):
    """As `spark-vl recycle` writes them."""
    judge = recycled([sampled(problem("a"), (1, 0))], step=1).judge[0]
    write(tmp_path, {1: [RolloutGroup(judge, ())]})
    [text] = show_groups(tmp_path)
    assert f"gold: {judge.gold} (verifier judgment)" in text
    assert "──" not in text


def test_what_is_not_there_is_said(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no groups; a run stores them unless logging\.judgments is off"):
        list(show_groups(tmp_path))
    with pytest.raises(ValueError, match="holds no groups of step 9; it holds steps 1 to 5"):
        list(show_groups(run, step=9))
    with pytest.raises(ValueError, match="holds no groups of kind pairwise of step 1; it holds steps 2 to"):
        list(show_groups(run, step=1, kind="pairwise"))
    write(tmp_path, {step: [sampled(problem("a"), (1,))] for step in (2, 6)})
    with pytest.raises(ValueError, match="holds no groups of step 4; it holds steps 2 to 6"):
        list(show_groups(tmp_path, step=4))
    path = find_shards(tmp_path)[0].path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{path.name}: cannot be read as parquet"):
        list(show_groups(tmp_path))


@pytest.fixture
def spark_vl() -> Iterator[Command]:
    with command() as started:
        yield started


def test_the_command(spark_vl: Command, run: Path, tmp_path: Path):
    status, output, _, loaded = spark_vl(tmp_path, "show", str(run), "--step=3", "--kind=problem", "--limit=2")
    assert (status, loaded) == (0, {"datasets"})
    assert output.count("══ step 3 · problem · ") == 2
    assert output.endswith("--limit 0 shows all.\n\n")
    status, _, error, _ = spark_vl(tmp_path, "show", str(run), "--step=77")
    assert (status, error.splitlines()[0]) == (
        2,
        f"spark-vl show: error: run: {run}: holds no groups of step 77; it holds steps 1 to 5",
    )
    assert spark_vl(tmp_path, "show", str(run), "--kind=problems")[0] == 2
    assert "--limit: is -1; 0 and more are allowed" in spark_vl(tmp_path, "show", str(run), "--limit=-1")[2]


def test_the_command_ends_with_its_reader(run: Path):
    line = f"{sys.executable} -m spark_vl show {run} --limit 0 | head -n 1"
    piped = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert piped.stdout.startswith("══ step 5")
    assert piped.stderr == ""


def test_the_run_stores_all_kinds():
    assert {config_of(group.record) for of in RUN.values() for group in of} == {
        *("rollouts", "pointwise", "pairwise", "reflection")
    }
