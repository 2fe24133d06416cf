"""The table of battles that nobody has voted on yet: which model wrote which answer, kept apart from the answers.

Until the vote the messages themselves name no model, so that no route can tell what is not there. With the vote the names move
into the messages, and the row goes. With a message that is deleted its battle goes too.
"""

from __future__ import annotations

from sqlalchemy import Connection, Double, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

BATTLES = Table(
    "battles",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("conversation", Words),
    column("left_message", Words),
    column("right_message", Words),
    column("sealed", Json),
    column("created", Double),
)

STATEMENTS = (
    """CREATE TABLE battles (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, conversation TEXT NOT NULL,
        left_message TEXT NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
        right_message TEXT NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
        sealed TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX battles_of ON battles (conversation, number)",
    "CREATE INDEX battles_left ON battles (left_message)",
    "CREATE INDEX battles_right ON battles (right_message)",
)


def arena_tables(connection: Connection) -> None:
    """The step that makes it."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
