"""Packed log-probabilities, losses and gradients against the plain padded computation."""

from __future__ import annotations

import pytest
import torch

from spark_vl.demo.tiny import random_tiny
from spark_vl.policy.packing import PROMPT, PackItem, attention_mask, pack_items
from tests.conftest import make_image, make_record
from tests.padded_reference import padded_logprobs

RAGGED = [[5, 9, 12], [30], [7, 7, 7, 8, 90, 101, 44], [60, 61], [11, 12, 13, 14, 15]]


def make_prompts(processor):
    """Prompts with one, no and three images, of different sizes."""
    return [
        processor.process(make_record("one", make_image(1), "Which digit is larger?")),
        processor.process(make_record("none", "Name a digit.")),
        processor.process(
            make_record(
                "three", "First ", make_image(2, (112, 56)), " then ", make_image(3), make_image(4, (84, 140)), "?"
            )
        ),
    ]


def make_items(processor):
    """Every prompt with ragged completions; rows count on."""
    items, row = [], 0
    for prompt, completions in zip(make_prompts(processor), (RAGGED, RAGGED[:2], RAGGED[2:]), strict=True):
        items.append(PackItem(prompt, completions, list(range(row, row + len(completions)))))
        row += len(completions)
    return items


def pack(processor, items, tokens_per_pack):
    return pack_items(items, tokens_per_pack=tokens_per_pack, padding=processor.padding)


def packed_rows(policy, packs, n_rows):
    """Log-probabilities by completion, wherever it was packed."""
    rows = [None] * n_rows
    for one in packs:
        logprobs = policy(one).logprobs
        for row in one.row_N.unique().tolist():
            assert rows[row] is None, "a completion stands in two packs"
            rows[row] = logprobs[one.row_N == row]
    return rows


# Long enough for everything; one group a pack; so short that groups are cut over several packs.
@pytest.mark.parametrize(
    ("attention", "tokens_per_pack", "n_packs"),
    [("sdpa", 4096, 1), ("sdpa", 110, 2), ("sdpa", 70, 4), ("flex", 4096, 1)],
)
def test_packed_logprobs_and_gradients_equal_padded(processor, make_policy, attention, tokens_per_pack, n_packs):
    # FlexAttention has no float64 on CPU and no backward pass there: its forward pass is compared, in float32.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    items = make_items(processor)
    n_rows = sum(len(item.completions) for item in items)
    policy = make_policy(dtype, attention=attention, suppress=False)
    reference, _ = random_tiny(seed=0, dtype=dtype)
    expected = [logprobs for item in items for logprobs in padded_logprobs(reference, item.prompt, item.completions)]
    packs = pack(processor, items, tokens_per_pack)
    assert len(packs) == n_packs
    with torch.set_grad_enabled(attention == "sdpa"):
        rows = packed_rows(policy, packs, n_rows)
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    for got, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    if attention == "flex":
        return

    weights = torch.randn(sum(map(len, rows)), dtype=dtype, generator=torch.Generator().manual_seed(0))
    (torch.cat(rows) * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    got = dict(policy.model.named_parameters())
    compared = 0
    for name, parameter in reference.named_parameters():
        scale = float(parameter.grad.norm())
        assert scale > 0, f"{name} has no gradient: nothing would be compared"
        assert float((got[name].grad - parameter.grad).norm()) <= 1e-6 * scale, name
        compared += 1
    assert compared == len(got)


def test_suppressed_tokens_and_temperature_are_those_of_sampling(processor, make_policy):
    item = make_items(processor)[0]
    policy = make_policy(torch.float64, temperature=0.7)
    reference, _ = random_tiny(seed=0, dtype=torch.float64)
    ids = torch.cat([item.prompt.input_ids, torch.tensor(RAGGED[0])])[None]
    logits = reference(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        pixel_values=item.prompt.images[0].pixel_values,
        image_grid_thw=item.prompt.images[0].grid_thw[None],
    ).logits[0, len(item.prompt.input_ids) - 1 : -1]
    probabilities = (logits / 0.7).exp()
    probabilities[:, list(processor.suppressed_token_ids)] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    scores = policy(pack(processor, [PackItem(item.prompt, RAGGED[:1], [0])], 4096)[0])
    torch.testing.assert_close(
        scores.logprobs.exp(), probabilities[torch.arange(3), torch.tensor(RAGGED[0])], rtol=1e-9, atol=0
    )
    entropy = torch.distributions.Categorical(probs=probabilities).entropy()
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-9, atol=0)


def test_chunks_of_the_head_change_nothing(processor, make_policy, monkeypatch):
    packs = pack(processor, make_items(processor), 4096)
    gradients = []
    for logits_at_once in (2**26, 3 * 320):  # all tokens together; three at a time
        monkeypatch.setattr("spark_vl.policy.head.LOGITS_AT_ONCE", logits_at_once)
        policy = make_policy(torch.float64)
        policy(packs[0]).logprobs.square().sum().backward()
        gradients.append(policy.model.lm_head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_mask_is_who_may_see_whom_token_by_token(processor):
    (one,) = pack(processor, make_items(processor), 4096)
    mask = attention_mask(one, "sdpa")[0, 0]
    item, segment = one.item_T.tolist(), one.segment_T.tolist()
    for query in range(0, len(item), 7):
        for key in range(len(item)):
            allowed = key <= query and item[key] == item[query] and segment[key] in (PROMPT, segment[query])
            assert bool(mask[query, key]) == allowed


def test_a_completion_that_fits_no_pack_is_named(processor):
    prompt = make_prompts(processor)[0]
    with pytest.raises(ValueError, match=r"one: a prompt of \d+ tokens and a completion of 40 .*tokens_per_pack = 50"):
        pack(processor, [PackItem(prompt, [[5] * 40], [0])], 50)
