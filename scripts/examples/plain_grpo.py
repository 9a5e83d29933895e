"""Plain GRPO on the digits: nothing is recycled. Any setting can be added: `plain_grpo.py --steps 10`.

python scripts/examples/plain_grpo.py
"""

import sys
from pathlib import Path

from spark_vl import parse_train_config, train

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = f"""
    --config {ROOT}/scripts/configs/digits/grpo.yaml
    --model.path {ROOT}/spark_vl/demo/checkpoint
    --prompts.templates [{ROOT}/spark_vl/demo/templates.yaml]
    --recycle.schedule none
    --output_dir runs/plain-grpo
"""

if __name__ == "__main__":
    train(parse_train_config([*SETTINGS.split(), *sys.argv[1:]]), resume="none")
