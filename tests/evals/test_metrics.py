"""Known answers for word overlap and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lyceum.evals.metrics import best_of_n_kl, mean_interval, seeds_interval, token_f1, words


def test_words_are_lower_case_runs_of_letters_digits_and_underscores() -> None:
    assert words("json.dumps(obj_2, Indent=4)!") == ["json", "dumps", "obj_2", "indent", "4"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the cat sat down", 2 * 1.0 * 0.5 / 1.5),  # precision 2/2, recall 2/4
        ("a a b", "a b b", 2 / 3),  # shared: one a, one b
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1_known_answers(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_interval_of_a_share_matches_the_normal_approximation() -> None:
    values = [1.0] * 60 + [0.0] * 40
    mean, low, high = mean_interval(values, samples=4000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert mean == pytest.approx(0.6)
    assert low == pytest.approx(0.6 - half, abs=0.015)
    assert high == pytest.approx(0.6 + half, abs=0.015)


def test_no_values_have_no_mean() -> None:
    assert all(math.isnan(number) for number in mean_interval([]))


def test_interval_over_seeds_is_wider_when_runs_disagree() -> None:
    prompts = {str(i): float(i % 2) for i in range(100)}
    agreeing = [prompts, prompts, prompts]
    disagreeing = [
        {key: min(1.0, max(0.0, value + shift)) for key, value in prompts.items()} for shift in (-0.4, 0, 0.4)
    ]
    _, low, high = seeds_interval(agreeing)
    _, wide_low, wide_high = seeds_interval(disagreeing)
    assert wide_high - wide_low > 1.3 * (high - low)


def test_interval_over_seeds_reads_only_prompts_that_all_runs_answered() -> None:
    mean, _, _ = seeds_interval([{"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0}])
    assert mean == 1.0


def test_best_of_n_kl_known_values_and_measured_on_a_uniform_base() -> None:
    for n, nats in ((1, 0.0), (4, 0.64), (16, 1.83), (64, 3.17), (256, 4.55)):
        assert best_of_n_kl(n) == pytest.approx(nats, abs=0.006)
    # uniform over m outcomes with distinct scores: P(best is the k-th of m) = (k/m)^n - ((k-1)/m)^n
    m, n = 20_000, 4
    k = np.arange(1, m + 1)
    best = (k / m) ** n - ((k - 1) / m) ** n
    assert (best * np.log(best * m)).sum() == pytest.approx(best_of_n_kl(n), abs=1e-3)
