"""Known answers for the advantage estimators: by hand, or by a second formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.train.advantages import (
    ESTIMATORS,
    OVER_GROUPS,
    gae,
    group_mean,
    group_score,
    leave_one_out,
    num_flat_groups,
    returns,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- with a critic


def test_gae_three_steps_by_hand() -> None:
    # r = (1, 0, 2), V = (0.5, 1, -1), gamma 0.9, lam 0.5
    # delta_3 = 2 + 1 = 3; delta_2 = 0 + .9(-1) - 1 = -1.9; delta_1 = 1 + .9(1) - .5 = 1.4
    # A_3 = 3; A_2 = -1.9 + .45*3 = -.55; A_1 = 1.4 + .45*(-.55) = 1.1525
    advantage, to_come = gae(tensor(1, 0, 2)[None], tensor(0.5, 1, -1)[None], torch.ones(1, 3), 0.9, 0.5)
    torch.testing.assert_close(advantage[0], tensor(1.1525, -0.55, 3.0))
    torch.testing.assert_close(to_come[0], tensor(1.6525, 0.45, 2.0))


def test_gae_with_lambda_one_is_rewards_to_go_minus_value() -> None:
    torch.manual_seed(0)
    reward, value, mask = torch.randn(4, 9).double(), torch.randn(4, 9).double(), torch.ones(4, 9)
    advantage, to_come = gae(reward, value, mask, 1.0, 1.0)
    to_go = reward.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantage, to_go - value)
    torch.testing.assert_close(to_come, to_go)


def test_gae_with_lambda_zero_is_the_td_error() -> None:
    torch.manual_seed(0)
    reward, value, mask = torch.randn(4, 9).double(), torch.randn(4, 9).double(), torch.ones(4, 9)
    advantage, _ = gae(reward, value, mask, 0.7, 0.0)
    following = torch.cat([value[:, 1:], torch.zeros(4, 1).double()], 1)
    torch.testing.assert_close(advantage, reward + 0.7 * following - value)


@settings(max_examples=25, deadline=None)
@given(left=st.integers(0, 3), right=st.integers(0, 4), hole=st.booleans())
def test_padding_and_forced_tokens_change_no_advantage(left: int, right: int, hole: bool) -> None:
    torch.manual_seed(1)
    reward, value = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    plain = gae(reward, value, torch.ones(2, 5), 0.9, 0.8)
    columns = [left + t + (1 if hole and t >= 2 else 0) for t in range(5)]
    total = left + 6 + right
    mask = torch.zeros(2, total)
    mask[:, columns] = 1
    noisy_reward, noisy_value = torch.zeros(2, total).double(), torch.full((2, total), 1e6).double()
    noisy_reward[:, columns], noisy_value[:, columns] = reward, value
    for padded, expected in zip(gae(noisy_reward, noisy_value, mask, 0.9, 0.8), plain, strict=True):
        torch.testing.assert_close(padded[:, columns], expected)
        assert padded[mask == 0].abs().sum() == 0


# ---------------------------------------------------------------- without one


def test_returns_by_hand_are_what_is_still_to_come() -> None:
    advantage, to_come = returns(tensor(1, 0, 2)[None], torch.ones(1, 3), 0.5)
    torch.testing.assert_close(advantage[0], tensor(1.5, 1.0, 2.0))  # 1 + (0 + 2 / 2) / 2, 0 + 2 / 2, 2
    torch.testing.assert_close(to_come, advantage)


REWARDS, GROUPS = tensor(1, 3, 8, 5, 5, 2, 2), torch.tensor([4, 4, 4, 7, 7, 9, 9])  # of groups of 3, 2 and 2


def test_group_estimators_by_hand() -> None:
    # the first group: mean 4, squared gaps 9 + 1 + 16 = 26, deviation sqrt(13); the others of each: 5.5, 4.5, 2
    torch.testing.assert_close(group_mean(REWARDS, GROUPS), tensor(-3, -1, 4, 0, 0, 0, 0))
    scale = math.sqrt(13) + 1e-4
    torch.testing.assert_close(group_score(REWARDS, GROUPS), tensor(-3, -1, 4, 0, 0, 0, 0) / scale)
    torch.testing.assert_close(leave_one_out(REWARDS, GROUPS), tensor(-4.5, -1.5, 6, 0, 0, 0, 0))


def test_leave_one_out_baseline_does_not_know_the_sample_and_the_mean_does() -> None:
    other = REWARDS.clone()
    other[0] += 100
    gained = {name: float((f(other, GROUPS) - f(REWARDS, GROUPS))[0]) for name, f in OVER_GROUPS.items()}
    assert gained["leave_one_out"] == pytest.approx(100)  # all of it: the baseline stayed where it was
    assert gained["group_mean"] == pytest.approx(100 * 2 / 3)  # the control


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_a_group_without_variance_is_exactly_zero_and_counted(name: str) -> None:
    equal = torch.full((7,), 0.1, dtype=torch.float64)  # whose mean is not 0.1 in floating point
    assert (OVER_GROUPS[name](equal, torch.zeros(7, dtype=torch.long)) == 0).all()
    assert (OVER_GROUPS[name](REWARDS, GROUPS)[3:] == 0).all()
    assert num_flat_groups(REWARDS, GROUPS) == (2, 3)
    assert num_flat_groups(REWARDS[:0], GROUPS[:0]) == (0, 0)


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_one_sample_alone_has_nothing_to_be_compared_with(name: str) -> None:
    assert OVER_GROUPS[name](tensor(5.0), torch.tensor([3])).tolist() == [0.0]


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_group_estimators_give_each_token_of_a_response_its_number_whatever_the_padding(name: str) -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]).bool()
    reward = torch.tensor([[9e9, 0.5, 0.5, 9e9], [9e9, 3, 9e9, 9e9], [9e9, 4, 3, 1]]).double()
    group = torch.zeros(3, dtype=torch.long)
    advantage, _ = ESTIMATORS[name](reward, reward * 0, mask, group, 1.0, 1.0)
    torch.testing.assert_close(advantage, OVER_GROUPS[name](tensor(1, 3, 8), group)[:, None] * mask)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_one_signature_and_ignores_what_is_outside_the_mask(name: str) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    reward, value, group = torch.randn(4, 4), torch.randn(4, 4), torch.tensor([0, 0, 1, 1])
    plain = ESTIMATORS[name](reward, value, mask, group, 0.9, 0.8)
    wild = ESTIMATORS[name](reward + 1e6 * ~mask, value - 1e6 * ~mask, mask, group, 0.9, 0.8)
    for one, two in zip(plain, wild, strict=True):
        torch.testing.assert_close(one, two)
        assert (one[~mask] == 0).all() and (one[mask] != 0).any()
