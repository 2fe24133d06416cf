"""The tables of batches, and the step that makes them (see `lyceum.serve.tables`).

batches        of one owner: what was asked, how far it is, and which server works on it
batch_lines    what came of a line, once; they go when the batch has ended and its files hold them
"""

from __future__ import annotations

from sqlalchemy import Boolean, Connection, Double, Integer, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

BATCHES = Table(
    "batches",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("status", Words),
    column("body", Json),
    column("writer", Words),
    column("created", Double),
    column("updated", Double),
)

LINES = Table(
    "batch_lines",
    METADATA,
    column("batch", Words, primary_key=True),
    column("line", Integer, primary_key=True),
    column("has_failed", Boolean),
    column("result", Json),
)

STATEMENTS = (
    """CREATE TABLE batches (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL, body TEXT NOT NULL,
        writer TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX batches_of ON batches (owner, number)",
    """CREATE TABLE batch_lines (
        batch TEXT NOT NULL, line INTEGER NOT NULL, has_failed BOOLEAN NOT NULL, result TEXT NOT NULL,
        PRIMARY KEY (batch, line))""",
)


def batch_tables(connection: Connection) -> None:
    """The step to the tables and their index."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
