"""A trained model as a judge: is this answer right?

python scripts/examples/judge.py runs/digits/model picture.png "Which digit is larger?" 7
"""

import sys

from spark_vl import GenerativeReward


def judge(model: str, image: str, question: str, answer: str) -> str:
    """`right` or `wrong` with its probability, or `no verdict` where the model's reply gives none."""
    judgment = GenerativeReward.from_pretrained(model, dtype="float32").pointwise(question, [image], answer)
    if judgment.probability is None:
        return "no verdict"
    return f"{'right' if judgment.probability > 0.5 else 'wrong'} ({judgment.probability:.3f})"


if __name__ == "__main__":
    print(judge(*sys.argv[1:]))
