"""The labelling page's routes: a task, what came of it, the guidelines; for an admin the dashboard, the rules, imports.

    make_app(service, routers=[pages(service, store), labelling(service, store)])

| route | what it does |
|---|---|
| GET /api/label | who asks and what they have done; kinds of tasks and of use, flags, reasons, languages |
| POST /api/label/next | a task, as it is shown; null where nothing is to be done |
| POST /api/label/tasks/{id}, /skip | what came of it; why it is not done |
| GET, POST /api/label/guidelines | what people are told; told otherwise (admin) |
| GET /api/label/board | people, agreement, trees, rules (admin) |
| POST /api/label/rules, /import, /trees/{id}/halt | the rules; rows of a file into the queue; a tree taken out of it (admin) |

**Who labels.** With keys, the owner of the key: a name that is sent is not looked at. Where no keys are asked for, on one's own
machine, the name that was typed: `name:Ann` is her id in the store, and nothing keeps her from typing another's. So several
people can share a laptop, and where it matters who is who there are keys.

A task names no author and no model, its answers stand in an order by lot, and a question whose answer is known looks like any
other.

What it is not: the queue (`lyceum.serve.label.queue`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.errors import StoreError
from lyceum.serve.app import private, read
from lyceum.serve.guard import caller_of
from lyceum.serve.label.board import board
from lyceum.serve.label.draws import Draws
from lyceum.serve.label.office import Office
from lyceum.serve.label.queue import Labels
from lyceum.serve.label.rules import FLAGS, KINDS, MIX, REASONS
from lyceum.serve.label.tree import Node, Task, path_to
from lyceum.serve.label.wishes import Change, Guidelines, Import, Next, Result, Skip
from lyceum.serve.limits import EVERYBODY, Caller
from lyceum.serve.refusals import Refusal
from lyceum.serve.render import render
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.wishes import Nothing

TYPED = "name:"  # before the id of somebody who typed a name


def labelling(service: Service, store: Store, labels: Labels | None = None) -> APIRouter:
    """The routes. labels: the queue, if not the store's own with its own lot and clock."""
    labels = labels or Labels(store.database)
    office, draws = Office(labels), Draws(service, labels)

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        draws.wake()
        yield
        await draws.close()

    router = APIRouter(lifespan=life)
    ask = asyncio.to_thread

    def route(method: str, path: str) -> Callable[..., Any]:
        return router.api_route("/api/label" + path, methods=[method], response_class=Response, include_in_schema=False)

    @route("GET", "")
    async def begin(request: Request, name: str = "") -> Response:
        caller = caller_of(request)
        is_typed, rules = caller.id == EVERYBODY.id, await ask(office.rules)
        who = labeller_of(caller, name) if name or not is_typed else ""
        told = {"kinds": KINDS, "uses": list(MIX), "flags": FLAGS, "reasons": REASONS, "languages": rules.languages}
        done = await ask(office.progress, who) if who else {}
        states = (await ask(office.counts))["states"]
        return private(
            {**told, "asks_name": is_typed, "admin": "admin" in caller.scopes, "done": done, "states": states}
        )

    @route("POST", "/next")
    async def following(request: Request) -> Response:
        wish = await read(request, Next, service)
        who = labeller_of(caller_of(request), wish.name)
        task = await ask(labels.next, who, wish.kinds, wish.language)
        draws.wake()
        done = await ask(office.progress, who)
        if task is None:
            return private({"task": None, "is_drawing": bool(await ask(labels.to_draw, 1)), "done": done})
        return private({"task": await ask(shown, labels, task), "done": done})

    @route("POST", "/tasks/{id}")
    async def submit(request: Request, id: str) -> Response:
        wish = await read(request, Result, service)
        who = labeller_of(caller_of(request), wish.name)
        await ask(labels.submit, who, id, wish.given(), consent=wish.consent)
        draws.wake()
        return private({"done": await ask(office.progress, who)})

    @route("POST", "/tasks/{id}/skip")
    async def skip(request: Request, id: str) -> Response:
        wish = await read(request, Skip, service)
        await ask(labels.skip, labeller_of(caller_of(request), wish.name), id, wish.reason, wish.words)
        return private({"skipped": True})

    @route("GET", "/guidelines")
    async def told(request: Request, language: str = "en") -> Response:
        text = await ask(office.guidelines, language[:35])
        return private({"text": text, "blocks": await ask(render, text)})

    @route("POST", "/guidelines")
    async def tell(request: Request) -> Response:
        wish, caller = await read(request, Guidelines, service), admin(request)
        await ask(office.set_guidelines, caller.id, wish.language, wish.text)
        text = await ask(office.guidelines, wish.language)
        return private({"text": text, "blocks": await ask(render, text)})

    @route("GET", "/board")
    async def dashboard(request: Request) -> Response:
        admin(request)
        names = {key.owner: key.name for key in await ask(store.keys.all)}
        found = await ask(board, labels, names)
        for person in found["people"]:
            person["name"] = person["name"].removeprefix(TYPED)
        return private({**found, **await ask(office.counts), "rules": (await ask(office.rules)).to_json()})

    @route("POST", "/rules")
    async def change(request: Request) -> Response:
        wish, caller = await read(request, Change, service), admin(request)
        given = wish.model_dump(exclude_none=True)
        given |= {name: tuple(given[name]) for name in ("languages", "models") if name in given}
        for model in given.get("models", ()):
            service.model(model)
        try:
            rules = replace(await ask(office.rules), **given)
        except StoreError as error:
            raise Refusal(400, f"{error.message} ({error.hint})", param=error.message.split()[0]) from None
        await ask(office.set_rules, caller.id, rules)
        draws.wake()
        return private(rules.to_json())

    @route("POST", "/import")
    async def bring(request: Request) -> Response:
        wish = await read(request, Import, service)
        admin(request)
        try:
            num = await ask(office.bring, wish.rows, wish.as_what, use=wish.use, language=wish.language)
        except StoreError as error:
            raise Refusal(400, f"{error.message} ({error.hint})", param=error.message.partition(":")[0]) from None
        draws.wake()
        return private({"trees": num})

    @route("POST", "/trees/{id}/halt")
    async def halt(request: Request, id: str) -> Response:
        await read(request, Nothing, service)
        admin(request)
        await ask(office.halt, id)
        return private({"halted": True})

    return router


def labeller_of(caller: Caller, name: str) -> str:
    """Who labels: the owner of a key, or the name that was typed. Raises Refusal for no name."""
    if caller.id != EVERYBODY.id:
        return caller.id
    typed = " ".join(name.split())
    if not typed:
        raise Refusal(400, "Say who you are: any name that you will type again.", param="name")
    return TYPED + typed


def admin(request: Request) -> Caller:
    """Who asks, who may run the page. Raises Refusal."""
    caller = caller_of(request)
    caller.need("admin")
    return caller


def shown(labels: Labels, task: Task) -> dict[str, Any]:
    """A task as the page shows it: nothing of who or what wrote a text."""
    tree, nodes = labels.seen(task)
    above = path_to(nodes, task.node) if task.node else []
    return {
        "id": task.id,
        "kind": task.kind,
        **task.about,
        "expires": task.expires,
        "system": tree.system if tree is not None else "",
        "thread": [_text(node) for node in above],
        "shown": [_text(nodes[id]) for id in task.shown],
        "is_prompt": task.kind == "label" and len(above) == 1,
    }


def _text(node: Node) -> dict[str, Any]:
    """A message as text, and what an assistant said as blocks of HTML too."""
    told: dict[str, Any] = {"role": node.role, "content": node.content}
    return told | ({"blocks": render(node.content)} if node.role == "assistant" else {})
