"""Figures about a judge, by hand and by simulation: whom it agrees with, whether its probabilities hold, length beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lyceum.batches.pairs import EncodedRanking
from lyceum.evals import agreement
from lyceum.evals.agreement import Scored
from lyceum.model.ensemble import Ensemble


def scored(ranks: tuple[float, ...], scores: tuple[float, ...], **more: object) -> Scored:
    return replace(Scored(ranks, scores, (1,) * len(ranks)), **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- by hand


def test_differences_and_accuracy_by_hand() -> None:
    # ranks 1, 2, 2: the first beats both, the tie makes no pair
    assert agreement.differences([3.0, 1.0, 5.0], [1, 2, 2]) == [2.0, -2.0]
    assert agreement.accuracy([[2.0, -2.0], [1.0], [0.0]])[0] == (1 + 1 + 0.5) / 4
    assert all(map(math.isnan, agreement.accuracy([[]])))


def test_calibration_by_hand() -> None:
    # all four say 0.75 (margin log 3); three are right: no error. Two right: an error of a quarter.
    odds = math.log(3)
    good = agreement.calibration([odds, odds, odds, -odds])
    assert good == [{"stated": pytest.approx(0.75), "right": 0.75, "pairs": 4}]
    assert agreement.calibration_error(good) == pytest.approx(0.0)
    assert agreement.calibration_error(agreement.calibration([odds, odds, -odds, -odds])) == pytest.approx(0.25)
    # two bins: one of a pair that is surely right, one of a pair that says nothing and counts half
    assert agreement.calibration([100.0, 0.0]) == [
        {"stated": 0.5, "right": 0.5, "pairs": 1},
        {"stated": 1.0, "right": 1.0, "pairs": 1},
    ]


def test_length_correlation_is_within_rankings() -> None:
    assert agreement.length_correlation([[1.0, 2.0], [7.0, 5.0]], [[3, 5], [9, 5]]) == pytest.approx(1.0)
    assert agreement.length_correlation([[1.0, 1.0]], [[3, 5]]) == 0.0


def test_a_judge_stands_beside_the_length_baseline_on_the_same_pairs() -> None:
    # the shorter response is better in 3 of 4 pairs; the judge has all right; no pair is one of length's half credits
    pairs = [scored((1, 2), (1.0, 0.0), lengths=(2, 5))] * 3 + [scored((1, 2), (2.0, 0.0), lengths=(9, 5))]
    found = agreement.judge(pairs)
    assert (found["accuracy_noisy"], found["length_baseline"], found["above_length"]) == (1.0, 0.75, 0.25)
    assert found["baseline_prefers"] == "shorter"
    low, high = found["above_length_interval"]
    assert 0.0 <= low <= 0.25 <= high <= 1.0
    assert found["prompts"] == found["pairs"] == 4 and sum(found["margins"]["counts"]) == 4


def test_noisy_ranks_stand_beside_the_clean_ones_and_their_ceiling() -> None:
    # the longer one is better by the clean order; every second order is reversed
    rankings = [
        scored((1, 2, 3) if i % 2 else (3, 2, 1), (0.0, 1.0, 2.0), lengths=(2, 3, 4), clean_ranks=(3, 2, 1))
        for i in range(4)
    ]
    found = agreement.judge(rankings)
    assert (found["accuracy_clean"], found["accuracy_noisy"], found["noisy_ceiling"]) == (1.0, 0.5, 0.5)
    assert (found["length_baseline"], found["length_baseline_clean"]) == (0.5, 1.0)
    assert found["length_correlation"] == pytest.approx(1.0)
    classes = found["by_agreement"]
    assert {name: (group["accuracy"], group["ceiling"], group["pairs"]) for name, group in classes.items()} == {
        "as_clean": (1.0, 1.0, 6),
        "against_clean": (0.0, 0.0, 6),
    }


def test_classes_of_agreement_by_hand() -> None:
    def by(names: tuple[str, str], ranks: tuple[float, float], **more: object) -> Scored:
        return scored(ranks, (1.0, 0.0), prompt="p", responses=names, **more)

    given = [
        by(("a", "b"), (1, 2)),
        by(("b", "a"), (2, 1)),  # the same opinion, written the other way round
        by(("a", "b"), (2, 1)),  # against them: two of three
        by(("c", "d"), (1, 2)),
        by(("c", "d"), (1, 2)),  # two of two
        by(("e", "f"), (1, 2)),  # nobody else
        by(("g", "h"), (1, 2)),
        by(("g", "h"), (2, 1)),  # one each
        by(("i", "j"), (1, 2), probabilities=(0.8, 0.2)),  # a soft label is a share of opinions
    ]
    found = [one[0] for one in agreement.opinions(given)]
    assert [name for name, _ in found] == ["weak_majority"] * 3 + ["unanimous"] * 2 + ["one_opinion"] + [
        "split"
    ] * 2 + ["strong_majority"]
    assert [right for _, right in found[:5]] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert math.isnan(found[5][1]) and [right for _, right in found[6:]] == [0.5, 0.5, 1.0]
    groups = agreement.judge(given)["by_agreement"]
    assert [*groups] == ["unanimous", "strong_majority", "weak_majority", "split", "one_opinion"]
    assert groups["weak_majority"]["ceiling"] == pytest.approx(2 / 3)
    assert groups["weak_majority"]["accuracy"] == pytest.approx(
        1 / 3
    )  # it scores the first one higher: right, wrong, wrong
    assert sum(group["pairs"] for group in groups.values()) == len(given)


def test_strangers_to_training_are_judged_apart() -> None:
    known, stranger = scored((1, 2), (1.0, 0.0)), scored((1, 2), (0.0, 1.0), is_stranger=True)
    assert "by_annotators" not in agreement.judge([known] * 3)
    groups = agreement.judge([known] * 3 + [stranger] * 2)["by_annotators"]
    assert {name: (g["accuracy"], g["pairs"]) for name, g in groups.items()} == {
        "known": (1.0, 3),
        "held_out": (0.0, 2),
    }


def test_members_differ_by_their_deviation_on_right_and_on_wrong_pairs() -> None:
    members = np.array([[1.0, 0.0, 0.0, 4.0], [1.0, 0.0, 2.0, 0.0]])
    rankings = [scored((1, 2), (1.0, 0.0)), scored((1, 2), (1.0, 2.0))]
    found = agreement.disagreement(rankings, members)
    # margins: 1 and 1 of the first pair, -4 and 2 of the second; deviations 0 and 3; of responses 0, 0, 1, 2
    assert found == {"scores": 0.75, "right": 0.0, "wrong": 3.0}


def test_an_ensemble_is_judged_by_its_members_normalised_scores() -> None:
    raw = np.random.default_rng(0).normal(size=(2, 6, 2))
    rankings = [[scored((1, 2), tuple(scores)) for scores in member.tolist()] for member in raw]
    reports = [
        {"reward_scale": 2.0, "reward_centre": 0.5, "accuracy_noisy": 0.1},
        {"reward_scale": 4.0, "reward_centre": 0.0},
    ]
    said = [{"valid": one} for one in rankings]
    ensemble, found = agreement.judge_members(said, reports, Ensemble(2, "min"), "valid", "valid")
    least = np.minimum(raw[0] / 2.0 - 0.5, raw[1] / 4.0)
    assert (ensemble.centre, ensemble.scale) == (pytest.approx(least.mean()), pytest.approx(least.std()))
    assert found["reward_scale"] == pytest.approx(3.0 * least.std())
    assert found["accuracy_noisy"] == pytest.approx((least[:, 0] > least[:, 1]).mean())
    assert found["members"] == [reports[0], reports[1]]


def test_scored_rankings_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [[5, 6, 1], [5, 6, 7, 1]]
    ranking = EncodedRanking(rows, (1, 2), (0.7, 0.3), {"clean_ranks": [2, 1], "is_stranger": True}, num_prompt=2)
    (one,) = agreement.scored_rankings([ranking], [[0.25, -1.0]])
    assert one.lengths == (1, 2) and one.clean_ranks == (2, 1) and one.is_stranger and one.prompt
    assert one.responses[0] != one.responses[1]
    parts = {"train": [one, one], "valid": [scored((1, 2), (0.0, 1.0))]}
    agreement.write_scored(tmp_path / "scores.jsonl", parts)
    assert agreement.read_scored(tmp_path / "scores.jsonl") == parts


# ---------------------------------------------------------------- by simulation


def test_interval_draws_prompts_not_pairs() -> None:
    # 40 prompts of 6 pairs, each wholly right or wholly wrong: as uncertain as 40 coins, not as 240
    rankings = [scored((1, 2, 3, 4), (4, 3, 2, 1) if i % 2 else (1, 2, 3, 4)) for i in range(40)]
    found = agreement.judge(rankings)
    low, high = found["accuracy_noisy_interval"]
    assert found["accuracy_noisy"] == 0.5
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)
    # rankings of one prompt are drawn together: of ten prompts with four rankings each the interval is wider
    one_prompt = [replace(one, prompt=str(i // 2 % 10)) for i, one in enumerate(rankings)]
    pairs = [replace(one, scores=rankings[i // 2 % 2].scores) for i, one in enumerate(one_prompt)]
    wide = agreement.judge(pairs)
    low, high = wide["accuracy_noisy_interval"]
    assert wide["prompts"] == 10 and high - low > 1.5 * 2 * 1.96 * math.sqrt(0.25 / 40)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    # prompts differ in how easy they are: a pair is right with probability 0.5 or 0.9, so 0.7 on the whole
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        easy = rng.choice([0.5, 0.9], 80)
        by_prompt = [(2.0 * (rng.random(3) < p) - 1.0).tolist() for p in easy]
        _, low, high = agreement.accuracy(by_prompt)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_a_calibrated_judge_has_no_error_and_a_bold_one_has() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0.0, 1.5, 20_000)
    came_true = np.where(rng.random(20_000) < 1 / (1 + np.exp(-margins)), margins, -margins)

    def error(scale: float) -> float:
        return agreement.calibration_error(agreement.calibration((scale * came_true).tolist()))

    assert error(1.0) < 0.02
    assert error(3.0) > 0.1 and error(0.2) > 0.1  # the controls: too sure, not sure enough
