"""A person's own conversations, to take along: one or all of them as JSON, or the branch that is shown as Markdown.

    as_json(thread, judged)        account(store, "alice")        as_markdown(store.thread("alice", conversation))

The JSON of a conversation holds every branch, and what the person said of its answers. The JSON of an account is an object
with all of them, written piece by piece: as much of it is in memory as one conversation needs, whoever reads slowly. What
is changed while it is written is there as it was before or after. `lyceum.serve.arrivals` reads both again.

The Markdown is for reading: what a message says stands there as it was written, so whoever shows it as HTML must clean it as
they would any stranger's text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lyceum.errors import NotFound
from lyceum.serve.judgements import Judgement
from lyceum.serve.store import Store
from lyceum.serve.tree import Thread

FORMAT = "lyceum account 1"
NAMES = {"user": "You", "assistant": "Assistant", "tool": "Tool"}


def as_json(thread: Thread, judged: Sequence[Judgement]) -> dict[str, Any]:
    """Everything of a conversation: its tree, its settings, and what was said of its answers."""
    messages = [{k: v for k, v in asdict(message).items() if k != "conversation"} for message in thread.messages]
    return {**thread.about.to_json(), "messages": messages, "judgements": [one.to_json() for one in judged]}


def account(store: Store, owner: str) -> Iterator[str]:
    """All of an owner's conversations, then judgements whose conversation is gone, then responses: pieces of one JSON text."""
    yield f'{{"format":{json.dumps(FORMAT)},"conversations":['
    yield from _listed(_conversations(store, owner))
    yield '],"judgements":['
    yield from _listed(one.to_json() for one in store.judgements.left_behind(owner))
    yield '],"responses":['
    yield from _listed(store.responses.every(owner))
    yield "]}\n"


def _conversations(store: Store, owner: str) -> Iterator[dict[str, Any]]:
    for id in store.every(owner):
        try:
            yield as_json(store.thread(owner, id), store.judgements.of(owner, id))
        except NotFound:  # it was deleted meanwhile
            continue


def _listed(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    between = "\n"
    for row in rows:
        yield between + json.dumps(row, separators=(",", ":"))
        between = ",\n"


def as_markdown(thread: Thread) -> str:
    """The branch that is shown, with its title, and with each answer's model."""
    title = " ".join(thread.about.title.split()) or "Conversation"
    begun = datetime.fromtimestamp(thread.about.created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"# {title}", f"*{begun}*"]
    if thread.about.system:
        parts += ["## System", thread.about.system]
    for message in thread.path():
        model = f" ({message.model})" if message.model else ""
        parts += [f"## {NAMES[message.role]}{model}", message.content]
        parts += [f"`{call.name}({call.arguments})`" for call in message.tool_calls]
        if message.state != "done":
            parts.append(f"*({message.state})*")
    return "\n\n".join(part for part in parts if part) + "\n"
