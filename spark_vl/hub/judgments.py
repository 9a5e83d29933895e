"""The card of a dataset of judgments, with what `load_dataset` and the Hub's viewer read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from spark_vl import __version__
from spark_vl.config import read_config
from spark_vl.data.judgments import CONFIGS, features
from spark_vl.hub.cards import Verbatim, save_card
from spark_vl.hub.run import facts_of
from spark_vl.run.paths import CONFIG
from spark_vl.run.shards import Shard, read_shard

_ASKS = {
    "pointwise": "is this answer right?",
    "pairwise": "which of two answers is right?",
    "reflection": "check this answer, and give the right one",
    "rollouts": "the problem itself",
}
_DEFAULT = "pairwise"
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0", "odc-by")
"""Those of the Hub's names that datasets of problems bear; others are `other`, and named in the text."""


def write_judgments_card(
    run: Path,
    path: Path,
    *,
    repo: str,
    shards: Sequence[Shard],
    rows: Mapping[tuple[str, str], int],
    sizes: Mapping[tuple[str, str], int],
) -> None:
    """Write the card of the judgments of `run`.

    Args:
        shards: the files, of which there is at least one.
        rows: (config, split) → number of rows.
        sizes: (config, split) → bytes of its files.
    """
    config = read_config(run / CONFIG)
    recipes = facts_of(run, config["data"]["recipes"])
    base = next(read_shard(shards[0].path, ("model",)))["model"]
    configs = [name for name in CONFIGS if any(key[0] == name for key in rows)]
    splits = {name: sorted((key[1] for key in rows if key[0] == name), reverse=True) for name in configs}  # train first
    default = _DEFAULT if _DEFAULT in configs else configs[0]
    licenses = sorted({recipe["license"].lower() for recipe in recipes})
    data = DatasetCardData(
        pretty_name=repo.partition("/")[2],
        license=licenses[0] if len(licenses) == 1 and licenses[0] in _LICENSES else "other",
        task_categories=["visual-question-answering", "image-text-to-text"],
        tags=["spark-vl", "generative-reward-model", "judge", "reinforcement-learning"],
        source_datasets=sorted({recipe["dataset"]["id"] for recipe in recipes if recipe["dataset"]}) or None,
    )
    MetadataConfigs(
        {
            name: {
                "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits[name]],
                **({"default": True} if name == default else {}),
            }
            for name in configs
        }
    ).to_dataset_card_data(data)
    DatasetInfosDict(
        {
            name: DatasetInfo(
                features=features(name),
                splits=SplitDict(
                    {
                        split: SplitInfo(split, num_bytes=sizes[name, split], num_examples=rows[name, split])
                        for split in splits[name]
                    }
                ),
                config_name=name,
            )
            for name in configs
        }
    ).to_dataset_card_data(data)
    save_card(
        DatasetCard,
        path,
        data,
        "judgments.md",
        name=repo.partition("/")[2],
        repo_id=Verbatim(repo),
        version=__version__,
        example=default,
        base=base,
        run=config.get("recycled_from", run.name),
        again="recycled_from" in config,
        table=[
            {"config": name, "split": split, "rows": rows[name, split], "asks": _ASKS[name]}
            for name in configs
            for split in splits[name]
        ],
        recipes=recipes,
    )
