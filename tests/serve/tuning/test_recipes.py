"""What "auto" comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lyceum.serve.files.checks import Found
from lyceum.serve.models import load
from lyceum.serve.tuning import recipes
from lyceum.serve.tuning.recipes import minutes, plan_of

AUTO = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier", "beta", "compute_multiplier"), "auto")


def found(lines: int) -> Found:
    return Found("", lines, tokens=20 * lines, longest=30)


@pytest.mark.parametrize(
    ("kind", "lines", "epochs", "batch"),
    [
        ("supervised", 1, 25, 1), ("supervised", 100, 10, 4), ("supervised", 400, 3, 10), ("supervised", 10_000, 3, 16),
        ("dpo", 100, 10, 4), ("reinforcement", 4, 60, 4), ("reinforcement", 100, 5, 8), ("reinforcement", 1000, 1, 8),
    ],
)  # fmt: skip
def test_automatic_settings_follow_from_the_number_of_examples(
    base: Path, kind: str, lines: int, epochs: int, batch: int
) -> None:
    plan = plan_of(kind, AUTO, load("demo", base, max_batch=1), found(lines))
    assert (plan.hyperparameters["n_epochs"], plan.hyperparameters["batch_size"]) == (epochs, batch)
    steps = {"supervised": epochs * max(1, round(lines / batch))}.get(kind, -(-epochs * lines // batch))
    assert plan.steps == pytest.approx(steps, abs=epochs) and plan.seconds > 0
    assert 1 <= plan.settings["log_every"] <= max(1, plan.steps // 50)
    assert all(0 < share < 1 for share in plan.settings["snapshots"]) and len(plan.settings["snapshots"]) <= 2


def test_rates_fall_with_size_and_large_models_get_adapters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = load("demo", base, max_batch=1)

    def settings(num_weights: float) -> dict[str, Any]:
        monkeypatch.setattr(recipes, "num_parameters", lambda served: num_weights)
        return plan_of("supervised", {**AUTO, "learning_rate_multiplier": 2.0}, served, found(50)).settings

    assert settings(1e6)["lr"] == 4e-3 and settings(1e6)["matrix_lr"] == 1e-2 and "lora_rank" not in settings(1e6)
    assert settings(2e7)["lr"] == pytest.approx(2e-3)  # four times the size of a small one
    large = settings(1e9)
    assert large["lora_rank"] == 16 and large["lr"] == pytest.approx(4e-4) and "matrix_lr" not in large


def test_a_time_is_said_for_a_person() -> None:
    assert [minutes(seconds) for seconds in (0, 5, 61, 9000)] == ["", "about 1 min", "about 2 min", "about 2.5 h"]
