"""The labelling page's routes: blinded tasks, who may do what, answers drawn from the served models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.serve.keys import Key, hash_of
from lyceum.serve.label.rules import KINDS
from lyceum.serve.limits import SCOPES
from lyceum.serve.porter import Porter

Make = Callable[..., Any]
ROWS = [{"prompt": "2 + 2?", "chosen": "It is **4**.", "rejected": "5"}]


def following(server: Any, name: str = "Ann", kinds: Any = ("rank",), **headers: str) -> Any:
    return server.post("/api/label/next", {"name": name, "kinds": list(kinds)}, **headers)


def bring(server: Any, rows: list[Any], as_what: str = "rankings", **headers: str) -> Any:
    return server.post("/api/label/import", {"rows": rows, "as": as_what, "language": "en"}, **headers)


def test_a_task_shows_texts_and_nothing_of_where_they_are_from(page: Make) -> None:
    server = page()
    assert server.ask("GET", "/label").status == 200
    told = server.ask("GET", "/api/label").json
    assert told["asks_name"] and told["admin"] and told["kinds"] == list(KINDS) and len(told["flags"]) == 11
    assert server.post("/api/label/rules", {"gold_share": 0.9, "rankings": 1}).json["gold_share"] == 0.9
    assert bring(server, ROWS).json == {"trees": 1}
    assert bring(server, [{**ROWS[0], "prompt": "known?"}], "gold_rankings").json == {"trees": 1}
    tasks = {}
    for _ in range(2):
        task = following(server).json["task"]
        tasks[task["thread"][0]["content"]] = task
        given = {"name": "Ann", "consent": True, "ranks": [1, 2], "none_acceptable": False, "scores": [7, None]}
        done = server.post(f"/api/label/tasks/{task['id']}", {**given, "flags": [["opinion"], []]})
        assert done.status == 200, done.text
    known, open_ = tasks["known?"], tasks["2 + 2?"]
    assert known.keys() == open_.keys() and not {"author", "model", "is_gold", "gold", "node"} & known.keys()
    assert "gold" not in json.dumps(known) and [one["role"] for one in open_["shown"]] == ["assistant"] * 2
    assert any("<strong>4</strong>" in "".join(one["blocks"]) for one in open_["shown"])
    assert done.json == {"done": {"rank": 2}} and following(server).json == {
        "task": None, "is_drawing": False, "done": {"rank": 2},
    }  # fmt: skip
    board = server.ask("GET", "/api/label/board").json
    assert [one["name"] for one in board["people"]] == ["Ann"] and board["states"] == {"finished": 1}
    assert board["people"][0]["num_gold"] == 1


def test_a_name_is_needed_and_is_the_same_however_it_is_spaced(page: Make) -> None:
    server = page()
    bring(server, ROWS)
    refused = following(server, "  ")
    assert refused.status == 400 and refused.json["error"]["param"] == "name"
    task = following(server, " Ann   Lee ").json["task"]
    assert following(server, "Ann Lee").json["task"]["id"] == task["id"]
    assert server.post(f"/api/label/tasks/{task['id']}/skip", {"name": "Bob", "reason": "other"}).status == 404
    assert server.post(f"/api/label/tasks/{task['id']}/skip", {"name": "Ann Lee", "reason": "lazy"}).status == 409
    assert server.post(f"/api/label/tasks/{task['id']}/skip", {"name": "Ann Lee", "reason": "other"}).json["skipped"]
    assert following(server, "Ann Lee").json["task"] is None


def test_with_keys_a_labeller_is_the_keys_owner_and_only_an_admin_runs_the_page(page: Make) -> None:
    def keys() -> list[Key]:
        usual = [Key(name, name, name, hash_of(name[0] * 40), ("inference",)) for name in ("ann", "bob")]
        return [*usual, Key("boss", "boss", "boss", hash_of("x" * 40), SCOPES)]

    server = page(porter=Porter(keys))
    ann, bob, boss = ({"Authorization": "Bearer " + letter * 40} for letter in "abx")
    assert server.ask("GET", "/api/label").status == 401
    told = server.ask("GET", "/api/label", headers=ann).json
    assert not told["asks_name"] and not told["admin"] and server.ask("GET", "/api/label", headers=boss).json["admin"]
    for path, body in (
        ("/api/label/import", {"rows": [], "as": "rankings"}),
        ("/api/label/rules", {"answers": 3}),
        ("/api/label/guidelines", {"language": "en", "text": "x"}),
        ("/api/label/trees/x/halt", {}),
    ):
        refused = server.post(path, body, **ann)
        assert refused.status == 403 and refused.json["error"]["code"] == "missing_scope", path
    assert server.ask("GET", "/api/label/board", headers=ann).status == 403
    assert bring(server, ROWS, **boss).status == 200
    task = following(server, "bob", **ann).json["task"]
    assert server.post(f"/api/label/tasks/{task['id']}", {"name": "ann", "ranks": [1, 2]}, **bob).status == 404
    assert server.post(f"/api/label/tasks/{task['id']}", {"ranks": [1, 2]}, **ann).json == {"done": {"rank": 1}}
    assert server.post("/api/label/trees/x/halt", {}, **boss).status == 404
    assert server.post("/api/label/guidelines", {"language": "en", "text": "# Be *kind*"}, **boss).status == 200
    assert "<em>kind</em>" in "".join(server.ask("GET", "/api/label/guidelines", headers=ann).json["blocks"])


def test_answers_to_rank_are_drawn_from_the_models_that_are_served(page: Make) -> None:
    server = page(lambda asked, params: f"Number {params.seed % 1000}", names=("one", "two"))
    given = {"answers": 4, "written": 0, "gold_share": 0.0, "max_tokens": 40}
    assert server.post("/api/label/rules", given).status == 200
    bring(server, [{"messages": [{"role": "user", "content": "A number?"}]}], "conversations")
    end = time.monotonic() + 10
    while (task := following(server).json["task"]) is None and time.monotonic() < end:
        time.sleep(0.02)
    assert task is not None and len(task["shown"]) == 4
    assert all(one["content"].startswith("Number ") for one in task["shown"])
    server.post(f"/api/label/tasks/{task['id']}", {"name": "Ann", "ranks": [1, 2, 3, 4], "consent": True})
    from lyceum.serve.feedback import read

    (ranking,) = read(server.store.database.place).rankings
    assert {one["model"] for one in ranking.meta["responses"]} == {"one", "two"}
    assert all({"temperature", "seed", "checkpoint"} <= one["parameters"].keys() for one in ranking.meta["responses"])
    heard = [text for engine in server.engines.values() for text in engine.heard]
    assert len(heard) == 4 and all("A number?" in text for text in heard)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/label/next", {"name": "Ann", "kinds": []}, 400),
        ("/api/label/next", {"name": "Ann", "kinds": ["read"]}, 400),
        ("/api/label/next", {"name": "A" * 61, "kinds": ["rank"]}, 400),
        ("/api/label/tasks/none", {"name": "Ann", "ranks": [1, 2]}, 404),
        ("/api/label/rules", {"answers": 99}, 400),
        ("/api/label/rules", {"answer": 3}, 400),
        ("/api/label/rules", {"models": ["none"]}, 404),
        ("/api/label/import", {"rows": [{"x": 1}], "as": "rankings"}, 400),
        ("/api/label/import", {"rows": [], "as": "verdicts"}, 400),
        ("/api/label/guidelines", {"language": "../x", "text": ""}, 400),
    ],
)
def test_what_cannot_be_is_refused_by_name(page: Make, path: str, body: Any, status: int) -> None:
    answer = page().post(path, body)
    assert answer.status == status and answer.json["error"]["message"], answer.text
