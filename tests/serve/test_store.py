"""The store: trees that stay trees, answers under way, strings that mean harm, and nobody in another's conversations."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from lyceum.corpus.records import ToolCall
from lyceum.errors import NotFound, StoreError
from lyceum.serve import drafts
from lyceum.serve.columns import storable
from lyceum.serve.database import Database
from lyceum.serve.store import MAX_TITLE, Store
from lyceum.serve.tables import CONVERSATIONS, MESSAGES


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


# -------------------------------------------------------------------------------- the tree


def test_edit_regenerate_and_switch_keep_all_branches(store: Store) -> None:
    chat = store.new("alice", title="Sums", system="Be brief.", parameters={"temperature": 0.5})
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    first = store.answer("alice", chat.id, asked.id, model="demo", parameters={"seed": 1})
    first.append("5")
    five = first.finish("done", "stop", prompt_tokens=9, completion_tokens=1)
    more = store.say("alice", chat.id, five.id, "user", "sure?")
    again = store.answer("alice", chat.id, asked.id, model="demo-2")  # regenerate
    again.append("4")
    four = again.finish()
    edited = store.say("alice", chat.id, None, "user", "3 + 3?")  # edit

    def shown() -> list[str]:
        return [one.content for one in store.thread("alice", chat.id).path()]

    assert shown() == ["3 + 3?"]
    store.show("alice", asked.id)
    assert shown() == ["2 + 2?", "4"]  # down to the newest
    store.show("alice", five.id)
    assert shown() == ["2 + 2?", "5", "sure?"]
    thread = store.thread("alice", chat.id)
    assert thread.siblings(five.id) == (five.id, four.id) and thread.siblings(edited.id) == (asked.id, edited.id)
    assert [one.content for one in thread.path(four.id)] == ["2 + 2?", "4"]
    assert (five.model, five.parameters, five.system) == ("demo", {"seed": 1}, "Be brief.")
    assert (five.prompt_tokens, five.completion_tokens, five.state, five.finish_reason) == (9, 1, "done", "stop")

    assert store.delete_message("alice", five.id).leaf == four.id  # with what hung below it
    assert {one.id for one in store.thread("alice", chat.id).messages} == {asked.id, four.id, edited.id}
    store.delete_message("alice", asked.id)
    assert shown() == ["3 + 3?"] and more.parent == five.id
    assert store.delete_message("alice", edited.id).leaf is None and shown() == []


def test_tools_are_kept_in_the_tree(store: Store) -> None:
    chat, call = store.new("alice"), ToolCall("c1", "lookup", '{"name": "len"}')
    asked = store.say("alice", chat.id, None, "user", "len?")
    draft = store.answer("alice", chat.id, asked.id, model="demo")
    calls = draft.finish("done", "tool_calls", tool_calls=[call.to_json()])
    told = store.say("alice", chat.id, calls.id, "tool", "a length", tool_call_id="c1")
    records = [one.record() for one in store.thread("alice", chat.id).path()]
    assert records[1].tool_calls == (call,) and records[2].tool_call_id == "c1" == told.tool_call_id


STEPS = st.lists(
    st.tuples(st.sampled_from(["say", "answer", "show", "delete", "rewrite"]), st.integers(0, 30)), max_size=25
)


@given(steps=STEPS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_done_the_tree_is_one_and_its_leaf_a_leaf(store: Store, steps: list[tuple[str, int]]) -> None:
    """Beside it, a tree as a dictionary, id -> (parent, text), that does the same the plain way."""
    chat, model = store.new("alice"), dict[str, tuple[str | None, str]]()
    for number, (step, choice) in enumerate(steps):
        ids: list[str | None] = [None, *model]
        chosen = ids[choice % len(ids)]
        if step in ("say", "answer"):
            if step == "say":
                said = store.say("alice", chat.id, chosen, "user", f"w{number}")
            else:
                draft = store.answer("alice", chat.id, chosen, model="demo")
                draft.append(f"w{number}")
                said = draft.finish()
            model[said.id] = (chosen, f"w{number}")
            assert store.latest("alice")[0].leaf == said.id
        elif chosen is None:
            continue
        elif step == "show":
            store.show("alice", chosen)
            assert chosen in [one.id for one in store.thread("alice", chat.id).path()]
        elif step == "rewrite":
            store.rewrite("alice", chosen, f"w{number}")
            model[chosen] = (model[chosen][0], f"w{number}")
        else:
            store.delete_message("alice", chosen)
            gone = {chosen}
            while more := {id for id, (parent, _) in model.items() if parent in gone} - gone:
                gone |= more
            model = {id: row for id, row in model.items() if id not in gone}

        thread = store.thread("alice", chat.id)
        assert {one.id: (one.parent, one.content) for one in thread.messages} == model
        seen: set[str | None] = {None}
        for one in thread.messages:
            assert one.parent in seen  # older than its replies, so there is no circle
            seen.add(one.id)
        assert thread.about.leaf not in {parent for parent, _ in model.values() if parent}
        assert (thread.about.leaf is None) == (not model)
        path = thread.path()
        assert [one.parent for one in path] == [None, *(one.id for one in path[:-1])][: len(path)]
        if model:
            assert path[-1].id == thread.about.leaf
    for number in range(len(steps)):  # the search knows exactly what is there
        found = {hit.message for hit in store.search("alice", f"w{number}", limit=100) if hit.message in model}
        assert found == {id for id, (_, text) in model.items() if text.startswith(f"w{number}")}
    store.delete("alice", chat.id)


def test_a_long_chain_is_deleted_whole(store: Store) -> None:
    chat, parent = store.new("alice"), None
    rows = []
    for number in range(1500):  # above SQLite's limit of cascades
        row = {"id": f"{chat.id}{number}", "conversation": chat.id, "parent": parent, "role": "user", "content": "x"}
        row |= {"tool_calls": [], "system": "", "model": "", "parameters": {}, "finish_reason": "", "state": "done"}
        rows.append({**row, "writer": "", "created": 0.0, "updated": 0.0})
        parent = row["id"]
    with store.database.writing() as connection:
        connection.execute(MESSAGES.insert(), rows)
    store.delete_message("alice", rows[1]["id"])
    assert len(store.thread("alice", chat.id).messages) == 1
    with store.database.writing() as connection:
        connection.execute(MESSAGES.insert(), rows[1:])
    store.delete("alice", chat.id)
    with store.database.reading() as connection:
        assert connection.execute(select(MESSAGES.c.id)).all() == []


# -------------------------------------------------------------------------------- lists, changes


def test_the_list_shows_pinned_ones_first_then_the_latest_page_by_page(store: Store) -> None:
    chats = [store.new("alice", title=str(number)) for number in range(7)]
    store.change("alice", chats[2].id, pinned=True)
    store.say("alice", chats[0].id, None, "user", "hello")
    order = [2, 0, 6, 5, 4, 3, 1]
    assert [one.title for one in store.latest("alice")] == list(map(str, order))
    pages, after = list[str](), None
    while page := store.latest("alice", limit=3, after=after):
        pages, after = pages + [one.title for one in page], page[-1].id
    assert pages == list(map(str, order))
    assert store.latest("bob") == []


def test_a_change_touches_only_what_is_given(store: Store) -> None:
    chat = store.new("alice", title="a", system="s", parameters={"top_p": 1})
    changed = store.change("alice", chat.id, title="b" * 1000, pinned=True)
    assert (changed.title, changed.pinned, changed.system) == ("b" * MAX_TITLE, True, "s")
    assert changed.parameters == {"top_p": 1} and store.change("alice", chat.id) == changed
    assert store.change("alice", chat.id, title="", system="", pinned=False, parameters={}).title == ""
    for wrong in ({"seed": float("nan")}, {"a": object()}):
        with pytest.raises(StoreError, match="not JSON"):
            store.change("alice", chat.id, parameters=wrong)


# -------------------------------------------------------------------------------- whose it is


def test_anothers_things_are_as_if_they_did_not_exist(store: Store) -> None:
    chat = store.new("alice", title="secret plans")
    asked = store.say("alice", chat.id, None, "user", "secret question")
    answer = store.answer("alice", chat.id, asked.id, model="demo").finish()
    mine = store.new("bob")
    before = store.thread("alice", chat.id)

    def attempts(conversation: str, message: str) -> list[Callable[[], Any]]:
        return [
            lambda: store.thread("bob", conversation),
            lambda: store.change("bob", conversation, title="mine"),
            lambda: store.delete("bob", conversation),
            lambda: store.latest("bob", after=conversation),
            lambda: store.say("bob", conversation, None, "user", "x"),
            lambda: store.say("bob", mine.id, message, "user", "x"),
            lambda: store.answer("bob", conversation, None, model="demo"),
            lambda: store.answer("bob", mine.id, message, model="demo"),
            lambda: store.go_on("bob", message),
            lambda: store.rewrite("bob", message, "x"),
            lambda: store.show("bob", message),
            lambda: store.delete_message("bob", message),
        ]

    for there, nowhere in zip(attempts(chat.id, answer.id), attempts("conv_none", "msg_none"), strict=True):
        with pytest.raises(NotFound) as one:
            there()
        with pytest.raises(NotFound) as other:
            nowhere()
        same = str(one.value).replace(chat.id, "conv_none").replace(answer.id, "msg_none")
        assert same == str(other.value)
    assert store.search("bob", "secret") == [] and len(store.search("alice", "secret")) == 2
    assert store.thread("alice", chat.id) == before


@pytest.mark.parametrize("owner", ["", "a\0", "a\ud800", "\ud83d\ude00"])
def test_an_owner_whose_name_would_be_taken_for_anothers_is_refused(store: Store, owner: str) -> None:
    chat = store.new(storable(owner) or "alice")
    for attempt in (
        lambda: store.new(owner),
        lambda: store.latest(owner),
        lambda: store.thread(owner, chat.id),
        lambda: store.search(owner, "x"),
        lambda: store.judgements.of(owner),
        lambda: store.keys.make("laptop", scopes=("models",), owner=owner or "\0"),
    ):
        with pytest.raises(StoreError, match="cannot be an owner"):
            attempt()


def test_a_parent_in_another_conversation_of_ones_own_is_refused(store: Store) -> None:
    one, other = store.new("alice"), store.new("alice")
    said = store.say("alice", one.id, None, "user", "x")
    with pytest.raises(NotFound):
        store.say("alice", other.id, said.id, "user", "y")
    with pytest.raises(StoreError, match="no place"):
        store.say("alice", one.id, None, "system", "y")


# -------------------------------------------------------------------------------- answers under way


def test_text_is_saved_while_it_grows_and_all_of_it_at_the_end(store: Store) -> None:
    chat = store.new("alice")
    draft = store.answer("alice", chat.id, None, model="demo")

    def saved() -> str:
        return store.thread("alice", chat.id).messages[0].content

    draft.append("one ")
    wait_for(lambda: saved() == "one ")
    draft.append("two ")
    draft.append("")
    wait_for(lambda: saved() == "one two ")
    assert store.thread("alice", chat.id).messages[0].state == "streaming"
    with pytest.raises(StoreError, match="still being written"):
        store.say("alice", chat.id, draft.message, "user", "x")
    with pytest.raises(StoreError, match="still being written"):
        store.rewrite("alice", draft.message, "x")
    assert store.search("alice", "one") == []  # not before it is whole
    draft.append("three")
    with pytest.raises(StoreError, match="does not end as"):
        draft.finish("streaming")
    done = draft.finish("stopped", "stop")
    assert (done.content, done.state) == ("one two three", "stopped") and len(store.search("alice", "thr")) == 1
    with pytest.raises(NotFound):
        draft.finish()


def test_all_answers_under_way_are_saved_in_one_write(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, save_every_s=0.2)
    chat = store.new("alice")
    writes: list[bool] = []
    real = Database.writing
    opened = [store.answer("alice", chat.id, None, model="demo") for _ in range(20)]
    monkeypatch.setattr(
        Database, "writing", lambda self, *, durable=True: writes.append(durable) or real(self, durable=durable)
    )
    begun = time.monotonic()
    for draft in opened:
        draft.append("text")
    wait_for(lambda: all(one.content == "text" for one in store.thread("alice", chat.id).messages))
    assert 1 <= len(writes) <= (time.monotonic() - begun) / 0.2 + 1 and not any(writes)
    store.close()


def test_an_answer_that_was_cut_is_gone_on_with(store: Store) -> None:
    chat = store.new("alice")
    draft = store.answer("alice", chat.id, None, model="demo")
    draft.append("Once upon")
    cut = draft.finish("done", "length")
    more = store.go_on("alice", cut.id)
    with pytest.raises(StoreError, match="cannot be gone on with"):
        store.go_on("alice", cut.id)
    more.append(" a time")
    assert more.finish().content == "Once upon a time"
    asked = store.say("alice", chat.id, cut.id, "user", "and?")
    for message, said in ((cut.id, "has replies"), (asked.id, "message of user")):
        with pytest.raises(StoreError, match=said):
            store.go_on("alice", message)


def test_a_draft_whose_message_was_deleted_is_lost_and_says_so(store: Store) -> None:
    chat = store.new("alice")
    draft = store.answer("alice", chat.id, None, model="demo")
    draft.append("text")
    store.delete("alice", chat.id)
    wait_for(lambda: draft.is_lost)
    with pytest.raises(NotFound, match="deleted"):
        draft.finish()


def test_an_answer_whose_writer_is_gone_is_read_as_interrupted_and_settled(store: Store) -> None:
    chat = store.new("alice")
    draft = store.answer("alice", chat.id, None, model="demo")
    draft.append("half a sent")
    wait_for(lambda: store.thread("alice", chat.id).messages[0].content == "half a sent")
    assert store.settle() == 0  # its writer lives
    store.saver.close()  # and now it is gone, with nothing more to say
    with store.database.writing() as connection:
        late = time.time() - drafts.LEASE_S - 1
        connection.execute(update(MESSAGES).where(MESSAGES.c.id == draft.message).values(updated=late))
    (read,) = store.thread("alice", chat.id).messages
    assert (read.content, read.state, read.finish_reason) == ("half a sent", "failed", "interrupted")
    assert store.settle() == 1 and store.settle() == 0
    assert len(store.search("alice", "half")) == 1
    with pytest.raises(NotFound):
        draft.finish()


def test_closing_says_of_answers_under_way_that_they_were_interrupted(place: str) -> None:
    store = Store.open(place)
    chat = store.new("alice")
    store.answer("alice", chat.id, None, model="demo").append("half")
    store.close()
    again = Store.open(place)
    (read,) = again.thread("alice", chat.id).messages
    assert (read.content, read.state, read.finish_reason) == ("half", "failed", "interrupted")
    again.close()


def test_a_full_disk_is_said_once_and_the_text_is_saved_when_there_is_room(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat = store.new("alice")
    store.saver.save_every_s = 0.02
    real, fails = store.saver._save, list[int]()

    def save(open_drafts: list[drafts.Draft]) -> None:
        if len(fails) < 5:
            fails.append(1)
            raise OSError(28, "No space left on device")
        real(open_drafts)

    monkeypatch.setattr(store.saver, "_save", save)
    said: list[str] = []
    monkeypatch.setattr(drafts.log, "warning", said.append)
    draft = store.answer("alice", chat.id, None, model="demo")
    draft.append("text")
    wait_for(lambda: store.thread("alice", chat.id).messages[0].content == "text")
    assert len(fails) == 5 and len(said) == 1 and "No space left" in said[0]
    draft.finish()


# -------------------------------------------------------------------------------- strings


HOSTILE = [
    "NUL \0 inside",
    "lone \ud800 and \udfff surrogates",
    "a pair in halves \ud83d\ude00",
    "right \u202eto left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\ufeff\u200b\u2028\u2029\x1b[31m\x07\r\n",
    "'; DROP TABLE messages; -- %s %(a)s :a {0} \\",
    "<script>alert(1)</script>",
    "e\u0301" * 100,
    "𠮷野家 👩‍👩‍👧‍👦",
    "x" * 1_000_000,
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_string_may_stand_anywhere(store: Store, text: str) -> None:
    owner = "alice"
    chat = store.new(owner, title=text, system=text, parameters={text[:50]: text})
    said = store.say(owner, chat.id, None, "user", text, model=text, tool_call_id=text)
    draft = store.answer(owner, chat.id, said.id, model=text)
    for start in range(0, len(text), 100_000):
        draft.append(text[start : start + 100_000])
    answer = draft.finish("done", text)
    judged = store.judgements.correct(owner, answer.id, text + ".", reason=text[:1000], consent=True)
    store.search(owner, text[:1000])

    thread = store.thread(owner, chat.id)
    assert [one.content for one in thread.messages] == [storable(text)] * 2
    assert (thread.about.title, thread.about.system) == (storable(text)[:MAX_TITLE], storable(text))
    assert thread.about.parameters == json.loads(json.dumps({text[:50]: text}))  # JSON keeps what text cannot
    assert judged.text == json.loads(json.dumps(text + ".")) and store.judgements.of(owner) == [judged]
    json.dumps([one.content for one in thread.messages]).encode()
    thread.messages[0].content.encode("utf-8")


@given(st.text(st.characters(), max_size=30) | st.text("\0\ud800\udc00a", max_size=8))
def test_storable_text_is_utf8_without_nul_and_otherwise_the_same(text: str) -> None:
    kept = storable(text)
    kept.encode("utf-8")
    assert "\0" not in kept and storable(kept) == kept
    if "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text):
        assert kept == text


# -------------------------------------------------------------------------------- several at once


def test_threads_and_stores_that_write_at_once_lose_nothing(place: str) -> None:
    stores = [Store.open(place) for _ in range(2)]
    chat = stores[0].new("alice")
    failed: list[BaseException] = []

    def write(store: Store, name: str) -> None:
        try:
            parent = None
            for number in range(8):
                draft = store.answer("alice", chat.id, parent, model="demo")
                draft.append(f"{name} {number}")
                parent = draft.finish().id
                store.judgements.rate("alice", parent, good=True, consent=True)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(store, f"{n}{k}")) for n, store in enumerate(stores) for k in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    found = stores[1].thread("alice", chat.id)
    assert sorted(one.content for one in found.messages) == sorted(
        f"{n}{k} {i}" for n in "01" for k in "ab" for i in range(8)
    )
    assert len(stores[0].judgements.of("alice", chat.id)) == 32 and len(found.path()) == 8
    with stores[0].database.reading() as connection:
        assert len(connection.execute(select(CONVERSATIONS)).all()) == 1
    for store in stores:
        store.close()
