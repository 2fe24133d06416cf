"""The routes of the responses API.

    desk = Desk(service, store); make_app(service, routers=[responses(desk)])

| route | what it does |
|---|---|
| POST /v1/responses | a response to items: whole, as a stream of events, or in the background |
| GET, DELETE /v1/responses/{id} | one that was kept |
| POST /v1/responses/{id}/cancel | end one that is made in the background |
| GET /v1/responses/{id}/input_items | all items that it was an answer to |
| POST /v1/responses/input_tokens | how many tokens a request would be read as |

Everything is read by its owner, the caller; another's is not there. What it is not: what they do (`lyceum.serve.responses.desk`).
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.serve.app import EventStream, post, private, read, while_there
from lyceum.serve.chat import chat_of, check_size
from lyceum.serve.guard import caller_of
from lyceum.serve.listing import Page
from lyceum.serve.refusals import Refusal, unsupported
from lyceum.serve.responses.desk import Desk
from lyceum.serve.responses.items import as_chat, as_items
from lyceum.serve.responses.protocol import LOGPROBS, CountRequest, ResponseRequest
from lyceum.serve.service import off_loop


def responses(desk: Desk) -> APIRouter:
    """The routes."""
    router, service = APIRouter(lifespan=desk.life), desk.service

    @post(router, "/v1/responses", ResponseRequest)
    async def create(request: Request) -> Response:
        """A response to items: whole, as a stream of typed events, or made in the background."""
        wish, caller = await read(request, ResponseRequest, service), caller_of(request)
        responding = await while_there(request, desk.open(wish, caller))
        if wish.background:
            return private(await desk.begin(responding))
        if wish.stream:
            return EventStream(responding, is_named=True)
        try:
            return private(await while_there(request, responding.whole()))
        finally:
            responding.close()

    @post(router, "/v1/responses/input_tokens", CountRequest)
    async def count(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        wish = await read(request, CountRequest, service)
        served = await service.find(wish.model, caller_of(request))
        format = chat_of(served)
        items = [*await desk.history(wish, caller_of(request)), *as_items(wish)]
        talk = as_chat(wish, items).conversation
        size = sum(len(message.content) for message in talk.messages)
        check_size(size, served, "input")
        ids = await off_loop(size, lambda: format.prompt(talk))
        return private({"object": "response.input_tokens", "input_tokens": len(ids)})

    @router.get("/v1/responses/{id}", response_class=Response)
    async def retrieve(request: Request, id: str) -> Response:
        """A response that is kept, or one that is made in the background as it stands; told whole, not streamed again."""
        for name, value in request.query_params.multi_items():
            name = name.removesuffix("[]")
            if name not in ("include", "stream", "starting_after", "include_obfuscation"):
                raise Refusal(400, f"Unknown query parameter: '{name[:60]}'.", param=name, code="unknown_parameter")
            if value not in (("", "false", LOGPROBS) if name == "include" else ("", "false")):
                raise unsupported(name, "a response that was kept is told whole, as it was made")
        return private(await desk.get(caller_of(request), id))

    @router.delete("/v1/responses/{id}", response_class=Response)
    async def delete(request: Request, id: str) -> Response:
        """Delete a response, really, with what was asked. A conversation that it is part of cannot be gone on with."""
        await desk.delete(caller_of(request), id)
        return private({"id": id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{id}/cancel", response_class=Response)
    async def cancel(request: Request, id: str) -> Response:
        """End a response that is made in the background; one that has ended stays as it is."""
        return private(await desk.cancel(caller_of(request), id))

    @router.get("/v1/responses/{id}/input_items", response_class=Response)
    async def input_items(request: Request, id: str) -> Response:
        """All items that a response answers, of the conversation before it too; newest first (`limit`, `order`, `after`)."""
        page, owner = Page.of(request), caller_of(request).id
        items = await asyncio.to_thread(desk.kept.history, owner, id, with_output=False)
        return private(page.cut(items))

    return router
