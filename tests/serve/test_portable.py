"""What a person takes along is all of theirs, and only theirs."""

from __future__ import annotations

import json

import pytest

from lyceum.corpus.records import ToolCall
from lyceum.serve import store as store_module
from lyceum.serve.portable import account, as_markdown
from lyceum.serve.store import Store


def test_the_json_holds_every_branch_and_judgement_of_the_owner(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK", 2)
    for owner in ("alice", "bob"):
        for number in range(5):
            chat = store.new(owner, title=f"{owner} {number}")
            asked = store.say(owner, chat.id, None, "user", f"{owner} asks")
            answers = [store.say(owner, chat.id, asked.id, "assistant", text).id for text in "ab"]
            store.judgements.compare(owner, answers, answers[0], consent=number == 2)
        store.delete(owner, chat.id)  # its judgement goes too
        store.delete(owner, store.latest(owner)[1].id, keep_judgements=True)
    told = json.loads("".join(account(store, "alice")))
    assert [chat["title"] for chat in told["conversations"]] == [f"alice {number}" for number in (0, 1, 3)]
    assert all([m["content"] for m in chat["messages"]] == ["alice asks", "a", "b"] for chat in told["conversations"])
    assert all(chat["judgements"][0]["choice"] == 0 for chat in told["conversations"])
    assert len(told["judgements"]) == 1 and told["judgements"][0]["consent"] and "bob" not in json.dumps(told)
    assert json.loads("".join(account(store, "nobody")))["conversations"] == []


def test_an_account_is_written_a_conversation_at_a_time(store: Store) -> None:
    for _ in range(3):
        chat = store.new("alice")
        store.say("alice", chat.id, None, "user", "x" * 100_000)
    pieces = account(store, "alice")
    assert max(len(piece) for piece in pieces) < 110_000
    pieces = account(store, "alice")
    begun = next(pieces) + next(pieces)
    store.delete("alice", chat.id)  # while somebody reads slowly
    assert len(json.loads(begun + "".join(pieces))["conversations"]) == 2


def test_the_markdown_is_the_branch_that_is_shown(store: Store) -> None:
    chat = store.new("alice", title="A\nsum", system="Be brief.")
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    store.say("alice", chat.id, asked.id, "assistant", "5", model="demo")
    call = ToolCall("c", "add", '{"a": 2}')
    last = store.answer("alice", chat.id, asked.id, model="demo-2")
    last.append("```\n4\n```")
    last.finish("stopped", tool_calls=[call.to_json()])
    text = as_markdown(store.thread("alice", chat.id))
    begun = text.splitlines()[2]
    assert begun.endswith("UTC*")
    assert text.replace(begun, "*when*") == (
        "# A sum\n\n*when*\n\n## System\n\nBe brief.\n\n## You\n\n2 + 2?\n\n## Assistant (demo-2)\n\n"
        '```\n4\n```\n\n`add({"a": 2})`\n\n*(stopped)*\n'
    )
