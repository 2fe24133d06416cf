"""All of somebody's data over HTTP: out, in, away; theirs and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.serve.porter import Porter

Make = Callable[..., Any]


def fill(server: Any, owner: str, number: int) -> None:
    for place in range(number):
        chat = server.store.new(owner, title=f"{owner} {place}")
        asked = server.store.say(owner, chat.id, None, "user", f"{owner} asks about xylophones")
        answer = server.store.say(owner, chat.id, asked.id, "assistant", "yes")
        server.store.judgements.rate(owner, answer.id, good=True, consent=True)


def test_an_account_leaves_comes_in_and_is_deleted(page: Make, known: Make) -> None:
    server = page(porter=known("alice", "bob"))
    alice, bob = ({"Authorization": "Bearer " + letter * 40} for letter in "ab")
    for owner in ("alice", "bob"):
        fill(server, owner, 3)
    for method, path in (("GET", "/api/account/export"), ("DELETE", "/api/account"), ("POST", "/api/account/import")):
        assert server.ask(method, path, {} if method == "POST" else None).status == 401
    answer = server.ask("GET", "/api/account/export", None, alice)
    assert (
        answer.headers["content-disposition"].startswith("attachment") and answer.headers["cache-control"] == "no-store"
    )
    told = answer.json
    assert len(told["conversations"]) == 3 and "bob" not in answer.text
    assert server.ask("DELETE", "/api/account", None, alice).json == {"deleted": 3}
    assert server.store.latest("alice") == [] and server.store.judgements.of("alice") == []
    assert server.store.search("alice", "xylophones") == [] and len(server.store.latest("bob")) == 3
    assert server.ask("DELETE", "/api/account", None, alice).json == {"deleted": 0}
    given = {"conversations": told["conversations"], "judgements": told["judgements"]}
    arrived = server.ask("POST", "/api/account/import", given, alice).json
    assert arrived == {"conversations": 3, "messages": 6, "judgements": 3}
    assert [one.title for one in server.store.latest("alice")] == [f"alice {place}" for place in (2, 1, 0)]
    again = server.ask("GET", "/api/account/export", None, alice).json["conversations"]
    assert [[m["content"] for m in chat["messages"]] for chat in again] == [["alice asks about xylophones", "yes"]] * 3
    assert len(server.store.latest("bob")) == 3


def test_where_one_is_no_conversation_none_is_taken(page: Make) -> None:
    server = page()
    good = {"messages": [{"id": "a", "role": "user", "content": "hi"}]}
    answer = server.post("/api/account/import", {"conversations": [good, {"x": 1}]})
    assert answer.status == 400 and answer.json["error"]["param"] == "conversations[1]"
    answer = server.post("/api/account/import", {"conversations": [good], "judgements": [{}]})
    assert answer.status == 400 and answer.json["error"]["param"] == "judgements"
    assert server.store.latest("everybody") == []
    assert server.post("/api/account/import", {"conversations": [good], "judgements": []}).json["messages"] == 1
    assert server.post("/api/account/import", {"rows": []}).status == 400


def test_what_is_deleted_is_in_no_file_any_more(page: Make, tmp_path: Any) -> None:
    server = page()
    fill(server, "everybody", 5)
    assert b"xylophones" in b"".join(file.read_bytes() for file in tmp_path.glob("store.sqlite*"))
    assert server.ask("DELETE", "/api/account").json == {"deleted": 5}
    assert b"xylophones" not in b"".join(file.read_bytes() for file in tmp_path.glob("store.sqlite*"))


def test_an_account_deleted_during_an_answer_stops_it(page: Make) -> None:
    server = page(lambda asked, params: "word " * 500, pause_s=0.005)
    id = server.post("/api/conversations", {}).json["id"]
    server.post(f"/api/conversations/{id}/turns", {"parent": None, "content": "go", "models": ["demo"]})
    assert server.ask("DELETE", "/api/account").status == 200
    assert server.idle(2.0) and server.store.latest("everybody") == []


def test_a_key_is_replaced_and_its_chats_stay(page: Make, tmp_path: Any) -> None:
    from lyceum.serve.database import Database
    from lyceum.serve.keys import Keys

    database = Database.open(tmp_path / "store.sqlite")
    keys = Keys(database)
    key, first = keys.make("laptop")
    revoked: list[Any] = []
    server = page(porter=Porter(keys.all, clock=lambda: 10.0 * len(revoked)))
    old = {"Authorization": f"Bearer {first}"}
    id = server.ask("POST", "/api/conversations", {"title": "mine"}, old).json["id"]
    _, second = keys.make("laptop again", owner=key.owner)
    _, other = keys.make("somebody")
    revoked.append(keys.revoke(key.id))
    assert server.ask("GET", f"/api/conversations/{id}", None, old).json["error"]["code"] == "expired_api_key"
    new = server.ask("GET", f"/api/conversations/{id}", None, {"Authorization": f"Bearer {second}"})
    assert new.status == 200 and new.json["conversation"]["title"] == "mine" and json.loads(new.text)["messages"] == []
    assert server.ask("GET", f"/api/conversations/{id}", None, {"Authorization": f"Bearer {other}"}).status == 404
    database.close()
