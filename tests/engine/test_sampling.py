from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lyceum.engine.sampling import SamplingParams, _mix, filtered, mix_seed, sample, signed64, uniform
from lyceum.errors import UsageError

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def draw(probabilities_BV: Tensor, noise: list[float], **settings: Tensor) -> list[int]:
    noise_B = torch.tensor(noise, dtype=torch.float64)
    logits_BV = probabilities_BV.log().expand(len(noise), -1)
    tokens_B, _ = sample(logits_BV, torch.ones(len(noise)), noise_B, **settings)
    return tokens_B.tolist()


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix_is_splitmix64(seed: int, published: list[int]) -> None:
    states = [signed64(seed + n * 0x9E3779B97F4A7C15) for n in (1, 2, 3)]
    assert _mix(torch.tensor(states)).tolist() == [signed64(x) for x in published]


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_noise_is_uniform_along_positions_and_along_seeds(vary: str) -> None:
    count = torch.arange(1 << 16)
    zeros = torch.zeros_like(count)
    noise = uniform(zeros, count) if vary == "position" else uniform(count, zeros)
    assert 0 <= noise.min() and noise.max() < 1
    bins = torch.histc(noise, 64, 0, 1)
    assert ((bins - 1024) ** 2 / 1024).sum() < 103  # chi-square with 63 degrees of freedom: 99.9 %
    neighbours = torch.corrcoef(torch.stack((noise[:-1], noise[1:])))[0, 1]
    assert neighbours.abs() < 4 / 256  # four standard errors


def test_mix_seed_depends_on_every_part_and_on_their_order() -> None:
    seeds = [
        mix_seed(),
        mix_seed(1),
        mix_seed(2),
        mix_seed(1, 2),
        mix_seed(2, 1),
        mix_seed(1, 2, 0),
        mix_seed(-1),
        mix_seed(0),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_noise_walks_down_the_distribution_in_the_order_of_ids() -> None:
    # cumulative: .5 .8 .95 1
    assert draw(PROBABILITIES, [0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 2**-53]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    noise = [0.0, 0.3, 0.5, 0.999, 1 - 2**-53]
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]), noise) == [1] * 5


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.75, [0.625, 0.375, 0, 0]),
        (0.9, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (0.0, [1.0, 0, 0, 0]),
        (1.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_nucleus_keeps_the_fewest_that_reach_p(top_p: float, kept: list[float]) -> None:
    weights_BV = filtered(PROBABILITIES, None, torch.tensor([top_p]))
    torch.testing.assert_close(weights_BV / weights_BV.sum(), torch.tensor([kept]))


def test_top_k_keeps_exactly_k_and_the_lower_id_of_equals() -> None:
    weights_BV = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    kept_BV = filtered(weights_BV, torch.tensor([3, 2, 0]), None) > 0
    assert kept_BV.tolist() == [[True, True, False, True], [True, True, False, False], [True] * 4]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # top-k 2 leaves .625 and .375: the first alone reaches .6, though it is only .5 of the whole
    kept_BV = filtered(PROBABILITIES, torch.tensor([2]), torch.tensor([0.6])) > 0
    assert kept_BV.tolist() == [[True, False, False, False]]


def test_filters_of_one_row_do_not_touch_another() -> None:
    noise = [0.96, 0.96]
    filters = {"top_k_B": torch.tensor([0, 1]), "top_p_B": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    assert draw(PROBABILITIES, noise, **filters) == [3, 0]


def test_logprobs_are_the_log_softmax_at_the_temperature_before_filters() -> None:
    logits_BV = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 4
    temperature_B = torch.tensor([1.0, 0.7, 2.0, 0.0, 0.3])
    noise_B = torch.linspace(0, 0.99, 5, dtype=torch.float64)
    tokens_B, logprobs_B = sample(logits_BV, temperature_B, noise_B, top_k_B=torch.full((5,), 3))
    for row, (token, tau) in enumerate(zip(tokens_B.tolist(), [1.0, 0.7, 2.0, 1.0, 0.3], strict=True)):
        expected = torch.log_softmax(logits_BV[row].double() / tau, -1)[token].float()
        torch.testing.assert_close(logprobs_B[row], expected)
    assert tokens_B[3] == logits_BV[3].argmax()


def test_a_planned_token_overrules_and_has_its_own_logprob_however_unlikely() -> None:
    logits_BV = torch.tensor([[0.0, 500.0], [0.0, 500.0]])
    tokens_B, logprobs_B = sample(logits_BV, torch.zeros(2), None, planned_B=torch.tensor([0, -1]))
    assert tokens_B.tolist() == [0, 1] and logprobs_B.tolist() == [-500.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"max_tokens": -1},
        {"stop_strings": ("",)},
    ],
)
def test_params_without_meaning_are_refused_with_a_hint(settings: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))) as caught:
        SamplingParams(**settings)
    assert caught.value.hint


def test_only_plain_sampling_is_unbiased() -> None:
    assert not SamplingParams(temperature=0.7).is_biased
    assert all(SamplingParams(**bias).is_biased for bias in ({"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}))
