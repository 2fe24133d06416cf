"""All of somebody's data: taken along, brought in, deleted.

| route | what it does |
|---|---|
| GET /api/account/export | every conversation with all its branches, every judgement, every response: one JSON text, streamed |
| POST /api/account/import | conversations from such a file, or from ChatGPT's `conversations.json`: so many as a body may hold |
| DELETE /api/account | all of it is deleted, really; what is being answered stops |

An account is what one owner has: the owner of the key that asks, or everybody where no keys are asked for. Keys are not in
it: whoever runs the server makes and forgets them.

What it is not: single conversations (`lyceum.serve.pages`), or the files' shapes (`lyceum.serve.portable`,
`lyceum.serve.arrivals`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from lyceum.errors import DataError
from lyceum.serve.answering import Answers
from lyceum.serve.app import PRIVATE, private, read
from lyceum.serve.arrivals import admit, admit_judgements, read_judgement
from lyceum.serve.arrivals import read as read_arrival
from lyceum.serve.guard import caller_of
from lyceum.serve.limits import Caller
from lyceum.serve.portable import account
from lyceum.serve.refusals import Refusal
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.wishes import Arrivals


def accounts(
    service: Service,
    store: Store,
    answers: Answers,
    *,
    is_own_machine: bool,
    changed: Callable[[str], None] = lambda owner: None,
    stops: Iterable[Callable[[Caller], None]] = (),
    forget: Iterable[Callable[[str], Any]] = (),
) -> APIRouter:
    """The routes.

    is_own_machine: judgements from a file keep the consent they were given with. changed: told whose data have changed at one
    blow. stops: end what else is made for a caller, on the event loop. forget: delete what else is an owner's, on a thread.
    """
    router = APIRouter(include_in_schema=False, default_response_class=Response)

    @router.get("/api/account/export")
    async def export(request: Request) -> Response:
        day = datetime.now(UTC).strftime("%Y-%m-%d")
        headers = {**PRIVATE, "content-disposition": f'attachment; filename="lyceum-{day}.json"'}
        pieces = account(store, caller_of(request).id)  # a plain generator: each piece is made on a thread
        return StreamingResponse(pieces, headers=headers, media_type="application/json")

    @router.post("/api/account/import")
    async def arrive(request: Request) -> Response:
        wish, owner = await read(request, Arrivals, service), caller_of(request).id
        came = await asyncio.to_thread(_admitted, store, owner, wish, is_own_machine)
        changed(owner)
        return private(came)

    @router.delete("/api/account")
    async def delete(request: Request) -> Response:
        caller = caller_of(request)
        for stop in (answers.stop_all, *stops):
            stop(caller)
        for also in forget:
            await asyncio.to_thread(also, caller.id)
        num_deleted = await asyncio.to_thread(store.forget, caller.id)
        changed(caller.id)
        return private({"deleted": num_deleted})

    return router


def _admitted(store: Store, owner: str, wish: Arrivals, keeps_consent: bool) -> dict[str, Any]:
    """Read all, then put all into the store. Raises Refusal, which names the first that is none; then nothing was put there."""
    arrived, where = [], ""
    try:
        for number, row in enumerate(wish.conversations):
            where = f"conversations[{number}]"
            arrived.append(read_arrival(row))
        where = "judgements"
        judged = [read_judgement(row) for row in wish.judgements]
    except DataError as error:
        raise Refusal(400, f"{where}: {error.message}.", param=where, code="invalid_value") from None
    num_judged = admit_judgements(store, owner, judged, keeps_consent=keeps_consent)
    for one in arrived:
        num_judged += admit(store, owner, one, keeps_consent=keeps_consent)
    num_messages = sum(len(one.messages) for one in arrived)
    return {"conversations": len(arrived), "messages": num_messages, "judgements": num_judged}
