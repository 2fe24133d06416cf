"""The API: routes over the service, as an ASGI application; and how an answer leaves.

    app = make_app(Service([served]), porter=Porter())       # any ASGI server runs it; ours is lyceum.serve.server

| route | what it does |
|---|---|
| GET /v1/models, /v1/models/{id} | the models |
| POST /v1/chat/completions, /v1/completions, /v1/edits | text |
| POST /v1/embeddings | vectors |
| /v1/responses | text, over what the server keeps (`lyceum.serve.responses.routes`, where there is a store) |
| POST /tokenize, /detokenize, GET /tokenizer_info | tokens |
| GET /health, /ready, /metrics, /openapi.json | the server itself |

Bodies are read by `lyceum.serve.protocol`, strictly. An answer is whole or a stream of events; in both cases somebody listens
whether the client is still there, and if not, the engine is told at once. A failure after a stream has begun is an event
with an `error`, which the official client raises.

Pages, a store and feedback will be further routers over the same service: `make_app` takes them as an argument.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.telemetry import TelemetryConfig
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lyceum import __version__
from lyceum.corpus.records import Conversation
from lyceum.errors import LyceumError
from lyceum.log import log
from lyceum.serve.answers import DONE, event, named_event, token_name
from lyceum.serve.chat import Chat, chat_of, check_size, edit
from lyceum.serve.completions import Completion, check_ids
from lyceum.serve.guard import Guard, body_of, caller_of, refused
from lyceum.serve.porter import Porter
from lyceum.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EditRequest,
    EmbeddingRequest,
    TokenizeRequest,
    Wish,
    read_messages,
    tool_json,
)
from lyceum.serve.refusals import Refusal, of_error, of_validation
from lyceum.serve.service import Service, off_loop
from lyceum.serve.vectors import embed
from lyceum.serve.worker import Gone
from lyceum.tokens.chat import CHAT_TEMPLATE
from lyceum.tokens.tokenizer import ABSENT

W = TypeVar("W", bound=Wish)
T = TypeVar("T")
WRITE_BYTES = 16 << 10  # events that are there already are written together, up to so many
PING_S = 15.0  # of silence, after which a stream shows that it lives
NOTHING_OUT: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}  # nobody else is told anything
SCHEMAS = "#/components/schemas/{model}"
PRIVATE = {"cache-control": "no-store"}


def make_app(
    service: Service,
    *,
    porter: Porter | None = None,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    routers: Iterable[APIRouter] = (),
) -> FastAPI:
    """The application. It starts the service when it starts, and stops it when it ends.

    porter: who is let in; none, and everybody is. hosts, origins: see `lyceum.serve.guard.Guard`. routers: what else there is.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # the built-in pages of FastAPI load scripts from elsewhere: there are none
    app = FastAPI(
        title="Lyceum", version=__version__, lifespan=life, docs_url=None, redoc_url=None, telemetry=NOTHING_OUT
    )
    app.add_middleware(Guard, service=service, porter=porter or Porter(), hosts=tuple(hosts), origins=tuple(origins))
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(Refusal, _failed)
    app.add_exception_handler(LyceumError, _failed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _wrong_place)
    app.include_router(api(service))
    for router in routers:
        app.include_router(router)
    _describe(app)
    return app


def post(router: APIRouter, path: str, kind: type[Wish]) -> Any:
    """A route whose body is a JSON object of this kind, as /openapi.json says too."""
    reference = {"schema": {"$ref": SCHEMAS.format(model=kind.__name__)}}
    described = {"requestBody": {"required": True, "content": {"application/json": reference}}}

    def add(endpoint: Any) -> Any:
        endpoint.kind = kind
        return router.post(path, response_class=Response, openapi_extra=described)(endpoint)

    return add


def kinds(app: FastAPI) -> dict[str, type[Wish]]:
    """The kinds of bodies that the routes of an application take, by their names."""
    found = [getattr(route.endpoint, "kind", None) for route in every_route(app)]
    return {kind.__name__: kind for kind in found if kind is not None}


def every_route(app: FastAPI) -> list[APIRoute]:
    """All routes of an application, those of the routers within routers too."""
    found = (context.original_route for context in iter_route_contexts(app.routes))
    return [route for route in found if isinstance(route, APIRoute)]


def api(service: Service) -> APIRouter:
    """The routes of the API."""
    router = APIRouter()
    get = partial(router.get, response_class=Response)

    @get("/health")
    async def health() -> Response:
        """Whether the process answers. Open without a key."""
        return as_json({"status": "ok"})

    @get("/ready")
    async def ready() -> Response:
        """Whether the engine runs. Open without a key."""
        if not service.worker.is_running:
            raise Refusal(503, "The engine does not run.", code="not_ready")
        return as_json({"status": "ready"})

    @get("/metrics")
    async def metrics() -> Response:
        """The server's numbers, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/v1/models")
    async def models(request: Request) -> Response:
        """The models. Beyond the original: `max_model_len`, `parent`, and `learned_from`, the line that a model comes from."""
        return as_json({"object": "list", "data": await service.visible(caller_of(request))})

    @get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        """One model; its name may hold `/` and `:`."""
        own = service.shelf.about(model, caller_of(request)) if service.shelf is not None else None
        return as_json(service.model(model).to_json() if own is None else own.shown)

    @post(router, "/v1/chat/completions", ChatRequest)
    async def chat_completions(request: Request) -> Response:
        """A conversation's next message, whole or as a stream of events."""
        wish = await read(request, ChatRequest, service)
        return await answer(request, Chat.open(service, wish, caller_of(request)), bool(wish.stream))

    @post(router, "/v1/completions", CompletionRequest)
    async def completions(request: Request) -> Response:
        """Texts or token lists and how they go on, whole or as a stream of events."""
        wish = await read(request, CompletionRequest, service)
        return await answer(request, Completion.open(service, wish, caller_of(request)), bool(wish.stream))

    @post(router, "/v1/edits", EditRequest)
    async def edits(request: Request) -> Response:
        """The route of 2022: a model that chats is asked to edit a text."""
        wish = await read(request, EditRequest, service)
        return as_json(await while_there(request, edit(service, wish, caller_of(request))))

    @post(router, "/v1/embeddings", EmbeddingRequest)
    async def embeddings(request: Request) -> Response:
        """Vectors, of a model whose folder says how they are made."""
        wish = await read(request, EmbeddingRequest, service)
        return as_json(await while_there(request, embed(service, wish, caller_of(request))))

    @post(router, "/tokenize", TokenizeRequest)
    async def tokenize(request: Request) -> Response:
        """A text, or a conversation as it is put before a model, as tokens; in vLLM's shapes."""
        wish = await read(request, TokenizeRequest, service)
        wish.check()
        served = await service.find(wish.model, caller_of(request))
        if wish.prompt is not None:
            text = wish.prompt
            ids = await off_loop(len(text), lambda: served.tokenizer.encode(text))
        else:
            format = chat_of(served)
            messages = read_messages(wish.messages or [])
            talk = Conversation(messages, tuple(tool_json(tool) for tool in wish.tools or ()))
            size = sum(len(message.content) for message in messages)
            check_size(size, served, "messages")
            is_open = wish.add_generation_prompt is not False
            ids = await off_loop(size, lambda: format.prompt(talk) if is_open else format.render(talk).ids)
        found = {"count": len(ids), "max_model_len": served.context_length, "tokens": ids}
        if wish.return_token_strs:
            found["token_strs"] = [token_name(served.tokenizer, token) for token in ids]
        return as_json(found)

    @post(router, "/detokenize", DetokenizeRequest)
    async def detokenize(request: Request) -> Response:
        """Tokens as a text."""
        wish = await read(request, DetokenizeRequest, service)
        served = await service.find(wish.model, caller_of(request))
        check_ids(wish.tokens, served, "tokens")
        return as_json({"prompt": served.tokenizer.decode(wish.tokens, keep_special=True)})

    @get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        """The marks and the chat template of a vocabulary, as lm-evaluation-harness reads them."""
        served = await service.find(model, caller_of(request))
        tokenizer = served.tokenizer
        named = {number: name for name, number in tokenizer.special_ids.items()}
        return as_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": served.engine.vocab_size,
                "model_max_length": served.context_length,
                "bos_token": None,
                "eos_token": named[next(token for token in tokenizer.stop_ids if token != ABSENT)],
                "pad_token": named.get(tokenizer.pad_id),
                "chat_template": None if served.chat is None else CHAT_TEMPLATE,
            }
        )

    return router


# -- bodies ------------------------------------------------------------------------------------------------------------


async def read(request: Request, kind: type[W], service: Service) -> W:
    """The object that was sent. Raises Refusal for what is no JSON, or not of this kind."""
    content = body_of(request)
    given = await off_loop(len(content), lambda: _parse(content, service.limits.items))
    return await understood(given, kind, len(content))


async def understood(given: Any, kind: type[W], size: int = 0) -> W:
    """A JSON value as an object of this kind; size: its bytes. Raises Refusal for what is none."""
    if not isinstance(given, dict):
        raise Refusal(400, "The body must be a JSON object.", code="invalid_type")
    try:
        wish = await off_loop(size, lambda: kind.model_validate(given))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise of_validation(found, given, [*kind.model_fields, *kind.NOT_FOLLOWED]) from None
    check = getattr(wish, "check", None)
    if check is not None:
        check()
    return wish


def _parse(content: bytes, max_items: int) -> Any:
    if content.count(b",") + content.count(b"[") + content.count(b"{") > max_items:
        raise Refusal(400, f"The body has too many values: at most {max_items}.", code="request_too_large")
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as error:  # broken, nested deeper than 200, not a number, half a character
        raise Refusal(400, f"We could not parse the JSON body of your request: {error}.", code="invalid_json") from None


# -- answers -----------------------------------------------------------------------------------------------------------


def as_json(content: Any) -> Response:
    """An answer in one piece."""
    return Response(json.dumps(content, separators=(",", ":")), media_type="application/json")


def private(content: Any) -> Response:
    """An answer in one piece that no cache keeps."""
    found = as_json(content)
    found.headers.update(PRIVATE)
    return found


async def answer(request: Request, opening: Coroutine[Any, Any, Chat | Completion], is_stream: bool) -> Response:
    """The answer to a request for text."""
    if is_stream:
        return EventStream(await opening)

    async def whole() -> dict[str, Any]:
        opened = await opening
        try:
            return await opened.whole()
        finally:
            opened.close()

    return as_json(await while_there(request, whole()))


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for a client; it is given up when the client leaves, which raises Gone."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Opened(Protocol):
    """What a stream of events is made of. has_news: more has come already, so that events may leave together."""

    @property
    def has_news(self) -> bool: ...

    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """What each event says."""

    def close(self) -> None:
        """Nobody reads it any more."""


class EventStream(Response):
    """An answer as server-sent events, while it is made. is_named: each says its type in a line of its own; no [DONE] ends it."""

    def __init__(self, opened: Opened, *, is_named: bool = False):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.opened = opened
        self._write, self._end = (named_event, b"") if is_named else (event, DONE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        last = clock()

        async def write(content: bytes) -> None:
            nonlocal last
            last = clock()
            await send({"type": "http.response.body", "body": content, "more_body": True})

        async def listen() -> None:
            await gone(receive)
            self.opened.close()

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(0.01, last + PING_S - clock()))
                if clock() - last >= PING_S:
                    await write(b": ping\n\n")

        others = [asyncio.ensure_future(listen()), asyncio.ensure_future(ping())]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            waiting = b""
            try:
                async for content in self.opened.chunks():
                    waiting += self._write(content)
                    if not self.opened.has_news or len(waiting) > WRITE_BYTES:
                        await write(waiting)
                        waiting = b""
                await write(waiting + self._end)
            except Exception as error:
                await write(waiting + event(told(error).content))
            for other in others:
                other.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for other in others:
                other.cancel()
            self.opened.close()


# -- errors ------------------------------------------------------------------------------------------------------------


def told(error: Exception) -> Refusal:
    """What a client is told of an error; one of our own is logged."""
    refusal = of_error(error)
    if refusal.status == 500:
        log.warning(f"a request failed: {type(error).__name__}: {error}")
    return refusal


async def _failed(request: Request, error: Exception) -> Response:
    return refused(told(error))


async def _wrong_place(request: Request, error: Exception) -> Response:
    """A value in the address that is none, such as ?limit=many."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return refused(Refusal(400, f"Invalid value for '{name}': {first['msg']}.", param=name, code="invalid_value"))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "Invalid URL", 405: "Method not allowed"}.get(error.status_code, "Refused")
    message = f"{said} ({request.method} {request.url.path})"
    code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
    return refused(Refusal(error.status_code, message, code=code))


def _describe(app: FastAPI) -> None:
    """Put the requests' schemas into the application's own description."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        found = described()
        _, schemas = models_json_schema([(kind, "validation") for kind in kinds(app).values()], ref_template=SCHEMAS)
        found.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
        return found

    app.openapi = openapi  # type: ignore[method-assign]
