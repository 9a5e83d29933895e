"""Whether the packages that are installed go together: by their own metadata, and by importing them."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from spark_vl.doctor.finding import Finding, fault, ok

_KIT = "spark-vl"
_OPTIONAL = {
    "peft": 'low-rank adapters (pip install "spark-vl[lora]")',
    "gradio": 'the page of a Space, on this machine (pip install "spark-vl[space]")',
    "tensorboard": "logging.trackers: [tensorboard] (pip install tensorboard)",
    "wandb": "logging.trackers: [wandb] (pip install wandb)",
    "trackio": "logging.trackers: [trackio] (pip install trackio)",
}
"""Distribution → what needs it."""


def python() -> Iterator[Finding]:
    """The interpreter against the range that spark-vl is made for."""
    yield ok(_KIT, f"{version(_KIT)} on {platform.platform()}")
    allowed, found = SpecifierSet(metadata(_KIT)["Requires-Python"]), platform.python_version()
    if _within(found, allowed):
        yield ok("Python", found)
    else:
        yield fault(
            "Python",
            found,
            follows=f"spark-vl is made for Python {allowed}; its dependencies may lack wheels for another",
            fix=f"make an environment with a Python {allowed} and install there",
        )


def dependencies() -> Iterator[Finding]:
    """Each dependency against what spark-vl and its other dependencies ask of it.

    That finds the pair that is known to break: torchvision is built for one version of torch. Of vLLM, which asks for
    one version of torch too, only where it is installed.
    """
    extra = "vllm" if _version("vllm") else ""
    if not extra:
        yield ok("vllm", 'not installed; only for rollout.engine: vllm (pip install "spark-vl[vllm]")')
    own = [canonicalize_name(requirement.name) for requirement in _requirements(_KIT, extra)]
    asked: dict[str, dict[str, SpecifierSet]] = defaultdict(dict)  # package → who asks → for what
    for asker in (_KIT, *own):
        for requirement in _requirements(asker, extra if asker == _KIT else ""):
            ranges = asked[canonicalize_name(requirement.name)]
            ranges[asker] = ranges.get(asker, SpecifierSet()) & requirement.specifier
    for package, ranges in asked.items():
        found = _version(package)
        unmet = [asker for asker, allowed in ranges.items() if found is None or not _within(found, allowed)]
        if unmet:
            wanted = ", ".join(f"{asker} {_version(asker)} requires {package}{ranges[asker]}" for asker in unmet)
            all_of_them = ",".join(str(allowed) for allowed in ranges.values() if str(allowed))
            yield fault(
                package,
                f"{found or 'not installed'}; {wanted}",
                follows=f"{' and '.join(unmet)} may fail when imported, or later",
                fix=f'pip install "{package}{SpecifierSet(all_of_them)}"',
            )
        elif package in own:
            yield ok(package, f"{found}")


def torchvision() -> Iterator[Finding]:
    """Whether torchvision's compiled operators load into this torch. Metadata does not tell: builds differ."""
    import torch

    pair = [f"{name}=={Version(version(name)).public}" for name in ("torch", "torchvision")]
    try:
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (ImportError, OSError, RuntimeError) as error:
        yield fault(
            "torchvision",
            f"does not load into torch {torch.__version__}: {error}",
            follows="no image can be processed: the two are not builds that go together",
            fix=f"both from the same index: pip install --force-reinstall {' '.join(pair)}",
        )
    else:
        yield ok("torch + torchvision", "torchvision's operators run")


def model() -> Iterator[Finding]:
    """Whether the code of the models loads. Fails where it does not."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2ForCausalLM, Qwen3ForCausalLM

    for name, parts in {
        "Qwen2.5-VL": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
        "Qwen2.5, Qwen3": (Qwen2ForCausalLM, Qwen3ForCausalLM),
    }.items():
        yield ok(name, f"{' and '.join(part.__name__ for part in parts)} can be imported")


def optional() -> Iterator[Finding]:
    """The parts that training can do without."""
    for name, needed_for in _OPTIONAL.items():
        yield ok(name, _version(name) or f"not installed; only for {needed_for}")


def _requirements(name: str, extra: str = "") -> Iterator[Requirement]:
    """What an installed distribution requires here, with one of its extras or none; nothing if it is not installed."""
    if _version(name) is None:
        return
    for text in requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _within(found: str, allowed: SpecifierSet) -> bool:
    return allowed.contains(found, prereleases=True)
