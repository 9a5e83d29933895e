"""GPUs, and what DeepSpeed can do with this machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spark_vl.doctor.finding import GIB, Finding, fault, ok, warning

if TYPE_CHECKING:
    from deepspeed.ops.op_builder import OpBuilder

_DRIVER = Path("/proc/driver/nvidia/version")
"""Is there when the kernel has NVIDIA's driver, also in a container that was started without the GPUs."""
_OFFLOADING = {
    "CPUAdamBuilder": "the optimizer cannot be kept in CPU memory (ZeRO-Offload)",
    "AsyncIOBuilder": "weights and optimizer cannot be kept on NVMe disks (ZeRO-Infinity)",
}
"""Builder of an operator of DeepSpeed → what does not work without it."""


def gpu() -> Iterator[Finding]:
    """Each GPU, with a computation on it; without one, what that means."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch says there why it cannot use a driver
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        yield _no_gpu("; ".join(str(message.message).partition("\n")[0] for message in caught))
        return
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        (ones @ ones).sum().item()  # fails if this build of torch has no kernels for the GPU
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < 0.8 * total:
            yield warning(
                f"GPU {index}", found, follows="another process holds the rest", fix="find it: nvidia-smi; kill PID"
            )
        else:
            yield ok(f"GPU {index}", found)
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    driver = re.search(r"\d+\.[\d.]+", _DRIVER.read_text()) if _DRIVER.exists() else None
    yield ok("CUDA", f"torch is built for {built_for}" + (f", driver {driver[0]}" if driver else ""))
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield ok("bfloat16", "computed by the GPU")
    else:
        yield warning(
            "bfloat16",
            "not computed by the GPU",
            follows="model.dtype is bfloat16 by default, and slow here",
            fix="spark-vl train --model.dtype float32",
        )
    if torch.distributed.is_nccl_available():
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    elif torch.cuda.device_count() > 1:
        yield fault(
            "NCCL",
            "not in this build of torch",
            follows="several GPUs cannot train together",
            fix="pip install --force-reinstall torch torchvision, for Linux from PyPI",
        )


def _no_gpu(reason: str) -> Finding:
    import torch

    if torch.accelerator.is_available():
        return warning(
            "GPU",
            f"{torch.accelerator.current_accelerator()}",
            follows="spark-vl is made for CUDA devices and CPUs, and has not been run on this one",
        )
    if _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        if torch.version.cuda is None:
            found, fix = "this torch is built without CUDA", "pip install --force-reinstall torch torchvision"
        else:
            found = "torch cannot use it" + (f": {reason}" if reason else "")
            fix = f"install a driver for CUDA {torch.version.cuda}; start a container with: docker run --gpus all"
        follows = "training silently runs on the CPU"
        return fault("GPU", f"the machine has NVIDIA's driver, but {found}", follows=follows, fix=fix)
    several = "on several processes too: ZeRO over gloo" if torch.distributed.is_gloo_available() else "in one process"
    return warning(
        "GPU",
        "none" + (f" ({reason})" if reason else ""),
        follows=f"tiny models train on the CPU ({several}), and make demo runs; Qwen2.5-VL in its own sizes does not "
        "train in reasonable time, and model.attention: flex gains nothing",
    )


def deepspeed() -> Iterator[Finding]:
    """Whether DeepSpeed loads, which device it picked, and whether its operators for offloading can be compiled."""
    if sys.platform != "linux":
        yield ok("DeepSpeed", "not used on this system, so there is no ZeRO")
        return
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    picked, there = get_accelerator().device_name(), "cuda" if torch.cuda.is_available() else "cpu"
    found = f"{deepspeed.__version__}, for {picked}"
    if picked == there:
        yield ok("DeepSpeed", found)
    else:
        follows = f"ZeRO fails: the model is on {there}"
        yield fault("DeepSpeed", found, follows=follows, fix="unset DS_ACCELERATOR")
    missing = list(_missing_tools())
    for tool, fix in missing:
        yield warning("compiler", f"no {tool}", follows="nothing can be compiled when it is first used", fix=fix)
    if not missing:
        yield ok("compiler", "C++ compiler, ninja and Python's headers are there")
    for name, follows in _OFFLOADING.items():
        builder = get_accelerator().create_op_builder(name)
        if obstacle := next(_obstacles(builder), None):
            found, fix = obstacle
            yield warning(builder.name, f"cannot be compiled: no {found}", follows=follows, fix=fix)
        else:
            yield ok(builder.name, "is compiled, or can be when it is first used")


def _obstacles(builder: OpBuilder) -> Iterator[tuple[str, str]]:
    """What an operator of DeepSpeed lacks, and how to get it. DeepSpeed's own check looks at libraries only."""
    import torch
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder
    from torch.utils.cpp_extension import CUDA_HOME

    if installed_ops.get(builder.name):
        return
    yield from _missing_tools()
    nvcc = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    if isinstance(builder, CUDAOpBuilder) and torch.cuda.is_available() and not nvcc:
        yield "nvcc", f"install the toolkit of CUDA {torch.version.cuda} and set CUDA_HOME"
    if not builder.is_compatible():
        yield "libraries that DeepSpeed links it with", "apt install libaio-dev"


def _missing_tools() -> Iterator[tuple[str, str]]:
    """What torch needs to compile an extension and does not find, and how to get it."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        yield f"C++ compiler {compiler}", "unset CXX" if "CXX" in os.environ else "apt install g++"
    if not is_ninja_available():
        scripts = Path(sysconfig.get_path("scripts"))
        # Not on the path in a virtual environment that is used without being activated.
        yield "ninja", f'export PATH="{scripts}:$PATH"' if (scripts / "ninja").exists() else "pip install ninja"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        yield "Python.h", "apt install python3-dev"
