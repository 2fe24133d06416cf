"""Files that come in: our own export comes back as it was, ChatGPT's as its readers describe it, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from lyceum.corpus.records import ToolCall
from lyceum.errors import DataError
from lyceum.serve.arrivals import admit, admit_judgements, read, read_judgement
from lyceum.serve.feedback import harvest
from lyceum.serve.portable import account
from lyceum.serve.store import Store
from lyceum.serve.tree import StoredMessage


def shape(messages: tuple[StoredMessage, ...]) -> list[Any]:
    """Messages without their ids, each with the place of its parent."""
    places = {message.id: place for place, message in enumerate(messages)}
    rows = [asdict(message) for message in messages]
    for row in rows:
        row["parent"] = places.get(row["parent"])
        del row["id"], row["conversation"]
    return rows


def test_our_own_export_comes_back_as_it_was(store: Store) -> None:
    chat = store.new("alice", title="Sums 总和", system="Be brief.", parameters={"top_k": 5, "model": "demo"})
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    call = ToolCall("c", "add", '{"a": 2}')
    called = store.say("alice", chat.id, asked.id, "assistant", "", tool_calls=[call], model="demo")
    result = store.say("alice", chat.id, called.id, "tool", "4", tool_call_id="c")
    answers = [
        store.say("alice", chat.id, result.id, "assistant", text, model="demo", parameters={"seed": 1}).id
        for text in ("5", "4")
    ]
    store.judgements.compare("alice", answers, answers[1], reason="right", consent=True)
    store.judgements.rate("alice", answers[0], good=False, consent=True)
    store.judgements.correct("alice", answers[0], "4", consent=False)
    store.judgements.rank("alice", answers, [2, 1], acceptable=[False, True], consent=True)
    store.show("alice", answers[0])
    kept = store.new("alice")
    asked = store.say("alice", kept.id, None, "user", "hi")
    store.judgements.rate("alice", store.say("alice", kept.id, asked.id, "assistant", "ho").id, good=True, consent=True)
    store.delete("alice", kept.id, keep_judgements=True)

    told = json.loads("".join(account(store, "alice")))
    before = harvest(store.judgements.everybodys())
    assert sum(admit(store, "bob", read(row), keeps_consent=True) for row in told["conversations"]) == 4
    left = [read_judgement(row) for row in told["judgements"]]
    assert admit_judgements(store, "bob", left, keeps_consent=True) == 1

    (about,) = store.latest("bob")
    assert (about.title, about.system, about.parameters) == (chat.title, chat.system, chat.parameters)
    assert about.created == chat.created and about.id != chat.id
    old, new = store.thread("alice", chat.id), store.thread("bob", about.id)
    assert shape(new.messages) == shape(old.messages)
    assert [one.content for one in new.path()] == [one.content for one in old.path()] == ["2 + 2?", "", "4", "5"]
    assert {hit.conversation for hit in store.search("bob", "总和")} == {about.id} and store.search("bob", "2 + 2")
    ids = {message.id for message in new.messages}
    judged = store.judgements.of("bob", about.id)
    assert all(answer.message in ids for one in judged for answer in one.answers)
    store.forget("alice")
    after = harvest(store.judgements.everybodys())
    texts = [[said.content for said in ranking.responses] for ranking in after.rankings]
    assert texts == [[said.content for said in ranking.responses] for ranking in before.rankings] and len(texts) == 1
    assert [rating.value for rating in after.ratings] == [rating.value for rating in before.ratings] == [0.0, 1.0]
    assert after.left_out == before.left_out


def test_consent_stays_behind_where_others_use_the_server(store: Store) -> None:
    chat = store.new("alice")
    asked = store.say("alice", chat.id, None, "user", "hi")
    answer = store.say("alice", chat.id, asked.id, "assistant", "ho")
    store.judgements.rate("alice", answer.id, good=True, consent=True)
    (row,) = json.loads("".join(account(store, "alice")))["conversations"]
    admit(store, "bob", read(row), keeps_consent=False)
    assert [one.consent for one in store.judgements.of("bob")] == [False]


def node(id: str, parent: str | None, role: str, text: str, at: float | None = 1.0, **more: Any) -> dict[str, Any]:
    content = more.pop("content", {"content_type": "text", "parts": [text]})
    message = {"id": id, "author": {"role": role, "name": None}, "create_time": at, "content": content, **more}
    return {"id": id, "message": message, "parent": parent, "children": []}


CHATGPT: dict[str, Any] = {
    "title": "Capital of France", "create_time": 1_706_745_600.5, "update_time": 1_706_745_900.0, "current_node": "a2",
    "conversation_id": "6f", "moderation_results": [], "default_model_slug": "gpt-4o",
    "mapping": {
        "root": {"id": "root", "message": None, "parent": None, "children": ["s"]},
        "s": node("s", "root", "system", "", None, metadata={"is_visually_hidden_from_conversation": True}),
        "c": node("c", "s", "system", "You are brief."),
        "u": node("u", "c", "user", "What is the capital?", 2.0),
        "a1": node("a1", "u", "assistant", "Lyon", 3.0, metadata={"model_slug": "gpt-4o-mini"}, recipient="all"),
        "t": node("t", "u", "assistant", "", 4.0, content={"content_type": "thoughts", "thoughts": []}),
        "k": node("k", "t", "assistant", "", 4.5, content={"content_type": "code", "text": "print(2)"}, recipient="python"),
        "r": node("r", "k", "tool", "", 4.6, content={"content_type": "execution_output", "text": "2"}),
        "a2": node("a2", "r", "assistant", "Paris", 5.0, metadata={"model_slug": "gpt-4o"}),
        "u2": node("u2", "a2", "user", "", 6.0, content={"content_type": "multimodal_text",
            "parts": [{"content_type": "image_asset_pointer", "asset_pointer": "file://x"}, "And here?"]}),
    },
}  # fmt: skip


def test_chatgpts_export_is_read_with_its_branches_calls_and_models(store: Store) -> None:
    admit(store, "alice", read(CHATGPT), keeps_consent=True)
    (about,) = store.latest("alice")
    assert (about.title, about.system, about.created) == ("Capital of France", "You are brief.", 1_706_745_600.5)
    thread = store.thread("alice", about.id)
    path = [(one.role, one.content, one.model) for one in thread.path()]
    assert path == [
        ("user", "What is the capital?", ""), ("assistant", "", ""), ("tool", "2", ""),
        ("assistant", "Paris", "gpt-4o"), ("user", "[image_asset_pointer]\nAnd here?", ""),
    ]  # fmt: skip
    called, result = thread.path()[1:3]
    (call,) = called.tool_calls
    assert (call.name, call.arguments) == ("python", "print(2)") and result.tool_call_id == call.id
    question = thread.path()[0]
    assert [one.content for one in thread.messages if one.parent == question.id] == ["Lyon", ""]  # both branches


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"messages": "x"}, {"mapping": []}, {"mapping": {"a": 1}}, {"mapping": {"a": {"message": {"author": 1}}}},
        {"messages": [{"id": "a", "role": "user", "content": "x", "parent": "b"}]},
        {"messages": [{"id": i, "role": "user", "content": "x", "parent": j} for i, j in ("ab", "ba")]},
        {"messages": [{"id": "a", "role": "user", "content": "x"}] * 2},
        {"messages": [{"id": "a", "role": "system", "content": "x"}]},
        {"messages": [{"id": "a", "role": "user", "content": "x", "parameters": {"temperature": 99}}]},
        {"messages": [{"id": "a", "role": "user", "content": 5}]},
        {"messages": [], "judgements": [{"kind": "rating", "answers": [{"message": "m", "said": {}}], "value": 1}]},
        {"mapping": {"a": {"message": None, "parent": "b"}, "b": {"message": None, "parent": "a"}}, "current_node": "a"},
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a conversation"):
        read(wrong)


SAID = {"message": "m", "said": {"role": "assistant", "content": "x"}}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "rating", "answers": [SAID]}, {"kind": "rating", "answers": [SAID] * 2, "value": 1.0},
        {"kind": "ranking", "answers": [SAID] * 2, "ranks": [1.0]}, {"kind": "correction", "answers": [SAID], "text": ""},
        {"kind": "comparison", "answers": [SAID] * 2, "ranks": [1.0, 2.0], "choice": 2},
        {"kind": "comparison", "answers": [SAID] * 2, "ranks": [1.0, 2.0]}, {"kind": "praise", "answers": [SAID]},
        {"kind": "rating", "answers": [SAID], "value": 1.0, "prompt": {"messages": []}},
    ],
)  # fmt: skip
def test_what_is_no_judgement_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a judgement"):
        read_judgement(wrong)


def test_a_long_file_of_skipped_nodes_takes_no_square_of_time() -> None:
    many = 20_000
    mapping = {str(n): {"message": None, "parent": str(n - 1) if n else None} for n in range(many)}
    mapping |= {f"u{n}": node(f"u{n}", str(many - 1), "user", "hi") for n in range(1000)}
    assert len(read({"mapping": mapping}).messages) == 1000  # a walk up for each would be twenty million steps
