"""Agreement between people: worked examples, Krippendorff's own table, and that the careless are found and nobody else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lyceum.evals.annotators import (
    LEAST,
    Opinion,
    alike,
    between,
    krippendorff_alpha,
    majority,
    nominal,
    on_interval,
    ordinal,
    people,
)

# Krippendorff 2011, section C: four observers, twelve units, missing values
TABLE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[value for value in column if value is not None] for column in zip(*TABLE, strict=True)]


@pytest.mark.parametrize(("distance", "alpha"), [(nominal, 0.743), (ordinal, 0.815), (on_interval, 0.849)])
def test_alpha_is_that_of_krippendorffs_own_table(distance: object, alpha: float) -> None:
    assert krippendorff_alpha(UNITS, distance) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand() -> None:
    """Two yes/no units, (yes, yes) and (yes, no): observed 1/4 x 2 = 1/2, expected 2 x 3 x 1 / (4 x 3) = 1/2."""
    assert krippendorff_alpha([["y", "y"], ["y", "n"]]) == pytest.approx(0.0)
    assert krippendorff_alpha([["y", "y"], ["n", "n"]]) == 1.0
    assert krippendorff_alpha([["y", "n"], ["n", "y"]]) == pytest.approx(1 - 1 / (8 / 12))
    assert math.isnan(krippendorff_alpha([["y"], ["n"]])) and math.isnan(krippendorff_alpha([["y", "y"]]))


def test_alpha_of_chance_is_about_zero() -> None:
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(rng.integers(0, 3, (2000, 2)).tolist())) < 0.05


def test_pairs_are_compared_where_both_decide() -> None:
    ours, theirs = {"A": 1.0, "B": 2.0, "C": 3.0}, {"A": 2.0, "B": 1.0, "C": 2.0}
    assert alike(ours, theirs) == (1, 2)  # A-B against, B-C with; A-C tied by them
    assert alike(ours, ours) == (3, 3) and alike(ours, {"A": 1.0, "B": 1.0, "C": 1.0}) == (0, 0)


def test_agreement_between_two_people_by_hand() -> None:
    first = [Opinion("x", "1", {"A": 1, "B": 2}), Opinion("y", "1", {"A": 1, "B": 2})]
    second = [Opinion("x", "2", {"A": 1, "B": 2, "C": 3}), Opinion("y", "2", {"A": 3, "B": 2, "C": 1})]
    assert between(first)[0] == 1 and between([*first, *second])[0] == pytest.approx(1 / 4)
    assert math.isnan(between([Opinion("x", "1", {"A": 1, "B": 2})] * 2)[0])  # nobody agrees with himself


def test_the_majority_of_the_others_leaves_oneself_out() -> None:
    orders = {"x": ("A", "B"), "y": ("A", "B"), "z": ("B", "A")}
    opinions = [Opinion(name, "1", {better: 1, worse: 2}) for name, (better, worse) in orders.items()]
    assert majority(opinions) == {("A", "B"): 1}
    told = {one.annotator: one for one in people(opinions)}
    assert told["z"].others[0] == 0 and told["z"].num_others == 1
    assert told["x"].num_others == 0 and told["x"].to_json()["others"] is None  # y and z are of two minds


def test_nobody_is_careless_on_one_set_that_others_have_seen_too() -> None:
    mine = [Opinion("z", str(item), {"A": 1, "B": 2}) for item in range(20)]
    others = [Opinion(name, "0", {"A": 2, "B": 1}) for name in ("x", "y")]
    crowd = [Opinion(name, f"c{item}", {"A": 1, "B": 2}) for item in range(20) for name in ("u", "v", "w")]
    told = {one.annotator: one for one in people([*mine, *others, *crowd])}
    assert told["z"].num_others == 1 and told["z"].others[2] == 0.0 and told["z"].verdict == ""


def simulated(
    accuracies: list[float], seed: int, *, items: int = 120, each: int = 5, gold: int = 0
) -> tuple[list[Opinion], dict[str, dict[str, float]]]:
    """People who order each two neighbouring answers rightly with this probability; the first `gold` items have known answers."""
    rng = np.random.default_rng(seed)
    opinions, truth = [], {}
    for item in range(items):
        names = [f"{item}-{place}" for place in range(4)]
        truth[str(item)] = {name: float(place) for place, name in enumerate(names, 1)}
        chosen = range(len(accuracies)) if item < gold else rng.choice(len(accuracies), each, replace=False)
        for person in chosen:
            # noise on the places so large that a share `accuracy` of pairs that are next to each other is right
            spread = np.inf if accuracies[person] <= 0.5 else noise_of(accuracies[person])
            value = rng.normal(size=4) if math.isinf(spread) else np.arange(4) + spread * rng.normal(size=4)
            ranks = dict(zip(names, (value.argsort().argsort() + 1.0).tolist(), strict=True))
            opinions.append(Opinion(f"p{person}", str(item), ranks, tuple(rng.permutation(names))))
    return opinions, {item: truth[item] for item in list(truth)[:gold]}


def noise_of(accuracy: float) -> float:
    """The deviation of the noise at which P(difference of two neighbours > 0) is `accuracy`."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        right = 0.5 * (1 + math.erf(1 / middle / 2))  # the difference has deviation sqrt(2) x noise
        low, high = (middle, high) if right > accuracy else (low, middle)
    return low


@pytest.mark.parametrize("seed", range(5))
def test_the_careless_are_found_and_nobody_else(seed: int) -> None:
    accuracies = [0.9] * 8 + [0.75] * 8 + [0.5] * 4
    opinions, _ = simulated(accuracies, seed)
    found = people(opinions)
    careless = {one.annotator for one in found if one.verdict == "careless"}
    assert careless == {f"p{person}" for person in range(16, 20)}
    assert found[0].others[0] <= found[-1].others[0]  # the least agreeing first
    control = people(simulated([0.75] * 20, seed)[0])
    assert not [one for one in control if one.verdict]


def test_known_answers_find_them_where_most_are_careless() -> None:
    accuracies = [0.9] * 4 + [0.5] * 16
    opinions, gold = simulated(accuracies, 0, gold=20)
    blind = {one.annotator for one in people(opinions) if one.verdict == "careless"}
    seeing = {one.annotator for one in people(opinions, gold) if one.verdict == "careless"}
    assert seeing == {f"p{person}" for person in range(4, 20)} and not blind >= seeing
    assert all(one.num_gold == 20 for one in people(opinions, gold))


def test_who_leaves_the_order_as_it_was_shown_is_seen() -> None:
    opinions, _ = simulated([0.9] * 4, 0, items=40, each=4)
    lazy = [
        Opinion(one.annotator, one.item, {name: at + 1.0 for at, name in enumerate(one.shown)}, one.shown)
        if one.annotator == "p3"
        else one
        for one in opinions
    ]
    told = {one.annotator: one for one in people(lazy)}
    assert told["p3"].as_shown[0] == 1 and told["p3"].verdict == "careless"
    assert all(abs(told[f"p{person}"].as_shown[0] - 0.5) < 0.15 for person in range(3))


def test_of_few_rankings_nothing_is_said() -> None:
    opinions, _ = simulated([0.5] * 3, 0, items=LEAST - 1, each=3)
    assert {one.verdict for one in people(opinions)} == {"few"}
    tied = [Opinion("x", str(item), {"A": 1.0, "B": 1.0}) for item in range(9)]
    assert people(tied)[0].ties == 1 and people(tied)[0].verdict == ""
