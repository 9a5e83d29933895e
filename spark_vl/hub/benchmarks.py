"""The figures of an evaluation by `spark-vl eval`, for the card of the model that it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_vl.config import read_config
from spark_vl.hub.release import ReleaseError
from spark_vl.run.paths import CONFIG
from spark_vl.run.reader import recipe_facts

_OFFICIAL = {
    **{"mathverse": "versions", "wemath": "strict", "dynamath": "average"},
    **{"mmbench": "circular", "hallusionbench": "all"},
}
"""Recipe → the figure that stands for it, where that is not the accuracy of greedy answers."""


@dataclass(frozen=True)
class Benchmark:
    """The figure of one recipe."""

    recipe: Mapping[str, Any]
    """See `provenance.write_recipes`."""
    figure: str
    split: str
    """As the dataset calls it."""
    result: Mapping[str, float]
    """`value`, `low`, `high`, `n`."""
    how: str
    """How it was sampled."""


def read_benchmarks(folder: Path, weights: Path) -> tuple[Benchmark, ...]:
    """The figures in the folder of a finished evaluation: of each recipe the official one, or the accuracy.

    Args:
        weights: the folder of the model that is published.

    Raises:
        ReleaseError: it is no such folder, or it is an evaluation of another model.
    """
    try:
        config, results = read_config(folder / CONFIG), json.loads((folder / "results.json").read_text())
        evaluated, names = config["model"]["path"], config["evaluation"]["recipes"]
        facts = recipe_facts(folder, names)
        settings = config["evaluation"]
        how = f"greedy, at most {settings['max_new_tokens'] or config['rollout']['max_new_tokens']} new tokens"
        if settings["repetition_penalty"] != 1:
            how += f", repetition penalty {settings['repetition_penalty']}"
        found = []
        for recipe in facts:
            prefix = "" if len(facts) == 1 else f"{recipe['name']}/"
            official = _OFFICIAL.get(recipe["name"], "reward_official_overall")
            for figure in (official, "reasoning_greedy", "reward_accuracy"):
                if result := results.get(f"{prefix}{figure}"):
                    numbers = {name: float(result[name]) for name in ("value", "low", "high", "n")}
                    found.append(Benchmark(recipe, figure, recipe["splits"][settings["split"]], numbers, how))
                    break
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"{folder}: is not a finished evaluation: {type(error).__name__}: {error}") from error
    if Path(evaluated).resolve() != weights.resolve():
        raise ReleaseError(f"{folder}: is an evaluation of {evaluated}, not of {weights}")
    return tuple(found)
