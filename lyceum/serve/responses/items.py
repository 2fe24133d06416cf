"""Items of a conversation as the API shows and keeps them, and the same conversation as the chat's request.

    items = as_items(wish)                                # what was asked now, each with an id
    request = as_chat(wish, [*history, *items])           # a ChatRequest: from here on it is a chat like any other

One turn of the assistant is several items (its text, then each call); here they become one message again, so that the prompt is
the one that a chat has, and what was read of it before is remembered.

What it is not: the chat (`lyceum.serve.chat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lyceum.serve.protocol import (
    Call,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    Function,
    JsonSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    StreamOptions,
    Tool,
)
from lyceum.serve.refusals import Refusal
from lyceum.serve.responses.protocol import (
    Asked,
    CallItem,
    ChosenFunction,
    MessageItem,
    Parts,
    ResponseRequest,
    ResultItem,
    TextFormat,
)
from lyceum.serve.tree import new_id

MAX_TURNS = 2048  # of one conversation, the instructions too: what a chat may have
Item = dict[str, Any]


# -- as they are shown and kept ----------------------------------------------------------------------------------------


def as_items(wish: Asked, history: Sequence[Item] = ()) -> list[Item]:
    """What was asked, each item with an id: its own where it has one that no other of the conversation has."""
    given: list[Any] = [MessageItem(role="user", content=wish.input)] if isinstance(wish.input, str) else wish.input
    found: list[Item] = []
    ids = {item["id"] for item in history}
    for item in given:
        kind = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}[item.type]
        id = item.id if item.id is not None and item.id not in ids else new_id(kind)
        ids.add(id)
        found.append({"id": id, "type": item.type, "status": item.status or "completed", **_said(item)})
    return found


def _said(item: MessageItem | CallItem | ResultItem) -> Item:
    if isinstance(item, CallItem):
        return {"call_id": item.call_id, "name": item.name, "arguments": item.arguments or "{}"}
    if isinstance(item, ResultItem):
        return {"call_id": item.call_id, "output": _text(item.output)}
    if item.role == "assistant":
        return {"role": item.role, "content": [text_part(_text(item.content))]}
    parts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
    return {"role": item.role, "content": [{"type": "input_text", "text": text} for text in parts]}


def _text(content: str | Parts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def text_part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """A text that the assistant says, as a part of its message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def message_item(id: str, status: str, content: Sequence[dict[str, Any]]) -> Item:
    """A message of the assistant."""
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def call_item(id: str, status: str, call_id: str, name: str, arguments: str) -> Item:
    """A call of a function."""
    told = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": id, "type": "function_call", "status": status, **told}


# -- as a chat ---------------------------------------------------------------------------------------------------------


def as_messages(instructions: str | None, items: Sequence[Item]) -> list[ChatMessage]:
    """Items as the turns of a chat, the instructions before them.

    Raises Refusal for a result whose call was not made, and for a call whose result is missing.
    """
    if len(items) + (instructions is not None) > MAX_TURNS:
        raise Refusal(400, f"The conversation has {len(items)} items, at most {MAX_TURNS}.", param="input")
    found = [] if instructions is None else [ChatMessage(role="system", content=instructions)]
    open_calls: dict[str, None] = {}
    made: set[str] = set()
    for item in items:
        last = found[-1] if found else None
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
            found.append(ChatMessage(role=item["role"], content=text))
        elif item["type"] == "function_call":
            call = Call(
                id=item["call_id"],
                type="function",
                function=CalledFunction(name=item["name"], arguments=item["arguments"]),
            )
            if last is None or last.role != "assistant":
                found.append(last := ChatMessage(role="assistant"))
            last.tool_calls = [*(last.tool_calls or ()), call]
            open_calls[call.id] = None
            made.add(call.id)
        else:
            if item["call_id"] not in made:
                raise Refusal(
                    400, f"No tool call found for function call output with call_id {item['call_id']}.", param="input"
                )
            open_calls.pop(item["call_id"], None)
            found.append(ChatMessage(role="tool", tool_call_id=item["call_id"], content=item["output"]))
    if open_calls:
        raise Refusal(400, f"No tool output found for function call {next(iter(open_calls))}.", param="input")
    return found


def as_chat(wish: Asked, items: Sequence[Item]) -> ChatRequest:
    """What is asked of a model, as a chat's request, streamed. Raises Refusal for what no chat can be asked."""
    more: dict[str, Any] = {}
    if isinstance(wish, ResponseRequest):
        names = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "min_tokens")
        more = {name: getattr(wish, name) for name in names}
        more |= {"max_completion_tokens": wish.max_output_tokens, "stream": True, "logprobs": wish.wants_scores}
        more |= {"stream_options": StreamOptions(include_usage=True), "top_logprobs": wish.top_logprobs}
        # nobody watches what is not streamed: it goes behind what is, as in a chat
        is_watched = wish.stream or wish.service_tier in ("default", "priority")
        more["service_tier"] = "default" if is_watched and wish.service_tier != "flex" else "flex"
    choice = wish.tool_choice
    request = ChatRequest(
        model=wish.model,
        messages=as_messages(wish.instructions, items),
        tools=[_tool(tool) for tool in wish.tools] if wish.tools else None,
        tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
        if isinstance(choice, ChosenFunction)
        else choice,
        parallel_tool_calls=wish.parallel_tool_calls,
        response_format=None if wish.format is None else _format(wish.format),
        **more,
    )
    request.check()
    return request


def _tool(tool: Any) -> Tool:
    told = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return Tool(type="function", function=Function(**told))


def _format(format: TextFormat) -> ResponseFormat:
    if format.type == "json_object":
        return ResponseFormat(type="json_object")
    told = {"name": format.name, "description": format.description, "schema": format.form, "strict": format.strict}
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(**told))  # type: ignore[arg-type]
