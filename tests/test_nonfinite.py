"""An update that is not finite is skipped; several in a row stop the run and leave the batch behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spark_vl.policy.update import NonFiniteUpdateError
from spark_vl.run.codec import group_from_json
from spark_vl.run.jsonl import read_lines
from spark_vl.setup import load_trainer
from spark_vl.trainer import Trainer
from tests.test_trainer import make_config, metrics

LINEAR = ("--optimizer.schedule=linear", "--checkpoint.every=1", "--checkpoint.save_total_limit=9")


def compute_nan(trainer: Trainer, when: Callable[[], bool]) -> None:
    """Let the last layer give NaN in updates `when` that is true."""
    updating = []
    update = trainer.updater.update

    def watched(*args, **kwargs):
        updating.append(True)
        update(*args, **kwargs)
        updating.clear()

    def spoil(module, args, output):
        return output * float("nan") if updating and when() else output

    trainer.updater.update = watched
    policy = trainer.accelerator.unwrap_model(trainer.updater.policy)
    policy.model.model.language_model.norm.register_forward_hook(spoil)


def spoil_gradient(trainer: Trainer, when: Callable[[], bool]) -> None:
    """Let one gradient be infinite `when` that is true; the loss is finite."""
    parameter = next(iter(trainer.updater.policy.parameters()))
    parameter.register_hook(lambda gradient: gradient / 0 if when() else gradient)


def assert_second_update_was_skipped(folder: Path) -> None:
    """Of three, under a linear schedule."""
    lines = metrics(folder)
    assert [line["update/skipped"] for line in lines] == [0, 1, 0]
    rates = [line["update/lr"] for line in lines]
    assert rates == pytest.approx([rates[0], rates[0] * 2 / 3, rates[0] / 3])  # the plan of the run goes on
    saved = [
        load_file(folder / "checkpoints" / f"step-00000{step}" / "model" / "model.safetensors") for step in (1, 2, 3)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    assert all(tensor.isfinite().all() for tensor in saved[2].values())


@pytest.mark.parametrize("spoil", [compute_nan, spoil_gradient])
def test_an_update_that_is_not_finite_is_skipped(tmp_path, spoil):
    trainer = load_trainer(make_config(tmp_path / "run", "--steps=3", *LINEAR))
    spoil(trainer, lambda: trainer.step == 1)
    assert trainer.train()
    assert_second_update_was_skipped(tmp_path / "run")
    first, second = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-00000{step}" / "optimizer.safetensors") for step in (1, 2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # nor did AdamW see it
    assert trainer.updater.skipped_in_a_row == 0


def test_several_in_a_row_stop_the_run_and_leave_the_batch(tmp_path):
    trainer = load_trainer(make_config(tmp_path / "run", *LINEAR, "--optimizer.max_skipped_updates=3"))
    compute_nan(trainer, lambda: trainer.step >= 1)
    tried = []
    make_batches = trainer.make_batches
    trainer.make_batches = lambda scored, *args, **kwargs: (
        tried.append([group for _, group in scored]),
        make_batches(scored, *args, **kwargs),
    )[1]
    with pytest.raises(NonFiniteUpdateError, match=r"3 updates in a row.*step 4 is in .*step-000004\.rank0\.jsonl"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000003"
    file = tmp_path / "run" / "nonfinite" / "step-000004.rank0.jsonl"
    left = {group.record.id: group for group in map(group_from_json, read_lines(file))}
    assert left == {group.record.id: group for group in tried[-1]}


def test_a_resumed_run_goes_on_counting(tmp_path):
    """Otherwise a run that is restarted whenever it fails would skip for ever."""

    def stop_after_two_steps(*args, **kwargs):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    config = make_config(tmp_path / "run", *LINEAR, "--evaluation.every=2")
    trainer = load_trainer(config, evaluate=stop_after_two_steps)
    compute_nan(trainer, lambda: True)
    assert not trainer.train()
    trainer = load_trainer(config, resume="auto")
    compute_nan(trainer, lambda: True)
    with pytest.raises(NonFiniteUpdateError, match=r"3 updates in a row.*step 3 is in"):
        trainer.train()
