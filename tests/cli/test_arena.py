"""`lyceum arena`: the table of a store's votes, for a person and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.cli.main import main
from lyceum.evals.arena import Verdict
from lyceum.serve.arena.battles import Battles, Contender
from lyceum.serve.store import Store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder in whose store `ppo` beat `sft` nine times of twelve, and `old` lost twice to `older`."""
    folder = tmp_path_factory.mktemp("run")
    store = Store.open(folder)
    battles = Battles(store.database)

    def vote(left: str, right: str, verdict: Verdict, prompt: str, kind: str = "") -> None:
        chat = store.new("alice")
        asked = store.say("alice", chat.id, None, "user", prompt)
        answers = [store.say("alice", chat.id, asked.id, "assistant", text).id for text in ("one", "**two**")]
        battle = battles.seal("alice", chat.id, Contender(answers[0], left, {}), Contender(answers[1], right, {}))
        battles.vote("alice", battle.id, verdict, kind=kind, consent=False)

    for number in range(12):
        vote("sft", "ppo", "left" if number % 4 == 0 else "right", "Why?", "open_qa")
    for _ in range(2):
        vote("old", "older", "right", "What does json.dumps do?")
    store.close()
    return folder


def test_the_table_shows_groups_intervals_and_what_they_rest_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["arena", str(place)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split()[:3] == ["model", "place", "points"]
    assert lines[1].split()[:3] == ["ppo", "1", "1095"] and lines[2].split()[0] == "sft"  # 190.85 / 2 above 1000
    assert lines[3] == "never compared with those above:"
    assert lines[4].split()[0] == "older" and "*" in lines[4] and "to open" in lines[4] and "open to" in lines[5]
    assert "14 votes (3 left, 11 right, 0 tie, 0 neither)" in said and "prompts of the kind open_qa" in said
    assert "prompts of the kind code" in said and "no intervals under 10" in said.split("kind code")[1]


def test_one_kind_style_and_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arena", str(place), "--kind", "code"]) == 0
    assert "sft" not in capsys.readouterr().out
    assert main(["arena", str(place), "--style"]) == 0
    assert "bold:" in capsys.readouterr().out
    assert main(["arena", str(place), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_votes"] == 14 and set(told["kinds"]) == {"open_qa", "code"}
    points = {one["model"]: one["points"] for one in told["standings"]}
    assert points["ppo"] - points["sft"] == pytest.approx(190.8485, abs=1e-3)


def test_no_votes_no_store_and_no_such_kind_are_errors_with_a_way_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["arena", str(place), "--kind", "coed"]) == 2
    assert "code" in capsys.readouterr().err
    assert main(["arena", str(tmp_path / "none")]) == 1
    assert "there is no store" in capsys.readouterr().err
    Store.open(tmp_path / "empty.sqlite").close()
    assert main(["arena", str(tmp_path / "empty.sqlite")]) != 0
    assert "nobody has voted" in capsys.readouterr().err
