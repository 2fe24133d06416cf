"""The engines' thread: news in order, cancellations within a step, failures that stay where they belong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.model.transformer import Decoder
from lyceum.serve.refusals import Refusal
from lyceum.serve.worker import Seat, Ticket, Worker


@asynccontextmanager
async def working(*models: Any) -> AsyncIterator[tuple[Worker, list[Seat]]]:
    worker = Worker()
    worker.seats = [Seat(Engine(model, max_batch=8, checks=True)) for model in models]
    worker.start()
    try:
        yield worker, worker.seats
    finally:
        worker.stop()


def go(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def outputs(ticket: Ticket) -> list[list[int]]:
    done = {one.place: one.output.ids async for one in ticket if one.output is not None}
    return [done[place] for place in sorted(done)]


PROMPTS = [[1, 2, 3], [50, 4, 9], [5]]


def test_replies_are_the_engines_and_their_pieces_are_the_whole(decoder: Decoder) -> None:
    wanted = [(prompt, SamplingParams(9, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
    expected = [output.ids for output in Engine(decoder).generate([p for p, _ in wanted], [s for _, s in wanted])]

    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            assert await outputs(worker.submit(seat, wanted)) == expected
            told: list[list[int]] = [[], [], []]
            ticket = worker.submit(seat, wanted, follows=True)
            await ticket.accepted()
            num_news = 0
            async for one in ticket:
                told[one.place] += one.ids
                num_news += 1
            assert told == expected and num_news > 3 and ticket.num_left == 0 and not seat.live

    go(check())


def test_many_at_once_each_get_their_own(decoder: Decoder) -> None:
    each = [SamplingParams(7, seed=seed) for seed in range(24)]
    expected = [Engine(decoder).generate([[seed + 1]], params)[0].ids for seed, params in enumerate(each)]

    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            tickets = [
                worker.submit(seat, [([seed + 1], params)], key=str(seed % 3)) for seed, params in enumerate(each)
            ]
            assert [(await outputs(ticket))[0] for ticket in tickets] == expected

    go(check())


def test_cancelling_frees_the_engine_and_leaves_others_alone(decoder: Decoder) -> None:
    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            long = worker.submit(seat, [([1], SamplingParams(900, seed=1))] * 3, follows=True)
            other = worker.submit(seat, [([2], SamplingParams(5, seed=2))])
            news = aiter(long)
            await anext(news)
            long.cancel()
            assert len([one async for one in news]) < 900 and long.num_left == 3  # whoever waits is woken
            assert len((await outputs(other))[0]) <= 5
            assert await worker.call(lambda: (len(seat.live), seat.engine.is_idle)) == (0, True)

    go(check())


def test_what_is_cancelled_before_it_began_never_begins(decoder: Decoder) -> None:
    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            ticket = worker.submit(seat, [([1], SamplingParams(900))])
            ticket.cancel()
            assert await worker.call(lambda: seat.engine.is_idle)

    go(check())


def test_a_request_that_is_wrong_takes_its_companions_with_it(decoder: Decoder) -> None:
    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            ticket = worker.submit(seat, [([1], SamplingParams(900)), ([10**6], SamplingParams(9))])
            with pytest.raises(Exception, match="vocabulary"):
                await ticket.accepted()
            assert await worker.call(lambda: seat.engine.is_idle)

    go(check())


def test_a_step_that_fails_ends_its_own_engines_requests_only(decoder: Decoder, chain: Callable) -> None:
    broken = chain("ab")
    broken.error = RuntimeError("broken")

    async def check() -> None:
        async with working(broken, decoder) as (worker, (bad, good)):
            first, second = (worker.submit(seat, [([1], SamplingParams(5, seed=1))]) for seat in (bad, good))
            with pytest.raises(RuntimeError, match="broken"):
                await outputs(first)
            assert await outputs(second) and worker.num_failures == 1 and worker.is_running
            broken.error = None
            assert await outputs(worker.submit(bad, [([1], SamplingParams(5))]))

    go(check())


def test_an_engine_that_cannot_let_go_is_replaced(chain: Callable) -> None:
    model = chain("ab")
    model.error = RuntimeError("broken")

    async def check() -> None:
        async with working(model) as (worker, (seat,)):
            old = seat.engine
            old.abort = lambda id: 1 / 0  # type: ignore[assignment,method-assign,return-value]
            with pytest.raises(RuntimeError):
                await outputs(worker.submit(seat, [([1], SamplingParams(5))]))
            model.error = None
            assert seat.engine is not old and await outputs(worker.submit(seat, [([1], SamplingParams(5))]))

    go(check())


def test_calls_happen_on_the_thread_and_their_errors_come_back(decoder: Decoder) -> None:
    async def check() -> None:
        async with working(decoder) as (worker, _):
            assert await worker.call(lambda: threading.current_thread().name) == "engine"
            with pytest.raises(ZeroDivisionError):
                await worker.call(lambda: 1 // 0)
            assert await worker.call(lambda: 1) == 1

    go(check())


def test_stopping_tells_those_who_wait(decoder: Decoder) -> None:
    async def check() -> None:
        async with working(decoder) as (worker, (seat,)):
            ticket = worker.submit(seat, [([1], SamplingParams(900, seed=1))], follows=True)
            await anext(aiter(ticket))
            worker.stop()
            with pytest.raises(Refusal) as refused:
                await outputs(ticket)
            assert refused.value.status == 503 and not worker.is_running

    go(check())
