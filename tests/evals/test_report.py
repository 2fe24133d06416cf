"""The report says what the sections left behind, escapes what models wrote, and stands alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lyceum.config import Recipe, Section
from lyceum.evals import report
from lyceum.run import StageFolder, State, write_state

ROW = {"helpful_f1": 0.5, "wrong_claim": 0.25, "length": 12.5, "intervals": {"helpful_f1": [0.4, 0.6]}}


@pytest.fixture
def finished_run(tmp_path: Path) -> tuple[Path, Recipe]:
    """A run folder as the river leaves it, with an answer that tries to be markup."""
    kinds = ("pretrain", "sft", "reward", "eval")
    sections = tuple(Section(kind, kind, {}) for kind in (*kinds, "rankings"))  # rankings have left nothing behind
    recipe = Recipe("toy", 7, {}, sections, tmp_path / "toy.toml")
    for number, kind in enumerate(kinds):
        folder = tmp_path / kind
        folder.mkdir()
        write_state(
            StageFolder(folder), State("k", kind, {}, {}, True, wall_s=10.0 + number, peak_memory_gb=0.5 + number / 10)
        )
    reports: dict[str, dict] = {
        "pretrain": {"line": "read", "params": 1_200_000},
        "sft": {"line": "taught"},
        "reward": {"accuracy_noisy": 0.8, "accuracy_clean": 0.9, "length_baseline": 0.6},
        "eval": {"rows": [{"model": "sft", **ROW}, {"model": "best_of_4", **ROW}, {"model": "ppo", **ROW, "kl": 1.5}]},
    }
    for kind, content in reports.items():
        (tmp_path / kind / "report.json").write_text(json.dumps(content))
    shown = {
        "cell": "made_up",
        "question": "<b>what?</b>",
        "answer": "<script>alert(1)</script>",
        "reference": "no",
        "right": False,
    }
    examples = {"prompt": "p", "models": [{"model": "SFT", "answer": "<i>a</i>"}], "unchosen": [shown]}
    (tmp_path / "eval" / "examples.json").write_text(json.dumps(examples))
    lines = [json.dumps({"step": step, "loss/reply": 3.0 - step}) + "\n" for step in range(3)]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(lines))
    return tmp_path, recipe


def test_the_open_book_stands_on_the_page_if_there_was_one(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    report.build(folder, recipe)
    assert "Open book" not in (folder / "report.html").read_text()
    measured = json.loads((folder / "eval" / "report.json").read_text())
    measured["open_book"] = {"model": "ppo", "packages": ["num<py"], "call_rate": 0.9, "valid_calls": None, "exact": 0.5,
                             "f1_unseen": 0.75, "intervals": {"exact": [0.4, 0.6]}, "n": {"exact": 120}}  # fmt: skip
    (folder / "eval" / "report.json").write_text(json.dumps(measured))
    report.build(folder, recipe)
    page = (folder / "report.html").read_text()
    assert "none of the calls ask" in page
    assert "120 questions about objects of num&lt;py" in page and "0.50 (0.40 to 0.60) repeat" in page
    assert json.loads((folder / "report.json").read_text())["open_book"] == measured["open_book"]


def test_numbers_of_the_sections_are_gathered(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    report.build(folder, recipe)
    result = json.loads((folder / "report.json").read_text())
    assert result["wall_s"] == 10 + 11 + 12 + 13
    assert result["peak_memory_gb"] == pytest.approx(0.8)
    assert result["reward_model"] == {"accuracy_noisy": 0.8, "accuracy_clean": 0.9, "length_baseline": 0.6}
    assert [row["model"] for row in result["rows"]] == ["sft", "best_of_4", "ppo"]


def test_what_a_model_wrote_cannot_become_markup(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    report.build(folder, recipe)
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<b>what" not in page and "<i>a" not in page


def test_the_page_fetches_nothing_and_draws_its_curves_itself(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    report.build(folder, recipe)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", page)


def test_the_terminal_shows_each_model_and_marks_failures(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    lines = report.build(folder, recipe)["lines"]
    assert any("SFT" in line and "best of 4" in line and "PPO" in line for line in lines)
    assert any(line.startswith("x tutor:") for line in lines)
    assert any("written rule, not by people" in line for line in lines)


def test_a_run_without_its_evaluation_has_a_report_without_a_table(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    (folder / "eval" / "report.json").unlink()
    (folder / "eval" / "examples.json").unlink()
    built = report.build(folder, recipe)
    assert json.loads((folder / "report.json").read_text())["rows"] == []
    assert "Held-out questions" not in built["path"].read_text()


def test_people_are_not_said_to_be_a_rule(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    people = replace(recipe, sections=tuple(one for one in recipe.sections if one.kind != "rankings"))
    report.build(folder, people)
    page = (folder / "report.html").read_text()
    assert "not by people" not in page and "1.20 million parameters" in page and "None" not in page


def test_rounds_are_drawn_over_the_held_out_questions_with_their_intervals(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    report.build(folder, recipe)
    assert "Over rounds" not in (folder / "report.html").read_text()
    more = (Section("ppo", "ppo", {}), Section("ppo", "ppo-2", {}))
    rounds = replace(recipe, sections=(*recipe.sections, *more))
    measured = json.loads((folder / "eval" / "report.json").read_text())
    measured["rows"] = [
        {"model": name, **ROW, "helpful_f1": 0.4 + number / 10, "kl": number}
        for number, name in enumerate(("sft", "ppo", "ppo-2"))
    ]
    (folder / "eval" / "report.json").write_text(json.dumps(measured))
    report.build(folder, rounds)
    page = (folder / "report.html").read_text()
    shown = page[page.index("Over rounds") : page.index("The stages")]
    assert shown.count("<svg") == 3 and "KL from SFT" in shown and "wrong claims" in shown  # no rule_score, no reward
    assert "each round's reward model on its own: 0.80" in shown


def test_every_policy_that_a_round_makes_again_is_drawn(finished_run: tuple[Path, Recipe]) -> None:
    folder, recipe = finished_run
    kinds = {
        "strict": "sft",
        "rloo": "grpo",
        "preference": "preference",
        "rloo-2": "grpo",
        "preference-2": "preference",
    }
    rounds = replace(recipe, sections=(*recipe.sections, *(Section(kind, name, {}) for name, kind in kinds.items())))
    measured = json.loads((folder / "eval" / "report.json").read_text())
    measured["rows"] = [{"model": name, **ROW, "kl": 0.0} for name in kinds]
    (folder / "eval" / "report.json").write_text(json.dumps(measured))
    report.build(folder, rounds)
    page = (folder / "report.html").read_text()
    shown = page[page.index("Over rounds") : page.index("The stages")]
    assert "<h3>rloo; round 0 is strict</h3>" in shown and "<h3>preference; round 0 is strict</h3>" in shown
    assert shown.count("<svg") == 6 and "KL from strict" in shown
    assert report.rounds_of(kinds) == [["rloo", "rloo-2"], ["preference", "preference-2"]]
    assert report.rounds_of({"ppo": "ppo", "gentle": "ppo"}) == []  # two PPO sections are no rounds
    assert report.rounds_of({"ppo": "ppo", "ppo-2": "grpo", "reward": "reward", "reward-2": "reward"}) == []
