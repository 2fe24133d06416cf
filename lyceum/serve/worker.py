"""The one thread that owns the engines: requests in, tokens out.

    ticket = worker.submit(engine, [(prompt_ids, params)], key="alice")
    async for news in ticket: ...            # on the event loop; leaving early: ticket.cancel()
    vectors = await worker.call(lambda: engine.encode(rows))

The thread turns like this: do what was asked meanwhile (new requests, cancellations, calls), then let each engine that has
work make one step, then tell the event loop what came of it, once for everybody. So a request that is cancelled leaves its
engine before the next step, and an engine is never touched by two threads. JSON, text and HTTP stay on the other side.

An engine can be replaced by one of another model while it runs: it makes the replies that it has begun, and leaves.

A step that fails ends the requests of its engine, with the error, and nobody else's; if the engine cannot let them go, a
fresh one of the same model stands in its place.

What it is not: a queue with limits (`lyceum.serve.limits`); whoever submits has been let in.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.log import log
from lyceum.serve.refusals import Refusal

T = TypeVar("T")
STOPPED = "The server is shutting down."


class Gone(Exception):
    """The client has left: nobody waits for the answer."""


@dataclass(frozen=True)
class News:
    """What one of a ticket's requests got since the last time.

    place: which of them. ids: new tokens; of a reply that is finished, those that were not told yet. so_far: all it has,
    with log-probabilities, where the ticket wants scores. output: the whole reply, once it is finished.
    """

    place: int
    ids: list[int]
    so_far: Output | None = None
    output: Output | None = None


class Seat:
    """One engine, which may be replaced by a fresh one of the same model."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.live: dict[int, tuple[Ticket, int]] = {}  # request -> whose it is, and which of theirs
        self.is_leaving = False  # another has its place; it goes once its last reply has ended


@dataclass(eq=False)
class Ticket:
    """Requests to one engine that belong together. An async iterator of their news, which ends when all are finished."""

    worker: Worker
    seat: Seat
    wanted: Sequence[tuple[Sequence[int], SamplingParams]]
    key: str
    is_background: bool
    follows: bool  # news of every step, not only of the end
    wants_scores: bool
    loop: asyncio.AbstractEventLoop
    num_left: int = 0
    num_made: int = 0  # tokens told so far
    is_accepted: bool = False
    _news: deque[News] = field(default_factory=deque)
    _error: Exception | None = None
    _is_closed: bool = False
    _waiter: asyncio.Future[None] | None = None
    ids: dict[int, int] = field(default_factory=dict)  # engine's id -> tokens told; the worker's own

    async def accepted(self) -> None:
        """Wait until the engine has taken all of it. Raises what it said if it did not."""
        while not self.is_accepted and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    @property
    def is_under_way(self) -> bool:
        """Whether the engine has taken it, and it is neither finished nor failed."""
        return self.is_accepted and self._error is None and self.num_left > 0

    @property
    def has_news(self) -> bool:
        """Whether something has come that was not read yet."""
        return bool(self._news)

    async def __aiter__(self) -> AsyncIterator[News]:
        while self.num_left or self._news:
            while not self._news:
                if self._error is not None:
                    raise self._error
                if self._is_closed:
                    return
                await self._wait()
            yield self._news.popleft()

    def cancel(self) -> None:
        """Give up: nothing more comes."""
        self.close()
        self.worker.drop(self)

    def close(self) -> None:
        """Wake whoever waits: nothing more comes."""
        self._is_closed = True
        self._wake()

    def tell(self, news: Sequence[News], error: Exception | None = None) -> None:
        """Hand over news; on the event loop."""
        self.is_accepted = True
        self._news += news
        self.num_left -= sum(one.output is not None for one in news)
        self.num_made += sum(len(one.ids) for one in news)
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self.loop.create_future()
        await self._waiter


class Worker:
    """The thread. One for a server, whatever the number of its models."""

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self.num_failures = 0  # steps that failed
        self._asked: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive() and not self._is_stopping

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is being made; what is under way ends with an error."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- from the event loop ------------------------------------------------------------------------------------------

    def submit(
        self,
        seat: Seat,
        wanted: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        key: str = "",
        is_background: bool = False,
        follows: bool = False,
        wants_scores: bool = False,
    ) -> Ticket:
        """Ask for replies; see `Engine.add` for key and is_background."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(self, seat, wanted, key, is_background, follows, wants_scores, loop, num_left=len(wanted))
        self._ask(lambda: self._add(ticket))
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Let go of what a ticket asked for, before the next step."""
        self._ask(lambda: self._drop(ticket))

    async def call(self, work: Callable[[], T]) -> T:
        """Do something on the engines' thread, between two steps."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                done.set_exception(error) if error is not None else done.set_result(result)  # type: ignore[arg-type]

        def do() -> None:
            if self._is_stopping:
                loop.call_soon_threadsafe(settle, None, Refusal(503, STOPPED, code="shutting_down"))
                return
            try:
                result = work()
            except Exception as error:  # it is the caller's
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, result, None)

        self._ask(do)
        return await done

    def replace(self, old: Seat, new: Seat) -> None:
        """Seat another engine. The old one ends what it has begun, and is let go. From any thread."""

        def do() -> None:
            old.is_leaving = True
            self.seats = [*self.seats, new]

        self._ask(do)

    def retire(self, seat: Seat) -> None:
        """An engine that is asked no more: it ends what it has begun, and is let go. From any thread."""

        def do() -> None:
            seat.is_leaving = True

        self._ask(do)

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.append(work)
        self._wake.set()

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            while self._asked:
                self._asked.popleft()()
            if not self._turn():
                self._wake.wait()
        error = Refusal(503, STOPPED, code="shutting_down", retry_after_s=5.0)
        while self._asked:
            self._asked.popleft()()
        for seat in self.seats:
            self._end(seat, error)

    def _turn(self) -> bool:
        """A step of each engine that has work; whether one had. A method of its own, so that no name keeps a seat that left."""
        is_busy = False
        for seat in self.seats:
            if not seat.engine.is_idle:
                is_busy = True
                self._step(seat)
        if any(seat.is_leaving for seat in self.seats):
            self.seats = [seat for seat in self.seats if not (seat.is_leaving and seat.engine.is_idle)]
        return is_busy

    def _add(self, ticket: Ticket) -> None:
        if ticket._is_closed:
            return
        if ticket.seat not in self.seats:  # it was let in just before its engine left
            self.seats = [*self.seats, ticket.seat]
        engine, live = ticket.seat.engine, ticket.seat.live
        try:
            for place, (prompt, params) in enumerate(ticket.wanted):
                id = engine.add(prompt, params, key=ticket.key, is_background=ticket.is_background)
                ticket.ids[id] = 0
                live[id] = ticket, place
        except Exception as error:
            self._drop(ticket)
            self._tell({ticket: []}, error)
            return
        self._tell({ticket: []})

    def _drop(self, ticket: Ticket) -> None:
        for id in ticket.ids:
            if ticket.seat.live.pop(id, None) is not None:
                ticket.seat.engine.abort(id)
        ticket.ids.clear()

    def _step(self, seat: Seat) -> None:
        engine = seat.engine
        try:
            finished = engine.step()
        except Exception as error:
            self.num_failures += 1
            log.warning(f"a step failed: {type(error).__name__}: {error}")
            self._end(seat, error)
            return
        news: dict[Ticket, list[News]] = {}
        for output in finished:
            if (found := seat.live.pop(output.id, None)) is not None:
                ticket, place = found
                num_told = ticket.ids.pop(output.id)
                news.setdefault(ticket, []).append(News(place, output.ids[num_told:], output, output))
        for id, (ticket, place) in seat.live.items():
            if ticket.follows and (new := engine.reply(id, ticket.ids[id])):
                ticket.ids[id] += len(new)
                so_far = engine.so_far(id) if ticket.wants_scores else None
                news.setdefault(ticket, []).append(News(place, new, so_far))
        if news:
            self._tell(news)

    def _end(self, seat: Seat, error: Exception) -> None:
        """All requests of an engine end, with an error."""
        tickets: dict[Ticket, list[News]] = {ticket: [] for ticket, _ in seat.live.values()}
        try:
            for id in list(seat.live):
                seat.engine.abort(id)
        except Exception:  # its books do not agree any more
            seat.engine = seat.engine.sibling()
        seat.live.clear()
        for ticket in tickets:
            ticket.ids.clear()
        if tickets:
            self._tell(tickets, error)

    @staticmethod
    def _tell(news: dict[Ticket, list[News]], error: Exception | None = None) -> None:
        loops: dict[Any, list[tuple[Ticket, list[News]]]] = {}
        for ticket, found in news.items():
            loops.setdefault(ticket.loop, []).append((ticket, found))

        def tell(told: list[tuple[Ticket, list[News]]]) -> None:
            for ticket, found in told:
                ticket.tell(found, error)

        for loop, told in loops.items():
            try:
                loop.call_soon_threadsafe(tell, told)
            except RuntimeError:  # the loop has been closed: nobody listens
                pass
