"""The arena on a real server with a real store: names under seal until the vote, sides by lot, votes that can be learned from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")
pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from sqlalchemy import func, select

from lyceum.errors import NotFound, StoreError
from lyceum.evals.arena import Verdict, facets, table_of
from lyceum.serve.arena import battles
from lyceum.serve.arena.battles import KINDS, Battle, Battles, Contender, votes_of
from lyceum.serve.arena.tables import BATTLES
from lyceum.serve.feedback import harvest
from lyceum.serve.judgements import Judgement
from lyceum.serve.site import WEB
from lyceum.serve.store import Store

Make = Callable[..., Any]
NAMES = ("alpha-model", "beta-model")


def turn(server: Any, content: str = "hello", so_far: Any = None, **headers: str) -> Any:
    """Say something; returns the battle as the server tells it, once both answers have ended."""
    given: dict[str, Any] = {"content": content}
    if so_far is not None:
        given |= {"conversation": so_far["conversation"], "parent": so_far["leaf"]}
    said = server.post("/api/arena/turns", given, **headers)
    assert said.status == 200, said.text
    for side in ("left", "right"):
        server.ask("GET", f"/api/messages/{said.json['turns'][-1][side]['id']}/events", headers=headers)
    return said.json


def vote(server: Any, battle: str, verdict: str = "left", headers: Any = None, **more: Any) -> Any:
    return server.ask(
        "POST", f"/api/arena/battles/{battle}/vote", {"verdict": verdict, "consent": True, **more}, headers
    )


# -- the seal ----------------------------------------------------------------------------------------------------------


def test_no_route_names_the_models_before_the_vote_and_the_vote_does(page: Make) -> None:
    server = page(names=NAMES)
    told = turn(server)
    id, last = told["conversation"], told["turns"][-1]
    looks = [json.dumps(told)]
    for path in (
        f"/api/arena/conversations/{id}", f"/api/conversations/{id}", f"/api/conversations/{id}/export",
        f"/api/conversations/{id}/export?format=markdown", "/api/conversations", "/api/account/export", "/api/arena",
        "/api/arena/table", *(f"/api/messages/{last[side]['id']}/events" for side in ("left", "right")),
    ):  # fmt: skip
        found = server.ask("GET", path)
        assert found.status == 200, path
        looks.append(found.text)
    assert any("You said: hello" in look for look in looks)  # they do show the answers
    assert not [look for look in looks if "alpha" in look or "beta" in look]
    assert server.post(f"/api/messages/{last['left']['id']}/continue", {}).status in (404, 409)
    names = vote(server, told["battle"], "right").json
    assert {names["left"], names["right"]} == set(NAMES) and names["leaf"] == last["right"]["id"]
    after = server.ask("GET", f"/api/arena/conversations/{id}").json["turns"][0]
    assert (after["left"]["model"], after["right"]["model"]) == (names["left"], names["right"])
    assert after["verdict"] == "right" and after["battle"] is None
    really = {message.id: message for message in server.store.thread("everybody", id).messages}
    assert really[last["right"]["id"]].parameters["arena"] == told["battle"]


def test_both_models_stand_on_both_sides_by_lot(page: Make) -> None:
    server = page(names=NAMES)
    lefts = set()
    for _ in range(40):  # an honest lot fails with a chance of 2 in 2^40
        lefts.add(vote(server, turn(server)["battle"]).json["left"])
        if len(lefts) == 2:
            break
    assert lefts == set(NAMES)


def test_two_of_three_models_meet_and_never_one_with_itself(page: Make) -> None:
    server = page(names=(*NAMES, "gamma-model"))
    pairs = set()
    for _ in range(60):  # each of three pairs: fails with a chance below 3 (2/3)^60
        names = vote(server, turn(server)["battle"]).json
        pairs.add(frozenset((names["left"], names["right"])))
        if len(pairs) == 3:
            break
    assert len(pairs) == 3 and all(len(pair) == 2 for pair in pairs)


def test_a_battle_is_voted_on_once_by_its_owner_after_both_answers(page: Make, known: Make) -> None:
    server = page(lambda asked, params: "word " * 12, names=NAMES, porter=known("alice", "bob"), pause_s=0.003)
    alice, bob = ({"Authorization": f"Bearer {letter * 40}"} for letter in "ab")
    begun = server.post("/api/arena/turns", {"content": "go"}, **alice).json
    assert vote(server, begun["battle"], headers=alice).status == 409  # still being written
    assert server.store.judgements.of("alice") == []
    assert server.ask("GET", f"/api/arena/conversations/{begun['conversation']}", None, bob).status == 404
    for side in ("left", "right"):
        server.ask("GET", f"/api/messages/{begun['turns'][0][side]['id']}/events", None, alice)
    assert vote(server, begun["battle"], headers=bob).status == 404
    assert vote(server, begun["battle"], "tie", headers=alice).status == 200
    assert vote(server, begun["battle"], headers=alice).status == 404
    assert len(server.store.judgements.of("alice")) == 1


def test_an_answer_that_was_stopped_can_be_judged(page: Make) -> None:
    server = page(lambda asked, params: "word " * 2000, names=NAMES, pause_s=0.002)
    begun = server.post("/api/arena/turns", {"content": "go"}).json
    for side in ("left", "right"):
        assert server.post(f"/api/messages/{begun['turns'][0][side]['id']}/stop", {}).json["stopped"]
        server.ask("GET", f"/api/messages/{begun['turns'][0][side]['id']}/events")
    assert vote(server, begun["battle"], "neither").status == 200


# -- turns -------------------------------------------------------------------------------------------------------------


def test_who_asks_on_has_both_models_read_the_answer_that_was_chosen(page: Make) -> None:
    replies = iter(f"answer {number}" for number in range(100))
    server = page(lambda asked, params: next(replies), names=NAMES)
    first = turn(server, "one")
    again = {"content": "two", "conversation": first["conversation"], "parent": first["leaf"]}
    assert server.post("/api/arena/turns", again).status == 409  # vote first
    shown = {
        side: server.store.message("everybody", first["turns"][0][side]["id"]).content for side in ("left", "right")
    }
    chosen = vote(server, first["battle"], "right").json["leaf"]
    second = turn(server, "two", {"conversation": first["conversation"], "leaf": chosen})
    for engine in server.engines.values():
        assert (
            "one" in engine.heard[-1] and shown["right"] in engine.heard[-1] and shown["left"] not in engine.heard[-1]
        )
    assert [one["said"]["content"] for one in second["turns"]] == ["one", "two"]
    assert [one["battle"] is None for one in second["turns"]] == [True, False]
    assert vote(server, second["battle"], "tie").json["leaf"] == second["turns"][1]["left"]["id"]
    turns = server.ask("GET", f"/api/arena/conversations/{first['conversation']}").json["turns"]
    assert [one["verdict"] for one in turns] == ["right", "tie"]


def test_what_cannot_be_asked_is_refused(page: Make) -> None:
    alone = page()
    assert alone.ask("GET", "/api/arena").json["models"] == 1
    assert alone.post("/api/arena/turns", {"content": "hello"}).json["error"]["code"] == "too_few"
    assert alone.ask("GET", "/api/conversations").json["conversations"] == []
    assert alone.post("/api/arena/battles/battle_none/vote", {"verdict": "left"}).status == 404
    assert alone.post("/api/arena/battles/battle_none/vote", {"verdict": "best"}).status == 400
    assert alone.ask("GET", "/api/arena/table?kind=none").status == 404
    assert alone.ask("GET", "/api/arena/table").json["standings"] == []


def test_a_parent_must_be_an_answer_of_the_conversation(page: Make) -> None:
    server = page(names=NAMES)
    first = turn(server)
    vote(server, first["battle"])
    for parent, status in ((None, 404), ("msg_none", 404), (first["turns"][0]["said"]["id"], 400)):
        given = {"content": "two", "conversation": first["conversation"], "parent": parent}
        assert server.post("/api/arena/turns", given).status == status


# -- what comes of votes -----------------------------------------------------------------------------------------------


def test_a_vote_is_a_ranking_through_the_one_reading_and_names_who_was_judged(page: Make) -> None:
    replies = iter(("first", "second", "third", "fourth"))
    server = page(lambda asked, params: next(replies), names=NAMES)
    names = vote(server, turn(server, "which?")["battle"], "right", kind="open_qa", reason="clear").json
    vote(server, turn(server, "and now?")["battle"], "left", consent=False)
    found = harvest(server.store.judgements.everybodys())
    (ranking,) = found.rankings
    assert found.left_out == {"no_consent": 1} and ranking.ranks == (2.0, 1.0) and ranking.origin == "human"
    assert [message.content for message in ranking.prompt.messages] == ["which?"]
    about = ranking.meta["responses"]
    assert [one["model"] for one in about] == [names["left"], names["right"]]
    assert {one["parameters"]["kind"] for one in about} == {"open_qa"} and ranking.meta["reason"] == "clear"


def test_the_table_counts_all_votes_by_kind_and_anew_when_one_is_gone(page: Make) -> None:
    server = page(lambda asked, params: "# long\n\n" + "word " * 20, names=NAMES)
    conversations = []
    for number in range(4):
        told = turn(server, "What does json.dumps do?" if number else "你好，请介绍一下自己")
        conversations.append(told["conversation"])
        names = told["battle"]
        given = server.post(
            f"/api/arena/battles/{names}/vote", {"verdict": "tie" if number else "left", "kind": "chat"}
        )
        assert given.status == 200  # without consent: it counts, and is not learned from
    table = server.ask("GET", "/api/arena/table").json
    assert table["num_votes"] == table["num_all"] == 4 and table["verdicts"] == {
        "left": 1,
        "right": 0,
        "tie": 3,
        "neither": 0,
    }
    assert table["kinds"] == {"chat": 4, "code": 3, "chinese": 1} and {
        one["model"] for one in table["standings"]
    } == set(NAMES)
    code = server.ask("GET", "/api/arena/table?kind=code&style=true").json
    assert (
        code["num_votes"] == 3 and code["num_all"] == 4 and [one["points"] for one in code["standings"]] == [1000, 1000]
    )
    server.ask("DELETE", f"/api/conversations/{conversations[0]}")
    after = server.ask("GET", "/api/arena/table").json
    assert after["num_votes"] == 3 and "chinese" not in after["kinds"]


# -- the store ---------------------------------------------------------------------------------------------------------


def sealed(store: Store, owner: str = "alice", models: tuple[str, str] = ("a", "b"), checkpoint: str = "") -> Battle:
    """A battle of two finished answers."""
    chat = store.new(owner)
    asked = store.say(owner, chat.id, None, "user", "2 + 2?")
    both = [store.say(owner, chat.id, asked.id, "assistant", text) for text in ("5", "4")]
    contenders = (Contender(one.id, model, {"checkpoint": checkpoint}) for one, model in zip(both, models, strict=True))
    return Battles(store.database).seal(owner, chat.id, *contenders)


def num_battles(store: Store) -> int:
    with store.database.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(BATTLES)).scalar_one())


def judged(store: Store, verdict: Verdict, owner: str = "alice", **given: Any) -> Judgement:
    return Battles(store.database).vote(owner, sealed(store, owner, **given).id, verdict, consent=True)


def test_a_vote_breaks_the_seal_and_is_noted_or_neither(store: Store) -> None:
    battle, ring = sealed(store), Battles(store.database)
    conversation = store.message("alice", battle.left).conversation
    assert ring.open("alice", conversation) == [battle]  # also as another process would find it
    with pytest.raises(NotFound):
        ring.open("bob", conversation)
    with pytest.raises(StoreError, match="a reason of"):
        ring.vote("alice", battle.id, "left", reason="x" * 20_000, consent=True)
    assert store.message("alice", battle.left).model == "" and num_battles(store) == 1  # undone as a whole
    one = ring.vote("alice", battle.id, "left", kind="chat", consent=True)
    assert [answer.model for answer in one.answers] == ["a", "b"] and one.ranks == (1.0, 2.0)
    assert store.message("alice", battle.left).model == "a" and num_battles(store) == 0
    with pytest.raises(NotFound):
        ring.vote("alice", battle.id, "left", consent=True)


def test_a_battle_goes_with_its_messages(store: Store) -> None:
    first, second, third = sealed(store), sealed(store), sealed(store, "bob")
    store.delete_message("alice", first.right)
    store.delete("alice", store.message("alice", second.left).conversation)
    assert num_battles(store) == 1
    store.forget("bob")
    assert num_battles(store) == 0
    with pytest.raises(NotFound):
        Battles(store.database).vote("bob", third.id, "left", consent=True)


def test_only_blind_votes_count_and_of_each_battle_the_first(store: Store) -> None:
    one = judged(store, "left")
    shown = [answer.message for answer in one.answers]
    store.judgements.compare("alice", shown, shown[1], consent=True)  # having seen the names
    open_one = sealed(store)
    chat = store.new("alice")
    asked = store.say("alice", chat.id, None, "user", "hi")
    seen = [store.say("alice", chat.id, asked.id, "assistant", text, model="a").id for text in ("x", "y")]
    store.judgements.compare("alice", seen, seen[0], consent=True)
    store.judgements.compare("alice", [open_one.left, open_one.right], "tie", consent=True)  # past the seal
    (vote,) = votes_of(store.judgements.everybodys("comparison"))
    assert (vote.left, vote.right, vote.verdict) == ("a", "b", "left")


def test_a_name_that_had_two_checkpoints_is_two_models(store: Store) -> None:
    for checkpoint in ("1234567890", "fedcba9876"):
        judged(store, "left", checkpoint=checkpoint)
    judged(store, "left", models=("c", "a"), checkpoint="1234567890")
    names = {name for vote in votes_of(store.judgements.everybodys()) for name in (vote.left, vote.right)}
    assert names == {"a (123456)", "a (fedcba)", "b (123456)", "b (fedcba)", "c"}


def test_votes_hang_together_by_conversation_and_by_person_where_there_are_many(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(battles, "MANY_PERSONS", 4)
    persons = ["ann", "ben", "cai"]
    for person in (*persons, persons[0]):
        judged(store, "tie", owner=person)
    votes = votes_of(store.judgements.everybodys())
    assert len({vote.group for vote in votes}) == 4 and not {vote.group for vote in votes} & set(persons)
    judged(store, "tie", owner="one more")
    votes = votes_of(store.judgements.everybodys())
    assert {vote.group for vote in votes} == {*persons, "one more"} and len(votes) == 5
    assert table_of(votes).num_groups_of_votes == 4


def test_an_imported_file_brings_no_votes(page: Make) -> None:
    server = page(names=NAMES)
    vote(server, turn(server)["battle"])
    file = server.ask("GET", "/api/account/export").json
    assert server.ask("GET", "/api/arena/table").json["num_votes"] == 1
    brought = server.post("/api/account/import", {"conversations": file["conversations"]})
    assert brought.status == 200 and brought.json["judgements"] == 1
    assert server.ask("GET", "/api/arena/table").json["num_votes"] == 1


def test_every_kind_of_prompt_has_its_word() -> None:
    words = (WEB / "arena-words.js").read_text(encoding="utf-8")
    shown = set(re.findall(r"^  kind_(\w+):", words, re.MULTILINE))
    every = facets("x.y 你好" + "的" * 600, 2)
    assert len(every) == 4 and shown == {*KINDS, *every}


def test_a_battle_between_a_model_and_its_improvement_is_two_rows(page: Make) -> None:
    server = page(names=NAMES)
    vote(server, turn(server)["battle"])
    for name in NAMES:
        server.service.models[name] = replace(server.service.model(name), fingerprint=f"new{name}")
    vote(server, turn(server)["battle"])
    assert len(server.ask("GET", "/api/arena/table").json["standings"]) == 4


def test_two_answers_of_the_chat_page_are_no_battle(page: Make) -> None:
    server = page(names=NAMES)
    id = server.post("/api/conversations", {}).json["id"]
    asked = {"parent": None, "content": "hello", "models": list(NAMES)}
    both = [one["id"] for one in server.post(f"/api/conversations/{id}/turns", asked).json["messages"][1:]]
    for one in both:
        server.ask("GET", f"/api/messages/{one}/events")
    assert server.post("/api/comparisons", {"left": both[0], "right": both[1], "verdict": "left"}).status == 200
    assert server.ask("GET", f"/api/arena/conversations/{id}").json["turns"] == []
    assert server.ask("GET", "/api/arena/table").json["num_votes"] == 0  # who chose the models was not blind
