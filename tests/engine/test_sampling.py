from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyceum.engine import sampling
from lyceum.engine.sampling import (
    SamplingParams,
    _mix,
    alternatives,
    best,
    filtered,
    mix_seed,
    sample,
    signed64,
    uniform,
)
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


def test_noise_of_a_few_rows_is_that_of_many() -> None:
    seeds = torch.tensor(
        [signed64(mix_seed(number)) for number in range(100)] + [0, -1, signed64(1 << 63), (1 << 63) - 1]
    )
    positions = torch.arange(len(seeds)) * 977
    many = uniform(seeds, positions)
    assert len(seeds) > sampling.FEW
    for start in range(0, len(seeds), sampling.FEW):
        few = slice(start, start + sampling.FEW)
        assert torch.equal(uniform(seeds[few], positions[few]), many[few])


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


@pytest.mark.parametrize(("min_p", "num_kept"), [(0.0, 4), (0.05, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)])
def test_min_p_keeps_what_is_at_least_that_share_of_the_most_probable(min_p: float, num_kept: int) -> None:
    # .5 .3 .15 .05: 1, .6, .3 and .1 of the first
    kept_BV = filtered(PROBABILITIES, None, None, torch.tensor([min_p])) > 0
    assert kept_BV.tolist() == [[True] * num_kept + [False] * (4 - num_kept)]


def slowly_filtered(weights: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    """One row, token by token, as the docstring says it."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[: top_k or None]
    if top_p < 1:
        whole = math.fsum(weights[token] for token in kept)
        kept = [t for n, t in enumerate(kept) if n == 0 or math.fsum(weights[u] for u in kept[:n]) < top_p * whole]
    kept = [token for token in kept if weights[token] >= min_p * weights[order[0]]]
    return [weight if token in kept else 0.0 for token, weight in enumerate(weights)]


@pytest.mark.parametrize("candidates", [1, 2, 256])
@settings(max_examples=50)
@given(st.data())
def test_filters_equal_a_slow_loop_with_ties_and_mixed_rows(candidates: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 24))
    numbers = st.integers(0, 5) | st.integers(0, 1 << 20)  # many ties, and none
    rows = data.draw(st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1, max_size=4))
    rows = [row if any(row) else [1] * size for row in rows]
    top_k = [data.draw(st.sampled_from([0, 1, 2, 3, size, 99])) for _ in rows]
    top_p = [data.draw(st.sampled_from([0.0, 0.31, 0.77, 0.93, 1.0])) for _ in rows]
    min_p = [data.draw(st.sampled_from([0.0, 0.0, 0.25, 1.0])) for _ in rows]
    expected = [
        slowly_filtered([float(x) for x in row], *rest) for row, *rest in zip(rows, top_k, top_p, min_p, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampling, "CANDIDATES", candidates)
        found = filtered(
            torch.tensor(rows).float(),
            torch.tensor(top_k) if any(top_k) else None,
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor(min_p) if any(min_p) else None,
        )
    assert found.tolist() == expected


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


def test_alternatives_are_the_most_probable_tokens_on_the_scale_of_the_chosen_one() -> None:
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    temperature_B = torch.tensor([1.0, 0.7, 0.0, 2.0, 0.0, 1.0])
    noise_B = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    tokens_B, logprobs_B = sample(logits_BV, temperature_B, noise_B)
    ids_BK, top_BK = alternatives(logits_BV, temperature_B, tokens_B, logprobs_B, 50)
    for row, tau in enumerate([1.0, 0.7, 1.0, 2.0, 1.0, 1.0]):
        expected, ids = torch.log_softmax(logits_BV[row].double() / tau, -1).sort(descending=True)
        assert ids_BK[row].tolist() == ids.tolist()
        torch.testing.assert_close(top_BK[row].double(), expected, atol=1e-5, rtol=1e-5)
        place = ids_BK[row].tolist().index(int(tokens_B[row]))
        assert top_BK[row, place] == logprobs_B[row]  # the very same float: lm-eval compares it with the greatest
    assert top_BK[2, 0] == logprobs_B[2] and alternatives(logits_BV, temperature_B, tokens_B, logprobs_B, 3)[
        0
    ].shape == (6, 3)


def test_a_planned_token_overrules_and_has_its_own_logprob_however_unlikely() -> None:
    logits_BV = torch.tensor([[0.0, 500.0], [0.0, 500.0]])
    tokens_B, logprobs_B = sample(logits_BV, torch.zeros(2), None, planned_B=torch.tensor([0, -1]))
    assert tokens_B.tolist() == [0, 1] and logprobs_B.tolist() == [-500.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: float("nan")}},
        {"max_tokens": -1},
        {"min_tokens": 65},
        {"min_tokens": -1},
        {"stop_strings": ("",)},
        {"stop_strings": "ab"},
        {"n": 0},
        {"best_of": 2, "n": 3},
        {"top_logprobs": 21},
        {"min_tokens": 1, "json_schema": {}, "stop_ids": (1,)},
    ],
)
def test_params_without_meaning_are_refused_with_a_hint(settings: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))) as caught:
        SamplingParams(**settings)
    assert caught.value.hint


def test_only_plain_sampling_is_unbiased() -> None:
    for plain in ({"temperature": 0.7}, {"stop_ids": (1,)}, {"min_tokens": 3}, {"logprobs": True}):
        assert not SamplingParams(**plain).is_biased
    cut = ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0})
    added = (
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {3: 1}},
        {"min_tokens": 3, "stop_ids": (1,)},
        {"json_schema": {}, "stop_ids": (1,)},
    )
    assert all(SamplingParams(**bias).is_biased for bias in (*cut, *added))
    assert all(SamplingParams(**bias).is_adjusted for bias in added)


# -- several replies -------------------------------------------------------------------------------------------------


def test_a_request_for_several_replies_is_one_for_each_with_its_own_noise() -> None:
    several = SamplingParams(n=2, best_of=5, seed=7, top_k=3)
    each = several.each()
    assert len(each) == 5 and len({one.seed for one in each}) == 5 and each[0].seed == 7
    assert all((one.n, one.best_of, one.top_k, one.logprobs) == (1, 0, 3, True) for one in each)
    assert SamplingParams(seed=7).each() == [SamplingParams(seed=7)]
    assert [one.logprobs for one in SamplingParams(n=2).each()] == [False, False]
    assert SamplingParams(n=4, seed=7).each()[:2] == SamplingParams(n=2, seed=7).each()  # more do not change the first


def test_the_best_replies_are_those_of_the_highest_mean_log_probability() -> None:
    logprobs = [[-1.0, -3.0], [-1.5], [-0.5, -0.5, -0.5, -4.5], [], [-1.5, -1.5]]
    assert best(logprobs, 2) == [3, 1]  # nothing said counts as 0; of equals (-1.5 twice, and the third) the earlier
    assert best(logprobs, 9) == [3, 1, 2, 4, 0]


# -- chi-square: what is drawn against what should be ----------------------------------------------------------------

NUM_DRAWS, SIZE = 20_000, 12
CRITICAL = {
    1: 10.83,
    2: 13.82,
    3: 16.27,
    4: 18.47,
    5: 20.52,
    6: 22.46,
    7: 24.32,
    11: 31.26,
}  # chi-square, 99.9 %, by freedom
LOGITS = [2.0, 1.5, 1.4, 1.0, 0.7, 0.2, 0.0, -0.3, -0.8, -1.0, -1.7, -2.5]


def drawn(seed: int, settings: dict[str, float]) -> list[int]:
    """How often each token comes, of NUM_DRAWS requests whose settings stand between others'."""
    logits_BV = torch.tensor(LOGITS).expand(2 * NUM_DRAWS, -1)
    ours = torch.arange(2 * NUM_DRAWS) % 2 == 0

    def column(name: str, other: float) -> Tensor | None:
        mine = settings.get(name)
        return None if mine is None else torch.where(ours, torch.tensor(mine), torch.tensor(other))

    temperature_B = column("temperature", 0.5)
    seeds_B = torch.tensor([signed64(mix_seed(seed, number)) for number in range(2 * NUM_DRAWS)])
    tokens_B, _ = sample(
        logits_BV,
        torch.where(ours, 1.0, 0.5) if temperature_B is None else temperature_B,
        uniform(seeds_B, torch.full_like(seeds_B, 3)),
        top_k_B=column("top_k", 2),
        top_p_B=column("top_p", 0.2),
        min_p_B=column("min_p", 0.9),
    )
    return torch.bincount(tokens_B[ours], minlength=SIZE).tolist()


def exact(settings: dict[str, float]) -> list[float]:
    weights = [math.exp(logit / settings.get("temperature", 1.0)) for logit in LOGITS]
    kept = slowly_filtered(
        weights, int(settings.get("top_k", 0)), settings.get("top_p", 1.0), settings.get("min_p", 0.0)
    )
    return [weight / sum(kept) for weight in kept]


def chi_square(counts: list[int], probabilities: list[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; infinite where something came that cannot."""
    if any(count and not p for count, p in zip(counts, probabilities, strict=True)):
        return math.inf, 1
    whole = sum(counts)
    cells = [(count - whole * p) ** 2 / (whole * p) for count, p in zip(counts, probabilities, strict=True) if p]
    return sum(cells), len(cells) - 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"top_k": 8, "top_p": 0.93, "min_p": 0.12, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution_of_each_filter(settings: dict[str, float], seed: int) -> None:
    counts = drawn(seed, settings)
    found, freedom = chi_square(counts, exact(settings))
    assert found < CRITICAL[freedom]


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({}, {"temperature": 1.15}),
        ({"temperature": 0.6}, {"temperature": 0.68}),
        ({"top_k": 4}, {"top_k": 5}),
        ({"top_p": 0.8}, {"top_p": 0.88}),
        ({"min_p": 0.3}, {"min_p": 0.2}),
        ({"top_k": 4}, {}),
    ],
    ids=str,
)
def test_the_control_a_slightly_different_distribution_is_told_apart(
    settings: dict[str, float], other: dict[str, float]
) -> None:
    found, freedom = chi_square(drawn(0, settings), exact(other))
    assert found > 2 * CRITICAL[freedom]
