"""A conversation with a model: a text in, a message out; the terminal, the evaluations and the server talk through it.

    session = Session(engine, chat, tools={"lookup": lookup}, params=SamplingParams(temperature=0.0, max_tokens=128))
    session.say("What does len do?").content
    for piece in session.stream("And sorted?"): print(piece, end="")

A reply's own ids are kept and never encoded again. Tools and guards come in as functions, so that the engine depends on
neither. When the conversation outgrows the context, the model no longer sees the oldest turns; `dropped` says how many
messages those are.

It is not a store and not safe to call from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lyceum.corpus.records import Conversation, Message
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.engine.stream import TextStream
from lyceum.errors import DataError
from lyceum.tokens.chat import ChatFormat

Tool = Callable[[str], str]  # the call's arguments as JSON text -> the result as text
Guard = Callable[[Message], Message | None]

MAX_TOOL_ROUNDS = 4  # replies in one turn whose calls are run; more is a model that goes round in circles


@dataclass
class Round:
    """Messages given to the model (the user's, or tool results) and what it replied."""

    given: tuple[Message, ...]
    reply: Message | None = None
    reply_ids: list[int] = field(default_factory=list)


class Session:
    """One conversation.

    tools: name -> function from the arguments' JSON text to a result; a failing tool's error is its result. guards:
    each sees every message before it counts (the user's, the model's, tool results). None lets it pass; a message of
    the same role stands in its place; an assistant's message in answer to another role is the reply, and the model is
    not asked. params: how replies are drawn (default: greedy). start: what stands before the first turn and is never
    dropped: a system message, the tools' schemas.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        *,
        tools: Mapping[str, Tool] | None = None,
        guards: Sequence[Guard] = (),
        params: SamplingParams | None = None,
        start: Conversation | None = None,
    ):
        self.engine = engine
        self.chat = chat
        self.tools = dict(tools or {})
        self.guards = tuple(guards)
        params = params or SamplingParams(max_tokens=256, temperature=0.0)
        self.params = replace(params, stop_ids=tuple(dict.fromkeys((*chat.stop_ids, *params.stop_ids))))
        self.start = start
        self.reset()

    def reset(self) -> None:
        """Begin anew, with `start` alone."""
        self._rounds: list[Round] = []
        self._first_seen = 0  # the first round that the model still sees

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said, dropped turns included."""
        said = list(self.start.messages) if self.start else []
        for round in self._rounds:
            said += [*round.given, *([round.reply] if round.reply else [])]
        return tuple(said)

    @property
    def conversation(self) -> Conversation | None:
        """All that was said as a record; None before anything was."""
        return Conversation(self.messages, self.start.tools if self.start else ()) if self.messages else None

    @property
    def dropped(self) -> int:
        """How many of the messages the model no longer sees."""
        return sum(len(round.given) + (round.reply is not None) for round in self._rounds[: self._first_seen])

    def say(self, text: str) -> Message:
        """The reply to a user's message, after all tool calls.

        Raises DataError if the message alone does not fit the context.
        """
        for _ in self.stream(text):
            pass
        reply = self._rounds[-1].reply
        assert reply is not None
        return reply

    def stream(self, text: str) -> Iterator[str]:
        """The same, piece by piece, whole characters only; tool calls do not show. With guards, a reply is one piece.

        Closing the generator, or Ctrl-C, stops the model at once; what it had said stays in the conversation. After any
        other error the conversation is as it was before.
        """
        num_before, first_seen = len(self._rounds), self._first_seen
        user = Message("user", text)
        given: tuple[Message, ...] = (user,)
        try:
            for num_calls in range(MAX_TOOL_ROUNDS + 1):
                guarded = tuple(self._guarded(message) for message in given)
                refusal = next((new for old, new in zip(given, guarded, strict=True) if new.role != old.role), None)
                if refusal is not None:
                    self._rounds.append(Round(given, refusal, self.chat.reply(refusal).ids))
                    yield refusal.content
                    return
                round = Round(guarded)
                self._rounds.append(round)
                yield from self._reply(round)
                if num_calls == MAX_TOOL_ROUNDS or not (given := self._run_tools(round)):
                    return
        except (GeneratorExit, KeyboardInterrupt):
            if self._rounds[num_before:] and self._rounds[-1].reply is None:
                self._rounds.pop()
            raise
        except BaseException:
            del self._rounds[num_before:]
            self._first_seen = first_seen
            raise

    def _reply(self, round: Round) -> Iterator[str]:
        tokenizer = self.chat.tokenizer
        text = TextStream(
            tokenizer.token_bytes,
            stop_strings=self.params.stop_strings,
            hold_at=(tokenizer.tool_call_start_id, tokenizer.tool_call_end_id),
        )
        ids: list[int] = []
        shown = ""
        growing = self.engine.follow(self._prompt(), self.params)
        try:
            while True:
                try:
                    new = next(growing)
                except StopIteration as end:
                    self._keep(round, end.value)
                    break
                ids += new
                piece = "" if self.guards else text.feed(new)
                shown += piece
                if piece:
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if ids:
                round.reply, round.reply_ids = self.chat.parse(ids), ids
            raise
        finally:
            growing.close()
        assert round.reply is not None
        if rest := round.reply.content[len(shown) :]:
            yield rest

    def _keep(self, round: Round, output: Output) -> None:
        """Take a finished reply into the conversation: its own ids, unless its text was changed."""
        if output.text_bytes is None:
            reply = self.chat.parse(output.ids)
        else:  # ended by a stop string: text, in which no call is looked for
            whole = b"".join(self.chat.tokenizer.token_bytes[token] for token in output.ids)
            reply = Message("assistant", whole[: output.text_bytes].decode("utf-8", "replace"))
        guarded = self._guarded(reply)
        is_own = guarded is reply and output.text_bytes is None
        round.reply, round.reply_ids = guarded, output.ids if is_own else self.chat.reply(guarded).ids

    def _guarded(self, message: Message) -> Message:
        for guard in self.guards:
            if (replacement := guard(message)) is not None:
                return replacement
        return message

    def _run_tools(self, round: Round) -> tuple[Message, ...]:
        assert round.reply is not None
        results = []
        for call in round.reply.tool_calls if self.tools else ():
            tool = self.tools.get(call.name)
            try:
                result = tool(call.arguments) if tool else f"error: there is no tool {call.name!r}"
            except Exception as error:  # whatever went wrong inside a tool, the model is told and the talk goes on
                result = f"error: {error}"
            results.append(Message("tool", result, tool_call_id=call.id))
        return tuple(results)

    def _prompt(self) -> list[int]:
        """Ids of what the model sees, up to its reply; the oldest turns go until a quarter of the context is free."""
        context = self.engine.context_length
        room = min(self.params.max_tokens, context // 4)
        turns = [
            at for at, round in enumerate(self._rounds) if round.given[0].role == "user" and at >= self._first_seen
        ]
        for at in turns:
            ids = self._ids_from(at)
            needed = len(ids) + (room if at != turns[-1] else 1)
            if needed <= context:
                self._first_seen = at
                return ids
        raise DataError(
            f"this turn alone has {len(ids)} tokens, the model's context is {context}",
            hint="ask with fewer words, or use a model with a longer context",
        )

    def _ids_from(self, first: int) -> list[int]:
        start, tools = (self.start.messages, self.start.tools) if self.start else ((), ())
        ids = self.chat.prompt(Conversation((*start, *self._rounds[first].given), tools))
        for before, round in zip(self._rounds[first:], self._rounds[first + 1 :], strict=False):
            ids = self.chat.continue_prompt([*ids, *before.reply_ids], round.given)
        return ids
