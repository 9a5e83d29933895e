"""Builds the checkpoint of the demo, in about seven minutes: `python scripts/build_tiny_checkpoint.py [FOLDER]`.

Without FOLDER it replaces the checkpoint that is installed with the package. What it writes depends on the seed in
`build` alone, up to rounding that differs between machines.
"""

import sys
from pathlib import Path

from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import build

if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT)
