"""What is expected in a file of lines, and whether a file holds it: read line by line, refused with the line that is wrong.

    found = CHECKS["fine-tune"](path, limits, served)        # Found, or Refusal (400) that begins with the line

Three shapes of training examples, told apart by their first line, as OpenAI's platform has them:

    {"messages": [..., {"role": "assistant", ...}]}                               supervised; "weight": 0 leaves an answer out
    {"input": {"messages": [...]}, "preferred_output": [m], "non_preferred_output": [m]}      dpo
    {"messages": [..., {"role": "user", ...}], "answer": "..."}                   reinforcement; other fields are the grader's

and the requests of a batch: {"custom_id", "method": "POST", "url", "body"}. Lengths in tokens are those of a model that chats,
if one is given. A line's bytes were bounded when it came (`lyceum.serve.files.uploads`), its values are here.

What it is not: whether a request of a batch can be answered, which its own route decides (`lyceum.serve.protocol`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lyceum.corpus.records import Conversation, Message, Ranking
from lyceum.errors import DataError
from lyceum.serve.limits import Limits
from lyceum.serve.models import Served
from lyceum.serve.protocol import ChatMessage, Tool, Wish, read_messages, tool_json
from lyceum.serve.refusals import Refusal, of_validation

METHODS = ("supervised", "dpo", "reinforcement")
SHAPES = (
    '{"messages": [...]} that end with the assistant (supervised) or with the user (reinforcement), or {"input", '
    '"preferred_output", "non_preferred_output"} (dpo)'
)
MAX_BATCH_LINES = 50_000
Record = Conversation | Ranking


@dataclass(frozen=True)
class Found:
    """What a file holds. kind: of training examples, their method; else "batch". tokens: of all examples together; longest:
    of the longest; too_long: examples that do not fit into the model's context; model: whose tokens they are."""

    kind: str
    lines: int
    tokens: int = 0
    longest: int = 0
    too_long: int = 0
    model: str = ""

    @property
    def line(self) -> str:
        """It for a person."""
        if self.kind == "batch":
            return f"{self.lines:,} requests"
        said = f"{self.lines:,} {self.kind} examples"
        if self.model:
            said += f", {self.tokens:,} tokens of {self.model}, the longest {self.longest:,}"
        return said + (f"; {self.too_long:,} do not fit into its context" if self.too_long else "")

    def to_json(self) -> dict[str, Any]:
        """It for programs."""
        return asdict(self)


# -- training examples -------------------------------------------------------------------------------------------------


class Learned(ChatMessage):
    """A message to learn from. weight: 0 leaves what the assistant says out of the loss."""

    weight: Literal[0, 1] | None = None


class Example(Wish):
    """A line for the method `supervised`."""

    NOT_FOLLOWED = {
        "functions": ("use tools", ([],)),
        "parallel_tool_calls": ("it is seen in the calls", (True, False)),
    }
    messages: Annotated[list[Learned], Field(min_length=1, max_length=2048)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class Asked(Wish):
    """What both answers of a pair answer."""

    NOT_FOLLOWED = Example.NOT_FOLLOWED
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class Pair(Wish):
    """A line for the method `dpo`."""

    input: Asked
    preferred_output: Annotated[list[ChatMessage], Field(min_length=1, max_length=1)]
    non_preferred_output: Annotated[list[ChatMessage], Field(min_length=1, max_length=1)]


class Task(Asked):
    """A line for the method `reinforcement`; what else it holds is for the grader."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


def shape_of(row: Any) -> str:
    """The method that a line is for, by its keys; empty if it is for none."""
    if not isinstance(row, dict):
        return ""
    if "preferred_output" in row or "non_preferred_output" in row:
        return "dpo"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return ""
    return {"assistant": "supervised", "user": "reinforcement"}.get(str(messages[-1].get("role")), "")


def record_of(row: Any, kind: str) -> Record:
    """A line as the record that is learned from: a conversation, a ranking of two, or a prompt whose meta is the line.

    Raises:
        ValidationError, Refusal: it is none.
    """
    if kind == "dpo":
        pair = Pair.model_validate(row)
        prompt = Conversation(_messages(pair.input.messages, "input.messages"), _tools(pair.input.tools))
        answers = []
        for name in ("preferred_output", "non_preferred_output"):
            (answer,) = _messages(getattr(pair, name), name)
            if answer.role != "assistant":
                raise Refusal(400, f"It is a {answer.role} message, expected the assistant's.", param=f"{name}[0].role")
            answers.append(answer)
        if answers[0] == answers[1]:
            raise Refusal(400, "It is the same as 'preferred_output'.", param="non_preferred_output")
        return Ranking(prompt, tuple(answers), (1.0, 2.0))
    if kind == "reinforcement":
        task = Task.model_validate(row)
        item = {name: value for name, value in row.items() if name not in ("messages", "tools")}
        return Conversation(_messages(task.messages, "messages"), _tools(task.tools), {"item": item})
    example = Example.model_validate(row)
    messages = _messages(example.messages, "messages")
    weights = [message.weight for message in example.messages]
    for number, (message, weight) in enumerate(zip(messages, weights, strict=True)):
        if weight and message.role != "assistant":
            raise Refusal(400, "Only what the assistant says is learned.", param=f"messages[{number}].weight")
    known = tuple(
        Message(m.role, m.content, m.tool_calls, m.tool_call_id, None if weight is None else float(weight))
        for m, weight in zip(messages, weights, strict=True)
    )
    if not any(message.role == "assistant" and message.weight != 0 for message in known):
        raise Refusal(400, "There is nothing to learn: every answer has the weight 0.", param="messages")
    return Conversation(known, _tools(example.tools))


def _messages(given: list[Any], where: str) -> tuple[Message, ...]:
    try:
        return read_messages(given)
    except Refusal as refusal:
        refusal.param = (refusal.param or "").replace("messages", where, 1)
        raise


def _tools(given: list[Tool] | None) -> tuple[dict[str, Any], ...]:
    return tuple(tool_json(tool) for tool in given or ())


def read_examples(path: Path, limits: Limits, kind: str = "") -> Iterator[tuple[int, str, Record]]:
    """(line number, method, record) of each line of a file of training examples; kind: the only one that is expected.

    Raises:
        Refusal: the first line that is none, or not of the kind of those before it.
    """
    for number, row in read_lines(path, limits):
        own = shape_of(row)
        if not own:
            raise at_line(number, Refusal(400, f"expected {SHAPES}"))
        if own != (kind or own):
            raise at_line(number, Refusal(400, f"it is for {own}, and those before it are for {kind}"))
        kind = own
        try:
            yield number, kind, record_of(row, kind)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            shapes: dict[str, type[Wish]] = {"dpo": Pair, "supervised": Example, "reinforcement": Task}
            raise at_line(number, of_validation(found, row, [*shapes[kind].model_fields])) from None
        except (Refusal, ValueError) as error:
            raise at_line(number, error if isinstance(error, Refusal) else Refusal(400, str(error))) from None


def check_examples(path: Path, limits: Limits, served: Served | None) -> Found:
    """Read a file of training examples; lengths are counted in the tokens of a model that chats, if there is one.

    Raises:
        Refusal: the line that is wrong, or that the file is empty.
    """
    kind, lines, tokens, longest, too_long = "", 0, 0, 0, 0
    has_chat = served is not None and served.chat is not None
    for number, method, record in read_examples(path, limits):
        kind, lines = method, lines + 1
        if has_chat:
            try:
                length, most = lengths(record, served)  # type: ignore[arg-type]
            except DataError as error:  # such as tools, for a vocabulary that cannot say them
                raise at_line(number, Refusal(400, error.message)) from None
            tokens, longest = tokens + length, max(longest, most)
            too_long += most > served.context_length  # type: ignore[union-attr]
    if not lines:
        raise empty()
    return Found(kind, lines, tokens, longest, too_long, served.name if has_chat else "")  # type: ignore[union-attr]


def lengths(record: Record, served: Served) -> tuple[int, int]:
    """Tokens of an example, all of them and of its longest row: a pair is two rows."""
    assert served.chat is not None
    if isinstance(record, Ranking):
        prompt = len(served.chat.prompt(record.prompt))
        rows = [prompt + len(served.chat.reply(answer)) for answer in record.responses]
        return sum(rows), max(rows)
    is_open = record.messages[-1].role != "assistant"
    length = len(served.chat.prompt(record) if is_open else served.chat.render(record).ids)
    return length, length + is_open  # a prompt needs room for a reply


# -- batches -----------------------------------------------------------------------------------------------------------


class Request(Wish):
    """A line of a batch."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Annotated[str, Field(pattern=r"^/v1/[a-z_/]{1,64}$")]
    body: dict[str, Any]


def read_requests(path: Path, limits: Limits) -> Iterator[tuple[int, Request]]:
    """(line number, request) of each line of a batch's file.

    Raises:
        Refusal: the first line that is none, or has the custom_id or another url than one before it.
    """
    met: set[str] = set()
    url = ""
    for number, row in read_lines(path, limits):
        try:
            request = Request.model_validate(row)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            raise at_line(number, of_validation(found, row, [*Request.model_fields])) from None
        if request.custom_id in met:
            raise at_line(number, Refusal(400, "a line before it has the same custom_id", param="custom_id"))
        if request.url != (url or request.url):
            raise at_line(number, Refusal(400, "a batch has one url", param="url"))
        if number > MAX_BATCH_LINES:
            raise at_line(number, Refusal(400, f"a batch has at most {MAX_BATCH_LINES:,} requests"))
        met.add(request.custom_id)
        url = request.url
        yield number, request


def check_requests(path: Path, limits: Limits, served: Served | None) -> Found:
    """Read a batch's file. Raises Refusal: the line that is wrong, or that the file is empty."""
    lines = sum(1 for _ in read_requests(path, limits))
    if not lines:
        raise empty()
    return Found("batch", lines)


# -- lines -------------------------------------------------------------------------------------------------------------

CHECKS: Mapping[str, Callable[[Path, Limits, Served | None], Found]] = {
    "fine-tune": check_examples,
    "batch": check_requests,
}  # purpose -> what is done with a file of it when it comes


def read_lines(path: Path, limits: Limits) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of JSON that is not blank. Raises Refusal: the line that is none."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(limits.line_bytes + 2):
            number += 1
            if len(line.rstrip(b"\r\n")) > limits.line_bytes:
                raise at_line(number, Refusal(400, f"it is longer than {limits.line_bytes} bytes"))
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            if line.count(b",") + line.count(b"[") + line.count(b"{") > limits.items:
                raise at_line(number, Refusal(400, f"it has too many values: at most {limits.items}"))
            try:
                yield number, from_json(line, allow_inf_nan=False)
            except ValueError as error:
                raise at_line(number, Refusal(400, f"it is no JSON: {error}")) from None


def at_line(number: int, refusal: Refusal) -> Refusal:
    """What is wrong with a line, as what is wrong with its file."""
    field = f"'{refusal.param}': " if refusal.param and refusal.param not in refusal.message else ""
    said = f"Line {number} of the file: {field}{refusal.message}"
    return Refusal(400, said, param="file", code="invalid_file_format")


def empty() -> Refusal:
    """A file without a line."""
    return Refusal(400, "The file is empty.", param="file", code="empty_file")
