"""Bradley-Terry from votes: known answers, known strengths, ties, models that never lost or never met, style."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.evals.arena import CENTRE, POINTS, Table, Verdict, Vote, by_kind, facets, style_of, table_of


def points(table: Table) -> dict[str, float]:
    return {one.model: one.points for one in table.standings}


def votes(left: str, right: str, wins: int, losses: int, ties: int = 0) -> list[Vote]:
    """Votes in conversations of their own, on sides in turn."""
    found = (
        [Vote(left, right, "left")] * wins + [Vote(left, right, "right")] * losses + [Vote(left, right, "tie")] * ties
    )
    return [replace(turned(vote) if n % 2 else vote, group=f"{left}{right}{n}") for n, vote in enumerate(found)]


def turned(vote: Vote) -> Vote:
    """The same vote, had the answers stood the other way round."""
    mirror: dict[Verdict, Verdict] = {"left": "right", "right": "left", "tie": "tie", "neither": "neither"}
    return replace(
        vote, left=vote.right, right=vote.left, verdict=mirror[vote.verdict], style=(vote.style[1], vote.style[0])
    )


# -- known answers -----------------------------------------------------------------------------------------------------


def test_three_to_one_is_190_85_points_around_a_thousand() -> None:
    found = points(table_of(votes("a", "b", 3, 1)))
    assert found["a"] - found["b"] == pytest.approx(190.8485, abs=1e-4)
    assert found["a"] + found["b"] == pytest.approx(2 * CENTRE)


def test_ties_count_half_so_two_wins_and_two_ties_are_three_to_one() -> None:
    one, other = (points(table_of(votes("a", "b", *counts))) for counts in ((3, 1), (2, 0, 2)))
    assert one["a"] - one["b"] == pytest.approx(other["a"] - other["b"], abs=1e-6)


@pytest.mark.parametrize("verdict", ["tie", "neither"])
def test_all_ties_are_equal(verdict: Verdict) -> None:
    given = [Vote(*pair, verdict, group=f"{n}{pair}") for pair in itertools.combinations("abcd", 2) for n in range(5)]
    table = table_of(given)
    assert set(np.round(list(points(table).values()), 6)) == {CENTRE}
    assert {one.place for one in table.standings} == {1} and table.verdicts[verdict] == 30
    assert all(one.low == one.high == pytest.approx(CENTRE) for one in table.standings)  # no round can differ


def test_a_chain_of_three_to_one_adds_up_and_three_models_match_a_search_on_a_grid() -> None:
    chain = points(table_of(votes("a", "b", 3, 1) + votes("b", "c", 3, 1)))
    assert chain["a"] - chain["c"] == pytest.approx(2 * 190.8485, abs=1e-3)
    counts = {("a", "b"): (5, 3), ("b", "c"): (4, 4), ("a", "c"): (2, 7)}  # a circle: no closed form
    found = points(table_of([vote for pair, both in counts.items() for vote in votes(*pair, *both)]))
    strength = {model: (value - CENTRE) / POINTS for model, value in found.items()}

    def log_likelihood(a: float, b: float, c: float) -> float:
        s = {"a": a, "b": b, "c": c}
        return sum(
            -won * math.log1p(math.exp(s[j] - s[i])) - lost * math.log1p(math.exp(s[i] - s[j]))
            for (i, j), (won, lost) in counts.items()
        )

    best = log_likelihood(**strength)
    steps = (-0.02, 0.0, 0.02)
    for da, db in itertools.product(steps, steps):
        moved = {"a": strength["a"] + da, "b": strength["b"] + db, "c": strength["c"]}
        assert log_likelihood(**moved) <= best + 1e-12


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), st.sampled_from(["left", "right", "tie"])),
        max_size=25,
    )
)
def test_any_votes_have_finite_points_and_sides_and_order_do_not_matter(given: list[tuple[str, str, Verdict]]) -> None:
    as_given = [Vote(*one, group=str(n)) for n, one in enumerate(given)]
    table = table_of(as_given, rounds=5)
    assert all(math.isfinite(one.points) for one in table.standings)
    other = table_of([turned(vote) for vote in reversed(as_given)], rounds=0)
    assert points(other) == pytest.approx(points(table), abs=1e-5)
    assert {one.model for one in table.standings} == {
        m for vote in as_given if vote.left != vote.right for m in (vote.left, vote.right)
    }
    json.dumps(table.to_json(), allow_nan=False)


# -- who cannot be told apart ------------------------------------------------------------------------------------------


def test_an_undefeated_model_leads_with_an_open_interval_and_says_that_its_distance_is_not_from_the_votes() -> None:
    table = table_of(votes("best", "a", 6, 0) + votes("best", "b", 6, 0) + votes("a", "b", 8, 4))
    best, a, b = table.standings
    assert (best.model, a.model, b.model) == ("best", "a", "b")
    assert best.high == math.inf and math.isfinite(best.low) and not best.is_exact and best.score == 1.0
    assert a.points - b.points > 60  # what the votes say of these two stays: 8 to 4 alone are 120
    told = table.to_json()["standings"][0]
    assert told["high"] is None and told["is_open"] == ["high"]
    worse = table_of(votes("best", "a", 12, 0) + votes("best", "b", 12, 0) + votes("a", "b", 8, 4))
    assert worse.standings[0].points > best.points  # more wins without a loss: further up, and still finite
    assert {one.is_exact for one in table_of(votes("a", "b", 3, 1)).standings} == {True}


def test_a_winless_model_stands_last_with_an_interval_open_below() -> None:
    last = table_of(votes("a", "b", 8, 4) + votes("a", "worst", 6, 0) + votes("b", "worst", 6, 0)).standings[-1]
    assert (last.model, last.low, last.score) == ("worst", -math.inf, 0.0)


def test_two_pairs_of_equals_that_only_lost_between_each_other_are_not_exact_though_nobody_is_undefeated() -> None:
    above = votes("a", "b", 3, 3) + votes("c", "d", 3, 3)
    table = table_of(above + votes("a", "c", 4, 0) + votes("b", "d", 4, 0))
    assert not any(one.is_exact for one in table.standings) and {one.group for one in table.standings} == {1}
    assert {one.model for one in table.standings[:2]} == {"a", "b"}


def test_models_that_never_met_stand_in_groups_of_their_own() -> None:
    table = table_of(votes("a", "b", 9, 3) + votes("b", "e", 5, 5) + votes("c", "d", 3, 1))
    groups = {one.model: one.group for one in table.standings}
    assert groups == {"a": 1, "b": 1, "e": 1, "c": 2, "d": 2}
    for group in (1, 2):
        assert np.mean([one.points for one in table.standings if one.group == group]) == pytest.approx(CENTRE)
    found = points(table)
    assert found["c"] - found["d"] == pytest.approx(190.8485, abs=1e-3)  # as alone
    joined = table_of(votes("a", "b", 9, 3) + votes("b", "e", 5, 5) + votes("c", "d", 3, 1) + votes("a", "c", 1, 1))
    assert {one.group for one in joined.standings} == {1}


def test_a_model_against_itself_says_nothing_and_no_votes_are_an_empty_table() -> None:
    assert table_of([]).standings == () == table_of([Vote("a", "a", "left")]).standings


# -- known strengths, and intervals ------------------------------------------------------------------------------------


def simulated(strengths: Sequence[float], num: int, random: np.random.Generator) -> list[Vote]:
    """Votes on pairs drawn by lot, in conversations of their own."""
    left_V = random.integers(len(strengths), size=num)
    right_V = (left_V + random.integers(1, len(strengths), size=num)) % len(strengths)
    strength = np.asarray(strengths)
    is_left_V = random.random(num) < 1 / (1 + np.exp(strength[right_V] - strength[left_V]))
    rows = zip(left_V.tolist(), right_V.tolist(), is_left_V.tolist(), strict=True)
    return [Vote(f"m{i}", f"m{j}", "left" if won else "right", str(n)) for n, (i, j, won) in enumerate(rows)]


def test_known_strengths_are_recovered_and_their_order() -> None:
    strengths = [-1.0, -0.3, 0.2, 1.1]
    table = table_of(simulated(strengths, 12_000, np.random.default_rng(0)), rounds=0)
    assert [one.model for one in table.standings] == ["m3", "m2", "m1", "m0"]
    wanted = {f"m{i}": CENTRE + POINTS * (s - np.mean(strengths)) for i, s in enumerate(strengths)}
    assert points(table) == pytest.approx(wanted, abs=20)  # standard errors are about 6


def coverage(num_simulations: int, rounds: int, *, shuffled: bool = False) -> float:
    """The share of simulations in which the interval of the strongest of three models holds its true strength."""
    strengths, random, hits = [0.6, 0.0, -0.6], np.random.default_rng(1), 0
    truth = CENTRE + POINTS * 0.6
    for seed in range(num_simulations):
        found = table_of(simulated(strengths, 240, random), rounds=rounds, seed=seed)
        one = next(one for one in found.standings if one.model == ("m1" if shuffled else "m0"))
        hits += one.low <= truth <= one.high
    return hits / num_simulations


def test_intervals_cover_the_truth_about_95_percent_of_the_time() -> None:
    # of 80 simulations a true 95 % covers, but for one in a thousand, 0.95 - 3 sqrt(0.95 0.05 / 80) = 0.877 or more
    assert 0.877 <= coverage(80, 60) <= 1.0
    assert coverage(10, 40, shuffled=True) < 0.2  # the control: another model's interval


@pytest.mark.slow
def test_intervals_cover_the_truth_in_a_thousand_simulations() -> None:
    assert 0.93 <= coverage(1000, 200) <= 0.971  # 0.95 +- 3 sqrt(0.95 0.05 / 1000) = 0.929 to 0.971


def test_votes_that_hang_together_make_wider_intervals() -> None:
    random = np.random.default_rng(2)
    once = simulated([0.4, 0.0], 60, random)
    copied = [
        replace(vote, group=str(n)) for n, vote in enumerate(once) for _ in range(5)
    ]  # five times the same opinion
    apart = [replace(vote, group=str(n)) for n, vote in enumerate(copied)]
    width = {}
    for name, some in (("once", once), ("copied", copied), ("apart", apart)):
        one = table_of(some).standings[0]
        width[name] = one.high - one.low
    assert width["copied"] == pytest.approx(width["once"], rel=1e-6)  # nothing was learned by copying
    assert width["apart"] < 0.6 * width["once"]  # and it looks so if the copies count as news


def test_under_ten_conversations_there_is_no_interval() -> None:
    few = [replace(vote, group=str(n // 10)) for n, vote in enumerate(votes("a", "b", 60, 30))]
    assert all(math.isnan(one.low) and math.isnan(one.high) and one.place == 1 for one in table_of(few).standings)
    more = [replace(vote, group=str(n // 9)) for n, vote in enumerate(votes("a", "b", 60, 30))]
    assert table_of(more).standings[0].low < table_of(more).standings[0].points < table_of(more).standings[0].high


def test_a_model_is_surely_better_only_where_the_intervals_are_apart() -> None:
    close, far = (table_of(votes("a", "b", *counts)) for counts in ((21, 19), (300, 30)))
    assert [one.place for one in close.standings] == [1, 1] and [one.place for one in far.standings] == [1, 2]


# -- style and kinds ---------------------------------------------------------------------------------------------------


def test_style_is_counted_without_what_stands_in_code_blocks() -> None:
    text = "# Title\n\n- one\n- **two**\n1. three\n\n```md\n# not\n- this **neither**\n```\nand __that__"
    assert style_of(text) == (len(text), 1, 3, 2)
    assert style_of("2 * 3 ** 4 ** 5\n#hashtag\n-no item") == (33, 0, 0, 0)


def planted(bias: float, difference: float, num: int = 1500) -> list[Vote]:
    """Model "long" writes three times as much; people prefer what is longer by `bias`, and "long" itself by `difference`."""
    random = np.random.default_rng(3)
    found = []
    for n in range(num):
        names = ["long", "short"] if random.random() < 0.5 else ["short", "long"]
        sizes = [random.uniform(50, 150) * (3 if name == "long" else 1) for name in names]
        style = tuple((size, 0.0, 0.0, float(random.integers(0, 3))) for size in sizes)
        push = bias * (sizes[0] - sizes[1]) / (sizes[0] + sizes[1]) + difference * (1 if names[0] == "long" else -1)
        verdict: Verdict = "left" if random.random() < 1 / (1 + math.exp(-push)) else "right"
        found.append(Vote(names[0], names[1], verdict, str(n), (style[0], style[1])))
    return found


@pytest.mark.parametrize("difference", [0.0, 0.7])
def test_style_control_takes_out_a_planted_bias_for_length_and_leaves_a_true_difference(difference: float) -> None:
    given, truth = planted(3.0, difference), POINTS * difference
    plain, controlled = points(table_of(given, rounds=0)), table_of(given, controls_style=True, rounds=100)
    assert plain["long"] - plain["short"] > truth + 150  # the bias, as if it were strength
    held = {one.model: one for one in controlled.standings}
    assert held["long"].points - held["short"].points == pytest.approx(truth, abs=90)
    assert held["long"].low <= CENTRE + truth / 2 <= held["long"].high
    effects = {one.name: one for one in controlled.effects}
    assert set(effects) == {"length", "bold"}  # headings and lists: nobody used them, so they are worth nothing
    assert effects["length"].low > 50 and effects["bold"].low < 0 < effects["bold"].high


def test_style_that_always_won_keeps_finite_effects() -> None:
    given = [
        replace(vote, style=((9.0, 0, 0, 1), (3.0, 0, 0, 0)))
        for vote in [Vote("a", "b", "left"), Vote("b", "a", "left")] * 9
    ]
    found = table_of(given, controls_style=True)
    assert points(found)["a"] == pytest.approx(CENTRE, abs=1e-6)
    assert all(0 < one.points < 2000 for one in found.effects)


def test_prompts_show_what_they_are() -> None:
    assert facets("What does json.dumps do?", 1) == {"code"}
    assert facets("法国的首都是哪里？", 2) == {"chinese", "turns"}
    assert facets("word " * 101, 1) == {"long"}
    assert facets("Who was Ada Lovelace?", 1) == frozenset()


def test_a_vote_counts_for_each_kind_of_its_prompt_the_most_frequent_first() -> None:
    some = [
        Vote("a", "b", "left", kinds=frozenset({"code", "chat"})),
        Vote("a", "b", "right", kinds=frozenset({"code"})),
    ]
    assert {kind: len(found) for kind, found in by_kind(some).items()} == {"code": 2, "chat": 1}
    assert list(by_kind(some)) == ["code", "chat"]
