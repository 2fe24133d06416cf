"""A response under way: a chat, told in the events of the responses API.

    responding = await Responding.open(service, wish, caller, history, items)
    async for event in responding.chunks(): ...        # or: body = await responding.whole()

In their order, each with the next `sequence_number`: `response.created` and `response.in_progress`; of each item
`response.output_item.added`, then of a text `content_part.added`, `output_text.delta` as it grows, `output_text.done` and
`content_part.done`, of a call `function_call_arguments.delta` and `.done` once it is complete; `response.output_item.done`; and
at the end `response.completed`, `response.incomplete` (the reply was cut), or `response.failed`. One item is told to its end
before the next begins. The whole response is what these events add up to: it is made by the same ones.

What it is not: where responses are kept (`lyceum.serve.responses.desk`), or the chat (`lyceum.serve.chat`), which does the work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from lyceum.serve.app import told
from lyceum.serve.chat import Chat
from lyceum.serve.limits import Caller
from lyceum.serve.refusals import Refusal
from lyceum.serve.responses.items import Item, as_chat, call_item, message_item, text_part
from lyceum.serve.responses.protocol import ChosenFunction, ResponseRequest
from lyceum.serve.service import Service
from lyceum.serve.tree import new_id
from lyceum.serve.worker import Gone

NAMES = {"messages": "input", "response_format": "text.format"}  # what a chat calls a field -> what it is called here
Event = dict[str, Any]
Keep = Callable[[dict[str, Any]], Awaitable[None]]


class Responding:
    """A response under way. `close` it.

    items: what was asked now, as it is shown. body: the response as it stands; keep: called with it when it has ended.
    """

    def __init__(self, chat: Chat, wish: ResponseRequest, owner: str, items: Sequence[Item]):
        self.chat, self.wish, self.owner, self.items = chat, wish, owner, items
        self.body = body_of(wish, chat.served.name)
        self.keep: Keep | None = None
        self.error: Exception | None = None
        self._num_events = 0
        self._finish: str | None = None
        self._message: Item | None = None  # that is being told
        self._text, self._logprobs, self._waiting = "", list[Any](), list[Any]()

    @classmethod
    async def open(
        cls,
        service: Service,
        wish: ResponseRequest,
        caller: Caller,
        history: Sequence[Item],
        items: Sequence[Item],
    ) -> Responding:
        """Let a request in; history: the items of what it goes on with. Raises Refusal, or what the engine says of it."""
        try:
            chat = await Chat.open(service, as_chat(wish, [*history, *items]), caller)
        except Refusal as refusal:
            refusal.param = NAMES.get(refusal.param or "", refusal.param)
            raise
        return cls(chat, wish, caller.id, items)

    @property
    def is_told(self) -> bool:
        """Whether its id is known to somebody before it ends."""
        return bool(self.wish.stream or self.wish.background)

    @property
    def is_over(self) -> bool:
        """Whether it has ended by itself."""
        return self.body["status"] != "in_progress"

    @property
    def has_news(self) -> bool:
        """Whether more has come already than was taken."""
        return self.chat.has_news

    def close(self) -> None:
        """Give up what has not come yet."""
        self.chat.close()

    async def whole(self) -> dict[str, Any]:
        """The response, once it has ended. Raises what went wrong; Gone where it was given up."""
        async for _ in self.chunks():
            pass
        if self.error is not None:
            raise self.error
        if not self.is_over:
            raise Gone
        return self.body

    async def chunks(self) -> AsyncIterator[Event]:
        """The events, as they come; without an end where it was given up."""
        for type in ("response.created", "response.in_progress"):
            yield self._event(type, response=copy.deepcopy(self.body))
        try:
            async for chunk in self.chat.chunks():
                for event in self._tell(chunk):
                    yield event
        except Exception as error:
            self.error = error
            refusal = told(error)
            code = "server_error" if refusal.status >= 500 else "invalid_prompt"
            self.body |= {"status": "failed", "error": {"code": code, "message": refusal.message}}
            for event in self._end_message("incomplete"):
                yield event
        if self.error is None and self._finish is not None:
            is_cut = self._finish == "length"
            if not self.body["output"] and self._message is None:  # it says nothing, and says so
                for event in self._begin_message():
                    yield event
            for event in self._end_message("incomplete" if is_cut else "completed"):
                yield event
            reason = {"reason": "max_output_tokens"} if is_cut else None
            self.body |= {"status": "incomplete" if is_cut else "completed", "incomplete_details": reason}
            self.body["completed_at"] = None if is_cut else int(time.time())
        if not self.is_over:  # it was given up: nobody waits for it
            return
        if self.keep is not None and (self.error is None or self.is_told):
            await self.keep(self.body)
        yield self._event(f"response.{self.body['status']}", response=self.body)

    # -- from a chat's chunks to events --------------------------------------------------------------------------------

    def _event(self, type: str, **content: Any) -> Event:
        self._num_events += 1
        return {"type": type, "sequence_number": self._num_events - 1, **content}

    def _tell(self, chunk: dict[str, Any]) -> Iterator[Event]:
        if chunk["usage"] is not None:
            self.body["usage"] = usage(chunk["usage"])
        for choice in chunk["choices"]:
            delta, logprobs = choice["delta"], choice["logprobs"]
            if logprobs is not None:
                self._waiting += logprobs["content"]
            if delta.get("content"):
                yield from self._begin_message()
                yield self._delta(delta["content"])
            for call in delta.get("tool_calls", ()):
                yield from self._end_message("completed")
                yield from self._call(call["id"], **call["function"])
            self._finish = choice["finish_reason"] or self._finish

    @property
    def _at(self) -> dict[str, Any]:
        assert self._message is not None
        return {"item_id": self._message["id"], "output_index": len(self.body["output"]), "content_index": 0}

    def _begin_message(self) -> Iterator[Event]:
        if self._message is None:
            self._message, self._text, self._logprobs = message_item(new_id("msg"), "in_progress", []), "", []
            index = len(self.body["output"])
            yield self._event("response.output_item.added", output_index=index, item=self._message)
            yield self._event("response.content_part.added", **self._at, part=text_part(""))

    def _delta(self, piece: str) -> Event:
        told_now, self._waiting = self._waiting, []
        self._text += piece
        self._logprobs += told_now
        return self._event("response.output_text.delta", **self._at, delta=piece, logprobs=told_now)

    def _end_message(self, status: str) -> Iterator[Event]:
        if self._message is None:
            return
        if self._waiting:
            yield self._delta("")
        part = text_part(self._text, self._logprobs)
        item = message_item(self._message["id"], status, [part])
        yield self._event("response.output_text.done", **self._at, text=self._text, logprobs=self._logprobs)
        yield self._event("response.content_part.done", **self._at, part=part)
        yield self._event("response.output_item.done", output_index=len(self.body["output"]), item=item)
        self.body["output"].append(item)
        self._message = None

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[Event]:
        index, id = len(self.body["output"]), new_id("fc")
        at = {"item_id": id, "output_index": index}
        begun, item = (
            call_item(id, status, call_id, name, said)
            for status, said in (("in_progress", ""), ("completed", arguments))
        )
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **at, delta=arguments)
        yield self._event("response.function_call_arguments.done", **at, arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)
        self.body["output"].append(item)


def body_of(wish: ResponseRequest, model: str) -> dict[str, Any]:
    """A response that begins: all that was asked for, as it is followed."""
    format, choice = wish.format, wish.tool_choice
    shape = {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
    tools = [
        {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters,
         "strict": bool(tool.strict)}
        for tool in wish.tools or ()
    ]  # fmt: skip
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(wish.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": wish.instructions,
        "max_output_tokens": wish.max_output_tokens,
        "max_tool_calls": None,
        "metadata": wish.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": wish.parallel_tool_calls is not False,
        "previous_response_id": wish.previous_response_id,
        "prompt_cache_key": wish.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": wish.safety_identifier,
        "service_tier": "flex" if wish.service_tier == "flex" else "default",
        "store": wish.is_kept,
        "temperature": 1.0 if wish.temperature is None else wish.temperature,
        "text": {"format": shape, "verbosity": "medium"},
        "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
        "tools": tools,
        "top_logprobs": wish.top_logprobs or 0,
        "top_p": 1.0 if wish.top_p is None else wish.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": wish.user,
    }


def usage(of_chat: dict[str, Any]) -> dict[str, Any]:
    """What a chat used, in this API's words."""
    cached = of_chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": of_chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": of_chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": of_chat["total_tokens"],
    }
