"""What every request passes before a route sees it: who may ask, from where, and how much may be sent.

In this order, the cheapest first: the Host (a name that an attacker's page resolves to this machine is not ours), the Origin
(a page of another site may not use what the browser can reach), the key and its scope, then the body, which is read here
whole, within its bounds of bytes and seconds. The route finds `caller(request)` and `body(request)`.

Only `/health`, `/ready` and the pages' own files are open without a key: everything else is shut unless it is opened
here, so that a new route is not forgotten. An address as the Host is always ours: a page cannot give an address as its own name.

A form with a file (`FORMS`) is not read here: its route streams it to disk. Here its bytes are counted while they pass, and
whoever sends them too slowly is cut off.

What it is not: the bounds of single fields (`lyceum.serve.protocol`), nor those of callers (`lyceum.serve.limits.Quota`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lyceum.serve.limits import EVERYBODY, Caller
from lyceum.serve.porter import Porter
from lyceum.serve.refusals import Refusal
from lyceum.serve.service import Service
from lyceum.serve.site import BELOW, PAGES
from lyceum.serve.worker import Gone

OPEN = ("/health", "/ready", *PAGES)  # without a key; the pages' files hold nothing of anybody
SCOPE_OF = {  # the scope that a path needs; all others need "inference"
    "/metrics": "metrics",
    "/tokenize": "models",
    "/detokenize": "models",
    "/tokenizer_info": "models",
    "/openapi.json": "models",
    "/v1/models": "models",
}
# the scope of all paths that begin so
BELOW_SCOPE = {"/v1/models/": "models", "/v1/fine_tuning/": "training", "/api/runs": "runs"}
FORMS = ("/v1/files",)  # take multipart/form-data, and read it themselves
FORM_PACE = 16 << 10  # bytes a second that a form must come with, beyond its first seconds
LOCAL = ("localhost",)
BODIES_BYTES = 64 << 20  # of all requests together


class Guard:
    """ASGI middleware. hosts: names under which the server may be reached; origins: other sites whose pages may use it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: Service,
        porter: Porter,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ):
        self.app = app
        self.service = service
        self.limits = service.limits
        self.porter = porter
        self.hosts = {host.lower().rstrip(".") for host in (*LOCAL, *hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}
        self._num_bytes = 0  # of the bodies that are held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        more = {"x-request-id": f"req_{secrets.token_hex(12)}", "x-content-type-options": "nosniff"}
        if origin is not None and origin.lower() in self.origins:
            more |= {"access-control-allow-origin": origin, "vary": "Origin"}

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if is_form and status >= 400:  # nobody reads what is left of it
                    more["connection"] = "close"
                MutableHeaders(scope=message).update(more)
            await send(message)

        num_bytes, is_form = 0, scope["method"] == "POST" and scope["path"] in FORMS
        try:
            self._check_place(headers, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await self._preflight(headers)(scope, receive, tell)
                return
            scope["lyceum.caller"] = await self._caller(scope["path"], headers)
            if is_form:
                self._check_kind(headers, "multipart/form-data", self.limits.upload_bytes)
                receive = self._counted(receive)
            elif scope["method"] in ("POST", "PUT", "PATCH"):
                content = await self._read(headers, receive)
                num_bytes = len(content)
                scope["lyceum.body"] = content
            await self.app(scope, receive, tell)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, tell)
        except Gone:
            pass
        finally:
            self._num_bytes -= num_bytes
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.answered(route, status, time.perf_counter() - begun)

    def _check_place(self, headers: Headers, origin: str | None) -> None:
        host = headers.get("host", "").lower()
        if not is_ours(host, self.hosts):
            raise Refusal(
                403, f"This server does not answer under the name {host!r} (--allow-host).", code="host_not_allowed"
            )
        if origin is not None and origin.lower() not in self.origins and urlsplit(origin.lower()).netloc != host:
            raise Refusal(
                403, "Pages of another site may not use this server (--allow-origin).", code="origin_not_allowed"
            )

    def _preflight(self, headers: Headers) -> Response:
        """What a browser asks before it sends a page's request."""
        allowed = {
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": headers.get("access-control-request-headers", "")[:1000],
            "access-control-max-age": "600",
        }
        return Response(status_code=204, headers=allowed)

    async def _caller(self, path: str, headers: Headers) -> Caller:
        if path in OPEN or path.startswith(BELOW):
            return EVERYBODY
        caller = await self.porter.caller(headers.get("authorization"))
        below = (scope for start, scope in BELOW_SCOPE.items() if path.startswith(start))
        caller.need(SCOPE_OF.get(path) or next(below, "inference"))
        return caller

    def _check_kind(self, headers: Headers, kind: str, most: int) -> None:
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > most:
            raise _too_large(most)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            named = "JSON" if kind == "application/json" else "a form with a file"
            raise Refusal(415, f"The body must be {named}, and say so: 'Content-Type: {kind}'.")

    def _counted(self, receive: Receive) -> Receive:
        """`receive` for a body that is read by its route: so many bytes at most, and no slower than `FORM_PACE`."""
        begun = asyncio.get_running_loop().time()
        num_bytes, most, is_whole = 0, self.limits.upload_bytes, False

        async def next_piece() -> Message:
            nonlocal num_bytes, is_whole
            end = None if is_whole else begun + self.limits.body_s + num_bytes / FORM_PACE
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "The body came too slowly.", code="timeout") from None
            is_whole = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                raise _too_large(most)
            return message

        return next_piece

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        most = self.limits.body_bytes
        self._check_kind(headers, "application/json", most)
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                is_more = True
                while is_more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    parts.append(part)
                    num_bytes += len(part)
                    self._num_bytes += len(part)
                    is_more = message.get("more_body", False)
                    if num_bytes > most:
                        raise _too_large(most)
                    if self._num_bytes > max(BODIES_BYTES, most):
                        raise Refusal(503, "The server is busy reading.", code="overloaded", retry_after_s=1.0)
        except BaseException as error:
            self._num_bytes -= num_bytes
            if isinstance(error, TimeoutError):
                raise Refusal(408, f"The body did not come within {self.limits.body_s:g} s.", code="timeout") from None
            raise
        return b"".join(parts)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"The request is too large: at most {most} bytes.", code="request_too_large")


def is_ours(host: str, names: Collection[str]) -> bool:
    """Whether a Host header, with or without a port, is an address or one of our names."""
    if host.startswith("["):
        name = host.partition("]")[0][1:]
    else:
        name = host.rpartition(":")[0] if host.count(":") == 1 else host
    if name.rstrip(".") in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def refused(refusal: Refusal) -> Response:
    """A refusal as an answer."""
    return Response(refusal.body, refusal.status, refusal.headers, "application/json")


def caller_of(request: Request) -> Caller:
    """Who asks."""
    found: Caller = request.scope["lyceum.caller"]
    return found


def body_of(request: Request) -> Any:
    """The bytes that were sent."""
    return request.scope["lyceum.body"]
