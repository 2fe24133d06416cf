"""The table of kept responses, and the step that makes it (see `lyceum.serve.tables`).

responses    of one owner: the items that were asked, the answer as it was told, and which response came before
"""

from __future__ import annotations

from sqlalchemy import Connection, Double, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

RESPONSES = Table(
    "responses",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("previous", Words, nullable=True),
    column("status", Words),
    column("input", Json),
    column("body", Json),
    column("created", Double),
    column("updated", Double),
)

STATEMENTS = (
    """CREATE TABLE responses (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, previous TEXT, status TEXT NOT NULL,
        input TEXT NOT NULL, body TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX responses_of ON responses (owner, number)",
    "CREATE INDEX responses_by_age ON responses (created)",
)


def response_tables(connection: Connection) -> None:
    """The step to the table and its indexes."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
