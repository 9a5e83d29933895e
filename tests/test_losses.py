"""Each objective against a padded NumPy reference written from the papers, and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spark_vl.policy.losses import StepTotals, k3, policy_loss, token_weights

OBJECTIVES = ["grpo", "dr_grpo", "dapo", "gspo"]
LENGTHS = [3, 1, 4, 2]
ROW = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
TOTALS = StepTotals(completions=4, tokens=10, max_new_tokens=6)
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0, 0.7], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
SETTINGS = {"clip_low": 0.1, "clip_high": 0.15, "beta": 0.3, "entropy_bonus": 0.2}


def flat(seed: int) -> torch.Tensor:
    return -torch.rand(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.1


LOGPROBS, ENTROPIES = flat(0), flat(1).abs()
OLD = LOGPROBS - torch.tensor([0.4, 0.05, 0.3, 0.05, -0.5, -0.2, 0.1, -0.3, -0.05, 0.3], dtype=torch.float64)
REF = LOGPROBS + flat(2) + 0.6


def reference(objective, logprobs, entropies, old=OLD, ref=REF, *, clip_low, clip_high, beta, entropy_bonus) -> float:
    """The loss of the step, from [R, T] arrays padded with junk, as the papers write it."""

    def pad(values):
        padded = np.full((len(LENGTHS), max(LENGTHS)), 0.123)
        padded[mask] = np.asarray(values)
        return padded

    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    lengths = mask.sum(1, keepdims=True)
    logprobs, entropies, old, ref = pad(logprobs), pad(entropies), pad(old), pad(ref)
    advantages, weights = ADVANTAGES.numpy()[:, None], WEIGHTS.numpy()[:, None]
    ratio = np.exp(logprobs - old)
    if objective == "gspo":
        ratio = np.prod(ratio, axis=1, where=mask, keepdims=True) ** (1 / lengths)
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    kl = np.exp(ref) / np.exp(logprobs) - np.log(np.exp(ref) / np.exp(logprobs)) - 1
    loss = weights * np.where(mask, -surrogate + beta * kl - entropy_bonus * entropies, 0)
    match objective:
        case "grpo" | "gspo":
            return (loss.sum(1) / mask.sum(1)).mean()
        case "dr_grpo":
            return loss.sum(1).mean() / TOTALS.max_new_tokens
        case "dapo":
            return loss.sum() / mask.sum()


def loss_of(objective, logprobs, entropies, **changes) -> torch.Tensor:
    arguments = {"old_logprobs": OLD, "ref_logprobs": REF, **SETTINGS, **changes}
    return policy_loss(objective, logprobs, ADVANTAGES, ROW, WEIGHTS, TOTALS, entropies=entropies, **arguments)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_equal_the_padded_reference(objective):
    logprobs, entropies = LOGPROBS.clone().requires_grad_(), ENTROPIES.clone().requires_grad_()
    loss = loss_of(objective, logprobs, entropies)
    assert loss.item() == pytest.approx(reference(objective, LOGPROBS, ENTROPIES, **SETTINGS), rel=1e-12)

    found = torch.autograd.grad(loss, (logprobs, entropies))
    for position in range(2):
        for n in range(10):
            step = torch.zeros(10, dtype=torch.float64)
            step[n] = 1e-6
            up, down = (
                reference(
                    objective,
                    *(x + sign * step if i == position else x for i, x in enumerate((LOGPROBS, ENTROPIES))),
                    **SETTINGS,
                )
                for sign in (1, -1)
            )
            assert found[position][n].item() == pytest.approx((up - down) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reference_case_clips_on_both_sides_but_not_everywhere(objective):
    _, sums = policy_loss(
        objective, LOGPROBS, ADVANTAGES, ROW, WEIGHTS, TOTALS, clip_low=0.1, clip_high=0.15, old_logprobs=OLD
    )
    assert sums["clipped_low"].sum() > 0
    assert sums["clipped_high"].sum() > 0
    assert sums["clipped_low"].sum() + sums["clipped_high"].sum() < 10


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    def loss(logprobs, entropies):
        return loss_of(objective, logprobs, entropies)

    assert torch.autograd.gradcheck(loss, (LOGPROBS.clone().requires_grad_(), ENTROPIES.clone().requires_grad_()))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("packs", [[[0], [1, 2, 3]], [[2, 0], [3, 1]], [[0], [1], [2], [3]]])
def test_cutting_into_packs_changes_neither_loss_nor_gradient(objective, packs):
    whole = LOGPROBS.clone().requires_grad_()
    expected = loss_of(objective, whole, ENTROPIES)
    expected.backward()

    cut = LOGPROBS.clone().requires_grad_()
    total = 0.0
    for rows in packs:
        tokens = torch.cat([(r == ROW).nonzero()[:, 0] for r in rows])
        loss, sums = policy_loss(
            objective,
            cut[tokens],
            ADVANTAGES[rows],
            torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([LENGTHS[r] for r in rows])),
            WEIGHTS[rows],
            TOTALS,
            old_logprobs=OLD[tokens],
            ref_logprobs=REF[tokens],
            entropies=ENTROPIES[tokens],
            **SETTINGS,
        )
        assert sums["tokens"].tolist() == [LENGTHS[r] for r in rows]
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_completion_of_weight_zero_is_not_there(objective):
    logprobs = LOGPROBS.clone().requires_grad_()
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    loss = policy_loss(objective, logprobs, ADVANTAGES, ROW, weights, TOTALS, clip_low=0.1, clip_high=0.1)[0]
    loss.backward()
    assert torch.equal(logprobs.grad == 0, ROW == 2)


def test_on_policy_by_hand():
    """Two completions of 1 and 3 tokens, A = 2 and -1: ratio 1, gradient -A times the weight of a token."""
    row = torch.tensor([0, 1, 1, 1])
    totals = StepTotals(completions=2, tokens=4, max_new_tokens=5)
    expected = {
        "grpo": (-0.5, [-1.0, 1 / 6, 1 / 6, 1 / 6]),
        "gspo": (-0.5, [-1.0, 1 / 6, 1 / 6, 1 / 6]),
        "dr_grpo": (0.1, [-0.2, 0.1, 0.1, 0.1]),
        "dapo": (0.25, [-0.5, 0.25, 0.25, 0.25]),
    }
    for objective, (value, gradient) in expected.items():
        logprobs = torch.tensor([-0.3, -1.0, -2.0, -0.1], requires_grad=True)
        loss, sums = policy_loss(
            objective, logprobs, torch.tensor([2.0, -1.0]), row, torch.ones(2), totals, clip_low=0.2, clip_high=0.2
        )
        loss.backward()
        assert loss.item() == pytest.approx(value)
        assert logprobs.grad.tolist() == pytest.approx(gradient)
        assert sums["ratio"].tolist() == [1.0, 3.0]
        assert "kl" not in sums


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (2.0, 1.0, -1.28, 0.0, "clipped_high"),  # good enough already
        (0.5, -1.0, 0.8, 0.0, "clipped_low"),  # bad, and rare enough already
        (2.0, -1.0, 2.0, 2.0, None),  # bad and more frequent: never clipped
        (0.5, 1.0, -0.5, -0.5, None),  # good and rarer: never clipped
        (1.1, 1.0, -1.1, -1.1, None),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, gradient, clipped):
    for objective in OBJECTIVES:
        logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        found, sums = policy_loss(
            objective,
            logprobs,
            torch.tensor([advantage], dtype=torch.float64),
            torch.tensor([0]),
            torch.ones(1, dtype=torch.float64),
            StepTotals(1, 1, 1),
            clip_low=0.2,
            clip_high=0.28,
            old_logprobs=logprobs.detach() - math.log(ratio),
        )
        found.backward()
        assert found.item() == pytest.approx(loss)
        assert logprobs.grad.item() == pytest.approx(gradient)
        assert {name: sums[name].item() for name in ("clipped_low", "clipped_high")} == {
            "clipped_low": float(clipped == "clipped_low"),
            "clipped_high": float(clipped == "clipped_high"),
        }


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-4, 1e-5])
def test_k3_is_exact_near_the_reference_too(distance):
    """In float32, against float64: the policy of a small learning rate stays within 1e-4 for hundreds of updates."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = distance * torch.randn(100_000, generator=generator)
    found = k3(torch.zeros(100_000), log_ratio)
    exact = torch.exp(log_ratio.double()) - 1 - log_ratio.double() if distance > 1e-3 else log_ratio.double() ** 2 / 2
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=2e-3)
    assert found.min() >= -1e-6 * distance


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    policy, ref = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    estimates = k3(policy.log(), ref.log())
    assert (estimates >= 0).all()
    assert (policy * estimates).sum().item() == pytest.approx((policy * (policy / ref).log()).sum().item())


def test_diagnostics_are_sums_over_tokens_and_carry_no_gradient():
    loss, sums = policy_loss(
        "grpo", LOGPROBS.clone().requires_grad_(), ADVANTAGES, ROW, WEIGHTS, TOTALS,
        old_logprobs=OLD, ref_logprobs=REF, entropies=ENTROPIES, **SETTINGS,
    )  # fmt: skip
    assert loss.requires_grad
    assert not any(s.requires_grad for s in sums.values())
    ratio = (LOGPROBS - OLD).exp()
    for r in range(4):
        assert sums["tokens"][r] == LENGTHS[r]
        assert sums["ratio"][r].item() == pytest.approx(ratio[r == ROW].sum().item())
        assert sums["entropy"][r].item() == pytest.approx(ENTROPIES[r == ROW].sum().item())
        assert sums["kl"][r].item() == pytest.approx(k3(LOGPROBS, REF)[r == ROW].sum().item())
        outside = (ratio > 1.15) if ADVANTAGES[r] > 0 else (ratio < 0.9)
        assert sums["clipped_high"][r] + sums["clipped_low"][r] == outside[r == ROW].sum()


def test_a_missing_input_or_an_unknown_objective_is_an_error():
    call = (LOGPROBS, ADVANTAGES, ROW, WEIGHTS, TOTALS)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss("grpo", *call, clip_low=0.2, clip_high=0.2, beta=0.1)
    with pytest.raises(ValueError, match="entropies"):
        policy_loss("grpo", *call, clip_low=0.2, clip_high=0.2, entropy_bonus=0.1)
    with pytest.raises(ValueError, match="'ppo'"):
        token_weights("ppo", torch.ones(4), WEIGHTS, TOTALS)
