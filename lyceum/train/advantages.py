"""Advantage estimators: from what each token earned to how much more likely it should become.

Why a table: PPO, GRPO and their relatives differ here more than anywhere else, and by a few lines. All of them have one
signature, so that an algorithm names its estimator (`lyceum.stages.algorithms`):

    gae               with a critic: a discounted sum of errors of the value (PPO)
    returns           without one: what is still to come (REINFORCE++)
    group_mean        of a response: its reward less the mean of its group (Dr.GRPO)
    group_score       the same in standard deviations of the group (GRPO)
    leave_one_out     its reward less the mean of the *others* in its group (RLOO)

A group is all responses to one prompt in one iteration. The last three give every token of a response the same number;
they see the sum of its token rewards, so a KL penalty in the rewards is part of what is compared. They are exactly 0
where a group's rewards do not differ: such a group teaches nothing (`num_flat_groups` counts them).

Conventions and shapes are those of `lyceum.train.policy`; G groups. What it is not: whitening over an iteration, which
needs the sums of all ranks (`policy.masked_whiten`), and samples of one group on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STD_EPS = 1e-4  # added to a group's standard deviation: TRL's, and of no weight where rewards differ at all

# (reward_BT, value_BT, mask_BT, group_B, gamma, lam) -> advantage_BT, return_BT; both 0 outside the mask
Estimator = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the chosen tokens of each row.

    delta_t = r_t + gamma V_next - V_t,  A_t = delta_t + gamma lam A_next,  return_t = A_t + V_t, where "next" is the
    next chosen token and everything past the last one is 0.

    Args:
        reward_BT, value_BT, mask_BT: see the module's conventions.
        gamma: discount. lam: trace decay.

    Returns:
        advantage_BT (not whitened) and return_BT, both 0 outside the mask.

    Source: Schulman et al. 2016, eq. 11 to 16; checklist items 21 and 22.
    """
    num_rows, num_positions = reward_BT.shape
    chosen_BT = mask_BT.bool()
    advantage_BT = torch.zeros_like(reward_BT)
    next_advantage_B = reward_BT.new_zeros(num_rows)
    next_value_B = reward_BT.new_zeros(num_rows)
    for t in reversed(range(num_positions)):
        here_B = chosen_BT[:, t]
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_advantage_B = torch.where(here_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(here_B, value_BT[:, t], next_value_B)
        advantage_BT[:, t] = torch.where(here_B, next_advantage_B, 0.0)
    return advantage_BT, (advantage_BT + value_BT).masked_fill(~chosen_BT, 0.0)


def returns(reward_BT: Tensor, mask_BT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """What a row still earns from each token on, discounted: GAE at lambda 1 with no critic.

    Source: Hu 2025 (REINFORCE++), where the token rewards hold the KL penalty.
    """
    return gae(reward_BT, torch.zeros_like(reward_BT), mask_BT, gamma, 1.0)


# ---------------------------------------------------------------- over groups


def group_mean(total_B: Tensor, group_B: Tensor) -> Tensor:
    """R_i - mean of the group.

    Source: Liu et al. 2025 (Dr.GRPO): the deviation of GRPO is left out, since it weighs easy and hard prompts
    more than those between.
    """
    mean_B, _, _ = _of_group(total_B, group_B)
    return _where_they_differ(total_B - mean_B, total_B, group_B)


def group_score(total_B: Tensor, group_B: Tensor) -> Tensor:
    """(R_i - mean) / (std + 1e-4) of the group, the deviation divided by n - 1.

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; n - 1 as in TRL, verl and OpenRLHF.
    """
    mean_B, std_B, _ = _of_group(total_B, group_B)
    return _where_they_differ((total_B - mean_B) / (std_B + STD_EPS), total_B, group_B)


def leave_one_out(total_B: Tensor, group_B: Tensor) -> Tensor:
    """R_i - mean of the others in the group: unbiased, since the baseline does not know the sample; 0 without others.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    mean_B, _, count_B = _of_group(total_B, group_B)
    gap_B = (total_B - mean_B) * count_B / (count_B - 1).clamp(min=1)
    return _where_they_differ(gap_B, total_B, group_B)


def num_flat_groups(value_B: Tensor, group_B: Tensor) -> tuple[int, int]:
    """(groups whose values are all equal, one-sample groups among them; groups)."""
    low_G, high_G, _ = _range(value_B, group_B)
    return int((low_G == high_G).sum()), int(low_G.numel())


def _of_group(total_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation (n - 1; 0 for one sample) and size of each row's group."""
    _, place_B, count_G = group_B.unique(return_inverse=True, return_counts=True)
    count_G = count_G.to(total_B.dtype)
    zeros_G = total_B.new_zeros(count_G.shape)
    mean_B = (zeros_G.index_add(0, place_B, total_B) / count_G)[place_B]
    square_G = zeros_G.index_add(0, place_B, (total_B - mean_B).square())
    std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
    return mean_B, std_G[place_B], count_G[place_B]


def _range(value_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups_G, place_B = group_B.unique(return_inverse=True)
    zeros_G = value_B.new_zeros(groups_G.shape)
    low_G = zeros_G.scatter_reduce(0, place_B, value_B, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, place_B, value_B, "amax", include_self=False)
    return low_G, high_G, place_B


def _where_they_differ(advantage_B: Tensor, total_B: Tensor, group_B: Tensor) -> Tensor:
    """Exactly 0 in a group of equal rewards, whose mean need not be one of them in floating point."""
    low_G, high_G, place_B = _range(total_B, group_B)
    return torch.where((low_G == high_G)[place_B], torch.zeros_like(advantage_B), advantage_B)


def _spread(per_response: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """An estimator out of one number for each response: every token of it gets that number."""

    def estimate(
        reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, group_B: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        total_B = reward_BT.double().masked_fill(~mask_BT.bool(), 0.0).sum(1)
        advantage_B = per_response(total_B, group_B).to(reward_BT.dtype)
        outside = ~mask_BT.bool()
        return (
            advantage_B.unsqueeze(1).expand_as(reward_BT).masked_fill(outside, 0.0),
            total_B.to(reward_BT.dtype).unsqueeze(1).expand_as(reward_BT).masked_fill(outside, 0.0),
        )

    return estimate


OVER_GROUPS = {"group_mean": group_mean, "group_score": group_score, "leave_one_out": leave_one_out}
ESTIMATORS: dict[str, Estimator] = {
    "gae": lambda reward, value, mask, group, gamma, lam: gae(reward, value, mask, gamma, lam),
    "returns": lambda reward, value, mask, group, gamma, lam: returns(reward, mask, gamma),
    **{name: _spread(per_response) for name, per_response in OVER_GROUPS.items()},
}
