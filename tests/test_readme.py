"""What the README says of publishing is typed here, against a Hub on the loopback."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from tests.hub.fixtures import ROOT, spark_vl


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
    assert re.search(r"Which digit is \w+\?.* [AB] \[<PIL\.", done.stdout)
