"""The public API: `from spark_vl import …`, lazily, and its page."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import spark_vl

ROOT = Path(__file__).parents[1]
NAMES = [name for names in spark_vl.PUBLIC.values() for name in names]


def run(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_other_module_of_it():
    loaded = run("-c", "import sys; before = set(sys.modules); import spark_vl; print(*(set(sys.modules) - before))")
    assert {name for name in loaded.split() if name.partition(".")[0] not in sys.stdlib_module_names} == {"spark_vl"}


def test_configuration_records_and_recipes_load_no_torch():
    names = "TrainConfig, PromptRecord, load_recipe, verify, Templater"
    loaded = run("-c", f"import sys; from spark_vl import {names}; print(*sys.modules)").split()
    assert "spark_vl.config" in loaded
    assert not {"torch", "transformers"} & set(loaded)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_defines(name):
    [module] = [module for module, names in spark_vl.PUBLIC.items() if name in names]
    assert getattr(spark_vl, name) is getattr(import_module(module), name)
    assert name in dir(spark_vl)


def test_no_name_is_that_of_a_module():
    """Importing `spark_vl.x` sets `spark_vl.x` to the module, which would then hide the name."""
    assert not set(NAMES) & {path.stem for path in (ROOT / "spark_vl").iterdir()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spark_vl' has no attribute 'Trainr'"):
        _ = spark_vl.Trainr


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "spark_vl" / "__init__.py").read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name, alias.asname) for node in guarded.body for alias in node.names}
    assert seen == {(module, name, name) for module, names in spark_vl.PUBLIC.items() for name in names}


def test_the_page_is_what_the_docstrings_say():
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == runpy.run_path(str(ROOT / "scripts" / "docs_api.py"))["page"](), (
        "python scripts/docs_api.py > docs/api.md"
    )
    assert [line[4:] for line in page.splitlines() if line.startswith("### ")] == NAMES
