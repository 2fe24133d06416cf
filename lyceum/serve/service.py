"""What the routes share: the models, the worker, who has how much, and the server's numbers.

    service = Service([served], limits=Limits()); service.start()
    job = await service.open(served, wanted, caller)          # let in, and accepted by the engine
    outputs = await job.outputs(); job.close()

The pages get their models and their callers here too.

What it is not: HTTP (`lyceum.serve.app`) or text (`lyceum.serve.answers`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.errors import UsageError, did_you_mean
from lyceum.serve.limits import EVERYBODY, Caller, Limits, Quota
from lyceum.serve.metrics import Metrics
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal, too_long
from lyceum.serve.worker import Gone, News, Ticket, Worker

if TYPE_CHECKING:
    from lyceum.serve.tuning.shelf import Shelf

T = TypeVar("T")
Wanted = Sequence[tuple[Sequence[int], SamplingParams]]
BIG = 16 << 10  # characters or items from which on work leaves the event loop


class Service:
    """Models under their names; the first is the default where a request need not name one.

    models: everybody's. shelf: those that belong to somebody, where jobs make some; asked for with `find` and `visible`.
    """

    def __init__(self, models: Iterable[Served], *, limits: Limits | None = None):
        self.models = {served.name: served for served in models}
        if not self.models:
            raise UsageError("there is no model to serve", hint="lyceum serve RUN")
        self.limits = limits or Limits()
        self.worker = Worker()
        self.worker.seats = [served.seat for served in self.models.values()]
        room = self.limits.waiting + sum(served.engine.max_batch for served in self.models.values())
        self.quota = Quota(self.limits, room)
        self.metrics = Metrics()
        self.metrics.watch(self)
        self.shelf: Shelf | None = None

    def start(self) -> None:
        """Begin to serve."""
        self.worker.start()

    def stop(self) -> None:
        """End; what is under way ends with an error."""
        self.worker.stop()

    def model(self, name: str | None) -> Served:
        """The model of a name; of none, the default. Raises Refusal (404) where there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            hint = did_you_mean(name[:200], self.models)
            raise Refusal(404, f"The model {name!r} does not exist; {hint}", param="model", code="model_not_found")
        return self.models[name]

    async def find(self, name: str | None, caller: Caller = EVERYBODY) -> Served:
        """The model of a name as a caller sees it, its own ones too. Raises Refusal (404) where there is none."""
        if self.shelf is not None and name is not None and name not in self.models:
            served = await self.shelf.find(name, caller)
            if served is not None:
                return served
        return self.model(name)

    async def visible(self, caller: Caller = EVERYBODY, *, chats: bool = False) -> list[dict[str, Any]]:
        """The models that a caller sees, as `/v1/models` shows them; chats: only those that do, as all that jobs make do."""
        own = []
        if self.shelf is not None:
            await asyncio.to_thread(self.shelf.look)  # a job may have made one this moment
            own = [tuned.shown for tuned in self.shelf.visible(caller)]
        shared = [served for served in self.models.values() if served.chat is not None or not chats]
        return [*(served.to_json() for served in shared), *own]

    def replace(self, served: Served) -> None:
        """Put another model under its name: who asks from now on is answered by it, what is under way ends with the old one.

        From any thread. Raises KeyError where there is no model of that name.
        """
        old, self.models[served.name] = self.models[served.name], served
        self.worker.replace(old.seat, served.seat)

    async def open(
        self,
        served: Served,
        wanted: Wanted,
        caller: Caller = EVERYBODY,
        *,
        param: str = "messages",
        is_background: bool = False,
        follows: bool = False,
        wants_scores: bool = False,
    ) -> Job:
        """Ask for replies: one for each prompt with its parameters.

        param: the field that the prompts came in. follows: the job tells tokens as they come; wants_scores: with their
        log-probabilities. Raises Refusal where a limit is passed, and whatever the engine says of a request.
        """
        if len(wanted) > self.limits.replies:
            raise Refusal(
                400, f"{len(wanted)} replies were asked for, at most {self.limits.replies} at once.", param="n"
            )
        for prompt, params in wanted:
            if len(prompt) + min(params.max_tokens, 1) > served.context_length:
                raise too_long(len(prompt), served.context_length, param)
        promised = sum(min(len(prompt) + params.max_tokens, served.context_length) for prompt, params in wanted)
        self.quota.take(caller, len(wanted), promised)
        job = Job(self, served, caller, wanted, promised)
        job.ticket = self.worker.submit(
            served.seat,
            wanted,
            key=caller.id,
            is_background=is_background,
            follows=follows,
            wants_scores=wants_scores,
        )
        try:
            await job.ticket.accepted()
        except BaseException:
            job.close()
            raise
        return job


class Job:
    """Replies under way for somebody. Must be closed, which gives up what has not come yet."""

    ticket: Ticket

    def __init__(self, service: Service, served: Served, caller: Caller, wanted: Wanted, promised: int):
        self.served = served
        self.wanted = wanted
        self._service, self._caller, self._promised = service, caller, promised
        self._begun = time.perf_counter()
        self._is_open, self._has_begun = True, False

    async def outputs(self) -> list[Output]:
        """All replies, in the order in which they were asked for."""
        done: dict[int, Output] = {}
        async for one in self:
            if one.output is not None:
                done[one.place] = one.output
        if len(done) < len(self.wanted):
            raise Gone
        return [done[place] for place in range(len(self.wanted))]

    async def __aiter__(self) -> AsyncIterator[News]:
        metrics, name = self._service.metrics, self.served.name
        async for one in self.ticket:
            if not self._has_begun and self.ticket.follows:
                self._has_begun = True
                metrics.first_token.labels(name).observe(time.perf_counter() - self._begun)
            if one.output is not None:
                metrics.generated_tokens.labels(name).inc(len(one.output.ids))
                metrics.prompt_tokens.labels(name).inc(len(self.wanted[one.place][0]))
                metrics.cached_tokens.labels(name).inc(one.output.num_reused)
            yield one

    @property
    def has_news(self) -> bool:
        """Whether more has come already."""
        return self.ticket.has_news

    def close(self) -> None:
        """It is over, or nobody waits for it any more. May be called again."""
        if not self._is_open:
            return
        self._is_open = False
        if self.ticket.num_left:
            self.ticket.cancel()
        if self.ticket.is_under_way:
            self._service.metrics.cancelled.labels(self.served.name).inc()
        used = sum(len(prompt) for prompt, _ in self.wanted) + self.ticket.num_made
        seconds = time.perf_counter() - self._begun
        num = len(self.wanted)
        self._service.quota.give_back(self._caller, num, max(0, self._promised - used), seconds)


class Answering:
    """What answers of every kind have: replies under way, as `lyceum.serve.app.EventStream` reads them. `close` it."""

    job: Job

    @property
    def has_news(self) -> bool:
        """Whether more has come already than was taken."""
        return self.job.has_news

    def close(self) -> None:
        """Give up what has not come yet."""
        self.job.close()


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do some work on text: on a thread of its own where there is much of it, so that the loop goes on."""
    return await asyncio.to_thread(work) if size > BIG else work()
