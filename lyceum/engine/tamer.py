"""A trainer's key presses: which steps they meant, and a model of what the trainer would say (TAMER).

The paper: W. B. Knox and P. Stone, "Interactively shaping agents via human reinforcement: the TAMER framework" (2009); credit by
the density of human delay: Knox, Stone and Breazeal (2009); weighted regression on single presses: G. Warnell et al., "Deep
TAMER" (2018). Symbols and names:

    h, t                 a press: its value and its time, `Press`
    [b_i, e_i]           the seconds in which step i was shown, `Shown`; a step is a token here, or any piece that is shown
    f, F                 density of the time between seeing and pressing, and what it adds up to, `Delay`
    c_i                  share of a press that step i gets: F(t - b_i) - F(t - e_i), `credit`
    H(s, a) = w_a phi(s) what the trainer would say of action a in state s, `Human`; phi is a hidden vector

There is no discounting: a person who presses has already thought of what follows. A step that no press reaches teaches nothing:
silence is not taken for a 0.

Shapes: N credited steps, D width, A actions (for a language model, its vocabulary). What it is not: a keyboard. Presses come
from whoever watches; `lyceum.stages.tamer` has a simulated trainer, and puts this beside PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lyceum.errors import UsageError

Shown = tuple[float, float]  # seconds: from, until


@dataclass(frozen=True)
class Press:
    """One press: when, in seconds on the clock of what was shown, and its value (1 good, -1 bad)."""

    time_s: float
    value: float


@dataclass(frozen=True)
class Delay:
    """The time between seeing and pressing, uniform from `low_s` to `high_s` (Knox and Stone: 0.2 to 0.8).

    Where both are equal a press means what was shown exactly so long before it.
    """

    low_s: float = 0.2
    high_s: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low_s <= self.high_s:
            raise UsageError(
                f"a delay from {self.low_s} to {self.high_s} seconds", hint="give 0 <= low_s <= high_s: 0.2 and 0.8"
            )

    def upto(self, seconds: float) -> float:
        """F: the probability of a delay of at most that."""
        if self.high_s == self.low_s:
            return float(seconds >= self.low_s)
        return min(max((seconds - self.low_s) / (self.high_s - self.low_s), 0.0), 1.0)


def credit(shown: Shown, time_s: float, delay: Delay) -> float:
    """c_i: how likely it is that a press at `time_s` means what was shown then.

    Over steps that follow one another without a gap, and cover the whole window, these add up to 1.

    Source: Knox and Stone 2009, section 3.3: the integral of f from t - e_i to t - b_i.
    """
    begin, end = shown
    return delay.upto(time_s - begin) - delay.upto(time_s - end)


def credited(shown: Sequence[Shown], presses: Sequence[Press], delay: Delay) -> tuple[list[float], list[float]]:
    """For every step the label, its presses' mean weighted by credit, and the credit it got; 0 and 0 without any."""
    labels, weights = [], []
    for step in shown:
        shares = [credit(step, press.time_s, delay) for press in presses]
        weight = sum(shares)
        total = sum(share * press.value for share, press in zip(shares, presses, strict=True))
        labels.append(total / weight if weight > 0 else 0.0)
        weights.append(weight)
    return labels, weights


class Human:
    """What a trainer would say, linear in a hidden vector, one row of weights for each action; it learns as presses come.

    Nothing is said of an action that no press has reached: its row is 0.
    """

    def __init__(self, num_actions: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.weight_AD = torch.zeros(num_actions, width, dtype=dtype)

    def values(self, phi_ND: Tensor) -> Tensor:
        """H(s, a) of every action (N, A)."""
        return phi_ND @ self.weight_AD.T

    def of(self, phi_ND: Tensor, action_N: Tensor) -> Tensor:
        """H(s, a) of the actions that were taken (N,)."""
        return (phi_ND * self.weight_AD[action_N]).sum(1)

    def greedy(self, phi_ND: Tensor) -> Tensor:
        """The action that would be liked best (N,); any of them may be, the first too."""
        return self.values(phi_ND).argmax(1)

    def gradient(self, phi_ND: Tensor, action_N: Tensor, label_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        """What `step` takes: the sum over steps of weight (label - H) phi for each action (A, D), and the sum of
        weight |phi|^2 (A,). Both may be added over batches and ranks."""
        error_N = weight_N * (label_N - self.of(phi_ND, action_N))
        pull_AD = torch.zeros_like(self.weight_AD).index_add_(0, action_N, error_N[:, None] * phi_ND)
        mass_A = self.weight_AD.new_zeros(len(self.weight_AD)).index_add_(
            0, action_N, weight_N * phi_ND.square().sum(1)
        )
        return pull_AD, mass_A

    def step(self, pull_AD: Tensor, mass_A: Tensor, rate: float) -> None:
        """One step down the sum of weight (label - H)^2, its length measured by the features' own; a rate up to 1 is stable.

        Source: Warnell et al. 2018, eq. 3, with normalised least mean squares (Nagumo and Noda 1967) for the length.
        """
        self.weight_AD += rate * pull_AD / mass_A.clamp(min=1e-12)[:, None]
