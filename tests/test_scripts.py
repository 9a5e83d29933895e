"""Launch scripts and their files: read by the libraries that will read them, and run with stand-ins for programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from spark_vl.config_cli import parse_train_config
from spark_vl.estimate.memory import estimate
from spark_vl.estimate.shape import load_shape
from spark_vl.estimate.weights import Setup

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
LAUNCH_FILES = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
SCRIPTS = ["qwen2_5_vl_32b.sh", "qwen2_5_vl_7b.sh", "slurm.sbatch", "spark_tiny_cpu.sh"]

# Stand-ins: a program says its arguments, one a line, each after its own name.
ACCELERATE = """#!/bin/bash
printf 'accelerate: %s\\n' "$@"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun: $1"; shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" || exit; done
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show job") printf 'JobId=%s\\n   Command=%s --seed 3\\n' "$3" "$SBATCH" ;;
    "show hostnames") printf 'gpu7\\ngpu9\\n' ;;
    *) printf 'scontrol: %s\\n' "$*" ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "4211",
    "SLURM_JOB_NODELIST": "gpu[7,9]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
    "SBATCH": str(LAUNCH / "slurm.sbatch"),
}
RUN = {"RUN": "qwen2_5_vl_7b", "RECIPES": "virl39k"}


# ── configurations ──


def test_the_sizes_of_the_model_differ_in_what_the_paper_says_and_in_memory(monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = {
        size: parse_train_config(["--config", f"scripts/configs/qwen2_5_vl_{size}/spark.yaml"])
        for size in ("3b", "7b", "32b")
    }
    assert {size: config.rollout.max_new_tokens for size, config in configs.items()} == {
        "3b": 768,
        "7b": 768,
        "32b": 1024,
    }
    paper = configs["7b"]  # held to the paper's numbers in test_config.py
    for size, config in configs.items():
        assert config.model == replace(paper.model, path=f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct")
        rollout = replace(config.rollout, max_new_tokens=768, decode_batch_size=paper.rollout.decode_batch_size)
        same = replace(config, output_dir=paper.output_dir, model=paper.model, rollout=rollout)
        assert asdict(same) == asdict(paper)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_files_are_what_their_names_say_to_accelerate_and_deepspeed(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    name = file.stem.removeprefix("multinode_")
    assert (config.num_machines > 1) == (name != file.stem)
    if not name.startswith("zero"):
        expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "single": "NO"}[name]
        assert config.distributed_type == DistributedType[expected]
        assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
        return

    from deepspeed.runtime.config import DeepSpeedConfig

    assert config.distributed_type == DistributedType.DEEPSPEED
    settings = json.loads(Path(config.deepspeed_config["deepspeed_config_file"]).read_text())
    # What Accelerate fills in, and the start (spark_vl/distributed/launch.py).
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    zero = DeepSpeedConfig(settings).zero_config
    assert zero.stage == int(name[4])
    assert config.deepspeed_config["zero3_init_flag"] == (zero.stage == 3)
    offloaded = [where and where.device for where in (zero.offload_optimizer, zero.offload_param)]
    assert offloaded == (["cpu", "cpu"] if "offload" in name else [None, None])


# ── scripts ──


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder outside the repository, with the stand-ins."""
    for name, text in {"accelerate": ACCELERATE, "srun": SRUN, "scontrol": SCONTROL}.items():
        put(tmp_path, name, text)
    return tmp_path


def put(folder: Path, name: str, text: str) -> None:
    """Give `folder` a program."""
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(text)
    program.chmod(0o755)


def start(folder: Path, script: str, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """Start a launch script in `folder`, whose programs come first."""
    own = ("SLURM_", "MACHINE", "MAIN_", "TORCH_ELASTIC", "OMP_NUM_THREADS", "ROLLOUT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return subprocess.Popen(
        ["bash", LAUNCH / script, *flags],
        cwd=folder,
        env=kept | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, script: str, *flags: str, **variables: str) -> tuple[int, str, str]:
    """As `start`, to the end: exit code, stdout, stderr."""
    with start(folder, script, *flags, **variables) as process:
        out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


def said(output: str, program: str) -> list[str]:
    """The lines of a stand-in."""
    return [line.removeprefix(f"{program}: ") for line in output.splitlines() if line.startswith(f"{program}: ")]


def options(arguments: Sequence[str]) -> Mapping[str, str]:
    """`--option value` as a mapping."""
    return {name: value for name, value in pairwise(arguments) if name.startswith("--")}


def test_scripts_are_bash():
    assert sorted(path.name for path in LAUNCH.iterdir()) == sorted([*SCRIPTS, "common.sh"])
    for path in LAUNCH.iterdir():
        checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), path.name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_comment_at_the_top(script, flag, elsewhere):
    code, shown, errors = run(elsewhere, script, flag)
    assert (code, errors) == (0, "")
    comment = (LAUNCH / script).read_text().split("\n\n")[0].splitlines()[1:]
    assert shown.splitlines() == [re.sub("^# ?", "", line) for line in comment]
    assert f"scripts/launch/{script}" in shown
    assert "OUTPUT_DIR" in shown


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("qwen2_5_vl_7b.sh", {}, "RECIPES: is not set: what to train on"),
        ("qwen2_5_vl_32b.sh", {}, "RECIPES: is not set: what to train on"),
        ("qwen2_5_vl_7b.sh", {"RECIPES": "virl39k", "CONFIG": "my.yaml"}, "there is no file my.yaml (paths start from"),
        ("qwen2_5_vl_32b.sh", {"RECIPES": "virl39k", "LAUNCH": "zero4.yaml"}, "there is no file zero4.yaml"),
        ("qwen2_5_vl_7b.sh", {"RECIPES": "geometry3k,mine.yaml"}, "there is no file mine.yaml"),
        ("qwen2_5_vl_7b.sh", {"RECIPES": "virl39k", "MACHINES": "2"}, "MACHINE_RANK: is not set: 0 on the first"),
        (
            "qwen2_5_vl_7b.sh",
            {"RECIPES": "virl39k", "MACHINES": "2", "MACHINE_RANK": "1"},
            "MAIN_IP: is not set: name or address of the first of the 2 machines",
        ),
        ("slurm.sbatch", {}, "SLURM_JOB_ID: is not set: start this with sbatch"),
        ("slurm.sbatch", JOB, "RUN: is not set: the launch script, qwen2_5_vl_7b or"),
        ("slurm.sbatch", JOB | RUN, "OUTPUT_DIR: is not set: the folder of the run"),
        ("slurm.sbatch", JOB | {"RUN": "7b", "OUTPUT_DIR": "x"}, "RUN: there is no file scripts/launch/7b.sh"),
    ],
)
def test_what_is_missing_is_said_at_once(script, variables, message, elsewhere):
    code, output, errors = run(elsewhere, script, **variables)
    assert code != 0
    assert output == ""
    [line] = errors.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("script", "recipes", "launch", "config", "processes"),
    [
        ("spark_tiny_cpu.sh", None, "zero3_cpu", "digits", "2"),
        ("qwen2_5_vl_7b.sh", "virl39k", "zero3", "qwen2_5_vl_7b", "8"),
        ("qwen2_5_vl_32b.sh", "geometry3k,virl39k", "zero3_offload", "qwen2_5_vl_32b", "8"),
    ],
)
def test_each_starts_its_run_and_hands_flags_on(script, recipes, launch, config, processes, elsewhere):
    variables = {"RECIPES": recipes} if recipes else {}
    code, output, errors = run(elsewhere, script, "--seed", "3", "--prompts.system", "two words", **variables)
    assert (code, errors) == (0, "")
    called = said(output, "accelerate")
    assert called[0] == "launch"
    assert called[called.index("-m") :][:3] == ["-m", "spark_vl", "train"]
    assert called[-4:] == ["--seed", "3", "--prompts.system", "two words"]
    given = options(called)
    assert given["--config_file"] == f"scripts/accelerate/{launch}.yaml"
    assert given["--num_processes"] == processes
    assert given["--config"] == f"scripts/configs/{config}/spark.yaml"
    assert given["--output_dir"].startswith("runs/")
    assert given["--resume"] == "auto"
    assert given.get("--data.recipes") == (f"[{recipes}]" if recipes else None)
    assert "--machine_rank" not in given
    assert "--rollout.engine" not in given


@pytest.mark.parametrize("size", ["3b", "7b", "32b"])
def test_one_variable_lets_vllm_sample_with_settings_that_fit(size, elsewhere, monkeypatch):
    """What the script hands on are settings of the run; each of them can still be overridden."""
    script = f"qwen2_5_vl_{'32b' if size == '32b' else '7b'}.sh"
    own = f"scripts/configs/qwen2_5_vl_{size}/spark.yaml"
    flags = ("--seed", "3", "--rollout.vllm.memory_share", "0.4")
    code, output, errors = run(elsewhere, script, *flags, ROLLOUT="vllm", RECIPES="geometry3k", CONFIG=own)
    assert (code, errors) == (0, "")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("spark_vl.config_check.find_spec", lambda name: name)  # as if vLLM were installed
    called = said(output, "accelerate")
    settings = [argument for argument in called[called.index("train") + 1 :] if argument not in ("--resume", "auto")]
    config = parse_train_config(settings)
    assert (config.rollout.engine, config.rollout.vllm.mode) == ("vllm", "colocate")
    assert config.rollout.vllm.memory_share == 0.4
    assert (config.rollout.vllm.tensor_parallel, config.rollout.decode_batch_size) == (
        (4, 128) if size == "32b" else (1, 256)
    )
    offload = "optimizer+weights" if "offload" in options(called)["--config_file"] else "none"
    needed = estimate(load_shape(size), config, Setup(gpus=8, zero=3, offload=offload))
    assert needed.share_lacks == 0
    assert max(needed.total) < 79.5 * 2**30


def test_the_launcher_is_in_the_repository_and_ignores_usr1(elsewhere):
    put(elsewhere, "accelerate", '#!/bin/bash\nkill -USR1 $$\necho "$PWD $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n')
    assert run(elsewhere, "spark_tiny_cpu.sh") == (0, f"{ROOT} 600\n", "")


def test_slurm_starts_two_machines_of_eight(elsewhere):
    folder = str(elsewhere / "run")
    code, output, errors = run(elsewhere, "slurm.sbatch", "--seed", "3", **JOB, **RUN, OUTPUT_DIR=folder)
    assert (code, errors) == (0, "")
    assert said(output, "srun") == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--kill-on-bad-exit=1",
    ]
    called = said(output, "accelerate")
    first, second = called[: len(called) // 2], called[len(called) // 2 :]
    assert options(first) == {**options(second), "--machine_rank": "0"}
    assert "--same_network" in second
    expected = {
        "--machine_rank": "1",
        "--num_machines": "2",
        "--num_processes": "16",
        "--main_process_ip": "gpu7",
        "--main_process_port": "24211",
        "--rdzv_backend": "static",
        "--deepspeed_multinode_launcher": "standard",
        "--config_file": "scripts/accelerate/multinode_zero3.yaml",
        "--config": "scripts/configs/qwen2_5_vl_7b/spark.yaml",
        "--data.recipes": "[virl39k]",
        "--output_dir": folder,
        "--resume": "auto",
        "--seed": "3",
    }
    assert expected.items() <= options(second).items()


@pytest.mark.parametrize(
    ("exit_code", "finished", "queued"), [(0, False, ["requeue 4211"]), (0, True, []), (3, False, [])]
)
def test_slurm_queues_again_what_has_ended_well_and_is_not_finished(exit_code, finished, queued, elsewhere):
    put(elsewhere, "accelerate", f"#!/bin/bash\nexit {exit_code}\n")
    folder = elsewhere / "run"
    (folder / "model" if finished else folder).mkdir(parents=True)
    code, output, _ = run(elsewhere, "slurm.sbatch", **JOB, **RUN, OUTPUT_DIR=str(folder))
    assert code == exit_code
    assert said(output, "scontrol") == queued


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_slurm_hands_signals_on(sent, exit_code, elsewhere):
    """It signals what srun has started, and nothing below. USR1 is for the training processes, which end well; TERM for
    the launcher, which hands it on, and does not."""
    put(elsewhere, "srun", SRUN.replace('"$@" || exit', 'exec "$@"'))
    training = f"""#!{sys.executable}
import signal, sys
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, _: sys.exit(print(f"heard: {{signal.Signals(number).name}}")))
print("ready", flush=True)
while True:
    signal.pause()
"""
    put(elsewhere, "training", training)
    launcher = f"""#!{sys.executable}
import signal, subprocess, sys
with subprocess.Popen(["training"]) as training:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(training.terminate() or 1))
    sys.exit(training.wait())
"""
    put(elsewhere, "accelerate", launcher)
    with start(elsewhere, "slurm.sbatch", **JOB, **RUN, OUTPUT_DIR=str(elsewhere / "run")) as process:
        while (line := process.stdout.readline()) != "ready\n":
            assert line, process.stderr.read()
        task, *others = psutil.Process(process.pid).children(recursive=True)
        try:
            task.send_signal(sent)
            output, _ = process.communicate(timeout=30)
        finally:
            for left in (task, *others):
                with suppress(psutil.NoSuchProcess):
                    left.kill()
    assert said(output, "heard") == [sent.name]
    assert process.returncode == exit_code
    assert said(output, "scontrol") == (["requeue 4211"] if exit_code == 0 else [])
