"""What an update makes small: the surrogate of the policy, the critic's error, and how many tokens become one number.

Why apart: a surrogate says what one token is worth, an aggregator how tokens and responses weigh against each other, and
each method is a choice of the two. Both are tables of functions with one signature, named by an algorithm
(`lyceum.stages.algorithms`).

Conventions and shapes are those of `lyceum.train.policy`. Nothing here averages: an aggregator gives each token its
weight, and the unit whose number over the whole step and all ranks divides the weighted sum. So the gradient is the
same however a step is cut into micro-batches or over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ---------------------------------------------------------------- surrogates


@dataclass(frozen=True)
class Clip:
    """How far a probability ratio may move: between 1 - low and 1 + high (None: high = low).

    dual: where the advantage is negative the loss is at most dual times its size, however far the ratio has grown;
    0 = no such bound (Ye et al. 2020, who take 3).
    """

    low: float = 0.2
    high: float | None = None
    dual: float = 0.0


# (logp_BT, logp_old_BT, advantage_BT, mask_BT, clip) -> loss_BT, statistics
Objective = Callable[[Tensor, Tensor, Tensor, Tensor, Clip], tuple[Tensor, dict[str, Tensor]]]


def clipped_policy_loss(
    logp_BT: Tensor, logp_old_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) per token, ratio = exp(logp - logp_old).

    Returns:
        loss_BT (0 outside the mask, not averaged) and per-token statistics without gradient, 0 outside the mask:
        ratio, approxkl = (logp - logp_old)^2 / 2, clipfrac (1 where a bound decides, and the gradient is 0).

    Source: Schulman et al. 2017, eq. 7; a higher `high` than `low`: Yu et al. 2025 (DAPO); checklist items 25 and 31.
    """
    outside = ~mask_BT.bool()
    change_BT = (logp_BT - logp_old_BT).masked_fill(outside, 0.0)
    ratio_BT = change_BT.exp()
    high = clip.low if clip.high is None else clip.high
    plain_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - clip.low, 1 + high)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    bounded_BT = clipped_BT > plain_BT
    if clip.dual:
        ceiling_BT = -advantage_BT * clip.dual
        too_far_BT = (advantage_BT < 0) & (loss_BT > ceiling_BT)
        loss_BT, bounded_BT = torch.where(too_far_BT, ceiling_BT, loss_BT), bounded_BT | too_far_BT
    return loss_BT.masked_fill(outside, 0.0), _statistics(change_BT, ratio_BT, bounded_BT, outside)


def reinforce_loss(
    logp_BT: Tensor, logp_old_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log pi per token: the gradient of the policy that sampled, and of no other; `clip` has no say.

    Returns:
        As `clipped_policy_loss`; clipfrac is 0.

    Source: Williams 1992; for language models Ahmadian et al. 2024.
    """
    outside = ~mask_BT.bool()
    change_BT = (logp_BT - logp_old_BT).masked_fill(outside, 0.0)
    loss_BT = (-advantage_BT * logp_BT).masked_fill(outside, 0.0)
    return loss_BT, _statistics(change_BT, change_BT.exp(), torch.zeros_like(outside), outside)


@torch.no_grad()
def _statistics(change_BT: Tensor, ratio_BT: Tensor, bounded_BT: Tensor, outside: Tensor) -> dict[str, Tensor]:
    return {
        "ratio": ratio_BT.masked_fill(outside, 0.0),
        "approxkl": 0.5 * change_BT.square(),
        "clipfrac": bounded_BT.to(change_BT.dtype).masked_fill(outside, 0.0),
    }


OBJECTIVES: dict[str, Objective] = {"clipped": clipped_policy_loss, "reinforce": reinforce_loss}

# ---------------------------------------------------------------- the critic


def clipped_value_loss(
    value_BT: Tensor, value_old_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 per token.

    Returns:
        loss_BT (not averaged) and clipfrac_BT (1 where the clipped branch decides); both 0 outside the mask.

    Source: Ziegler et al. 2019 (lm-human-preferences); checklist item 24.
    """
    outside = ~mask_BT.bool()
    clipped_BT = value_BT.clamp(value_old_BT - clip, value_old_BT + clip)  # exactly the value itself inside the range
    plain_error_BT = (value_BT - return_BT).square()
    clipped_error_BT = (clipped_BT - return_BT).square()
    loss_BT = (0.5 * torch.maximum(plain_error_BT, clipped_error_BT)).masked_fill(outside, 0.0)
    clipfrac_BT = (clipped_error_BT > plain_error_BT).to(loss_BT.dtype).masked_fill(outside, 0.0)
    return loss_BT, clipfrac_BT.detach()


# ---------------------------------------------------------------- aggregators


@dataclass(frozen=True)
class Aggregator:
    """How the tokens of many responses become one number: the weighted sum of their losses over all units of the step.

    weight: (mask_BT as numbers, longest) -> the weight of each token; `longest` is the most tokens a response may have.
    per_token: the unit is the token; otherwise the response.
    """

    weight: Callable[[Tensor, int], Tensor]
    per_token: bool

    def total(self, loss_BT: Tensor, mask_BT: Tensor, longest: int) -> Tensor:
        """The weighted sum over these rows."""
        return (loss_BT * self.weight(mask_BT.to(loss_BT.dtype), longest)).sum()

    def count(self, mask_BT: Tensor) -> float:
        """The units in these rows."""
        return float(mask_BT.sum()) if self.per_token else float(len(mask_BT))


AGGREGATORS = {
    # every token weighs the same, so a long response weighs more than a short one (PPO; DAPO)
    "token_mean": Aggregator(lambda mask_BT, longest: mask_BT, per_token=True),
    # every response weighs the same, so a token of a long one weighs less: long wrong answers are cheap (GRPO)
    "sequence_mean": Aggregator(
        lambda mask_BT, longest: mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1), per_token=False
    ),
    # log pi of a whole response, which is what the policy gradient asks for (RLOO)
    "sequence_sum": Aggregator(lambda mask_BT, longest: mask_BT, per_token=False),
    # the same over a constant, so that its size is that of a mean (Dr.GRPO)
    "constant": Aggregator(lambda mask_BT, longest: mask_BT / longest, per_token=False),
}
