"""Where responses are begun, kept and found again; those in the background are made here, whoever looks on.

    desk = Desk(service, store)
    responding = await desk.open(wish, caller)          # a chat that goes on from what is kept
    body = await desk.begin(responding)                 # in the background: retrieve, cancel, delete by its id

A response that its client leaves before it has ended is given up, and not kept; one in the background belongs to no connection.

What it is not: the routes (`lyceum.serve.responses.routes`), or the store (`lyceum.serve.responses.kept`).
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from lyceum.errors import NotFound, StoreError
from lyceum.log import log
from lyceum.serve.limits import Caller
from lyceum.serve.refusals import Refusal
from lyceum.serve.responses.items import Item, as_items
from lyceum.serve.responses.kept import LEASE_S, LOST
from lyceum.serve.responses.protocol import Asked, ResponseRequest
from lyceum.serve.responses.under_way import Responding
from lyceum.serve.service import Service
from lyceum.serve.store import Store

SWEEP_EVERY_S = 3600.0


@dataclass(eq=False)
class Running:
    """A response in the background. end: what is said of it where it does not end by itself."""

    responding: Responding
    task: asyncio.Task[None]
    end: dict[str, Any]


class Desk:
    """The responses of one server."""

    def __init__(self, service: Service, store: Store):
        self.service, self.kept = service, store.responses
        self.running: dict[str, Running] = {}
        self._opened: weakref.WeakSet[Responding] = weakref.WeakSet()

    @asynccontextmanager
    async def life(self, app: Any) -> AsyncIterator[None]:
        """While the server runs: those in the background are said to live, and old ones are deleted."""
        living = asyncio.create_task(self._live())
        yield
        living.cancel()
        tasks = [running.task for running in self.running.values()]
        for running in list(self.running.values()):
            running.end = {"status": "failed", "error": LOST}
            running.responding.close()
        await asyncio.gather(living, *tasks, return_exceptions=True)

    async def history(self, wish: Asked, caller: Caller) -> list[Item]:
        """What was said before, in the conversation that a request goes on with. Raises Refusal where that is not there."""
        previous = wish.previous_response_id
        if previous is None:
            return []
        try:
            return await asyncio.to_thread(self.kept.history, caller.id, previous)
        except (NotFound, StoreError) as error:
            is_gone = isinstance(error, NotFound)
            raise Refusal(
                400,
                f"Previous response with id '{previous}' not found." if is_gone else f"{error.message}.",
                param="previous_response_id",
                code="previous_response_not_found" if is_gone else "previous_response_not_usable",
            ) from None

    async def open(self, wish: ResponseRequest, caller: Caller) -> Responding:
        """Let a request in. Raises Refusal, or what the engine says of it."""
        history = await self.history(wish, caller)
        responding = await Responding.open(self.service, wish, caller, history, as_items(wish, history))
        self._opened.add(responding)
        if wish.is_kept:

            async def keep(body: dict[str, Any]) -> None:
                await asyncio.to_thread(self.kept.keep, caller.id, body, responding.items)

            responding.keep = keep
        return responding

    async def begin(self, responding: Responding) -> dict[str, Any]:
        """Let a response make itself in the background. Returns it as it begins."""
        begun = dict(responding.body)
        assert responding.keep is not None
        try:
            await responding.keep(begun)
        except BaseException:
            responding.close()
            raise

        async def keep(body: dict[str, Any]) -> None:
            await asyncio.to_thread(self.kept.finish, responding.owner, body)

        responding.keep = keep
        task = asyncio.get_running_loop().create_task(self._run(responding))
        self.running[begun["id"]] = Running(responding, task, {"status": "cancelled"})
        return begun

    async def get(self, caller: Caller, id: str) -> dict[str, Any]:
        """A response as it stands. Raises NotFound."""
        return await asyncio.to_thread(self.kept.get, caller.id, id)

    async def cancel(self, caller: Caller, id: str) -> dict[str, Any]:
        """End one that is made in the background; one that has ended stays as it is. Raises NotFound, Refusal."""
        body = await self.get(caller, id)
        if not body["background"]:
            raise Refusal(400, "Only what is made in the background can be cancelled.", code="invalid_request")
        if body["status"] == "in_progress":
            if not await self._stop(id):  # another server makes it: what it will say is not kept
                await asyncio.to_thread(self.kept.finish, caller.id, {**body, "status": "cancelled"})
            body = await self.get(caller, id)
        return body

    async def delete(self, caller: Caller, id: str) -> None:
        """Delete one, and stop it first where it is under way. Raises NotFound."""
        if (await self.get(caller, id))["status"] == "in_progress":
            await self._stop(id)
        await asyncio.to_thread(self.kept.delete, caller.id, id)

    def stop_all(self, caller: Caller) -> None:
        """Give up all that is under way for a caller; nothing of it is kept."""
        for responding in list(self._opened):
            if responding.owner == caller.id:
                responding.close()

    async def _stop(self, id: str) -> bool:
        running = self.running.get(id)
        if running is None:
            return False
        running.responding.close()
        await asyncio.wait([running.task])
        return True

    async def _run(self, responding: Responding) -> None:
        id = responding.body["id"]
        try:
            async for _ in responding.chunks():
                pass
            if not responding.is_over and responding.keep is not None:
                responding.body |= {"completed_at": None, **self.running[id].end}
                await responding.keep(responding.body)
        except Exception as error:  # the disk, the database: without its writer it will read as failed
            log.warning(f"a response could not be kept: {type(error).__name__}: {error}")
        finally:
            responding.close()
            del self.running[id]

    async def _live(self) -> None:
        swept_at = 0.0
        while True:
            try:
                if time.monotonic() - swept_at > SWEEP_EVERY_S or not swept_at:
                    await asyncio.to_thread(self.kept.sweep)
                    swept_at = time.monotonic()
                if self.running:
                    await asyncio.to_thread(self.kept.live, list(self.running))
            except Exception as error:
                log.warning(f"kept responses could not be looked after: {type(error).__name__}: {error}")
            await asyncio.sleep(LEASE_S / 4)
