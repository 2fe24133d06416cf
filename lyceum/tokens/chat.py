"""THE chat format: a conversation to ids and loss weights, a prompt for a reply, a reply back to a message.

One turn, shaped like ChatML::

    <|im_start|>{role}\\n{content}<|im_end|>\\n

- The tools that the assistant may call stand in the system turn (its own, if the conversation begins with none), after
  the content and a blank line: ``Tools:`` and one JSON object a line, spaced as Python's ``json.dumps`` does it,
  because that is what every Jinja engine's ``tojson`` writes too.
- A call stands in the assistant's turn after its content: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``;
  the arguments are kept as the model wrote them.
- A result is a turn of the role ``tool``: ``<tool_response>{content}</tool_response>``.

Words in angle brackets are special tokens and are put in as *ids*. What people, tools and the web write is encoded as
ordinary text, also where it spells a special token. `CHAT_TEMPLATE` is the same format in Jinja, for `transformers`,
vLLM and llama.cpp; those render one string and cut it up again, so that *there* a typed ``<|im_end|>`` ends the turn.
Without such text both give the same ids, and a test holds them to that.

**The header and leading newlines.** To be equal to them we encode what stands between two special tokens as one text,
header and content together. So a content whose leading white space holds a newline melts into the header's own
newline: one token ``\\n\\n`` instead of two. A token that straddles header and content has the header's weight, 0:
it would be learned after ``assistant``, and a reply is generated after ``assistant\\n``. Every other reply begins on a
token of its own, and `prompt` is a prefix of what `render` gives. A reply that was generated keeps its own ids
(`continue_prompt`), and `reply` encodes a message the way it would have been generated: after the prompt, alone.

**Loss weights.** 1 on all that the assistant writes, the ``<|im_end|>`` that ends its turn included (a model that
is not taught its end never stops), or the message's own weight; 0 on everything else, tool results too.

Not here: sampling, stop strings, running tools (`lyceum.engine.session`), and any second format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.errors import DataError

if TYPE_CHECKING:
    from lyceum.tokens.tokenizer import Tokenizer

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESULT_START, RESULT_END = "<tool_response>", "</tool_response>"

CHAT_TEMPLATE = r"""
{%- macro tool_list() -%}
    {{- 'Tools:' -}}
    {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
{%- endmacro -%}
{%- if tools and (not messages or messages[0].role != 'system') -%}
    {{- '<|im_start|>system\n' ~ tool_list() ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('role ' ~ message.role ~ ' is not one of system, user, assistant, tool') -}}
    {%- endif -%}
    {%- set content = message.content or '' -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' -}}
    {%- if message.role == 'tool' -%}
        {{- '<tool_response>' ~ content ~ '</tool_response>' -}}
    {%- else -%}
        {{- content -}}
    {%- endif -%}
    {%- if loop.first and tools and message.role == 'system' -%}
        {{- ('\n\n' if content else '') ~ tool_list() -}}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function or call -%}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
            {{- '<tool_call>{"name": ' ~ (call.name | tojson) ~ ', "arguments": ' ~ arguments ~ '}</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()


@dataclass(frozen=True)
class Rendered:
    """Ids, and for each the loss weight it has as a target (0: given, not learned)."""

    ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Piece:
    """A special token, by name, or a text between two of them: what the format writes, then what somebody wrote."""

    special: str = ""
    header: str = ""
    text: str = ""
    weight: float = 0.0


def pieces(messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> Iterator[Piece]:
    """The format itself: messages as special tokens and texts, in order.

    Raises:
        DataError: a loss weight on a message that is not the assistant's.
    """
    messages = tuple(messages)
    if tools and (not messages or messages[0].role != "system"):
        messages = (Message("system", ""), *messages)
    for number, message in enumerate(messages):
        yield from _turn(message, tools if number == 0 else ())


def _turn(message: Message, tools: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    weight = _weight(message)
    yield Piece(special=TURN_START)
    if message.role == "tool":
        yield Piece(header="tool\n")
        yield Piece(special=RESULT_START)
        yield Piece(text=message.content)
        yield Piece(special=RESULT_END)
    else:
        text = message.content
        if tools:
            tool_list = "\n".join(["Tools:", *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
            text = f"{text}\n\n{tool_list}" if text else tool_list
        yield Piece(header=message.role + "\n", text=text, weight=weight)
    if message.role == "assistant":
        yield from _calls(message, weight)
    yield Piece(special=TURN_END, weight=weight)
    yield Piece(header="\n")


def _calls(message: Message, weight: float) -> Iterator[Piece]:
    for call in message.tool_calls:
        yield Piece(special=CALL_START, weight=weight)
        yield Piece(text=_call_head(call.name) + call.arguments + "}", weight=weight)
        yield Piece(special=CALL_END, weight=weight)


def _call_head(name: str) -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _weight(message: Message) -> float:
    if message.role == "assistant":
        return 1.0 if message.weight is None else message.weight
    if message.weight:
        raise DataError(
            f"a {message.role} message has the loss weight {message.weight:g}, expected none or 0",
            hint="only what the assistant writes is learned: give the weight to an assistant message",
        )
    return 0.0


class ChatFormat:
    """Conversations to ids and replies to messages, with one tokenizer.

    Args:
        tokenizer: its special tokens mark the turns.

    Raises:
        DataError: it has none that do, as a vocabulary made elsewhere may not.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        for name in (TURN_START, TURN_END):
            if name not in tokenizer.special_ids:
                raise DataError(
                    f"this vocabulary has no special token {name}, so nothing marks the turns of a conversation",
                    hint="such a model only continues text; choose one whose vocabulary has ChatML's marks, as Qwen's",
                )
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.turn_end_id, tokenizer.end_id)
        self._after_turn = tokenizer.encode("\n")
        self._reply_header = [tokenizer.turn_start_id, *tokenizer.encode("assistant\n")]

    def render(self, conversation: Conversation) -> Rendered:
        """A whole conversation as ids and loss weights: the same ids as `CHAT_TEMPLATE` (see the module's page).

        Raises:
            DataError: a loss weight on a message that is not the assistant's.
        """
        return self._encode(pieces(conversation.messages, conversation.tools))

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids after which the assistant's next reply begins: every message, then its header."""
        return self.render(conversation).ids + self._reply_header

    def continue_prompt(self, ids_so_far: Sequence[int], messages: Iterable[Message]) -> list[int]:
        """The next prompt of a conversation whose replies were generated: kept ids, new messages, the header.

        Args:
            ids_so_far: an earlier prompt with the reply's own ids after it, with or without the token that stopped it.
            messages: what was said since (a user's message, tool results).

        Returns:
            Ids that begin with `ids_so_far`, so that what an engine remembers of it stays good. (One exception:
            a reply that stopped with the end-of-text token gets the turn's end in its place.)
        """
        ids = list(ids_so_far)
        if ids and ids[-1] == self.tokenizer.end_id:
            ids.pop()
        if ids and ids[-1] != self.tokenizer.turn_end_id:
            ids.append(self.tokenizer.turn_end_id)
        if ids:
            ids += self._after_turn
        return ids + self._encode(pieces(messages)).ids + self._reply_header

    def reply(self, message: Message) -> Rendered:
        """An assistant's message as it would be generated after a prompt, its end token included."""
        weight = _weight(message)
        content = Piece(text=message.content, weight=weight)
        return self._encode([content, *_calls(message, weight), Piece(special=TURN_END, weight=weight)])

    def parse(self, reply_ids: Sequence[int]) -> Message:
        """The message that a generated reply says, up to the first stop token.

        A call that is not a JSON object with a ``name`` and an object of ``arguments`` stays in the content as it was
        written, so that nothing the model said is lost and a broken call can be seen and counted.
        """
        tokenizer = self.tokenizer
        stop = next((at for at, token in enumerate(reply_ids) if token in self.stop_ids), len(reply_ids))
        ids = list(reply_ids[:stop])
        hidden = set(tokenizer.special_ids.values()) - {tokenizer.tool_call_start_id, tokenizer.tool_call_end_id}
        content: list[int] = []
        calls: list[ToolCall] = []
        at = 0
        while at < len(ids):
            if ids[at] == tokenizer.tool_call_start_id and tokenizer.tool_call_end_id in ids[at:]:
                end = ids.index(tokenizer.tool_call_end_id, at)
                call = _read_call(tokenizer.decode(ids[at + 1 : end]), f"call_{len(calls)}")
                if call is not None:
                    calls.append(call)
                    at = end + 1
                    continue
            if ids[at] not in hidden:
                content.append(ids[at])
            at += 1
        return Message("assistant", tokenizer.decode(content, keep_special=True), tuple(calls))

    def _encode(self, parts: Iterable[Piece]) -> Rendered:
        ids: list[int] = []
        weights: list[float] = []
        for piece in parts:
            if piece.special:
                if piece.special not in self.tokenizer.special_ids:
                    raise DataError(
                        f"this vocabulary has no special token {piece.special}, so it cannot say a conversation's tools",
                        hint="leave conversations with tools out, or choose a model whose vocabulary has it",
                    )
                ids.append(self.tokenizer.special_ids[piece.special])
                weights.append(piece.weight)
                continue
            run = self.tokenizer.encode(piece.header + piece.text)
            given, header_bytes = 0, len(piece.header)  # our headers are ASCII
            while header_bytes > 0:  # a token that holds any of the header counts as header
                header_bytes -= len(self.tokenizer.token_bytes[run[given]])
                given += 1
            ids += run
            weights += [0.0] * given + [piece.weight] * (len(run) - given)
        return Rendered(ids, weights)


def _read_call(text: str, call_id: str) -> ToolCall | None:
    """The call that `text` spells, its arguments verbatim where it is written as we write it; None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    if list(call) == ["name", "arguments"] and text.startswith(_call_head(name)) and text.endswith("}"):
        return ToolCall(call_id, name, text.removeprefix(_call_head(name))[:-1])
    return ToolCall(call_id, name, json.dumps(arguments, ensure_ascii=False))
