"""TRL's trainer, for two steps on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import GRPOConfig


def two_steps(folder: Path, **settings: Any) -> GRPOConfig:
    """Settings of a run that writes nothing but its log."""
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
        **settings,
    )
