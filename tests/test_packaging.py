"""The wheel: built from a copy of the tree, installed elsewhere, and complete there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml

import spark_vl
from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import TEMPLATES
from spark_vl.prompts import Templater

ROOT = Path(__file__).parents[1]
MAPPED = {
    "spark_vl/data_recipes": "data_recipes",
    "spark_vl/model_cards": "model_cards",
    "spark_vl/space": "scripts/space",
}
"""Folder in the package → in the tree."""
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")

PROBE = """
import json, sys
from importlib.resources import files
from spark_vl.data.recipes import load_recipe, recipes, usage
from spark_vl.prompts import Templater
print(json.dumps({
    "folders": {package: str(files(package).joinpath("")) for package in sys.argv[1:]},
    "recipes": {name: load_recipe(usage(name)).license for name in recipes()},
    "templates": sorted(Templater.load().templates),
    "demo templates": sorted(Templater.load([files("spark_vl.demo") / "templates.yaml"], builtin=False).templates),
}))
"""


def tree() -> list[str]:
    """Paths of the files that are tracked or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return sorted({path for path in listed if path and (ROOT / path).is_file()})


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel installed in it and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    for path in tree():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=source)
    [wheel] = folder.glob("*.whl")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=folder)
    return target


def test_setup_cfg_lists_every_package():
    folders = {str(Path(path).parent) for path in tree() if path.endswith("__init__.py")}
    in_package = [name.replace(".", "/") for name in SETUP["options"]["packages"].split()]
    assert sorted(MAPPED.get(name, name) for name in in_package) == sorted(
        f for f in folders if f.split("/")[0] != "tests"
    )
    mapping = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].strip().splitlines())
    assert mapping == {"spark_vl": "spark_vl"} | {k.replace("/", "."): v for k, v in MAPPED.items()}


def test_every_file_of_the_package_is_installed(installed):
    def contents(folder: Path) -> dict[str, bytes]:
        files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    source = installed.with_name("source")
    expected = contents(source / "spark_vl")
    for inside, outside in MAPPED.items():
        expected |= {f"{Path(inside).name}/{file}": data for file, data in contents(source / outside).items()}
    found = contents(installed / "spark_vl")
    assert sorted(found) == sorted(expected)
    assert [file for file in found if found[file] != expected[file]] == []


def test_the_installed_package_finds_its_own_files(installed, tmp_path):
    with_data = list(SETUP["options.package_data"])
    found = json.loads(python("-c", PROBE, *with_data, cwd=tmp_path, PYTHONPATH=str(installed)))
    # An editable install on the same interpreter would answer for whatever the wheel lacks.
    assert found["folders"] == {package: str(installed / package.replace(".", "/")) for package in with_data}
    assert sorted(found["recipes"]) == sorted(file.stem for file in (ROOT / "data_recipes").glob("*.yaml"))
    assert all(found["recipes"].values())
    assert found["templates"] == sorted(Templater.load().templates)
    assert found["demo templates"] == sorted(Templater.load([TEMPLATES], builtin=False).templates)
    checkpoint = {file.name for file in (installed / CHECKPOINT.relative_to(ROOT)).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= checkpoint


def test_the_citation_names_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == spark_vl.__version__


def test_a_commit_is_checked_as_make_lint_does():
    """And the public CI runs what must pass before a change lands."""
    [hooks] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    called = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in lint.splitlines()[1:]]
    assert [hook["entry"] for hook in hooks["hooks"]] == called
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_the_command_is_installed(installed, tmp_path):
    [distribution] = [d for d in distributions(path=[str(installed)]) if d.name == "spark-vl"]
    [command] = distribution.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("spark-vl", "spark_vl.__main__:main")
    answers = {
        python(*arguments, cwd=tmp_path, PYTHONPATH=str(installed))
        for arguments in ((str(installed / "bin" / "spark-vl"), "--version"), ("-m", "spark_vl", "--version"))
    }
    assert answers == {f"spark-vl {distribution.version}\n"}
