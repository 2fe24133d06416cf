"""A server that is killed: the database is whole, no judgement is lost, at most a second of text is, and it says so."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from lyceum.serve.drafts import LEASE_S, SAVE_EVERY_S
from lyceum.serve.store import Store
from lyceum.serve.tables import MESSAGES

WORDS_A_SECOND = 100  # at most: crash.py sleeps a hundredth between two


def kill_writers(place: Path, rounds: int, save_every_s: float = SAVE_EVERY_S) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), str(place), str(rounds), str(save_every_s)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout
    return [json.loads(line) for line in told.splitlines()]


def lost_words(place: Path, told: list[dict[str, Any]]) -> list[int]:
    """Check all that must hold of the database; returns how many words each round lost."""
    with sqlite3.connect(place) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        for table in ("messages_terms", "conversations_terms"):
            connection.execute(f"INSERT INTO {table} ({table}) VALUES ('integrity-check')")
    connection.close()
    store = Store.open(place)
    with store.database.writing() as writer:  # as if the lease had passed
        late = time.time() - LEASE_S - 1
        writer.execute(update(MESSAGES).where(MESSAGES.c.state == "streaming").values(updated=late))
    store.settle()
    kept = {judgement.id for judgement in store.judgements.of("alice")}
    assert {vote for one in told for vote in one["votes"]} <= kept  # what was acknowledged is there
    messages = {m.id: m for chat in store.latest("alice", limit=100) for m in store.thread("alice", chat.id).messages}
    lost = []
    for one in told:
        message = messages[one["message"]]
        words = message.content.split()
        assert words == [f"{number:04d}" for number in range(len(words))]  # a beginning of what was streamed
        assert (message.state, message.finish_reason) == ("failed", "interrupted")
        lost.append(one["words"] - len(words))
    store.close()
    return lost


def test_a_killed_writer_loses_at_most_a_second_of_text_and_no_judgement(tmp_path: Path) -> None:
    place = tmp_path / "store.sqlite"
    told = kill_writers(place, 1)
    assert max(lost_words(place, told)) <= WORDS_A_SECOND


@pytest.mark.slow
def test_twenty_killed_writers_lose_no_more(tmp_path: Path) -> None:
    place = tmp_path / "store.sqlite"
    told = kill_writers(place, 20)
    assert max(lost_words(place, told)) <= WORDS_A_SECOND
    assert sum(len(one["votes"]) for one in told) > 100 and max(one["words"] for one in told) > WORDS_A_SECOND


@pytest.mark.slow
def test_text_that_is_saved_every_minute_is_lost(tmp_path: Path) -> None:  # the control
    place = tmp_path / "store.sqlite"
    told = kill_writers(place, 20, save_every_s=60.0)
    assert max(lost_words(place, told)) > WORDS_A_SECOND
