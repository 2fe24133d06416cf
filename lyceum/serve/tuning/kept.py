"""Jobs as the store keeps them: who asked for what, where each stands, what happened, and which models came of it.

    jobs = Jobs(store.database)
    job = jobs.add("alice", ...); jobs.cancel("alice", job.id)

    queued -> running -> succeeded | failed          any of queued, running, paused -> cancelled
    queued, running -> paused -> queued

A request changes a job's status and nothing else; whoever runs jobs (`lyceum.serve.tuning.foreman`) looks at the statuses and
makes processes agree with them. So a killed server leaves no half-done change: what the store says, is what will be.

All calls block. What it is not: the processes, or the shapes of the API (`lyceum.serve.tuning.routes`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Table, delete, func, insert, select, update

from lyceum.errors import NotFound
from lyceum.serve.database import Database
from lyceum.serve.refusals import Refusal
from lyceum.serve.tree import need_owner
from lyceum.serve.tuning.tables import CHECKPOINTS, EVENTS, JOBS

OPEN = ("queued", "running", "paused")  # statuses of a job that has not ended
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """A job. base: the model's name that it starts from; name: of the model that comes of it. plan: how it is trained
    (`lyceum.serve.tuning.recipes`). error: code, message and param, empty unless it failed. step, tokens: how far it has come.
    attempts: processes that ended without getting further. created, started, finished: seconds since 1970, 0 for not yet."""

    id: str
    owner: str
    status: str
    base: str
    name: str
    training_file: str
    validation_file: str
    method: dict[str, Any]
    metadata: dict[str, str]
    seed: int
    plan: dict[str, Any]
    error: dict[str, Any]
    result_file: str
    step: int
    tokens: int
    attempts: int
    created: float
    started: float
    finished: float


@dataclass(frozen=True)
class Event:
    """Something that happened. level: info, warn or error; type: message or metrics."""

    id: str
    job: str
    level: str
    type: str
    message: str
    data: dict[str, Any]
    created: float

    def to_json(self) -> dict[str, Any]:
        """The event as the API shows it."""
        shown = {"id": self.id, "object": "fine_tuning.job.event", "created_at": int(self.created)}
        return {**shown, "level": self.level, "message": self.message, "type": self.type, "data": self.data}


@dataclass(frozen=True)
class Checkpoint:
    """A model that a job has saved. folder: within the job's. metrics: of the step it was saved at, by OpenAI's names."""

    id: str
    job: str
    name: str
    folder: str
    step: int
    metrics: dict[str, Any]
    created: float

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as the API shows it."""
        return {
            "id": self.id,
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(self.created),
            "fine_tuned_model_checkpoint": self.name,
            "fine_tuning_job_id": self.job,
            "metrics": self.metrics,
            "step_number": self.step,
        }


class Jobs:
    """The jobs in a database."""

    def __init__(self, database: Database):
        self.database = database

    # -- for those who ask ---------------------------------------------------------------------------------------------

    def add(self, owner: str, id: str, most: int, *, notes: Sequence[Mapping[str, Any]] = (), **row: Any) -> Job:
        """Queue a job of somebody's who may have `most` that have not ended. Raises Refusal (429) where there are so many.

        notes: events beside that of its beginning. row: the fields of a `Job` that are not those of every new one.
        """
        values = {
            "id": id,
            "owner": need_owner(owner),
            "status": "queued",
            "error": {},
            "result_file": "",
            "step": 0,
            "tokens": 0,
            "attempts": 0,
            "created": time.time(),
            "started": 0.0,
            "finished": 0.0,
            **row,
        }
        with self.database.writing() as connection:
            count = select(func.count()).where(JOBS.c.owner == owner, JOBS.c.status.in_(OPEN))
            num = connection.execute(count).scalar_one()
            if num >= most:
                raise Refusal(429, f"You have {num} jobs that have not ended, of {most}.", code="rate_limit_exceeded")
            job = _job(connection.execute(insert(JOBS).values(values).returning(JOBS)).one())
            note(connection, id, f"Created fine-tuning job: {id}")
            for one in notes:
                note(connection, id, **one)
        return job

    def about(self, owner: str, id: str) -> Job:
        """A job. Raises NotFound for what is not there, or another's."""
        with self.database.reading() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.id == id, JOBS.c.owner == owner)).first()
        if row is None:
            raise NotFound(f"There is no fine-tuning job {id[:80]!r}.")
        return _job(row)

    def listed(self, owner: str, *, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """A page of somebody's jobs, the newest first, and whether more follow."""
        rows, has_more = self._page(JOBS, JOBS.c.owner == owner, limit, after)
        return [_job(row) for row in rows], has_more

    def events(self, owner: str, id: str, *, limit: int, after: str | None = None) -> tuple[list[Event], bool]:
        """A page of a job's events, the newest first, and whether more follow. Raises NotFound."""
        self.about(owner, id)
        rows, has_more = self._page(EVENTS, EVENTS.c.job == id, limit, after)
        return [Event(**_values(row)) for row in rows], has_more

    def news(self, owner: str, id: str, seen: int) -> tuple[Job, list[Event]]:
        """A job, and what happened after its first `seen` events, the oldest first."""
        job = self.about(owner, id)  # first: what ends a job is noted with it
        with self.database.reading() as connection:
            query = select(EVENTS).where(EVENTS.c.job == id).order_by(EVENTS.c.number).offset(seen)
            return job, [Event(**_values(row)) for row in connection.execute(query)]

    def checkpoints(
        self, owner: str, id: str, *, limit: int, after: str | None = None
    ) -> tuple[list[Checkpoint], bool]:
        """A page of a job's checkpoints, the newest first, and whether more follow. Raises NotFound."""
        self.about(owner, id)
        rows, has_more = self._page(CHECKPOINTS, CHECKPOINTS.c.job == id, limit, after)
        return [Checkpoint(**_values(row)) for row in rows], has_more

    def cancel(self, owner: str, id: str) -> Job:
        """End a job. Raises NotFound; Refusal where it has ended."""
        return self._turn(owner, id, OPEN, "cancelled", "Fine-tuning job cancelled", finished=time.time())

    def pause(self, owner: str, id: str) -> Job:
        """Let a job wait. Raises NotFound; Refusal unless it is queued or running."""
        return self._turn(owner, id, ("queued", "running"), "paused", "Fine-tuning job paused")

    def resume(self, owner: str, id: str) -> Job:
        """Let a paused job go on. Raises NotFound; Refusal unless it is paused."""
        return self._turn(owner, id, ("paused",), "queued", "Fine-tuning job resumed", attempts=0)

    def forget(self, owner: str) -> list[str]:
        """Delete all of somebody's jobs; returns their ids, whose folders are to go."""
        mine = select(JOBS.c.id).where(JOBS.c.owner == owner)
        with self.database.writing() as connection:
            for table in (EVENTS, CHECKPOINTS):
                connection.execute(delete(table).where(table.c.job.in_(mine)))
            return [*connection.execute(delete(JOBS).where(JOBS.c.owner == owner).returning(JOBS.c.id)).scalars()]

    def _turn(self, owner: str, id: str, before: Sequence[str], after: str, said: str, **more: Any) -> Job:
        job = self.about(owner, id)
        with self.database.writing() as connection:
            mine = (JOBS.c.id == id, JOBS.c.owner == owner, JOBS.c.status.in_(before))
            row = connection.execute(update(JOBS).where(*mine).values(status=after, **more).returning(JOBS)).first()
            if row is None:
                raise Refusal(
                    400,
                    f"The job is {job.status}: only one that is {' or '.join(before)} can become {after}.",
                    code="invalid_status",
                )
            note(connection, id, said)
        return _job(row)

    def _page(self, table: Table, mine: Any, limit: int, after: str | None) -> tuple[Sequence[Row[Any]], bool]:
        query = select(table).where(mine)
        with self.database.reading() as connection:
            if after is not None:
                number = connection.execute(select(table.c.number).where(table.c.id == after, mine)).scalar()
                if number is None:
                    raise NotFound(f"There is no {after[:80]!r} in this list.")
                query = query.where(table.c.number < number)
            rows = connection.execute(query.order_by(table.c.number.desc()).limit(limit + 1)).all()
        return rows[:limit], len(rows) > limit

    # -- for whoever runs them -----------------------------------------------------------------------------------------

    def under_way(self) -> list[Job]:
        """Jobs that are queued or running, the oldest first."""
        with self.database.reading() as connection:
            query = select(JOBS).where(JOBS.c.status.in_(("queued", "running"))).order_by(JOBS.c.number)
            return [_job(row) for row in connection.execute(query)]

    def status(self, id: str) -> str:
        """A job's status; empty if there is no such job."""
        with self.database.reading() as connection:
            return connection.execute(select(JOBS.c.status).where(JOBS.c.id == id)).scalar() or ""

    def move(
        self, job: Job, said: Sequence[Mapping[str, Any]] = (), saved: Sequence[Mapping[str, Any]] = (), **values: Any
    ) -> bool:
        """Write down how a job goes on: events, checkpoints and fields, all or nothing; False if its status is no more what it
        was, for somebody has turned it meanwhile. What was saved before is not saved again."""
        with self.database.writing() as connection:
            mine = (JOBS.c.id == job.id, JOBS.c.status == job.status)
            if connection.execute(update(JOBS).where(*mine).values({"step": job.step, **values})).rowcount == 0:
                return False
            for one in said:
                note(connection, job.id, **one)
            known = set(connection.execute(select(CHECKPOINTS.c.name).where(CHECKPOINTS.c.job == job.id)).scalars())
            for one in saved:
                if one["name"] not in known:
                    row = {"id": f"ftckpt_{secrets.token_hex(12)}", "job": job.id, "created": time.time(), **one}
                    connection.execute(insert(CHECKPOINTS).values(row))
        return True

    def models(self) -> list[tuple[str, Checkpoint]]:
        """(owner, checkpoint) of every model that can be asked: those of jobs that succeeded."""
        query = (
            select(JOBS.c.owner, CHECKPOINTS)
            .join(CHECKPOINTS, CHECKPOINTS.c.job == JOBS.c.id)
            .where(JOBS.c.status == "succeeded")
            .order_by(CHECKPOINTS.c.number)
        )
        with self.database.reading() as connection:
            found = [_values(row) for row in connection.execute(query)]
        return [(row.pop("owner"), Checkpoint(**row)) for row in found]

    def drop_model(self, name: str) -> None:
        """A model is no more."""
        with self.database.writing() as connection:
            connection.execute(delete(CHECKPOINTS).where(CHECKPOINTS.c.name == name))


def note(
    connection: Connection,
    job: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write an event."""
    row = {"id": f"ftevent-{secrets.token_hex(12)}", "job": job, "level": level, "type": type, "message": message}
    connection.execute(insert(EVENTS).values({**row, "data": dict(data or {}), "created": time.time()}))


def _values(row: Row[Any]) -> dict[str, Any]:
    return {name: value for name, value in row._mapping.items() if name != "number"}


def _job(row: Row[Any]) -> Job:
    return Job(**_values(row))
