"""What clients may send: the requests of OpenAI's API by its official specification, and a few of its kin's.

Three kinds of fields. *Known and followed*: the fields of the classes below, with the specification's bounds; null is as good
as leaving one out; `DIFFERS` says what is followed in a way of our own. *Known and not followed*: `NOT_FOLLOWED`, refused by
name with the reason, unless the value asks for nothing (`"store": false`). *Unknown*: refused as the original does, so that a
misspelt wish is never dropped. The page docs/api.md is made from all of them (`lyceum.serve.describe`).

Beyond the specification stand what vLLM and llama.cpp made usual: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`
(`lyceum.engine.sampling`), and the routes that cut text into tokens and back.

What it is not: the answers (`lyceum.serve.answers`), nor what becomes of a request (`lyceum.serve.generation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.serve.refusals import Refusal, unsupported

Prompt = list[str] | list[list[int]]
NOT_TEXT = "the models here read and write text"
NO_STORE = "answers are not stored"


class Wish(BaseModel):
    """An object that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    NOT_FOLLOWED: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {}  # field -> why, values that ask for nothing
    DIFFERS: ClassVar[Mapping[str, str]] = {}  # field -> how it is followed, where not just as the original does

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, (why, harmless) in cls.NOT_FOLLOWED.items():
            value = given.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
                raise unsupported(name, why)
        return {name: value for name, value in given.items() if name not in cls.NOT_FOLLOWED}


def read_prompt(given: Any) -> Prompt:
    """A text, texts, token ids, or lists of them, as a list."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(type(one) is str for one in given):
            return given
        if all(type(one) is int for one in given):
            return [given]
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in given):
            return given
    raise PydanticCustomError(
        "prompt_type", "expected a string, a list of strings, a list of token ids, or lists of them"
    )


Ids = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
Texts = Annotated[
    Any,
    PlainValidator(read_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                Ids,
                {"type": "array", "items": Ids, "minItems": 1},
            ]
        }
    ),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Wish):
    """What a stream says beside the text."""

    NOT_FOLLOWED = {"include_obfuscation": ("nothing is added to the stream", (False,))}
    include_usage: bool | None = None


class Sampled(Wish):
    """What all requests for text share."""

    DIFFERS = {
        "temperature": "1 where none is given",
        "seed": "the same request gives the same reply, whoever else asks; without one, each request has its own",
        "stream": "what is not streamed goes behind what is: nobody watches it",
        "user": "accepted; nothing depends on it",
        "top_k": "beyond the original, as in vLLM: only so many of the likeliest tokens; 0: all",
        "min_p": "beyond the original, as in vLLM: only tokens at least so likely as this share of the likeliest",
        "repetition_penalty": "beyond the original, as in vLLM: above 1, what was said before becomes less likely",
        "min_tokens": "beyond the original, as in vLLM: nothing ends a reply before",
    }

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Its stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        if self.stream_options is not None and not self.stream:
            raise Refusal(
                400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )


# -- chat --------------------------------------------------------------------------------------------------------------


class Part(Wish):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") in ("image_url", "input_audio", "file", "refusal"):
            raise unsupported(str(given["type"]), NOT_TEXT)
        return given


class CalledFunction(Wish):
    """A function that was called, its arguments as JSON text."""

    name: Name
    arguments: str


class Call(Wish):
    """A call that the assistant made before."""

    NOT_FOLLOWED = {"index": ("it counts the calls of a stream", tuple(range(128)))}
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Wish):
    """One turn of a conversation."""

    NOT_FOLLOWED = {
        "name": ("the chat format has no names beside the roles", ()),
        "audio": (NOT_TEXT, ()),
        "refusal": ("say it as content", ()),
        "annotations": (NOT_TEXT, ([],)),
        "function_call": ("use tool_calls", ()),
    }
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: Annotated[list[Call], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Wish):
    """A function that may be called. strict: its arguments shall fit its parameters."""

    DIFFERS = {"strict": 'only where `tool_choice` demands the call; with "auto" it is refused'}

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wish):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wish):
    """The function that must be called."""

    name: Name


class NamedTool(Wish):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Wish):
    """The form of a reply."""

    DIFFERS = {
        "schema": "as far as the engine understands schemas; others are refused (`invalid_schema`)",
        "strict": "a schema is always followed",
    }

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    form: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wish):
    """What a reply looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    NOT_FOLLOWED = {
        "audio": (NOT_TEXT, ()),
        "modalities": (NOT_TEXT, (["text"],)),
        "functions": ("use tools", ([],)),
        "function_call": ("use tool_choice", ("none",)),
        "metadata": ("it belongs to stored answers; " + NO_STORE, ({},)),
        "moderation": ("no policy is applied", ()),
        "prediction": ("nothing is predicted", ()),
        "prompt_cache_options": ("what was read is always remembered, for its own caller", ()),
        "prompt_cache_retention": ("what was read is remembered as long as there is room", ("in_memory", "in-memory")),
        "reasoning_effort": ("the models here answer at once", ("none",)),
        "store": (NO_STORE, (False,)),
        "verbosity": ("say it in the system message", ("medium",)),
        "web_search_options": ("there is no search", ()),
    }
    DIFFERS = {
        **Sampled.DIFFERS,
        "max_tokens": 'or `max_completion_tokens`, not both; what the context has no room for ends with "length"',
        "logprobs": "of the temperature that was asked for (1 if greedy), before filters and penalties",
        "top_logprobs": "a token is named by its text, a part of a character as `bytes:\\xe6\\x88`",
        "response_format": "not together with tools that may be called",
        "tool_choice": '"required" or a name hold the reply to a call and to its parameters; "none" forbids calls',
        "parallel_tool_calls": "false ends the reply with its first call",
        "service_tier": '"flex" goes behind everybody else, streamed or not; "default" and "priority" do not',
        "prompt_cache_key": "accepted; nothing depends on it",
        "safety_identifier": "accepted; nothing depends on it",
    }
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refusal(
                400,
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                param="max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise Refusal(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise Refusal(400, "The function of 'tool_choice' is not among the 'tools'.", param="tool_choice")
        if len(set(names)) < len(names):
            raise Refusal(400, "Two 'tools' have the same name.", param="tools")
        shape = self.response_format
        if shape is not None and (shape.type == "json_schema") != (shape.json_schema is not None):
            raise Refusal(
                400,
                "'json_schema' belongs to the type 'json_schema', and only there.",
                param="response_format.json_schema",
            )

    @property
    def conversation(self) -> Conversation:
        """What was said, as a record. Raises Refusal for a turn that says nothing, or answers a call that was not made."""
        return Conversation(read_messages(self.messages), tuple(tool_json(tool) for tool in self.tools or ()))


def read_messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """Turns as records."""
    found, called = [], set()
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if message.tool_calls and message.role != "assistant":
            raise Refusal(400, f"A {message.role} message makes no calls.", param=f"{at}.tool_calls")
        if message.content is None and not message.tool_calls:
            raise Refusal(400, f"A {message.role} message needs content.", param=f"{at}.content")
        if (message.role == "tool") != (message.tool_call_id is not None):
            raise Refusal(
                400, "'tool_call_id' belongs to messages with role 'tool', which need it.", param=f"{at}.tool_call_id"
            )
        if message.role == "tool" and message.tool_call_id not in called:
            raise Refusal(
                400,
                "A message with role 'tool' must be a response to a preceding message with 'tool_calls'.",
                param=f"{at}.tool_call_id",
            )
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments or "{}") for call in message.tool_calls or ()
        )
        called |= {call.id for call in calls}
        role = "system" if message.role == "developer" else message.role
        found.append(Message(role, message.text, calls, message.tool_call_id))
    return tuple(found)


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool as the model sees it: what was said of it and nothing else, always in one order."""
    said = tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": said}


# -- text --------------------------------------------------------------------------------------------------------------


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    DIFFERS = {
        **Sampled.DIFFERS,
        "suffix": "the infilling format, if the model was pretrained with holes, or has the marks in its vocabulary",
        "echo": "with `logprobs`, the prompt's own log-probabilities too",
        "logprobs": "the chosen token is always among the best, with the very same number",
    }

    prompt: Texts = Field(default_factory=lambda: [""])
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        super().check()
        n, best_of = self.n or 1, self.best_of
        if best_of is not None and best_of < n:
            raise Refusal(400, f"'best_of' is {best_of}, expected at least 'n', which is {n}.", param="best_of")
        if best_of is not None and best_of > n and self.stream:
            raise Refusal(
                400, "Which reply is the best is known at the end: no 'stream' with 'best_of'.", param="stream"
            )
        if self.suffix and self.echo:
            raise Refusal(400, "'echo' and 'suffix' do not go together.", param="echo")


class EditRequest(Wish):
    """POST /v1/edits"""

    model: Name
    instruction: str
    input: str | None = None
    n: Annotated[int, Field(ge=1, le=20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


class EmbeddingRequest(Wish):
    """POST /v1/embeddings"""

    DIFFERS = {
        "dimensions": "the first numbers of a vector, made as long as before",
        "user": "accepted; nothing depends on it",
    }

    model: Name
    input: Texts
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


# -- tokens ------------------------------------------------------------------------------------------------------------


class TokenizeRequest(Wish):
    """POST /tokenize: a text, or a conversation as it is put before a model. No vocabulary here adds tokens to a text."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """What one field says of another. Raises Refusal."""
        if (self.prompt is None) == (self.messages is None):
            raise Refusal(400, "Give 'prompt' or 'messages', one of them.", param="prompt")
        if self.messages is None and (self.tools is not None or self.add_generation_prompt is not None):
            raise Refusal(400, "'tools' and 'add_generation_prompt' belong to 'messages'.", param="messages")


class DetokenizeRequest(Wish):
    """POST /detokenize"""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


REQUESTS: tuple[type[Wish], ...] = (
    ChatRequest, CompletionRequest, EditRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip
