"""Responses as they are kept: each with the items that were asked, its owner's alone, and with the one that it goes on from.

    store.responses.keep("alice", body, items)
    store.responses.history("alice", id)             # all items of the conversation, up to the end of this response

A conversation is a chain: each response holds its own items and the id of the one before, so that nothing is there twice and
what is deleted is gone. A chain with a deleted link cannot be gone on with, and says so.

One that is made in the background is kept when it begins, and its writer says every few seconds that it lives (`live`). Where
that has not come for `LEASE_S`, the writer is gone, and the response reads as failed. After `KEEP_S` a response is deleted.

All calls block: a server makes them from a thread. What it is not: the routes (`lyceum.serve.responses.routes`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import Row, delete, insert, literal, select, update

from lyceum.errors import NotFound, StoreError
from lyceum.serve.database import Database
from lyceum.serve.responses.tables import RESPONSES
from lyceum.serve.tree import need_owner

KEEP_S = 30 * 86400.0  # as the original
LEASE_S = 20.0
MAX_TURNS = 1000  # of one chain
CHUNK = 100  # read at once
UNDER_WAY = ("queued", "in_progress")
LOST = {"code": "server_error", "message": "The server stopped before this response was finished."}

Item = dict[str, Any]


class Responses:
    """The responses in a database."""

    def __init__(self, database: Database):
        self.database = database

    def keep(self, owner: str, body: dict[str, Any], items: Sequence[Item]) -> None:
        """Keep a response, finished or under way, with the items that were asked."""
        now = time.time()
        row = {"id": body["id"], "owner": need_owner(owner), "previous": body["previous_response_id"]}
        row |= {"status": body["status"], "input": list(items), "body": body, "created": now, "updated": now}
        with self.database.writing() as connection:
            connection.execute(insert(RESPONSES).values(row))

    def finish(self, owner: str, body: dict[str, Any]) -> bool:
        """Keep the end of one that is under way. Returns whether it still was: it may have been deleted, or cancelled."""
        mine = (RESPONSES.c.id == body["id"], RESPONSES.c.owner == owner, RESPONSES.c.status.in_(UNDER_WAY))
        values = {"status": body["status"], "body": body, "updated": time.time()}
        with self.database.writing() as connection:
            return connection.execute(update(RESPONSES).where(*mine).values(values)).rowcount > 0

    def live(self, ids: Collection[str]) -> None:
        """Say that those who write these are alive."""
        with self.database.writing(durable=False) as connection:
            here = RESPONSES.c.id.in_(ids)
            connection.execute(update(RESPONSES).where(here).values(updated=time.time()))

    def get(self, owner: str, id: str) -> dict[str, Any]:
        """A response as it was told. Raises NotFound."""
        query = select(RESPONSES).where(RESPONSES.c.id == id, RESPONSES.c.owner == need_owner(owner))
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"there is no response {id!r}")
        return _body(row)

    def every(self, owner: str) -> Iterator[dict[str, Any]]:
        """All of an owner's, oldest first, each with its `input`; no transaction is open meanwhile."""
        query = select(RESPONSES).where(RESPONSES.c.owner == need_owner(owner)).order_by(RESPONSES.c.number)
        at = 0
        while True:
            with self.database.reading() as connection:
                rows = connection.execute(query.where(RESPONSES.c.number > at).limit(CHUNK)).all()
            if not rows:
                return
            yield from ({**_body(row), "input": row.input} for row in rows)
            at = rows[-1].number

    def history(self, owner: str, id: str, *, with_output: bool = True) -> list[Item]:
        """The items of a conversation in their order, up to a response; with what that one answered, or without.

        Raises:
            NotFound: there is no such response.
            StoreError: it is not finished, or what came before it is not there any more.
        """
        table = RESPONSES.c
        first = select(table.id, table.previous, literal(0).label("depth"))
        chain = first.where(table.id == id, table.owner == need_owner(owner)).cte("chain", recursive=True)
        before = select(table.id, table.previous, chain.c.depth + 1)
        chain = chain.union_all(
            before.where(table.id == chain.c.previous, table.owner == owner, chain.c.depth < MAX_TURNS)
        )
        query = select(RESPONSES).join(chain, chain.c.id == table.id).order_by(chain.c.depth.desc())
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise NotFound(f"there is no response {id!r}")
        if with_output and _body(rows[-1])["status"] in UNDER_WAY:
            raise StoreError(f"response {id!r} is not finished", hint="wait for it, or cancel it")
        if rows[0].previous is not None:
            if len(rows) > MAX_TURNS:
                raise StoreError(f"a conversation of more than {MAX_TURNS} responses cannot be gone on with")
            raise StoreError(f"response {rows[0].previous!r}, which this conversation began with, was deleted")
        found: list[Item] = []
        for row in rows:
            found += row.input
            if with_output or row is not rows[-1]:
                found += row.body["output"]
        return found

    def delete(self, owner: str, id: str) -> None:
        """Delete a response with what was asked. Raises NotFound."""
        mine = (RESPONSES.c.id == id, RESPONSES.c.owner == need_owner(owner))
        with self.database.writing() as connection:
            if not connection.execute(delete(RESPONSES).where(*mine)).rowcount:
                raise NotFound(f"there is no response {id!r}")

    def sweep(self) -> int:
        """Delete what is too old; returns how many."""
        with self.database.writing() as connection:
            return connection.execute(delete(RESPONSES).where(RESPONSES.c.created < time.time() - KEEP_S)).rowcount


def _body(row: Row[Any]) -> dict[str, Any]:
    body: dict[str, Any] = row.body
    if row.status in UNDER_WAY and row.updated < time.time() - LEASE_S:
        return {**body, "status": "failed", "error": LOST}
    return body
