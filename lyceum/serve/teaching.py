"""Live teaching: answers told at reading speed, keys pressed meanwhile, and the next segments chosen by what they said.

| route | what it does |
|---|---|
| POST /api/messages/{id}/presses | when each piece of an answer was put on the screen, and the keys so far; what was credited |
| GET /api/teaching | how much was taught, by model |
| DELETE /api/teaching/{model} | all that was taught to it is forgotten, really |

An answer is taught where its request has `teach`: it is told in segments (`lyceum.engine.segments`), each the best of a few
candidates by what its owner has taught that model so far, and shown at a pace at which a person can press. A report of the
page holds all that it has shown and all that was pressed, so one that is lost is made good by the next. It is learned from at
once (`lyceum.engine.tamer`): candidates for a segment are drawn while the one before is read, and chosen when it has been.

**What is kept** is the presses, as judgements (`lyceum.serve.judgements`), with consent or without: whoever deletes a
conversation or an account deletes them. What was learned is kept in memory only, by owner and model, and learned again from
the latest presses after a restart, and when the weights behind a name have changed (their fingerprint).

What it is not: training. The model stays as it is; `lyceum feedback export --format presses` gives the same events to `[tamer]`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.segments import Ends, Telling, mean_states, segment_states
from lyceum.engine.sequence import Output
from lyceum.engine.stream import TextStream, offsets
from lyceum.engine.tamer import Delay, Lesson, Press, Taste, times_of
from lyceum.errors import NotFound
from lyceum.log import log
from lyceum.serve.app import private, read
from lyceum.serve.chat import chat_of
from lyceum.serve.guard import caller_of
from lyceum.serve.judgements import Judgement, Piece
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal
from lyceum.serve.service import Job, Service, Wanted, off_loop
from lyceum.serve.store import Store
from lyceum.serve.wishes import Presses, Teach
from lyceum.serve.worker import News

T = TypeVar("T")
DELAY = Delay()  # between seeing and pressing: Knox and Stone's 0.2 to 0.8 s
MAX_LESSONS = 64  # latest answers that a taste is learned from
MAX_PUPILS = 256  # owners and models that are in memory
MAX_WATCHED = 1024  # latest answers that can still be taught
AGAIN_S = 1.0  # after which a segment is asked for again where the server was full
Told = dict[str, Any]


# -------------------------------------------------------------------------------- an answer, told


class Gone(Exception):
    """It was closed."""


class Recital:
    """An answer told segment by segment at a pace; for its reader a `lyceum.serve.service.Job` of one reply.

    pace: tokens a second.
    """

    def __init__(self, service: Service, served: Served, caller: Caller, telling: Telling, pupil: Pupil, pace: float):
        self.served, self.telling, self.pupil = served, telling, pupil
        self.wanted: Wanted = [(telling.prompt, telling.params)]
        self._service, self._caller, self._pace = service, caller, pace
        self._gone = asyncio.get_running_loop().create_future()
        self._drawing: asyncio.Task[list[Output]] | None = None

    async def begin(self) -> None:
        """Ask for the first segment. Raises Refusal where that is not let in."""
        if not self.telling.is_over:
            self._drawing = asyncio.create_task(self._outputs(await self._ask()))

    async def __aiter__(self) -> AsyncIterator[News]:
        telling, clock = self.telling, asyncio.get_running_loop().time
        at = clock()
        try:
            while self._drawing is not None:
                outputs = await self._unless_gone(self._drawing)
                rows = telling.rows(outputs)
                phi_ND = await self._unless_gone(
                    self._service.worker.call(lambda rows=rows: mean_states(self.served.engine, rows))  # type: ignore[misc]
                )
                ids = telling.take(outputs, phi_ND, self.pupil.taste)
                self._drawing = None if telling.is_over else asyncio.create_task(self._drawn())
                for token in ids:
                    at = max(at, clock()) + 1 / self._pace
                    yield News(0, [token])
                    await self._unless_gone(asyncio.sleep(at - clock()))
        except Gone:
            return
        yield News(0, [], output=Output(0, telling.reply, telling.finish or "length"))

    def close(self) -> None:
        """It is over, or nobody waits for it any more. May be called again."""
        if not self._gone.done():
            self._gone.set_result(None)
        if self._drawing is not None:
            self._drawing.cancel()

    async def _ask(self) -> Job:
        wanted = self.telling.wanted(self.pupil.taste.is_taught)
        return await self._service.open(self.served, wanted, self._caller)

    async def _drawn(self) -> list[Output]:
        """The next segment's candidates; where the server is full, they are waited for."""
        while True:
            try:
                return await self._outputs(await self._ask())
            except Refusal as refusal:
                if refusal.status != 429:
                    raise
                await asyncio.sleep(AGAIN_S)

    @staticmethod
    async def _outputs(job: Job) -> list[Output]:
        try:
            return await job.outputs()
        finally:
            job.close()

    async def _unless_gone(self, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise Gone
            return task.result()
        finally:
            if not task.done():
                task.cancel()


# -------------------------------------------------------------------------------- who is taught


class Pupil:
    """What one owner has taught one model, of one fingerprint; ready: once the store's lessons have been learned."""

    def __init__(self, fingerprint: str, ends: Ends):
        self.fingerprint, self.ends = fingerprint, ends
        self.lessons: OrderedDict[str, Lesson] = OrderedDict()
        self.taste = Taste()
        self.ready = asyncio.Event()
        self._lock = asyncio.Lock()

    async def teach(self, key: str, lesson: Lesson) -> None:
        """Put a lesson in its place; what is chosen from now on is chosen with it. One that says nothing takes its place away."""
        async with self._lock:
            self.lessons.pop(key, None)
            if float(lesson.weight_N.sum()) > 0:
                self.lessons[key] = lesson
            while len(self.lessons) > MAX_LESSONS:
                self.lessons.popitem(last=False)
            self.taste = await asyncio.to_thread(Taste, list(self.lessons.values()))


@dataclass
class Report:
    """What one view of an answer has told: pieces as shown, presses. judgement: where they are kept; empty: not yet."""

    shown: tuple[Piece, ...]
    presses: tuple[tuple[float, float], ...]
    consent: bool
    judgement: str = ""


@dataclass
class Watched:
    """An answer that can be taught: whose it is, how it is told, who learns, and what was reported of it, by view."""

    owner: str
    served: Served
    telling: Telling
    pupil: Pupil
    reports: dict[str, Report] = field(default_factory=dict)
    is_over: bool = False  # its text is in the store
    is_forgotten: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Teaching:
    """All that is being taught on this server."""

    def __init__(self, service: Service, store: Store):
        self.service, self.store = service, store
        self.pupils: OrderedDict[tuple[str, str], Pupil] = OrderedDict()
        self.watched: OrderedDict[str, Watched] = OrderedDict()
        self._keeping: set[asyncio.Task[None]] = set()

    # -- answers

    async def open(
        self, served: Served, prompt: Sequence[int], params: SamplingParams, caller: Caller, teach: Teach
    ) -> Recital:
        """A model begins to answer somebody who teaches it. Raises Refusal."""
        pupil = await self.pupil(caller.id, served)
        bytes_of = served.tokenizer.token_bytes
        telling = Telling(prompt, params, pupil.ends, served.context_length, teach.candidates, bytes_of)
        recital = Recital(self.service, served, caller, telling, pupil, teach.pace)
        await recital.begin()
        return recital

    def begun(self, message: str, caller: Caller, recital: Recital, answering: asyncio.Task[None]) -> None:
        """An answer is under way: from now on presses on it are taken. answering: ends when it is in the store."""
        watched = self.watched[message] = Watched(caller.id, recital.served, recital.telling, recital.pupil)
        while len(self.watched) > MAX_WATCHED:
            self.watched.popitem(last=False)
        task = asyncio.create_task(self._keep_when_over(message, watched, answering))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def pressed(self, caller: Caller, message: str, wish: Presses) -> Told:
        """Learn from a report. Raises Refusal where the answer cannot be taught."""
        watched = self.watched.get(message)
        if watched is None or watched.owner != caller.id:
            raise Refusal(404, "This answer was not told to be taught, or long ago.", code="not_found")
        telling = watched.telling
        if wish.shown_tokens[-1] > len(telling.reply):
            raise Refusal(400, f"So far the answer has {len(telling.reply)} tokens.", param="shown_tokens")
        bytes_of, last_s = watched.served.tokenizer.token_bytes, max(wish.press_s, default=0.0)
        shown = shown_pieces(telling.reply, wish.shown_tokens, wish.shown_s, last_s, bytes_of)
        num_shown = sum(begin < wish.shown_tokens[-1] for begin, _ in telling.spans)
        began_s = [_when(begin, wish) for begin, _ in telling.spans[:num_shown]]
        presses = [Press(time_s, float(value)) for time_s, value in zip(wish.press_s, wish.press_values, strict=True)]
        lesson = Lesson.of(torch.stack(telling.phi[:num_shown]), began_s, presses, DELAY)
        async with watched.lock:
            before = watched.reports.get(wish.view)
            said = tuple((press.time_s, press.value) for press in presses)
            watched.reports[wish.view] = Report(shown, said, wish.consent, before.judgement if before else "")
            await watched.pupil.teach(f"{message}/{wish.view}", lesson)
            if watched.is_over:
                await self._keep(message, watched)
        texts = _texts(telling, num_shown, bytes_of)
        rows = zip(texts, lesson.label_N.tolist(), lesson.weight_N.tolist(), strict=True)
        told = [{"text": text, "label": round(label, 3), "weight": round(weight, 3)} for text, label, weight in rows]
        return {"segments": told, "lessons": len(watched.pupil.lessons)}

    # -- what is kept

    async def state(self, caller: Caller) -> Told:
        """How much was taught, by model."""
        found: dict[str, Told] = {}
        for one in await asyncio.to_thread(self.store.judgements.presses, caller.id):
            counted = found.setdefault(one.answers[0].model, {"answers": 0, "presses": 0})
            counted["answers"] += 1
            counted["presses"] += len(one.presses or ())
        return {"taught": found}

    async def forget(self, caller: Caller, model: str) -> Told:
        """Forget what a model was taught: the presses are deleted, and nobody learns from them again."""
        for watched in self.watched.values():
            if (watched.owner, watched.served.name) == (caller.id, model):
                watched.is_forgotten = True
        self.watched = OrderedDict((id, one) for id, one in self.watched.items() if not one.is_forgotten)
        self.drop(caller.id, model)
        return {"forgotten": await asyncio.to_thread(self.store.judgements.forget_presses, caller.id, model)}

    def drop(self, owner: str, model: str | None = None) -> None:
        """What an owner's models have learned is out of date: it is learned again from what is kept by then."""
        for key in [key for key in self.pupils if key[0] == owner and model in (None, key[1])]:
            del self.pupils[key]

    async def pupil(self, owner: str, served: Served) -> Pupil:
        """Who learns from an owner: as before, or all that is kept learned again."""
        key = (owner, served.name)
        found = self.pupils.get(key)
        if found is not None and found.fingerprint == served.fingerprint:
            self.pupils.move_to_end(key)
            await found.ready.wait()
            return found
        ends = await asyncio.to_thread(Ends.of, served.tokenizer.token_bytes)
        found = self.pupils[key] = Pupil(served.fingerprint, ends)
        while len(self.pupils) > MAX_PUPILS:
            self.pupils.popitem(last=False)
        try:
            kept = await asyncio.to_thread(self.store.judgements.presses, owner, served.name)
            for one in kept[-MAX_LESSONS:]:
                if (lesson := await self._learned(served, found.ends, one)) is not None:
                    found.lessons[one.id] = lesson
            found.taste = await asyncio.to_thread(Taste, list(found.lessons.values()))
        except BaseException:
            self.pupils.pop(key, None)
            raise
        finally:
            found.ready.set()
        return found

    async def _learned(self, served: Served, ends: Ends, one: Judgement) -> Lesson | None:
        """A lesson from what is kept, by the weights of now; None where it was an answer to nothing."""
        prompt, shown = one.prompt, one.shown or ()
        if prompt is None or not shown:
            return None
        text = "".join(piece for _, _, piece in shown)
        tokenizer, format = served.tokenizer, chat_of(served)
        asked, reply = await off_loop(len(text), lambda: (format.prompt(prompt), tokenizer.encode(text)))
        reply = reply[: served.context_length - 1]
        if not reply:
            return None
        asked = asked[-(served.context_length - len(reply)) :]  # the oldest of it where both have no room
        spans = ends.spans(reply)
        times = times_of(shown, offsets(tokenizer.token_bytes, reply))
        phi_ND = await self.service.worker.call(lambda: segment_states(served.engine, asked, reply, spans))
        presses = [Press(*press) for press in one.presses or ()]
        return Lesson.of(phi_ND, [times[begin][0] for begin, _ in spans], presses, DELAY)

    async def _keep_when_over(self, message: str, watched: Watched, answering: asyncio.Task[None]) -> None:
        await asyncio.wait({answering})
        async with watched.lock:
            watched.is_over = True
            try:
                await self._keep(message, watched)
            except Exception as error:  # the disk, the database: the next report tries again
                log.warning(f"presses on an answer could not be kept: {error}")

    async def _keep(self, message: str, watched: Watched) -> None:
        """Write down what was reported; in place of what the same view reported before."""
        for report in watched.reports.values():
            if watched.is_forgotten or not (report.presses or report.judgement):
                continue
            try:
                report.judgement = await asyncio.to_thread(
                    self.store.judgements.press,
                    watched.owner, message, report.shown, report.presses,
                    consent=report.consent, replaces=report.judgement,
                )  # fmt: skip
            except NotFound:  # the answer was deleted meanwhile
                self.drop(watched.owner, watched.served.name)
                return
        key = (watched.owner, watched.served.name)
        if self.pupils.get(key) is not watched.pupil:  # another has taken its place, and does not know of this
            self.pupils.pop(key, None)


def shown_pieces(
    reply: Sequence[int], tokens: Sequence[int], seconds: Sequence[float], last_s: float, token_bytes: Sequence[bytes]
) -> tuple[Piece, ...]:
    """Pieces of text as they were shown, (from, until, text), of a reply whose first `tokens[i]` were there at `seconds[i]`.

    last_s: until when it was looked at; the last piece is the newest until then.
    """
    stream, found, begin = TextStream(token_bytes), [], 0
    untils = [*seconds[1:], max(seconds[-1], last_s)]
    for end, shown_s, until_s in zip(tokens, seconds, untils, strict=True):
        found.append((shown_s, until_s, stream.feed(reply[begin:end])))
        begin = end
    return tuple(found)


def _when(token: int, wish: Presses) -> float:
    """When a token of the reply was first on the screen."""
    return next(s for count, s in zip(wish.shown_tokens, wish.shown_s, strict=True) if count > token)


def _texts(telling: Telling, num: int, token_bytes: Sequence[bytes]) -> list[str]:
    stream = TextStream(token_bytes)
    return [stream.feed(telling.reply[begin:end]) for begin, end in telling.spans[:num]]


# -------------------------------------------------------------------------------- routes


def teaching_routes(teaching: Teaching) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False, default_response_class=Response)

    @router.post("/api/messages/{id}/presses")
    async def presses(request: Request, id: str) -> Response:
        wish = await read(request, Presses, teaching.service)
        return private(await teaching.pressed(caller_of(request), id, wish))

    @router.get("/api/teaching")
    async def state(request: Request) -> Response:
        return private(await teaching.state(caller_of(request)))

    @router.delete("/api/teaching/{model:path}")
    async def forget(request: Request, model: str) -> Response:
        return private(await teaching.forget(caller_of(request), model))

    return router
