"""Direct preference methods: from log-probabilities of responses and judgements on them to a loss, without a reward model.

They differ in three things, and each is one pure function here: how a response's log-probability becomes its *implicit
reward* (a score), how the rewards of what was preferred and what was not become a loss, and what is added to it. So a
method is data, an `Objective`; `PRESETS` holds the published ones, and `objective` checks a choice once:

    dpo        beta (log pi - log pi_ref), Bradley-Terry                        Rafailov et al. 2023, eq. 7
    dpo_norm   the same per token of the response                               Lambert et al. 2024 (Tulu 3), section 5
    cdpo       dpo with labels that are wrong with a stated probability         Mitchell 2023, "A note on DPO with noisy
                                                                                preferences"
    ipo        dpo's reward, squared distance of the margin to a target         Azar et al. 2023, eq. 17
    simpo      beta log pi per token, Bradley-Terry with a required margin      Meng et al. 2024, eq. 6
    orpo       log odds of the probability per token, Bradley-Terry, times      Hong et al. 2024, eq. 6 and 7
               lambda, beside the likelihood of the best response
    kto        dpo's reward less the KL, through a sigmoid, of one response     Ethayarajh et al. 2024, eq. 8
               at a time that is good or bad

Bradley-Terry itself stands in `lyceum.train.policy.pair_loss`: the reward model's loss is the same function of other
scores. Soft labels (`probability_P`) come from rankings that have them, and from label smoothing.

Conventions: as in `lyceum.train.policy`. R responses (rows), P pairs. Nothing averages silently: losses are sums in which
each prompt weighs the same (of single responses: each response), and the caller divides by the count of the whole step.
What it is not: it knows no model but through `response_logprobs`, and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lyceum.batches.preferences import Sides
from lyceum.errors import ConfigError, did_you_mean
from lyceum.model.branches import Branches, read
from lyceum.train.policy import chosen_logprobs, pair_loss, predicting

MAX_LOGP = -1e-6  # of a token, where odds are taken: at a probability of 1 they are infinite


def response_logprobs(
    model: Any, tokens_BT: Tensor, starts_B: Tensor, lengths_B: Tensor, group_B: Tensor | None = None
) -> Tensor:
    """log pi(response | prompt) of each right-padded row, the sum over its tokens from `starts_B` on: logp_R, nats.

    group_B: which rows answer one prompt, which is then computed once.
    """
    device = model.output_weight.device
    positions_T = torch.arange(tokens_BT.shape[1], device=device)
    starts_B, lengths_B = starts_B.to(device), lengths_B.to(device)
    mask_BT = (positions_T >= starts_B[:, None]) & (positions_T < lengths_B[:, None])
    tokens_BT = tokens_BT.to(device)
    branches = None if group_B is None else Branches.of(tokens_BT, lengths_B, group_B.to(device))
    hidden_ND = read(model, tokens_BT, predicting(mask_BT), branches)
    return chosen_logprobs(hidden_ND, model.output_weight, tokens_BT, mask_BT)[0].sum(1)


# ---------------------------------------------------------------- scores: (logp_R, reference_R, length_R) -> score_R


def log_ratio(logp_R: Tensor, reference_R: Tensor, length_R: Tensor) -> Tensor:
    """log pi - log pi_ref; times beta it is the reward under which pi is the best policy (Rafailov et al., eq. 5)."""
    return logp_R - reference_R


def mean_log_ratio(logp_R: Tensor, reference_R: Tensor, length_R: Tensor) -> Tensor:
    """The log ratio per token, so that a long response does not weigh more."""
    return (logp_R - reference_R) / length_R


def mean_logprob(logp_R: Tensor, reference_R: Tensor, length_R: Tensor) -> Tensor:
    """The log-probability per token; needs no reference (Meng et al., eq. 3)."""
    return logp_R / length_R


def log_odds(logp_R: Tensor, reference_R: Tensor, length_R: Tensor) -> Tensor:
    """log(p / (1 - p)), where p is the geometric mean of the tokens' probabilities (Hong et al., eq. 3 and 4)."""
    mean_R = (logp_R / length_R).clamp(max=MAX_LOGP)
    return mean_R - torch.log(-torch.expm1(mean_R))


# ---------------------------------------------------------------- losses: (reward_R, sides, objective, kl) -> total


def bradley_terry(reward_R: Tensor, sides: Sides, chosen: Objective, kl: float) -> Tensor:
    """Sum over prompts of the mean over pairs of the Bradley-Terry loss, with soft labels and a required margin."""
    margin_P, probability_P = _margins(reward_R, sides, chosen)
    loss_P = pair_loss(margin_P, required_margin=chosen.margin, probability_P=probability_P)
    return (loss_P * sides.weight_P.to(loss_P.dtype)).sum()


def squared_distance(reward_R: Tensor, sides: Sides, chosen: Objective, kl: float) -> Tensor:
    """Sum over prompts of the mean over pairs of (h - 1 / (2 beta))^2, h the difference of log ratios.

    Bounded where Bradley-Terry's is not: a pair that everybody orders the same way cannot push it to infinity. With a
    soft label it is the expectation over which of the two is better. Source: Azar et al. 2023, eq. 17 (tau is beta).
    """
    margin_P, probability_P = _margins(reward_R, sides, chosen)
    h_P, target = margin_P / chosen.beta, 0.5 / chosen.beta
    loss_P = probability_P * (h_P - target).square() + (1 - probability_P) * (h_P + target).square()
    return (loss_P * sides.weight_P.to(loss_P.dtype)).sum()


def kahneman_tversky(reward_R: Tensor, sides: Sides, chosen: Objective, kl: float) -> Tensor:
    """Sum over responses of lambda (1 - sigmoid(+-(reward - beta kl))): + of a good one, - of a bad one.

    Args:
        kl: how far the policy is from the reference, in nats a response, never negative; a number without gradient.

    Source: Ethayarajh et al. 2024, eq. 8.
    """
    gain_R = reward_R - chosen.beta * kl
    good = chosen.good_weight * torch.sigmoid(-gain_R[sides.better_P]).sum()
    return good + chosen.bad_weight * torch.sigmoid(gain_R[sides.worse_P]).sum()


def _margins(reward_R: Tensor, sides: Sides, chosen: Objective) -> tuple[Tensor, Tensor]:
    """margin_P, and the probability that the better one is, after smoothing: p (1 - s) + (1 - p) s."""
    probability_P = sides.probability_P.to(reward_R.dtype)
    smoothed_P = probability_P + chosen.label_smoothing * (1 - 2 * probability_P)
    return reward_R[sides.better_P] - reward_R[sides.worse_P], smoothed_P


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Objective:
    """One method, with its numbers.

    score: a response's implicit reward is beta times it. loss: see above. margin: by which the better one must be
    better (Bradley-Terry). label_smoothing: probability that a label is wrong. weight: of this loss; nll: of the mean
    negative log-likelihood of the best responses' tokens beside it. good_weight, bad_weight: lambda of single responses.
    """

    score: Callable[[Tensor, Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Sides, Objective, float], Tensor]
    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0
    weight: float = 1.0
    nll: float = 0.0
    good_weight: float = 1.0
    bad_weight: float = 1.0

    @property
    def is_paired(self) -> bool:
        """True if it learns from pairs, False if from single responses."""
        return self.loss is not kahneman_tversky

    @property
    def uses_reference(self) -> bool:
        """True if the reference's log-probabilities are needed."""
        return self.score in (log_ratio, mean_log_ratio)

    def reward(self, logp_R: Tensor, reference_R: Tensor, length_R: Tensor) -> Tensor:
        """The implicit reward of each response from its log-probability, the reference's, and its tokens."""
        reference_R, length_R = (x.to(logp_R.device, logp_R.dtype) for x in (reference_R, length_R))
        return self.beta * self.score(logp_R, reference_R, length_R)


PRESETS: dict[str, Objective] = {
    "dpo": Objective(log_ratio, bradley_terry, beta=0.1),
    "dpo_norm": Objective(mean_log_ratio, bradley_terry, beta=5.0),
    "cdpo": Objective(log_ratio, bradley_terry, beta=0.1, label_smoothing=0.1),
    "ipo": Objective(log_ratio, squared_distance, beta=0.1),
    "simpo": Objective(mean_logprob, bradley_terry, beta=2.0, margin=1.0),
    "orpo": Objective(log_odds, bradley_terry, beta=1.0, weight=0.1, nll=1.0),
    "kto": Objective(log_ratio, kahneman_tversky, beta=0.1),
}


def objective(name: str, **changes: Any) -> Objective:
    """The preset `name` with some of its numbers changed.

    Raises:
        ConfigError: there is no such method, or a number has no meaning in it.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preference method {name!r}", hint=did_you_mean(name, PRESETS))
    preset, chosen = PRESETS[name], replace(PRESETS[name], **changes)

    def refuse(what: str, hint: str) -> ConfigError:
        return ConfigError(f"{name} with {what} makes no sense", hint=hint)

    if not chosen.beta > 0:
        raise refuse(f"beta = {chosen.beta}", "beta is above 0; the smaller, the further the policy may go")
    if chosen.loss is not bradley_terry and chosen.margin:
        raise refuse(f"margin = {chosen.margin}", "a required margin belongs to Bradley-Terry: dpo, cdpo, simpo, orpo")
    if not 0 <= chosen.label_smoothing < 0.5:
        raise refuse(
            f"label_smoothing = {chosen.label_smoothing}", "from 0.5 on labels say nothing, or the opposite: use less"
        )
    if not chosen.is_paired and chosen.label_smoothing:
        raise refuse(f"label_smoothing = {chosen.label_smoothing}", "it is of pairs; single responses are good or bad")
    if chosen.is_paired and (chosen.good_weight, chosen.bad_weight) != (1.0, 1.0):
        raise refuse("good_weight or bad_weight", "they weigh single responses: kto")
    if not chosen.is_paired and chosen.nll:
        raise refuse(f"nll = {chosen.nll}", "a step may hold bad responses only, of which nothing is to be copied")
    if name == "orpo" and not chosen.nll:
        raise refuse("nll = 0", "odds alone say nothing about how probable the better response is: keep nll above 0")
    assert chosen.score is preset.score and chosen.loss is preset.loss
    return chosen
