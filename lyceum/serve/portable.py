"""A person's own conversations, to take along: everything as JSON, or the branch that is shown as Markdown.

    json.dumps(as_json(store, "alice"))         as_markdown(store.thread("alice", conversation))

The JSON holds every branch, and the person's judgements. The Markdown is for reading: what a message says stands there as it
was written, so whoever shows it as HTML must clean it as they would any stranger's text.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lyceum.serve.store import Store
from lyceum.serve.tree import Thread

PAGE = 200
NAMES = {"user": "You", "assistant": "Assistant", "tool": "Tool"}


def as_json(store: Store, owner: str) -> dict[str, Any]:
    """All conversations of an owner with all their messages, latest first, and all judgements, oldest first."""
    conversations: list[dict[str, Any]] = []
    after = None
    while page := store.latest(owner, limit=PAGE, after=after):
        for about in page:
            messages = [asdict(message) for message in store.thread(owner, about.id).messages]
            conversations.append({**asdict(about), "messages": messages})
        after = page[-1].id
    judgements = [judgement.to_json() for judgement in store.judgements.of(owner)]
    return {"format": "lyceum conversations 1", "conversations": conversations, "judgements": judgements}


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
