"""Known answers for the preference losses: by hand, by their papers' own forms, by enumeration on a table of responses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lyceum.batches.preferences import Sides
from lyceum.errors import ConfigError
from lyceum.train import preference
from lyceum.train.preference import PRESETS, Objective, objective

PAIRED = [name for name, preset in PRESETS.items() if preset.is_paired]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair(probability: float = 1.0) -> Sides:
    """Row 0 was preferred to row 1."""
    return Sides(torch.tensor([0]), torch.tensor([1]), tensor(1.0), tensor(probability))


def loss_of(
    chosen: Objective, logp: torch.Tensor, reference: torch.Tensor, length: torch.Tensor, sides: Sides, kl: float = 0.0
) -> torch.Tensor:
    return chosen.loss(chosen.reward(logp, reference, length), sides, chosen, kl)


LOGP, REFERENCE, LENGTH = tensor(-6.0, -9.0), tensor(-7.0, -8.0), tensor(4.0, 3.0)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "cdpo"])
def test_a_policy_that_is_its_reference_has_the_loss_log_two(name: str) -> None:
    assert loss_of(objective(name), REFERENCE, REFERENCE, LENGTH, pair()).item() == pytest.approx(
        math.log(2), abs=1e-12
    )


def test_dpo_by_hand() -> None:
    # log ratios +1 and -1: a margin of 2 beta = 0.2
    logp = LOGP.clone().requires_grad_()
    loss = loss_of(objective("dpo"), logp, REFERENCE, LENGTH, pair())
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.2)))
    loss.backward()
    slope = 0.1 / (1 + math.exp(0.2))  # beta sigmoid(-margin)
    torch.testing.assert_close(logp.grad, tensor(-slope, slope))


def test_length_normalised_dpo_by_hand() -> None:
    margin = 5.0 * (1 / 4 + 1 / 3)
    loss = loss_of(objective("dpo_norm"), LOGP, REFERENCE, LENGTH, pair())
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))


def test_conservative_dpo_is_dpo_without_smoothing_and_its_minimum_is_at_the_log_odds_of_the_labels() -> None:
    plain, smooth = objective("dpo"), objective("cdpo", label_smoothing=0.2)
    assert loss_of(objective("cdpo", label_smoothing=0.0), LOGP, REFERENCE, LENGTH, pair()) == loss_of(
        plain, LOGP, REFERENCE, LENGTH, pair()
    )
    # labels right four times in five: the best margin is log(0.8 / 0.2), where the gradient vanishes
    logp = tensor(math.log(4) / 0.1, 0.0).requires_grad_()
    loss_of(smooth, logp, tensor(0, 0), LENGTH, pair()).backward()
    torch.testing.assert_close(logp.grad, tensor(0, 0), atol=1e-12, rtol=0)
    # a label that is itself uncertain: 0.7 smoothed by 0.2 is 0.7 * 0.8 + 0.3 * 0.2 = 0.62
    logp = tensor(math.log(0.62 / 0.38) / 0.1, 0.0).requires_grad_()
    loss_of(smooth, logp, tensor(0, 0), LENGTH, pair(0.7)).backward()
    torch.testing.assert_close(logp.grad, tensor(0, 0), atol=1e-12, rtol=0)


def test_ipo_is_zero_at_its_target_and_squared_around_it() -> None:
    chosen = objective("ipo", beta=0.25)  # target: a difference of log ratios of 1 / (2 * 0.25) = 2
    assert loss_of(chosen, LOGP, REFERENCE, LENGTH, pair()).item() == pytest.approx(0.0, abs=1e-12)
    assert loss_of(chosen, LOGP + tensor(3, 0), REFERENCE, LENGTH, pair()).item() == pytest.approx(9.0)
    assert loss_of(chosen, REFERENCE, REFERENCE, LENGTH, pair()).item() == pytest.approx(4.0)
    # with a label of 0.75 the best difference is (2 * 0.75 - 1) * 2 = 1
    logp = tensor(1.0, 0.0).requires_grad_()
    loss_of(chosen, logp, tensor(0, 0), LENGTH, pair(0.75)).backward()
    torch.testing.assert_close(logp.grad, tensor(0, 0), atol=1e-12, rtol=0)


def test_simpo_is_per_token_has_a_margin_and_needs_no_reference() -> None:
    # 2 (-6/4 + 9/3) - 1 = 2
    chosen = objective("simpo")
    assert loss_of(chosen, LOGP, REFERENCE, LENGTH, pair()).item() == pytest.approx(math.log(1 + math.exp(-2.0)))
    assert not chosen.uses_reference
    # a response said twice over has twice the log-probability and the same reward
    torch.testing.assert_close(
        chosen.reward(2 * LOGP, REFERENCE, 2 * LENGTH), chosen.reward(LOGP, REFERENCE, LENGTH), rtol=0, atol=1e-12
    )


def test_orpo_compares_odds_and_survives_certainty() -> None:
    # probabilities per token 0.8 and 0.2: odds of 4 and 1/4, so the loss is log(1 + 1/16)
    logp = tensor(3 * math.log(0.8), 2 * math.log(0.2))
    chosen = objective("orpo")
    loss = loss_of(chosen, logp, tensor(0, 0), tensor(3, 2), pair())
    assert loss.item() == pytest.approx(math.log(1 + 1 / 16))
    assert (chosen.weight, chosen.nll, chosen.uses_reference) == (0.1, 1.0, False)
    certain = tensor(0.0, -800.0).requires_grad_()
    found = loss_of(chosen, certain, tensor(0, 0), tensor(1, 1), pair())
    found.backward()
    assert torch.isfinite(found) and certain.grad is not None and torch.isfinite(certain.grad).all()


def test_kto_by_hand_and_what_the_kl_does() -> None:
    # rewards 0.1 * (1, -1) less 0.1 * kl of 0.5: good 1 - sigmoid(0.05), bad sigmoid(-0.15)
    sides = Sides(torch.tensor([0]), torch.tensor([1]), tensor(), tensor())
    chosen = objective("kto", good_weight=1.5, bad_weight=2.0)
    logp = LOGP.clone().requires_grad_()
    loss = loss_of(chosen, logp, REFERENCE, LENGTH, sides, kl=0.5)
    good, bad = 1 / (1 + math.exp(-0.05)), 1 / (1 + math.exp(0.15))
    assert loss.item() == pytest.approx(1.5 * (1 - good) + 2.0 * bad)
    loss.backward()
    torch.testing.assert_close(logp.grad, 0.1 * tensor(-1.5 * good * (1 - good), 2.0 * bad * (1 - bad)))
    at_first = loss_of(objective("kto"), REFERENCE, REFERENCE, LENGTH, sides)
    assert at_first.item() == pytest.approx(1.0)  # half a unit for each response


# ---------------------------------------------------------------- what all have in common


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sides]:
    """Five responses: a prompt with three of them (three pairs) and one with two."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([3.0, 7.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    logp, reference = (-length * torch.rand(2, 5, generator=generator, dtype=torch.float64) - 0.1).unbind()
    better, worse = torch.tensor([0, 0, 1, 4]), torch.tensor([1, 2, 2, 3])
    return logp, reference, length, Sides(better, worse, tensor(1 / 3, 1 / 3, 1 / 3, 1), tensor(1, 0.9, 0.7, 0.5))


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logp, reference, length, sides = random_case()

    def total(logp: torch.Tensor) -> torch.Tensor:
        return loss_of(objective(name), logp, reference, length, sides, kl=0.3)

    assert torch.autograd.gradcheck(total, (logp.requires_grad_(),))


@pytest.mark.parametrize("name", PAIRED)
def test_the_loss_of_a_ranking_is_the_mean_of_its_pairs(name: str) -> None:
    logp, reference, length, sides = random_case()
    chosen = objective(name)

    def alone(p: int) -> float:
        rows = torch.stack([sides.better_P[p], sides.worse_P[p]])
        return loss_of(chosen, logp[rows], reference[rows], length[rows], pair(float(sides.probability_P[p]))).item()

    whole = loss_of(chosen, logp, reference, length, sides).item()
    assert whole == pytest.approx((alone(0) + alone(1) + alone(2)) / 3 + alone(3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_down_the_gradient_raises_the_better_and_lowers_the_worse(name: str) -> None:
    sides = pair() if name in PAIRED else Sides(torch.tensor([0]), torch.tensor([1]), tensor(), tensor())
    logp = tensor(-8.0, -8.0).requires_grad_()
    loss_of(objective(name), logp, tensor(-8, -8), tensor(4, 4), sides).backward()
    assert logp.grad is not None and logp.grad[0] < 0 < logp.grad[1]


# ---------------------------------------------------------------- the optimum on a table of responses


def minimum(loss: Callable[[torch.Tensor], torch.Tensor], size: int) -> torch.Tensor:
    """Log-probabilities that minimise `loss`, over all distributions of `size` responses."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, history_size=50)

    def closure() -> torch.Tensor:
        descent.zero_grad()
        found = loss(torch.log_softmax(logits, 0))
        found.backward()
        return found

    descent.step(closure)
    return torch.log_softmax(logits.detach(), 0)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward() -> None:
    # every pair, with the label that Bradley and Terry give it: the best policy is pi_ref exp(r / beta) / Z
    size, beta = 6, 0.5
    generator = torch.Generator().manual_seed(1)
    reward = torch.randn(size, generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(size, generator=generator, dtype=torch.float64), 0)
    better, worse = torch.combinations(torch.arange(size)).unbind(1)
    sides = Sides(better, worse, torch.ones(15).double(), torch.sigmoid(reward[better] - reward[worse]))
    length, chosen = torch.ones(size).double(), objective("dpo", beta=beta)
    found = minimum(lambda logp: loss_of(chosen, logp, reference, length, sides), size)
    torch.testing.assert_close(found, torch.log_softmax(reference + reward / beta, 0), atol=1e-5, rtol=0)
    # and the implicit reward is the reward, up to a number for the prompt
    implicit = chosen.reward(found, reference, length)
    torch.testing.assert_close(implicit - implicit.mean(), reward - reward.mean(), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_where_everybody_agrees_dpo_runs_away_and_ipo_stops_at_its_target() -> None:
    reference, sides = torch.log_softmax(tensor(0.3, -0.2), 0), pair()

    def difference(name: str) -> float:
        chosen = objective(name, beta=0.5)
        found = minimum(lambda logp: loss_of(chosen, logp, reference, tensor(1, 1), sides), 2)
        return float((found - reference)[0] - (found - reference)[1])

    assert difference("ipo") == pytest.approx(1.0, abs=1e-6)  # 1 / (2 beta)
    assert difference("dpo") > 10


# ---------------------------------------------------------------- log-probabilities, refusals


class Table(torch.nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.output_weight = torch.randn(7, 7, generator=generator, dtype=torch.float64)

    def forward(self, tokens_BT: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens_BT, 7).double().flatten(0, 1)[at_N]


def test_a_responses_log_probability_is_the_sum_over_its_own_tokens_whatever_the_padding() -> None:
    model = Table()
    logp = torch.log_softmax(model.output_weight.T, 1)
    by_hand = [float(logp[2, 3] + logp[3, 1]), float(logp[5, 1])]
    for width in (4, 9):
        tokens = torch.full((2, width), 6)
        tokens[0, :4], tokens[1, :3] = torch.tensor([4, 2, 3, 1]), torch.tensor([0, 5, 1])
        found = preference.response_logprobs(model, tokens, torch.tensor([2, 2]), torch.tensor([4, 3]))
        assert found.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dppo", {}, "did you mean 'dpo'"),
        ("dpo", {"beta": 0.0}, "beta is above 0"),
        ("ipo", {"margin": 0.5}, "belongs to Bradley-Terry"),
        ("kto", {"margin": 0.5}, "belongs to Bradley-Terry"),
        ("cdpo", {"label_smoothing": 0.5}, "say nothing, or the opposite"),
        ("kto", {"label_smoothing": 0.1}, "single responses are good or bad"),
        ("kto", {"nll": 0.1}, "nothing is to be copied"),
        ("dpo", {"good_weight": 2.0}, "they weigh single responses"),
        ("orpo", {"nll": 0.0}, "keep nll above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(name: str, changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        objective(name, **changes)
