"""A conversation's tree, read from the store: whose it is, how it hangs together, which branch is shown.

What every part of the store asks first is here: `own` and `own_message` give a row only to its owner. What belongs to
another raises the same `NotFound`, with the same words, as what never was.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, Row, Select, select, update

from lyceum.corpus.records import Message, ToolCall
from lyceum.errors import NotFound, StoreError
from lyceum.serve.columns import storable
from lyceum.serve.drafts import INTERRUPTED, LEASE_S
from lyceum.serve.tables import CONVERSATIONS, MESSAGES


@dataclass(frozen=True)
class StoredConversation:
    """What a list of conversations shows. created, updated: seconds since 1970; leaf: the end of the branch shown."""

    id: str
    owner: str
    title: str
    pinned: bool
    system: str
    parameters: dict[str, Any]
    leaf: str | None
    created: float
    updated: float

    def to_json(self) -> dict[str, Any]:
        """It as its owner is shown it."""
        return {name: value for name, value in asdict(self).items() if name != "owner"}


@dataclass(frozen=True)
class StoredMessage:
    """A message in its tree. state: streaming, done, stopped or failed; system: the prompt that an answer was made under."""

    id: str
    conversation: str
    parent: str | None
    role: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    tool_call_id: str | None
    system: str
    model: str
    parameters: dict[str, Any]
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str
    state: str
    created: float
    updated: float

    def record(self) -> Message:
        """It as the rest of the house knows it."""
        return Message(self.role, self.content, self.tool_calls, self.tool_call_id)


@dataclass(frozen=True)
class Thread:
    """A conversation with its whole tree, oldest message first."""

    about: StoredConversation
    messages: tuple[StoredMessage, ...]

    def path(self, leaf: str | None = None) -> tuple[StoredMessage, ...]:
        """From the first message down to `leaf`; by default the branch that is shown."""
        return path_to(self.messages, leaf or self.about.leaf)

    def siblings(self, message: str) -> tuple[str, ...]:
        """The ids of all messages with this one's parent, itself too, oldest first."""
        parents = {one.id: one.parent for one in self.messages}
        return tuple(one.id for one in self.messages if one.parent == parents[message])


def path_to(messages: Sequence[StoredMessage], leaf: str | None) -> tuple[StoredMessage, ...]:
    """The messages from a root down to `leaf`; none where there is no leaf."""
    known = {one.id: one for one in messages}
    found, at = [], leaf
    while at is not None:
        found.append(known[at])
        at = known[at].parent
    return tuple(reversed(found))


class Node(Protocol):
    """What hangs in a tree."""

    @property
    def id(self) -> str: ...

    @property
    def parent(self) -> str | None: ...


def newest_leaf(messages: Iterable[Node], top: str | None) -> str | None:
    """The end of the branch that goes from `top` to the newest reply each time; None where there is no message."""
    newest = {one.parent: one.id for one in messages}  # the last of each parent's stays
    leaf = top
    while leaf in newest:
        leaf = newest[leaf]
    return leaf


def new_id(kind: str) -> str:
    """An id that nobody can guess: 120 random bits."""
    return f"{kind}_{secrets.token_hex(15)}"


# -------------------------------------------------------------------------------- rows, for their owner alone


def need_owner(owner: str) -> str:
    """An owner as given. Raises StoreError for a name that the databases would take for another's."""
    if not owner or owner != storable(owner):
        raise StoreError(f"{owner!r} cannot be an owner", hint="text of at least one character, without NUL")
    return owner


def own(connection: Connection, owner: str, conversation: str, *, for_change: bool = False) -> Row[Any]:
    """The row of an owner's conversation; `for_change` keeps others from changing it until the transaction ends.

    Raises:
        NotFound: there is none.
    """
    query = select(CONVERSATIONS).where(CONVERSATIONS.c.id == conversation, CONVERSATIONS.c.owner == need_owner(owner))
    row = connection.execute(_for_change(query, for_change)).first()
    if row is None:
        raise NotFound(f"there is no conversation {conversation!r}")
    return row


def own_message(connection: Connection, owner: str, message: str, *, for_change: bool = False) -> StoredMessage:
    """An owner's message; `for_change` keeps others from changing its conversation until the transaction ends.

    Raises:
        NotFound: there is none.
    """
    joined = MESSAGES.join(CONVERSATIONS, CONVERSATIONS.c.id == MESSAGES.c.conversation)
    query = (
        select(MESSAGES).select_from(joined).where(MESSAGES.c.id == message, CONVERSATIONS.c.owner == need_owner(owner))
    )
    row = connection.execute(_for_change(query, for_change)).first()
    if row is None:
        raise NotFound(f"there is no message {message!r}")
    return as_message(row)


def messages_of(connection: Connection, conversation: str) -> list[StoredMessage]:
    """All messages of a conversation, oldest first."""
    query = select(MESSAGES).where(MESSAGES.c.conversation == conversation).order_by(MESSAGES.c.number)
    return [as_message(row) for row in connection.execute(query)]


def touch(connection: Connection, conversation: str, **values: Any) -> None:
    """Note that a conversation was changed now, and set these columns of it."""
    values["updated"] = time.time()
    connection.execute(update(CONVERSATIONS).where(CONVERSATIONS.c.id == conversation).values(**values))


def need_whole(message: StoredMessage) -> None:
    """Raises StoreError for a message that is still being written."""
    if message.state == "streaming":
        raise StoreError(f"message {message.id!r} is still being written", hint="stop it, or wait until it is done")


def as_conversation(row: Row[Any]) -> StoredConversation:
    """A row as it is shown."""
    values = dict(row._mapping)
    del values["number"]
    return StoredConversation(**values)


def as_message(row: Row[Any]) -> StoredMessage:
    """A row as it is shown; an answer whose writer has not been heard of is one that was interrupted."""
    values = dict(row._mapping)
    del values["number"], values["writer"]
    values["tool_calls"] = as_calls(values["tool_calls"])
    if values["state"] == "streaming" and values["updated"] < time.time() - LEASE_S:
        values |= {"state": "failed", "finish_reason": INTERRUPTED}
    return StoredMessage(**values)


def as_calls(calls: Iterable[dict[str, Any]]) -> tuple[ToolCall, ...]:
    """Calls in OpenAI's shape, as records."""
    return tuple(ToolCall.from_json(call, number) for number, call in enumerate(calls))


def _for_change(query: Select[Any], for_change: bool) -> Select[Any]:
    return (
        query.with_for_update() if for_change else query
    )  # SQLite has no such lock, and needs none: one writes at a time
