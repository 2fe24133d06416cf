"""Known answers for surrogates, the critic's loss and aggregators: by hand, or by a second formula."""

from __future__ import annotations

import math

import pytest
import torch

from lyceum.train.objectives import (
    AGGREGATORS,
    OBJECTIVES,
    Clip,
    clipped_policy_loss,
    clipped_value_loss,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- surrogates


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_pass_has_ratio_one_no_kl_no_clipping_and_the_reinforce_gradient(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    tokens, mask, advantage = torch.randint(6, (3, 4)), torch.ones(3, 4), torch.randn(3, 4).double()
    logp = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    loss, stats = OBJECTIVES[name](logp, logp.detach(), advantage, mask, Clip(0.2, 0.3, 3.0))
    assert (stats["ratio"] == 1).all() and stats["approxkl"].sum() == 0 and stats["clipfrac"].sum() == 0
    (surrogate,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantage * logp).sum(), logits)
    torch.testing.assert_close(surrogate, reinforce)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.5, 1.0, -1.2, True), (0.5, 1.0, -0.5, False), (1.5, -1.0, 1.5, False), (0.5, -1.0, 0.8, True)],
)
def test_clipped_objective_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    got, stats = clipped_policy_loss(
        tensor(math.log(ratio))[None], tensor(0.0)[None], tensor(advantage)[None], torch.ones(1, 1), Clip(0.2)
    )
    assert got.item() == pytest.approx(loss)
    assert stats["clipfrac"].item() == clipped
    assert stats["approxkl"].item() == pytest.approx(math.log(ratio) ** 2 / 2)


def test_clipped_value_loss_by_hand() -> None:
    # V_old 1, V 2 (clipped to 1.2), R 3: errors 1 and 3.24, the larger decides. V 2, R 1.1: errors .81 and .01.
    loss, clipped = clipped_value_loss(
        tensor(2, 2)[None], tensor(1, 1)[None], tensor(3, 1.1)[None], torch.ones(1, 2), 0.2
    )
    torch.testing.assert_close(loss[0], tensor(1.62, 0.405))
    assert clipped[0].tolist() == [1, 0]


def test_higher_and_dual_clips_by_hand() -> None:
    # ratio 1.5: the upper bound is 1.4, not 1.2. Ratio 4 at A = -1: the loss 4 is held at 3; with A = 1 nothing changes
    ratio, advantage = tensor(1.5, 4.0, 4.0)[None], tensor(1, -1, 1)[None]
    got, stats = clipped_policy_loss(ratio.log(), ratio * 0, advantage, torch.ones(1, 3), Clip(0.2, 0.4, 3.0))
    torch.testing.assert_close(got[0], tensor(-1.4, 3.0, -1.4))
    assert stats["clipfrac"].tolist() == [[1, 1, 1]]
    plain, _ = clipped_policy_loss(ratio.log(), ratio * 0, advantage, torch.ones(1, 3), Clip(0.2))
    torch.testing.assert_close(plain[0], tensor(-1.2, 4.0, -1.2))  # the control


# ---------------------------------------------------------------- aggregators


def test_aggregators_by_hand() -> None:
    # rows of 1 and 3 tokens with losses 6 and 1, 2, 3; a response may have 4 tokens
    loss, mask = torch.tensor([[6.0, 0, 0], [1, 2, 3]]), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    expected = {"token_mean": 12 / 4, "sequence_mean": (6 + 2) / 2, "sequence_sum": 12 / 2, "constant": 12 / 4 / 2}
    assert expected.keys() == AGGREGATORS.keys()
    for name, number in expected.items():
        rule = AGGREGATORS[name]
        assert float(rule.total(loss, mask, 4)) / rule.count(mask) == pytest.approx(number)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_split_batch_gives_the_gradient_of_the_whole_batch(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    states, tokens = torch.randn(8, 5, 6).double(), torch.randint(6, (8, 5))
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1))
    old, advantage, rule = torch.randn(8, 5).double() - 2, torch.randn(8, 5).double(), AGGREGATORS[name]

    def gradient(parts: list[slice], cut: int = 5) -> torch.Tensor:
        total, count = torch.zeros(()), sum(rule.count(mask[rows]) for rows in parts)
        for rows in parts:
            logp = torch.log_softmax(states[rows] @ weight, -1).gather(-1, tokens[rows, :, None])[..., 0]
            loss, _ = clipped_policy_loss(logp, old[rows], advantage[rows], mask[rows], Clip(0.2))
            total = total + rule.total(loss, mask[rows], cut) / count
        return torch.autograd.grad(total, weight)[0]

    whole = gradient([slice(0, 8)])
    torch.testing.assert_close(whole, gradient([slice(0, 1), slice(1, 3), slice(3, 8)]), rtol=1e-12, atol=1e-14)
    assert whole.abs().max() > 1e-3


def test_a_mean_of_micro_batch_means_would_not_do() -> None:  # the control
    loss, mask = torch.tensor([[6.0, 0, 0], [1, 2, 3]]), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    rule = AGGREGATORS["token_mean"]
    means = [float(rule.total(loss[i : i + 1], mask[i : i + 1], 4)) / rule.count(mask[i : i + 1]) for i in (0, 1)]
    assert sum(means) / 2 != pytest.approx(float(rule.total(loss, mask, 4)) / rule.count(mask))
