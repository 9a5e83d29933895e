"""A policy of several processes that judges itself with an average of its weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import NO_EVALUATION, launch, metrics

AVERAGED = (
    "--config=scripts/configs/digits/self_judge.yaml",
    NO_EVALUATION,
    "--steps=2",
    "--data.prompts_per_step=8",
    "--rollout.n=4",
    "--checkpoint.every=1",
    "--checkpoint.save_total_limit=2",
    "--self_judge.problems=8",
    "--self_judge.every=1",
    "--self_judge.min_accuracy=0.1",
    "--self_judge.votes=1",
    "--self_judge.average=0.75",
)


@pytest.mark.distributed
def test_replicas_keep_the_average_of_their_weights(tmp_path):
    ended = launch(2, "ddp", *AVERAGED, f"--output_dir={tmp_path}")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert sum(line["self_judge/groups"] for line in metrics(tmp_path)) > 0
    folders = [tmp_path / "checkpoints" / f"step-00000{step}" for step in (1, 2)]
    # The optimizer numbers parameters in another order than the weights are saved in: found by shape and value.
    first, last = (load_file(folder / "optimizer.safetensors") for folder in folders)
    was, now = (load_file(folder / "model.safetensors").values() for folder in folders)
    expected = [a.lerp(b, 0.25) for a, b in zip(was, now, strict=True)]
    averages = [tensor for name, tensor in last.items() if name.endswith(".average")]
    assert len(averages) == len([name for name in last if name.endswith(".exp_avg")]) == len(first) // 4
    for average in averages:
        alike = [each for each in expected if each.shape == average.shape]
        assert min((each - average).abs().max() for each in alike) < 1e-6
    assert not all(torch.equal(a, b) for a, b in zip(was, now, strict=True))


@pytest.mark.distributed
def test_sharded_weights_have_no_average(tmp_path):
    ended = launch(2, "fsdp2", *AVERAGED, f"--output_dir={tmp_path}")
    assert ended.returncode != 0
    assert "self_judge.average: is 0.75, but weights under fsdp2 are sharded" in ended.stdout
