"""The records that flow through the river, and readers for the file formats people have.

What: five frozen dataclasses, `Document`, `Message` (inside `Conversation`), `Ranking`, `Rating`, each one JSON
object a line. Why: every stage reads and writes these and nothing else, so any stage can be replaced by a file.
Readers look at the keys of a row, not at the file name, and say in one line which format they saw:

    for conversation in read_conversations("chats.jsonl"): ...

Not here: folders, compressed archives other than gzip, parquet (see `lyceum.corpus.sources`), and any cleaning.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lyceum.corpus.rows import json_line, read_rows
from lyceum.errors import DataError
from lyceum.log import log
from lyceum.run import write_lines

ROLES = ("system", "user", "assistant", "tool")
Row = Mapping[str, Any]


def content_id(text: str) -> str:
    """The 128-bit BLAKE2b hash of `text` in hexadecimal: the same text has the same id everywhere."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Document:
    """A piece of raw text; `id` is `content_id(text)` unless given, `meta` holds flat facts (source, path, part)."""

    text: str
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need_text("text", self.text)
        if not self.id:
            object.__setattr__(self, "id", content_id(self.text))

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "id": self.id, "meta": self.meta}

    @classmethod
    def from_json(cls, row: Row) -> Document:
        return cls(_get(row, "text"), str(row.get("id") or ""), dict(row.get("meta") or {}))


@dataclass(frozen=True)
class ToolCall:
    """One call that an assistant asks for; `arguments` is JSON text, kept as the model wrote it."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @classmethod
    def from_json(cls, row: Row, number: int = 0) -> ToolCall:
        call = row.get("function", row)
        arguments = call.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return cls(str(row.get("id") or f"call_{number}"), _need_text("name", _get(call, "name")), arguments)


@dataclass(frozen=True)
class Message:
    """One turn; `weight` replaces the chat format's loss weight of this turn (None: the format decides)."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        _need_text("content", self.content)

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id is not None:
            row["tool_call_id"] = self.tool_call_id
        if self.weight is not None:
            row["weight"] = self.weight
        return row

    @classmethod
    def from_json(cls, row: Row) -> Message:
        calls = tuple(ToolCall.from_json(call, number) for number, call in enumerate(row.get("tool_calls") or ()))
        weight = None if row.get("weight") is None else float(row["weight"])
        content = _plain_content(row.get("content"))
        return cls(_role(_get(row, "role")), content, calls, row.get("tool_call_id"), weight)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas, OpenAI's shape) that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation without messages")

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"messages": [message.to_json() for message in self.messages]}
        if self.tools:
            row["tools"] = list(self.tools)
        row["meta"] = self.meta
        return row

    @classmethod
    def from_json(cls, row: Row) -> Conversation:
        messages = tuple(Message.from_json(message) for message in _get(row, "messages"))
        return cls(messages, _tools(row.get("tools")), dict(row.get("meta") or {}))


@dataclass(frozen=True)
class Ranking:
    """K >= 2 responses to one prompt, ordered by somebody; a preference pair is a ranking of two.

    `ranks[i]` is the place of `responses[i]`, 1 is best, equal numbers are ties. `probabilities[i]`, where given, is
    the probability that `responses[i]` is the best one (a soft label; they add up to 1). `acceptable[i]` says whether
    the response is good enough in itself. `origin` is human, model or rule.
    """

    prompt: Conversation
    responses: tuple[Message, ...]
    ranks: tuple[float, ...]
    probabilities: tuple[float, ...] | None = None
    acceptable: tuple[bool, ...] | None = None
    origin: str = "human"
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise ValueError(f"a ranking needs at least two responses and has {len(self.responses)}")
        for name in ("ranks", "probabilities", "acceptable"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.responses):
                raise ValueError(f"{len(values)} {name} for {len(self.responses)} responses")

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "prompt": self.prompt.to_json(),
            "responses": [response.to_json() for response in self.responses],
            "ranks": list(self.ranks),
        }
        if self.probabilities is not None:
            row["probabilities"] = list(self.probabilities)
        if self.acceptable is not None:
            row["acceptable"] = list(self.acceptable)
        return {**row, "origin": self.origin, "meta": self.meta}

    @classmethod
    def from_json(cls, row: Row) -> Ranking:
        probabilities, acceptable = row.get("probabilities"), row.get("acceptable")
        return cls(
            Conversation.from_json(_get(row, "prompt")),
            tuple(Message.from_json(response) for response in _get(row, "responses")),
            tuple(float(rank) for rank in _get(row, "ranks")),
            None if probabilities is None else tuple(float(value) for value in probabilities),
            None if acceptable is None else tuple(bool(value) for value in acceptable),
            str(row.get("origin", "human")),
            dict(row.get("meta") or {}),
        )


@dataclass(frozen=True)
class Rating:
    """One response judged by itself: `value` 1 is good, 0 is bad (a thumb), or a number on the annotator's scale."""

    prompt: Conversation
    response: Message
    value: float
    reason: str = ""
    origin: str = "human"
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        row = {"prompt": self.prompt.to_json(), "response": self.response.to_json(), "value": self.value}
        return {**row, "reason": self.reason, "origin": self.origin, "meta": self.meta}

    @classmethod
    def from_json(cls, row: Row) -> Rating:
        prompt, response = Conversation.from_json(_get(row, "prompt")), Message.from_json(_get(row, "response"))
        reason, origin = str(row.get("reason", "")), str(row.get("origin", "human"))
        return cls(prompt, response, float(_get(row, "value")), reason, origin, dict(row.get("meta") or {}))


# ---------------------------------------------------------------------------------------------- formats, by their keys


def format_of(row: Any) -> str:
    """Names the format of one row by looking at its keys; "" if it is none that we know."""
    if isinstance(row, str):
        return "plain text"
    return _format_with(tuple(row)) if isinstance(row, Mapping) else ""


@lru_cache(maxsize=1024)  # files repeat themselves
def _format_with(names: tuple[Any, ...]) -> str:
    return next((n for n, keys in _KEYS if all(any(k in names for k in key.split("|")) for key in keys)), "")


# The first line whose keys are all there wins ("a|b": either), so the rich formats stand before their parts.
_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ranking", ("prompt", "responses", "ranks")),
    ("rating", ("prompt", "response", "value")),
    ("message tree", ("message_tree_id", "prompt")),
    ("chosen/rejected", ("chosen", "rejected")),
    ("KTO label", ("messages|conversations|prompt", "label")),
    ("messages", ("messages",)),
    ("ShareGPT", ("conversations",)),
    ("Alpaca", ("instruction", "output")),
    ("prompt and completion", ("prompt", "completion|response")),
    ("prompt only", ("prompt|instruction",)),
    ("text", ("text",)),
)


def _document(row: Any) -> list[Document]:
    return [Document(row) if isinstance(row, str) else Document.from_json(row)]


def _conversation(row: Any) -> list[Conversation]:
    kind = format_of(row)
    if kind == "messages":
        return [Conversation.from_json(row)]
    if kind == "message tree":
        return [Conversation(path, meta={"tree": row["message_tree_id"]}) for path in _tree_paths(row["prompt"], ())]
    prompt = _prompt(row)
    answer = row.get("output", row.get("completion", row.get("response"))) if isinstance(row, Mapping) else None
    if kind in ("Alpaca", "prompt and completion"):
        return [Conversation(prompt.messages + (_response(answer),), prompt.tools, prompt.meta)]
    return [prompt]


def _ranking(row: Any) -> list[Ranking]:
    kind = format_of(row)
    if kind == "ranking":
        return [Ranking.from_json(row)]
    if kind == "message tree":
        return list(_tree_rankings(row["prompt"], (), row["message_tree_id"]))
    prompt, chosen, rejected = _chosen_rejected(row)
    meta = prompt.meta | {key: row[key] for key in ("annotator", "margin") if row.get(key) is not None}
    return [Ranking(prompt, (chosen, rejected), (1.0, 2.0), origin=str(row.get("origin", "human")), meta=meta)]


def _rating(row: Any) -> list[Rating]:
    if format_of(row) == "rating":
        return [Rating.from_json(row)]
    prompt = _prompt(row)
    if "completion" in row or "response" in row:
        response = _response(row.get("completion", row.get("response")))
    else:
        response = prompt.messages[-1]
        prompt = Conversation(prompt.messages[:-1], prompt.tools, prompt.meta)
    if response.role != "assistant":
        raise ValueError("the last message is not the assistant's, so there is nothing to rate")
    return [Rating(prompt, response, float(row["label"]), meta=prompt.meta)]


def _prompt(row: Any) -> Conversation:
    """The conversation up to where the row's answer begins, whatever the row calls it."""
    if isinstance(row, str):
        return Conversation((Message("user", row),))
    tools, meta = _tools(row.get("tools")), dict(row.get("meta") or {})
    system = (Message("system", row["system"]),) if row.get("system") else ()
    for key in ("messages", "conversations", "prompt", "question"):
        if key in row:
            return Conversation(system + _turns(row[key]), tools, meta)
    text = _need_text("instruction", _get(row, "instruction"))
    if row.get("input"):
        text += "\n\n" + _need_text("input", row["input"])
    history = [turn for pair in row.get("history") or () for turn in zip(("user", "assistant"), pair, strict=True)]
    return Conversation(system + tuple(Message(*turn) for turn in [*history, ("user", text)]), tools, meta)


def _turns(value: Any) -> tuple[Message, ...]:
    """Messages from a string (an HH transcript or one user turn), or a list in OpenAI's or ShareGPT's spelling."""
    if isinstance(value, str):
        return _transcript(value) or (Message("user", value),)
    if isinstance(value, Mapping):
        return _turns(value["messages"] if "messages" in value else [value])
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a message is {type(turn).__name__}, expected an object")
        if "role" in turn:
            turns.append(Message.from_json(turn))
            continue
        role, text = _get(turn, "from"), _plain_content(_get(turn, "value"))
        if role == "function_call":
            calls = json.loads(text)
            calls = calls if isinstance(calls, list) else [calls]
            first = sum(len(message.tool_calls) for message in turns)
            turns.append(Message("assistant", "", tuple(ToolCall.from_json(c, first + n) for n, c in enumerate(calls))))
        elif _role(role) == "tool":
            call = next((message.tool_calls[0].id for message in reversed(turns) if message.tool_calls), None)
            turns.append(Message("tool", text, tool_call_id=call))
        else:
            turns.append(Message(_role(role), text))
    return tuple(turns)


def _response(value: Any) -> Message:
    """One assistant message from a string, a message, or a list that holds just one."""
    if isinstance(value, str):
        return Message("assistant", value)
    turns = _turns(value)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise ValueError(f"expected one assistant message, found {[turn.role for turn in turns]}")
    return turns[0]


def _chosen_rejected(row: Row) -> tuple[Conversation, Message, Message]:
    """Splits a pair: either a prompt stands apart, or both sides are whole conversations with a shared beginning."""
    sides = (row["chosen"], row["rejected"])
    chosen, rejected = (_transcript(side) if isinstance(side, str) else _turns(side) for side in sides)
    if len(chosen) > 1 or len(rejected) > 1:
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shared = next((n for n, (ours, theirs) in pairs if ours != theirs), len(chosen) - 1)
        if not shared or len(chosen) != shared + 1 or len(rejected) != shared + 1:
            raise ValueError("chosen and rejected differ before the last message, so they share no prompt")
        prompt = Conversation(chosen[:shared], _tools(row.get("tools")), dict(row.get("meta") or {}))
        return prompt, _response([chosen[-1].to_json()]), _response([rejected[-1].to_json()])
    return _prompt(row), _response(row["chosen"]), _response(row["rejected"])


def _transcript(text: str) -> tuple[Message, ...]:
    """Turns of an HH-RLHF transcript (blank line, "Human:" or "Assistant:"); empty if the text is not one.

    A marker of the side that is already speaking is part of what it says: some rows hold such slips.
    """
    if not text.startswith("\n\nHuman:"):
        return ()
    turns: list[tuple[str, str]] = []
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1][0] == who:
            turns[-1] = (who, f"{turns[-1][1]}\n\n{who}:{said}")
        else:
            turns.append((who, said))
    return tuple(Message("user" if who == "Human" else "assistant", said.strip()) for who, said in turns)


def _tree_paths(node: Row, before: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    path = before + (Message(_role(node["role"]), _need_text("text", node["text"])),)
    replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
    if not replies and path[-1].role == "assistant":
        yield path
    for reply in replies:
        yield from _tree_paths(reply, path)


def _tree_rankings(node: Row, before: tuple[Message, ...], tree: str) -> Iterator[Ranking]:
    path = before + (Message(_role(node["role"]), _need_text("text", node["text"])),)
    replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
    ranked = [reply for reply in replies if reply.get("rank") is not None and _role(reply["role"]) == "assistant"]
    if len(ranked) > 1:
        responses = tuple(Message("assistant", reply["text"]) for reply in ranked)
        ranks = tuple(float(reply["rank"]) + 1 for reply in ranked)
        yield Ranking(Conversation(path), responses, ranks, meta={"tree": tree})
    for reply in replies:
        yield from _tree_rankings(reply, path, tree)


# ------------------------------------------------------------------------------------------------ reading and writing


def records_of(row: Any, noun: str) -> list[Any]:
    """What one row holds, in any format that the reader of this noun knows (ranking: `read_rankings`). Raises ValueError."""
    convert, formats = _NOUNS[noun]
    kind = format_of(row)
    if kind in formats:
        try:
            return convert(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a {kind!r} row that does not fit: {error}") from None
    if kind:
        raise ValueError(f"{kind!r} rows are no {noun}s")
    keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(f"a row that fits no known format, with: {keys or 'no keys'}")


def _read(path: str | Path, noun: str) -> Iterator[Any]:
    seen: set[str] = set()
    for line, row in read_rows(path):
        try:
            records = records_of(row, noun)
        except ValueError as error:
            hint = f"a {noun} may be: {', '.join(_NOUNS[noun][1])}"
            raise DataError(str(error), file=path, line=line, hint=hint) from None
        if (kind := format_of(row)) not in seen:
            seen.add(kind)
            log.info(f"{Path(path).name}: {kind} -> {noun}s")
        yield from records


_CHATS = ("messages", "ShareGPT", "Alpaca", "prompt and completion", "prompt only", "message tree", "plain text")
_NOUNS: Mapping[str, tuple[Callable[[Any], list[Any]], tuple[str, ...]]] = {
    "document": (_document, ("text", "plain text")),
    "conversation": (_conversation, _CHATS),
    "ranking": (_ranking, ("ranking", "chosen/rejected", "message tree")),
    "rating": (_rating, ("rating", "KTO label")),
}


def read_documents(path: str | Path) -> Iterator[Document]:
    """Documents of one file: plain text (one document), or rows with a `text`. Raises DataError (file, line)."""
    return _read(path, "document")


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Conversations of one file in any chat format; a bare string is a prompt. Raises DataError (file, line)."""
    return _read(path, "conversation")


def read_rankings(path: str | Path) -> Iterator[Ranking]:
    """Rankings of one file: our own, chosen/rejected pairs, or OASST message trees. Raises DataError (file, line)."""
    return _read(path, "ranking")


def read_ratings(path: str | Path) -> Iterator[Rating]:
    """Ratings of one file: our own, or KTO labels (value 1 for true, 0 for false). Raises DataError (file, line)."""
    return _read(path, "rating")


def write_records(path: str | Path, records: Iterable[Any]) -> int:
    """Writes records (anything with `to_json`) as JSONL, all or nothing; returns how many."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for record in records:
            count += 1
            yield json_line(record.to_json())

    write_lines(Path(path), lines())
    return count


# ------------------------------------------------------------------------------------------------------- small checks


def _get(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"{key!r} is missing")
    return row[key]


def _need_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, expected text")
    return value


def _role(name: Any) -> str:
    known = {
        "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
        "model": "assistant", "observation": "tool", "function": "tool", "developer": "system",
    }  # fmt: skip
    return known.get(name, name)


def _plain_content(content: Any) -> str:
    """Content as text: OpenAI allows null (a message that only calls tools) and a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_need_text("a content part", part.get("text")) for part in content)
    return _need_text("content", content)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else ()
    return tuple(value or ())
