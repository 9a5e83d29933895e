"""Items a second of the pool of verifiers, beside math-verify and the verifiers called directly in one process.

    python scripts/benchmarks/verifiers.py [--items 2000] [--rounds 3]

Every right answer has 8 completions, all different, half of them right, so no cache of answers helps. Each way runs
once before it is timed, and the ways take turns; the best of the rounds counts. Prints items a second, milliseconds of
processor an item (of all processes, so that a busy machine matters less), and the ratio of both to the floor.

The floor is work that cannot be avoided: for math, math-verify's own `parse` of each completion and `verify` against a
right answer that is parsed once; for number, the verifier in a loop. What the pool spends above it: pickling an item
and its verdict, two crossings of a pipe, and a deadline for each.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import math_verify
import psutil

from spark_vl.records import PromptRecord
from spark_vl.verifiers import VerifierPool, get_verifier

Item = tuple[str, PromptRecord]


def make_items(kind: str, count: int, first: int) -> list[Item]:
    """Completions with their records; no two calls with ranges that do not meet share an answer."""
    items = []
    for i in range(first, first + count):
        group, k = divmod(i, 8)
        gold = 8 * group + 3
        answers = {
            "math": (rf"\frac{{{gold * (k + 2)}}}{{{k + 2}}}", rf"x^{k}+\frac{{{gold}}}{{{k + 2}}}"),
            "number": (f"{gold}.{'0' * k}", f"{gold + k}.5"),
        }
        reasoning = "The picture shows a triangle, and its sides say the rest. " * 10
        completion = rf"{reasoning}\boxed{{{answers[kind][k % 2]}}}"
        items.append((completion, PromptRecord(f"r/{group}", "problem", (), (), str(gold), kind, "noise")))
    return items


def math_directly(items: Sequence[Item]) -> list[float]:
    """Scores by math-verify alone, with no limit on time; it is handed the last box, to search less."""
    config, golds, scores = [math_verify.LatexExtractionConfig()], {}, []
    parse = partial(math_verify.parse, extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
    for completion, record in items:
        if record.id not in golds:
            golds[record.id] = parse(rf"\boxed{{{record.gold}}}")
        answer = parse(completion[completion.rindex(r"\boxed") :])
        scores.append(float(math_verify.verify(golds[record.id], answer, timeout_seconds=None)))
    return scores


def directly(items: Sequence[Item]) -> list[float]:
    """Scores by the verifiers, in a loop."""
    return [get_verifier(record.verifier)(completion, record).score for completion, record in items]


def in_pool(pool: VerifierPool, items: Sequence[Item]) -> list[float]:
    """Scores by the pool."""
    return [verdict.score for verdict in pool.verify(items)]


def processor_s() -> float:
    """Seconds of processor time of this process and its workers so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children()))


def main() -> None:
    """Time each way and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    print(f"{arguments.items} items, best of {arguments.rounds} rounds, {len(os.sched_getaffinity(0))} cores")
    with VerifierPool(workers=1) as one, VerifierPool(workers=2) as two:
        pools = {"pool, 1 worker": partial(in_pool, one), "pool, 2 workers": partial(in_pool, two)}
        ways: dict[str, dict[str, Callable[[Sequence[Item]], list[float]]]] = {
            "math": {"math-verify directly": math_directly, "the verifier in a loop": directly, **pools},
            "number": {"the verifier in a loop": directly, "pool, inline": partial(in_pool, one)},
        }
        for kind, named in ways.items():
            for way in named.values():
                way(make_items(kind, 64, first=-1_000))
            best = {name: (float("inf"), float("inf")) for name in named}
            for turn in range(arguments.rounds):
                items = make_items(kind, arguments.items, first=turn * arguments.items)
                scores = []
                for name, way in named.items():
                    start, used = time.perf_counter(), processor_s()
                    scores.append(way(items))
                    spent = time.perf_counter() - start, processor_s() - used
                    best[name] = tuple(map(min, best[name], spent))
                if any(other != scores[0] for other in scores):
                    raise RuntimeError(f"{kind}: the ways do not agree")
            floor, floor_used = next(iter(best.values()))
            for name, (seconds, used) in best.items():
                print(
                    f"{kind:6}  {name:22}  {arguments.items / seconds:7,.0f} items/s, {floor / seconds:.2f} × floor;"
                    f"  {1000 * used / arguments.items:7.3f} ms of processor an item, {used / floor_used:.2f} × floor"
                )


if __name__ == "__main__":
    main()
