"""The tables of the store, and the numbered steps that lead an older database to them.

    keys             who may ask: the hash of a key, its scopes, its end; the owner whose conversations it opens
    conversations    of one owner: title, system prompt, parameters, and which leaf of its tree is shown
    messages         a tree: each knows its parent; an answer knows its model, parameters and how it ended
    judgements       what somebody said about answers, with all they saw: prompt, answers, order. Whole in itself
    files            what clients sent and what was made for them (`lyceum.serve.files.tables`)
    jobs             fine-tuning: what was asked, what happened, what was saved (`lyceum.serve.tuning.tables`)
    responses        answers of /v1/responses, each with what was asked (`lyceum.serve.responses.tables`)
    batches          requests from files, and what came of their lines (`lyceum.serve.batch.tables`)

`MIGRATIONS` is history: a step that was released is never changed, a new one is put behind it. The tables below are what
the steps add up to, for the queries; a test compares the two on both databases. The index for the search is in no table:
`lyceum.serve.terms` keeps it, in the shape that each database has for it.

Not here: opening a database and applying the steps (`lyceum.serve.database`).
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Boolean, Connection, Double, Integer, Table

from lyceum.serve import terms
from lyceum.serve.arena.tables import arena_tables
from lyceum.serve.batch.tables import batch_tables
from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column
from lyceum.serve.files.tables import file_tables
from lyceum.serve.label.tables import label_tables
from lyceum.serve.responses.tables import response_tables
from lyceum.serve.tuning.tables import job_tables

STATES = ("streaming", "done", "stopped", "failed")  # of a message; all but an answer under way are done

KEYS = Table(
    "keys",
    METADATA,
    column("id", Words, primary_key=True),
    column("name", Words),
    column("owner", Words),
    column("hash", Words),
    column("scopes", Json),
    column("created", Double),
    column("expires", Double),
)

CONVERSATIONS = Table(
    "conversations",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("title", Words),
    column("pinned", Boolean),
    column("system", Words),
    column("parameters", Json),
    column("leaf", Words, nullable=True),
    column("created", Double),
    column("updated", Double),
)

MESSAGES = Table(
    "messages",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("conversation", Words),
    column("parent", Words, nullable=True),
    column("role", Words),
    column("content", Words),
    column("tool_calls", Json),
    column("tool_call_id", Words, nullable=True),
    column("system", Words),
    column("model", Words),
    column("parameters", Json),
    column("prompt_tokens", Integer, nullable=True),
    column("completion_tokens", Integer, nullable=True),
    column("finish_reason", Words),
    column("state", Words),
    column("writer", Words),
    column("created", Double),
    column("updated", Double),
)

JUDGEMENTS = Table(
    "judgements",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("conversation", Words, nullable=True),
    column("kind", Words),
    column("prompt", Json),
    column("answers", Json),
    column("verdict", Json),
    column("reason", Words),
    column("consent", Boolean),
    column("created", Double),
)

# -------------------------------------------------------------------------------- history

FIRST_TABLES = (
    """CREATE TABLE keys (
        id TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
        scopes TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE conversations (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, title TEXT NOT NULL, pinned BOOLEAN NOT NULL,
        system TEXT NOT NULL, parameters TEXT NOT NULL, leaf TEXT,
        created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX conversations_of ON conversations (owner, pinned DESC, updated DESC, number DESC)",
    # A parent is checked when a transaction ends, and deletes nothing: a chain of cascades has a limit in SQLite.
    """CREATE TABLE messages (
        number {serial}, id TEXT NOT NULL UNIQUE,
        conversation TEXT NOT NULL REFERENCES conversations (id) DEFERRABLE INITIALLY DEFERRED,
        parent TEXT REFERENCES messages (id) DEFERRABLE INITIALLY DEFERRED,
        role TEXT NOT NULL, content TEXT NOT NULL, tool_calls TEXT NOT NULL, tool_call_id TEXT, system TEXT NOT NULL,
        model TEXT NOT NULL, parameters TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER,
        finish_reason TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('streaming', 'done', 'stopped', 'failed')),
        writer TEXT NOT NULL, created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX messages_of ON messages (conversation, number)",
    "CREATE INDEX replies_to ON messages (parent)",
    "CREATE INDEX unfinished ON messages (updated) WHERE state = 'streaming'",
    """CREATE TABLE judgements (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
        conversation TEXT REFERENCES conversations (id) DEFERRABLE INITIALLY DEFERRED,
        kind TEXT NOT NULL, prompt TEXT NOT NULL, answers TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
        consent BOOLEAN NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX judgements_of ON judgements (conversation, number)",
)


def _first_tables(connection: Connection) -> None:
    for statement in FIRST_TABLES:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))


def _search(connection: Connection) -> None:
    """The index for the search, over what is there already."""
    terms.create(connection)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (  # step n leads to version n
    _first_tables,
    _search,
    file_tables,
    job_tables,
    response_tables,
    batch_tables,
    arena_tables,
    label_tables,
)
