"""The routes of files, in OpenAI's shapes.

| route | what it does |
|---|---|
| POST /v1/files | a form: `file`, `purpose`, perhaps `expires_after[anchor]` and `expires_after[seconds]` |
| GET /v1/files | the caller's, newest first; `purpose`, `order`, `limit`, `after` |
| GET /v1/files/{id}, /v1/files/{id}/content | one; its bytes, as they came |
| DELETE /v1/files/{id} | it goes |

A file for `fine-tune` or `batch` is read when it comes (`lyceum.serve.files.checks`), on a thread, and refused with the line
that is wrong; what was found in it is its `status_details`. Another's file is not there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from lyceum.log import log
from lyceum.serve.app import PRIVATE, private
from lyceum.serve.files.checks import CHECKS, Found
from lyceum.serve.files.kept import File, Files
from lyceum.serve.files.uploads import Upload, received
from lyceum.serve.guard import caller_of
from lyceum.serve.limits import Limits
from lyceum.serve.listing import as_list, check_page
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal, unsupported
from lyceum.serve.service import Service

PURPOSES = ("fine-tune", "batch", "user_data", "evals")
NOT_FOLLOWED = {"assistants": "there are no assistants here", "vision": "the models here read and write text"}
EXPIRES_S = (3600, 30 * 86400)  # the least and the most of `expires_after`
BATCH_S = 30 * 86400  # a batch's file stays so long, unless its form says otherwise
SWEEP_EVERY_S = 600.0
MAX_PAGE = 10_000

Checks = Mapping[str, Callable[[Path, Limits, Served | None], Found]]
Told = Callable[[Found, Served | None], str]


def file_routes(
    service: Service, files: Files, *, checks: Checks = CHECKS, told: Told = lambda found, served: found.line
) -> APIRouter:
    """The routes.

    checks: purpose -> what reads a file of it. told: what is said of what was found.
    """

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep_now_and_then(files))
        yield
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)

    router = APIRouter(lifespan=life, default_response_class=Response)
    one_at_a_time = asyncio.Semaphore(
        1
    )  # a large file is read for long, on one of the few threads that everybody needs

    @router.post("/v1/files", openapi_extra={"requestBody": FORM})
    async def create(request: Request) -> Response:
        """Send a file, as a form; one for `fine-tune` or `batch` is read at once, and refused with the line that is wrong."""
        owner = caller_of(request).id
        declared = int(request.headers.get("content-length", "0"))
        await asyncio.to_thread(files.check_share, owner, declared)
        async with received(request, files, service.limits) as upload:
            purpose, expires = _purpose(upload), _expires(upload)
            async with one_at_a_time:
                return private((await asyncio.to_thread(keep, owner, upload, purpose, expires)).to_json())

    def keep(owner: str, upload: Upload, purpose: str, expires: float) -> File:
        details = ""
        found: dict[str, Any] = {}
        if purpose in checks:
            served = next((one for one in service.models.values() if one.chat is not None), None)
            upload.draft.flush()
            seen = checks[purpose](upload.draft.path, service.limits, served)
            details, found = told(seen, served), seen.to_json()
        name = upload.filename or ""
        more: dict[str, Any] = {"expires": expires, "details": details, "found": found}
        return files.add(owner, upload.draft, filename=name, purpose=purpose, **more)

    @router.get("/v1/files")
    async def listed(
        request: Request, purpose: str | None = None, order: str = "desc", limit: str = str(MAX_PAGE), after: str = ""
    ) -> Response:
        """Your files, newest first (`purpose`, `order`, `limit`, `after`)."""
        check_page(order, limit, MAX_PAGE)
        wanted: dict[str, Any] = {"purpose": purpose, "order": order, "limit": int(limit), "after": after or None}
        page, has_more = await asyncio.to_thread(files.listed, caller_of(request).id, **wanted)
        return private(as_list([file.to_json() for file in page], has_more))

    @router.get("/v1/files/{id}")
    async def retrieve(request: Request, id: str) -> Response:
        """What is known of a file; `status_details` says what was found in it."""
        return private((await asyncio.to_thread(files.about, caller_of(request).id, id)).to_json())

    @router.get("/v1/files/{id}/content")
    async def content(request: Request, id: str) -> Response:
        """A file's bytes, as they came."""
        path = await asyncio.to_thread(files.path, caller_of(request).id, id)
        headers = {**PRIVATE, "content-disposition": "attachment"}
        return FileResponse(path, headers=headers, media_type="application/octet-stream")

    @router.delete("/v1/files/{id}")
    async def delete(request: Request, id: str) -> Response:
        """Delete a file."""
        await asyncio.to_thread(files.delete, caller_of(request).id, id)
        return private({"id": id, "object": "file", "deleted": True})

    return router


FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": [*PURPOSES]},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                    "expires_after[seconds]": {"type": "integer", "minimum": EXPIRES_S[0], "maximum": EXPIRES_S[1]},
                },
            }
        }
    },
}  # as the application describes itself


def _purpose(upload: Upload) -> str:
    unknown = set(upload.fields) - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown:
        name = sorted(unknown)[0]
        raise Refusal(400, f"Unrecognized request argument supplied: {name[:80]}", param=name, code="unknown_parameter")
    purpose = upload.fields.get("purpose")
    if purpose is None:
        raise Refusal(400, "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter")
    if purpose in NOT_FOLLOWED:
        refusal = unsupported("purpose", NOT_FOLLOWED[purpose])
        raise refusal
    if purpose not in PURPOSES:
        raise Refusal(
            400,
            f"'purpose' is {purpose[:40]!r}, expected one of {', '.join(PURPOSES)}.",
            param="purpose",
            code="invalid_value",
        )
    return purpose


def _expires(upload: Upload) -> float:
    """When the file is to go, in seconds since 1970; 0 for never."""
    anchor, seconds = (upload.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return time.time() + BATCH_S if upload.fields["purpose"] == "batch" else 0.0
    least, most = EXPIRES_S
    is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
    if anchor != "created_at" or not is_number or not least <= int(seconds or 0) <= most:
        raise Refusal(
            400,
            f"'expires_after' needs the anchor 'created_at' and {least} to {most} seconds.",
            param="expires_after",
            code="invalid_value",
        )
    return time.time() + int(seconds or 0)


async def _sweep_now_and_then(files: Files) -> None:
    """Delete what has expired, while the server runs."""
    while True:
        try:
            await asyncio.to_thread(files.sweep)
        except Exception as error:  # the database may be away, and come back
            log.warning(f"expired files could not be deleted: {error}")
        await asyncio.sleep(SWEEP_EVERY_S)
