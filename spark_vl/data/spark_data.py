"""The rows of `internlm/Spark-Data`, which the released SPARK models were trained on.

It holds JSON files without images: a list of rows with `message`, a chat of one turn as JSON text, whose images are
paths on its authors' machine, and `answer`. The problems and the images are ViRL39K's, so a path counts from its folder
`images` on, below the folder in which ViRL39K's archive was unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark_vl.data.sources import Row

REPO = "internlm/Spark-Data"
_INSTRUCTION = "\nPlease first conduct reasoning"
"""The released prompts end in an instruction that begins so. It is left out: ours is appended to every problem."""


class SparkRows:
    """The rows of one of its files.

    Args:
        rows: as they stand in the file.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        """`question`, with `<image>` where an image stands, `images` and `answer`.

        Raises:
            ValueError: the row is not as described in this module.
        """
        row = self._rows[index]
        try:
            [turn] = json.loads(row["message"])
            parts = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
            question, images = "", []
            for part in parts:
                if isinstance(part, dict) and part["type"] == "image":
                    question += "<image>"
                    images.append(_below_images(part["image"]))
                else:
                    question += part if isinstance(part, str) else part["text"]
            return {"question": question.partition(_INSTRUCTION)[0], "images": images, "answer": row["answer"]}
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the row is not a chat of one turn with an answer: {error!r:.200} in {row!r:.200}"
            ) from error


def _below_images(path: str) -> str:
    _, mark, name = path.rpartition("images/")
    if not mark:
        raise ValueError(f"the image {path!r:.100} is not in a folder named images")
    return mark + name


def rows(split: str) -> SparkRows:
    """The rows of the file `split`, which is downloaded unless it is in the cache.

    Raises:
        ValueError: the file cannot be had, or is not a JSON list.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(REPO, split, repo_type="dataset"))
    except (EntryNotFoundError, OSError) as error:  # what the Hub answers is an OSError, too
        raise ValueError(f"{split} of the dataset {REPO}: {error}") from error
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{file}: holds a JSON {type(found).__name__}; a list of rows is allowed")
    return SparkRows(found)
