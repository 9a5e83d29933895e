"""The rows of `BytedTsinghua-SIA/DAPO-Math-17k`, each problem once.

The dataset repeats its about 17,000 problems to 1.8 million rows. A row has `prompt`, a chat of one turn that wraps the
problem in an instruction, and `reward_model` with the right answer as `ground_truth`. The instruction asks for a line
"Answer: …", where the kit reads a box; it is left out, so that the prompt does not ask for both.
"""

from __future__ import annotations

from spark_vl.data.sources import Row, Rows, Source, open_rows, read_column

REPO = "BytedTsinghua-SIA/DAPO-Math-17k"
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
BEHIND = '\n\nRemember to put your answer on its own line after "Answer:".'


class DapoRows:
    """The problems of the dataset, in the order in which they first appear.

    Args:
        rows: as they are published.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        first: dict[str, tuple[int, str]] = {}  # prompt → its first row, and the answer there
        self._disputed: set[int] = set()
        """First rows of problems to which later rows have another answer: nobody knows which is right."""
        for number, row in enumerate(zip(read_column(rows, "prompt"), read_column(rows, "reward_model"), strict=True)):
            prompt, answer = map(repr, row)
            earlier, found = first.setdefault(prompt, (number, answer))
            if found != answer:
                self._disputed.add(earlier)
        self._numbers = [number for number, _ in first.values()]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Row:
        """`question`, without the instruction around it, and `answer`.

        Raises:
            ValueError: the row is not as described in this module, or rows that repeat its problem answer otherwise.
        """
        row = self._rows[self._numbers[index]]
        if self._numbers[index] in self._disputed:
            raise ValueError("other rows repeat the problem with another answer")
        try:
            [turn] = row["prompt"]
            text, answer = str(turn["content"]), row["reward_model"]["ground_truth"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"the row is not a chat of one turn with an answer: {error!r:.100} in {row!r:.200}"
            ) from error
        question = text.removeprefix(BEFORE).removesuffix(BEHIND)
        if len(text) != len(BEFORE) + len(question) + len(BEHIND):
            raise ValueError(f"the problem does not stand in the instruction of the others: {text!r:.200}")
        return {"question": question, "answer": answer}


def rows(split: str) -> DapoRows:
    """The problems of `split`, which is downloaded unless it is in the cache.

    Raises:
        ValueError, OSError: see `open_rows`.
    """
    return DapoRows(open_rows(Source("hub", REPO), split, ("prompt", "reward_model"))[0])
