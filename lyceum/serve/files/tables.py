"""The table of files, and the step that makes it (see `lyceum.serve.tables`).

files    of one owner: name, purpose, size, end, and what was found when it came. The bytes lie in a folder, by the id
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Connection, Double, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

FILES = Table(
    "files",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("filename", Words),
    column("purpose", Words),
    column("bytes", BigInteger),
    column("details", Words),
    column("found", Json),
    column("created", Double),
    column("expires", Double),
)

STATEMENTS = (
    """CREATE TABLE files (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
        bytes BIGINT NOT NULL, details TEXT NOT NULL, found TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX files_of ON files (owner, number)",
    "CREATE INDEX files_by_end ON files (expires)",
)


def file_tables(connection: Connection) -> None:
    """The step to the table and its indexes."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
