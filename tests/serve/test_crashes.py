"""A server that is killed: the database is whole, no judgement is lost, at most a second of text is, and it says so."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
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
    check_whole(place)
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


def check_whole(place: Path) -> None:
    """The database is sound, and so are its references and its indexes for the search."""
    with sqlite3.connect(place) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        for table in ("messages_terms", "conversations_terms"):
            connection.execute(f"INSERT INTO {table} ({table}) VALUES ('integrity-check')")
    connection.close()


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


# -- through HTTP ------------------------------------------------------------------------------------------------------

CHARACTERS_A_SECOND = 200  # at most: served.py takes 5 ms at least for each
COUNTED = "".join(f"{number:04d} " for number in range(700))


class Person:
    """Somebody at the page of a server that will be killed: streams an answer, votes on another, notes what came back."""

    def __init__(self, port: int):
        self.port = port
        self.votes: list[str] = []  # that were acknowledged
        self.num_seen = 0  # characters of the answer under way
        self.has_begun = threading.Event()

    def connected(self) -> closing[http.client.HTTPConnection]:
        """A connection of its own, closed at the end whatever happens to the server."""
        return closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20))

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        with self.connected() as connection:
            connection.request(
                method, path, json.dumps(body) if body is not None else None, {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            content = json.loads(answer.read())
        assert answer.status == 200, content
        return content

    def turn(self, text: str) -> tuple[str, str]:
        """Say something in a new conversation; returns the conversation and the answer."""
        id = self.ask("POST", "/api/conversations", {})["id"]
        given = {"parent": None, "content": text, "models": ["demo"]}
        return id, self.ask("POST", f"/api/conversations/{id}/turns", given)["messages"][1]["id"]

    def events(self, message: str) -> Iterator[dict[str, Any]]:
        with self.connected() as connection:
            connection.request("GET", f"/api/messages/{message}/events")
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def watch(self, message: str) -> None:
        try:
            for told in self.events(message):
                self.num_seen = max(self.num_seen, told.get("tokens", 0))
                if self.num_seen:
                    self.has_begun.set()
        except (OSError, http.client.HTTPException):  # it was killed
            pass

    def vote(self, message: str, name: str) -> None:
        try:
            for number in range(100_000):
                reason = f"{name}.{number}"
                self.ask("POST", f"/api/messages/{message}/thumb", {"value": 1, "reason": reason, "consent": True})
                self.votes.append(reason)
        except (OSError, http.client.HTTPException, ValueError):
            pass


def kill_servers(place: Path, rounds: int, save_every_s: float = SAVE_EVERY_S) -> list[int]:
    """Kill a server in each round while it streams and is voted at; returns the characters that each round lost."""
    command = [sys.executable, str(Path(__file__).with_name("served.py")), str(place), str(save_every_s)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None and parent.stdout is not None
    draw, lost, votes, judged, before, process = random.Random(0), list[int](), list[str](), "", ("", "", 0), 0
    try:
        for number in range(rounds + 1):
            parent.stdin.write("next\n")
            parent.stdin.flush()
            process, port = json.loads(parent.stdout.readline())
            person = Person(port)
            if not judged:
                _, judged = person.turn("hi")
                assert list(person.events(judged))[-1]["message"]["content"] == "yes"
            if number:  # what is left of the round before, as the page shows it
                id, message, num_seen = before
                (found,) = (
                    one for one in person.ask("GET", f"/api/conversations/{id}")["messages"] if one["id"] == message
                )
                assert COUNTED.startswith(found["content"])
                lost.append(num_seen - len(found["content"]))
            if number < rounds:
                id, message = person.turn("count")
                threads = [threading.Thread(target=person.watch, args=(message,))]
                threads += [threading.Thread(target=person.vote, args=(judged, f"{number}.{one}")) for one in range(2)]
                for thread in threads:
                    thread.start()
                assert person.has_begun.wait(20)
                time.sleep(draw.uniform(0.2, 2.2))
            os.kill(process, signal.SIGKILL)
            process = 0
            if number < rounds:
                for thread in threads:
                    thread.join()
                votes += person.votes
                before = (id, message, person.num_seen)
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
        parent.stdin.close()
        parent.wait(30)
        parent.stdout.close()
    check_whole(place)
    store = Store.open(place)
    kept = {judgement.reason for judgement in store.judgements.of("everybody")}
    store.close()
    assert set(votes) <= kept and len(votes) > rounds  # what was acknowledged is there
    return lost


@pytest.mark.slow
def test_twelve_killed_servers_lose_at_most_a_second_of_text_and_no_vote(tmp_path: Path) -> None:
    lost = kill_servers(tmp_path / "store.sqlite", 12)
    assert len(lost) == 12 and max(lost) <= CHARACTERS_A_SECOND, lost


@pytest.mark.slow
def test_servers_that_save_every_minute_lose_more(tmp_path: Path) -> None:  # the control
    lost = kill_servers(tmp_path / "store.sqlite", 4, save_every_s=60.0)
    assert max(lost) > CHARACTERS_A_SECOND, lost
