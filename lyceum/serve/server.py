"""The server process: uvicorn around the application, on one event loop.

    serve({"demo": "runs/demo/ppo/checkpoint"}, ServerConfig(port=8000))

It listens on 127.0.0.1 unless told otherwise; an address that others can reach needs keys. Once it answers it says where. HTTP
is parsed by h11, whose bound on headers holds while they come (httptools has none). What uvicorn leaves open is closed here
(`Connection`): a client that sends its headers drop by drop, and one that does not read its answer.

What it is not: TLS by itself or many processes; put a proxy before it, or give it a certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter
from uvicorn.protocols.http.h11_impl import H11Protocol

from lyceum.errors import UsageError
from lyceum.serve.app import make_app
from lyceum.serve.batch.routes import batches
from lyceum.serve.batch.work import Work
from lyceum.serve.files.kept import Files
from lyceum.serve.files.routes import file_routes
from lyceum.serve.label.routes import labelling
from lyceum.serve.limits import MIN_KEY, Limits
from lyceum.serve.models import Served, load
from lyceum.serve.offers import Offers
from lyceum.serve.pages import pages
from lyceum.serve.porter import Porter
from lyceum.serve.responses.desk import Desk
from lyceum.serve.responses.routes import responses
from lyceum.serve.runs import runs_routes
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.tuning.foreman import Crew, Foreman
from lyceum.serve.tuning.kept import Jobs
from lyceum.serve.tuning.recipes import described
from lyceum.serve.tuning.routes import tuning_routes
from lyceum.serve.tuning.shelf import Shelf

KEEP_ALIVE_S = 60  # an idle connection is kept so long
SHUTDOWN_S = 5  # answers under way may take so long to end


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and whom it answers.

    host, port: 0 takes any free port. api_key: one key for everything, beside those of the store. allow_host, allow_origin: names
    and sites beyond this machine's own. max_batch: replies made side by side, of each model. swift: compile the
    steps of small models while they serve. certificate, private_key: PEM
    files, for TLS. store: where conversations and judgements are kept, as `lyceum.serve.database` has it; without one there is no
    chat page. about: what the models studied and what to ask them, which the page shows. runs: name -> the run
    whose offers that model follows (`lyceum.serve.offers`). shelf: the folder whose runs the runs page shows
    (`lyceum.serve.runs`). files: the folder of files and jobs, by default beside the store's file. jobs: whether models may be
    trained over the API; crew: what a job may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    max_batch: int = 16
    swift: bool = False
    certificate: str = ""
    private_key: str = ""
    store: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)
    shelf: Path | None = None
    files: str = ""
    jobs: bool = False
    crew: Crew = field(default_factory=Crew)
    limits: Limits = field(default_factory=Limits)

    def porter(self, store: Store | None) -> Porter:
        """Who is let in: the keys of the store and the one that was given. Raises UsageError where a public address has none."""
        is_public = not is_local(self.host)
        if self.api_key and is_public and len(self.api_key) < MIN_KEY:
            raise UsageError(
                f"a key of {len(self.api_key)} characters can be guessed, and {self.host} can be reached by others",
                hint=f"at least {MIN_KEY} characters, or let one be made: lyceum keys new RUN NAME",
            )
        found = Porter(store.keys.all if store is not None else tuple, api_key=self.api_key)
        if is_public and not found.asks:
            raise UsageError(
                f"{self.host} can be reached by others, and there is no key",
                hint="make one: lyceum keys new RUN NAME, with the run or the store that is served",
            )
        return found


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(models: Mapping[str, Path | str], config: ServerConfig) -> None:
    """Load models and answer until the process is told to end.

    models: name -> checkpoint folder; the first is the default.
    Raises UsageError for an address without keys or that is taken, CheckpointError for a model that cannot be read,
    StoreError for a store that cannot be opened.
    """
    with contextlib.ExitStack() as at_the_end:
        store = Store.open(config.store) if config.store else None
        if store is not None:
            at_the_end.callback(store.close)
        porter = config.porter(store)
        listening = listen(config.host, config.port)
        at_the_end.callback(listening.close)
        read = partial(load, max_batch=config.max_batch, swift=config.swift)
        offers = Offers({name: (run, Path(models[name])) for name, run in config.runs.items()}, read)
        served = [offers.first(name) if name in config.runs else read(name, folder) for name, folder in models.items()]
        service = Service(served, limits=config.limits)
        offers.follow(service)
        at_the_end.callback(offers.close)
        hosts = (*config.allow_host, config.host) if not is_any(config.host) else config.allow_host
        routers = []
        if store is not None:
            desk = Desk(service, store)
            more, forget = files_and_jobs(service, store, config)
            files = Files(store.database, home_of(store, config) / "files", service.limits)
            work = Work(service, store.batches, files, desk)
            about, is_own, stops = config.about, not porter.asks, [desk.stop_all, work.stop_all]
            routers.append(pages(service, store, about=about, is_own_machine=is_own, stops=stops, forget=forget))
            routers += [responses(desk), batches(work), *more, runs_routes(config.shelf), labelling(service, store)]
        app = make_app(service, porter=porter, hosts=hosts, origins=config.allow_origin, routers=routers)
        port = listening.getsockname()[1]
        scheme = "https" if config.certificate else "http"
        shown = f"[{config.host}]" if ":" in config.host else config.host
        names = ", ".join(service.models)
        said = f"serving {names} at {scheme}://{shown}:{port} (the API: {scheme}://{shown}:{port}/v1); Ctrl-C ends it"
        Server(uvicorn_config(app, config), said).run(sockets=[listening])


def home_of(store: Store, config: ServerConfig) -> Path:
    """The folder of files and jobs. Raises UsageError where nobody says which."""
    if not config.files and not store.database.is_sqlite:
        raise UsageError("files need a folder, and the store is no file beside which one could be", hint="--files DIR")
    return Path(config.files or Path(store.database.place).with_suffix(".files"))


def files_and_jobs(
    service: Service, store: Store, config: ServerConfig
) -> tuple[list[APIRouter], list[Callable[[str], Any]]]:
    """The routes of files and, where the server has them, of jobs; and what deletes all of an owner's.

    Models that jobs have made are answered in any case. Raises UsageError where nobody says in which folder files are.
    """
    home = home_of(store, config)
    files, jobs = Files(store.database, home / "files", service.limits), Jobs(store.database)

    def read(name: str, folder: Path) -> Served:
        return load(name, folder, max_batch=config.max_batch)

    service.shelf = Shelf(jobs, home / "jobs", read, retire=lambda served: service.worker.retire(served.seat))
    service.shelf.look()
    told = partial(described, threads=config.crew.num_threads)
    foreman = Foreman(jobs, files, home / "jobs", config.crew, changed=service.shelf.look)

    def forget_jobs(owner: str) -> None:
        ids = jobs.forget(owner)
        for id in ids:
            foreman.forget(id)
        if ids and service.shelf is not None:
            service.shelf.look()

    routers = [file_routes(service, files, told=told)]
    if config.jobs:
        routers.append(tuning_routes(service, files, jobs, foreman))
    return routers, [forget_jobs, files.forget]


def is_any(host: str) -> bool:
    """Whether an address stands for all of this machine's."""
    return host in ("0.0.0.0", "::", "")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound already, so that an address which is taken is said before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", hint="choose another --port, or 0 for any"
        ) from None
    return listening


def uvicorn_config(app: Any, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn is run."""
    return uvicorn.Config(
        app,
        http=partial(Connection, limits=config.limits),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        limit_concurrency=config.limits.connections,
        h11_max_incomplete_event_size=config.limits.header_bytes,
        ssl_certfile=config.certificate or None,
        ssl_keyfile=config.private_key or None,
    )


class Server(uvicorn.Server):
    """A server that says where it is, once it answers."""

    def __init__(self, config: uvicorn.Config, said: str):
        super().__init__(config)
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._said, flush=True)


class Connection(H11Protocol):
    """One connection, which is cut when its client keeps it waiting."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The client has come: its first request must follow."""
        super().connection_made(transport)
        self._expect(self._limits.header_s)

    def data_received(self, data: bytes) -> None:
        """A piece of a request; until its headers are whole, the clock runs."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._unexpect()
        elif self._clock is None:
            self._expect(self._limits.header_s)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._unexpect()
        self._expect(self._limits.stall_s)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        self._unexpect()

    def on_response_complete(self) -> None:
        """An answer has been sent; the next request has its own time."""
        super().on_response_complete()
        self._unexpect()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._unexpect()
        super().connection_lost(exc)

    def _expect(self, seconds: float) -> None:
        self._clock = asyncio.get_running_loop().call_later(seconds, self._cut)

    def _unexpect(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _cut(self) -> None:
        self._clock = None
        if self.transport is not None:
            self.transport.abort()
