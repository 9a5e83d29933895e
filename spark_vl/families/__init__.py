"""All that the kit knows of a model family, in one file for each family.

`base.py` has the protocol, `registry.py` finds the family of a checkpoint. What the rest of the kit needs of a family
before torch is loaded is data: a YAML file named for its `model_type`, with a `vision_config` where the models have a
vision tower.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def read_facts(model_type: str) -> dict[str, Any]:
    """The YAML file of the family."""
    return yaml.safe_load(files("spark_vl.families").joinpath(f"{model_type}.yaml").read_text("utf-8"))
