"""One request of a batch: read as its route would read it, answered behind everybody who waits for an answer.

    code, content = await answered(service, desk, caller, "/v1/chat/completions", body)

What its route would refuse is refused here, with the same status and the same words; a stream is no answer in a file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lyceum.serve.app import told, understood
from lyceum.serve.chat import Chat
from lyceum.serve.completions import Completion
from lyceum.serve.limits import Caller
from lyceum.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from lyceum.serve.refusals import Refusal
from lyceum.serve.responses.desk import Desk
from lyceum.serve.responses.protocol import ResponseRequest
from lyceum.serve.service import Service
from lyceum.serve.vectors import embed

Body = dict[str, Any]
Answer = Callable[[Service, Desk, Caller, Body], Awaitable[Body]]


async def _chat(service: Service, desk: Desk, caller: Caller, given: Body) -> Body:
    wish = await understood(given, ChatRequest)
    _no_stream(wish.stream)
    wish.service_tier = "flex"
    chat = await Chat.open(service, wish, caller)
    try:
        return await chat.whole()
    finally:
        chat.close()


async def _completion(service: Service, desk: Desk, caller: Caller, given: Body) -> Body:
    wish = await understood(given, CompletionRequest)
    _no_stream(wish.stream)  # what is not streamed goes behind what is
    completion = await Completion.open(service, wish, caller)
    try:
        return await completion.whole()
    finally:
        completion.close()


async def _embedding(service: Service, desk: Desk, caller: Caller, given: Body) -> Body:
    return await embed(service, await understood(given, EmbeddingRequest), caller)


async def _response(service: Service, desk: Desk, caller: Caller, given: Body) -> Body:
    wish = await understood(given, ResponseRequest)
    _no_stream(wish.stream)
    if wish.background:
        raise Refusal(400, "A request of a batch is in the background already.", param="background")
    wish.service_tier = "flex"
    responding = await desk.open(wish, caller)
    try:
        return await responding.whole()
    finally:
        responding.close()


ENDPOINTS: Mapping[str, Answer] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/v1/responses": _response,
}


def _no_stream(stream: bool | None) -> None:
    if stream:
        raise Refusal(400, "A request of a batch is not streamed.", param="stream")


async def answered(service: Service, desk: Desk, caller: Caller, endpoint: str, given: Body) -> tuple[int, Body, float]:
    """The status of an answer, the answer, and after how many seconds to ask again where that is worth while (else 0)."""
    try:
        return 200, await ENDPOINTS[endpoint](service, desk, caller, given), 0.0
    except Exception as error:
        refusal = told(error)
        return refusal.status, refusal.content, refusal.retry_after_s
