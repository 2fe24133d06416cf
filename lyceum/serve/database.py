"""A database of the store: opened, brought to the newest version, and written to in transactions.

    database = Database.open("runs/demo/store.sqlite")          # or "postgresql://user@host/name"
    with database.writing() as connection: ...

**SQLite** is the default: one file, with a write-ahead log, so that readers do not wait for a writer nor a writer for readers.
One writes at a time, in any number of processes; the others wait for their turn (`BEGIN IMMEDIATE`: the turn is taken at
the start, or two that have read could never write). What is deleted is overwritten. **PostgreSQL** is for several servers.

What a commit promises: against a killed process, everything. Against a power cut, a durable one (the default) has been
flushed to the disk; one that is not (`durable=False`, the text of an answer under way) may be undone by it, a second or
so back, in order and whole: the database itself is sound. (`synchronous` FULL and NORMAL; `synchronous_commit` on and off.)

**Migrations** are `lyceum.serve.tables.MIGRATIONS`, forward only, all that are missing in one transaction: a program killed
there leaves the old version. A database newer than the program is refused and not touched.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from lyceum.errors import ResourceError, StoreError
from lyceum.serve.tables import MIGRATIONS

FILE = "store.sqlite"  # in a run's folder
BUSY_S = 30.0  # a writer waits so long for its turn
ONE_AT_A_TIME = 7_118_901  # PostgreSQL's lock while the version is looked at: any number that is always this one
Migrations = Sequence[Callable[[Connection], None]]


def address_of(place: str | Path) -> str:
    """The URL of a database from a run's folder, a file, or a URL.

    Raises:
        StoreError: neither SQLite nor PostgreSQL.
    """
    given = str(place)
    if "://" not in given:
        path = Path(given)
        return f"sqlite:///{path / FILE if path.is_dir() else path}"
    scheme, _, rest = given.partition("://")
    if scheme.partition("+")[0] in ("postgres", "postgresql"):
        return f"postgresql+psycopg://{rest}"
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return given
    raise StoreError(
        f"a store cannot be kept at {scheme}://", hint="a file, sqlite:///FILE, or postgresql://USER@HOST/NAME"
    )


class Database:
    """An open database of the newest version. Used by any number of threads; each transaction has a connection."""

    def __init__(self, engine: Engine, place: str) -> None:
        self._turns = _Turns()
        self.engine = engine
        self.place = place  # for a person; without a password

    @classmethod
    def open(cls, place: str | Path, *, migrations: Migrations = MIGRATIONS, must_exist: bool = False) -> Database:
        """Open (or make) a database and bring it to the newest version.

        Args:
            place: a run's folder, a file, or a URL.
            migrations: the steps; tests make older databases with fewer.
            must_exist: do not make a file that is not there.

        Raises:
            StoreError: it cannot be opened, or is newer than this program.
        """
        address = address_of(place)
        try:
            url = sqlalchemy.make_url(address)
        except (ArgumentError, ValueError):
            raise StoreError("not the address of a store", hint="postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
        shown = url.database or "" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
        if must_exist and url.get_backend_name() == "sqlite" and not Path(shown).is_file():
            raise StoreError(f"there is no store at {shown}", hint="`lyceum serve` makes one when it first starts")
        try:
            if url.get_backend_name() == "sqlite":
                Path(shown).touch(mode=0o600)  # nobody else's to read; its log has the same rights
            found = cls(_engine(address), shown)
        except ImportError:
            raise StoreError(
                f"{shown} needs psycopg, which is not installed", hint="pip install 'lyceum[postgres]'"
            ) from None
        except OSError as error:
            raise StoreError(
                f"{shown} cannot be opened: {error.strerror}", hint="check the path and its rights"
            ) from None
        try:
            found._migrate(migrations)
        except DBAPIError as error:
            found.close()
            raise StoreError(f"{shown} cannot be opened: {error.orig}", hint="check the path and its rights") from None
        except BaseException:
            found.close()
            raise
        return found

    def close(self) -> None:
        """Give its connections back."""
        self.engine.dispose()

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and writes nothing."""
        with _plain_errors(self.place), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """A transaction that is committed when the block ends well, and else undone; not inside another of the same thread.

        Raises:
            ResourceError: the disk is full, or no turn to write came.
        """
        turn = self._turns.take() if self.is_sqlite else nullcontext()
        with turn, _plain_errors(self.place), self.engine.connect() as connection:
            connection = connection.execution_options(lyceum="durable" if durable else "write")
            with connection.begin():
                if not self.is_sqlite and not durable:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
                yield connection

    def version(self) -> int:
        """The number of migrations it has seen."""
        with self.reading() as connection:
            return _version(connection)

    def scrub(self) -> None:
        """Take what was deleted out of the files too: out of the search's index and the write-ahead log.

        A deleted row is overwritten at once, but SQLite's index for the search drops a term's traces only when it merges
        its parts, and the log keeps old pages until it begins anew. Takes seconds for a hundred thousand messages.
        """
        if not self.is_sqlite:
            return  # PostgreSQL's own vacuum does this
        with self.writing() as connection:
            for table in ("messages_terms", "conversations_terms"):
                connection.exec_driver_sql(f"INSERT INTO {table} ({table}) VALUES ('optimize')")
        with self.engine.connect() as connection:
            connection = connection.execution_options(lyceum="none")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()

    def _migrate(self, migrations: Migrations) -> None:
        with self.reading() as connection:  # the usual case takes no turn to write
            if _version(connection) == len(migrations):
                return
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})")
            version = _version(connection)
            if version > len(migrations):
                raise StoreError(
                    f"{self.place} has version {version}, and this program knows versions up to {len(migrations)}",
                    hint="a newer lyceum wrote it: update this one",
                )
            if version == 0:
                connection.exec_driver_sql("CREATE TABLE store_versions (version INTEGER, applied DOUBLE PRECISION)")
            for number, step in enumerate(migrations[version:], version + 1):
                step(connection)
                row = {"version": number, "now": time.time()}
                connection.execute(text("INSERT INTO store_versions VALUES (:version, :now)"), row)


class _Turns:
    """A lock that is given in the order in which it was asked for.

    SQLite's own waiting is not fair: one thread that writes again and again kept the answers' saver out for a second.
    """

    def __init__(self) -> None:
        self._waiting: deque[threading.Event] = deque()
        self._mutex = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        mine = threading.Event()
        with self._mutex:
            self._waiting.append(mine)
            if self._waiting[0] is mine:
                mine.set()
        try:
            mine.wait()
            yield
        finally:
            with self._mutex:
                self._waiting.remove(mine)
                if self._waiting:
                    self._waiting[0].set()


def _version(connection: Connection) -> int:
    if not sqlalchemy.inspect(connection).has_table("store_versions"):
        return 0
    return int(connection.exec_driver_sql("SELECT coalesce(max(version), 0) FROM store_versions").scalar_one())


def _engine(address: str) -> Engine:
    is_file = address.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_S}} if is_file else {"pool_pre_ping": True}
    engine = sqlalchemy.create_engine(address, pool_size=8, max_overflow=24, **options)
    if is_file:
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, or tables would be made outside of any transaction
    for pragma in ("foreign_keys = ON", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    until = time.monotonic() + BUSY_S
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:  # another one is just doing it: here SQLite itself does not wait
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _on_begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get("lyceum", "read")
    if mode == "none":
        return
    if mode != "read":
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if mode == 'durable' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN" if mode == "read" else "BEGIN IMMEDIATE")


@contextmanager
def _plain_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        said = str(error.orig)
        if "disk is full" in said or "No space left" in said:
            raise ResourceError(f"the disk is full: could not write {place}", hint="free some space") from error
        if "locked" in said:
            hint = "another process writes for long; try again"
            raise ResourceError(f"{place} was busy for {BUSY_S:g} s", hint=hint) from error
        raise
