"""Servers in the test's own process, on real sockets, with models whose replies are known beforehand; the chat page on them.

And both databases of the store: a file, and a PostgreSQL server of our own on a socket in a temporary folder.
"""

from __future__ import annotations

import http.client
import importlib
import itertools
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import openai
import pytest
import sqlalchemy
import torch
from torch import Tensor, nn

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.serve.app import make_app
from lyceum.serve.keys import Key, hash_of
from lyceum.serve.limits import Limits
from lyceum.serve.models import Pooling, Served, serve
from lyceum.serve.porter import Porter
from lyceum.serve.server import Server, ServerConfig, listen, uvicorn_config
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["user\nassistant\nsystem\ntool\n"] * 50 + ["the reply to the question is in the library "] * 50
    return Tokenizer.train(texts, 330)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


class Chain(nn.Module):
    """Says what follows the last token in a chain of tokens, whoever else is in the batch; `pause_s` before each step."""

    def __init__(self, tokenizer: Tokenizer, context_length: int = 512):
        super().__init__()
        self.tokenizer = tokenizer
        self.next = torch.full((tokenizer.vocab_size,), tokenizer.turn_end_id)
        self.spec = SimpleNamespace(vocab_size=tokenizer.vocab_size, context_length=context_length, width=1)
        self.pause_s = 0.0
        self.error: Exception | None = None

    def says(self, ids: list[int], after: int) -> None:
        """From the token `after` on it says these, then whatever follows the last of them."""
        for before, token in zip([after, *ids], ids, strict=False):
            self.next[before] = token

    def forward(self, tokens_BT: Tensor, *, cache: object = None) -> Tensor:
        if self.error is not None:
            raise self.error
        time.sleep(self.pause_s)
        return tokens_BT.unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        return 50.0 * nn.functional.one_hot(self.next[hidden[..., 0]], len(self.next)).float()


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as the tokens of its bytes; a chain can say it if no byte is there twice."""
    single = {piece: number for number, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


@pytest.fixture
def chain(tokenizer: Tokenizer, chat: ChatFormat) -> Callable[..., Chain]:
    """A model that answers any conversation with a text (each byte at most once), or with given ids."""

    def make(reply: str | list[int] = "", *, after: int | None = None, **settings: Any) -> Chain:
        model = Chain(tokenizer, **settings)
        ids = bytewise(tokenizer, reply) if isinstance(reply, str) else reply
        if ids:
            model.says(ids, chat._reply_header[-1] if after is None else after)
        return model

    return make


@pytest.fixture(scope="session")
def decoder(tokenizer: Tokenizer) -> Decoder:
    """Two layers of random weights, logits far from flat."""
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 4, 2, head_width=8, ffn_width=64, context_length=1024)
    made = Decoder(spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight *= 5
    return made


class Running:
    """A server that answers, and ways to ask it."""

    def __init__(self, service: Service, app: Any, limits: Limits):
        self.service, self.app = service, app
        self.clients: list[openai.OpenAI] = []
        config = ServerConfig(port=0, limits=limits)
        self.socket = listen(config.host, 0)
        self.port: int = self.socket.getsockname()[1]
        self.server = Server(uvicorn_config(app, config), "")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = "any", **settings: Any) -> openai.OpenAI:
        self.clients.append(
            openai.OpenAI(base_url=self.url + "/v1", api_key=key, **{"max_retries": 0, "timeout": 30, **settings})
        )
        return self.clients[-1]

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> SimpleNamespace:
        """One request over a connection of its own: status, headers, text, json."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if sent is not None else {}
        connection.request(method, path, sent, {**kind, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        found = SimpleNamespace(status=answer.status, headers=answer.headers, text=content.decode(), json=None)
        if answer.headers.get("content-type", "").startswith("application/json"):
            found.json = json.loads(content)
        return found

    def post(self, path: str, body: Any, **headers: str) -> SimpleNamespace:
        return self.ask("POST", path, body, headers)

    def open_stream(self, path: str, body: Any) -> socket.socket:
        """A raw connection on which a request was sent and the answer is not yet read."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def idle(self, within_s: float = 5.0) -> bool:
        """Whether the engines have nothing to do, soon."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if all(not served.seat.live for served in self.service.models.values()) and not self.service.quota.running:
                return True
            time.sleep(0.005)
        return False

    def serve(self, models: list[Served]) -> None:
        """From now on these models are served."""
        self.service.models = {served.name: served for served in models}
        self.service.worker.seats = [served.seat for served in models]

    def leave(self) -> None:
        """Close the clients."""
        for client in self.clients:
            client.close()
        self.clients.clear()

    def close(self) -> None:
        self.leave()
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="session")
def usual(tokenizer: Tokenizer) -> Iterator[Running]:
    """A server with the usual settings, for one test after another: it costs half a second to start."""
    service = Service([of_model("none", Chain(tokenizer), tokenizer)])
    running = Running(service, make_app(service), service.limits)
    yield running
    running.close()


@pytest.fixture
def start(usual: Running, tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """A server with models (name=model): the usual one, or with settings one of its own that ends with the test."""
    running: list[Running] = [usual]

    def make(
        *, limits: Limits | None = None, porter: Porter | None = None, max_batch: int = 8,
        can_insert: bool = False, pooling: Pooling | None = None, lineage: Sequence[Any] = (),
        hosts: tuple[str, ...] = (), origins: tuple[str, ...] = (), **models: nn.Module,
    ) -> Running:  # fmt: skip
        served = [
            of_model(name, model, tokenizer, max_batch, can_insert, pooling, lineage) for name, model in models.items()
        ]
        if not (limits or porter or hosts or origins):
            usual.serve(served)
            return usual
        service = Service(served, limits=limits)
        app = make_app(service, porter=porter, hosts=hosts, origins=origins)
        running.append(Running(service, app, service.limits))
        return running[-1]

    yield make
    usual.leave()
    for one in running[1:]:
        one.close()


def of_model(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    max_batch: int = 8,
    can_insert: bool = False,
    pooling: Pooling | None = None,
    lineage: Sequence[Any] = (),
) -> Served:
    engine = Engine(model, max_batch=max_batch, token_bytes=tokenizer.token_bytes)
    more: Any = {"created": 1, "fingerprint": "abc", "lineage": lineage}
    return serve(name, engine, tokenizer, can_insert=can_insert, pooling=pooling, **more)


@pytest.fixture(scope="session")
def known() -> Callable[..., Porter]:
    """A porter who knows people by name; the secret of each is the first letter, forty times."""
    return lambda *names: Porter(lambda: [Key(name, name, name, hash_of(name[0] * 40)) for name in names])


def events(text: str) -> list[Any]:
    """The events of a stream, the last one `[DONE]`."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


@pytest.fixture(scope="session")
def read_events() -> Callable[[str], list[Any]]:
    return events


# -- the store -------------------------------------------------------------------------------------------------------

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) + [Path("/usr/bin"), Path("/usr/local/bin")]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
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
    url: str = request.getfixturevalue("postgresql")
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


# -- the chat page -----------------------------------------------------------------------------------------------------


class Scripted:
    """In an engine's place: replies to the last thing said with what a script makes of it and of the request's parameters.

    One token of each request a step, `pause_s` before it. Who goes on with an answer hears the rest of it.
    """

    max_batch, context_length, model = 8, 4096, None

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str, SamplingParams], str], pause_s: float = 0.0):
        self.tokenizer, self.script, self.pause_s = tokenizer, script, pause_s
        self.vocab_size = tokenizer.vocab_size
        self.live: dict[int, tuple[list[int], SamplingParams, int]] = {}  # id -> reply, parameters, tokens made
        self.heard: list[str] = []  # prompts as text
        self.num_made = self.num_added = 0

    def add(self, prompt: list[int], params: SamplingParams, *, key: str = "", is_background: bool = False) -> int:
        said = b"".join(self.tokenizer.token_bytes[token] for token in prompt).decode()
        self.heard.append(said)
        asked, begun = said.rsplit("user\n", 1)[1].rsplit("\nassistant\n", 1)
        text = self.script(asked, params)
        assert text.startswith(begun)
        self.num_added += 1
        self.live[self.num_added] = (
            [*self.tokenizer.encode(text[len(begun) :]), self.tokenizer.turn_end_id],
            params,
            0,
        )
        return self.num_added

    @property
    def is_idle(self) -> bool:
        return not self.live

    def step(self) -> list[Output]:
        time.sleep(self.pause_s)
        done = []
        for id, (reply, params, num) in list(self.live.items()):
            self.live[id] = reply, params, num + 1
            self.num_made += 1
            if num + 1 == min(len(reply), params.max_tokens):
                finish = "stop" if num + 1 == len(reply) else "length"
                done.append(Output(id, reply[: num + 1], finish))
                del self.live[id]
        return done

    def reply(self, id: int, start: int = 0) -> list[int]:
        reply, _, num = self.live[id]
        return reply[start:num]

    def abort(self, id: int) -> None:
        self.live.pop(id, None)


@pytest.fixture
def page(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """A server with the pages, whose models say what a script makes of what is said; `running.engines` are they.

    models: real ones beside them.
    """
    pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")
    pages, store_of = importlib.import_module("lyceum.serve.pages"), importlib.import_module("lyceum.serve.store").Store
    runs_routes = importlib.import_module("lyceum.serve.runs").runs_routes
    teaching = importlib.import_module("lyceum.serve.teaching").Teaching
    labelling = importlib.import_module("lyceum.serve.label.routes").labelling
    opened: list[tuple[Running, Any]] = []

    def make(
        script: Callable[[str, SamplingParams], str] = lambda text, params: f"You said: {text}", *, pause_s: float = 0.0,
        names: tuple[str, ...] = ("demo",), about: Mapping[str, Any] | None = None, porter: Porter | None = None,
        lines: Mapping[str, Sequence[Any]] = MappingProxyType({}), models: Mapping[str, nn.Module] = MappingProxyType({}),
        can_insert: bool = False, shelf: Path | None = None, engine: Callable[..., Any] = Scripted,
    ) -> Running:  # fmt: skip
        engines = {name: engine(tokenizer, script, pause_s) for name in names}
        served = [serve(name, e, tokenizer, lineage=lines.get(name, ())) for name, e in engines.items()]  # type: ignore[arg-type]
        served += [of_model(name, model, tokenizer, can_insert=can_insert) for name, model in models.items()]
        service = Service(served)
        store = store_of.open(tmp_path / "store.sqlite")
        taught = teaching(service, store)
        routers = [
            pages.pages(service, store, about=about, teaching=taught),
            runs_routes(shelf),
            labelling(service, store),
        ]
        app = make_app(service, porter=porter, routers=routers)
        running: Any = Running(service, app, service.limits)
        running.engines, running.store = engines, store
        running.teaching = taught
        opened.append((running, store))
        return running

    yield make
    for running, store in opened:
        running.close()
        store.close()


# -- what the server keeps for programs --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def keeper(tokenizer: Tokenizer, known: Callable[..., Porter], tmp_path_factory: Any) -> Iterator[Running]:
    """A server with a store, for alice and bob (each with their own key), for one test after another."""
    pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")
    pages, desks, routes, files, uploads, work, batches = (
        importlib.import_module(f"lyceum.serve.{name}")
        for name in (
            "pages", "responses.desk", "responses.routes", "files.kept", "files.routes", "batch.work", "batch.routes"
        )
    )  # fmt: skip
    service = Service([of_model("none", Chain(tokenizer), tokenizer)])
    place = tmp_path_factory.mktemp("keeper")
    store = Store.open(place / "store.sqlite")
    desk = desks.Desk(service, store)
    kept = files.Files(store.database, place / "files")
    working = work.Work(service, store.batches, kept, desk)
    routers = [pages.pages(service, store, stops=[desk.stop_all, working.stop_all]), routes.responses(desk)]
    routers += [uploads.file_routes(service, kept), batches.batches(working)]
    app = make_app(service, porter=known("alice", "bob"), routers=routers)
    running: Any = Running(service, app, service.limits)
    running.store, running.desk, running.files, running.work = store, desk, kept, working
    yield running
    running.close()
    store.close()


@pytest.fixture
def keep(keeper: Running, tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """That server with models (name=model)."""

    def make(*, max_batch: int = 8, pooling: Pooling | None = None, **models: nn.Module) -> Running:
        keeper.serve([of_model(name, model, tokenizer, max_batch, pooling=pooling) for name, model in models.items()])
        return keeper

    yield make
    keeper.leave()
