"""The tables of the labelling page.

    label_trees      a conversation under way: its state, kind of use, language; a gold one is a question whose answer is known
    label_nodes      its messages: each knows its parent, and who or what wrote it
    label_tasks      what was handed to whom, as it was shown, and what came of it: done, skipped, expired
    label_settings   the rules, and the guidelines in each language

What it is not: what the states mean (`lyceum.serve.label.tree`), or who gets what (`lyceum.serve.label.queue`).
"""

from __future__ import annotations

from sqlalchemy import Boolean, Connection, Double, Integer, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

TREES = Table(
    "label_trees",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("state", Words),
    column("is_gold", Boolean),
    column("use", Words),
    column("language", Words),
    column("system", Words),
    column("source", Words),
    column("created", Double),
    column("updated", Double),
)

NODES = Table(
    "label_nodes",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("tree", Words),
    column("parent", Words, nullable=True),
    column("role", Words),
    column("content", Words),
    column("author", Words),
    column("model", Words),
    column("parameters", Json),
    column("state", Words),
    column("drawn", Integer),
    column("gold", Json),
    column("consent", Boolean),
    column("created", Double),
)

TASKS = Table(
    "label_tasks",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("labeller", Words),
    column("kind", Words),
    column("tree", Words, nullable=True),
    column("node", Words, nullable=True),
    column("shown", Json),
    column("about", Json),
    column("state", Words),
    column("result", Json),
    column("reason", Words),
    column("consent", Boolean),
    column("is_gold", Boolean),
    column("created", Double),
    column("expires", Double),
    column("finished", Double),
)

SETTINGS = Table(
    "label_settings",
    METADATA,
    column("name", Words, primary_key=True),
    column("value", Json),
    column("author", Words),
    column("updated", Double),
)

STATEMENTS = (
    """CREATE TABLE label_trees (
        number {serial}, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, is_gold BOOLEAN NOT NULL, use TEXT NOT NULL,
        language TEXT NOT NULL, system TEXT NOT NULL, source TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX label_trees_in ON label_trees (state, is_gold, number)",
    """CREATE TABLE label_nodes (
        number {serial}, id TEXT NOT NULL UNIQUE,
        tree TEXT NOT NULL REFERENCES label_trees (id) DEFERRABLE INITIALLY DEFERRED,
        parent TEXT REFERENCES label_nodes (id) DEFERRABLE INITIALLY DEFERRED,
        role TEXT NOT NULL, content TEXT NOT NULL, author TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL,
        state TEXT NOT NULL, drawn INTEGER NOT NULL, gold TEXT NOT NULL, consent BOOLEAN NOT NULL,
        created DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX label_nodes_of ON label_nodes (tree, number)",
    """CREATE TABLE label_tasks (
        number {serial}, id TEXT NOT NULL UNIQUE, labeller TEXT NOT NULL, kind TEXT NOT NULL,
        tree TEXT REFERENCES label_trees (id) DEFERRABLE INITIALLY DEFERRED,
        node TEXT REFERENCES label_nodes (id) DEFERRABLE INITIALLY DEFERRED,
        shown TEXT NOT NULL, about TEXT NOT NULL, state TEXT NOT NULL, result TEXT NOT NULL, reason TEXT NOT NULL,
        consent BOOLEAN NOT NULL, is_gold BOOLEAN NOT NULL,
        created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION NOT NULL, finished DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX label_tasks_on ON label_tasks (tree)",
    "CREATE INDEX label_tasks_of ON label_tasks (labeller, number)",
    "CREATE INDEX label_tasks_open ON label_tasks (expires) WHERE state = 'open'",
    """CREATE TABLE label_settings (
        name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, author TEXT NOT NULL, updated DOUBLE PRECISION NOT NULL)""",
)


def label_tables(connection: Connection) -> None:
    """The step that makes them."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
