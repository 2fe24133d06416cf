"""Databases: opened, migrated, written to by several at once, scrubbed."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import insert, select, text

from lyceum.errors import ResourceError, StoreError
from lyceum.serve import database as database_module
from lyceum.serve.database import Database, address_of
from lyceum.serve.store import Store
from lyceum.serve.tables import CONVERSATIONS, METADATA, MIGRATIONS

NOW = {"created": 1.0, "updated": 1.0}
CONVERSATION = {"id": "c", "owner": "alice", "title": "Teezeit", "pinned": False, "system": "", "parameters": {}, **NOW}
MESSAGE = {"id": "m", "conversation": "c", "role": "user", "content": "明天天气如何", "system": "", "model": "", **NOW}
MESSAGE |= {"tool_calls": "[]", "parameters": "{}", "finish_reason": "", "state": "done", "writer": ""}


def test_an_address_is_a_folder_a_file_or_a_url(tmp_path: Path) -> None:
    assert address_of(tmp_path) == f"sqlite:///{tmp_path}/store.sqlite"
    assert address_of("a/b.db") == "sqlite:///a/b.db"
    assert address_of("sqlite:////var/b.db") == "sqlite:////var/b.db"
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert address_of(f"{scheme}://me@host/name") == "postgresql+psycopg://me@host/name"
    for wrong in ("mysql://me@host/name", "sqlite://"):
        with pytest.raises(StoreError, match="cannot be kept"):
            address_of(wrong)


def test_a_new_database_has_the_tables_that_the_queries_know(place: str) -> None:
    database = Database.open(place)
    assert database.version() == len(MIGRATIONS)
    with database.reading() as connection:
        found = sqlalchemy.inspect(connection)
        for name, table in METADATA.tables.items():
            keys = found.get_pk_constraint(name)["constrained_columns"]
            columns = {c["name"]: c["nullable"] and c["name"] not in keys for c in found.get_columns(name)}
            columns.pop("terms", None)  # PostgreSQL's index for the search
            assert columns == {c.name: c.nullable for c in table.columns}
    database.close()


def test_a_database_of_version_1_with_conversations_in_it_is_migrated(place: str) -> None:
    old = Database.open(place, migrations=MIGRATIONS[:1])
    with old.writing() as connection:
        connection.execute(insert(CONVERSATIONS).values(CONVERSATION))
        connection.execute(
            text(f"INSERT INTO messages ({', '.join(MESSAGE)}) VALUES (:{', :'.join(MESSAGE)})"), MESSAGE
        )
    assert old.version() == 1
    old.close()

    store = Store.open(place)
    assert store.database.version() == len(MIGRATIONS) > 1
    assert [one.title for one in store.latest("alice")] == ["Teezeit"]
    assert [hit.message for hit in store.search("alice", "天气")] == [
        "m"
    ]  # what the new version brought, over the old text
    assert [hit.conversation for hit in store.search("alice", "teezeit")] == ["c"]
    store.close()


def test_a_migration_that_fails_leaves_the_old_version(place: str) -> None:
    Database.open(place, migrations=MIGRATIONS[:1]).close()

    def broken(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (a INTEGER)")
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        Database.open(place, migrations=(*MIGRATIONS, broken))
    old = Database.open(place, migrations=MIGRATIONS[:1])
    assert old.version() == 1
    with old.reading() as connection:
        names = sqlalchemy.inspect(connection).get_table_names()
    assert not [name for name in names if name == "half" or name.endswith("_terms")]
    old.close()


def test_a_database_newer_than_the_program_is_refused(place: str) -> None:
    Database.open(place).close()
    with pytest.raises(StoreError, match=f"has version {len(MIGRATIONS)}, and this program knows versions up to 1"):
        Database.open(place, migrations=MIGRATIONS[:1])
    again = Database.open(place)
    assert again.version() == len(MIGRATIONS)
    again.close()


def test_many_that_open_an_empty_database_at_once_make_it_once(place: str) -> None:
    opened: list[Any] = []

    def open_one() -> None:
        try:
            opened.append(Database.open(place))
        except Exception as error:
            opened.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.version() for one in opened] == [len(MIGRATIONS)] * 6
    with opened[0].reading() as connection:
        versions = connection.exec_driver_sql("SELECT version FROM store_versions ORDER BY 1").scalars().all()
        assert versions == [*range(1, len(MIGRATIONS) + 1)]
    for one in opened:
        one.close()


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk\n" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Database.open(path)
    assert path.read_text() == "remember the milk\n" * 100
    with pytest.raises(StoreError, match="there is no store"):
        Database.open(tmp_path / "none.sqlite", must_exist=True)
    with pytest.raises(StoreError, match="cannot be opened"):
        Database.open(tmp_path / "no" / "such" / "folder.sqlite")


def test_the_file_is_its_owners_alone_and_a_password_is_not_shown(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with database.writing() as connection:
        connection.execute(insert(CONVERSATIONS).values(CONVERSATION))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("store.sqlite", "store.sqlite-wal", "store.sqlite-shm"), 0o600)
    database.close()
    with pytest.raises(StoreError) as said:
        Database.open("postgresql://me:secret-word@127.0.0.1:1/none")
    assert "secret-word" not in str(said.value)


def test_an_error_undoes_the_whole_transaction(place: str) -> None:
    database = Database.open(place)
    with pytest.raises(RuntimeError), database.writing() as connection:
        connection.execute(insert(CONVERSATIONS).values(CONVERSATION))
        raise RuntimeError
    with database.reading() as connection:
        assert connection.execute(select(CONVERSATIONS)).all() == []
    database.close()


def test_a_durable_commit_is_flushed_and_an_answers_text_is_not(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    for durable, level in ((True, 2), (False, 1), (True, 2)):  # SQLite's FULL and NORMAL
        with database.writing(durable=durable) as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    database.close()


def test_readers_do_not_wait_for_a_writer_and_a_writer_that_gets_no_turn_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 0.1)
    first, second = Database.open(tmp_path), Database.open(tmp_path)
    with first.writing() as connection:
        connection.execute(insert(CONVERSATIONS).values(CONVERSATION))
        with second.reading() as other:
            assert other.execute(select(CONVERSATIONS)).all() == []
        with pytest.raises(ResourceError, match="busy"), second.writing():
            pass
    first.close(), second.close()


def test_what_was_deleted_is_in_no_file_after_scrubbing(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    kept, gone = store.new("alice", title="keepsake"), store.new("alice", title="zanzibar")
    for chat, words in ((kept, "umbrella"), (gone, "xylophone")):
        store.say("alice", chat.id, None, "user", f"{words} " * 50)
    store.delete("alice", gone.id)

    def files() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))

    assert b"xylophone" in files()  # the log has it still
    store.database.scrub()
    assert b"umbrella" in files() and b"keepsake" in files()
    assert b"xylophone" not in files() and b"zanzibar" not in files() and gone.id.encode() not in files()
    store.close()
