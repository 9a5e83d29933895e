"""The doctor against the machine it runs on, and against environments that are really broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from spark_vl import __version__
from spark_vl.doctor import findings, launch
from spark_vl.doctor.finding import Finding

ROOT = Path(__file__).parents[1]
SECRET = "hf_thisIsASecretThatNobodyMustSee"
RUNNER = """
import json, sys
from dataclasses import asdict
from spark_vl.doctor import findings
print(json.dumps([asdict(finding) for subject in sys.argv[1:] for finding in findings(subject)]))
"""
WITHOUT_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")


def environ(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a process that has nothing to do with the Hub, the caches and the settings of this one."""
    inherited = ("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_", "NCCL_", "CUDA_VISIBLE", "DS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    return kept | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"} | changes


def examined(folder: Path, *subjects: str, **changes: str) -> list[Finding]:
    """What a process in `folder` finds about `subjects`, under a changed environment."""
    command = [sys.executable, "-c", RUNNER, *subjects]
    run = subprocess.run(command, cwd=folder, env=environ(folder, **changes), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert SECRET not in run.stdout + run.stderr
    return [Finding(**finding) for finding in json.loads(run.stdout)]


def report(folder: Path, **changes: str) -> tuple[int, list[str], dict[str, tuple[str, str, str]]]:
    """Exit status of `spark-vl doctor`, its lines, and subject → (mark, what was found, what is below it)."""
    command = [sys.executable, "-m", "spark_vl", "doctor"]
    run = subprocess.run(command, cwd=folder, env=environ(folder, **changes), capture_output=True, text=True)
    assert SECRET not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert "\x1b" not in run.stdout
    by_subject: dict[str, tuple[str, str, str]] = {}
    subject = ""
    for line in run.stdout.splitlines()[:-1]:
        if line.startswith(" "):
            mark, found, below = by_subject[subject]
            by_subject[subject] = (mark, found, f"{below}{line.strip()}\n")
        else:
            subject = line[9:29].strip()
            by_subject[subject] = (line[:9].strip(), line[30:], "")
    return run.returncode, run.stdout.splitlines(), by_subject


def install(site: Path, name: str, installed: str, *metadata: str) -> None:
    """Put a distribution that consists of its metadata into `site`."""
    folder = site / f"{name.replace('-', '_')}-{installed}.dist-info"
    folder.mkdir(parents=True)
    lines = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {installed}", *metadata)
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """(folder, report) of this machine as it is, with a token, and a Hub that cannot be reached."""
    folder = tmp_path_factory.mktemp("healthy")
    return folder, report(folder, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://me:pw@127.0.0.1:9", HF_TOKEN=SECRET)


def test_every_dependency_is_reported_with_the_version_that_is_installed(healthy):
    _, (_, _, found) = healthy
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = [Requirement(line).name for line in setup["options"]["install_requires"].strip().splitlines()]
    assert len(names) > 15
    # What has been declared since this environment was made is not in its metadata.
    reported = {name: found[name][:2] for name in names if name in found}
    assert reported == {name: ("ok", version(name)) for name in reported}
    assert {"torch", "torchvision", "transformers", "accelerate", "pillow"} <= set(reported)
    assert found["Python"][1] == ".".join(map(str, sys.version_info[:3]))
    assert found["spark-vl"][1].startswith(__version__)


def test_memory_and_cores_are_those_of_the_system(healthy):
    _, (_, _, found) = healthy
    total_kib = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    assert f" of {total_kib / 2**20:.1f} GiB available" in found["RAM"][1]
    command = "unset OMP_NUM_THREADS; nproc; ulimit -n"  # nproc obeys that variable
    cores, files = subprocess.check_output(["sh", "-c", command], text=True).split()
    assert found["CPU cores"][1] == cores
    assert found["open files"][1] == f"{files} at most"


def test_the_report_ends_with_the_count_that_the_exit_status_stands_for(healthy):
    _, (status, lines, _) = healthy
    errors, warnings = (sum(line.startswith(mark) for line in lines) for mark in ("error ", "warning "))
    verdict = "does not work as it is" if errors else "can work"
    assert lines[-1] == f"errors: {errors}, warnings: {warnings}; training on this machine {verdict}"
    assert status == min(errors, 1)


def test_a_hub_that_cannot_be_reached_is_a_warning(healthy):
    _, (_, _, found) = healthy
    mark, text, below = found["Hub"]
    assert (mark, text.partition(":")[0]) == ("warning", "http")
    assert text.startswith("http://127.0.0.1:9 cannot be reached: ")
    assert "pw" not in text
    assert "export HF_HUB_OFFLINE=1" in below


def test_nothing_is_left_behind(healthy):
    folder, _ = healthy
    assert list(folder.iterdir()) == []


@WITHOUT_GPU
def test_without_a_gpu_it_says_what_works(healthy):
    _, (_, _, found) = healthy
    mark, text, below = found["GPU"]
    assert (mark, text) == ("warning", "none")
    assert "tiny models train on the CPU" in below
    assert found["DeepSpeed"][:2] == ("ok", f"{version('deepspeed')}, for cpu")


def test_async_io_is_possible_where_a_program_links_with_libaio(healthy, tmp_path):
    _, (_, _, found) = healthy
    (tmp_path / "probe.c").write_text("#include <libaio.h>\nint main(void) { return io_submit(0, 0, 0); }\n")
    compiled = subprocess.run(["c++", "-x", "c", "probe.c", "-laio"], cwd=tmp_path, capture_output=True)
    assert (found["async_io"][0] == "ok") == (compiled.returncode == 0)


@pytest.mark.slow
@WITHOUT_GPU
def test_cpu_adam_is_really_compiled_where_it_is_said_to_be_possible(healthy, tmp_path):
    _, (_, _, found) = healthy
    code = "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load()"
    environment = environ(tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    compiled = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (found["cpu_adam"][0] == "ok") == (compiled.returncode == 0)


def test_a_broken_environment_is_named_part_by_part(tmp_path):
    site = tmp_path / "site"
    install(site, "qwen-vl-utils", "0.33.0", "Requires-Dist: transformers<5.21,>=5.16", "Requires-Dist: torch==2.1.7")
    install(site, "transformers", "5.22.0")
    for module, error in (("torchvision", "operator torchvision::nms does not exist"), ("deepspeed", "out\nof order")):
        (site / module).mkdir()
        (site / module / "__init__.py").write_text(f"raise RuntimeError({error!r})")

    status, lines, found = report(tmp_path, PYTHONPATH=str(site), HF_HUB_CACHE="/proc/hub", CUDA_VISIBLE_DEVICES="")

    assert status == 1
    mark, text, below = found["transformers"]
    assert (mark, text) == ("error", "5.22.0; qwen-vl-utils 0.33.0 requires transformers<5.21,>=5.16")
    advised = Requirement(re.search(r'fix: pip install "(.*)"', below)[1])
    assert [advised.specifier.contains(one) for one in ("5.15", "5.20.2", "5.21")] == [False, True, False]
    assert found["torch"][:2] == ("error", f"{version('torch')}; qwen-vl-utils 0.33.0 requires torch==2.1.7")
    mark, text, below = found["torchvision"]
    assert mark == "error"
    assert text.endswith("operator torchvision::nms does not exist")
    pair = f"torch=={version('torch')} torchvision=={version('torchvision')}"
    assert f"pip install --force-reinstall {pair}" in below
    assert found["DeepSpeed"][:2] == ("error", "the check failed: RuntimeError: out of order")
    assert found["Hub cache"][0] == "error"
    assert found["Hub cache"][1].startswith("/proc/hub cannot be written: ")
    assert found["datasets cache"][0] == "ok"
    assert found["CUDA_VISIBLE_DEVICES"][0] == "warning"
    assert found["peft"][:2] == ("ok", version("peft"))
    assert {"RAM", "Hub", "peft", "accelerate launch"} <= set(found), "a check that failed has hidden others"
    assert lines[-1].endswith("does not work as it is")


def test_a_dependency_that_is_missing_and_another_python(tmp_path):
    required = ("Requires-Dist: no-such-thing>=1.2", "Requires-Dist: rich")
    install(tmp_path, "spark-vl", "9.9", "Requires-Python: <3", *required)
    found = {f.subject: f for f in examined(tmp_path, "Python", "dependencies", PYTHONPATH=str(tmp_path))}
    assert found["Python"].mark == "error"
    assert found["Python"].follows.startswith("spark-vl is made for Python <3;")
    missing = found["no-such-thing"]
    assert (missing.mark, missing.found) == ("error", "not installed; spark-vl 9.9 requires no-such-thing>=1.2")
    assert missing.fix == 'pip install "no-such-thing>=1.2"'
    assert found["rich"] == Finding("ok", "rich", version("rich"))


def test_vllm_has_to_be_of_a_known_version_and_go_with_torch_and_transformers(tmp_path):
    wanted = ("Requires-Dist: rich", 'Requires-Dist: vllm>=0.32; extra == "vllm"')
    install(tmp_path, "spark-vl", "9.9", *wanted)
    without = {f.subject: f for f in examined(tmp_path, "dependencies", PYTHONPATH=str(tmp_path))}
    mark, text = without["vllm"].mark, without["vllm"].found
    assert (mark, text.partition(";")[0]) == ("ok", "not installed")

    install(tmp_path, "vllm", "0.28.1", "Requires-Dist: transformers<5,>=4.56", "Requires-Dist: torch==1.0.0")
    found = {f.subject: f for f in examined(tmp_path, "dependencies", PYTHONPATH=str(tmp_path))}
    asked = {
        "vllm": "0.28.1; spark-vl 9.9 requires vllm>=0.32",
        "torch": f"{version('torch')}; vllm 0.28.1 requires torch==1.0.0",
        "transformers": f"{version('transformers')}; vllm 0.28.1 requires transformers<5,>=4.56",
    }
    assert {name: (found[name].mark, found[name].found) for name in asked} == {
        name: ("error", text) for name, text in asked.items()
    }

    (tmp_path / "vllm-0.28.1.dist-info").rename(tmp_path / "old")
    install(tmp_path, "vllm", "0.33.0", f"Requires-Dist: torch=={version('torch').partition('+')[0]}")
    found = {f.subject: f for f in examined(tmp_path, "dependencies", PYTHONPATH=str(tmp_path))}
    assert (found["vllm"].mark, found["vllm"].found) == ("ok", "0.33.0")
    assert "torch" not in found


def test_tools_that_are_missing_and_a_device_that_is_not_there(tmp_path):
    found = examined(tmp_path, "DeepSpeed", PATH="/nowhere", CXX="/nowhere/c++", DS_ACCELERATOR="cuda")
    texts = [f"{f.mark} {f.subject}: {f.found}" for f in found]
    if not torch.cuda.is_available():
        assert found[0] == Finding(
            "error",
            "DeepSpeed",
            f"{version('deepspeed')}, for cuda",
            "ZeRO fails: the model is on cpu",
            "unset DS_ACCELERATOR",
        )
    assert "warning compiler: no C++ compiler /nowhere/c++" in texts
    assert "warning compiler: no ninja" in texts
    scripts = Path(sys.executable).parent
    activate, install_it = f'export PATH="{scripts}:$PATH"', "pip install ninja"
    assert next(f.fix for f in found if "ninja" in f.found) == (
        activate if (scripts / "ninja").exists() else install_it
    )
    assert "warning cpu_adam: cannot be compiled: no C++ compiler /nowhere/c++" in texts


class Hub(BaseHTTPRequestHandler):
    """Answers as `server.status` says; remembers who asked."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        time.sleep(self.server.delay)
        body = b'{"name": "ada"}' if self.server.status == 200 else b"{}"
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.status, server.asked, server.delay = 200, [], 0
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "token", "mark", "text"),
    [
        (200, SECRET, "ok", "{}, logged in as ada"),
        (401, SECRET, "error", "{} does not accept the token"),
        (401, "", "warning", "{}, not logged in"),
        (503, SECRET, "warning", "{} answers 503"),
    ],
)
def test_the_hub_is_asked_whose_token_it_is(tmp_path, server, status, token, mark, text):
    server.status = status
    endpoint = f"http://127.0.0.1:{server.server_port}"
    [found] = examined(tmp_path, "Hub", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, HF_TOKEN=token)
    assert (found.mark, found.found) == (mark, text.format(endpoint))
    # Newer clients ask something else, too, before their first request.
    assert server.asked[-1] == ("/api/whoami-v2", f"Bearer {token}" if token else None)


def test_a_hub_that_does_not_answer_does_not_hold_the_report(tmp_path, server):
    server.delay = 30
    endpoint = f"http://127.0.0.1:{server.server_port}"
    start = time.monotonic()
    [found] = examined(tmp_path, "Hub", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, HF_TOKEN=SECRET)
    assert found.mark == "warning"
    assert "cannot be reached" in found.found
    assert time.monotonic() - start < 15


def test_offline_nothing_is_asked(tmp_path, server):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    [found] = examined(tmp_path, "Hub", HF_HUB_OFFLINE="1", HF_ENDPOINT=endpoint, HF_TOKEN=SECRET)
    assert (found.mark, found.found, server.asked) == ("warning", "offline mode is on", [])


LAUNCHES = {
    "NO": ({"distributed_type": "NO", "num_processes": 2}, "error", "starts one process"),
    "MULTI_CPU": ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "error", "starts one process"),
    "MULTI_GPU": ({"distributed_type": "MULTI_GPU", "num_processes": 2}, "ok", ""),
    "DEEPSPEED": ({"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {}}, "ok", ""),
    "FSDP": (
        {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}},
        "warning",
        "shards nothing",
    ),
}
"""distributed_type → (default file of Accelerate, mark without a GPU, what is said of it)."""


@pytest.fixture
def default_file(tmp_path, monkeypatch):
    """Write Accelerate's default file, which lies where the Hub's home was when Accelerate was imported."""
    from accelerate.commands.config import config_args

    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    return lambda settings: file.write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("kind", LAUNCHES)
@WITHOUT_GPU
def test_what_accelerate_launch_would_do_without_a_gpu(default_file, tmp_path, kind):
    settings, mark, text = LAUNCHES[kind]
    default_file(settings)
    [found] = findings("accelerate launch")
    assert found.mark == mark
    assert text in found.follows
    assert found.found == f"{tmp_path}/accelerate/default_config.yaml asks for {kind}, processes on this machine: 2"


@pytest.mark.parametrize("kind", LAUNCHES)
@WITHOUT_GPU
def test_that_is_what_accelerate_launch_does(tmp_path, kind):
    settings, _, text = LAUNCHES[kind]
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "probe.py").write_text("import os\nopen(f'started{os.getpid()}', 'w').write('')\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "probe.py"]
    subprocess.run(command, cwd=tmp_path, env=environ(tmp_path), capture_output=True, check=True)
    assert len(list(tmp_path.glob("started*"))) == (1 if "starts one process" in text else 2)


@pytest.mark.distributed
@WITHOUT_GPU
def test_without_a_gpu_accelerate_itself_shards_nothing(tmp_path):
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(LAUNCHES["FSDP"][0]))
    probe = "import accelerate\nstate = accelerate.Accelerator()\nprint('RUNS', state.num_processes, flush=True)\n"
    (tmp_path / "probe.py").write_text(probe)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "probe.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environ(tmp_path), capture_output=True, text=True, check=True)
    assert re.findall(r"RUNS (\d)", run.stdout) == ["1", "1"]


@pytest.mark.parametrize(
    ("settings", "mark", "text"),
    [
        (None, "ok", ""),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, "ok", ""),
        ({"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 4}, "ok", ""),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, "error", "there are 4"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 3}, "warning", "1 of 4 GPUs stay idle"),
        ({"distributed_type": "NO", "num_processes": 1}, "warning", "3 of 4 GPUs stay idle"),
        ({"distributed_type": "DEEPSPEED"}, "warning", "it stops at once"),
        ({"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 2}}, "ok", ""),
        ({"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {}}, "error", "FSDP version 1"),
        ({"distributed_type": "MEGATRON_LM", "num_processes": 4}, "warning", "has not been run with that"),
        ({"distributed_type": "NO", "num_process": 1}, "error", "what needs it does not work"),
    ],
)
def test_what_accelerate_launch_would_do_with_four_gpus(default_file, monkeypatch, settings, mark, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if settings:
        default_file(settings)
    [found] = findings("accelerate launch")
    assert found.mark == mark
    assert text in found.follows


def test_variables_that_change_a_run_without_a_word(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "NCCL_", "CUDA_", *launch._LAUNCHER))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    [nothing] = findings("environment")
    assert nothing.mark == "ok"
    for name, value in (
        ("NCCL_P2P_DISABLE", "1"),
        ("NCCL_IB_DISABLE", "0"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("WORLD_SIZE", "2"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "_MANY_CORES", 1)
    found = findings("environment")
    assert {finding.mark for finding in found} == {"warning"}
    assert found[0].subject == "OMP_NUM_THREADS"
    assert [finding.fix.split() for finding in found[1:]] == [
        ["unset", name] for name in ("NCCL_P2P_DISABLE", "WORLD_SIZE", "ACCELERATE_USE_FSDP")
    ]


def test_a_low_limit_of_open_files(tmp_path):
    command = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-c", RUNNER, "open files"]
    [found] = json.loads(subprocess.check_output(command, cwd=tmp_path, text=True))
    assert (found["mark"], found["found"], found["fix"]) == ("warning", "256 at most", "ulimit -n 65536")


@pytest.mark.gpu
def test_gpus_are_those_that_the_driver_lists():
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.check_output(query, text=True).strip().splitlines()
    found = {finding.subject: finding for finding in findings("GPU")}
    assert [found[f"GPU {index}"].found.split(",")[0] for index in range(len(names))] == names
    assert torch.version.cuda in found["CUDA"].found
