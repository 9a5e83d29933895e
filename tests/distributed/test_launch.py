"""What runs is what was asked for, or nothing runs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from spark_vl.distributed.launch import LaunchError, check_launch
from tests.distributed.launching import NO_EVALUATION, SMALL, Run, latest, launch, metrics

TWO_STEPS = (*SMALL, NO_EVALUATION, "--steps=2", "--checkpoint.every=0")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "only_its_own"),
    [
        ("ddp", "optimizer.safetensors"),
        ("fsdp2", "optimizer_0/__1_0.distcp"),
        ("zero2", "pytorch_model/mp_rank_00_model_states.pt"),
        ("zero3", "pytorch_model/zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_launch_files_start_two_processes_that_hold_the_weights_as_they_say(strategy, only_its_own, tmp_path):
    ended = launch(2, strategy, *TWO_STEPS, f"--output_dir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stdout
    checkpoint = latest(tmp_path / "run")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["processes"], manifest["strategy"]) == (2, 2, strategy)
    # Not from our own account, but from the files that the library has written.
    assert (checkpoint / only_its_own).is_file()
    assert json.loads((checkpoint / "trainer.rank1.json").read_text())["random"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.distributed
@pytest.mark.parametrize("asked", ["--cpu", "MULTI_CPU"])
def test_a_launch_that_falls_back_to_one_process_is_stopped(asked, tmp_path):
    option = asked
    if asked == "MULTI_CPU":
        file = tmp_path / "launch.yaml"
        file.write_text("distributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n")
        option = f"--config_file={file}"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        option,
        "--num_processes=2",
        "-m",
        "spark_vl",
        "train",
    ]
    with Run([*command, *TWO_STEPS, f"--output_dir={tmp_path / 'run'}"], deadline_s=60) as run:
        ended = run.finish()
    assert ended.returncode != 0
    assert "launch: several processes were asked for (MASTER_ADDR is set), but one was started." in ended.stdout
    assert "use a file of scripts/accelerate/, or torchrun" in ended.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def accelerator(kind: str, processes: int = 2, stage: int | None = None) -> SimpleNamespace:
    """As `check_launch` sees one."""
    return SimpleNamespace(
        num_processes=processes,
        distributed_type=DistributedType[kind],
        deepspeed_plugin=SimpleNamespace(zero_stage=stage),
    )


@pytest.mark.parametrize(
    ("runs", "variables", "message"),
    [
        (accelerator("MULTI_GPU"), {}, "launch: ddp was asked for, but the policy is held as single (Linear)"),
        (accelerator("FSDP"), {}, "launch: fsdp2 was asked for, but the policy is held as single (Linear)"),
        (
            accelerator("DEEPSPEED", stage=3),
            {},
            "launch: zero3 was asked for, but the policy is held as single (Linear)",
        ),
        (accelerator("NO", 1), {}, "launch: 2 processes were asked for, 1 run together"),
        (accelerator("MULTI_GPU", 3), {}, "launch: 2 processes were asked for, 3 run together"),
        (
            accelerator("MULTI_GPU"),
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "launch: DEEPSPEED was asked for, MULTI_GPU runs",
        ),
        (accelerator("MULTI_CPU"), {"ACCELERATE_USE_FSDP": "true"}, "launch: FSDP was asked for, MULTI_CPU runs"),
    ],
)
def test_what_does_not_run_as_asked_is_named(runs, variables, message, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as error:
        check_launch(runs, nn.Linear(2, 2))
    assert str(error.value) == message


def test_a_policy_that_is_wrapped_in_another_way_is_named(monkeypatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        check_launch(accelerator("MULTI_GPU"), wrapped)
        with pytest.raises(LaunchError, match=r"fsdp2 was asked for, but the policy is held as ddp \(DistributedData"):
            check_launch(accelerator("FSDP"), wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_is_what_is_asked_for_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_launch(accelerator("NO", 1), nn.Linear(2, 2))
