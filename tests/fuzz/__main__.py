"""`python -m tests.fuzz [TARGET ...]`: each target in turn until FUZZ_SECONDS are over. Findings go to runs/fuzz.

An input depends on FUZZ_SEED, its target and its number alone, and the report names them.
"""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.targets import TARGETS, pool

FOLDER = Path("runs/fuzz")


def main(names: list[str], seconds: float, seed: str) -> int:
    """The number of different findings."""
    warnings.simplefilter("ignore")
    findings: set[str] = set()
    for name in names:
        target, share = TARGETS[name], seconds / len(names)
        end, runs, slowest = time.monotonic() + share, 0, 0.0
        while time.monotonic() < end:
            case = target.make(random.Random(f"{seed}/{name}/{runs}"))
            start = time.process_time()
            try:
                target.run(case)
                took = time.process_time() - start
                assert took <= target.limit_s, f"took more than {target.limit_s:g} s"
                slowest = max(slowest, took)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                finding = f"{name}: {type(error).__name__} at {place.filename}:{place.lineno}: {error}"
                if (key := f"{name} {type(error).__name__} {place.filename} {place.lineno}") not in findings:
                    findings.add(key)
                    FOLDER.mkdir(parents=True, exist_ok=True)
                    (FOLDER / f"{name}-{seed}-{runs}.txt").write_text(
                        f"{finding}\n{case!r}\n", errors="backslashreplace"
                    )
                    print(f"FOUND {finding:.500}\n  seed {seed}, input {runs}: {case!r:.1000}", flush=True)
            runs += 1
        print(f"{name}: {runs} inputs, the slowest {slowest:.2f} s", flush=True)
    pool().close()
    print(f"{len(findings)} findings")
    return len(findings)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(TARGETS)
    seed = os.environ.get("FUZZ_SEED") or str(time.time_ns() // 10**9)
    sys.exit(main(chosen, float(os.environ.get("FUZZ_SECONDS", "60")), seed) > 0)
