"""``lyceum lab``: one folder for one experiment, what its table says, and a page that stands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import lab
from lyceum.cli.main import main
from lyceum.errors import RunError


def result(arm: str, seed: int, bend: float) -> dict[str, Any]:
    """An arm whose gold score is d (1 - bend d) under RL, and whose proxy is d."""
    d = [i / 10 for i in range(30)]
    kl = [0.0, 0.19, 0.64]
    return {
        "arm": arm, "seed": seed, "shape": "1x16", "comparisons": 9, "accuracy": 0.7 + seed / 10,
        "rl": {"distance": d, "proxy": d, "gold": [x * (1 - bend * x) for x in d]},
        "best_of_n": {"n": [1, 2, 4], "kl": kl, "kl_measured": kl, "proxy": [0.0, 0.5, 1.0], "gold": [0.0, 0.3, 0.5]},
        "texts": ["the |<b>cat"],
    }  # fmt: skip


RESULTS = [result("1x16, 9", seed, 0.4) for seed in range(2)] + [result("gold", seed, 0.0) for seed in range(2)]


def test_the_table_says_where_gold_turned_and_that_the_control_did_not() -> None:
    found = lab.summary(RESULTS)
    turned, control = found["1x16, 9"], found["gold"]
    assert turned["accuracy"] == pytest.approx((0.75, 0.05)) and turned["seeds"] == 2
    assert turned["peak_distance"][0] == pytest.approx(1.25, abs=0.1) and turned["gold_fell"][0] > 0.9
    assert turned["proxy_rose"][0] > 1.4 and control["gold_fell"][0] == 0
    assert turned["RL"]["beta"] > 0.2 and turned["RL"]["r_squared"] > 0.85 and control["RL"]["beta"] == pytest.approx(0)
    lines = lab.table(found)
    assert len(lines) == 3 and "0.75 ± 0.05" in lines[1] and len({len(line) for line in lines}) == 1


def test_the_page_stands_alone_and_shows_what_models_wrote_as_text() -> None:
    page = lab._page(lab.summary(RESULTS), RESULTS, 2)
    assert page.count("<svg") == 2 and "the |&lt;b&gt;cat" in page and "<script" not in page and "2 seeds" in page
    assert "inf" in page  # the control's form does not turn


def test_an_experiment_with_other_settings_wants_another_folder(tmp_path: Path) -> None:
    lab._claim(tmp_path / "lab", {"seeds": 3, "lr": 0.1})
    lab._claim(tmp_path / "lab", {"seeds": 3, "lr": 0.1})
    with pytest.raises(RunError, match="holds an experiment with another lr"):
        lab._claim(tmp_path / "lab", {"seeds": 3, "lr": 0.2})
    assert json.loads((tmp_path / "lab" / "lab.json").read_text()) == {"seeds": 3, "lr": 0.1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lab", "nothing"], "invalid choice: 'nothing'"),
        (["lab", "overoptimisation", "--set", "sedes=3"], "did you mean 'seeds'?"),
        (["lab", "overoptimisation", "--set", "seeds"], "is no assignment"),
        (["lab", "overoptimisation", "--set", "policy=big"], "'big' is no shape"),
    ],
)
def test_a_wrong_experiment_is_said_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "lab")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "lab").exists()
