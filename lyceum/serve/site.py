"""The pages' files: each `NAME.html` under `lyceum/serve/web` at `/NAME` (index at `/`), all else at `/web/FILE`.

    make_app(service, routers=[site(), ...])

Plain files, read once, each with its entity tag, under a strict content-security policy: no script but our own files, no text
made into elements but through one named policy. They hold nothing of anybody, so they are open without a key (`OPEN`).

What it is not: what the pages ask for (`lyceum.serve.pages` and its neighbours).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.serve.refusals import Refusal

WEB = Path(__file__).parent / "web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGES = {"/" if file.stem == "index" else f"/{file.stem}": file.name for file in sorted(WEB.glob("*.html"))}
BELOW = "/web/"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types lyceum",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}


def site() -> APIRouter:
    """The routes of the files."""
    router = APIRouter()
    files = {file.name: file.read_bytes() for file in WEB.iterdir() if file.suffix in TYPES}

    async def page(request: Request) -> Response:
        return _file(request, PAGES[request.url.path], files)

    for path in PAGES:
        router.add_api_route(path, page, response_class=Response, include_in_schema=False)

    @router.get(BELOW + "{name}", response_class=Response, include_in_schema=False)
    async def web(request: Request, name: str) -> Response:
        if name not in files or name in PAGES.values():
            raise Refusal(404, f"There is no file {name!r}.", code="not_found")
        return _file(request, name, files)

    return router


def _file(request: Request, name: str, files: dict[str, bytes]) -> Response:
    content, kind = files[name], TYPES[Path(name).suffix]
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind + "; charset=utf-8" if kind != "image/svg+xml" else kind)
