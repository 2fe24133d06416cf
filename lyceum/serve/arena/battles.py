"""Battles: two answers under seal until somebody votes, and the votes of all as `lyceum.evals.arena` reads them.

    battles = Battles(store.database)
    id = battles.seal("alice", conversation, left, right)            # Contender: message, model, parameters
    judged = battles.vote("alice", id, "left", kind="chat", consent=True)
    votes = votes_of(store.judgements.everybodys(kind="comparison"))

A vote is a comparison among the store's judgements, like those of the chat page, and is exported with them
(`lyceum.serve.feedback`). The answers' parameters say that it was blind (`arena`: the battle's id) and of what kind the
prompt was.

What it is not: who answers, or what is drawn by lot (`lyceum.serve.arena.routes`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, get_args

from sqlalchemy import Connection, Row, delete, insert, select, update

from lyceum.errors import NotFound
from lyceum.evals.arena import Verdict, Vote, facets, style_of
from lyceum.serve.arena.tables import BATTLES
from lyceum.serve.database import Database
from lyceum.serve.drafts import INTERRUPTED
from lyceum.serve.judgements import Answer, Judgement, add, comparison
from lyceum.serve.tables import MESSAGES
from lyceum.serve.tree import need_owner, new_id, own, own_message
from lyceum.serve.wishes import Use

KINDS: tuple[Use, ...] = get_args(Use)
MANY_PERSONS = 20  # from which on votes are grouped by person, and not by conversation


@dataclass(frozen=True)
class Contender:
    """An answer in a battle: its message, and what is kept from the message until the vote."""

    message: str
    model: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Battle:
    """A battle without a vote, as its owner may see it."""

    id: str
    left: str
    right: str


class Battles:
    """The battles in a database."""

    def __init__(self, database: Database):
        self.database = database

    def seal(self, owner: str, conversation: str, left: Contender, right: Contender) -> Battle:
        """Keep who wrote two answers until the vote. Raises NotFound for what is not the owner's."""
        sealed: dict[str, Any] = {"left": _sealed(left), "right": _sealed(right)}
        battle = Battle(new_id("battle"), left.message, right.message)
        row = {"id": battle.id, "owner": owner, "conversation": conversation, "sealed": sealed, "created": time.time()}
        row |= {"left_message": left.message, "right_message": right.message}
        with self.database.writing() as connection:
            own(connection, owner, conversation, for_change=True)
            for one in (left, right):
                own_message(connection, owner, one.message)
            connection.execute(insert(BATTLES).values(row))
        return battle

    def open(self, owner: str, conversation: str) -> list[Battle]:
        """The battles of a conversation that wait for a vote, oldest first. Raises NotFound."""
        query = select(BATTLES).where(BATTLES.c.conversation == conversation).order_by(BATTLES.c.number)
        with self.database.reading() as connection:
            own(connection, owner, conversation)
            return [Battle(row.id, row.left_message, row.right_message) for row in connection.execute(query)]

    def vote(
        self, owner: str, battle: str, verdict: Verdict, *, kind: str = "", reason: str = "", consent: bool
    ) -> Judgement:
        """Break the seal and note the vote, both or neither; the judgement names the models.

        Args:
            owner: whose battle it is.
            battle: its id.
            verdict: left, right, tie, or neither (both bad).
            kind: of the prompt, one of KINDS, or none.
            reason: in the person's words.
            consent: whether it may be learned from.

        Raises:
            NotFound: there is no such battle, or its vote was given.
            StoreError: an answer is still being written.
        """
        with self.database.writing() as connection:
            row = _opened(connection, owner, battle)
            for side, message in (("left", row.left_message), ("right", row.right_message)):
                about = {"arena": row.id, "side": side, **({"kind": kind} if kind else {})}
                values = {"model": row.sealed[side]["model"], "parameters": row.sealed[side]["parameters"] | about}
                connection.execute(update(MESSAGES).where(MESSAGES.c.id == message).values(values))
            shown = [row.left_message, row.right_message]
            best = {"left": shown[0], "right": shown[1], "tie": "tie", "neither": "none"}[verdict]
            return add(connection, owner, "comparison", shown, comparison(shown, best), reason, consent)


def votes_of(judgements: Iterable[Judgement]) -> list[Vote]:
    """The blind votes among judgements, which come oldest first; of two votes on the same pair the first, which alone was blind.

    A model is its name and its checkpoint: a name whose checkpoint was replaced is two models, told apart by the
    beginning of the fingerprint. Votes hang together by conversation; from MANY_PERSONS persons on by person.
    """
    found: list[tuple[Judgement, Vote]] = []
    seen: set[str] = set()
    for one in judgements:
        battle = _battle_of(one)
        if battle is None or battle in seen or one.prompt is None:
            continue
        if any(answer.finish_reason in ("error", INTERRUPTED) for answer in one.answers):
            continue  # a server that failed is no model that lost
        seen.add(battle)
        turns = [message.content for message in one.prompt.messages if message.role == "user"]
        kinds = facets(turns[-1] if turns else "", len(turns)) | {one.answers[0].parameters.get("kind", "")} - {""}
        left, right = one.answers
        verdict: Verdict = "neither" if one.choice == "none" else "tie" if one.choice == "tie" else _side(one)
        style = (style_of(left.said.content), style_of(right.said.content))
        group = one.conversation or one.id
        found.append((one, Vote(_entrant(left), _entrant(right), verdict, group, style, frozenset(kinds))))
    if len({one.owner for one, _ in found}) >= MANY_PERSONS:
        found = [(one, replace(vote, group=one.owner)) for one, vote in found]
    names = _names({name for _, vote in found for name in (vote.left, vote.right)})
    return [replace(vote, left=names[vote.left], right=names[vote.right]) for _, vote in found]


def _battle_of(one: Judgement) -> str | None:
    """The battle that a judgement decided, if it did."""
    battles = {answer.parameters.get("arena") for answer in one.answers}
    is_one = one.kind == "comparison" and len(one.answers) == 2 and len(battles) == 1
    battle = battles.pop()
    return battle if is_one and isinstance(battle, str) else None


def _side(one: Judgement) -> Verdict:
    return "left" if one.choice == 0 else "right"


def _entrant(answer: Answer) -> str:
    return f"{answer.model}\0{answer.parameters.get('checkpoint', '')}"


def _names(entrants: Iterable[str]) -> dict[str, str]:
    """What each model is called: its name, with the beginning of its fingerprint where a name had several."""
    parts = {entrant: entrant.split("\0", 1) for entrant in entrants}
    names = [name for name, _ in parts.values()]
    return {
        entrant: name if names.count(name) == 1 else f"{name} ({checkpoint[:6] or '?'})"
        for entrant, (name, checkpoint) in parts.items()
    }


def _sealed(one: Contender) -> dict[str, Any]:
    return {"model": one.model, "parameters": one.parameters}


def _opened(connection: Connection, owner: str, battle: str) -> Row[Any]:
    """A battle, taken out of the table: two votes at once do not both find it."""
    mine = (BATTLES.c.id == battle, BATTLES.c.owner == need_owner(owner))
    row = connection.execute(delete(BATTLES).where(*mine).returning(BATTLES)).first()
    if row is None:
        raise NotFound(f"there is no battle {battle!r} that waits for a vote")
    return row
