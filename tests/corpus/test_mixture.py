from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.corpus.mixture import Mixture, Place, key_of, largest_remainder, permuted
from lyceum.errors import DataError


@given(st.integers(1, 700), st.integers(0, 2**70))
@settings(max_examples=60)
def test_a_keyed_permutation_visits_every_number_once(size: int, key: int) -> None:
    assert sorted(permuted(size, key, index) for index in range(size)) == list(range(size))


def test_a_large_permutation_is_one_to_one_on_a_sample() -> None:
    size = 10**12 + 39
    images = {permuted(size, 5, index) for index in range(0, size, size // 500)}
    assert len(images) == 501 and all(0 <= image < size for image in images)


def test_permutations_differ_by_key_and_look_shuffled() -> None:
    size = 1000
    orders = [[permuted(size, key, index) for index in range(size)] for key in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    for order in orders:
        assert sum(order[n] == n for n in range(size)) <= 8  # a random permutation has one fixed point on average
        ups = sum(b > a for a, b in zip(order[:-1], order[1:], strict=True))
        assert abs(ups - 499.5) < 5 * (1000 / 12) ** 0.5  # the number of ascents has variance (n + 1) / 12
    first = Counter(permuted(4, key, 0) for key in range(4000))
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in first.values())


def test_keys_tell_names_and_numbers_apart() -> None:
    parts = [(1,), (2,), (1, 2), (2, 1), ("a",), ("ab",), ("a", "b"), (1, "a"), (2**64 + 1,), ()]
    assert len({key_of(*part) for part in parts}) == len(parts)


def test_largest_remainder_by_hand() -> None:
    # 10 * (0.5, 0.3, 0.2) is whole; 10 / 3 = 3.33 each, the one left over is the first's; 7 * (2/3, 1/3) = 4.67, 2.33
    assert largest_remainder({"a": 5, "b": 3, "c": 2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert largest_remainder({"a": 2, "b": 1}, 7) == {"a": 5, "b": 2}


def test_every_block_has_the_exact_shares() -> None:
    mixture = Mixture({"docs": 7, "code": 1000}, {"docs": 1, "code": 3}, seed=3)
    for block in range(3):
        places = [mixture.at(k).source for k in range(block * mixture.block, (block + 1) * mixture.block)]
        assert Counter(places) == {"docs": 32, "code": 96}


def test_each_epoch_of_a_source_has_every_row_once_in_another_order() -> None:
    mixture = Mixture({"docs": 10, "code": 50}, {"docs": 1, "code": 1}, seed=1)
    places = [mixture.at(k) for k in range(20 * mixture.block)]
    for source, size in mixture.sizes.items():
        epochs: dict[int, list[int]] = {}
        for place in places:
            if place.source == source:
                epochs.setdefault(place.epoch, []).append(place.index)
        whole = [order for epoch, order in epochs.items() if epoch < max(epochs)]
        assert len(whole) > 20
        assert all(sorted(order) == list(range(size)) for order in whole)
        assert len({tuple(order) for order in whole}) == len(whole)


def test_ranks_read_the_stream_of_one_reader() -> None:
    def mixture() -> Mixture:
        return Mixture({"a": 13, "b": 29}, {"a": 0.3, "b": 0.7}, seed=9)

    straight = [mixture().at(k) for k in range(300)]
    for world in (1, 2, 3, 7):
        ranks = [[mixture().at(k) for k in range(rank, 300, world)] for rank in range(world)]
        assert [ranks[k % world][k // world] for k in range(300)] == straight
    assert [mixture().at(k) for k in reversed(range(300))] == straight[::-1]
    assert [Mixture({"b": 29, "a": 13}, {"b": 7, "a": 3}, seed=9).at(k) for k in range(300)] == straight
    assert [Mixture({"a": 13, "b": 29}, {"a": 3, "b": 7}, seed=8).at(k) for k in range(300)] != straight


def test_the_stream_is_the_same_in_another_process() -> None:
    program = (
        "from lyceum.corpus.mixture import Mixture\n"
        "m = Mixture({'a': 13, 'b': 29}, {'a': 3, 'b': 7}, 9)\n"
        "print([m.at(k) for k in range(50)])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    mixture = Mixture({"a": 13, "b": 29}, {"a": 3, "b": 7}, 9)
    assert said.strip() == str([mixture.at(k) for k in range(50)])


def test_epochs_are_known_before_the_run() -> None:
    mixture = Mixture({"docs": 64, "code": 1000}, {"docs": 1, "code": 1}, seed=2)
    assert mixture.epochs(2 * mixture.block) == {"code": 0.128, "docs": 2.0}
    assert mixture.samples(0) == {"docs": 0, "code": 0}
    for n in (1, 77, 300):
        assert Counter(mixture.samples(n)) == Counter(mixture.at(k).source for k in range(n))


def test_a_source_with_a_tiny_weight_still_comes() -> None:
    mixture = Mixture({"a": 5, "b": 5}, {"a": 1, "b": 0.001}, seed=0)
    assert mixture.counts["b"] >= 1
    assert abs(mixture.counts["b"] / mixture.block - 0.001 / 1.001) < 1e-3


def test_a_source_without_weight_never_comes_and_one_row_is_enough() -> None:
    mixture = Mixture({"a": 1, "b": 5}, {"a": 2, "b": 0}, seed=0)
    places = [mixture.at(k) for k in range(mixture.block)]
    assert sorted(place.epoch for place in places) == list(range(mixture.block))
    assert all(place == Place("a", place.epoch, 0) for place in places)


@pytest.mark.parametrize(
    ("sizes", "weights"), [({"a": 0}, {"a": 1}), ({"a": 3}, {"a": 1, "b": 1}), ({"a": 3}, {"a": 0}), ({}, {})]
)
def test_a_mixture_of_nothing_is_an_error(sizes: dict[str, int], weights: dict[str, float]) -> None:
    with pytest.raises(DataError):
        Mixture(sizes, weights, seed=0)
