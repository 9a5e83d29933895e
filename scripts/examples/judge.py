"""A trained model as a judge: is this answer right?

python scripts/examples/judge.py runs/digits/model picture.png "Which digit is larger?" 7
"""

import random
import sys
from pathlib import Path

import torch

from spark_vl import ImageRef, ModelConfig, PromptConfig, PromptRecord
from spark_vl.evaluation.checkpoint import find_templater
from spark_vl.families.registry import find_family
from spark_vl.policy.policy import load_policy
from spark_vl.rollout import Sampling, TransformersEngine


def judge(model: str, image: str, question: str, answer: str) -> str:
    """`right`, `wrong`, or `no verdict` where the model's reply gives none."""
    config = ModelConfig(path=model, dtype="float32")
    family = find_family(config)
    processor = family.load_processor(config, max_prompt_tokens=8192)
    suppressed = processor.suppressed_token_ids
    policy = load_policy(config, dtype=torch.float32, temperature=1.0, suppressed_token_ids=suppressed)
    engine = TransformersEngine(policy, processor, decode_batch_size=1)

    asked = (ImageRef(data=Path(image).read_bytes()), question)
    templater = find_templater(PromptConfig(), config, family.reserved)  # the prompts that the model was trained on
    prompt = templater.pointwise(asked, answer, correct=True, rng=random.Random(0))
    problem = PromptRecord("judge", "problem", (), asked, gold=answer, verifier="text", recipe="judge")
    record = prompt.record(problem, "pointwise", id="judge#pointwise")
    [group] = engine.generate([processor.process(record)], 1, Sampling(temperature=0.0, max_new_tokens=256))

    label = templater.templates[prompt.template].parse(group.rollouts[0].text)
    return "no verdict" if label is None else "right" if label == prompt.gold else "wrong"


if __name__ == "__main__":
    print(judge(*sys.argv[1:]))
