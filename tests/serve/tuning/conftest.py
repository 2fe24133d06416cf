"""A tiny model that chats, and a server that tunes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.serve.app import make_app
from lyceum.serve.limits import Limits
from lyceum.serve.models import load
from lyceum.serve.pages import pages
from lyceum.serve.porter import Porter
from lyceum.serve.server import ServerConfig, files_and_jobs
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.tuning import foreman
from lyceum.tokens.tokenizer import Tokenizer
from tests.serve.conftest import Running


class Pretend:
    """Processes that exist in memory only: a test says what each does."""

    LOCK = "job.lock"

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.started: list[str] = []
        self.finished: set[str] = set()
        self.errors: dict[str, str] = {}

    def start(self, folder: Path, *, threads: int, memory: int) -> Any:
        if folder.name in self.alive:
            raise BlockingIOError
        self.alive.add(folder.name)
        self.started.append(folder.name)
        return type("Child", (), {"wait": lambda self: None})()

    def is_alive(self, folder: Path) -> bool:
        return folder.name in self.alive

    def stop(self, folder: Path) -> None:
        self.alive.discard(folder.name)

    def has_finished(self, folder: Path, section: str) -> bool:
        return folder.name in self.finished

    def last_error(self, folder: Path) -> str:
        return self.errors.get(folder.name, "")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """In place of real processes, from now on."""
    made = Pretend()
    for name, value in (("process", made), ("every_s", 0.03)):
        monkeypatch.setitem(foreman.Foreman.__init__.__kwdefaults__, name, value)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model of random weights that has the format of chats."""
    folder = tmp_path_factory.mktemp("base") / "demo"
    tokenizer = Tokenizer.train(["user\nassistant\nsystem\n the reply to the question is in the library " * 50], 330)
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=64)
    save_checkpoint(folder, Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    return folder


@pytest.fixture
def tuning(tmp_path: Path, base: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with files and jobs on one store, again where it was before; `running.home` is the folder of its files."""
    opened: list[tuple[Running, Store]] = []

    def make(*, limits: Limits | None = None, porter: Porter | None = None, folder: Path = base) -> Running:
        store = Store.open(tmp_path / "store.sqlite")
        service = Service([load("demo", folder, max_batch=8)], limits=limits)
        config = ServerConfig(jobs=True, crew=foreman.Crew(threads=1))
        more, forget = files_and_jobs(service, store, config)
        app = make_app(service, porter=porter, routers=[pages(service, store, forget=forget), *more])
        running: Any = Running(service, app, service.limits)
        running.store, running.home = store, tmp_path / "store.files"
        opened.append((running, store))
        return running

    yield make
    for running, store in opened:
        running.close()
        store.close()
