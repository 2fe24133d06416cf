"""Token algebra: the pure functions that reward modelling, PPO and its relatives are made of.

Why: what differs between these methods is small (where the scalar comes from, how it becomes a weight per token, which
surrogate is used), and every mistake peers made here was a mask, an index or a mean. So each step is one function over
tensors with an explicit mask, and each has a known-answer test in `tests/train/test_policy.py`. Advantages and objectives,
in which the methods differ, stand in `lyceum.train.advantages` and `lyceum.train.objectives`.

Conventions, the same everywhere in the house:

- B rows (episodes or responses), T positions, N flat chosen tokens, D width, V vocabulary, P pairs. Rows are
  right-padded; the prompt stands in the row too.
- Index t means "token t of the row": `logp_BT[b, t]` is the log-probability with which token t was chosen,
  `value_BT[b, t]` the value of the state in which it was chosen (the critic's output at position t - 1),
  `reward_BT[b, t]` what choosing it earned. `mask_BT` is 1 (True) on tokens that the policy chose, 0 on the prompt, on
  forced tokens and on padding.
- Nothing here averages silently: objectives are per token, and the caller divides by a count that it took over the
  whole step and all ranks.

What it is not: it knows no model, optimizer, tokenizer or rank; sums over ranks are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lyceum.train.losses import token_logprobs

# ---------------------------------------------------------------- log-probabilities


def predicting(mask_BT: Tensor) -> Tensor:
    """Positions b T + t of the hidden states that predict the masked tokens, in their order; column 0 must be 0."""
    chosen_BT = mask_BT.bool()
    assert not bool(chosen_BT[:, 0].any()), "column 0 has no prefix that could predict it"
    return chosen_BT.flatten().nonzero().squeeze(1) - 1


def chosen_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the masked tokens, from the hidden states that predict them and no others.

    The hidden state at position t - 1 predicts token t: see `predicting`.

    Args:
        hidden_ND: hidden states after the final norm, at the positions `predicting(mask_BT)`.
        head_VD: output embedding.
        tokens_BT: ids.
        mask_BT: 1 on the tokens to score.
        temperature: > 0.
        with_entropy: also return the entropy of each choice (without gradient).

    Returns:
        logp_BT and entropy_BT (all 0 unless asked for); both exactly 0 outside the mask.
    """
    chosen_BT = mask_BT.bool()
    numbers = token_logprobs(hidden_ND, head_VD, tokens_BT[chosen_BT], temperature, with_entropy=with_entropy)
    logp_BT, entropy_BT = (x_N.new_zeros(tokens_BT.shape).masked_scatter(chosen_BT, x_N) for x_N in numbers)
    return logp_BT, entropy_BT


# ---------------------------------------------------------------- masked statistics


def masked_sum(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the mask; what stands outside it, infinities included, has no influence."""
    return value_BT.masked_fill(~mask_BT.bool(), 0.0).sum()


def masked_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the mask; 0 where the mask is empty."""
    return masked_sum(value_BT, mask_BT) / mask_BT.sum().clamp(min=1)


def moment_sums(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[count, sum, sum of squares] over the mask in float64: three numbers that may be added over batches and ranks."""
    value = value_BT.detach().double().masked_fill(~mask_BT.bool(), 0.0)
    return torch.stack([mask_BT.sum().double(), value.sum(), value.square().sum()])


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (divided by n, not n - 1) from `moment_sums`; (0, 0) for an empty set."""
    count = sums[0].clamp(min=1.0)
    mean = sums[1] / count
    return mean, (sums[2] / count - mean.square()).clamp(min=0.0)


def masked_whiten(
    value_BT: Tensor, mask_BT: Tensor, sums: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """(value - mean) / sqrt(var + eps) on the mask, 0 outside it.

    Args:
        value_BT: values.
        mask_BT: which of them are real.
        sums: `moment_sums` of the whole rollout batch over all ranks; None takes this tensor's own.
        shift_mean: False divides by the standard deviation and leaves the mean where it is (rewards).
        eps: added to the variance.

    Source: Ziegler et al. 2019 (lm-human-preferences), biased variance; alignment checklist items 19 and 23.
    """
    mean, var = mean_and_variance(moment_sums(value_BT, mask_BT) if sums is None else sums)
    scaled = (value_BT.double() - mean) / (var + eps).sqrt()
    if not shift_mean:
        scaled = scaled + mean / (var + eps).sqrt()
    return scaled.to(value_BT.dtype).masked_fill(~mask_BT.bool(), 0.0)


def explained_variance(residual_sums: Tensor, return_sums: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, below 0 for a harmful one.

    Both arguments are `moment_sums`, of R - V and of R. Where the returns do not vary the answer is 0.
    """
    _, residual_var = mean_and_variance(residual_sums)
    _, return_var = mean_and_variance(return_sums)
    return float(1 - residual_var / return_var) if float(return_var) > 1e-12 else 0.0


# ---------------------------------------------------------------- KL and rewards


def kl_estimate(logp_BT: Tensor, logp_ref_BT: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens that were sampled from pi; x = logp - logp_ref.

    k1 = x (exact in expectation, may be negative on one token), k2 = x^2 / 2 (biased, small variance; as a *loss* its
    on-policy gradient is that of KL(pi || pi_ref)), k3 = exp(-x) - 1 + x (exact in expectation, never negative).

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    x = logp_BT - logp_ref_BT
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x.square()
    assert kind == "k3", f"kl kind {kind!r}: expected k1, k2 or k3"
    return torch.expm1(-x) + x


def last_index(mask_BT: Tensor) -> Tensor:
    """Position of the last masked token of each row (B,); rows without one are our own mistake."""
    assert bool(mask_BT.any(dim=1).all()), "every row needs at least one chosen token"
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (positions_T * mask_BT.bool()).amax(dim=1)


def apply_missing_end(score_B: Tensor, ended_B: Tensor, value: float, how: str) -> Tensor:
    """Scores after the missing-end rule for responses that did not stop by themselves.

    `how="replace"`: such a response scores exactly `value`, whatever the reward model thought (Ziegler et al. 2019;
    Huang et al. 2024); `how="subtract"`: `value` is subtracted from its score (TRL); `how="keep"`: no rule.
    Checklist item 13.
    """
    if how == "replace":
        return torch.where(ended_B.bool(), score_B, torch.full_like(score_B, value))
    if how == "subtract":
        return score_B - value * (~ended_B.bool()).to(score_B.dtype)
    assert how == "keep", f"missing-end rule {how!r}: expected replace, subtract or keep"
    return score_B


def token_rewards(kl_BT: Tensor, mask_BT: Tensor, score_B: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t on every chosen token, plus the score on the last one; 0 elsewhere.

    Source: Ouyang et al. 2022, eq. 2; checklist items 15 and 16 (the score stands on the last real token itself).
    """
    reward_BT = (-beta * kl_BT).masked_fill(~mask_BT.bool(), 0.0)
    return reward_BT.scatter_add(1, last_index(mask_BT).unsqueeze(1), score_B.to(reward_BT.dtype).unsqueeze(1))


@dataclass
class AdaptiveKL:
    """The KL coefficient and its proportional controller in log space.

    e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta (1 + e n / horizon), where KL is the mean over episodes of the
    *sum* over response tokens against the reference, and n the number of episodes. A target of 0 keeps beta fixed.

    Source: Ziegler et al. 2019, section 2.2; checklist item 18.
    """

    beta: float
    target: float = 0.0
    horizon: float = 10_000.0

    def update(self, kl: float, num_episodes: float) -> float:
        """Moves beta after a batch of `num_episodes` with mean KL `kl` (nats per response); returns the new beta."""
        if self.target > 0:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.beta *= 1.0 + error * num_episodes / self.horizon
        return self.beta


# ---------------------------------------------------------------- rankings


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to the same prompt: `better_P` and `worse_P` are row numbers, `group_P` the prompt's number,
    `weight_P` is 1 / (pairs of that prompt), so that a weighted sum is a sum over prompts of means over pairs."""

    better_P: Tensor
    worse_P: Tensor
    group_P: Tensor
    weight_P: Tensor

    def __len__(self) -> int:
        return int(self.better_P.numel())

    @property
    def num_groups(self) -> int:
        """Prompts that have at least one pair."""
        return int(self.group_P.unique().numel())


def ranking_pairs(rank_B: Tensor, group_B: Tensor, *, ties: bool = False) -> Pairs:
    """Every pair that a ranking decides: same prompt, smaller rank (1 = best) first.

    Args:
        rank_B: ranks, floats allowed, ties allowed.
        group_B: prompt number of each response.
        ties: whether two responses of the same rank make a pair too, the first of them called better; else they make none.
    """
    same_BB = group_B.unsqueeze(1) == group_B.unsqueeze(0)
    chosen_BB = same_BB & (rank_B.unsqueeze(1) < rank_B.unsqueeze(0))
    if ties:
        chosen_BB |= (same_BB & (rank_B.unsqueeze(1) == rank_B.unsqueeze(0))).triu(1)
    better_P, worse_P = chosen_BB.nonzero(as_tuple=True)
    group_P = group_B[better_P]
    _, inverse_P, pairs_in_group = group_P.unique(return_inverse=True, return_counts=True)
    return Pairs(better_P, worse_P, group_P, 1.0 / pairs_in_group[inverse_P].double())


def pair_loss(
    margin_P: Tensor, *, required_margin: float | Tensor = 0.0, probability_P: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss of each pair: -log sigmoid(s_better - s_worse - required margin).

    Args:
        margin_P: s_better - s_worse.
        required_margin: how much better the better one should score before the loss is small; of all pairs, or of each
            (Touvron et al. 2023, Llama 2, eq. 2).
        probability_P: probability that the one called better really is; None means 1. The loss is then the expected
            negative log-likelihood under that coin (conservative or soft labels).

    Source: Ouyang et al. 2022, eq. 1; Bradley & Terry 1952.
    """
    shifted_P = margin_P - required_margin
    if probability_P is None:
        return -F.logsigmoid(shifted_P)
    return -probability_P * F.logsigmoid(shifted_P) - (1 - probability_P) * F.logsigmoid(-margin_P - required_margin)


def ranking_loss(
    score_B: Tensor, pairs: Pairs, *, required_margin: float | Tensor = 0.0, probability_P: Tensor | None = None
) -> Tensor:
    """Sum over prompts of the mean pair loss of that prompt; divide by `pairs.num_groups` for the mean.

    A prompt with nine responses thus weighs as much as one with two, and every score is computed once.

    Source: Ouyang et al. 2022, eq. 1 (the 1 / C(K, 2) factor; here over the pairs that are not ties).
    """
    margin_P = score_B[pairs.better_P] - score_B[pairs.worse_P]
    loss_P = pair_loss(margin_P, required_margin=required_margin, probability_P=probability_P)
    return (loss_P * pairs.weight_P.to(loss_P.dtype)).sum()
