"""The whole river at toy size: it ends with a table, a report and a chat; killed in every section, it ends the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lyceum.log import read_metrics
from lyceum.run import read_state
from lyceum.train.loop import TIMINGS

RECIPE = Path(__file__).parent.parent / "recipes" / "smoke.toml"
SECTIONS = ("corpus", "lessons", "tokenizer", "pretrain", "sft", "rankings", "reward", "ppo", "eval")
pytestmark = pytest.mark.timeout(500)


def lyceum(*arguments: str, runs: Path) -> list[str]:
    return [sys.executable, "-m", "lyceum", *arguments, "--runs", str(runs)]


def run_straight(runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(lyceum("run", str(RECIPE), runs=runs), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    runs = tmp_path_factory.mktemp("straight")
    finished = run_straight(runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    yield runs / "smoke", finished


def losses(run: Path, sections: tuple[str, ...] = SECTIONS) -> dict[str, list[dict]]:
    """Section -> its logged lines, without what a clock says."""
    found = {}
    for section in sections:
        lines = read_metrics(run / section / "metrics.jsonl")
        found[section] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    return found


def outcomes(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval" / "outcomes.jsonl").read_text().splitlines()]


def test_the_river_ends_with_a_table_of_four_rows_and_a_page(
    straight: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, finished = straight
    report = json.loads((run / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["base", "sft", "best_of_4", "ppo"]
    assert report["wall_s"] > 0 and 0 < report["peak_memory_gb"] < 4
    assert all(row["n"]["ends"] > 50 and row["kl"] is not None for row in report["rows"][1:])
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 6 and "written rule, not by people" in page
    assert "held-out questions" in finished.stdout + finished.stderr


def test_every_section_leaves_a_report_and_is_finished(straight: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = straight
    for section in SECTIONS:
        state = read_state(run / section)
        assert state is not None and state.finished, section
        assert json.loads((run / section / "report.json").read_text())["line"], section


def test_a_finished_run_is_not_run_again(straight: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = straight
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/metrics.jsonl")}
    again = run_straight(run.parent)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/metrics.jsonl")} == before
    assert (again.stdout + again.stderr).count("done before") == len(SECTIONS)


def test_the_finished_run_answers_in_the_chat(straight: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = straight
    command = [sys.executable, "-m", "lyceum", "chat", str(run), "-p", "What does json.dumps do?"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def kill_in(section: str, runs: Path, *words: str, run: str = "smoke") -> bool:
    """Run the river and end it with SIGKILL in the middle of a section; False if the section was over too soon."""
    process = subprocess.Popen(
        lyceum("run", str(RECIPE), *words, runs=runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = runs / run / section
    try:
        for _ in range(30_000):
            state = read_state(folder)
            if process.poll() is not None or (state is not None and state.finished):
                return False
            has_begun = (
                read_metrics(folder / "metrics.jsonl")
                if section in ("pretrain", "sft", "ppo", "ppo-2")
                else state is not None
            )
            if has_begun:
                time.sleep(0.3 if section in ("pretrain", "sft") else 0.05)
                return process.poll() is None
            time.sleep(0.01)
        raise AssertionError(f"{section} never began")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_in_every_section_it_ends_as_the_straight_run_did(
    straight: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    killed = [section for section in SECTIONS if kill_in(section, tmp_path)]
    assert {"pretrain", "sft", "ppo"} <= set(killed)
    finished = run_straight(tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert losses(tmp_path / "smoke") == losses(straight[0])
    assert outcomes(tmp_path / "smoke") == outcomes(straight[0])


@pytest.mark.slow
def test_killed_at_twenty_random_moments_pretraining_ends_as_the_straight_run_did() -> None:
    bench = RECIPE.parent.parent / "bench" / "resume.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(bench.parent.parent)}
    finished = subprocess.run(
        [sys.executable, str(bench)], env=environment, capture_output=True, text=True, timeout=480
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    figures = json.loads(finished.stdout.splitlines()[-1])
    assert figures["equal"] and figures["first_difference"] is None
    assert len(figures["kills"]) == 20 and len({kill["step"] for kill in figures["kills"]}) > 10
    assert figures["steps"] == [146, 146] and figures["losses"][0] == figures["losses"][1]


# -------------------------------------------------------------------------------- preferences without PPO


@pytest.mark.slow
def test_the_recipe_of_preferences_ends_with_policies_that_talk(tmp_path: Path) -> None:
    recipe = RECIPE.with_name("smoke-preference.toml")
    changes = ("sft.epochs=1", "preference.epochs=6", "preference.lr=1e-3", "thumbs.epochs=4", "thumbs.lr=1e-3")
    command = lyceum("run", str(recipe), *(word for change in changes for word in ("--set", change)), runs=tmp_path)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stderr[-3000:]
    run = tmp_path / "smoke-preference"
    reports = {
        name: json.loads((run / name / "report.json").read_text()) for name in ("preference", "thumbs", "select")
    }
    for name in ("preference", "thumbs"):
        assert reports[name]["judged"]["train"]["kept"] > 30
        lines = read_metrics(run / name / "metrics.jsonl")
        # a short last step of kto may hold responses of one side only, which have no margin
        margins = [line["rewards/margins"] for line in lines if "rewards/margins" in line]
        assert abs(margins[0]) < 1e-4 and margins[-1] > 0.02 and "valid/rewards/margins" in lines[-1]
    assert reports["select"]["score_kept"] > reports["select"]["score_drawn"]
    learned = (run / "select" / "train.jsonl").read_bytes().count(b"\n")
    assert json.loads((run / "selected" / "report.json").read_text())["conversations"] == learned
    table = json.loads((run / "report.json").read_text())
    rows = {row["model"]: row for row in table["rows"]}
    assert list(rows) == ["base", "sft", "best_of_4", "selected", "preference", "thumbs"]
    assert rows["sft"]["kl"] == 0 and rows["preference"]["kl"] > 0.01 and rows["selected"]["reward"] is not None
    assert len(table["thumbs_minus_sft"]) == 3 and "ppo_minus_sft" not in table
    assert "thumbs minus SFT" in (run / "report.html").read_text()
    said = subprocess.run(
        [sys.executable, "-m", "lyceum", "chat", str(run), "--stage", "preference", "-p", "hello"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert said.returncode == 0 and said.stdout.strip()


# -------------------------------------------------------------------------------- rounds


ROUNDS = ("rounds=2", "name=rounds", "sft.epochs=1", "ppo.iterations=2", "eval.open_book=4", "lessons.held_out=4")


@pytest.mark.slow
def test_killed_in_its_second_round_a_recipe_ends_as_the_straight_run_did(tmp_path: Path) -> None:
    command = [word for change in ROUNDS for word in ("--set", change)]

    def run(runs: Path, until: str = "eval") -> Path:
        words = lyceum("run", str(RECIPE), *command, "--until", until, runs=runs)
        finished = subprocess.run(words, capture_output=True, text=True, timeout=400)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return runs / "rounds"

    first = run(tmp_path / "straight", until="ppo")
    shutil.copytree(first.parent, tmp_path / "killed")  # the first round is the same for both
    straight = run(tmp_path / "straight")
    repeated = ("rankings-2", "reward-2", "ppo-2")
    killed = [name for name in repeated if kill_in(name, tmp_path / "killed", *command, run="rounds")]
    assert "ppo-2" in killed
    resumed = run(tmp_path / "killed")
    for name in (*repeated, "ppo"):
        assert losses(resumed, (name,)) == losses(straight, (name,))
    for name in ("train.jsonl", "valid.jsonl"):
        rows = [(folder / "rankings-2" / name).read_bytes() for folder in (straight, resumed)]
        assert rows[0] == rows[1] and rows[0].startswith((straight / "rankings" / name).read_bytes()[:40])
    assert outcomes(resumed) == outcomes(straight)
    report = json.loads((straight / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["base", "sft", "best_of_4", "ppo", "ppo-2"]
    assert "Over rounds" in (straight / "report.html").read_text()
    counted = json.loads((straight / "rankings-2" / "report.json").read_text())
    before = json.loads((straight / "rankings" / "report.json").read_text())
    assert counted["train_before"] == before["train"] and counted["valid_before"] == before["valid"]


# -------------------------------------------------------------------------------- the line to ChatGPT

TOY = {
    "model": {"depth": 2, "width": 64},
    "corpus": {"packages": ["json", "textwrap", "statistics"], "objects": 30, "code_mb": 0.2},
    "tokenizer": {"vocab_size": 512},
    **dict.fromkeys(("instructions", "dialogue"), {"does": 4, "intents": 12, "unstudied": 40, "near_miss": 20, "made_up": 20}),
    **dict.fromkeys(("base", "code"), {"tokens": 30_000}),
    **dict.fromkeys(("instruct", "chat"), {"epochs": 0.3}),
    **dict.fromkeys(("answers", "dialogues", "best"), {"prompts": 40, "max_response_tokens": 24}),
    **dict.fromkeys(("feedback", "chatgpt"), {"iterations": 2, "prompts_per_iteration": 16, "max_response_tokens": 24}),
    "eval": {"max_response_tokens": 24},
}  # fmt: skip
LINE = {  # model -> (parent, stage, what it learned from)
    "base": (None, "pretrain", ["documents"]),
    "code": ("base", "pretrain", ["documents", "documents"]),
    "instruct": ("code", "sft", ["conversations"]),
    "judge": ("instruct", "reward", ["rankings"]),
    "feedme": ("instruct", "sft", ["conversations"]),
    "feedback": ("feedme", "ppo", ["prompts", "scores"]),
    "chat": ("code", "sft", ["conversations"]),
    "dialogue-judge": ("chat", "reward", ["rankings"]),
    "chatgpt": ("chat", "ppo", ["prompts", "scores"]),
}


@pytest.mark.slow
def test_the_line_to_chatgpt_is_walked_and_read_back_from_its_checkpoints(tmp_path: Path) -> None:
    changes = [f"{name}.{key}={json.dumps(value)}" for name, table in TOY.items() for key, value in table.items()]
    words = [word for change in changes for word in ("--set", change)]
    finished = subprocess.run(
        lyceum("run", "lineage", *words, runs=tmp_path), capture_output=True, text=True, timeout=450
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    command = [sys.executable, "-m", "lyceum", "models", str(tmp_path / "lineage"), "--json"]
    read = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    models = {model["folder"]: model for model in json.loads(read.stdout)}
    line = {
        model["name"]: (
            models[model["parent"]]["name"] if model["parent"] else None,
            model["stage"],
            [one["kind"] for one in model["learned_from"]],
        )
        for model in models.values()
        if "snapshot" not in model["name"]
    }
    assert line == LINE
    said = {model["name"]: model for model in models.values()}
    assert said["judge"]["learned_from"][0]["origins"].keys() == {"rule"}
    assert said["feedme"]["learned_from"][0]["origins"].keys() == {"model"}
    report = json.loads((tmp_path / "lineage" / "report.json").read_text())
    rows = ["base", "code", "instruct", "feedme", "chat", "best_of_4", "feedback", "chatgpt"]
    assert [row["model"] for row in report["rows"]] == rows
    assert {row["model"] for row in report["rows"] if row["kl"] is None} == {"base", "code"}
    reads = {name: json.loads((tmp_path / "lineage" / name / "report.json").read_text()) for name in ("base", "code")}
    assert reads["code"]["bpb_code"] < reads["base"]["bpb_code"] - 0.3  # code was learned; the control is base itself
