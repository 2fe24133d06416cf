"""Best-of-n and Gao's forms: expectations and distributions by enumeration, known coefficients, a turn that is seen."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from lyceum.evals.frontier import (
    BEST_OF_N,
    RL,
    Curve,
    Fit,
    best_of_n_curve,
    best_of_n_kl_measured,
    best_of_n_means,
    chosen_probabilities,
    fit,
    plot,
    turnover,
)
from lyceum.evals.metrics import best_of_n_kl


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n() -> None:
    proxy, gold = [0.3, 2.0, -1.0, 0.9, 0.5], [1.0, -4.0, 2.0, 3.0, 0.0]
    for n in range(1, 6):
        best = [max(drawn, key=lambda i: proxy[i]) for drawn in combinations(range(5), n)]
        expected = (np.mean([proxy[i] for i in best]), np.mean([gold[i] for i in best]))
        assert best_of_n_means([proxy], [gold], n) == pytest.approx(expected)
    assert best_of_n_means([proxy], [gold], 5) == pytest.approx((2.0, -4.0))
    both = best_of_n_means([proxy, [0.0] * 5], [gold, gold], 5)
    assert both == pytest.approx((1.0, (-4.0 + 0.4) / 2))  # where all tie, the mean


def test_equal_scores_share_what_they_are_chosen_for() -> None:
    proxy, gold = [1.0, 1.0, 0.0], [5.0, 1.0, -3.0]
    # of the three ways to draw two, each has one of the two best: their gold is 3 on average
    assert best_of_n_means([proxy], [gold], 2) == pytest.approx((1.0, 3.0))


def test_the_estimate_is_unbiased_for_draws_of_n() -> None:
    chance = np.random.default_rng(0)
    drawn = chance.normal(size=(4000, 4))
    straight = drawn.max(1)
    pooled, _ = best_of_n_means(chance.normal(size=(400, 40)), np.zeros((400, 40)), 4)
    assert straight.mean() == pytest.approx(1.0294, abs=0.04) and pooled == pytest.approx(1.0294, abs=0.04)


def test_the_distribution_of_the_best_of_n_by_enumeration() -> None:
    p, score = np.array([0.5, 0.2, 0.3]), np.array([1.0, 2.0, 1.0])
    # best of two: score 2 unless both draws miss it; the rest is shared as p is
    expected = np.array([0.64 * 0.5 / 0.8, 0.36, 0.64 * 0.3 / 0.8])
    assert chosen_probabilities(p, score, 2) == pytest.approx(expected)
    assert chosen_probabilities(p, score, 1) == pytest.approx(p)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_measured_kl_is_the_formula_where_scores_differ_and_less_where_they_tie(n: int) -> None:
    distinct = np.random.default_rng(1).normal(size=(2, 4096))
    assert best_of_n_kl_measured(distinct, n) == pytest.approx(best_of_n_kl(n), abs=0.01)
    assert best_of_n_kl_measured(distinct, n) <= best_of_n_kl(n) + 1e-9
    coarse = best_of_n_kl_measured(np.round(distinct), n)
    assert coarse == 0 if n == 1 else coarse < best_of_n_kl(n) - 0.01
    assert best_of_n_kl_measured(np.zeros((2, 8)), n) == pytest.approx(0)  # choosing among equals moves nothing


def test_both_forms_give_back_the_coefficients_that_made_a_curve() -> None:
    d = np.linspace(0, 4, 30)
    for form, turn in ((BEST_OF_N, 0.9 / 0.5), (RL, math.exp(0.9 / 0.25 - 1))):
        made = Fit(form, 0.9, 0.25, 1.0)
        found = fit(form, d, made.at(d))
        assert (found.alpha, found.beta, found.r_squared) == pytest.approx((0.9, 0.25, 1.0))
        assert found.turn == pytest.approx(turn)
        near = np.array([turn - 0.01, turn, turn + 0.01])
        assert made.at(near).argmax() == 1  # it turns there
    assert made.at(0.0) == 0 and Fit(RL, 1.0, -0.1, 1.0).turn == math.inf


def test_a_fit_says_how_badly_it_fits() -> None:
    d = np.linspace(0.1, 3, 40)
    noise = np.random.default_rng(2).normal(size=40)
    assert fit(RL, d, noise).r_squared < 0.3
    assert fit(BEST_OF_N, d, d * (1 - 0.2 * d) + 0.01 * noise).r_squared > 0.95


def test_a_turn_is_seen_and_a_rise_is_none() -> None:
    d = tuple(i / 10 for i in range(40))
    rising = tuple(x for x in d)
    turning = tuple(x * (2 - x) for x in d)
    found = turnover(Curve(d, rising, turning))
    assert found["peak"] == pytest.approx(1, abs=0.03) and found["peak_distance"] == pytest.approx(1, abs=0.11)
    assert found["gold_fell"] > 6 and found["proxy_rose"] == pytest.approx(2.7, abs=0.2)
    assert turnover(Curve(d, rising, rising))["gold_fell"] == 0


def test_a_curve_of_best_of_n_has_powers_of_two_and_a_plot_can_be_drawn() -> None:
    chance = np.random.default_rng(3)
    gold = chance.normal(size=(20, 32))
    drawn = best_of_n_curve(gold + chance.normal(size=gold.shape), gold)
    assert drawn["n"] == [1, 2, 4, 8, 16, 32] and drawn["gold"] == sorted(drawn["gold"])
    d = tuple(kl**0.5 for kl in drawn["kl"])
    curve = Curve(d, tuple(drawn["proxy"]), tuple(drawn["gold"]))
    svg = plot({"one": [curve, curve]}, {"one": fit(BEST_OF_N, d, curve.gold)}, "a title")
    assert svg.startswith("<svg") and "a title" in svg and "sqrt(KL)" in svg
