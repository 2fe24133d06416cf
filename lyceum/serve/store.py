"""Conversations of the people who use the service: kept, found, branched, deleted.

    store = Store.open("runs/demo/store.sqlite")
    chat = store.new("alice", title="Sums")
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    draft = store.answer("alice", chat.id, asked.id, model="demo")      # then append and finish: lyceum.serve.drafts
    store.thread("alice", chat.id).path()                               # what is shown

Every call names the owner first; what is not the owner's is not there (`NotFound`, the same as for what never was). All
calls block: a server makes them from a worker thread, except `Draft.append`.

**The tree.** A message knows its parent. To edit a message is to say another with the same parent; to regenerate an answer
is to answer the same parent again; both are siblings of what was there. The conversation's leaf says which branch is
shown: it is always a message without replies, the newest below the last one chosen. A message's parent is older than it.

**Deleting** a message deletes what hangs below it; judgements stay, with their own copy of what was judged. Deleting a
conversation deletes its judgements too, unless the person leaves those given with consent (`keep_judgements`).

Not here: judgements (`lyceum.serve.judgements`), keys (`lyceum.serve.keys`), the search's terms (`lyceum.serve.terms`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, tuple_, update

from lyceum.corpus.records import ToolCall
from lyceum.errors import NotFound, StoreError
from lyceum.serve import terms
from lyceum.serve.batch.kept import Batches, forget_batches
from lyceum.serve.columns import storable
from lyceum.serve.database import Database
from lyceum.serve.drafts import LEASE_S, SAVE_EVERY_S, Draft, Saver, settle
from lyceum.serve.judgements import Judgements
from lyceum.serve.keys import Keys
from lyceum.serve.label.office import forget as forget_labels
from lyceum.serve.responses.kept import Responses
from lyceum.serve.responses.tables import RESPONSES
from lyceum.serve.tables import CONVERSATIONS, JUDGEMENTS, MESSAGES, STATES
from lyceum.serve.tree import (
    StoredConversation,
    StoredMessage,
    Thread,
    as_conversation,
    messages_of,
    need_owner,
    need_whole,
    new_id,
    newest_leaf,
    own,
    own_message,
    touch,
)

ROLES = ("user", "assistant", "tool")  # the system prompt is the conversation's
MAX_TITLE = 300  # characters
CHUNK = 500  # values in one statement


@dataclass(frozen=True)
class Hit:
    """Where a search found something. message: None where it was the title."""

    conversation: str
    message: str | None
    text: str
    cursor: int


class Store:
    """The open store. `judgements`, `keys`, `responses` and `batches` are the rest of it."""

    def __init__(self, database: Database, *, save_every_s: float = SAVE_EVERY_S):
        self.database = database
        self.judgements = Judgements(database)
        self.keys = Keys(database)
        self.responses = Responses(database)
        self.batches = Batches(database)
        self.writer = secrets.token_hex(8)
        self.saver = Saver(database, self.writer, save_every_s)

    @classmethod
    def open(cls, place: str | Path, *, save_every_s: float = SAVE_EVERY_S) -> Store:
        """Open (or make) a store: a run's folder, a file, or a URL. Raises StoreError."""
        store = cls(Database.open(place), save_every_s=save_every_s)
        store.settle()
        return store

    def close(self) -> None:
        """Save what is under way, say of it that it was interrupted, and close."""
        self.saver.close()
        with self.database.writing() as connection:
            settle(connection, MESSAGES.c.writer == self.writer)
        self.database.close()

    def settle(self) -> int:
        """Mark answers whose writer is gone as interrupted, for good; returns how many. A server calls it now and then."""
        late = MESSAGES.c.updated < time.time() - LEASE_S
        with self.database.reading() as connection:
            if not connection.execute(select(func.count()).where(MESSAGES.c.state == "streaming", late)).scalar():
                return 0
        with self.database.writing() as connection:
            return settle(connection, late)

    # ---------------------------------------------------------------------------- conversations

    def new(
        self, owner: str, *, title: str = "", system: str = "", parameters: Mapping[str, Any] | None = None
    ) -> StoredConversation:
        """Begin a conversation."""
        now = time.time()
        row: dict[str, Any] = {
            "id": new_id("conv"),
            "owner": need_owner(owner),
            "title": _title(title),
            "pinned": False,
            "system": storable(system),
            "parameters": _parameters(parameters),
            "leaf": None,
            "created": now,
            "updated": now,
        }
        with self.database.writing() as connection:
            number = connection.execute(
                insert(CONVERSATIONS).values(row).returning(CONVERSATIONS.c.number)
            ).scalar_one()
            terms.add(connection, "conversations", [(number, owner, row["title"])])
        return StoredConversation(**row)

    def latest(self, owner: str, *, limit: int = 50, after: str | None = None) -> list[StoredConversation]:
        """The owner's conversations: pinned ones first, then the latest; `after`: the id that the page before ended with."""
        table = CONVERSATIONS.c
        order = (table.pinned, table.updated, table.number)
        query = (
            select(CONVERSATIONS)
            .where(table.owner == need_owner(owner))
            .order_by(*(one.desc() for one in order))
            .limit(limit)
        )
        with self.database.reading() as connection:
            if after is not None:
                last = own(connection, owner, after)
                query = query.where(tuple_(*order) < tuple_(last.pinned, last.updated, last.number))
            return [as_conversation(row) for row in connection.execute(query)]

    def every(self, owner: str) -> Iterator[str]:
        """The ids of all the owner's conversations, oldest first; no transaction is open meanwhile."""
        table, at = CONVERSATIONS.c, 0
        query = select(table.number, table.id).where(table.owner == need_owner(owner)).order_by(table.number)
        while True:
            with self.database.reading() as connection:
                page = connection.execute(query.where(table.number > at).limit(CHUNK)).all()
            if not page:
                return
            yield from (id for _, id in page)
            at = page[-1].number

    def thread(self, owner: str, conversation: str) -> Thread:
        """A conversation with all its messages. Raises NotFound."""
        with self.database.reading() as connection:
            about = as_conversation(own(connection, owner, conversation))
            return Thread(about, tuple(messages_of(connection, conversation)))

    def about(self, owner: str, conversation: str) -> StoredConversation:
        """A conversation without its messages. Raises NotFound."""
        with self.database.reading() as connection:
            return as_conversation(own(connection, owner, conversation))

    def change(
        self,
        owner: str,
        conversation: str,
        *,
        title: str | None = None,
        pinned: bool | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> StoredConversation:
        """Change what is given. Raises NotFound."""
        given: dict[str, Any] = {"title": None if title is None else _title(title), "pinned": pinned, "system": system}
        given["parameters"] = None if parameters is None else _parameters(parameters)
        values = {name: value for name, value in given.items() if value is not None}
        with self.database.writing() as connection:
            number = own(connection, owner, conversation, for_change=True).number
            if values:
                connection.execute(update(CONVERSATIONS).where(CONVERSATIONS.c.number == number).values(values))
            if title is not None:
                terms.add(connection, "conversations", [(number, owner, _title(title))])
            return as_conversation(own(connection, owner, conversation))

    def delete(self, owner: str, conversation: str, *, keep_judgements: bool = False) -> None:
        """Delete a conversation, really: its messages, what the search knows of them, its judgements.

        Args:
            owner: whose it must be.
            conversation: its id.
            keep_judgements: those given with consent stay, with their own copy of the texts, and without the conversation.

        Raises:
            NotFound: there is none.
        """
        with self.database.writing() as connection:
            number = own(connection, owner, conversation, for_change=True).number
            here = JUDGEMENTS.c.conversation == conversation
            if keep_judgements:
                connection.execute(update(JUDGEMENTS).where(here, JUDGEMENTS.c.consent).values(conversation=None))
            connection.execute(delete(JUDGEMENTS).where(here))
            inside = MESSAGES.c.conversation == conversation
            terms.remove(
                connection, "messages", connection.execute(select(MESSAGES.c.number).where(inside)).scalars().all()
            )
            connection.execute(delete(MESSAGES).where(inside))
            terms.remove(connection, "conversations", [number])
            connection.execute(delete(CONVERSATIONS).where(CONVERSATIONS.c.number == number))

    def forget(self, owner: str) -> int:
        """Delete all that is an owner's, really: conversations, messages, judgements, responses, labels; returns how many chats.

        Its keys stay. The files are scrubbed too (`Database.scrub`), which takes seconds where there is much.
        """
        mine = select(CONVERSATIONS.c.id).where(CONVERSATIONS.c.owner == need_owner(owner))
        with self.database.writing() as connection:
            connection.execute(delete(JUDGEMENTS).where(JUDGEMENTS.c.owner == owner))
            connection.execute(delete(RESPONSES).where(RESPONSES.c.owner == owner))
            forget_batches(connection, owner)
            inside = MESSAGES.c.conversation.in_(mine)
            numbers = connection.execute(delete(MESSAGES).where(inside).returning(MESSAGES.c.number)).scalars().all()
            terms.remove(connection, "messages", numbers)
            gone = delete(CONVERSATIONS).where(CONVERSATIONS.c.owner == owner).returning(CONVERSATIONS.c.number)
            conversations = connection.execute(gone).scalars().all()
            terms.remove(connection, "conversations", conversations)
            forget_labels(connection, owner)
        self.database.scrub()
        return len(conversations)

    # ---------------------------------------------------------------------------- messages

    def say(
        self,
        owner: str,
        conversation: str,
        parent: str | None,
        role: str,
        content: str,
        *,
        tool_calls: Sequence[ToolCall] = (),
        tool_call_id: str | None = None,
        model: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> StoredMessage:
        """Add a whole message below `parent` (None: a first message), and show it.

        Raises:
            NotFound: the conversation, or the parent in it.
            StoreError: a role that has no place in the tree, or a parent that is still being written.
        """
        row: dict[str, Any] = {
            "content": content,
            "tool_calls": [call.to_json() for call in tool_calls],
            "tool_call_id": tool_call_id,
        }
        row |= {"role": role, "model": model, "parameters": _parameters(parameters), "state": "done"}
        row["finish_reason"] = "stop" if role == "assistant" else ""
        with self.database.writing() as connection:
            number, said = self._insert(connection, owner, conversation, parent, row)
            terms.add(connection, "messages", [(number, owner, said.content)])
        return said

    def answer(
        self,
        owner: str,
        conversation: str,
        parent: str | None,
        *,
        model: str,
        parameters: Mapping[str, Any] | None = None,
    ) -> Draft:
        """Begin an answer below `parent`, and show it. The same parent again: another answer beside the first.

        Raises:
            NotFound: the conversation, or the parent in it.
            StoreError: the parent is still being written.
        """
        row: dict[str, Any] = {
            "role": "assistant",
            "content": "",
            "tool_calls": [],
            "tool_call_id": None,
            "model": model,
        }
        row |= {"parameters": _parameters(parameters), "state": "streaming", "finish_reason": ""}
        with self.database.writing() as connection:
            _, message = self._insert(connection, owner, conversation, parent, row)
        return self._follow(message, owner)

    def go_on(self, owner: str, message: str, parameters: Mapping[str, Any] | None = None) -> Draft:
        """Go on with an answer that ended too early; it must be the last of its branch. parameters: in place of what it has.

        Raises:
            NotFound: there is none.
            StoreError: it is not the assistant's, not the last, or still being written.
        """
        with self.database.writing() as connection:
            found = own_message(connection, owner, message, for_change=True)
            if found.role != "assistant" or found.state == "streaming":
                raise StoreError(f"a {found.state} message of {found.role} cannot be gone on with")
            if connection.execute(select(MESSAGES.c.id).where(MESSAGES.c.parent == message).limit(1)).first():
                raise StoreError("the answer has replies, which were given to what it says now", hint="answer anew")
            values: dict[str, Any] = {
                "state": "streaming",
                "writer": self.writer,
                "updated": time.time(),
                "finish_reason": "",
            }
            if parameters is not None:
                values["parameters"] = _parameters(parameters)
            connection.execute(update(MESSAGES).where(MESSAGES.c.id == message).values(values))
            touch(connection, found.conversation, leaf=message)
        return self._follow(found, owner)

    def message(self, owner: str, message: str) -> StoredMessage:
        """One message. Raises NotFound."""
        with self.database.reading() as connection:
            return own_message(connection, owner, message)

    def rewrite(self, owner: str, message: str, content: str) -> StoredMessage:
        """Change a message's text in its place: what follows it stays. Judgements keep what was judged.

        Raises:
            NotFound: there is none.
            StoreError: it is still being written.
        """
        with self.database.writing() as connection:
            found = own_message(connection, owner, message, for_change=True)
            need_whole(found)
            values = {"content": content, "updated": time.time()}
            number = connection.execute(
                update(MESSAGES).where(MESSAGES.c.id == message).values(values).returning(MESSAGES.c.number)
            ).scalar_one()
            terms.add(connection, "messages", [(number, owner, content)])
            touch(connection, found.conversation)
            return own_message(connection, owner, message)

    def show(self, owner: str, message: str) -> StoredConversation:
        """Show the branch of this message, down to the newest leaf below it. Raises NotFound."""
        with self.database.writing() as connection:
            conversation = own_message(connection, owner, message, for_change=True).conversation
            touch(connection, conversation, leaf=newest_leaf(messages_of(connection, conversation), message))
            return as_conversation(own(connection, owner, conversation))

    def delete_message(self, owner: str, message: str) -> StoredConversation:
        """Delete a message and everything below it; where that was shown, the newest branch beside it is. Raises NotFound."""
        with self.database.writing() as connection:
            gone = own_message(connection, owner, message, for_change=True)
            before = messages_of(connection, gone.conversation)
            below = {message}
            for one in before:  # a parent is older than what hangs below it
                below |= {one.id} if one.parent in below else set()
            for at in range(0, len(below), CHUNK):
                these = MESSAGES.c.id.in_(sorted(below)[at : at + CHUNK])
                removed = connection.execute(delete(MESSAGES).where(these).returning(MESSAGES.c.number)).scalars().all()
                terms.remove(connection, "messages", removed)
            left = [one for one in before if one.id not in below]
            about = own(connection, owner, gone.conversation)
            leaf = newest_leaf(left, gone.parent) if about.leaf in below else about.leaf
            touch(connection, gone.conversation, leaf=leaf)
            return as_conversation(own(connection, owner, gone.conversation))

    # ---------------------------------------------------------------------------- search

    def search(self, owner: str, query: str, *, limit: int = 30, before: int | None = None) -> list[Hit]:
        """Where the owner's titles and messages hold all parts of `query`: titles first, then messages, newest first.

        Args:
            owner: whose texts are looked at.
            query: words or beginnings of words; Chinese and its like from one character on.
            limit: most titles, and most messages.
            before: the last message's `cursor`, for the page behind it; titles are on the first page only.
        """
        need_owner(owner)
        with self.database.reading() as connection:
            found = [] if before is not None else terms.find(connection, "conversations", owner, query, limit, None)
            hits = [Hit(row["conversation"], None, row["content"], row["number"]) for row in found]
            found = terms.find(connection, "messages", owner, query, limit, before)
        first = next(iter(query.split()), "")
        return hits + [
            Hit(row["conversation"], row["id"], _excerpt(row["content"], first), row["number"]) for row in found
        ]

    # ---------------------------------------------------------------------------- inside

    def _insert(
        self, connection: Connection, owner: str, conversation: str, parent: str | None, row: dict[str, Any]
    ) -> tuple[int, StoredMessage]:
        if row["role"] not in ROLES:
            raise StoreError(f"a message of {row['role']!r} has no place in a conversation", hint=", ".join(ROLES))
        about = own(connection, owner, conversation, for_change=True)
        if parent is not None:
            above = own_message(connection, owner, parent)
            if above.conversation != conversation:
                raise NotFound(f"there is no message {parent!r} in conversation {conversation!r}")
            need_whole(above)
        now = time.time()
        row = {**row, "id": new_id("msg"), "conversation": conversation, "parent": parent, "writer": self.writer}
        row |= {"system": about.system if row["role"] == "assistant" else "", "created": now, "updated": now}
        number = connection.execute(insert(MESSAGES).values(row).returning(MESSAGES.c.number)).scalar_one()
        touch(connection, conversation, leaf=row["id"])
        return number, own_message(connection, owner, row["id"])

    def _follow(self, message: StoredMessage, owner: str) -> Draft:
        draft = Draft(self.saver, message.id, message.content, partial(self._end, owner))
        self.saver.follow(draft)
        return draft

    def _end(self, owner: str, draft: Draft, ended: dict[str, Any]) -> StoredMessage:
        if ended["state"] not in STATES or ended["state"] == "streaming":
            raise StoreError(f"an answer does not end as {ended['state']!r}", hint=", ".join(STATES[1:]))
        values = {name: value for name, value in ended.items() if value is not None}
        values |= {"content": draft.text, "updated": time.time()}
        with self.database.writing() as connection:
            mine = (MESSAGES.c.id == draft.message, MESSAGES.c.writer == self.writer, MESSAGES.c.state == "streaming")
            statement = update(MESSAGES).where(*mine).values(values).returning(MESSAGES.c.number)
            number = connection.execute(statement).scalar_one_or_none()
            if number is None:
                raise NotFound("the answer was deleted, or taken for interrupted, while it was written")
            terms.add(connection, "messages", [(number, owner, values["content"])])
            message = own_message(connection, owner, draft.message)
            touch(connection, message.conversation)
            return message


def _parameters(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters as they are kept. Raises StoreError for what is not JSON."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(given or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"parameters that are not JSON: {error}", hint="names, with numbers, texts, lists, objects"
        ) from None
    return found


def _title(title: str) -> str:
    return storable(title)[:MAX_TITLE]


def _excerpt(content: str, wanted: str, around: int = 60) -> str:
    """The piece of a text around what was looked for, on one line; its beginning where accents hide the place."""
    at = max(0, content.lower().find(wanted.lower()) - around)
    piece = " ".join(content[at : at + len(wanted) + 2 * around].split())
    return ("…" if at else "") + piece + ("…" if at + len(wanted) + 2 * around < len(content) else "")
