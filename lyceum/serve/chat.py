"""Chat completions: a conversation in, messages out, whole or as a stream; and edits, which are a conversation of one turn.

    chat = await Chat.open(service, request, caller)
    await chat.whole()              # or: async for chunk in chat.chunks(): ...

**Tools.** The model is shown them by the chat format and calls them as it was taught. Where a call is demanded (`tool_choice`
"required", or a function's name) the engine holds the reply to the form of a call and to the function's parameters. With
"none" the tools are shown all the same, so that what was read of the conversation stays good, and calling is forbidden.
`parallel_tool_calls: false` ends the reply with its first call. A call's arguments are a text, as the model wrote them.

**JSON.** With `response_format` nothing but JSON that fits can be drawn (`lyceum.engine.schema`); a schema that is not
understood is refused, as is `strict` where a call may come but need not.

What a client sees of a stream: the role, then text as it becomes certain, each call when it is complete, the finish reason
with an empty delta, and the usage if it was asked for, in a chunk of its own without choices.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from lyceum.corpus.records import Conversation, Message
from lyceum.engine.sequence import Output
from lyceum.serve.answers import FINISH, Growing, chat_logprobs, usage
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.protocol import ChatRequest, EditRequest, NamedTool, Sampled, Tool
from lyceum.serve.refusals import Refusal, unsupported
from lyceum.serve.sampled import checked, each_prompt, params_of, rebased, stops_of
from lyceum.serve.service import Answering, Service, off_loop
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import ABSENT

EDITOR = "Edit the text that the user gives. Reply with the whole edited text and with nothing else."


class Reply:
    """One choice: what has come of it, and what a client was told."""

    def __init__(self, chat: Chat, place: int):
        tokenizer = chat.served.tokenizer
        marks = (tokenizer.tool_call_start_id, tokenizer.tool_call_end_id)
        self.chat = chat
        self.growing = Growing(tokenizer.token_bytes, chat.job.wanted[place][1], hold_at=marks if chat.may_call else ())
        self.call_ids: list[str] = []
        self.num_told = 0  # calls

    def calls(self, message: Message) -> list[dict[str, Any]]:
        """The calls of a message that were not told yet, as a stream has them."""
        found = []
        for number in range(self.num_told, len(message.tool_calls)):
            call = message.tool_calls[number]
            self.call_ids.append(f"call_{secrets.token_hex(12)}")
            function = {"name": call.name, "arguments": call.arguments}
            found.append({"index": number, "id": self.call_ids[-1], "type": "function", "function": function})
        self.num_told = len(message.tool_calls)
        return found

    def message(self, output: Output) -> Message:
        """What a reply that is finished says, after `growing` has seen all of it."""
        ids, text = output.ids, self.growing.text
        if not self.chat.may_call:
            return Message("assistant", text)
        if output.text_bytes is None:
            return self.chat.format.parse(ids)
        table = self.chat.served.tokenizer.token_bytes  # ended by a stop string: what began before it counts
        num, num_bytes = 0, 0
        while num_bytes < output.text_bytes:
            num_bytes += len(table[ids[num]])
            num += 1
        calls = self.chat.format.parse(ids[:num]).tool_calls
        if calls:
            return Message("assistant", text, calls)
        whole = b"".join(table[token] for token in ids)[: output.text_bytes]
        return Message("assistant", whole.decode("utf-8", "replace"))


class Chat(Answering):
    """A request for replies to a conversation, under way. `close` it."""

    def __init__(self, served: Served, format: ChatFormat, request: Sampled, may_call: bool = False):
        self.served, self.format, self.request, self.may_call = served, format, request, may_call
        self.is_named = isinstance(request, ChatRequest) and isinstance(request.tool_choice, NamedTool)
        self.wants_scores = isinstance(request, ChatRequest) and bool(request.logprobs)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": served.name,
            "service_tier": "default",
            "system_fingerprint": f"fp_{served.fingerprint}",
        }

    @classmethod
    async def open(cls, service: Service, request: ChatRequest, caller: Caller) -> Chat:
        """Let a request in. Raises Refusal, or what the engine says of it."""
        served = await service.find(request.model, caller)
        format = chat_of(served)
        choice = request.tool_choice or "auto"
        chat = cls(served, format, request, may_call=bool(request.tools) and choice != "none")
        longest = request.max_completion_tokens or request.max_tokens or served.context_length
        form = await _form(request, served)
        tier = request.service_tier
        if tier == "flex":
            chat.head["service_tier"] = "flex"
        is_background = tier == "flex" or (tier in (None, "auto") and not request.stream)
        more = {"logprobs": bool(request.logprobs), "top_logprobs": request.top_logprobs or 0, **form}
        await chat._open(service, request.conversation, caller, longest, is_background, more)
        return chat

    async def _open(
        self,
        service: Service,
        conversation: Conversation,
        caller: Caller,
        max_tokens: int,
        is_background: bool,
        more: dict[str, Any],
    ) -> None:
        size = sum(len(message.content) for message in conversation.messages)
        check_size(size, self.served, "messages")
        prompt = await off_loop(size, lambda: self.format.prompt(conversation))
        max_tokens = min(max_tokens, service.limits.max_tokens or max_tokens, self.served.context_length)
        params = params_of(self.request, self.served, max_tokens=max_tokens, **more)
        (each,) = each_prompt(params, 1, self.request.seed is not None)
        self.num_prompt = len(prompt)
        self.job = await service.open(
            self.served,
            [(prompt, one) for one in each],
            caller,
            is_background=is_background,
            follows=bool(self.request.stream),
            wants_scores=self.wants_scores,
        )

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        outputs = await self.job.outputs()
        choices = []
        for place, output in enumerate(outputs):
            reply = Reply(self, place)
            _, tokens = reply.growing.close(output)
            message = reply.message(output)
            calls = [{name: call[name] for name in ("id", "type", "function")} for call in reply.calls(message)]
            said: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None, "annotations": []}
            if calls:
                said |= {"tool_calls": calls, "content": message.content or None}
            choices.append(
                {
                    "index": place,
                    "message": said,
                    "logprobs": self._logprobs(output, tokens),
                    "finish_reason": self._finish(output, message),
                }
            )
        return {**self.head, "choices": choices, "usage": self.usage(outputs)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it grows: what each event of the stream says."""
        head: dict[str, Any] = {**self.head, "usage": None} if self.request.wants_usage else self.head
        call_end = self.served.tokenizer.tool_call_end_id

        def chunk(place: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return {**head, "choices": [choice]}

        replies = [Reply(self, place) for place in range(len(self.job.wanted))]
        outputs: list[Output] = []
        for place in range(len(replies)):
            yield chunk(place, {"role": "assistant", "content": "", "refusal": None})
        async for one in self.job:
            reply = replies[one.place]
            growing, message = reply.growing, None
            if one.output is None:
                piece, tokens = growing.feed(one.ids)
                if self.may_call and call_end in one.ids:
                    message = self.format.parse(growing.ids)
            else:
                shown = len(growing.text)
                _, tokens = growing.close(one.output)
                message = reply.message(one.output)
                piece = message.content[shown:]
                outputs.append(one.output)
            logprobs = self._logprobs(one.so_far, tokens)
            if piece or (logprobs and logprobs["content"]):
                yield chunk(one.place, {"content": piece}, logprobs)
            if message is not None and (calls := reply.calls(message)):
                yield chunk(one.place, {"tool_calls": calls})
            if one.output is not None and message is not None:
                yield chunk(one.place, {}, None, self._finish(one.output, message))
        if len(outputs) == len(replies) and self.request.wants_usage:
            yield {**head, "choices": [], "usage": self.usage(outputs)}

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """What all replies used; the prompt counts once."""
        num_cached = min((output.num_reused for output in outputs), default=0)
        return usage(self.num_prompt, sum(len(output.ids) for output in outputs), num_cached)

    def _logprobs(self, output: Output | None, tokens: range) -> dict[str, Any] | None:
        if not self.wants_scores or output is None:
            return None
        part = slice(tokens.start, tokens.stop)
        content = chat_logprobs(
            self.served.tokenizer, output.ids[part], output.logprobs[part], output.top_logprobs[part]
        )
        return {"content": content, "refusal": None}

    def _finish(self, output: Output, message: Message) -> str:
        if message.tool_calls:
            return "stop" if self.is_named else "tool_calls"  # as the original has it: a call by name was no choice
        return FINISH[output.finish]


def chat_of(served: Served) -> ChatFormat:
    """The chat format of a model that has one. Raises Refusal."""
    if served.chat is None:
        raise Refusal(
            400,
            f"The model {served.name!r} does not chat: its vocabulary marks no turns. Use /v1/completions.",
            param="model",
            code="unsupported_model",
        )
    return served.chat


def check_size(num_characters: int, served: Served, param: str) -> None:
    """Raises Refusal for a text that cannot fit, before it is cut into tokens."""
    if num_characters > served.context_length * served.longest_token:
        raise Refusal(
            400,
            f"This model's maximum context length is {served.context_length} tokens; {num_characters} characters cannot fit.",
            param=param,
            code="context_length_exceeded",
        )


async def _form(request: ChatRequest, served: Served) -> dict[str, Any]:
    """What a request says of the form of its replies, as parameters of the engine."""
    tokenizer, tools = served.tokenizer, request.tools or []
    choice = request.tool_choice or "auto"
    shape = request.response_format
    if shape is not None and shape.type != "text":
        if tools and choice != "none":
            raise unsupported(
                "response_format", "a reply that may be a call has no other form; set tool_choice to 'none'"
            )
        schema: Mapping[str, Any] = {"type": "object"}
        if shape.json_schema is not None and shape.json_schema.form is not None:
            schema = shape.json_schema.form
        return {"json_schema": await checked(schema, "response_format")}
    if not tools:
        return {}
    start, end = tokenizer.tool_call_start_id, tokenizer.tool_call_end_id
    if ABSENT in (start, end):
        raise unsupported("tools", f"the vocabulary of {served.name!r} has no tokens that mark a call")
    if choice == "none":
        return {"logit_bias": {start: -100.0}}
    if choice == "auto":
        if any(tool.function.strict for tool in tools):
            raise unsupported(
                "strict", "arguments are held to their parameters where a call is demanded by 'tool_choice'"
            )
        return {"stop_ids": (*stops_of(served), end)} if request.parallel_tool_calls is False else {}
    name = choice.function.name if isinstance(choice, NamedTool) else None
    wanted = [tool for tool in tools if name in (None, tool.function.name)]
    schema = _call(wanted[0], "") if len(wanted) == 1 else {
        "anyOf": [_call(tool, f"/anyOf/{number}") for number, tool in enumerate(wanted)]
    }  # fmt: skip
    return {"forced": (start,), "json_schema": await checked(schema, "tools"), "stop_ids": (end,)}


def _call(tool: Tool, at: str) -> dict[str, Any]:
    """The schema of a call, as the chat format writes it; `at` is where it will stand in another."""
    parameters = tool.function.parameters or {"type": "object", "additionalProperties": False}
    arguments = rebased(parameters, f"{at}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
    }


def asked_to_edit(instruction: str, text: str) -> tuple[str, str]:
    """What a model that chats is told when it shall edit a text: the system prompt, and what is said."""
    return EDITOR, f"{instruction}\n\n{text}" if text else instruction


async def edit(service: Service, request: EditRequest, caller: Caller) -> dict[str, Any]:
    """The answer of `/v1/edits`: a model that chats is asked to edit."""
    served = await service.find(request.model, caller)
    format = chat_of(served)
    sampled = Sampled(model=request.model, n=request.n, temperature=request.temperature, top_p=request.top_p)
    chat = Chat(served, format, sampled)
    system, said = asked_to_edit(request.instruction, request.input or "")
    conversation = Conversation((Message("system", system), Message("user", said)))
    await chat._open(service, conversation, caller, served.context_length, True, {})
    try:
        whole = await chat.whole()
    finally:
        chat.close()
    choices = [{"text": choice["message"]["content"], "index": choice["index"]} for choice in whole["choices"]]
    return {"object": "edit", "created": chat.head["created"], "choices": choices, "usage": whole["usage"]}
