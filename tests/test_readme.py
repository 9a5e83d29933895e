"""What the README says of publishing is typed here, against a Hub on the loopback."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from spark_vl.verifiers import VERIFIERS, get_verifier, verify
from spark_vl.verifiers.shaping import SHAPING
from tests.hub.fixtures import ROOT, spark_vl

FREE = ("LOG.md",)


def test_train_publish_and_load(hub, finished_run):
    section = re.search(r"^## Publish\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    section = section.replace("runs/digits", str(finished_run)).replace("ORG/NAME", "org/tiny")
    typed = re.findall(r"^    (spark-vl .*)$", section, flags=re.MULTILINE)
    train, *publish = (shlex.split(line, comments=True)[1:] for line in typed)
    # The run of the first command is there already: a short one, by the same function.
    assert train[:2] == ["train", "--config"]
    assert (ROOT / train[2]).is_file()
    assert [command[1] for command in publish] == ["model", "model", "judgments", "space"]
    for command in publish:
        done = spark_vl(hub, *command)
        assert done.returncode == 0, done.stderr
        if "--dry-run" in command:
            assert not hub.repos
    assert set(hub.repos) == {("model", "org/tiny"), ("dataset", "org/tiny-judgments"), ("space", "org/tiny-demo")}
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(Which digit is \w+|By how much).*\?.* [AB] \[<PIL\.", done.stdout)


def test_lines_break_at_120_characters():
    """Except tables, commands that a test types, the log and the design."""
    long = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        if page.name not in FREE:
            lines = enumerate(page.read_text().splitlines(), 1)
            long += [(page.name, n) for n, line in lines if len(line) > 120 and not line.startswith(("|", "spark-vl "))]
    assert long == []


def test_the_page_of_verifiers_lists_every_kind_setting_and_term_and_its_examples_hold():
    page = (ROOT / "docs" / "verifiers.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    kinds = {row[0].strip("`"): row[2] for row in rows if len(row) == 3}
    assert kinds.pop("module:function") == ""
    assert kinds.keys() == VERIFIERS.keys()
    for kind, settings in kinds.items():
        get_verifier(kind)
        known = vars(sys.modules[VERIFIERS[kind].partition(":")[0]]).get("SETTINGS", {})
        named = set(re.findall(r"`(\w+)`(?= \(|,|$)", settings))
        assert named <= known.keys(), kind
        if kind not in ("iou", "point", "detection"):  # which share a module
            assert named == known.keys(), kind
    assert {row[0].strip("`") for row in rows if len(row) == 2} == SHAPING.keys()
    calls = re.findall(r"^    (verify\(.*?\)(?:\.score)?)(?: +#.*)?$", page, flags=re.MULTILINE)
    assert len(calls) == 2
    scores = [eval(call, {"verify": verify}) for call in calls]  # the page's own text
    assert scores[0] == 1
    assert scores[1].score == 1
