"""The chat page's routes, on a real server with a real store: answers that outlive their connection, trees, judgements."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")
pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from sqlalchemy import select, update

from lyceum.corpus.records import ToolCall
from lyceum.serve import pages
from lyceum.serve.drafts import LEASE_S
from lyceum.serve.render import render
from lyceum.serve.site import HEADERS, WEB
from lyceum.serve.tables import MESSAGES

Make = Callable[..., Any]


def begin(server: Any, **given: Any) -> str:
    return server.post("/api/conversations", given).json["id"]


def say(
    server: Any, id: str, content: str, parent: str | None = None, models: list[str] | None = None, **parameters: Any
) -> Any:
    given = {"parent": parent, "content": content, "models": models or ["demo"], "parameters": parameters}
    return server.post(f"/api/conversations/{id}/turns", given)


def follow(server: Any, message: str, blocks: int = 0, **headers: str) -> list[Any]:
    text = server.ask("GET", f"/api/messages/{message}/events?blocks={blocks}", headers=headers).text
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def whole(server: Any, id: str, content: str, parent: str | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
    """Say something and wait for the answer. Returns the user's message id, and the answer."""
    said = say(server, id, content, parent, **more)
    assert said.status == 200, said.text
    user, answer = said.json["messages"]
    return user["id"], follow(server, answer["id"])[-1]["message"]


def opened(server: Any, id: str) -> dict[str, Any]:
    return server.ask("GET", f"/api/conversations/{id}").json


# -- the page itself ---------------------------------------------------------------------------------------------------


def test_the_page_is_small_whole_and_under_a_strict_policy(page: Make) -> None:
    server = page()
    home = server.ask("GET", "/")
    assert home.status == 200 and home.headers["content-type"].startswith("text/html")
    assert home.headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert "unsafe" not in HEADERS["content-security-policy"] and home.headers["x-frame-options"] == "DENY"
    names = re.findall(r'(?:src|href)="(web/[^"]+)"', home.text)
    for file in WEB.iterdir():  # what modules import is there too
        names += [f"web/{name}" for name in re.findall(r'from "\./([^"]+)"', file.read_text(encoding="utf-8"))]
    assert {"web/main.js", "web/style.css", "web/thread.js"} <= set(names)
    for name in set(names):
        found = server.ask("GET", f"/{name}")
        assert found.status == 200 and found.headers["x-content-type-options"] == "nosniff"
        assert server.ask("GET", f"/{name}", headers={"If-None-Match": found.headers["etag"]}).status == 304
    assert sum(file.stat().st_size for file in WEB.iterdir()) < 300_000
    text = home.text + "".join(file.read_text(encoding="utf-8") for file in WEB.iterdir())
    assert not re.search(r"<script>|\bon\w+=\"|style=\"|javascript:|@import|eval\(|new Function", text)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}
    assert [file.name for file in WEB.iterdir() if "innerHTML" in file.read_text(encoding="utf-8")] == ["html.js"]


@pytest.mark.parametrize(
    "path", ["/web/../pages.py", "/web/%2e%2e/pages.py", "/web/index.html", "/web/none.js", "/web/"]
)
def test_only_the_pages_own_files_are_given(page: Make, path: str) -> None:
    assert page().ask("GET", path).status == 404


def test_both_languages_have_every_text() -> None:
    files = sorted(WEB.glob("*words.js"))
    words = "".join(file.read_text(encoding="utf-8") for file in files)
    table = dict(re.findall(r'^  (\w+): \[("(?:[^"\\]|\\.)*", "(?:[^"\\]|\\.)*")\],$', words, re.MULTILINE))
    assert len(table) > 100 and len(table) == len(re.findall(r"^  \w+: \[", words, re.MULTILINE))
    for name, pair in table.items():
        english, chinese = json.loads(f"[{pair}]")
        assert re.findall(r"\{\w+\}", english) == re.findall(r"\{\w+\}", chinese), name
        assert english.isascii() or re.fullmatch(r"[\x00-\x7f“”…–]+", english), name
    code = "".join(file.read_text(encoding="utf-8") for file in WEB.iterdir() if file not in files)
    used = set(re.findall(r'\bt\("(\w+)"', code)) | set(re.findall(r'"((?:reason|short)_\w+)"', code))
    assert not used - set(table), "texts that are missing"
    named = set(re.findall(r'"(\w+)"', code))
    begun = tuple(re.findall(r"\bt\(`(\w+_)\$\{", code))  # such as t(`kind_${name}`)
    begun += tuple(f"{name}_" for name in re.findall(r'chips\([^"]+"(\w+)"', code))
    shown = used | named | {name for name in table if name.startswith(begun)}
    assert not set(table) - shown, "texts that nobody shows"


def test_start_tells_models_and_what_they_studied(page: Make) -> None:
    about = {"studied": "json and csv", "ask": ["What is json?"]}
    line = [{"model": "sft", "stage": "sft", "data": []}]
    told = page(names=("demo", "older"), about=about, lines={"older": line}).ask("GET", "/api/start").json
    assert [model["learned_from"] for model in told["models"]] == [[], line]
    assert [model["id"] for model in told["models"]] == ["demo", "older"] and told["models"][0][
        "context_length"
    ] == 4096
    assert told["about"] == about and told["consent"] is True


# -- conversations -----------------------------------------------------------------------------------------------------


def test_conversations_are_kept_changed_found_and_deleted(page: Make) -> None:
    server = page()
    first, second = (
        begin(server, title="Sums"),
        begin(server, title="词语", system="Be brief.", parameters={"top_k": 5}),
    )
    listed = server.ask("GET", "/api/conversations").json
    assert [one["id"] for one in listed["conversations"]] == [second, first] and listed["next"] is None
    changed = server.ask("PATCH", f"/api/conversations/{first}", {"pinned": True, "title": "More sums"})
    assert changed.json["pinned"] and changed.json["title"] == "More sums"
    listed = server.ask("GET", "/api/conversations").json["conversations"]
    assert [one["id"] for one in listed] == [first, second] and "owner" not in listed[0]
    assert opened(server, second)["conversation"]["parameters"] == {"top_k": 5}
    whole(server, second, "the unheard-of word")
    found = server.ask("GET", "/api/conversations?query=unheard").json["conversations"]
    assert [one["id"] for one in found] == [second] and "unheard-of" in found[0]["excerpt"] and found[0]["message"]
    assert server.ask("GET", "/api/conversations?query=%E8%AF%8D%E8%AF%AD").json["conversations"][0]["id"] == second
    assert server.ask("DELETE", f"/api/conversations/{second}").status == 200
    assert server.ask("GET", f"/api/conversations/{second}").status == 404
    assert not server.ask("GET", "/api/conversations?query=unheard").json["conversations"]


def test_long_lists_come_in_parts(page: Make) -> None:
    server = page()
    ids = [begin(server, title=str(number)) for number in range(45)][::-1]
    one = server.ask("GET", "/api/conversations").json
    two = server.ask("GET", f"/api/conversations?before={one['next']}").json
    assert [row["id"] for row in one["conversations"] + two["conversations"]] == ids and two["next"] is None


def test_an_export_holds_the_tree_and_the_judgements(page: Make) -> None:
    server = page()
    id = begin(server, title="Export", system="Be brief.")
    user, answer = whole(server, id, "one")
    server.post(f"/api/messages/{answer['id']}/thumb", {"value": 1, "reason": "clear", "consent": True})
    told = server.ask("GET", f"/api/conversations/{id}/export").json
    assert [one["content"] for one in told["messages"]] == ["one", "You said: one"]
    assert told["judgements"][0]["value"] == 1 and told["judgements"][0]["reason"] == "clear"
    text = server.ask("GET", f"/api/conversations/{id}/export?format=markdown").text
    assert text.startswith("# Export\n") and "Be brief." in text and "You said: one" in text and "(demo)" in text
    assert server.ask("GET", f"/api/conversations/{id}/export?format=exe").status == 400


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_grows_and_ends_as_it_would_be_opened(page: Make) -> None:
    text = "# Title\n\nSome **bold** words.\n\n```python\nx = 1\n```\n\nThe *end*."
    server = page(lambda asked, params: text, pause_s=0.002)
    id = begin(server)
    _, started = say(server, id, "go", temperature=0.5).json["messages"]
    assert started["state"] == "streaming" and started["blocks"] == []
    news = follow(server, started["id"])
    assert len(news) > 3
    done = [block for one in news[:-1] for block in one["blocks"]]
    last = news[-1]["message"]
    assert last["content"] == text and last["blocks"] == render(text) == done + last["blocks"][len(done) :]
    assert last["state"] == "done" and last["finish_reason"] == "stop" and last["model"] == "demo"
    assert last["parameters"]["temperature"] == 0.5 and 0 <= last["parameters"]["seed"] < 2**53
    assert last["completion_tokens"] > 5 and last["prompt_tokens"] > 1 and last["tokens_per_second"] > 1
    reopened = opened(server, id)["messages"][1]
    assert {**last, "dropped": 0} == {**reopened, "dropped": 0}
    assert follow(server, started["id"])[-1]["message"]["content"] == text  # and whoever comes later sees the end


def test_an_answer_outlives_its_connection_and_is_taken_up_anywhere(page: Make) -> None:
    text = "\n\n".join(f"Paragraph {number} of it." for number in range(12))
    server = page(lambda asked, params: text, pause_s=0.01)
    id = begin(server)
    _, started = say(server, id, "go").json["messages"]
    path = f"/api/messages/{started['id']}/events?blocks=0"
    raw = server.open_stream("/api/conversations", {})  # any connection
    raw.close()
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    seen, at_most = [], time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < at_most:
        line = answer.readline()
        if line.startswith(b"data: {"):
            seen += json.loads(line[6:])["blocks"]
    connection.close()  # in the midst of it
    assert server.engines["demo"].live
    news = follow(server, started["id"], blocks=len(seen))
    assert news[0]["from"] == len(seen)
    later = [block for one in news[:-1] for block in one["blocks"]]
    assert (seen + later)[: len(render(text))] == render(text)[: len(seen + later)]
    assert news[-1]["message"]["content"] == text


def test_who_reads_slowly_gets_the_same_text_in_fewer_pieces(page: Make) -> None:
    server = page(lambda asked, params: "word " * 60, pause_s=0.001)
    id = begin(server)
    _, started = say(server, id, "go").json["messages"]
    news = follow(server, started["id"])
    assert len(news) < 40 and news[-1]["message"]["content"] == "word " * 60


def test_stop_stops_the_engine_and_keeps_the_text(page: Make) -> None:
    server = page(lambda asked, params: "again and " * 200, pause_s=0.005)
    id = begin(server)
    user, started = say(server, id, "go").json["messages"]
    time.sleep(0.15)
    assert server.post(f"/api/messages/{started['id']}/stop", {}).json == {"stopped": True}
    assert server.idle(1.0)
    message = follow(server, started["id"])[-1]["message"]
    assert message["state"] == "stopped" and message["content"] and len(message["content"]) < 1500
    assert ("again and " * 200).startswith(message["content"])
    assert server.post(f"/api/messages/{started['id']}/stop", {}).json == {"stopped": False}
    # and go on: the same message, the rest of the same text
    going = server.post(f"/api/messages/{started['id']}/continue", {}).json["message"]
    assert going["state"] == "streaming" and going["id"] == started["id"]
    server.engines["demo"].pause_s = 0
    ended = follow(server, started["id"])[-1]["message"]
    assert ended["content"] == "again and " * 200 and ended["state"] == "done"
    assert ended["completion_tokens"] > message["completion_tokens"]


def test_an_answer_cut_at_its_longest_says_so(page: Make) -> None:
    server = page()
    _, answer = whole(server, begin(server), "many words", max_tokens=3)
    assert (answer["state"], answer["finish_reason"], answer["completion_tokens"]) == ("done", "length", 3)


def test_regenerated_and_edited_messages_are_siblings(page: Make) -> None:
    server = page(lambda asked, params: f"{asked} {params.seed % 1000}")
    id = begin(server, system="Be kind.")
    user, one = whole(server, id, "first", seed=1)
    (again,) = server.post(f"/api/messages/{one['id']}/again", {"models": ["demo"], "parameters": {"seed": 2}}).json[
        "messages"
    ]
    two = follow(server, again["id"])[-1]["message"]
    assert (one["parent"], two["parent"]) == (user, user) and [one["content"], two["content"]] == ["first 1", "first 2"]
    _, three = whole(server, id, "second", two["id"], seed=3)
    edited, four = whole(server, id, "first, edited", None, seed=4)
    told = opened(server, id)
    assert told["conversation"]["leaf"] == four["id"] and len(told["messages"]) == 7
    back = server.ask("PATCH", f"/api/conversations/{id}", {"leaf": user}).json
    assert back["leaf"] == three["id"]  # the newest below it
    assert server.engines["demo"].heard[2].count("system\nBe kind.") == 1
    assert "first 2" in server.engines["demo"].heard[2] and "first 1" not in server.engines["demo"].heard[2]


def test_what_cannot_be_answered_is_refused_and_leaves_nothing(page: Make) -> None:
    server = page()
    id = begin(server)
    user, answer = whole(server, id, "hello")
    assert say(server, id, "x", user).status == 400  # what was said last is not answered
    assert say(server, id, "x", "msg_none").status == 404
    assert say(server, id, "x", answer["id"], models=["none"]).status == 404
    assert say(server, id, "x", answer["id"], temperature=9).status == 400
    assert say(server, id, "x", answer["id"], stop=["a"] * 5).status == 400
    assert say(server, id, "", answer["id"]).status == 400
    assert say(server, id, "x " * 9000, answer["id"]).status == 400
    assert server.post(f"/api/messages/{answer['id']}/again", {"models": ["demo"] * 3}).status == 400
    assert len(opened(server, id)["messages"]) == 2 and server.idle()


def test_the_oldest_turns_are_left_out_where_there_is_no_room(page: Make) -> None:
    server = page(lambda asked, params: "ok")
    id = begin(server, system="Be brief.")
    parent, dropped = None, 0
    for number in range(4):
        _, answer = whole(server, id, f"turn {number} " + "the reply to the question " * 180, parent)
        parent, dropped = answer["id"], answer["dropped"]
    heard = server.engines["demo"].heard[-1]
    assert dropped >= 2 and "turn 0" not in heard and "turn 3" in heard and "Be brief." in heard
    assert answer["prompt_tokens"] < 4096


# -- judgements --------------------------------------------------------------------------------------------------------


def test_thumbs_are_kept_with_all_that_was_seen_and_taken_back(page: Make) -> None:
    server = page()
    id = begin(server)
    _, answer = whole(server, id, "hello")
    for value, reason in ((1, ""), (-1, "wrong; not so")):
        assert (
            server.post(
                f"/api/messages/{answer['id']}/thumb", {"value": value, "reason": reason, "consent": True}
            ).status
            == 200
        )
    assert opened(server, id)["messages"][1]["thumb"] == -1
    first, last = server.store.judgements.of("everybody", id)
    assert (
        last.value == 0
        and last.reason == "wrong; not so"
        and last.consent
        and last.answers[0].said.content == "You said: hello"
    )
    server.post(f"/api/messages/{answer['id']}/thumb", {"value": 0})
    assert not server.store.judgements.of("everybody", id) and "thumb" not in opened(server, id)["messages"][1]
    assert server.post(f"/api/messages/{answer['id']}/thumb", {"value": 2}).status == 400
    assert server.post(f"/api/messages/{answer['parent']}/thumb", {"value": 1}).status == 409  # a person's words


def test_a_correction_takes_the_answers_place_and_what_follows_stays(page: Make) -> None:
    server = page()
    id = begin(server)
    _, answer = whole(server, id, "hello")
    _, later = whole(server, id, "more", answer["id"])
    told = server.post(f"/api/messages/{answer['id']}/correction", {"content": "**Hello!**", "consent": True}).json[
        "message"
    ]
    assert told["blocks"] == ["<p><strong>Hello!</strong></p>"] and told["corrected"]
    messages = opened(server, id)["messages"]
    assert len(messages) == 4 and messages[1]["content"] == "**Hello!**" and messages[1]["corrected"]
    (judged,) = server.store.judgements.of("everybody", id)
    assert judged.text == "**Hello!**" and judged.answers[0].said.content == "You said: hello" and judged.consent


def test_two_answers_are_compared_and_the_better_one_goes_on(page: Make) -> None:
    server = page(lambda asked, params: f"{asked} {params.seed}", names=("demo", "older"))
    sides = set()
    for _ in range(12):
        id = begin(server)
        user, one, two = say(server, id, "go", models=["demo", "older"]).json["messages"]
        left, right = (follow(server, message["id"])[-1]["message"] for message in (one, two))
        assert [left["parameters"]["side"], right["parameters"]["side"]] == ["left", "right"]
        assert left["parameters"]["pair"] == right["parameters"]["pair"] and left["content"] != right["content"]
        sides.add(left["model"])
    assert sides == {"demo", "older"}  # by lot
    given = {"left": left["id"], "right": right["id"], "verdict": "right", "consent": True}
    assert server.post("/api/comparisons", given).json == {"leaf": right["id"]}
    assert [one.get("judged") for one in opened(server, id)["messages"]] == [None, True, True]
    (judged,) = server.store.judgements.of("everybody", id)
    assert judged.choice == 1 and [answer.message for answer in judged.answers] == [left["id"], right["id"]]
    assert {answer.model for answer in judged.answers} == {"demo", "older"}


# -- protection --------------------------------------------------------------------------------------------------------


def test_nobody_sees_or_touches_what_is_anothers(page: Make, known: Make) -> None:
    server = page(porter=known("alice", "bob"))
    alice, bob = ({"Authorization": "Bearer " + letter * 40} for letter in "ab")
    assert server.ask("GET", "/").status == 200 and server.ask("GET", "/web/main.js").status == 200
    for path in ("/api/start", "/api/conversations"):
        assert server.ask("GET", path).status == 401
    id = server.ask("POST", "/api/conversations", {"title": "mine"}, alice).json["id"]
    given = {"parent": None, "content": "hello", "models": ["demo"]}
    _, answer = server.ask("POST", f"/api/conversations/{id}/turns", given, alice).json["messages"]
    message = follow(server, answer["id"], Authorization=alice["Authorization"])[-1]["message"]["id"]
    asked = [
        ("GET", f"/api/conversations/{id}", None), ("DELETE", f"/api/conversations/{id}", None),
        ("GET", f"/api/conversations/{id}/export", None), ("PATCH", f"/api/conversations/{id}", {"title": "x"}),
        ("POST", f"/api/conversations/{id}/turns", given), ("GET", f"/api/messages/{message}/events", None),
        ("POST", f"/api/messages/{message}/again", {"models": ["demo"]}), ("POST", f"/api/messages/{message}/continue", {}),
        ("POST", f"/api/messages/{message}/stop", {}), ("POST", f"/api/messages/{message}/thumb", {"value": 1}),
        ("POST", f"/api/messages/{message}/correction", {"content": "x"}),
        ("POST", "/api/comparisons", {"left": message, "right": answer["parent"], "verdict": "left"}),
    ]  # fmt: skip
    for method, path, body in asked:
        assert server.ask(method, path, body, bob).status == 404, (method, path)
        assert server.ask(method, path, body).status == 401, (method, path)
    assert server.ask("GET", "/api/conversations", None, bob).json["conversations"] == []
    other = server.ask("POST", "/api/conversations", {}, bob).json["id"]
    assert server.ask("POST", f"/api/conversations/{other}/turns", {**given, "parent": message}, bob).status == 404
    assert server.ask("PATCH", f"/api/conversations/{other}", {"leaf": message}, bob).status == 404
    assert (
        server.ask("GET", f"/api/conversations/{id}", None, alice).json["messages"][1]["content"] == "You said: hello"
    )


def test_pages_of_another_site_may_not_ask(page: Make) -> None:
    server = page()
    assert server.ask("POST", "/api/conversations", {}, {"Origin": "http://evil.example"}).status == 403
    assert server.ask("GET", "/api/conversations", None, {"Host": "evil.example"}).status == 403
    assert server.ask("POST", "/api/conversations", b"title=x", {"content-type": "text/plain"}).status == 415


def test_a_conversation_deleted_during_an_answer_stops_it(page: Make) -> None:
    server = page(lambda asked, params: "word " * 500, pause_s=0.005)
    id = begin(server)
    say(server, id, "go")
    assert server.ask("DELETE", f"/api/conversations/{id}").status == 200
    assert server.idle(2.0) and server.ask("GET", "/api/conversations").json["conversations"] == []


def test_many_may_look_on_and_all_see_the_same(page: Make) -> None:
    server = page(lambda asked, params: "some words " * 40, pause_s=0.002)
    _, started = say(server, begin(server), "go").json["messages"]
    seen: list[str] = []
    threads = [
        threading.Thread(target=lambda: seen.append(follow(server, started["id"])[-1]["message"]["content"]))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["some words " * 40] * 6 and server.engines["demo"].num_added == 1


def test_a_running_server_settles_answers_whose_writer_is_gone(page: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SETTLE_EVERY_S", 0.05)
    server = page()
    store = server.store
    id = begin(server)
    said, _ = whole(server, id, "hello")
    lost = store.answer("everybody", id, said, model="demo")  # as of another server
    store.saver.forget(lost)
    alive = store.answer("everybody", id, said, model="demo")

    def raw(message: str) -> str:
        with store.database.reading() as connection:
            return str(connection.execute(select(MESSAGES.c.state).where(MESSAGES.c.id == message)).scalar())

    with store.database.writing() as connection:
        late = update(MESSAGES).where(MESSAGES.c.id == lost.message).values(updated=time.time() - LEASE_S - 1)
        connection.execute(late)
    end = time.monotonic() + 5
    while raw(lost.message) == "streaming" and time.monotonic() < end:
        time.sleep(0.01)
    assert raw(lost.message) == "failed" and raw(alive.message) == "streaming"  # in the table, not only as it is read
    alive.finish("done")


def test_a_message_tells_its_calls_and_their_results(page: Make) -> None:
    server = page()
    id, call = begin(server), ToolCall("c", "add", '{"a": 2}')
    asked = server.store.say("everybody", id, None, "user", "2 + 2?")
    called = server.store.say("everybody", id, asked.id, "assistant", "", tool_calls=[call], model="demo")
    result = server.store.say("everybody", id, called.id, "tool", "<b>4</b>", tool_call_id="c")
    messages = opened(server, id)["messages"]
    assert messages[1]["tool_calls"] == [{"id": "c", "name": "add", "arguments": '{"a": 2}'}]
    assert messages[2]["tool_call_id"] == "c" and messages[2]["content"] == "<b>4</b>" and "blocks" not in messages[2]
    (answer,) = server.post(f"/api/messages/{result.id}/again", {"models": ["demo"]}).json["messages"]
    assert answer["parent"] == result.id
    assert server.idle() and "4" in server.engines["demo"].heard[-1]


def test_an_answer_says_which_checkpoint_wrote_it_when_a_name_has_had_two(page: Make) -> None:
    server = page()
    id, last = begin(server), None
    for fingerprint in ("first", "second"):
        server.service.models["demo"] = replace(server.service.model("demo"), fingerprint=fingerprint)
        _, answer = whole(server, id, f"hello {fingerprint}", last)
        last = answer["id"]
    answers = [one for one in opened(server, id)["messages"] if one["role"] == "assistant"]
    assert [(one["model"], one["parameters"]["checkpoint"]) for one in answers] == [
        ("demo", "first"),
        ("demo", "second"),
    ]


def test_an_answer_that_another_checkpoint_goes_on_with_names_both(page: Make) -> None:
    server = page()
    id = begin(server)
    kept = []
    for number, fingerprint in enumerate(("first", "first", "second", "third")):
        server.service.models["demo"] = replace(server.service.model("demo"), fingerprint=fingerprint)
        if number == 0:
            _, answer = whole(server, id, "hello")
        else:
            assert server.post(f"/api/messages/{answer['id']}/continue", {}).status == 200
            follow(server, answer["id"])
        found = opened(server, id)["messages"][-1]["parameters"]
        kept.append((found["checkpoint"], found.get("begun_by")))
    assert kept == [("first", None), ("first", None), ("second", ["first"]), ("third", ["first", "second"])]
