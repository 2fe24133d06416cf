"""Ranked pairs: worked examples, ties, circles, and that known strengths come out of noisy orders."""

from __future__ import annotations

import random
from itertools import combinations, permutations

import numpy as np
import pytest

from lyceum.evals.consensus import locked, margins, ranked_pairs


def order(text: str) -> dict[str, float]:
    """ "AB=C" is A before B and C, which share a place."""
    ranks, place = {}, 0.0
    for at, name in enumerate(text.replace("=", "")):
        place = place if text[text.index(name) - 1 : text.index(name)] == "=" else at + 1.0
        ranks[name] = place
    return ranks


def test_the_notation_of_this_file() -> None:
    assert order("AB=CD") == {"A": 1, "B": 2, "C": 2, "D": 4}


def test_the_capital_of_tennessee() -> None:
    """The textbook example: 42 % Memphis, 26 % Nashville, 15 % Chattanooga, 17 % Knoxville, each by distance."""
    opinions = [order("MNCK")] * 42 + [order("NCKM")] * 26 + [order("CKNM")] * 15 + [order("KCNM")] * 17
    assert margins(opinions)["N", "M"] == 58 - 42 and margins(opinions)["C", "K"] == 83 - 17
    assert ranked_pairs(opinions) == {"N": 1, "C": 2, "K": 3, "M": 4}


def test_the_weakest_win_of_a_circle_is_left_out() -> None:
    """A over B 6 to 3 (margin 3), B over C 7 to 2 (5), C over A 5 to 4 (1): the last would close the circle."""
    opinions = [order("ABC")] * 4 + [order("BCA")] * 3 + [order("CAB")] * 2
    assert margins(opinions) == {("A", "B"): 3, ("B", "C"): 5, ("C", "A"): 1}
    assert locked(margins(opinions)) == {("A", "B"), ("B", "C")}
    assert ranked_pairs(opinions) == {"A": 1, "B": 2, "C": 3}


def test_wins_of_one_margin_that_close_a_circle_are_all_left_out() -> None:
    assert locked({("A", "B"): 3, ("B", "C"): 1, ("C", "A"): 1}) == {("A", "B")}
    assert locked({("A", "B"): 1, ("B", "C"): 1, ("C", "A"): 1, ("A", "D"): 1}) == {("A", "D")}
    assert ranked_pairs([order("ABC"), order("BCA"), order("CAB")]) == {"A": 1, "B": 1, "C": 1}


def test_all_ties_are_equal_and_nobody_says_nothing() -> None:
    assert ranked_pairs([order("A=B=C")] * 5) == {"A": 1, "B": 1, "C": 1}
    assert ranked_pairs([order("AB"), order("BA")]) == {"A": 1, "B": 1}
    assert ranked_pairs([]) == {}
    assert ranked_pairs([{"A": 1.0}]) == {"A": 1}


def test_one_opinion_is_the_consensus_ties_too() -> None:
    for text in ("ABCD", "AB=CD", "A=BC=D", "CADB"):
        assert ranked_pairs([order(text)]) == order(text)


def test_an_item_that_few_ranked_is_placed_by_those() -> None:
    assert ranked_pairs([{"A": 1, "B": 2}, {"B": 1, "C": 2}]) == {"A": 1, "B": 2, "C": 3}


def random_opinions(rng: random.Random) -> list[dict[str, float]]:
    names = "ABCDE"[: rng.randint(2, 5)]
    return [{name: float(rng.randint(1, len(names))) for name in names} for _ in range(rng.randint(1, 7))]


@pytest.mark.parametrize("seed", range(30))
def test_nothing_hangs_on_the_order_or_the_names_and_turned_round_it_is_turned_round(seed: int) -> None:
    rng = random.Random(seed)
    opinions = random_opinions(rng)
    ranks = ranked_pairs(opinions)
    shuffled = [dict(rng.sample(list(one.items()), len(one))) for one in rng.sample(opinions, len(opinions))]
    assert ranked_pairs(shuffled) == ranks
    names = dict(zip(ranks, rng.sample(list(ranks), len(ranks)), strict=True))
    renamed = [{names[item]: rank for item, rank in one.items()} for one in opinions]
    assert ranked_pairs(renamed) == {names[item]: rank for item, rank in ranks.items()}
    turned = ranked_pairs([{item: -rank for item, rank in one.items()} for one in opinions])
    for a, b in permutations(ranks, 2):
        assert (ranks[a] < ranks[b]) == (turned[b] < turned[a])


@pytest.mark.parametrize("seed", range(30))
def test_who_beats_everybody_is_first_alone_and_locked_wins_are_kept(seed: int) -> None:
    opinions = random_opinions(random.Random(100 + seed))
    ranks, wins = ranked_pairs(opinions), margins(opinions)
    for item in ranks:
        if all((item, other) in wins for other in ranks if other != item):
            assert [one for one in ranks if ranks[one] == 1] == [item]
    assert all(ranks[winner] < ranks[loser] for winner, loser in locked(wins))


def distance(ranks: dict[str, float], truth: dict[str, float]) -> float:
    """Share of pairs in the wrong order; a tie is half wrong."""
    wrong = [
        0.5 if ranks[a] == ranks[b] else float((ranks[a] < ranks[b]) != (truth[a] < truth[b]))
        for a, b in combinations(truth, 2)
    ]
    return sum(wrong) / len(wrong)


def test_known_strengths_are_recovered_from_noisy_orders_and_not_from_shuffled_ones() -> None:
    truth = {name: float(place) for place, name in enumerate("ABCDEF", 1)}
    rng = np.random.default_rng(0)

    def noisy(shuffle: bool = False) -> dict[str, float]:  # Plackett-Luce: strengths 0.7 apart, Gumbel noise
        drawn = np.array([-0.7 * rank for rank in truth.values()]) + rng.gumbel(size=len(truth))
        places = (-drawn).argsort().argsort() + 1
        return dict(zip(truth, (rng.permutation(places) if shuffle else places).astype(float).tolist(), strict=True))

    def wrong(num: int, **more: bool) -> float:
        return float(np.mean([distance(ranked_pairs([noisy(**more) for _ in range(num)]), truth) for _ in range(40)]))

    alone, three, many, control = wrong(1), wrong(3), wrong(101), wrong(101, shuffle=True)
    assert many < 0.01 < three < alone - 0.03 and alone < 0.35
    assert 0.4 < control < 0.6
