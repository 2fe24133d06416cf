"""The routes of batches, in OpenAI's shapes.

| route | what it does |
|---|---|
| POST /v1/batches | begin one, of a file that was uploaded for it |
| GET /v1/batches | the caller's, newest first; `limit`, `after` |
| GET /v1/batches/{id} | one, with its counts as they stand |
| POST /v1/batches/{id}/cancel | end it; what is done of it stays |

Everything is its owner's; another's is not there. What it is not: the work (`lyceum.serve.batch.work`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from lyceum.errors import NotFound
from lyceum.serve.app import post, private, read
from lyceum.serve.batch.requests import ENDPOINTS
from lyceum.serve.batch.work import Work
from lyceum.serve.guard import caller_of
from lyceum.serve.listing import Page, as_list
from lyceum.serve.protocol import Wish
from lyceum.serve.refusals import Refusal, unsupported
from lyceum.serve.responses.protocol import Id, Labels
from lyceum.serve.tree import new_id

WINDOW_S = 24 * 3600
NOT_HERE = ("/v1/moderations", "/v1/images/generations", "/v1/images/edits", "/v1/videos")


class ExpiresAfter(Wish):
    """When the files that a batch makes are to go."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 86400)]


class BatchRequest(Wish):
    """POST /v1/batches"""

    DIFFERS = {
        "endpoint": "requests are answered behind all others, a few at a time; they are not streamed",
        "output_expires_after": "from when the batch was made; otherwise its files stay until they are deleted",
    }
    input_file_id: Id
    endpoint: Annotated[str, Field(max_length=64, json_schema_extra={"enum": [*ENDPOINTS]})]
    completion_window: Literal["24h"]
    metadata: Labels | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        """What is known, and what of it is here. Raises Refusal."""
        if self.endpoint in NOT_HERE:
            raise unsupported("endpoint", f"there is no {self.endpoint}")
        if self.endpoint not in ENDPOINTS:
            raise Refusal(
                400, f"'endpoint' must be one of {', '.join(ENDPOINTS)}.", param="endpoint", code="invalid_value"
            )


def batches(work: Work) -> APIRouter:
    """The routes."""
    router = APIRouter(lifespan=work.life)

    @post(router, "/v1/batches", BatchRequest)
    async def create(request: Request) -> Response:
        """Begin a batch: each line of a file is a request, `{"custom_id", "method": "POST", "url", "body"}`."""
        wish, owner = await read(request, BatchRequest, work.service), caller_of(request).id
        try:
            file = await asyncio.to_thread(work.files.about, owner, wish.input_file_id)
        except NotFound as error:
            raise Refusal(400, error.message, param="input_file_id", code="file_not_found") from None
        if file.purpose != "batch":
            raise Refusal(
                400,
                f"The file's purpose is {file.purpose!r}, expected 'batch'.",
                param="input_file_id",
                code="invalid_purpose",
            )
        body = body_of(wish)
        await work.begin(owner, body)
        return private(body)

    @router.get("/v1/batches", response_class=Response)
    async def listed(request: Request) -> Response:
        """Your batches, newest first (`limit`, `after`)."""
        page, owner = Page.of(request, has_order=False), caller_of(request).id
        rows, has_more = await asyncio.to_thread(work.kept.listed, owner, limit=page.limit, after=page.after)
        return private(as_list(rows, has_more))

    @router.get("/v1/batches/{id}", response_class=Response)
    async def retrieve(request: Request, id: str) -> Response:
        """A batch as it stands; its files are named when it has ended."""
        return private(await asyncio.to_thread(work.kept.get, caller_of(request).id, id))

    @router.post("/v1/batches/{id}/cancel", response_class=Response)
    async def cancel(request: Request, id: str) -> Response:
        """End a batch; what is done of it is in its files soon."""
        return private(await work.cancel(caller_of(request).id, id))

    return router


def body_of(wish: BatchRequest) -> dict[str, Any]:
    """A batch that begins."""
    now = int(time.time())
    after = wish.output_expires_after
    ends = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": new_id("batch"),
        "object": "batch",
        "endpoint": wish.endpoint,
        "errors": None,
        "input_file_id": wish.input_file_id,
        "completion_window": wish.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + WINDOW_S,
        **{f"{end}_at": None for end in ends},
        "output_expires_at": now + after.seconds if after is not None else None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": wish.metadata or {},
        "usage": None,
    }
