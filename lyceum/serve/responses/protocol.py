"""What clients may send to /v1/responses: OpenAI's request by its official specification, as strictly as `lyceum.serve.protocol`.

Items are messages, calls of functions and what those gave; tools are functions. Other items and tools are known by their
names and refused. Beyond the specification stand `seed` and what vLLM made usual, as in a chat.

What it is not: what becomes of items (`lyceum.serve.responses.items`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from lyceum.serve.protocol import NOT_TEXT, Name, Wish
from lyceum.serve.refusals import Refusal, unsupported

LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, Field(min_length=1, max_length=128)]
Labels = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Includable = Literal[  # of what other than texts would hold nothing is left out
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content", "message.output_text.logprobs",
]  # fmt: skip


def _only(param: str, types: tuple[str, ...], why: str) -> BeforeValidator:
    """Refuse an object of another type by that type's name, before it is compared with what is known."""

    def check(given: Any) -> Any:
        type = given.get("type", types[0]) if isinstance(given, dict) else types[0]
        if isinstance(type, str) and type not in types:
            raise unsupported(f"{param}.{type[:60]}", why)
        return given

    return BeforeValidator(check)


# -- items -------------------------------------------------------------------------------------------------------------


class ItemPart(Wish):
    """A piece of what an item says. annotations, logprobs: of an answer that is sent back; they say nothing new."""

    NOT_FOLLOWED = {"prompt_cache_breakpoint": ("what was read is always remembered, for its own caller", ())}
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[dict[str, Any]] | None = None


Parts = list[Annotated[ItemPart, _only("content", ("input_text", "output_text"), NOT_TEXT)]]


class MessageItem(Wish):
    """One turn of a conversation. id, status, phase: of an answer that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Wish):
    """A call that the model made before, its arguments as JSON text."""

    NOT_FOLLOWED = {
        "caller": ("calls are made by the model", ({"type": "direct"},)),
        "namespace": ("functions have no namespaces", ()),
        "async": ("every call waits for its result", (False,)),
    }
    type: Literal["function_call"]
    call_id: Id
    name: Name
    arguments: str
    id: Id | None = None
    status: Status | None = None


class ResultItem(Wish):
    """What a call gave."""

    NOT_FOLLOWED = {
        "caller": ("calls are made by the model", ({"type": "direct"},)),
        "namespace": ("functions have no namespaces", ()),
    }
    type: Literal["function_call_output"]
    call_id: Id
    output: str | Parts
    id: Id | None = None
    status: Status | None = None
    name: Name | None = None


def _kind(given: Any) -> str:
    return str(given.get("type", "message") if isinstance(given, dict) else getattr(given, "type", "message"))


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_kind),
    _only("input", ("message", "function_call", "function_call_output"), "items are messages, calls and their results"),
]


# -- tools and form ----------------------------------------------------------------------------------------------------


class FunctionTool(Wish):
    """A function that may be called. strict: its arguments shall fit its parameters."""

    NOT_FOLLOWED = {
        "allowed_callers": ("calls are made by the model", ([], ["direct"])),
        "async": ("every call waits for its result", (False,)),
        "defer_loading": ("all tools are shown to the model", (False,)),
        "output_schema": ("results are not checked", ()),
    }
    DIFFERS = {"strict": 'only where `tool_choice` demands the call; with "auto" it is refused. It is not the default'}
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Wish):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Wish):
    """What a reply looks like."""

    DIFFERS = {
        "schema": "as far as the engine understands schemas; others are refused (`invalid_schema`)",
        "strict": "a schema is always followed",
    }

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    form: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Wish):
    """How a reply is said."""

    NOT_FOLLOWED = {"verbosity": ("say it in the instructions", ("medium",))}
    format: TextFormat | None = None


class EventOptions(Wish):
    """What a stream says beside the events."""

    NOT_FOLLOWED = {"include_obfuscation": ("nothing is added to the stream", (False,))}


# -- requests ----------------------------------------------------------------------------------------------------------

Tools = Annotated[
    list[Annotated[FunctionTool, _only("tools", ("function",), "there are no built-in tools, only functions")]],
    Field(max_length=128),
]
Choice = (
    Literal["none", "auto", "required"]
    | Annotated[ChosenFunction, _only("tool_choice", ("function",), "a choice is a word, or one function")]
)


class Asked(Wish):
    """What a model is asked: what its prompt is made of."""

    DIFFERS = {
        "previous_response_id": "the whole conversation goes on, as far as it is still kept; its instructions do not",
        "instructions": "a system message before all others",
        "text": "a format not together with tools that may be called",
        "tool_choice": '"required" or a function hold the reply to a call and to its parameters; "none" forbids calls',
        "parallel_tool_calls": "false ends the reply with its first call",
    }

    input: str | Annotated[list[Item], Field(min_length=1, max_length=2048)]
    model: Name
    instructions: str | None = None
    previous_response_id: Id | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None

    @property
    def may_call(self) -> bool:
        """Whether a reply may be a call."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def format(self) -> TextFormat | None:
        """The form of the reply, where it has one."""
        format = self.text.format if self.text is not None else None
        return None if format is None or format.type == "text" else format

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        if self.format is not None and self.may_call:
            raise unsupported("text.format", "a reply that may be a call has no other form; set tool_choice to 'none'")
        if self.format is not None and self.format.type == "json_schema":
            for name, value in (("name", self.format.name), ("schema", self.format.form)):
                if value is None:
                    param = f"text.format.{name}"
                    raise Refusal(
                        400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
                    )


class CountRequest(Asked):
    """POST /v1/responses/input_tokens"""

    NOT_FOLLOWED = {
        "conversation": ("there are no conversations beside the chain of previous_response_id", ()),
        "personality": ("say it in the instructions", ()),
        "reasoning": ("the models here answer at once", ({}, {"effort": "none"}, {"effort": None})),
        "truncation": ("nothing is dropped from an input", ("disabled",)),
    }


class ResponseRequest(Asked):
    """POST /v1/responses"""

    NOT_FOLLOWED = {
        "access_programs": ("there are none", ()),
        "background_options": ("it is made as soon as there is room", ({}, {"completion_window": "soonest"})),
        "context_management": ("nothing is dropped from a conversation", ([],)),
        "conversation": ("there are no conversations beside the chain of previous_response_id", ()),
        "image": (NOT_TEXT, ({},)),
        "max_tool_calls": ("there are no built-in tools, whose calls it bounds", ()),
        "moderation": ("no policy is applied", ()),
        "prompt": ("there are no stored prompts", ()),
        "prompt_cache_options": ("what was read is always remembered, for its own caller", ({},)),
        "prompt_cache_retention": ("what was read is remembered as long as there is room", ("in_memory",)),
        "reasoning": ("the models here answer at once", ({}, {"effort": "none"}, {"effort": None})),
        "truncation": ("nothing is dropped from an input", ("disabled",)),
    }  # fmt: skip
    DIFFERS = {
        **Asked.DIFFERS,
        "background": "by its id until it has ended; not streamed",
        "include": "log-probabilities; of what else may be named there is nothing here, and so nothing is left out",
        "max_output_tokens": "what it, or the context, has no room for ends as `incomplete`",
        "store": "kept for 30 days, unless false; what its client left before it had ended is not kept",
        "service_tier": '"flex" goes behind everybody else; so does what is not streamed, but with "default" or "priority"',
        "temperature": "1 where none is given",
        "seed": "beyond the original: the reply of a chat with this seed",
        "top_k": "beyond the original, as in a chat",
        "min_p": "beyond the original, as in a chat",
        "repetition_penalty": "beyond the original, as in a chat",
        "min_tokens": "beyond the original, as in a chat",
        "prompt_cache_key": "accepted; nothing depends on it",
        "safety_identifier": "accepted; nothing depends on it",
        "user": "accepted; nothing depends on it",
    }
    background: bool | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    metadata: Labels | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: EventOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the server keeps the response."""
        return self.store is not False

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities were asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        super().check()
        if self.stream_options is not None and not self.stream:
            raise Refusal(
                400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        if self.wants_scores and self.may_call:
            raise unsupported("include", "log-probabilities are told of texts; set tool_choice to 'none'")
        if self.background and not self.is_kept:
            raise Refusal(400, "What is made in the background is kept: no 'store': false.", param="background")
        if self.background and self.stream:
            raise unsupported("background", "what is made in the background is asked for by its id, not streamed")


REQUESTS: tuple[type[Wish], ...] = (ResponseRequest, CountRequest)
