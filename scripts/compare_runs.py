"""Says whether two runs computed the same: metrics (without times), evaluations and summary, to the last bit.

    python scripts/compare_runs.py OLD NEW

OLD may be of a version that named metrics differently: `RENAMED` maps its names to today's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RENAMED = {"engine/gap": "rollout/sampler_logprob_gap", "engine/ratio": "rollout/sampler_ratio"}


def figures(run: Path) -> dict[str, list[dict[str, object]]]:
    """File → its lines, without what a clock measured."""
    found = {}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [{RENAMED.get(k, k): v for k, v in ln.items() if not k.startswith("time/")} for ln in lines]
    found["summary.json"] = [json.loads((run / "summary.json").read_text())]
    return found


def main(old: Path, new: Path) -> int:
    """Print what differs. Returns the exit status."""
    before, after = figures(old), figures(new)
    status = 0
    for name in before:
        lines = list(zip(before[name], after[name], strict=False))
        differing = [i for i, (a, b) in enumerate(lines) if a != b]
        same = not differing and len(before[name]) == len(after[name])
        print(f"{name}: {len(before[name])} and {len(after[name])} lines, {'equal' if same else 'different'}")
        if differing:
            a, b = lines[differing[0]]
            names = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
            print(f"  first in line {differing[0] + 1}: {', '.join(names)}")
        status |= not same
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
