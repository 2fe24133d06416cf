"""`lyceum models`: the tree that is drawn, what is left out of it, and what a wrong folder is answered with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli.main import main
from lyceum.model.lineage import learned
from lyceum.run import write_json


def make(folder: Path, age: int, stage: str, parent: str | None, *data: dict[str, Any], section: str = "") -> None:
    info = {"stage": stage, "parent": parent, "learned_from": data, "section": section, "settings": {"epochs": 2}}
    write_json(folder / "config.json", {})
    write_json(folder / "lyceum.json", info)
    os.utime(folder / "lyceum.json", (1_000_000 - age,) * 2)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs; the second one begins with the first one's last model. Ages say in which order they were made."""
    people = {"human": 300, "rule": 900}
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    docs = learned("documents", 812, "corpus", part="docs", tokens=24576)
    make(one / "base" / "checkpoint", 9, "pretrain", None, docs, learned("documents", 40, "corpus", part="code"))
    make(one / "sft" / "checkpoint", 8, "sft", "base/checkpoint", learned("conversations", 3200, "lessons"))
    make(one / "sft" / "snapshot-0.30", 8, "sft", "base/checkpoint", section="sft")
    make(one / "reward" / "checkpoint", 6, "reward", "sft/checkpoint", learned("rankings", 1200, "b", origins=people))
    make(one / "dpo" / "checkpoint", 7, "preference", "sft/checkpoint", learned("ratings", 5, ""))
    make(one / "other" / "checkpoint", 1, "sft", "gone/checkpoint")
    make(two / "better" / "checkpoint", 0, "ppo", str(one / "dpo" / "checkpoint"))
    write_json(one / "sft" / "report.json", {"line": "loss 1.0"})
    return tmp_path / "runs"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_is_a_tree_each_below_its_parent_the_older_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, str(runs / "one"))
    assert [line.split("  ")[0] for line in lines] == [
        "model", "base", "└ sft", *["", ""], "other",
    ]  # fmt: skip
    assert [line[:11].rstrip() for line in lines[3:5]] == ["  ├ dpo", "  └ reward"]
    assert "812 documents of corpus/docs, 24,576 tokens; 40 documents of corpus/code" in lines[1]
    assert "3,200 conversations of lessons" in lines[2] and lines[2].endswith("loss 1.0")
    assert " 5 ratings" in lines[3] and "1,200 rankings of b (300 human, 900 rule)" in lines[4]
    assert "sft, of gone/checkpoint (not there)" in lines[5]


def test_what_was_saved_along_the_way_is_shown_on_request(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("snapshot" in line for line in said(capsys, str(runs / "one")))
    assert any("sft/snapshot-0.30" in line for line in said(capsys, str(runs / "one"), "--all"))
    make(runs / "one" / "late" / "checkpoint", 0, "sft", "sft/snapshot-0.30")
    assert any("sft/snapshot-0.30" in line for line in said(capsys, str(runs / "one")))  # now another comes from it


def test_models_of_several_runs_are_told_apart_and_joined(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [line.split("  ")[0] for line in said(capsys, str(runs)) if "better" in line or "base" in line]
    assert whole[0] == "one/base" and len(whole) == 2
    both = said(capsys, str(runs / "one"), str(runs / "two"))
    assert any("└ two/better" in line for line in both) and len(both) == 7
    alone = said(capsys, str(runs / "two"))  # its ancestors come with it, by their whole path, and nothing else
    assert alone[1].split()[0] == str(runs / "one" / "base")
    assert len(alone) == 5 and "└ better" in alone[-1]


def test_json_holds_every_checkpoint_with_all_that_it_says(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, str(runs / "one"), "--json")
    rows = {row["name"]: row for row in json.loads(line)}
    assert set(rows) == {"base", "sft", "sft/snapshot-0.30", "reward", "dpo", "other"}
    assert rows["reward"]["learned_from"][0]["origins"] == {"human": 300, "rule": 900}
    assert rows["reward"]["parent"] == rows["sft"]["folder"] and rows["other"]["lost_parent"] == "gone/checkpoint"
    assert rows["sft"]["settings"] == {"epochs": 2} and rows["base"]["parent"] is None


def test_a_checkpoint_alone_has_its_own_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, str(runs / "one" / "sft" / "checkpoint"))
    assert len(lines) == 3 and lines[2].startswith("└ sft ")


def test_where_there_is_no_model_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 2 and "there is no folder runs" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["models"]) == 2 and "there is no model in runs" in capsys.readouterr().err
