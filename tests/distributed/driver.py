"""`spark-vl train` with one thing added, named by the variable `ADD`: `python -m tests.distributed.driver train …`.

causal: the first process ignores the attention mask of packed groups.
nan: in the second step, the last process computes NaN.
held: each process first writes the ids of the prompts that it has waiting to `held.rank….json`.
room: the disk is said to have room.
"""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

from spark_vl.cli import main
from spark_vl.policy import policy
from spark_vl.trainer import Trainer
from tests import test_check
from tests.test_nonfinite import compute_nan


def causal(trainer: Trainer) -> None:
    if trainer.accelerator.is_main_process:
        policy.attention_mask = test_check.causal


def nan(trainer: Trainer) -> None:
    last = trainer.accelerator.process_index + 1 == trainer.accelerator.num_processes
    compute_nan(trainer, lambda: last and trainer.step == 1)


def held(trainer: Trainer) -> None:
    ids = [record["id"] for waiting in trainer.feed.state_dict()["waiting"] for record in waiting["records"]]
    (trainer.log.folder / f"held.rank{trainer.accelerator.process_index}.json").write_text(json.dumps(ids))


def room(trainer: Trainer) -> None:
    shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)


if __name__ == "__main__":
    train = Trainer.train
    Trainer.train = lambda trainer: (globals()[os.environ["ADD"]](trainer), train(trainer))[1]
    main()
