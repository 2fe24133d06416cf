"""A trainer's key presses: which steps they meant, and a model of what the trainer would say (TAMER).

The paper: W. B. Knox and P. Stone, "Interactively shaping agents via human reinforcement: the TAMER framework" (2009); credit by
the density of human delay: Knox, Stone and Breazeal (2009); weighted regression on single presses: G. Warnell et al., "Deep
TAMER" (2018). Symbols and names:

    h, t                 a press: its value and its time, `Press`
    [b_i, e_i]           the seconds in which step i was shown, `Shown`; a step is a token here, or any piece that is shown
    f, F                 density of the time between seeing and pressing, and what it adds up to, `Delay`
    c_i                  share of a press that step i gets: F(t - b_i) - F(t - e_i), `credit`
    H(s, a) = w_a phi(s) what the trainer would say of action a in state s, `Human`; phi is a hidden vector
    H(s, a) = w phi(s a) the same of a segment, with one w for all, `Taste`; phi is of the segment itself

There is no discounting: a person who presses has already thought of what follows. A step that no press reaches teaches nothing:
silence is not taken for a 0.

`Human` learns beside training, from thousands of presses; `Taste` learns live, from a handful, what a few segments say of others
like them.

Shapes: N credited steps, D width, A actions (for a language model, its vocabulary), M steps with credit. What it is not: a
keyboard. Presses come from whoever watches: `lyceum.serve.teaching` has people, `lyceum.stages.tamer` a simulated trainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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


# -------------------------------------------------------------------------------- live: segments, and a head over all of them


@dataclass(frozen=True)
class Lesson:
    """What one answer taught: the features of its segments as shown, phi_ND, what was said of each, label_N, and how
    surely, weight_N (0 where no press reached it)."""

    phi_ND: Tensor
    label_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(cls, phi_ND: Tensor, began_s: Sequence[float], presses: Sequence[Press], delay: Delay) -> Lesson:
        """By credit. began_s: when each segment began to be shown; it is the newest until the next begins, the last for good."""
        shown = list(zip(began_s, [*began_s[1:], math.inf], strict=True))
        label, weight = credited(shown, presses, delay)
        return cls(phi_ND, phi_ND.new_tensor(label), phi_ND.new_tensor(weight))


class Taste:
    """What a trainer would say of any segment: H(s, a) = w phi, with one w for all, so that what was said of one segment
    tells of others that are like it.

    w is the ridge regression of the labels on the features, weighted by credit, over all lessons, solved anew whenever one is
    taught: recursive least squares without its rounding, so a lesson that grows press by press takes its own earlier place.
    Features are seen from their mean over all segments that were shown, those too that no press reached, and divided by their
    length: so it is enough to press for what is liked, and a constant in the features says nothing.

    ridge: what is added to the diagonal, in presses: so many in one direction are believed half.

    Source: the linear, credit-weighted regression of Knox and Stone 2009, in its exact form; Warnell et al. 2018, eq. 2, for the
    weighted loss.
    """

    def __init__(self, lessons: Sequence[Lesson] = (), ridge: float = 0.5) -> None:
        self.num_presses = float(
            sum(float(lesson.weight_N.sum()) for lesson in lessons)
        )  # as far as they were credited
        self.is_taught = self.num_presses > 0
        if not self.is_taught:
            return
        phi_ND = torch.cat([lesson.phi_ND for lesson in lessons]).double()
        self.mean_D = phi_ND.mean(0)
        self.scale = float((phi_ND - self.mean_D).square().sum(1).mean().sqrt().clamp(min=1e-12))
        weight_N = torch.cat([lesson.weight_N for lesson in lessons]).double()
        said = weight_N > 0
        root_M = weight_N[said].sqrt()
        x_MD = root_M[:, None] * self._seen(phi_ND[said])
        y_M = root_M * torch.cat([lesson.label_N for lesson in lessons]).double()[said]
        if len(x_MD) <= x_MD.shape[1]:  # the same solution from the smaller of its two systems
            gram_MM = x_MD @ x_MD.T + ridge * torch.eye(len(x_MD), dtype=x_MD.dtype)
            self.weight_D = x_MD.T @ torch.linalg.solve(gram_MM, y_M)
        else:
            gram_DD = x_MD.T @ x_MD + ridge * torch.eye(x_MD.shape[1], dtype=x_MD.dtype)
            self.weight_D = torch.linalg.solve(gram_DD, x_MD.T @ y_M)

    def values(self, phi_ND: Tensor) -> Tensor:
        """H of segments (N,); 0 where nothing was taught."""
        if not self.is_taught:
            return phi_ND.new_zeros(len(phi_ND), dtype=torch.float64)
        return self._seen(phi_ND.double()) @ self.weight_D

    def _seen(self, phi_ND: Tensor) -> Tensor:
        return (phi_ND - self.mean_D) / self.scale


def times_of(pieces: Sequence[tuple[float, float, str]], starts: Sequence[int]) -> list[Shown]:
    """When tokens were shown, from the pieces of text that were: (from, until, text) in their order.

    starts: the character at which each token begins, as `lyceum.engine.stream.offsets` has it; a token is shown with the
    piece that its first character is in, one at or behind the end with the last, and tokens of one piece one after the other,
    each for an equal part of its time. Raises UsageError without any piece.
    """
    if not pieces:
        raise UsageError("no text was shown", hint="give the pieces as (from second, until second, text)")
    places, place, end = [], 0, len(pieces[0][2])
    for start in starts:
        while start >= end and place + 1 < len(pieces):
            place += 1
            end += len(pieces[place][2])
        places.append(place)
    found: list[Shown] = []
    for place, tokens in groupby(places):
        (begin_s, end_s, _), num = pieces[place], len(list(tokens))
        found += [
            (begin_s + (end_s - begin_s) * k / num, begin_s + (end_s - begin_s) * (k + 1) / num) for k in range(num)
        ]
    return found
