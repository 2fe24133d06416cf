"""Batches as they are kept: how far each is, and what came of each of its lines, once.

    batches.add("alice", body, writer)                       # begun here
    for owner, body in batches.claim(writer): ...            # those whose writer is gone: go on with them
    batches.record(id, [Result(line, row, False)])            # a line is done; a second time changes nothing

A batch is worked on by one writer, a server's process, who says every few seconds that it lives (`alive`). Where that has not
come for `LEASE_S`, another may claim it; one that comes back after that finds that the batch is not its own any more (`change`
returns None) and leaves it. So a batch survives the end of a server, and two servers on one database do not do it twice.

All calls block: a server makes them from a thread. What it is not: the work (`lyceum.serve.batch.work`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from lyceum.errors import NotFound, StoreError
from lyceum.serve.batch.tables import BATCHES, LINES
from lyceum.serve.database import Database
from lyceum.serve.tree import need_owner

LEASE_S = 20.0
CHUNK = 100  # results read at once
CAN_CANCEL = ("validating", "in_progress")
UNDER_WAY = (*CAN_CANCEL, "finalizing", "cancelling")
FILES = ("output_file_id", "error_file_id")

Body = dict[str, Any]


class Result(NamedTuple):
    """What came of a line: a row of the file that it will be in, and whether that is the one of errors."""

    line: int
    result: Body
    has_failed: bool


class Batches:
    """The batches in a database."""

    def __init__(self, database: Database):
        self.database = database

    def add(self, owner: str, body: Body, writer: str, *, most: int) -> None:
        """Keep a new batch, on which its writer works. Raises StoreError where an owner has `most` under way."""
        now = time.time()
        row = {"id": body["id"], "owner": need_owner(owner), "status": body["status"], "body": body}
        row |= {"writer": writer, "created": now, "updated": now}
        mine = (BATCHES.c.owner == owner, BATCHES.c.status.in_(UNDER_WAY))
        with self.database.writing() as connection:
            num = connection.execute(select(func.count()).where(*mine)).scalar_one()
            if num >= most:
                raise StoreError(f"you have {num} batches under way, of {most}", hint="wait for one, or cancel one")
            connection.execute(insert(BATCHES).values(row))

    def claim(self, writer: str) -> list[tuple[str, Body]]:
        """Take over those that nobody works on; returns each with its owner, oldest first."""
        now = time.time()
        left = (BATCHES.c.status.in_(UNDER_WAY), BATCHES.c.updated < now - LEASE_S)
        with self.database.reading() as connection:  # the usual case takes no turn to write
            if connection.execute(select(BATCHES.c.id).where(*left).limit(1)).first() is None:
                return []
        values = {"writer": writer, "updated": now}
        with self.database.writing() as connection:
            rows = connection.execute(update(BATCHES).where(*left).values(values).returning(BATCHES)).all()
        return [(row.owner, row.body) for row in sorted(rows, key=lambda row: row.number)]

    def alive(self, writer: str, ids: Collection[str]) -> dict[str, str]:
        """Say that the writer of these lives. Returns the status of each that is still its own."""
        mine = (BATCHES.c.id.in_(ids), BATCHES.c.writer == writer)
        with self.database.writing(durable=False) as connection:
            statement = update(BATCHES).where(*mine).values(updated=time.time())
            return {
                row.id: row.status for row in connection.execute(statement.returning(BATCHES.c.id, BATCHES.c.status))
            }

    def release(self, writer: str) -> None:
        """The writer stops: others may claim what it has not ended, at once."""
        mine = (BATCHES.c.writer == writer, BATCHES.c.status.in_(UNDER_WAY))
        with self.database.writing() as connection:
            connection.execute(update(BATCHES).where(*mine).values(writer="", updated=0.0))

    def mine(self, id: str, writer: str) -> Body | None:
        """A batch that its writer works on; None where it has ended, or is another's."""
        with self.database.reading() as connection:
            row = self._row(connection, BATCHES.c.id == id, BATCHES.c.writer == writer)
        return None if row is None or row.status not in UNDER_WAY else row.body

    def change(self, id: str, writer: str, *, only_from: Collection[str] = UNDER_WAY, **values: Any) -> Body | None:
        """Set these fields of a batch. Returns it; None where it is the writer's no more, or in another state."""
        with self.database.writing() as connection:
            row = self._row(connection, BATCHES.c.id == id, BATCHES.c.writer == writer, for_change=True)
            if row is None or row.status not in only_from:
                return None
            return self._set(connection, row, values)

    def end(self, id: str, writer: str, **values: Any) -> Body | None:
        """The same for the last time: its lines go, which are in its files."""
        with self.database.writing() as connection:
            row = self._row(connection, BATCHES.c.id == id, BATCHES.c.writer == writer, for_change=True)
            if row is None or row.status not in UNDER_WAY:
                return None
            connection.execute(delete(LINES).where(LINES.c.batch == id))
            return self._set(connection, row, values)

    def cancel(self, owner: str, id: str) -> Body:
        """Ask that a batch be ended. Raises NotFound; StoreError where it has ended, or is about to."""
        with self.database.writing() as connection:
            row = self._row(connection, BATCHES.c.id == id, BATCHES.c.owner == need_owner(owner), for_change=True)
            if row is None:
                raise NotFound(f"there is no batch {id!r}")
            if row.status not in (*CAN_CANCEL, "cancelling"):
                raise StoreError(f"a batch with the status {row.status!r} cannot be cancelled")
            if row.status in CAN_CANCEL:
                self._set(connection, row, {"status": "cancelling", "cancelling_at": int(time.time())})
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> Body:
        """A batch as it stands. Raises NotFound."""
        with self.database.reading() as connection:
            row = self._row(connection, BATCHES.c.id == id, BATCHES.c.owner == need_owner(owner))
            if row is None:
                raise NotFound(f"there is no batch {id!r}")
            return _shown(connection, [row])[0]

    def listed(self, owner: str, *, limit: int, after: str | None = None) -> tuple[list[Body], bool]:
        """A page of somebody's batches, newest first, and whether more follow. Raises NotFound where `after` is none."""
        query = select(BATCHES).where(BATCHES.c.owner == need_owner(owner)).order_by(BATCHES.c.number.desc())
        with self.database.reading() as connection:
            if after is not None:
                last = self._row(connection, BATCHES.c.id == after, BATCHES.c.owner == owner)
                if last is None:
                    raise NotFound(f"there is no batch {after!r}")
                query = query.where(BATCHES.c.number < last.number)
            rows = connection.execute(query.limit(limit + 1)).all()
            return _shown(connection, rows[:limit]), len(rows) > limit

    # -- lines ---------------------------------------------------------------------------------------------------------

    def record(self, id: str, results: Sequence[Result]) -> None:
        """Keep what came of lines, for good; what is there already stays. Nothing where the batch was deleted."""
        these = (LINES.c.batch == id, LINES.c.line.in_([result.line for result in results]))
        with self.database.writing() as connection:
            if self._row(connection, BATCHES.c.id == id, for_change=True) is None:
                return
            there = set(connection.execute(select(LINES.c.line).where(*these)).scalars())
            rows = [{"batch": id, **result._asdict()} for result in results if result.line not in there]
            if rows:
                connection.execute(insert(LINES), rows)

    def done(self, id: str) -> set[int]:
        """The numbers of the lines that are done."""
        with self.database.reading() as connection:
            return set(connection.execute(select(LINES.c.line).where(LINES.c.batch == id)).scalars())

    def results(self, id: str, *, has_failed: bool) -> Iterator[Body]:
        """What came of the lines that went well, or of those that did not, in their order; no transaction is open meanwhile."""
        at = 0
        query = select(LINES.c.line, LINES.c.result).where(LINES.c.batch == id, LINES.c.has_failed == has_failed)
        while True:
            with self.database.reading() as connection:
                rows = connection.execute(query.where(LINES.c.line > at).order_by(LINES.c.line).limit(CHUNK)).all()
            if not rows:
                return
            yield from (row.result for row in rows)
            at = rows[-1].line

    @staticmethod
    def _row(connection: Connection, *conditions: Any, for_change: bool = False) -> Row[Any] | None:
        query = select(BATCHES).where(*conditions)
        return connection.execute(query.with_for_update() if for_change else query).first()

    @staticmethod
    def _set(connection: Connection, row: Row[Any], values: Body) -> Body:
        body = {**row.body, **values}
        written = {"body": body, "status": body["status"], "updated": time.time()}
        connection.execute(update(BATCHES).where(BATCHES.c.number == row.number).values(written))
        return body


def forget_batches(connection: Connection, owner: str) -> None:
    """Delete all of an owner's batches, with what came of their lines."""
    mine = select(BATCHES.c.id).where(BATCHES.c.owner == owner)
    connection.execute(delete(LINES).where(LINES.c.batch.in_(mine)))
    connection.execute(delete(BATCHES).where(BATCHES.c.owner == owner))


def _shown(connection: Connection, rows: Collection[Row[Any]]) -> list[Body]:
    """Batches as their owner sees them: counted as far as they are, with files only once these are there."""
    ids = [row.id for row in rows if row.status in UNDER_WAY]
    columns = (LINES.c.batch, LINES.c.has_failed)
    counted = select(*columns, func.count()).where(LINES.c.batch.in_(ids)).group_by(*columns)
    counts = {(batch, has_failed): num for batch, has_failed, num in connection.execute(counted)}
    found = []
    for row in rows:
        body = dict(row.body)
        if row.status in UNDER_WAY:
            completed, failed = (counts.get((row.id, has_failed), 0) for has_failed in (False, True))
            body["request_counts"] = {**body["request_counts"], "completed": completed, "failed": failed}
            body |= dict.fromkeys(FILES)
        found.append(body)
    return found
