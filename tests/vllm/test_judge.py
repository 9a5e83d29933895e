"""The judge on vLLM says what it says on transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from spark_vl.demo import digits
from spark_vl.run.jsonl import read_lines

pytestmark = pytest.mark.vllm

SETTINGS = (
    "--model.path=spark_vl/demo/checkpoint",
    "--model.dtype=float32",
    "--model.min_pixels=784",
    "--model.max_pixels=50176",
    "--max_prompt_tokens=256",
    "--rollout.max_new_tokens=32",
    "--rollout.vllm.enforce_eager=true",
    "--prompts.templates=[spark_vl/demo/templates.yaml]",
    "--prompts.builtin_templates=false",
    "--rows_at_once=5",
)


def test_the_command_judges_alike_on_both_engines(tmp_path):
    rows = []
    for i in range(8):
        problem = digits.problem("test", i)
        (tmp_path / f"{i}.png").write_bytes(problem.image)
        wrong = str(int(problem.answer) + 1)
        row = {"question": problem.question, "images": f"{i}.png"}
        pair = {"answer_a": problem.answer, "answer_b": wrong}
        rows.append(row | (pair if i % 2 else {"answer": wrong if i % 4 else problem.answer}))
    rows.append({"question": "4 + 4? " * 100, "answer": "8"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / f"{engine}.jsonl"
        command = [sys.executable, "-m", "spark_vl", "judge", str(tmp_path / "rows.jsonl"), *SETTINGS]
        command += [f"--output={output}", f"--rollout.engine={engine}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        settings, *found[engine] = read_lines(output)
        assert settings["settings"]["rollout.engine"] == engine
    for ours, theirs in zip(*found.values(), strict=True):
        kept = ("row", "digest", "kind", "status", "error", "consistent", "truncated")
        assert {name: theirs.get(name) for name in kept} == {name: ours.get(name) for name in kept}
        for one, other in zip(ours.get("orders", ()), theirs.get("orders", ()), strict=True):
            for a, b in zip(one, other, strict=True):
                assert b | {"probability": None} == a | {"probability": None}
                assert b["probability"] == pytest.approx(a["probability"], abs=1e-4)
    assert [line["status"] for line in found["vllm"]] == ["ok"] * 8 + ["error"]
