"""Both databases of the store: a file, and a PostgreSQL server of our own on a socket in a temporary folder."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from lyceum.serve.store import Store

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) + [Path("/usr/bin"), Path("/usr/local/bin")]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a server of PostgreSQL that ends with the tests; it does not run as root."""
    where = next((folder for folder in reversed(BINARIES) if (folder / "initdb").exists()), None)
    if where is None:
        pytest.skip("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg")
    user, run = pwd.getpwuid(os.getuid()).pw_name, list[str]()
    if os.getuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _has_user(name)), "")
        if not user or shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user to run it")
        run = ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: the path of a socket has at most 107 bytes
    try:
        folder.chmod(0o755)
        data, sockets = folder / "data", folder / "s"
        for one in (data, sockets):
            one.mkdir()
            if run:
                shutil.chown(one, user)
        options = {"cwd": folder, "env": {**os.environ, "LC_ALL": "C"}, "stdout": subprocess.DEVNULL}
        initdb = [where / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run([*run, *map(str, initdb)], check=True, timeout=120, **options)
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(sockets)]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [*run, str(where / "postgres"), "-D", str(data), *settings], **{**options, "stderr": log}
            )
        try:
            url = f"postgresql://tests@/postgres?host={sockets}"
            _wait(url, process, folder / "log")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)
    finally:
        shutil.rmtree(folder)


def _has_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql", "postgresql+psycopg"))
    for attempt in itertools.count():
        try:
            engine.connect().close()
            break
        except sqlalchemy.exc.OperationalError:
            assert process.poll() is None and attempt < 1000, log.read_text()
            try:
                process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                pass
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of either kind."""
    if request.param == "sqlite":
        return str(tmp_path / "store.sqlite")
    url: str = request.getfixturevalue("server")
    name = f"t{os.urandom(6).hex()}"
    engine = sqlalchemy.create_engine(url.replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """An empty store, on either database."""
    opened = Store.open(place)
    yield opened
    opened.close()
