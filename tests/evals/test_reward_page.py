"""A reward model's part of the page: its figures as they are, its plots, and no praise that the interval does not carry."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lyceum.evals import agreement, reward_page
from lyceum.evals.agreement import Scored
from lyceum.model.ensemble import Ensemble
from lyceum.run import plain


def report(skill: float, count: int = 200) -> dict[str, Any]:
    """Of a judge that sees which response is better through noise; a third of the pairs has a second opinion."""
    rng = np.random.default_rng(0)
    rankings = []
    for n in range(count):
        scores = rng.normal(size=2) + [skill, 0.0]
        one = Scored((1, 2), tuple(scores.tolist()), tuple(rng.integers(1, 9, 2).tolist()), f"p{n}", (f"a{n}", f"b{n}"))
        rankings += [one, replace(one, ranks=(2, 1))] if n % 3 == 0 else [one]
    found = agreement.judge(rankings)
    counts = {"kept": count, "all_ties": 2, "too_long": 1, "equal_texts": 0, "empty_responses": 3}
    return plain({**found, "judged_on_training_data": False, "normalised_on": "rankings/valid.jsonl, 9 responses",
                  "rankings": {"train": counts, "valid": {**counts, "all_ties": 0, "too_long": 0}}})  # fmt: skip


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_figures_stand_on_the_page_with_their_intervals_and_two_plots() -> None:
    figures = report(2.0)
    page = reward_page.section("judge & co", figures)
    low, high = figures["accuracy_noisy_interval"]
    assert f"{figures['accuracy_noisy']:.3f}" in page and f"{low:.3f} to {high:.3f}" in page
    assert page.count("<svg") == 2 and "<script" not in page and "judge &amp; co" in page
    said = text_of(page)
    assert (
        "train: 200 kept, left out 2 without any order, 1 longer than the context; 3 kept responses are empty" in said
    )
    assert "valid: 200 kept, left out none" in said
    assert re.search(r"one opinion\s.*?133", said) and re.search(r"split\s.*?134\s+0\.500", said)


def test_a_judge_no_better_than_length_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("reliability", "histogram"):
        monkeypatch.setattr(reward_page, plot, lambda *given: "")
    assert "above what length alone would tell." in reward_page.section("reward", report(2.0))
    assert "do not train against it" in reward_page.section("reward", report(0.0))
    on_training = {**report(2.0), "judged_on_training_data": True}
    assert "its own training rankings" in reward_page.section("reward", on_training)


def test_members_and_how_far_they_differ_stand_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("reliability", "histogram"):
        monkeypatch.setattr(reward_page, plot, lambda *given: "")
    raw = np.random.default_rng(0).normal(size=(2, 30, 2))
    said = [{"valid": [Scored((1, 2), tuple(row), (1, 2)) for row in member.tolist()]} for member in raw]
    each = [{"reward_scale": 1.0, "reward_centre": 0.0, **agreement.judge(one["valid"])} for one in said]
    _, figures = agreement.judge_members(said, each, Ensemble(2, "mean_less_deviations"), "valid", "valid")
    page = text_of(reward_page.section("reward", plain(figures)))
    assert "2 members, combined by mean less deviations" in page and "member 2" in page
    assert f"{figures['disagreement']['wrong']:.3f} on that of one they order wrongly" in page


@pytest.mark.parametrize("figures", [{}, {"accuracy_noisy": 0.8, "length_baseline": 0.6}])
def test_a_report_without_a_calibration_curve_has_no_part(figures: dict[str, Any]) -> None:
    assert reward_page.section("reward", figures) == ""
