"""TAMER: credit by the density of delay, and a model of what a trainer would say, against hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.tamer import Delay, Human, Lesson, Press, Taste, credit, credited, times_of
from lyceum.errors import UsageError

QUARTERS = [(i / 4, (i + 1) / 4) for i in range(8)]  # four tokens a second, for two seconds


@given(
    st.floats(0.8, 2.0),
    st.lists(st.floats(0.01, 0.5), min_size=1, max_size=20),
    st.sampled_from([Delay(), Delay(0.15, 0.4), Delay(0.3, 0.3)]),
)
def test_the_credit_of_a_press_whose_window_is_covered_adds_up_to_one(
    press_s: float, lengths: list[float], delay: Delay
) -> None:
    bounds, at = [0.0], 0.0
    while at <= press_s:
        at += lengths[len(bounds) % len(lengths)]
        bounds.append(at)
    shares = [credit(span, press_s, delay) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0


def test_a_uniform_window_by_hand() -> None:
    # pressed at 1.0 with a delay of 0.2 to 0.8: what was shown from 0.2 to 0.8 is meant, 0.6 seconds in all
    shares = [credit(span, 1.0, Delay(0.2, 0.8)) for span in QUARTERS]
    assert shares == pytest.approx([0.05 / 0.6, 0.25 / 0.6, 0.25 / 0.6, 0.05 / 0.6, 0, 0, 0, 0])


def test_a_step_beside_the_window_gets_nothing_and_one_around_it_everything() -> None:
    delay = Delay(0.25, 0.5)  # a press at 1.0 means 0.5 to 0.75
    assert credit((0.25, 0.5), 1.0, delay) == credit((0.75, 1.0), 1.0, delay) == 0
    assert credit((0.5, 0.75), 1.0, delay) == credit((0.0, 2.0), 1.0, delay) == 1
    assert credit((0.5, 0.625), 1.0, delay) == 0.5


def test_an_immediate_press_means_what_is_shown_and_at_a_boundary_what_begins() -> None:
    shares = [[credit(span, t, Delay(0.0, 0.0)) for span in QUARTERS[:3]] for t in (0.0, 0.1, 0.25, 0.6)]
    assert shares == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_press_before_its_window_has_been_shown_is_credited_in_part() -> None:
    assert sum(credit(span, 0.5, Delay(0.2, 0.8)) for span in QUARTERS) == pytest.approx(0.5)  # 0.3 of 0.6 seconds


def test_labels_are_presses_weighted_by_credit_and_silence_is_no_label() -> None:
    labels, weights = credited(QUARTERS, [Press(1.0, 1.0), Press(1.25, -1.0)], Delay(0.2, 0.8))
    # the second window is the first, one step later
    assert weights == pytest.approx([x / 0.6 for x in (0.05, 0.30, 0.50, 0.30, 0.05, 0, 0, 0)])
    assert labels == pytest.approx([1, 0.2 / 0.3, 0, -0.2 / 0.3, -1, 0, 0, 0])
    assert credited(QUARTERS, [], Delay()) == ([0.0] * 8, [0.0] * 8)


def test_a_delay_that_cannot_be_is_refused() -> None:
    for low, high in ((-0.1, 0.5), (0.8, 0.2)):
        with pytest.raises(UsageError, match="a delay from"):
            Delay(low, high)


def test_the_greedy_action_may_be_the_first() -> None:
    human = Human(3, 2)
    human.weight_AD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert human.greedy(torch.tensor([[2.0, 1.0], [1.0, 2.0], [-1.0, -3.0]])).tolist() == [0, 1, 2]
    assert Human(3, 2).greedy(torch.ones(1, 2)).tolist() == [0]  # all the same


def test_the_human_reward_ends_where_weighted_least_squares_does() -> None:
    chance = torch.Generator().manual_seed(0)
    phi = torch.randn(300, 4, generator=chance, dtype=torch.float64)
    action = torch.randint(0, 3, (300,), generator=chance)
    weight = torch.rand(300, generator=chance, dtype=torch.float64)
    label = (phi * torch.randn(3, 4, generator=chance, dtype=torch.float64)[action]).sum(1)
    label += 0.5 * torch.randn(300, generator=chance, dtype=torch.float64)
    human = Human(4, 4, torch.float64)
    for _ in range(400):
        human.step(*human.gradient(phi, action, label, weight), 1.0)
    for a in range(3):
        x, y, c = phi[action == a], label[action == a], weight[action == a].sqrt()[:, None]
        best = torch.linalg.lstsq(c * x, c * y[:, None]).solution[:, 0]
        torch.testing.assert_close(human.weight_AD[a], best, atol=1e-8, rtol=1e-6)
    assert (human.weight_AD[3] == 0).all()  # of whom nobody said anything
    assert human.of(phi, action) == pytest.approx(human.values(phi)[torch.arange(300), action])


def test_steps_may_be_summed_over_ranks() -> None:
    chance = torch.Generator().manual_seed(1)
    phi, action = torch.randn(10, 4, generator=chance), torch.randint(0, 3, (10,), generator=chance)
    label, weight = torch.randn(10, generator=chance), torch.rand(10, generator=chance)
    human = Human(3, 4)
    whole = human.gradient(phi, action, label, weight)
    parts = [human.gradient(phi[s], action[s], label[s], weight[s]) for s in (slice(0, 3), slice(3, 10))]
    for one, two, three in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one, two + three)


# -- live: segments, and a head over all of them


def test_a_segment_is_the_newest_until_the_next_begins_and_the_last_for_good() -> None:
    lesson = Lesson.of(torch.eye(3), [0.0, 1.0, 1.5], [Press(1.4, 1.0), Press(9.0, -1.0)], Delay(0.2, 0.8))
    # the first press means 0.6 to 1.2: two thirds of it before the second segment began; the late one can only mean the last
    assert lesson.weight_N.tolist() == pytest.approx([2 / 3, 1 / 3, 1.0])
    assert lesson.label_N.tolist() == [1, 1, -1]


def test_a_taste_is_the_credit_weighted_ridge_regression_either_way_it_is_solved() -> None:
    chance = torch.Generator().manual_seed(2)
    for num, width in ((6, 20), (60, 5)):
        phi = torch.randn(num, width, generator=chance) + 3.0
        label = torch.randint(0, 2, (num,), generator=chance) * 2.0 - 1
        weight = torch.rand(num, generator=chance)
        weight[::3] = 0  # shown, and no press reached them
        parts = [Lesson(phi[s], label[s], weight[s]) for s in (slice(0, 4), slice(4, num))]
        taste = Taste(parts, ridge=0.7)
        x = phi.double() - phi.double().mean(0)
        x = x / x.square().sum(1).mean().sqrt()
        c = weight.double()[:, None]
        by_hand = torch.linalg.solve(x.T @ (c * x) + 0.7 * torch.eye(width).double(), x.T @ (c[:, 0] * label.double()))
        torch.testing.assert_close(taste.weight_D, by_hand)
        torch.testing.assert_close(taste.values(phi), x @ by_hand)
        assert taste.num_presses == pytest.approx(float(weight.sum()))


def test_a_taste_knows_what_is_liked_from_likes_alone_and_nothing_from_silence() -> None:
    rows = torch.tensor(
        [[5.0, 1.0, 0.0], [5.0, 0.0, 1.0], [5.0, 0.0, 1.0], [5.0, 1.0, 0.0]]
    )  # much in all of them is alike
    taste = Taste([Lesson(rows, torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0]))])
    liked, other = taste.values(torch.tensor([[5.0, 1.0, 0.0], [5.0, 0.0, 1.0]])).tolist()
    assert liked > 0 > other
    untaught = Taste([Lesson(rows, torch.zeros(4), torch.zeros(4))])
    assert not untaught.is_taught and not Taste().is_taught
    assert untaught.values(rows).tolist() == [0.0] * 4


def test_tokens_are_shown_with_the_piece_that_their_first_character_is_in() -> None:
    pieces = [(0.0, 1.0, "ab"), (1.0, 1.5, ""), (1.5, 2.5, "cdé"), (2.5, 3.0, "f")]
    # tokens: a, b | cd, é | f, and one behind the end
    assert times_of(pieces, [0, 1, 2, 4, 5, 6]) == [
        (0.0, 0.5),
        (0.5, 1.0),
        (1.5, 2.0),
        (2.0, 2.5),
        (2.5, 2.75),
        (2.75, 3.0),
    ]
    with pytest.raises(UsageError, match="no text was shown"):
        times_of([], [0])
