#!/usr/bin/env bash
# Repeats the demo's run with several seeds and prints what each gained, in points: scripts/demo_seeds.sh [CONFIG [SEEDS]]
#   CONFIG  run configuration, default scripts/configs/digits/spark.yaml
#   SEEDS   default "0 1 2 3 4"
# Runs go to runs/seeds/NAME-SEED; one that is there already is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-scripts/configs/digits/spark.yaml}
name=$(basename "$config" .yaml)
for seed in ${2:-0 1 2 3 4}; do
    run=runs/seeds/$name-$seed
    [ -e "$run/summary.json" ] || .venv/bin/python -m spark_vl train --config "$config" --seed "$seed" --output_dir "$run" >&2
    .venv/bin/python - "$run" <<'PYTHON'
import json, sys
summary = json.load(open(f"{sys.argv[1]}/summary.json"))
steps = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
before, after = summary["before"], summary["after"]
names = ("reasoning_greedy", "reasoning_sampled", "pointwise_sampled", "pointwise_own", "pairwise_sampled", "reflection_sampled", "test_time_reflection")
gains = "  ".join(f"{n} {before[n]:.3f}->{after[n]:.3f} ({100 * (after[n] - before[n]):+.0f})" for n in names if n in before and n in after)
print(f"{sys.argv[1]}: {sum(step['time/step'] for step in steps):.0f} s  {gains}", flush=True)
PYTHON
done
