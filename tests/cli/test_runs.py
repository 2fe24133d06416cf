"""`lyceum runs`: what is listed of finished, killed, running and broken runs, and what a comparison shows."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli.main import main
from lyceum.cli.runs import table
from lyceum.evals.runs import compare, is_run, read_run

RECIPE = 'name = "{name}"\nseed = {seed}\n\n[model]\ndepth = 4\n\n[corpus]\nobjects = 5\n\n[sft]\nlr = {lr}\n'


def make_run(
    folder: Path, *, lr: float = 0.5, seed: int = 0, losses: tuple[float, ...] = (4.0, 2.0, 1.0), finished: bool = True
) -> Path:
    """A run of two sections, the second one trained: a line of metrics every ten steps."""
    (folder / "corpus").mkdir(parents=True)
    (folder / "sft").mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(name=folder.name, seed=seed, lr=lr))
    (folder / "manifest.json").write_text(json.dumps({"code": "abc", "threads": 2, "started": "2026-01-01"}))
    for name, is_done in (("corpus", True), ("sft", finished)):
        state = {"key": "k", "kind": name, "settings": {}, "inputs": {}, "finished": is_done, "wall_s": 61.0}
        (folder / name / "state.json").write_text(json.dumps(state))
        if not is_done:
            os.utime(folder / name / "state.json", (time.time() - 3600,) * 2)
    (folder / "corpus" / "report.json").write_text(json.dumps({"line": "5 objects"}))
    lines = [
        {"step": 10 * n, "loss": loss, "tokens": 1000 * n, "tokens_per_s": 50.4}
        for n, loss in enumerate(losses, start=1)
    ]
    (folder / "sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "sft" / "report.json").write_text(json.dumps({"line": "validation loss 1.0"}))
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out.splitlines()


# -------------------------------------------------------------------------------- the list


def test_the_list_shows_each_run_with_its_last_loss_speed_time_and_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "demo")
    (tmp_path / "notes").mkdir()  # not a run
    lines = said(capsys, str(tmp_path))
    assert lines[0].split() == "run state sections last step loss tokens tok/s time when".split()
    assert lines[1].split()[:9] == "demo finished 2/2 sft 30 1 3,000 50 2:02".split()
    assert lines[2:] == ["demo: sft: validation loss 1.0"]


def test_killed_running_failed_and_broken_runs_are_listed_as_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = make_run(tmp_path / "killed", finished=False)
    with open(killed / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # it was writing
    os.utime(make_run(tmp_path / "running", finished=False) / "sft" / "state.json")
    (make_run(tmp_path / "failed", finished=False) / "traceback.txt").write_text("...")
    broken = make_run(tmp_path / "broken")
    (broken / "recipe.toml").write_text("name = ")
    (broken / "corpus" / "state.json").write_text("{")
    (broken / "sft" / "report.json").write_bytes(b"\xff")
    (broken / "sft" / "metrics.jsonl").write_text(
        'nonsense\n{"step": 10, "loss": 3.5}\n[1]\n{"step": 20, "loss": null}\n'
    )
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.lock").touch()
    lines = said(capsys, str(tmp_path))
    states = {line.split()[0]: line.split()[1:6] for line in lines[1:6]}
    assert states == {
        "killed": ["stopped", "1/2", "sft", "30", "1"],
        "running": ["running", "1/2", "sft", "30", "1"],
        "failed": ["failed", "1/2", "sft", "30", "1"],
        "broken": ["damaged", "1/2", "sft", "20", "3.500"],
        "begun": ["damaged", "0/0", "-", "-", "-"],
    }
    damage = next(line for line in lines if line.startswith("broken: cannot read"))
    for file in ("recipe.toml", "corpus/state.json", "sft/report.json", "metrics.jsonl line 1", "metrics.jsonl line 3"):
        assert file in damage
    assert not any(line.startswith("killed: cannot read") for line in lines)


def test_one_run_is_shown_section_by_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "demo", finished=False)
    lines = said(capsys, str(run))
    assert lines[0] == "demo: stopped"
    assert lines[2].split() == "corpus finished - - - - 1:01 5 objects".split()
    assert lines[3].split() == "sft stopped 30 1 3,000 50 1:01".split()


def test_the_newest_run_stands_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, name in ((100, "b"), (300, "c"), (200, "a")):
        run = make_run(tmp_path / name)
        for file in run.glob("*/state.json"):
            os.utime(file, (time.time() - age,) * 2)
    assert [line.split()[0] for line in said(capsys, str(tmp_path))[1:4]] == ["c", "a", "b"]


# -------------------------------------------------------------------------------- the comparison


def test_a_comparison_shows_what_differs_and_the_loss_over_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", lr=0.25, seed=1, losses=(3.0, 1.5), finished=False)
    text = "\n".join(" ".join(line.split()) for line in said(capsys, str(tmp_path), "one", "two"))
    assert text.startswith("settings that differ one two\nsft.lr 0.500 0.250\nseed 0 1\n\n")
    assert "sft, at its end one two\nstep 30 20\nloss 1 1.500\ntokens 3,000 2,000\n" in text
    assert text.endswith("sft: loss at step one two\n10 4 3\n20 2 1.500\n30 1 -")  # two never came to step 30


def test_as_json_a_comparison_holds_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_run(tmp_path / name, lr=lr) for name, lr in (("one", 0.5), ("two", 0.25), ("three", 0.5))]
    (line,) = said(capsys, *map(str, paths), "--json", "--metric", "tokens", "--section", "sft")
    assert json.loads(line) == {
        "runs": ["one", "two", "three"],
        "settings": {"sft.lr": [0.5, 0.25, 0.5]},
        "final": {"sft": {"step": [30] * 3, "loss": [1.0] * 3, "tokens": [3000] * 3, "tokens_per_s": [50.4] * 3}},
        "section": "sft",
        "metric": "tokens",
        "steps": [[10, *[1000] * 3], [20, *[2000] * 3], [30, *[3000] * 3]],
    }
    (line,) = said(capsys, str(tmp_path), "--json")
    listed: list[dict[str, Any]] = json.loads(line)
    assert [run["state"] for run in listed] == ["finished"] * 3 and listed[0]["sections"][1]["final"]["loss"] == 1.0


def test_long_curves_are_shown_at_ten_steps_from_the_first_to_the_last(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, losses=tuple(range(1, n + 1))) for name, n in (("long", 500), ("short", 200))]
    steps = compare([read_run(run) for run in runs])["steps"]
    assert len(steps) == 10 and steps[0] == [10, 1, 1] and steps[-1] == [5000, 500, None]


def test_runs_that_share_no_trained_section_are_compared_by_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", losses=())
    assert said(capsys, str(tmp_path), "one", "two")[-1] == "no section has been trained in all of them"


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["demos"], "there is no run demos", "did you mean 'demo'?"),
        (["demo", "demo", "--metric", "los"], "has logged no los", "did you mean 'loss'?"),
        (["demo", "demo", "--section", "corpus"], "has trained corpus", "known here: sft"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest_name(
    words: list[str], message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "demo")
    assert main(["runs", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and hint in error


def test_a_folder_that_is_not_there_or_holds_no_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "there is no folder runs" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert said(capsys) == ["runs holds no run"]
    assert not is_run(tmp_path)


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    assert table([["name", "loss"], ["a", "12.5"], ["bcdef", "-"]]) == ["name   loss", "a      12.5", "bcdef     -"]
