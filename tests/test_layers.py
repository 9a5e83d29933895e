"""The layers of the package: a module imports only what stands above it, and the upper half knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE_THE_LINE = (
    *(
        "records",
        "config",
        "config_check",
        "config_cli",
        "answers",
        "prompts",
        "verifiers",
        "data",
        "run",
        "recycle",
        "offline",
    ),
    *("show", "advantages", "estimate"),
)
BELOW_THE_LINE = (
    *(
        "distributed",
        "log",
        "families",
        "policy",
        "rollout",
        "reward",
        "feed",
        "checkpoint",
        "trainer",
        "setup",
        "report",
        "evaluation",
        "hub",
    ),
    *("doctor", "demo", "preview", "cli", "__main__"),
)
LAYERS = (*ABOVE_THE_LINE, *BELOW_THE_LINE)
HEAVY = ("torch", "transformers")
RESOURCES = {"spark_vl.data_recipes", "spark_vl.model_cards", "spark_vl.space"}  # mapped in by setup.cfg


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package."""
    found = {}
    for file in sorted((ROOT / "spark_vl").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(source: str, package: str) -> Iterator[str]:
    """The absolute dotted name of everything that is imported anywhere in `source`, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """The imports of `module` that the layers forbid. The root may be imported by all, for its version; it names the
    public API to type checkers, and imports nothing of it before it is asked for."""
    own = [*module.split("."), ""][1]
    package = module if is_package else module.rpartition(".")[0]
    forbidden = []
    if not own:
        source = ast.unparse([node for node in ast.parse(source).body if ast.unparse(node)[:16] != "if TYPE_CHECKING"])
    for name in imports(source, package):
        top, _, rest = name.partition(".")
        layer = rest.partition(".")[0]
        if top == "scripts" or (top in HEAVY and own in ("", *ABOVE_THE_LINE)):
            forbidden.append(name)
        elif top == "spark_vl" and layer not in ("", "__version__", own):
            allowed = LAYERS[: LAYERS.index(own)] if own else ()
            if layer not in allowed:
                forbidden.append(name)
    return forbidden


def test_every_module_has_a_layer():
    assert {name.split(".")[1] for name in MODULES if "." in name} <= set(LAYERS)
    assert len(MODULES) > 30, "the package was not found"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_above_it(module):
    file = MODULES[module]
    assert not violations(module, file.read_text(), is_package=file.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("spark_vl.config", "from spark_vl.trainer import Trainer", ["spark_vl.trainer.Trainer"]),
        ("spark_vl.config", "def f():\n    from spark_vl import trainer", ["spark_vl.trainer"]),
        ("spark_vl.trainer", "import spark_vl.evaluation.evaluator as e", ["spark_vl.evaluation.evaluator"]),
        ("spark_vl.trainer", "from . import hub", ["spark_vl.hub"]),
        ("spark_vl.data.recipes", "from ..recycle import recycle", ["spark_vl.recycle.recycle"]),
        ("spark_vl.data.recipes", "from .sources import Source\nfrom ..records import KINDS", []),
        ("spark_vl.verifiers.math", "if x:\n    import torch.nn", ["torch.nn"]),
        ("spark_vl.recycle", "from transformers import AutoModel", ["transformers.AutoModel"]),
        ("spark_vl.policy.update", "import torch\nfrom spark_vl.advantages import group_advantages", []),
        ("spark_vl.cli", "from spark_vl import __version__\nfrom spark_vl.demo import tiny", []),
        ("spark_vl.report", "from spark_vl.demo import tiny", ["spark_vl.demo.tiny"]),
        ("spark_vl.cli", "from spark_vl import nowhere", ["spark_vl.nowhere"]),
        ("spark_vl.cli", "import scripts.build_tiny_checkpoint", ["scripts.build_tiny_checkpoint"]),
        ("spark_vl", "from spark_vl.config import TrainConfig", ["spark_vl.config.TrainConfig"]),
        ("spark_vl", "if TYPE_CHECKING:\n    from spark_vl.config import TrainConfig", []),
        ("spark_vl.cli", "from spark_vl import TrainConfig", ["spark_vl.TrainConfig"]),
    ],
)
def test_the_checker_sees_a_violation(module, source, forbidden):
    assert violations(module, source, is_package=module == "spark_vl") == forbidden


def heavy_after_import(names: list[str]) -> set[str]:
    """Which of `HEAVY` a fresh interpreter has loaded once it has imported `names`."""
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_nothing_above_the_line_loads_torch_or_transformers():
    names = [name for name in MODULES if "." in name and name.split(".")[1] in ABOVE_THE_LINE]
    assert len(names) >= 20
    assert heavy_after_import([*names, *RESOURCES]) == set()
    assert heavy_after_import(["spark_vl.policy.losses"]) == {"torch"}, "the probe does not see torch"


def test_scripts_are_thin_and_nothing_imports_them():
    page = ROOT / "scripts" / "space"  # a program of its own, which is copied to where there is no kit
    for file in set((ROOT / "scripts").rglob("*.py")) - set(page.rglob("*.py")):
        classes = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
        assert not classes, f"{file} defines {classes}"
    for folder in ("spark_vl", "data_recipes", "model_cards", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            imported = imports(file.read_text(), ".".join(file.relative_to(ROOT).parts[:-1]))
            assert not [name for name in imported if name.split(".")[0] == "scripts"], file
