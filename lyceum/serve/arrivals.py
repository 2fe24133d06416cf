"""Conversations that come from a file: our own export, or ChatGPT's `conversations.json`.

    arrived = read(row)                       # either shape, seen by its keys; DataError for what is neither
    admit(store, "alice", arrived, keeps_consent=True)

**Ours** is what `lyceum.serve.portable.as_json` writes, judgements too. **ChatGPT's** is, as its readers describe it, a list of
conversations `{title, create_time, update_time, current_node, mapping}`; `mapping` holds nodes `{message, parent, children}`,
and a message is `{author: {role}, content: {content_type, parts | text}, recipient, create_time, metadata: {model_slug}}`.
A message of the assistant to a recipient other than "all" is a call, and what the tool says below it is its result. Nodes
without a text that people see (roots, hidden ones, a model's thoughts) are left out, and what hangs below them hangs on what
stands above.

A file is a stranger's word: every field is checked, every id is made anew, and where others use the server too, a judgement
that was given elsewhere is kept without consent, so that nobody can teach the model from a file they wrote.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import Connection, insert

from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.errors import DataError
from lyceum.serve import terms
from lyceum.serve.columns import storable
from lyceum.serve.drafts import INTERRUPTED
from lyceum.serve.judgements import MAX_REASON, MOST_ANSWERS
from lyceum.serve.store import MAX_TITLE, Store
from lyceum.serve.tables import CONVERSATIONS, JUDGEMENTS, MESSAGES
from lyceum.serve.tree import need_owner, new_id, newest_leaf
from lyceum.serve.wishes import Parameters

SKIPPED = {"thoughts", "reasoning_recap", "user_editable_context", "model_editable_context", "system_error"}
MAX_MESSAGES = 20_000  # of one conversation

Id = Annotated[str, Field(min_length=1, max_length=200)]
Time = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of parameters those that we know. Raises ValueError where one is out of its bounds."""
    found = Parameters.model_validate({name: given[name] for name in Parameters.model_fields if name in given}).kept()
    found |= {name: given[name] for name in ("pair", "side") if isinstance(given.get(name), str)}
    tools = given.get("tools")
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        found["tools"] = tools
    return found


def _prompt_of(given: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if given is None else _checked(Conversation, given)


def _checked(kind: type[Message] | type[Conversation], given: dict[str, Any]) -> dict[str, Any]:
    """A record as it is written. Raises ValueError for what is none."""
    try:
        return kind.from_json(given).to_json()
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None


Known = Annotated[dict[str, Any], AfterValidator(_parameters)]
Said = Annotated[dict[str, Any], AfterValidator(partial(_checked, Message))]
Asked = Annotated[dict[str, Any] | None, AfterValidator(_prompt_of)]


class Part(BaseModel):
    """Something in a file; what it says beyond the fields is not read."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class ArrivedCall(Part):
    """A call of a tool."""

    id: Id
    name: Id
    arguments: str


class ArrivedMessage(Part):
    """A message of a tree, as `lyceum.serve.tree.StoredMessage`."""

    id: Id
    parent: Id | None = None
    role: Literal["user", "assistant", "tool"]
    content: str
    tool_calls: list[ArrivedCall] = Field(default_factory=list)
    tool_call_id: Id | None = None
    system: str = ""
    model: Annotated[str, Field(max_length=256)] = ""
    parameters: Known = Field(default_factory=dict)
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    finish_reason: Annotated[str, Field(max_length=64)] = ""
    state: Literal["streaming", "done", "stopped", "failed"] = "done"
    created: Time = 0.0
    updated: Time = 0.0


class ArrivedAnswer(Part):
    """An answer as it was judged."""

    message: Id
    said: Said
    model: Annotated[str, Field(max_length=256)] = ""
    parameters: Known = Field(default_factory=dict)
    finish_reason: Annotated[str, Field(max_length=64)] = ""


class ArrivedJudgement(Part):
    """A judgement, as `lyceum.serve.judgements.Judgement.to_json` writes it."""

    kind: Literal["rating", "correction", "comparison", "ranking"]
    prompt: Asked = None
    answers: Annotated[list[ArrivedAnswer], Field(min_length=1, max_length=MOST_ANSWERS)]
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    consent: bool = False
    created: Time = 0.0
    value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    ranks: list[Annotated[float, Field(ge=1, allow_inf_nan=False)]] | None = None
    acceptable: list[bool] | None = None
    choice: Annotated[int, Field(ge=0)] | Literal["tie", "none"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ArrivedJudgement:
        self.verdict()
        return self

    def verdict(self) -> dict[str, Any]:
        """What it says, as the store keeps it. Raises ValueError for what its kind does not say."""
        wanted = {"rating": {"value"}, "correction": {"text"}, "comparison": {"ranks", "choice"}, "ranking": {"ranks"}}
        found = {name: getattr(self, name) for name in ("value", "text", "ranks", "acceptable", "choice")}
        found = {name: value for name, value in found.items() if value is not None}
        one = self.kind in ("rating", "correction")
        lengths = {len(found[name]) for name in ("ranks", "acceptable") if name in found}
        if found.keys() - {"acceptable"} != wanted[self.kind] or (len(self.answers) == 1) is not one:
            raise ValueError(f"a {self.kind} of {len(self.answers)} answers that says {', '.join(found) or 'nothing'}")
        if lengths - {len(self.answers)} or (isinstance(self.choice, int) and self.choice >= len(self.answers)):
            raise ValueError(f"a {self.kind} that does not fit its {len(self.answers)} answers")
        return found


class Arrived(Part):
    """A conversation. Once read, parents stand before their children."""

    title: str = ""
    pinned: bool = False
    system: str = ""
    parameters: Known = Field(default_factory=dict)
    leaf: Id | None = None
    created: Time = 0.0
    updated: Time = 0.0
    messages: Annotated[list[ArrivedMessage], Field(max_length=MAX_MESSAGES)]
    judgements: list[ArrivedJudgement] = Field(default_factory=list)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(row: Mapping[str, Any]) -> Arrived:
    """A conversation of a file. Raises DataError for what is none."""
    try:
        return _in_order(Arrived.model_validate(_of_chatgpt(row) if "mapping" in row else row))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"not a conversation of ours or of ChatGPT's: {where}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a conversation of ours or of ChatGPT's: {error}") from None


def read_judgement(row: Mapping[str, Any]) -> ArrivedJudgement:
    """A judgement whose conversation is gone. Raises DataError."""
    try:
        return ArrivedJudgement.model_validate(row)
    except ValidationError as error:
        raise DataError(f"not a judgement: {error.errors()[0]['msg']}") from None


def _in_order(arrived: Arrived) -> Arrived:
    """With parents before their children, else by time. Raises ValueError for what is no tree."""
    known = {message.id for message in arrived.messages}
    if len(known) < len(arrived.messages):
        raise ValueError("two messages have the same id")
    below: dict[str | None, list[tuple[float, int, ArrivedMessage]]] = {}
    for place, message in enumerate(arrived.messages):
        if message.parent is not None and message.parent not in known:
            raise ValueError(f"there is no message {message.parent[:80]!r}, which another hangs on")
        below.setdefault(message.parent, []).append((message.created, place, message))
    ready, found = below.get(None, []), list[ArrivedMessage]()
    heapq.heapify(ready)
    while ready:
        found.append(heapq.heappop(ready)[2])
        for one in below.get(found[-1].id, ()):
            heapq.heappush(ready, one)
    if len(found) < len(arrived.messages):
        raise ValueError("messages that hang on each other in a circle")
    return arrived.model_copy(update={"messages": found})


def _of_chatgpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation of ChatGPT's in our shape."""
    nodes: Mapping[str, Any] = row["mapping"]
    begun = float(row.get("create_time") or 0.0)
    said = {id: _said(id, node.get("message") or {}, begun) for id, node in nodes.items()}
    prompts = [text for text in (_prompt(node.get("message") or {}) for node in nodes.values()) if text]

    known: dict[str, str | None] = {}

    def above(id: str | None) -> str | None:
        """The nearest message that is kept, from this node upwards."""
        passed: dict[str, None] = {}
        while id is not None and id in nodes and not said[id] and id not in known:
            if id in passed:
                raise ValueError("nodes that hang on each other in a circle")
            passed[id] = None
            id = nodes[id].get("parent")
        found = known[id] if id in known else id if id in nodes else None
        known.update(dict.fromkeys(passed, found))
        return found

    messages: list[dict[str, Any]] = []
    for id, found in said.items():
        if found is not None:
            parent = above(nodes[id].get("parent"))
            caller = said[parent] if parent is not None else None
            calls = caller["tool_calls"] if caller else []
            call = calls[0]["id"] if found["role"] == "tool" and calls else None
            messages.append({**found, "parent": parent, "tool_call_id": call})
    updated = float(row.get("update_time") or begun)
    about = {"title": str(row.get("title") or ""), "created": begun, "updated": updated}
    return {**about, "system": "\n\n".join(prompts), "leaf": above(row.get("current_node")), "messages": messages}


def _said(id: str, message: Mapping[str, Any], begun: float) -> dict[str, Any] | None:
    """A message of ChatGPT's in our shape, or None where people see nothing of it."""
    role, text = (message.get("author") or {}).get("role"), _text(message)
    about = message.get("metadata") or {}
    recipient = message.get("recipient") or "all"
    is_call = role == "assistant" and recipient != "all"
    is_hidden = bool(about.get("is_visually_hidden_from_conversation"))
    if role not in ("user", "assistant", "tool") or is_hidden or not text.strip():
        return None
    at = float(message.get("create_time") or begun)
    found: dict[str, Any] = {"id": id, "role": role, "content": "" if is_call else text, "created": at, "updated": at}
    found["tool_calls"] = [{"id": f"call_{id}"[:200], "name": recipient, "arguments": text}] if is_call else []
    if role == "assistant":
        found |= {"model": str(about.get("model_slug") or ""), "finish_reason": "tool_calls" if is_call else "stop"}
    return found


def _prompt(message: Mapping[str, Any]) -> str:
    """The system prompt, where this message is one that people wrote."""
    is_hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    is_system = (message.get("author") or {}).get("role") == "system"
    return _text(message).strip() if is_system and not is_hidden else ""


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or {}
    kind = str(content.get("content_type") or "text")
    if kind in SKIPPED:
        return ""
    if "parts" not in content:
        return str(content.get("text") or content.get("result") or "")
    pieces = []
    for part in content["parts"] or ():
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping):  # a picture, a recording: what was said in it, or that there was one
            pieces.append(str(part.get("text") or f"[{part.get('content_type') or 'attachment'}]"))
    return "\n".join(piece for piece in pieces if piece)


# -- into the store ----------------------------------------------------------------------------------------------------


def admit(store: Store, owner: str, arrived: Arrived, *, keeps_consent: bool) -> int:
    """Put a conversation into the store, whole or not at all; returns how many judgements came with it."""
    now = time.time()
    ids = {message.id: new_id("msg") for message in arrived.messages}
    leaf = newest_leaf(arrived.messages, arrived.leaf if arrived.leaf in ids else None)
    id, title = new_id("conv"), storable(arrived.title)[:MAX_TITLE]
    created = min(arrived.created or now, now)
    about = {"id": id, "owner": need_owner(owner), "title": title, "pinned": arrived.pinned, "system": arrived.system}
    about |= {"parameters": arrived.parameters, "leaf": ids[leaf] if leaf else None, "created": created}
    about["updated"] = min(max(arrived.updated, created), now)
    rows = [_row(message, id, ids, store.writer, now) for message in arrived.messages]
    judged = _judged(owner, id, arrived.judgements, ids, keeps_consent, now)
    with store.database.writing() as connection:
        new = insert(CONVERSATIONS).values(about).returning(CONVERSATIONS.c.number)
        terms.add(connection, "conversations", [(connection.execute(new).scalar_one(), owner, title)])
        if rows:
            many = insert(MESSAGES).returning(MESSAGES.c.number, sort_by_parameter_order=True)
            numbers = connection.execute(many, rows).scalars().all()
            texts = [(number, owner, str(row["content"])) for number, row in zip(numbers, rows, strict=True)]
            terms.add(connection, "messages", texts)
        _keep(connection, judged)
    return len(judged)


def admit_judgements(store: Store, owner: str, judged: Iterable[ArrivedJudgement], *, keeps_consent: bool) -> int:
    """Put judgements whose conversation is gone into the store; returns how many."""
    rows = _judged(need_owner(owner), None, judged, {}, keeps_consent, time.time())
    with store.database.writing() as connection:
        _keep(connection, rows)
    return len(rows)


def _keep(connection: Connection, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(JUDGEMENTS), rows)


def _row(message: ArrivedMessage, conversation: str, ids: Mapping[str, str], writer: str, now: float) -> dict[str, Any]:
    row = message.model_dump(exclude={"id", "parent", "tool_calls"})
    calls = [ToolCall(call.id, call.name, call.arguments).to_json() for call in message.tool_calls]
    row |= {"id": ids[message.id], "parent": ids[message.parent] if message.parent else None, "tool_calls": calls}
    row |= {"conversation": conversation, "writer": writer, "created": min(message.created or now, now)}
    row["updated"] = min(max(message.updated, row["created"]), now)
    if message.state == "streaming":  # as it was when the file was written
        row |= {"state": "failed", "finish_reason": INTERRUPTED}
    return row


def _judged(
    owner: str,
    conversation: str | None,
    judged: Iterable[ArrivedJudgement],
    ids: Mapping[str, str],
    keeps_consent: bool,
    now: float,
) -> list[dict[str, Any]]:
    rows = []
    for one in judged:
        answers = [
            answer.model_dump() | {"message": ids.get(answer.message) or new_id("msg")} for answer in one.answers
        ]
        row: dict[str, Any] = {
            "id": new_id("judgement"),
            "owner": owner,
            "conversation": conversation,
            "kind": one.kind,
        }
        row |= {"prompt": one.prompt, "answers": answers, "verdict": one.verdict(), "reason": one.reason}
        rows.append({**row, "consent": one.consent and keeps_consent, "created": min(one.created or now, now)})
    return rows
