"""Reading runs for a server: what has come since, bounds, no way out of the folder. (What is shown: tests/cli/test_runs.py)"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lyceum.evals import runs
from lyceum.evals.runs import Bounds, open_plain, read_end, read_on, read_run, read_small

RECIPE = 'name = "{name}"\nseed = 0\n\n[model]\ndepth = 4\n\n[sft]\nlr = 0.5\n'


def make_run(folder: Path, num_lines: int = 3) -> Path:
    (folder / "sft").mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(name=folder.name))
    state = {"key": "k", "kind": "sft", "settings": {}, "inputs": {}, "finished": True, "wall_s": 61.0}
    (folder / "sft" / "state.json").write_text(json.dumps(state))
    lines = [json.dumps({"step": n, "loss": 1.0 / n}) for n in range(1, num_lines + 1)]
    (folder / "sft" / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_a_growing_file_is_read_from_where_it_was_left_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_on(file, 0).rows == [] and read_on(file, 7).is_anew
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')  # it is being written
    first = read_on(file, 0)
    assert [row["step"] for row in first.rows] == [1, 2] and first.end == 24 and first.is_last
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\nnonsense\n[4]\n{"step": 5}\n')
    second = read_on(file, first.end)
    assert [row["step"] for row in second.rows] == [3, 5] and not second.is_anew
    file.write_text('{"step": 1}\n')  # a resumed run has cut it back
    again = read_on(file, second.end)
    assert again.is_anew and again.start == 0 and [row["step"] for row in again.rows] == [1]


def test_long_files_come_in_parts_and_endless_lines_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PART_BYTES", 100)
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 0.5} for step in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "x" * 450 + "\n" + '{"step": 99}\n')
    found, start = [], 0
    for _ in range(50):
        part = read_on(file, start)
        assert part.end - part.start <= 100
        found, start = found + part.rows, part.end
        if part.is_last:
            break
    assert found == [*rows, {"step": 99}] and start == file.stat().st_size


def test_a_server_reads_plain_files_of_its_folder_and_follows_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"step": 1, "loss": 42.0}\n')
    shelf = tmp_path / "runs"
    run = make_run(shelf / "demo")
    bounds = Bounds(shelf.resolve())
    for name in ("link.json", "metrics.jsonl"):
        (run / name).symlink_to(secret)
    (run / "out").symlink_to(tmp_path)
    (run / "within.json").symlink_to(run / "recipe.toml")
    for path in (
        run / "link.json",
        run / "out" / "secret.json",
        run / "within.json",
        run / ".." / ".." / "secret.json",
        secret,
    ):
        with pytest.raises(OSError):
            open_plain(path, bounds)
        with pytest.raises(OSError):
            read_on(path, 0, bounds)
    os.mkfifo(run / "pipe")
    for path in (run / "pipe", run / "sft"):
        with pytest.raises(OSError):
            open_plain(path, bounds)
    assert json.loads(read_small(run / "sft" / "state.json", bounds))["wall_s"] == 61.0


def test_a_run_whose_files_are_links_shows_nothing_of_them(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    make_run(secret)
    shelf = tmp_path / "runs"
    run = make_run(shelf / "demo")
    for name in ("metrics.jsonl", "state.json"):
        (run / "sft" / name).unlink()
        (run / "sft" / name).symlink_to(secret / "sft" / name)
    (run / "manifest.json").symlink_to(secret / "recipe.toml")
    (run / "other").symlink_to(secret / "sft")
    free, bound = read_run(run), read_run(run, Bounds(shelf.resolve()))
    assert free.sections[0].metrics and {section.name for section in free.sections} == {"sft", "other"}
    assert [section.name for section in bound.sections] == ["sft"] and not bound.sections[0].metrics
    assert bound.sections[0].state == "waiting" and "sft/state.json" in bound.damage


def test_of_long_metrics_a_server_reads_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "demo", num_lines=2000)
    bounds = Bounds((tmp_path / "runs").resolve(), 1000)
    text, is_whole = read_end(run / "sft" / "metrics.jsonl", bounds)
    assert not is_whole and len(text) <= 1000 and json.loads(text.splitlines()[0])["step"] > 1900
    section = read_run(run, bounds).sections[0]
    assert (
        section.last("step") == 2000 and len(section.metrics) < 50 and read_run(run).sections[0].final()["step"] == 2000
    )
    (run / "sft" / "report.json").write_text(json.dumps({"line": "x" * (5 << 20)}))
    assert "sft/report.json" in read_run(run, bounds).damage and not read_run(run).damage
