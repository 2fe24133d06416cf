"""The arena's routes: a prompt for two hidden models, the vote, and the table.

| route | what it does |
|---|---|
| GET /api/arena | how many models can meet, and the kinds of prompt |
| POST /api/arena/turns | say something, and get two answers under seal |
| GET /api/arena/conversations/{id} | the turns so far, the open battle too |
| POST /api/arena/battles/{id}/vote | left, right, tie or neither; then the models' names |
| GET /api/arena/table | how the models stand, by kind of prompt if asked, with style controlled if asked |

Answers grow and are stopped as on the chat page (`/api/messages/{id}/events`, `.../stop`).

Each turn is a battle of its own: two models and their sides are drawn by lot, both read the same conversation, the vote
breaks the seal, and the answer that was chosen stays in the conversation that the next two read. Chatbot Arena lets each side
go on with its own answers and asks for one vote at the end; two answers to two different conversations are no ranking, and
here every vote is one that a stage can learn from.

What it is not: the fit (`lyceum.evals.arena`), or what is kept (`lyceum.serve.arena.battles`).
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from lyceum.evals.arena import Vote, by_kind, table_of
from lyceum.serve.answering import Answers, OneReply, Prompt
from lyceum.serve.app import private, read
from lyceum.serve.arena.battles import KINDS, Battles, Contender, votes_of
from lyceum.serve.guard import caller_of
from lyceum.serve.limits import Caller
from lyceum.serve.protocol import Wish
from lyceum.serve.refusals import Refusal
from lyceum.serve.render import render
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.serve.tree import StoredMessage, Thread, path_to, unsaid
from lyceum.serve.wishes import EXACT, Id, Text, Use

TEMPERATURE = 0.7  # of both answers, as in Chatbot Arena
MAX_TITLE = 80  # characters of the first prompt
Told = dict[str, Any]
Open = Callable[[Caller, str, str, Sequence[StoredMessage], Told], Awaitable[tuple[OneReply, Prompt]]]


class ArenaTurn(Wish):
    """Something said to two models. conversation, parent: null at the beginning."""

    conversation: Id | None = None
    parent: Id | None = None
    content: Text


class ArenaVote(Wish):
    """Which of two answers is better. kind: of the prompt, as the person sees it."""

    verdict: Literal["left", "right", "tie", "neither"]
    kind: Use | None = None
    reason: Annotated[str, Field(max_length=5000)] = ""
    consent: bool = False


def arena(service: Service, store: Store, answers: Answers, opens: Open) -> APIRouter:
    """The routes. opens: lets a model begin to answer (`lyceum.serve.pages.Desk.open`)."""
    ring = Ring(service, store, answers, opens)
    router = APIRouter(include_in_schema=False, default_response_class=Response)

    @router.get("/api/arena")
    async def about(request: Request) -> Response:
        return private({"models": len(ring.entrants()), "kinds": KINDS})

    @router.post("/api/arena/turns")
    async def turns(request: Request) -> Response:
        return private(await ring.turn(caller_of(request), await read(request, ArenaTurn, service)))

    @router.get("/api/arena/conversations/{id}")
    async def turns_so_far(request: Request, id: str) -> Response:
        return private(await asyncio.to_thread(ring.turns, caller_of(request), id))

    @router.post("/api/arena/battles/{id}/vote")
    async def vote(request: Request, id: str) -> Response:
        wish = await read(request, ArenaVote, service)
        return private(await asyncio.to_thread(ring.vote, caller_of(request), id, wish))

    @router.get("/api/arena/table")
    async def table(request: Request, kind: str = "", style: bool = False) -> Response:
        return private(await asyncio.to_thread(ring.table, kind[:64], style))

    return router


class Ring:
    """What the routes do."""

    def __init__(self, service: Service, store: Store, answers: Answers, opens: Open):
        self.service, self.store, self.answers, self.opens = service, store, answers, opens
        self.battles = Battles(store.database)
        # as of a state of the judgements: the votes, and what was worked out of them; always replaced as a whole
        self._known: tuple[tuple[int, int], list[Vote], dict[tuple[str, bool], Told]] = ((-1, -1), [], {})

    def entrants(self) -> list[str]:
        """The models that can meet: those that chat."""
        return [served.name for served in self.service.models.values() if served.chat is not None]

    async def turn(self, caller: Caller, wish: ArenaTurn) -> Told:
        """Let two models answer. Raises Refusal where there are not two, or a vote is still to be given."""
        names = self.entrants()
        if len(names) < 2:
            raise Refusal(
                409, "The arena needs two models that chat: lyceum serve RUN --model NAME=PATH.", code="too_few"
            )
        system, path = "", list[StoredMessage]()
        if wish.conversation is not None:
            thread = await asyncio.to_thread(self.store.thread, caller.id, wish.conversation)
            system, path = thread.about.system, _path(thread, wish.parent)
            if await asyncio.to_thread(self.battles.open, caller.id, wish.conversation):
                raise Refusal(409, "There is a vote to be given first.", code="vote_first")
        opened: list[tuple[OneReply, Prompt, Told]] = []
        try:
            for name in random.SystemRandom().sample(names, 2):  # which two, and which of them stands left
                parameters: Told = {"temperature": TEMPERATURE, "seed": secrets.randbelow(EXACT)}
                job, prompt = await self.opens(caller, name, system, [*path, unsaid(wish.content)], parameters)
                opened.append((job, prompt, {**parameters, "checkpoint": job.served.fingerprint}))
            conversation = wish.conversation
            if conversation is None:
                title = wish.content.strip().partition("\n")[0][:MAX_TITLE]
                conversation = (await asyncio.to_thread(self.store.new, caller.id, title=title)).id
            above = path[-1].id if path else None
            say = (caller.id, conversation, above, "user", wish.content)
            said = await asyncio.to_thread(self.store.say, *say)
            both: list[Contender] = []
            while opened:
                job, prompt, parameters = opened[0]
                draft = await asyncio.to_thread(self.store.answer, caller.id, conversation, said.id, model="")
                self.answers.begin(caller, draft, job, prompt)
                opened.pop(0)
                both.append(Contender(draft.message, job.served.name, parameters))
            battle = await asyncio.to_thread(self.battles.seal, caller.id, conversation, *both)
        finally:
            for job, _, _ in opened:
                job.close()
        return await asyncio.to_thread(self.turns, caller, conversation) | {"battle": battle.id}

    def turns(self, caller: Caller, conversation: str) -> Told:
        """The turns of a conversation that were battles, along the branch that is shown."""
        thread = self.store.thread(caller.id, conversation)
        waiting = {battle.left: battle for battle in self.battles.open(caller.id, conversation)}
        known = {message.id: message for message in thread.messages}
        chosen = {message.id for message in thread.path()}
        verdicts = {
            one.answers[0].message: one.choice
            for one in self.store.judgements.of(caller.id, conversation)
            if one.kind == "comparison"
        }
        rows = []
        for message in thread.messages:
            asked = known[message.parent] if message.parent is not None else None
            battle = waiting.get(message.id)
            if asked is None or asked.id not in chosen or message.role != "assistant":
                continue
            if battle is not None:
                pair, voted = (message, known[battle.right]), None
            elif "arena" in message.parameters and message.parameters.get("side") == "left":
                others = [one for one in thread.messages if _is_other(one, message)]
                if not others or message.id not in verdicts:
                    continue
                pair, voted = (message, others[0]), _verdict(verdicts[message.id])
            else:
                continue
            rows.append(
                {
                    "said": {"id": asked.id, "content": asked.content},
                    "left": _shown(pair[0]),
                    "right": _shown(pair[1]),
                    "battle": battle and battle.id,
                    "verdict": voted,
                }
            )
        return {"conversation": conversation, "leaf": thread.about.leaf, "turns": rows}

    def vote(self, caller: Caller, battle: str, wish: ArenaVote) -> Told:
        """Note a vote, and tell who it was. The better answer stays in the conversation; of equals the one on the left."""
        judged = self.battles.vote(
            caller.id, battle, wish.verdict, kind=wish.kind or "", reason=wish.reason, consent=wish.consent
        )
        left, right = judged.answers
        about = self.store.show(caller.id, (right if wish.verdict == "right" else left).message)
        return {"left": left.model, "right": right.model, "leaf": about.leaf}

    def table(self, kind: str, controls_style: bool) -> Told:
        """How models stand by all votes, or of those on one kind of prompt; worked out anew when a judgement has come or gone."""
        state = self.store.judgements.state()
        known = self._known
        if known[0] != state:
            known = self._known = state, votes_of(self.store.judgements.everybodys("comparison")), {}
        _, votes, tables = known
        kinds = by_kind(votes)
        if kind and kind not in kinds:
            raise Refusal(404, f"There is no vote on a prompt of the kind {kind!r}.", param="kind", code="not_found")
        if (kind, controls_style) not in tables:
            found = table_of(kinds[kind] if kind else votes, controls_style=controls_style)
            tables[kind, controls_style] = found.to_json()
        more = {"kinds": {name: len(some) for name, some in kinds.items()}, "num_all": len(votes)}
        return tables[kind, controls_style] | more


def _path(thread: Thread, leaf: str | None) -> list[StoredMessage]:
    if leaf is None or leaf not in {message.id for message in thread.messages}:
        raise Refusal(404, "There is no such message in this conversation.", param="parent", code="not_found")
    path = list(path_to(thread.messages, leaf))
    if path[-1].role == "user":
        raise Refusal(400, "What was said last is not answered yet.", param="parent")
    return path


def _is_other(one: StoredMessage, left: StoredMessage) -> bool:
    """Whether a message is the right one of a battle whose left one is given."""
    return one.parameters.get("arena") == left.parameters.get("arena") and one.parameters.get("side") == "right"


def _verdict(choice: int | str | None) -> str:
    return {0: "left", 1: "right", "tie": "tie", "none": "neither"}[choice if choice is not None else "tie"]


def _shown(message: StoredMessage) -> Told:
    """An answer as the page shows it; its model is empty until the vote."""
    told = {name: value for name, value in asdict(message).items() if name in ("id", "state", "model", "finish_reason")}
    return told | {"blocks": render(message.content) if message.state != "streaming" else []}
