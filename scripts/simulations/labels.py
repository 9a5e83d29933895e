"""Does difficulty predict the labels that recycling makes? A simulation over pass rates and numbers of processes.

Questions are solved with a probability that is drawn from a Beta distribution; 64 of them are sampled 8 times each in a
step, spread over 1 to 64 processes, and recycled as a run does it: the same functions, without the exchange between
processes.

    python scripts/simulations/labels.py [--steps 40] [--json] [--one-per-group] [--unanimous-share 0.05]

One row for each distribution and number of processes:

    auc          area under the ROC curve of the labels of pointwise prompts given the pass rate of the group (0.5: the
                 pass rate says nothing), over all steps; `auc_of_difficulty`: given the probability that was drawn
    difference   largest |"correct" labels - "incorrect" labels| in a step
    pointwise, pairwise, reflections     prompts a step, over all processes
    spread       largest difference between two processes, in prompts of a step
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from spark_vl.config import RecycleConfig
from spark_vl.prompts import Templater
from spark_vl.records import Message, PromptRecord, RecycledRecord, Rollout, RolloutGroup, Verdict
from spark_vl.recycle import choose, deal, find_evidence, roc_auc, word

PASS_RATES = ((0.8, 0.5), (0.6, 0.6), (1.5, 0.4))
"""Parameters of Beta distributions: their means are .62, .5 and .79."""
PROCESSES = (1, 8, 16, 64)
PROBLEMS, ROLLOUTS = 64, 8


def sample_groups(step: int, alpha: float, beta: float) -> tuple[list[RolloutGroup], dict[str, float]]:
    """The verified groups of a step, and the probability with which each question is solved, by its id."""
    rng = random.Random(f"{step}/{alpha}/{beta}")
    groups, difficulty = [], {}
    for i in range(PROBLEMS):
        question = (f"Question {i} of step {step}",)
        record = PromptRecord(
            f"simulated/{step}/{i}", "problem", (Message("user", question),), question, "1", "number", "simulated"
        )
        difficulty[record.id] = p = rng.betavariate(alpha, beta)
        solved = [rng.random() < p for _ in range(ROLLOUTS)]
        answers = [str(int(right) or -1 - j) for j, right in enumerate(solved)]
        rollouts = tuple(Rollout((1,), (0.0,), f"So it is \\boxed{{{answer}}}", "stop") for answer in answers)
        verdicts = tuple(Verdict(float(right), answer) for right, answer in zip(solved, answers, strict=True))
        groups.append(RolloutGroup(record, rollouts, verdicts))
    return groups, difficulty


def recycle_together(
    parts: Sequence[Sequence[RolloutGroup]], templater: Templater, config: RecycleConfig, step: int
) -> list[list[RecycledRecord]]:
    """What each process gets, of the groups [processes][groups] that each has sampled (as `PromptFeed.recycle`)."""
    evidence = [find_evidence(groups, config, step=step, seed=0)[0] for groups in parts]
    choice = choose([[each.candidate for each in own] for own in evidence], config, step=step, seed=0)
    units = choice.judge + choice.reflection
    dealt: list[list[RecycledRecord]] = [[] for _ in parts]
    for unit, to in zip(units, deal(units, [0] * len(parts)), strict=True):
        dealt[to] += [word(part, unit, evidence[part.process], templater, config, step=step) for part in unit.parts]
    return dealt


def simulate(
    steps: int, config: RecycleConfig, pass_rates: Sequence = PASS_RATES, processes: Sequence = PROCESSES
) -> Iterator[dict[str, Any]]:
    """One row for each of `pass_rates` and each number of `processes`."""
    templater = Templater.load()
    for alpha, beta in pass_rates:
        sampled = [sample_groups(step, alpha, beta) for step in range(1, steps + 1)]
        for n in processes:
            by_rate: list[tuple[float, bool]] = []
            by_difficulty: list[tuple[float, bool]] = []
            differences, spreads = [], []
            kinds = dict.fromkeys(("pointwise", "pairwise", "reflection"), 0)
            for step, (groups, difficulty) in enumerate(sampled, 1):
                rates = {group.record.id: sum(group.scores) / ROLLOUTS for group in groups}
                dealt = recycle_together([groups[i::n] for i in range(n)], templater, config, step)
                records = [record for of_process in dealt for record in of_process]
                judged = [(r.parent_id, bool(r.origin.quoted_correct)) for r in records if r.kind == "pointwise"]
                by_rate += [(rates[parent], label) for parent, label in judged]
                by_difficulty += [(difficulty[parent], label) for parent, label in judged]
                differences.append(abs(sum(1 if label else -1 for _, label in judged)))
                spreads.append(max(map(len, dealt)) - min(map(len, dealt)))
                for record in records:
                    kinds[record.kind] += 1
            yield {
                "pass_rates": f"Beta({alpha:g}, {beta:g})",
                "processes": n,
                "auc": round(roc_auc(by_rate) or 0.0, 4),
                "auc_of_difficulty": round(roc_auc(by_difficulty) or 0.0, 4),
                "label_difference_max": max(differences),
                "pointwise_per_step": kinds["pointwise"] / steps,
                "pairwise_per_step": kinds["pairwise"] / steps,
                "reflections_per_step": kinds["reflection"] / steps,
                "spread_max": max(spreads),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="the rows as a JSON list")
    parser.add_argument("--one-per-group", action="store_true", help="the released rule, in place of matched pairs")
    parser.add_argument("--unanimous-share", type=float, default=RecycleConfig.unanimous_share)
    args = parser.parse_args()
    rule = "one_per_group" if args.one_per_group else "matched_pairs"
    config = RecycleConfig(pointwise=rule, unanimous_share=args.unanimous_share)
    rows = list(simulate(args.steps, config))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    one_per_group = RecycleConfig(pointwise="one_per_group")
    released = {row["pass_rates"]: row for row in simulate(args.steps, one_per_group, processes=(1,))}
    print(f"{args.steps} steps of {PROBLEMS} questions x {ROLLOUTS} rollouts; {rule}, share {args.unanimous_share}")
    print("in brackets: one prompt per group, nothing balanced (the released rule), on one process\n")
    print(
        " | ".join(("pass rates", "processes", "auc", "difference", "pointwise", "pairwise", "reflections", "spread"))
    )
    for row in rows:
        other = released[row["pass_rates"]]
        cells = (
            row["pass_rates"],
            str(row["processes"]),
            f"{row['auc']:.3f} [{other['auc']:.3f}]",
            f"{row['label_difference_max']} [{other['label_difference_max']}]",
            f"{row['pointwise_per_step']:.1f} [{other['pointwise_per_step']:.1f}]",
            f"{row['pairwise_per_step']:.1f} [{other['pairwise_per_step']:.1f}]",
            f"{row['reflections_per_step']:.1f} [{other['reflections_per_step']:.1f}]",
            str(row["spread_max"]),
        )
        print(" | ".join(cells))


if __name__ == "__main__":
    main()
