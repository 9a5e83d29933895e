"""Your own verifier: a function of a completion and its record. `own_verifier.yaml` names it, as `module:function`.

    PYTHONPATH=scripts/examples spark-vl recipes scripts/examples/own_verifier.yaml
    PYTHONPATH=scripts/examples spark-vl train --config scripts/configs/digits/spark.yaml \
        --data.recipes '[scripts/examples/own_verifier.yaml]' --output_dir runs/own-verifier
"""

from spark_vl import PromptRecord, Verdict
from spark_vl.answers import last_boxed


def nearly(completion: str, record: PromptRecord) -> Verdict:
    """Full marks for the right digit, half for one beside it. It runs in a process of its own, under a deadline."""
    answer = last_boxed(completion)
    if answer is None or not answer.isdecimal():
        return Verdict(0.0, answer, "unparsable", "there is no whole number in the last box")
    distance = abs(int(answer) - int(record.gold))
    return Verdict({0: 1.0, 1: 0.5}.get(distance, 0.0), answer)
