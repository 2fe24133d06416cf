"""The tables of fine-tuning jobs, and the step that makes them (see `lyceum.serve.tables`).

jobs              of one owner: what was asked, where it stands, what came of it
job_events        what happened in a job, in order
job_checkpoints   models that a job has saved, with what was measured then
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Connection, Double, Integer, Table

from lyceum.serve.columns import METADATA, NUMBER, SERIAL, Json, Words, column

JOBS = Table(
    "jobs",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("owner", Words),
    column("status", Words),
    column("base", Words),
    column("name", Words),
    column("training_file", Words),
    column("validation_file", Words),
    column("method", Json),
    column("metadata", Json),
    column("seed", BigInteger),
    column("plan", Json),
    column("error", Json),
    column("result_file", Words),
    column("step", Integer),
    column("tokens", BigInteger),
    column("attempts", Integer),
    column("created", Double),
    column("started", Double),
    column("finished", Double),
)

EVENTS = Table(
    "job_events",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("job", Words),
    column("level", Words),
    column("type", Words),
    column("message", Words),
    column("data", Json),
    column("created", Double),
)

CHECKPOINTS = Table(
    "job_checkpoints",
    METADATA,
    column("number", NUMBER, primary_key=True),
    column("id", Words),
    column("job", Words),
    column("name", Words),
    column("folder", Words),
    column("step", Integer),
    column("metrics", Json),
    column("created", Double),
)

STATEMENTS = (
    """CREATE TABLE jobs (
        number {serial}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
        base TEXT NOT NULL, name TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT NOT NULL,
        method TEXT NOT NULL, metadata TEXT NOT NULL, seed BIGINT NOT NULL, plan TEXT NOT NULL, error TEXT NOT NULL,
        result_file TEXT NOT NULL, step INTEGER NOT NULL, tokens BIGINT NOT NULL, attempts INTEGER NOT NULL,
        created DOUBLE PRECISION NOT NULL, started DOUBLE PRECISION NOT NULL, finished DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX jobs_of ON jobs (owner, number)",
    "CREATE INDEX jobs_under_way ON jobs (number) WHERE status IN ('queued', 'running')",
    """CREATE TABLE job_events (
        number {serial}, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id), level TEXT NOT NULL,
        type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX job_events_of ON job_events (job, number)",
    """CREATE TABLE job_checkpoints (
        number {serial}, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id), name TEXT NOT NULL UNIQUE,
        folder TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX job_checkpoints_of ON job_checkpoints (job, number)",
)


def job_tables(connection: Connection) -> None:
    """The step to the tables and their indexes."""
    for statement in STATEMENTS:
        connection.exec_driver_sql(statement.format(serial=SERIAL[connection.dialect.name]))
