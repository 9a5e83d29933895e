"""The reference policy of the KL term computes as the policy does, at less memory."""

from __future__ import annotations

import pytest
import torch

from spark_vl.demo.tiny import random_tiny
from spark_vl.policy.packing import PackItem, make_pack
from spark_vl.policy.policy import Policy
from spark_vl.policy.update import cast_ahead
from tests.conftest import make_image, make_record
from tests.test_trained_parts import MATRICES

EMBEDDING = "model.language_model.embed_tokens.weight"


def make(*, tied: bool) -> Policy:
    """Float32 weights that bfloat16 would round."""
    model, _ = random_tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001)  # norms begin at 1 and biases at 0, which bfloat16 holds
    if tied:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return Policy(model, attention="sdpa", temperature=1.0, suppressed_token_ids=())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_cast_ahead_change_nothing_under_autocast(processor, tied):
    policy, reference = make(tied=tied), make(tied=tied)
    cast_ahead(reference, torch.bfloat16)
    prompt = processor.process(make_record("p", make_image(1), "Which digit is larger?"))
    pack = make_pack([PackItem(prompt, [[25, 26, 27], [28, 29]], [0, 1])], padding=processor.padding)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = policy(pack), reference(pack)
    assert torch.equal(found.logprobs, expected.logprobs)
    with torch.no_grad():
        assert not torch.equal(policy(pack).logprobs, expected.logprobs), "autocast did nothing"

    low = {name for name, p in reference.model.named_parameters() if p.dtype == torch.bfloat16}
    biases = {name for name, _ in reference.model.named_parameters() if name.endswith(".bias")}
    assert low == biases | MATRICES - {EMBEDDING} - ({"lm_head.weight"} if tied else set())
