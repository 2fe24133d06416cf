"""Answers of the chat page: from the engine into the store, whoever looks on.

    answers = Answers(service, store)
    message = await answers.begin(caller, draft, job, ...)      # goes on by itself, to its end
    async for news in answers.follow(caller, message, 0): ...   # as often and as late as anybody likes
    answers.stop(caller, message)

An answer belongs to no connection: who closes the page and comes back finds it where it is, and only `stop` stops it. What
is sent to somebody is made from what the answer is by then and what they have already, so that a slow reader costs
no memory: in between, news join.

What it is not: routes (`lyceum.serve.pages`), or text as HTML (`lyceum.serve.render`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lyceum.corpus.records import Conversation, Message
from lyceum.engine.stream import TextStream
from lyceum.errors import NotFound
from lyceum.log import log
from lyceum.serve.answers import FINISH
from lyceum.serve.chat import chat_of, check_size
from lyceum.serve.drafts import INTERRUPTED, Draft
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.refusals import of_error, too_long
from lyceum.serve.render import Blocks
from lyceum.serve.service import Service, Wanted, off_loop
from lyceum.serve.store import Store
from lyceum.serve.tree import StoredMessage
from lyceum.serve.worker import News

TELL_EVERY_S = 0.04  # to one reader; a frame or two of a screen
MAX_FACTS = 10_000  # of the latest answers
LEAST_S = 0.02  # in which a speed can be measured
LOOK_EVERY_S = 1.0  # at an answer that another server writes
Told = dict[str, Any]
AsJson = Callable[[StoredMessage], Told]


class OneReply(Protocol):
    """What writes an answer: a `lyceum.serve.service.Job` of one reply, or a `lyceum.serve.teaching.Recital`."""

    served: Served
    wanted: Wanted

    def __aiter__(self) -> AsyncIterator[News]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers.

    num_dropped: messages that had no room. num_begun: ids of its own answer, with which it goes on.
    """

    ids: list[int]
    num_dropped: int
    num_begun: int


async def prompt_of(served: Served, system: str, path: Sequence[StoredMessage], begun: str = "") -> Prompt:
    """The prompt of a conversation whose last message is to be answered.

    Where all of it leaves less than a quarter of the context for the answer, the oldest turns are left out, as in
    `lyceum.engine.session`; the system prompt never is. begun: the answer's own beginning.
    Raises Refusal where not even the last turn fits.
    """
    format = chat_of(served)
    head = (Message("system", system),) if system else ()
    records = tuple(message.record() for message in path)
    check_size(len(system) + len(records[-1].content) + len(begun), served, "content")
    size = sum(len(record.content) for record in records) + len(system) + len(begun)

    def make() -> Prompt:
        more = format.tokenizer.encode(begun) if begun else []
        turns = [at for at, record in enumerate(records) if record.role == "user"] or [0]
        room = served.context_length // 4
        for at in turns:
            ids = [*format.prompt(Conversation((*head, *records[at:]))), *more]
            if len(ids) + (room if at != turns[-1] else 1) <= served.context_length:
                return Prompt(ids, at, len(more))
        raise too_long(len(ids), served.context_length, "content")

    return await off_loop(size, make)


@dataclass(eq=False)
class Running:
    """One answer under way."""

    caller: Caller
    draft: Draft
    job: OneReply
    prompt: Prompt
    text: TextStream
    begun_at: float = field(default_factory=time.perf_counter)
    first_at: float = 0.0  # when its first token came
    num_tokens: int = 0  # made now, without what it goes on with
    is_over: bool = False
    message: StoredMessage | None = None  # once it is over, unless it was deleted meanwhile
    blocks: Blocks = field(default_factory=Blocks)
    unmade: str = ""  # text that `blocks` has not been given
    task: asyncio.Task[None] | None = None
    is_stopped: bool = False
    _waiting: set[asyncio.Event] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Since its first token."""
        return time.perf_counter() - self.first_at if self.first_at else 0.0

    def add(self, piece: str) -> None:
        """More text."""
        self.draft.append(piece)
        self.unmade += piece

    def wake(self) -> None:
        """Tell who looks on that something has come."""
        for event in self._waiting:
            event.set()

    def make(self) -> None:
        """Bring `blocks` up to date; only done where somebody looks on."""
        if self.unmade:
            piece, self.unmade = self.unmade, ""
            self.blocks.feed(piece)

    async def news(self, num_blocks: int) -> AsyncIterator[Told]:
        """What somebody who has so many finished blocks does not have yet, until the end of the text."""
        event = asyncio.Event()
        self._waiting.add(event)
        num_blocks = min(num_blocks, len(self.blocks.done))
        told: Told = {"from": num_blocks}
        version, num_tail = -1, 0
        try:
            while True:
                event.clear()
                is_over = self.is_over
                self.make()
                told |= {"blocks": self.blocks.done[num_blocks:], "tokens": self.num_tokens + self.prompt.num_begun}
                num_blocks = len(self.blocks.done)
                if version != self.blocks.version:
                    told["open"], version, num_tail = self.blocks.open, self.blocks.version, 0
                told |= {"tail": self.blocks.tail[num_tail:], "seconds": round(self.seconds, 3)}
                num_tail = len(self.blocks.tail)
                yield told
                if is_over:
                    return
                told = {}
                await asyncio.sleep(TELL_EVERY_S)
                await event.wait()
        finally:
            self._waiting.discard(event)


class Answers:
    """All answers under way."""

    def __init__(self, service: Service, store: Store):
        self.service, self.store = service, store
        self.running: dict[str, Running] = {}
        self.facts: dict[str, Told] = {}  # of answers that this server has made: speed, messages that had no room

    def begin(
        self, caller: Caller, draft: Draft, job: OneReply, prompt: Prompt, so_far: str = ""
    ) -> asyncio.Task[None]:
        """Let an answer write itself; returns what ends when it is in the store. so_far: the text of one that is gone on with."""
        params = job.wanted[0][1]
        text = TextStream(job.served.tokenizer.token_bytes, stop_strings=params.stop_strings)
        running = Running(caller, draft, job, prompt, text, unmade=so_far)
        self.running[draft.message] = running
        running.task = asyncio.get_running_loop().create_task(self._run(running))
        return running.task

    def stop(self, caller: Caller, message: str) -> bool:
        """Stop an answer: the engine lets it go before its next step. Returns whether it was under way."""
        running = self.running.get(message)
        if running is None or running.caller.id != caller.id:
            return False
        running.is_stopped = True
        running.job.close()
        return True

    def stop_all(self, caller: Caller) -> None:
        """Stop all answers of a caller."""
        for id in [id for id, running in self.running.items() if running.caller.id == caller.id]:
            self.stop(caller, id)

    async def follow(self, caller: Caller, message: str, num_blocks: int, as_json: AsJson) -> AsyncIterator[Told]:
        """News of an answer, and last the whole message; of one that has ended, only that. Raises NotFound."""
        running = self.running.get(message)
        if running is not None and running.caller.id == caller.id:
            async for told in running.news(num_blocks):
                yield told
            if running.message is not None:
                yield {"message": as_json(running.message)}
                return
        while (found := await asyncio.to_thread(self.store.message, caller.id, message)).state == "streaming":
            yield {"from": 0, "open": "", "tail": found.content}
            await asyncio.sleep(LOOK_EVERY_S)
        yield {"message": as_json(found)}

    async def _run(self, running: Running) -> None:
        state, reason = "stopped", "stop"
        try:
            async for one in running.job:
                running.first_at = running.first_at or time.perf_counter()
                running.num_tokens += len(one.ids)
                running.add(running.text.feed(one.ids))
                if one.output is not None:
                    state, reason = "done", FINISH[one.output.finish]
                running.wake()
        except Exception as error:
            refusal = of_error(error)
            state, reason = "failed", INTERRUPTED if refusal.code == "shutting_down" else "error"
            if refusal.status == 500:
                log.warning(f"an answer failed: {type(error).__name__}: {error}")
        finally:
            running.job.close()
        running.add(running.text.close())
        num_prompt = len(running.prompt.ids) - running.prompt.num_begun
        num_made = running.num_tokens + running.prompt.num_begun
        facts = self.facts[running.draft.message] = {"dropped": running.prompt.num_dropped}
        if running.num_tokens > 1 and running.seconds > LEAST_S:
            facts["tokens_per_second"] = round((running.num_tokens - 1) / running.seconds, 1)
        if len(self.facts) > MAX_FACTS:
            del self.facts[next(iter(self.facts))]
        try:
            running.message = await asyncio.to_thread(
                running.draft.finish, state, reason, prompt_tokens=num_prompt, completion_tokens=num_made
            )
        except NotFound:  # its conversation was deleted meanwhile: nobody will ask for it
            pass
        except Exception as error:  # the disk, the database: what the saver wrote is there, and reads as interrupted
            log.warning(f"an answer could not be saved: {error}")
        finally:
            running.is_over = True
            del self.running[running.draft.message]
            running.wake()
