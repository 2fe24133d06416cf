"""A server with files, whose one model chats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lyceum.serve.app import make_app
from lyceum.serve.files.kept import Files
from lyceum.serve.files.routes import file_routes
from lyceum.serve.limits import Limits
from lyceum.serve.porter import Porter
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from tests.serve.conftest import Running, of_model


@pytest.fixture
def desk(tmp_path: Path, chain: Callable, tokenizer: Any) -> Iterator[Callable[..., Running]]:
    """Start it; `running.files` are its files."""
    opened: list[tuple[Running, Store]] = []

    def make(*, limits: Limits | None = None, porter: Porter | None = None) -> Running:
        service = Service([of_model("m", chain("ab", context_length=64), tokenizer)], limits=limits)
        store = Store.open(tmp_path / "store.sqlite")
        files = Files(store.database, tmp_path / "files", service.limits)
        app = make_app(service, porter=porter, routers=[file_routes(service, files)])
        running: Any = Running(service, app, service.limits)
        running.files = files
        opened.append((running, store))
        return running

    yield make
    for running, store in opened:
        running.close()
        store.close()
