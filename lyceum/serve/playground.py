"""The playground's own routes: which models write and insert, and a text as it should have been, kept to learn from.

| route | what it does |
|---|---|
| GET /api/playground | the models: whether each inserts, chats, how much it reads |
| POST /api/playground/corrections | what a model wrote, and what it should have written |

What is written there is made by the API itself (`/v1/completions`, `/v1/edits`), by the same key. A correction becomes a
conversation of its owner, the prompt said by them and the model's text as its answer, with the correction as a judgement: so
it is seen, exported and deleted like any other, and learned from with consent only (`lyceum.serve.feedback`). That is how
InstructGPT's first prompts came from the users of a playground (Ouyang et al. 2022, 3.2).

What it is not: for insertions, whose prompt has two ends, which no conversation says.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from lyceum.errors import StoreError
from lyceum.serve.app import private, read
from lyceum.serve.chat import asked_to_edit
from lyceum.serve.guard import caller_of
from lyceum.serve.models import Served
from lyceum.serve.protocol import Wish
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.wishes import Model, Parameters, Text

MAX_TITLE = 80  # characters of the prompt


class Written(Wish):
    """What a model wrote after a prompt, and what it should have written.

    instruction: of an edit, whose prompt is the text to be edited. checkpoint: `system_fingerprint` of the answer.
    """

    model: Model
    prompt: Annotated[str, Field(max_length=1_000_000)]
    instruction: Annotated[str, Field(max_length=100_000)] = ""
    completion: Annotated[str, Field(max_length=1_000_000)]
    correction: Text
    checkpoint: Annotated[str, Field(max_length=64)] = ""
    parameters: Parameters = Field(default_factory=Parameters)
    consent: bool = False


def playground(service: Service, store: Store) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False, default_response_class=Response)

    @router.get("/api/playground")
    async def about(request: Request) -> Response:
        here = [_about(served) for served in service.models.values()]
        own = [
            _about_own(shown)
            for shown in await service.visible(caller_of(request))
            if shown["id"] not in service.models
        ]
        return private({"models": here + own})

    @router.post("/api/playground/corrections")
    async def correction(request: Request) -> Response:
        wish, caller = await read(request, Written, service), caller_of(request)
        await service.find(wish.model, caller)
        return private(await asyncio.to_thread(_kept, store, caller.id, wish))

    return router


def _about(served: Served) -> dict[str, Any]:
    can = {"inserts": served.can_insert, "chats": served.chat is not None}
    return {"id": served.name, **can, "context_length": served.context_length}


def _about_own(shown: dict[str, Any]) -> dict[str, Any]:
    """The same of a model that a job made, which may not be loaded: it chats, and does not insert."""
    return {"id": shown["id"], "inserts": False, "chats": True, "context_length": shown["max_model_len"]}


def _kept(store: Store, owner: str, wish: Written) -> dict[str, Any]:
    """Put it into the store. Raises StoreError for a correction that says nothing."""
    system, said = asked_to_edit(wish.instruction, wish.prompt) if wish.instruction else ("", wish.prompt)
    if not said.strip():
        raise StoreError("a correction of an answer to nothing", hint="write a prompt first")
    title = said.strip().partition("\n")[0][:MAX_TITLE]
    conversation = store.new(owner, title=title, system=system).id
    asked = store.say(owner, conversation, None, "user", said)
    parameters = wish.parameters.kept() | {"playground": True, "checkpoint": wish.checkpoint.removeprefix("fp_")}
    answer = store.say(
        owner, conversation, asked.id, "assistant", wish.completion, model=wish.model, parameters=parameters
    )
    judged = store.judgements.correct(owner, answer.id, wish.correction, consent=wish.consent)
    store.rewrite(owner, answer.id, wish.correction)
    return {"conversation": conversation, "judgement": judged.id}
