"""Your own verifier: a function of a completion and its record, in a file beside the recipe that names it.

    spark-vl recipes scripts/examples/own_verifier.yaml
    spark-vl train --config scripts/configs/digits/spark.yaml \
        --data.recipes '[scripts/examples/own_verifier.yaml]' --output_dir runs/own-verifier
"""

from spark_vl import PromptRecord, Verdict, last_boxed

SETTINGS = {"neighbor": 0.5}  # what recipes may set, and the defaults; leave it out if there is nothing to set


def nearly(completion: str, record: PromptRecord) -> Verdict:
    """Full marks for the right digit, half for one beside it. It runs in a process of its own, under a deadline."""
    answer = last_boxed(completion)
    if answer is None or not answer.isdecimal():
        return Verdict(0.0, answer, "unparsable", "there is no whole number in the last box")
    neighbor = (SETTINGS | dict(record.settings))["neighbor"]
    distance = abs(int(answer) - int(record.gold))
    return Verdict({0: 1.0, 1: neighbor}.get(distance, 0.0), answer)


def exactly(completion: str, record: PromptRecord) -> bool:
    """Where there is no more to say than right or wrong, a bool will do, or a number from 0 to 1."""
    return last_boxed(completion) == record.gold
