"""Builds the checkpoint of the demo, in about seven minutes: `python scripts/build_tiny_checkpoint.py [FOLDER]`.

Without FOLDER it replaces the checkpoint that is installed with the package.
"""

import sys
from pathlib import Path

import torch

from spark_vl.demo.tiny import CHECKPOINT
from spark_vl.demo.warm_start import build

if __name__ == "__main__":
    torch.set_num_threads(1)  # so that rounding, and with it the result, does not depend on the number of cores
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT)
