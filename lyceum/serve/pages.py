"""The chat page and what it asks: conversations, answers as they grow, judgements.

    make_app(service, routers=[pages(service, store)])

| route | what it does |
|---|---|
| GET /, /web/{file} | the page itself, and all others (`lyceum.serve.site`) |
| GET /api/start | models, what they studied, what to ask |
| GET, POST /api/conversations | the list, or what a query finds; a new one |
| GET, PATCH, DELETE /api/conversations/{id} | one with all its messages; title, pin, settings, branch shown; delete |
| GET /api/conversations/{id}/export | as JSON or Markdown |
| POST /api/conversations/{id}/turns | say something, and get one answer or two |
| POST /api/messages/{id}/again, /continue, /stop | another answer; go on with one; stop it |
| GET /api/messages/{id}/events | an answer under way, as server-sent events, from any block on |
| POST /api/messages/{id}/thumb, /correction | judge it; correct it in its place |
| POST /api/comparisons | which of two answers is better |
| POST /api/messages/{id}/presses; GET, DELETE /api/teaching | keys pressed while it is shown (`lyceum.serve.teaching`) |
| GET /api/account/export; POST /api/account/import; DELETE /api/account | all of somebody's data (`lyceum.serve.accounts`) |
| /api/arena/..., /api/playground/..., /api/inside | what those pages ask (`lyceum.serve.arena`, `.playground`, `.inside`) |

Every object is read by its owner, who is the caller that the guard found; another's is not there (404). The store blocks, so
it is asked from threads. Two answers to be compared carry `pair` and `side` in their parameters: sides are drawn by lot; every
answer carries `checkpoint`, the fingerprint of what wrote it, and where that only went on with it `begun_by`, those before.

What it is not: the page's looks (the files under `lyceum/serve/web`), or the store.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.log import log
from lyceum.serve.accounts import accounts
from lyceum.serve.answering import Answers, OneReply, Prompt, Told, prompt_of
from lyceum.serve.app import PRIVATE, EventStream, private, read
from lyceum.serve.arena.routes import arena
from lyceum.serve.chat import chat_of
from lyceum.serve.guard import caller_of
from lyceum.serve.inside import inside
from lyceum.serve.judgements import Judgement
from lyceum.serve.limits import Caller
from lyceum.serve.playground import playground
from lyceum.serve.portable import as_json, as_markdown
from lyceum.serve.protocol import Sampled
from lyceum.serve.refusals import Refusal
from lyceum.serve.render import render
from lyceum.serve.sampled import params_of
from lyceum.serve.service import Service
from lyceum.serve.site import site
from lyceum.serve.store import Hit, Store
from lyceum.serve.teaching import Recital, Teaching, teaching_routes
from lyceum.serve.tree import StoredConversation, StoredMessage, Thread, path_to, unsaid
from lyceum.serve.wishes import EXACT, Again, Begin, Change, Comparison, Correction, Nothing, Teach, Thumb, Turn

T = TypeVar("T")
PAGE = 40  # conversations in one part of the list
SETTLE_EVERY_S = 30.0


def pages(
    service: Service,
    store: Store,
    *,
    about: Mapping[str, Any] | None = None,
    is_own_machine: bool = True,
    teaching: Teaching | None = None,
    stops: Iterable[Callable[[Caller], None]] = (),
    forget: Iterable[Callable[[str], Any]] = (),
) -> APIRouter:
    """The routes of the page.

    about: what the model studied and what to ask it (`studied`, `cannot`, `ask`), from its lessons. is_own_machine: nobody
    but its owner uses the server, so that judgements may be learned from unless the box is unticked; else unless it is ticked.
    teaching: what is being taught; by default nothing yet.
    stops: end what else is made for a caller whose data is to be deleted.
    forget: what else is an owner's, and is deleted with the account.
    """
    desk = Desk(service, store, teaching or Teaching(service, store))

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        settling = asyncio.create_task(settle_now_and_then(store))
        yield
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)

    router = APIRouter(lifespan=life)
    router.include_router(site())
    router.include_router(
        accounts(
            service,
            store,
            desk.answers,
            is_own_machine=is_own_machine,
            changed=desk.teaching.drop,
            stops=stops,
            forget=forget,
        )
    )
    router.include_router(teaching_routes(desk.teaching))
    router.include_router(arena(service, store, desk.answers, desk.open))
    router.include_router(playground(service, store))
    router.include_router(inside(service))

    def route(method: str, path: str) -> Callable[..., Any]:
        return router.api_route(path, methods=[method], response_class=Response, include_in_schema=False)

    @route("GET", "/api/start")
    async def start(request: Request) -> Response:
        models = await service.visible(caller_of(request), chats=True)
        shown = [
            {"id": model["id"], "context_length": model["max_model_len"], "learned_from": model["learned_from"]}
            for model in models
        ]
        return private({"models": shown, "about": dict(about or {}), "consent": is_own_machine})

    @route("GET", "/api/conversations")
    async def conversations(request: Request, query: str = "", before: str = "") -> Response:
        return private(await desk.listed(caller_of(request), query[:200], before[:64]))

    @route("POST", "/api/conversations")
    async def begin(request: Request) -> Response:
        wish = await read(request, Begin, service)
        kept = wish.parameters.kept()
        new = await desk.ask(store.new, caller_of(request).id, title=wish.title, system=wish.system, parameters=kept)
        return private(new.to_json())

    @route("GET", "/api/conversations/{id}")
    async def opened(request: Request, id: str) -> Response:
        thread, judged = await desk.thread(caller_of(request), id)
        return private(await asyncio.to_thread(desk.thread_json, thread, judged))

    @route("PATCH", "/api/conversations/{id}")
    async def changed(request: Request, id: str) -> Response:
        wish, owner = await read(request, Change, service), caller_of(request).id
        given = {name: getattr(wish, name) for name in ("title", "pinned", "system")}
        kept = wish.parameters.kept() if wish.parameters is not None else None
        about = await desk.ask(store.change, owner, id, parameters=kept, **given)
        if wish.leaf is not None:
            if (await desk.ask(store.message, owner, wish.leaf)).conversation != id:
                raise Refusal(404, "There is no such message in this conversation.", code="not_found")
            about = await desk.ask(store.show, owner, wish.leaf)
        return private(about.to_json())

    @route("DELETE", "/api/conversations/{id}")
    async def deleted(request: Request, id: str) -> Response:
        await desk.delete(caller_of(request), id)
        return private({"deleted": True})

    @route("GET", "/api/conversations/{id}/export")
    async def export(request: Request, id: str, format: str = "json") -> Response:
        thread, judged = await desk.thread(caller_of(request), id)
        if format == "markdown":
            return Response(as_markdown(thread), headers=PRIVATE, media_type="text/markdown; charset=utf-8")
        if format != "json":
            raise Refusal(400, f"'format' is {format[:20]!r}, expected json or markdown.", param="format")
        return private(as_json(thread, judged))

    @route("POST", "/api/conversations/{id}/turns")
    async def turns(request: Request, id: str) -> Response:
        wish, caller = await read(request, Turn, service), caller_of(request)
        thread = await desk.ask(store.thread, caller.id, id)
        path = desk.path(thread, wish.parent)
        if path and path[-1].role == "user":
            raise Refusal(400, "What was said last is not answered yet.", param="parent")
        said = unsaid(wish.content)
        return private({"messages": await desk.answer(caller, thread, [*path, said], wish, says=True)})

    @route("POST", "/api/messages/{id}/again")
    async def again(request: Request, id: str) -> Response:
        wish, caller = await read(request, Again, service), caller_of(request)
        thread, message = await desk.around(caller, id)
        path = desk.path(thread, message.parent if message.role == "assistant" else id)
        if not path or path[-1].role not in ("user", "tool"):
            raise Refusal(400, "There is nothing here to be answered.", param="id")
        return private({"messages": await desk.answer(caller, thread, path, wish)})

    @route("POST", "/api/messages/{id}/continue")
    async def goes_on(request: Request, id: str) -> Response:
        await read(request, Nothing, service)
        return private({"message": await desk.go_on(caller_of(request), id)})

    @route("POST", "/api/messages/{id}/stop")
    async def stop(request: Request, id: str) -> Response:
        await read(request, Nothing, service)
        caller = caller_of(request)
        await desk.ask(store.message, caller.id, id)
        return private({"stopped": desk.answers.stop(caller, id)})

    @route("GET", "/api/messages/{id}/events")
    async def events(request: Request, id: str, blocks: int = 0) -> Response:
        caller = caller_of(request)
        await desk.ask(store.message, caller.id, id)
        return EventStream(Following(desk.answers.follow(caller, id, max(0, blocks), desk.message_json)))

    @route("POST", "/api/messages/{id}/thumb")
    async def thumb(request: Request, id: str) -> Response:
        wish, caller = await read(request, Thumb, service), caller_of(request)
        await desk.ask(desk.thumb, caller, id, wish)
        return private({"thumb": wish.value})

    @route("POST", "/api/messages/{id}/correction")
    async def correction(request: Request, id: str) -> Response:
        wish, owner = await read(request, Correction, service), caller_of(request).id
        # first the judgement, which holds both texts: killed in between, nothing that was said is lost
        await desk.ask(store.judgements.correct, owner, id, wish.content, consent=wish.consent)
        message = await desk.ask(store.rewrite, owner, id, wish.content)
        return private({"message": desk.message_json(message) | {"corrected": True}})

    @route("POST", "/api/comparisons")
    async def comparison(request: Request) -> Response:
        wish, owner = await read(request, Comparison, service), caller_of(request).id
        best = {"left": wish.left, "right": wish.right, "tie": "tie", "neither": "none"}[wish.verdict]
        shown = [wish.left, wish.right]
        await desk.ask(store.judgements.compare, owner, shown, best, reason=wish.reason, consent=wish.consent)
        about = await desk.ask(store.show, owner, wish.right if wish.verdict == "right" else wish.left)
        return private({"leaf": about.leaf})

    return router


async def settle_now_and_then(store: Store) -> None:
    """Say of answers whose writer is gone that they were interrupted: another server's too, and while this one runs."""
    while True:
        await asyncio.sleep(SETTLE_EVERY_S)
        try:
            if num_settled := await asyncio.to_thread(store.settle):
                log.info(f"{num_settled} answers were interrupted: their writer is gone")
        except Exception as error:  # the database may be away, and come back
            log.warning(f"interrupted answers could not be settled: {error}")


class Desk:
    """What the routes do."""

    def __init__(self, service: Service, store: Store, teaching: Teaching):
        self.service, self.store, self.teaching = service, store, teaching
        self.answers = Answers(service, store)

    async def ask(self, work: Callable[..., T], *given: Any, **named: Any) -> T:
        """Ask the store, from a thread."""
        return await asyncio.to_thread(work, *given, **named)

    async def thread(self, caller: Caller, id: str) -> tuple[Thread, list[Judgement]]:
        """A conversation and what was said of its answers."""
        return await self.ask(self.store.thread, caller.id, id), await self.ask(self.store.judgements.of, caller.id, id)

    async def around(self, caller: Caller, id: str) -> tuple[Thread, StoredMessage]:
        """A message and the conversation it is in."""
        message = await self.ask(self.store.message, caller.id, id)
        return await self.ask(self.store.thread, caller.id, message.conversation), message

    @staticmethod
    def path(thread: Thread, leaf: str | None) -> list[StoredMessage]:
        """From the first message down to one; of none, nothing. Raises Refusal where it is not of this conversation."""
        if leaf is not None and leaf not in {message.id for message in thread.messages}:
            raise Refusal(404, "There is no such message in this conversation.", code="not_found")
        return list(path_to(thread.messages, leaf))

    async def listed(self, caller: Caller, query: str, before: str) -> Told:
        """A part of the list; or what a query finds, each conversation once."""
        if query.strip():
            hits = await self.ask(self.store.search, caller.id, query)
            first: dict[str, Hit] = {}
            for hit in hits:
                first.setdefault(hit.conversation, hit)
            found = await self.ask(self._known, caller.id, list(first))
            rows = [
                about.to_json()
                | ({} if first[about.id].message is None else {"message": first[about.id].message})
                | ({} if first[about.id].message is None else {"excerpt": first[about.id].text})
                for about in found
            ]
            return {"conversations": rows, "next": None}
        page = await self.ask(self.store.latest, caller.id, limit=PAGE, after=before or None)
        return {
            "conversations": [about.to_json() for about in page],
            "next": page[-1].id if len(page) == PAGE else None,
        }

    def _known(self, owner: str, ids: Sequence[str]) -> list[StoredConversation]:
        return [self.store.about(owner, id) for id in ids]

    async def delete(self, caller: Caller, id: str) -> None:
        """Delete a conversation; what is being answered in it stops."""
        thread = await self.ask(self.store.thread, caller.id, id)
        for message in thread.messages:
            self.answers.stop(caller, message.id)
        await self.ask(self.store.delete, caller.id, id)
        self.teaching.drop(caller.id)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def answer(
        self, caller: Caller, thread: Thread, path: Sequence[StoredMessage], wish: Again, *, says: bool = False
    ) -> list[Told]:
        """Let one model or two answer a path; says: its last message is new. Returns the messages that are new."""
        kept = {name: value for name, value in wish.parameters.kept().items() if name not in ("model", "second")}
        names = random.SystemRandom().sample(wish.models, len(wish.models))  # which stands left is drawn by lot
        opened: list[tuple[OneReply, Prompt, dict[str, Any]]] = []
        pair = f"pair_{secrets.token_hex(8)}"
        new: list[StoredMessage] = []
        try:
            for place, name in enumerate(names):
                parameters = dict(kept)
                if "temperature" not in kept:  # the likeliest first, as in the terminal; another one, or two, are drawn
                    parameters["temperature"] = 0.0 if says and len(names) == 1 and wish.teach is None else 1.0
                if "seed" not in kept or place:
                    parameters["seed"] = secrets.randbelow(EXACT)
                job, prompt = await self.open(caller, name, thread.about.system, path, parameters, teach=wish.teach)
                if len(names) == 2:
                    parameters |= {"pair": pair, "side": ("left", "right")[place]}
                if isinstance(job, Recital) and wish.teach is not None:
                    parameters["taught"] = {**wish.teach.model_dump(), "answers": len(job.pupil.lessons)}
                parameters["checkpoint"] = job.served.fingerprint  # a name outlives its model
                opened.append((job, prompt, parameters))
            parent = path[-1].id
            if says:
                above = path[-2].id if len(path) > 1 else None
                said = await self.ask(self.store.say, caller.id, thread.about.id, above, "user", path[-1].content)
                parent = said.id
                new.append(said)
            while opened:
                job, prompt, parameters = opened[0]
                draft = await self.ask(
                    self.store.answer,
                    caller.id,
                    thread.about.id,
                    parent,
                    model=job.served.name,
                    parameters=parameters,
                )
                answering = self.answers.begin(caller, draft, job, prompt)
                opened.pop(0)
                if isinstance(job, Recital):
                    self.teaching.begun(draft.message, caller, job, answering)
                new.append(await self.ask(self.store.message, caller.id, draft.message))
        finally:
            for job, _, _ in opened:
                job.close()
        return [self.message_json(message) for message in new]

    async def open(
        self,
        caller: Caller,
        name: str,
        system: str,
        path: Sequence[StoredMessage],
        parameters: Mapping[str, Any],
        begun: str = "",
        teach: Teach | None = None,
    ) -> tuple[OneReply, Prompt]:
        """A model begins to answer; with `teach`, to somebody who presses keys meanwhile. Raises Refusal."""
        served = await self.service.find(name, caller)
        chat_of(served)
        prompt = await prompt_of(served, system, path, begun)
        known = {key: value for key, value in parameters.items() if key in Sampled.model_fields}
        longest = parameters.get("max_tokens") or served.context_length
        most = min(longest, self.service.limits.max_tokens or longest, served.context_length)
        params = params_of(Sampled(**{**known, "model": name}), served, max_tokens=most)
        if teach is not None:
            return await self.teaching.open(served, prompt.ids, params, caller, teach), prompt
        return await self.service.open(served, [(prompt.ids, params)], caller, follows=True), prompt

    async def go_on(self, caller: Caller, id: str) -> Told:
        """Go on with an answer that was cut off."""
        thread, message = await self.around(caller, id)
        if message.role != "assistant" or message.parent is None:
            raise Refusal(400, "Only an answer can be gone on with.", param="id")
        path = self.path(thread, message.parent)
        job, prompt = await self.open(
            caller, message.model, message.system, path, message.parameters, begun=message.content
        )
        try:
            parameters = _gone_on_with(message.parameters, job.served.fingerprint)
            draft = await self.ask(self.store.go_on, caller.id, id, parameters)
        except BaseException:
            job.close()
            raise
        self.answers.begin(caller, draft, job, prompt, so_far=message.content)
        return self.message_json(await self.ask(self.store.message, caller.id, id))

    def thumb(self, caller: Caller, id: str, wish: Thumb) -> None:
        """A thumb; the last one counts. Taken back, all of them are deleted."""
        if wish.value:
            good = wish.value > 0
            self.store.judgements.rate(caller.id, id, good=good, reason=wish.reason, consent=wish.consent)
            return
        message = self.store.message(caller.id, id)
        for one in self.store.judgements.of(caller.id, message.conversation):
            if one.kind == "rating" and one.answers[0].message == id:
                self.store.judgements.withdraw(caller.id, one.id)

    # -- as JSON -------------------------------------------------------------------------------------------------------

    def thread_json(self, thread: Thread, judged: Sequence[Judgement]) -> Told:
        """A conversation as the page opens it."""
        more: dict[str, Told] = {message.id: {} for message in thread.messages}
        for one in judged:
            for answer in one.answers:
                if answer.message in more:
                    more[answer.message] |= _mark(one)
        messages = [self.message_json(message) | more[message.id] for message in thread.messages]
        return {"conversation": thread.about.to_json(), "messages": messages}

    def message_json(self, message: StoredMessage) -> Told:
        """A message as the page shows it; an answer as blocks of HTML."""
        told = asdict(message)
        for name in ("conversation", "system", "updated"):
            del told[name]
        if message.role == "assistant":
            told["blocks"] = render(message.content) if message.state != "streaming" else []
            told |= self.answers.facts.get(message.id, {})
        return told


class Following:
    """News of an answer, as `EventStream` sends them."""

    has_news = False  # each leaves at once: they have been put together already

    def __init__(self, news: AsyncIterator[Told]):
        self._news = news
        self._is_closed = False

    async def chunks(self) -> AsyncIterator[Told]:
        """The news."""
        async for told in self._news:
            if self._is_closed:
                return
            yield told

    def close(self) -> None:
        """Nobody looks on any more; the answer goes on."""
        self._is_closed = True


def _gone_on_with(parameters: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """An answer's parameters when a checkpoint goes on with it, which may not be the one that began it."""
    before = parameters.get("checkpoint", "")
    if before == fingerprint:
        return dict(parameters)
    return {**parameters, "checkpoint": fingerprint, "begun_by": [*parameters.get("begun_by", ()), before]}


def _mark(one: Judgement) -> Told:
    """What the page shows of a judgement beside the answer."""
    if one.kind == "rating":
        return {"thumb": 1 if one.value else -1}
    if one.kind == "presses":
        return {"presses": [value for _, value in one.presses or ()]}
    return {"corrected": True} if one.kind == "correction" else {"judged": True}
