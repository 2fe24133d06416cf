"""Looking inside a served model: attention and the logit lens of a short text, for the page `/inside`.

| route | what it does |
|---|---|
| GET /api/inside | which models can be looked into, their shape, and how long a text may be |
| POST /api/inside | a text, or a question as the chat format asks it: tokens, attention, what each layer would say |

It is one pass on the engines' thread, between two steps, within the bounds of `lyceum.model.inside.most_tokens`; it counts
towards the caller's quota as a prompt of that length. Attention travels as bytes, 255 being 1, the rows of each head one behind
the other without what lies in the future.

What it is not: the values themselves (`lyceum.model.inside`).
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.corpus.records import Conversation, Message
from lyceum.model.inside import Inside, look, most_tokens
from lyceum.model.transformer import Decoder
from lyceum.serve.answers import finite, token_name
from lyceum.serve.app import private, read
from lyceum.serve.chat import chat_of, check_size
from lyceum.serve.guard import caller_of
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.protocol import Wish
from lyceum.serve.refusals import Refusal
from lyceum.serve.service import Service, off_loop
from lyceum.serve.wishes import Model, Text

NUM_TOP = 5


class Glance(Wish):
    """A text to look at. as_chat: it is a question, in the chat format up to where the answer begins."""

    model: Model
    text: Text
    as_chat: bool = False


def inside(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False, default_response_class=Response)

    @router.get("/api/inside")
    async def about(request: Request) -> Response:
        models = [_about(served) for served in service.models.values() if isinstance(served.engine.model, Decoder)]
        return private({"models": models})

    @router.post("/api/inside")
    async def glance(request: Request) -> Response:
        return private(await seen(service, caller_of(request), await read(request, Glance, service)))

    return router


async def seen(service: Service, caller: Caller, wish: Glance) -> dict[str, Any]:
    """What the page shows of a text. Raises Refusal for what is too long, or a model that is not a plain decoder."""
    served = await service.find(wish.model, caller)
    model = served.engine.model
    if not isinstance(model, Decoder):
        raise Refusal(400, f"The model {wish.model!r} cannot be looked into.", param="model", code="unsupported_model")
    check_size(len(wish.text), served, "text")
    ids = await off_loop(len(wish.text), lambda: _ids(served, wish))
    most = most_tokens(model.spec)
    if len(ids) > most:
        message = f"The text is {len(ids)} tokens long, and {most} of this model are looked at in one go."
        raise Refusal(400, message, param="text", code="text_too_long")
    service.quota.take(caller, 1, len(ids))
    try:
        return await service.worker.call(lambda: _told(served, ids, look(model, ids, num_top=NUM_TOP)))
    finally:
        service.quota.give_back(caller, 1)


def _ids(served: Served, wish: Glance) -> list[int]:
    if wish.as_chat:
        return list(chat_of(served).prompt(Conversation((Message("user", wish.text),))))
    return served.tokenizer.encode(wish.text)


def _about(served: Served) -> dict[str, Any]:
    spec = served.engine.model.spec
    shape = {"layers": spec.num_layers, "heads": spec.num_heads, "most_tokens": most_tokens(spec)}
    return {"id": served.name, **shape, "chats": served.chat is not None}


def _told(served: Served, ids: list[int], found: Inside) -> dict[str, Any]:
    """It as JSON; probabilities have four digits."""
    num = len(ids)
    past = torch.ones(num, num, dtype=torch.bool).tril()
    weights = (found.attention_LHTT[:, :, past] * 255).round().to(torch.uint8)
    chances = found.top_logprobs_LTP.exp().tolist()
    names = {token: token_name(served.tokenizer, token) for token in {*ids, *found.top_ids_LTP.flatten().tolist()}}
    lens = [
        [
            [[names[token], round(chance, 4)] for token, chance in zip(*place, strict=True)]
            for place in zip(*row, strict=True)
        ]
        for row in zip(found.top_ids_LTP.tolist(), chances, strict=True)
    ]
    follows = [[round(finite(logprob), 4) for logprob in row] for row in found.next_logprobs_LT.tolist()]
    layers, heads = found.attention_LHTT.shape[:2]
    return {
        "tokens": [names[token] for token in ids],
        "layers": layers,
        "heads": heads,
        "attention": base64.b64encode(weights.numpy().tobytes()).decode(),
        "lens": lens,
        "next_logprobs": follows,
    }
