"""The work on batches: their lines answered a few at a time behind everybody else, and what came of them put into files.

    work = Work(service, store.batches, files, desk)
    await work.begin("alice", body)                # it goes on by itself, and after a restart too

A batch goes through its states, each of which is in the store before the next begins: validating, in_progress, finalizing, and
what it ended as. What came of a line is in the store before the next line takes its place; so whoever claims a batch whose
server was killed goes on where it was: lines that were being made are made again, lines that are done are not. A file's id is
in the store before the file is, so that none is made twice.

A request that finds no room (429) is asked again, later. Lines that are left when the time is over say so in the file of errors.

What it is not: the answers (`lyceum.serve.batch.requests`), or the routes (`lyceum.serve.batch.routes`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from lyceum.errors import NotFound
from lyceum.log import log
from lyceum.run import PARTIAL
from lyceum.serve.batch.kept import LEASE_S, Batches, Body, Result
from lyceum.serve.batch.requests import answered
from lyceum.serve.files.checks import Request, read_requests
from lyceum.serve.files.kept import Files
from lyceum.serve.limits import Caller
from lyceum.serve.refusals import Refusal
from lyceum.serve.responses.desk import Desk
from lyceum.serve.service import Service
from lyceum.serve.tree import new_id

AT_ONCE = 8  # lines of one owner that are being answered
MOST = 20  # batches of one owner that are under way
LONGEST_WAIT_S = 60.0  # before a request that found no room is asked again
CHUNK = 500
EXPIRED = {"code": "batch_expired", "message": "This request was not answered within the completion window."}


@dataclass(eq=False)
class Running:
    """A batch that is worked on here. why: it is to stop: "cancelled", "stopped" (the server), or "lost" (it is another's)."""

    id: str
    owner: str
    room: asyncio.Semaphore
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""
    task: asyncio.Task[None] | None = None

    def end(self, why: str) -> None:
        """Let it stop."""
        self.why = self.why or why
        self.stop.set()


class Work:
    """The batches that one server works on."""

    def __init__(self, service: Service, kept: Batches, files: Files, desk: Desk):
        self.service, self.kept, self.files, self.desk = service, kept, files, desk
        self.writer = secrets.token_hex(8)
        self.running: dict[str, Running] = {}
        self._rooms: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    @asynccontextmanager
    async def life(self, app: Any) -> AsyncIterator[None]:
        """While the server runs: what nobody works on is gone on with."""
        looking = asyncio.create_task(self._look())
        yield
        looking.cancel()
        tasks = [running.task for running in self.running.values() if running.task is not None]
        for running in list(self.running.values()):
            running.end("stopped")
        await asyncio.gather(looking, *tasks, return_exceptions=True)
        await asyncio.to_thread(self.kept.release, self.writer)

    async def begin(self, owner: str, body: Body) -> None:
        """A new batch. Raises StoreError where its owner has too many."""
        await asyncio.to_thread(self.kept.add, owner, body, self.writer, most=MOST)
        self._start(owner, body["id"])

    async def cancel(self, owner: str, id: str) -> Body:
        """End a batch; what is done of it stays. Raises NotFound; StoreError where it has ended."""
        body = await asyncio.to_thread(self.kept.cancel, owner, id)
        if id in self.running:
            self.running[id].end("cancelled")
        return body

    def stop_all(self, caller: Caller) -> None:
        """Give up all batches of a caller, whose data is about to be deleted."""
        for running in list(self.running.values()):
            if running.owner == caller.id:
                running.end("lost")

    # -- what goes on --------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            try:
                for owner, body in await asyncio.to_thread(self.kept.claim, self.writer):
                    if body["id"] not in self.running:
                        self._start(owner, body["id"])
                if self.running:
                    ids = list(self.running)  # one that begins while the store is asked is not among them
                    mine = await asyncio.to_thread(self.kept.alive, self.writer, ids)
                    for id in ids:
                        if id in self.running and mine.get(id) in (None, "cancelling"):
                            self.running[id].end("cancelled" if id in mine else "lost")
            except Exception as error:
                log.warning(f"batches could not be looked after: {type(error).__name__}: {error}")
            await asyncio.sleep(LEASE_S / 4)

    def _start(self, owner: str, id: str) -> None:
        room = self._rooms.get(owner) or asyncio.Semaphore(AT_ONCE)
        self._rooms[owner] = room
        running = self.running[id] = Running(id, owner, room)
        running.task = asyncio.get_running_loop().create_task(self._run(running))

    async def _run(self, running: Running) -> None:
        steps = {"validating": self._validate, "in_progress": self._answer}
        try:
            while (body := await asyncio.to_thread(self.kept.mine, running.id, self.writer)) is not None:
                if running.why not in ("", "cancelled"):
                    return
                await steps.get(body["status"], self._close)(running, body)
        except Exception as error:  # the disk, the database, the owner's share: claimed again when the lease is over
            log.warning(f"batch {running.id} is put off: {type(error).__name__}: {error}")
        finally:
            del self.running[running.id]

    async def _validate(self, running: Running, body: Body) -> None:
        def check() -> tuple[int, list[Body]]:
            total = 0
            try:
                for number, request in read_requests(self._path(running.owner, body), self.service.limits):
                    if request.url != body["endpoint"]:
                        message = f"The url {request.url!r} is not the endpoint of the batch, {body['endpoint']!r}."
                        return 0, [{"code": "mismatched_url", "line": number, "message": message, "param": "url"}]
                    total += 1
            except (NotFound, Refusal) as error:
                return 0, [_error(error)]
            return total, []

        total, errors = await asyncio.to_thread(check)
        now = int(time.time())
        if errors:
            values = {"status": "failed", "failed_at": now, "errors": {"object": "list", "data": errors}}
            await asyncio.to_thread(self.kept.end, running.id, self.writer, **values)
            return
        counts = {"total": total, "completed": 0, "failed": 0}
        await self._change(running, ("validating",), status="in_progress", in_progress_at=now, request_counts=counts)

    async def _answer(self, running: Running, body: Body) -> None:
        """Answer what is left, until all is done, the time is over, or it is to stop."""
        work = asyncio.create_task(self._lines(running, body))
        stop = asyncio.create_task(running.stop.wait())
        left_s = max(0.0, body["expires_at"] - time.time())
        try:
            await asyncio.wait((work, stop), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
        if not work.cancelled():
            work.result()
        if not running.why or not work.cancelled():
            await self._change(running, ("in_progress",), status="finalizing", finalizing_at=int(time.time()))

    async def _lines(self, running: Running, body: Body) -> None:
        done = await asyncio.to_thread(self.kept.done, running.id)
        try:
            path = await asyncio.to_thread(self._path, running.owner, body)
        except NotFound:  # its owner deleted it: what is done stays, what is left cannot be known
            return
        lines = read_requests(path, self.service.limits)
        async with asyncio.TaskGroup() as group:
            while (found := await asyncio.to_thread(next, lines, None)) is not None:
                number, request = found
                if number not in done:
                    await running.room.acquire()
                    task = group.create_task(self._line(running, number, request))
                    task.add_done_callback(lambda _: running.room.release())

    async def _line(self, running: Running, number: int, request: Request) -> None:
        caller = Caller(running.owner)
        while True:
            status, content, again_s = await answered(self.service, self.desk, caller, request.url, request.body)
            if not again_s:
                break
            await asyncio.sleep(min(again_s, LONGEST_WAIT_S))
        told = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": content}
        result = Result(number, _row(request, told, None), status != 200)
        recording = asyncio.create_task(asyncio.to_thread(self.kept.record, running.id, [result]))
        try:
            await asyncio.shield(recording)
        except asyncio.CancelledError:  # what was made is not lost
            await recording
            raise

    # -- its end -------------------------------------------------------------------------------------------------------

    async def _close(self, running: Running, body: Body) -> None:
        if body["status"] == "cancelling" and not running.why:
            running.end("cancelled")
        await asyncio.to_thread(self._closed, running, body)

    def _closed(self, running: Running, body: Body) -> None:
        """Write the files, then the end."""
        num_left = body["request_counts"]["total"] - len(self.kept.done(running.id))
        status, errors = "cancelled" if body["status"] == "cancelling" else "completed", body["errors"]
        if status == "completed" and num_left:  # the time is over, or the file of requests is gone
            status = "expired" if time.time() >= body["expires_at"] else "failed"
            try:
                self._expire(running, body)
            except NotFound as error:
                errors = {"object": "list", "data": [_error(error)]}
        counts, used = {"total": body["request_counts"]["total"]}, _usage()
        for kind, has_failed in (("output", False), ("error", True)):
            num = 0
            with self.files.draft() as draft:
                for row in self.kept.results(running.id, has_failed=has_failed):
                    draft.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                    num += 1
                    _add_usage(used, row)
                counts["failed" if has_failed else "completed"] = num
                if num and not self._is_there(running.owner, body[f"{kind}_file_id"]):
                    id = draft.path.name.removesuffix(PARTIAL)
                    if self.kept.change(running.id, self.writer, **{f"{kind}_file_id": id}) is None:
                        return
                    name, expires = f"{running.id}_{kind}.jsonl", float(body["output_expires_at"] or 0)
                    self.files.add(running.owner, draft, filename=name, purpose="batch_output", expires=expires)
        values = {"status": status, f"{status}_at": int(time.time()), "request_counts": counts, "usage": used}
        self.kept.end(running.id, self.writer, **values, errors=errors)

    def _expire(self, running: Running, body: Body) -> None:
        done, waiting = self.kept.done(running.id), list[Result]()
        for number, request in read_requests(self._path(running.owner, body), self.service.limits):
            if number not in done:
                waiting.append(Result(number, _row(request, None, EXPIRED), True))
            if len(waiting) == CHUNK:
                self.kept.record(running.id, waiting)
                waiting.clear()
        self.kept.record(running.id, waiting)

    def _is_there(self, owner: str, file: str | None) -> bool:
        try:
            return file is not None and self.files.about(owner, file) is not None
        except NotFound:
            return False

    def _path(self, owner: str, body: Body) -> Any:
        return self.files.path(owner, body["input_file_id"])

    async def _change(self, running: Running, only_from: tuple[str, ...], **values: Any) -> None:
        await asyncio.to_thread(self.kept.change, running.id, self.writer, only_from=only_from, **values)


def _row(request: Request, response: Body | None, error: Body | None) -> Body:
    """A line of a batch's files."""
    return {"id": new_id("batch_req"), "custom_id": request.custom_id, "response": response, "error": error}


def _error(error: NotFound | Refusal) -> Body:
    code = error.code if isinstance(error, Refusal) else "file_not_found"
    return {"code": code, "line": None, "message": error.message, "param": "input_file_id"}


def _usage() -> Body:
    details: Body = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, **details}


def _add_usage(all: Body, row: Body) -> None:
    """Add what a line used, whichever route's words it is told in."""
    used = ((row["response"] or {}).get("body") or {}).get("usage") or {}
    all["input_tokens"] += used.get("input_tokens", used.get("prompt_tokens", 0))
    all["output_tokens"] += used.get("output_tokens", used.get("completion_tokens", 0))
    all["total_tokens"] += used.get("total_tokens", 0)
    cached = used.get("input_tokens_details") or used.get("prompt_tokens_details") or {}
    all["input_tokens_details"]["cached_tokens"] += cached.get("cached_tokens", 0)
