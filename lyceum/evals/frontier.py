"""How far a policy may go: gold score against the distance from where it began, and the forms that such curves have.

The paper: L. Gao, J. Schulman, J. Hilton, "Scaling laws for reward model overoptimization" (2022). A policy is made better
by a *proxy*, a reward model that was trained on the judgements of a *gold* one; the proxy's score rises all the way, the gold
score rises, turns, and falls. With d = sqrt(KL(policy || where it began)) the gold score is, of

    best-of-n               R(d) = d (alpha - beta d)            turning at d = alpha / (2 beta)
    reinforcement learning  R(d) = d (alpha - beta log d)        turning at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so that they are fitted by least squares, with nothing to tune.

What is drawn once is used for every n: N responses to a prompt give the expected gold score of the best of n, without bias,
for all n up to N (`best_of_n_means`), and the distance that was really gone (`best_of_n_kl_measured`), which the formula
log n - (n - 1) / n (`lyceum.evals.metrics.best_of_n_kl`) bounds.

Shapes: P prompts, N responses to each. What it is not: a law. The forms were found on reward models of 3 million parameters
and more; here they are fitted, with how well (R squared), and believed no further than they fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lyceum.evals.metrics import best_of_n_kl
from lyceum.evals.plots import drawn

Array = np.ndarray[Any, Any]

# ---------------------------------------------------------------------------------------------------- best of n


def best_of_n_means(proxy_PN: Any, gold_PN: Any, n: int) -> tuple[float, float]:
    """Expected (proxy, gold) score of the response that the proxy likes best among n, drawn without replacement from N.

    The i-th of N in rising order is the best of n with probability C(i - 1, n - 1) / C(N, n); responses that the proxy
    scores alike share theirs. Unbiased for n draws from the policy, as the mean is for one.

    Source: Nakano et al. 2021 (WebGPT), appendix I; Gao et al. 2022, section 2.
    """
    proxy, gold = np.asarray(proxy_PN, dtype=np.float64), np.asarray(gold_PN, dtype=np.float64)
    count = proxy.shape[1]
    assert 1 <= n <= count, f"the best of {n} of {count} responses"
    rank = np.arange(1, count + 1)
    log_choose = np.array([_log_choose(i - 1, n - 1) for i in rank]) - _log_choose(count, n)
    weight_N = np.exp(log_choose)
    best_proxy = best_gold = 0.0
    for scores, values in zip(proxy, gold, strict=True):
        order = np.argsort(scores, kind="stable")
        _, group_N, size_G = np.unique(scores[order], return_inverse=True, return_counts=True)
        mean_G = np.bincount(group_N, values[order]) / size_G
        best_proxy += float(weight_N @ scores[order])
        best_gold += float(weight_N @ mean_G[group_N])
    return best_proxy / len(proxy), best_gold / len(proxy)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if 0 <= k <= n else -math.inf


def chosen_probabilities(probability_N: Any, score_N: Any, n: int) -> Array:
    """The distribution of the best of n draws from a known one over N responses, equal scores being broken by lot.

    With F the probability of a score of at most s and F- of one below it, the best has score s with F^n - F-^n.
    """
    probability, score = np.asarray(probability_N, dtype=np.float64), np.asarray(score_N, dtype=np.float64)
    _, group_N = np.unique(score, return_inverse=True)
    mass_G = np.bincount(group_N, probability)
    upto_G = np.cumsum(mass_G)
    below_G = np.concatenate([[0.0], upto_G[:-1]])
    best_G = upto_G**n - below_G**n
    return probability * (best_G / np.where(mass_G > 0, mass_G, 1.0))[group_N]


def best_of_n_kl_measured(score_PN: Any, n: int) -> float:
    """KL(best-of-n || policy) in nats, by the ranks of N responses to each prompt, equal scores counted as equal.

    Where scores differ it is the formula's, less what n is to N; where they tie, less again: choosing among equals moves
    nothing.
    """
    total = 0.0
    rows = np.asarray(score_PN, dtype=np.float64)
    for row in rows:
        base = np.full(len(row), 1.0 / len(row))
        best = chosen_probabilities(base, row, n)
        total += float((best[best > 0] * np.log(best[best > 0] * len(row))).sum())
    return total / len(rows)


def best_of_n_curve(proxy_PN: Any, gold_PN: Any) -> dict[str, list[float]]:
    """Best-of-n at n = 1, 2, 4, ... N: the KL by the formula and as measured, and the expected scores."""
    count = np.asarray(proxy_PN).shape[1]
    ns = [2**power for power in range(int(math.log2(count)) + 1)]
    scores = [best_of_n_means(proxy_PN, gold_PN, n) for n in ns]
    return {
        "n": [float(n) for n in ns],
        "kl": [best_of_n_kl(n) for n in ns],
        "kl_measured": [best_of_n_kl_measured(proxy_PN, n) for n in ns],
        "proxy": [proxy for proxy, _ in scores],
        "gold": [gold for _, gold in scores],
    }


# ---------------------------------------------------------------------------------------------------- the two forms

BEST_OF_N, RL = "best-of-n", "RL"


@dataclass(frozen=True)
class Fit:
    """A form fitted to a curve: its two coefficients, and the share of the curve's variance that it explains."""

    form: str
    alpha: float
    beta: float
    r_squared: float

    def at(self, distance: Any) -> Array:
        """The gold score at distances d >= 0."""
        d = np.asarray(distance, dtype=np.float64)
        return d * (self.alpha - self.beta * _bend(self.form, d))

    @property
    def turn(self) -> float:
        """The distance at which gold is highest; infinite where the form does not turn."""
        if self.beta <= 0:
            return math.inf
        return self.alpha / (2 * self.beta) if self.form == BEST_OF_N else math.exp(self.alpha / self.beta - 1)


def _bend(form: str, d: Array) -> Array:
    """What beta is multiplied with: d, or log d (0 at d = 0, where the form is 0 all the same)."""
    assert form in (BEST_OF_N, RL), form
    return d if form == BEST_OF_N else np.log(np.where(d > 0, d, 1.0))


def fit(form: str, distance: Any, gold: Any) -> Fit:
    """Least squares of `form` over points (d, gold score less that at the start); points at d = 0 say nothing.

    Source: Gao et al. 2022, section 3.1.
    """
    d, y = np.asarray(distance, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    d, y = d[d > 0], y[d > 0]
    assert len(d) > 1, "two coefficients need two points away from the start"
    columns = np.stack([d, -d * _bend(form, d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - columns @ [alpha, beta]) ** 2).sum())
    return Fit(form, float(alpha), float(beta), 1 - left / spread if spread > 0 else 0.0)


# ---------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One optimisation against one proxy: distance sqrt(KL), proxy score and gold score, from its start to its end."""

    distance: tuple[float, ...]
    proxy: tuple[float, ...]
    gold: tuple[float, ...]


def smoothed(values: Sequence[float], width: int) -> Array:
    """Means over `width` neighbours, fewer at the ends: one iteration's score is a mean over few replies."""
    y = np.asarray(values, dtype=np.float64)
    return np.array([y[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(y))])


def turnover(curve: Curve, width: int = 5) -> dict[str, float]:
    """Where gold was highest, how far it has fallen since, and how much the proxy has risen meanwhile (all smoothed)."""
    gold, proxy = smoothed(curve.gold, width), smoothed(curve.proxy, width)
    top = int(gold.argmax())
    return {
        "peak": float(gold[top]),
        "peak_distance": float(smoothed(curve.distance, width)[top]),
        "end": float(gold[-1]),
        "end_distance": float(curve.distance[-1]),
        "gold_fell": float(gold[top] - gold[-1]),
        "proxy_rose": float(proxy[-1] - proxy[top]),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (0 for one seed)."""
    y = np.asarray(values, dtype=np.float64)
    return float(y.mean()), float(y.std(ddof=1) / len(y) ** 0.5) if len(y) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------- the plot

COLOURS = ("#3867b7", "#b7562f", "#2f8f5b", "#8a4fb0", "#a68a1d", "#5d6778", "#c0456f", "#2a9aa8")


def plot(arms: Mapping[str, Sequence[Curve]], fits: Mapping[str, Fit], title: str) -> str:
    """Gold (lines) and proxy (dashes) against sqrt(KL), a colour for each arm and a line for each seed; dots: the fits."""

    def draw(axes: Any) -> None:
        for number, (name, curves) in enumerate(arms.items()):
            colour = COLOURS[number % len(COLOURS)]
            for i, one in enumerate(curves):
                axes.plot(one.distance, smoothed(one.gold, 5), color=colour, linewidth=1.3, label=None if i else name)
                axes.plot(one.distance, smoothed(one.proxy, 5), color=colour, linewidth=0.7, linestyle="--", alpha=0.7)
            if name in fits:
                d = np.linspace(0, max(max(one.distance) for one in curves), 80)
                axes.plot(d, fits[name].at(d), color=colour, linewidth=1.0, linestyle=":")
        axes.set_ylabel("score, deviations of the start's replies")
        axes.legend(frameon=False, fontsize=7)

    return drawn(draw, title, "sqrt(KL) from the start, KL in nats a reply", size=(6.2, 3.8), font=9)
