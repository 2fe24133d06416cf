"""What people say about answers: thumbs, corrections, comparisons, rankings, and keys pressed while they are shown.

    store.judgements.rate("alice", answer, good=False, reason="wrong sum", consent=True)
    store.judgements.correct("alice", answer, "2 + 2 is 4.", consent=True)
    store.judgements.compare("alice", shown=[left, right], best=right, consent=True)     # or "tie", or "none"
    store.judgements.rank("alice", shown=[a, b, c], ranks=[2, 1, 2], consent=True)
    store.judgements.press("alice", answer, shown=[(0.0, 0.4, "Four"), ...], presses=[(0.9, 1.0)], consent=True)

A judgement is whole in itself: the prompt as the answers were made under it, the answers' text as judged, their models,
parameters and order on the screen, who, when, and whether it may be learned from. So it outlives an edit or a deletion of
what was judged. Nothing is overwritten: who changes their mind judges again, and `lyceum.serve.feedback` takes the last. Only
presses, which come one by one while an answer is shown, take the place of what there was of the same showing.

All answers of a comparison or a ranking stand in the same place: the same parent, made under the same system prompt.
Tools are part of the prompt where an answer's parameters hold them (`tools`, OpenAI's shape).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from lyceum.corpus.records import Conversation, Message
from lyceum.errors import NotFound, StoreError
from lyceum.serve.database import Database
from lyceum.serve.tables import JUDGEMENTS
from lyceum.serve.tree import StoredMessage, messages_of, need_owner, need_whole, new_id, own, own_message, path_to

KINDS = ("rating", "correction", "comparison", "ranking", "presses")
MOST_ANSWERS = 16  # side by side; nobody ranks more with care
MAX_REASON = 10_000  # characters
BATCH = 500

Piece = tuple[float, float, str]  # of an answer as it was shown: from second, until second, text


@dataclass(frozen=True)
class Answer:
    """An answer as it was judged. message: its id at that time, whether or not it is there still."""

    message: str
    said: Message
    model: str
    parameters: dict[str, Any]
    finish_reason: str

    def to_json(self) -> dict[str, Any]:
        row = {"message": self.message, "said": self.said.to_json(), "model": self.model}
        return {**row, "parameters": self.parameters, "finish_reason": self.finish_reason}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Answer:
        return cls(**{**row, "said": Message.from_json(row["said"])})


@dataclass(frozen=True)
class Judgement:
    """One judgement. `answers` stand as they were shown, from left to right or from top to bottom.

    prompt: None where an answer was the first message of its conversation. value: of a rating, 1 good and 0 bad. text: of
    a correction. ranks: 1 is best, equal numbers are ties. acceptable: whether each is good enough in itself. choice: of
    a comparison, the place of the best from 0, or "tie", or "none". shown, presses: the pieces of an answer as they were shown,
    and the keys that were pressed meanwhile: (second, value), 1 good and -1 bad.
    """

    id: str
    owner: str
    conversation: str | None
    kind: str
    prompt: Conversation | None
    answers: tuple[Answer, ...]
    reason: str
    consent: bool
    created: float
    value: float | None = None
    text: str | None = None
    ranks: tuple[float, ...] | None = None
    acceptable: tuple[bool, ...] | None = None
    choice: int | str | None = None
    shown: tuple[Piece, ...] | None = None
    presses: tuple[tuple[float, float], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """It as JSON, without what is None."""
        row = {**vars(self), "prompt": self.prompt and self.prompt.to_json()}
        row["answers"] = [answer.to_json() for answer in self.answers]
        return {name: value for name, value in row.items() if value is not None}


class Judgements:
    """The judgements in a database."""

    def __init__(self, database: Database):
        self.database = database

    def rate(self, owner: str, answer: str, *, good: bool, reason: str = "", consent: bool) -> Judgement:
        """A thumb, up or down. Raises NotFound; StoreError for what is no finished answer."""
        return self._add(owner, "rating", [answer], {"value": float(good)}, reason, consent)

    def correct(self, owner: str, answer: str, text: str, *, reason: str = "", consent: bool) -> Judgement:
        """What the answer should have been. Raises NotFound; StoreError for what is no finished answer, or for no text."""
        if not text.strip():
            raise StoreError("a correction without text", hint="rate the answer instead, or delete it")
        return self._add(owner, "correction", [answer], {"text": text}, reason, consent)

    def compare(self, owner: str, shown: Sequence[str], best: str, *, reason: str = "", consent: bool) -> Judgement:
        """Which of two or more answers is best.

        Args:
            owner: whose answers they are.
            shown: their ids, in the order on the screen.
            best: the id of the best, or "tie" (all alike), or "none" (none is good enough).
            reason: in the person's words.
            consent: whether it may be learned from.

        Raises:
            NotFound: an answer.
            StoreError: they cannot be compared, or `best` is none of them.
        """
        return self._add(owner, "comparison", shown, comparison(shown, best), reason, consent)

    def rank(
        self,
        owner: str,
        shown: Sequence[str],
        ranks: Sequence[float],
        *,
        acceptable: Sequence[bool] | None = None,
        reason: str = "",
        consent: bool,
    ) -> Judgement:
        """The order of two or more answers.

        Args:
            owner: whose answers they are.
            shown: their ids, in the order on the screen.
            ranks: the place of each, 1 is best, equal numbers are ties.
            acceptable: whether each is good enough in itself.
            reason: in the person's words.
            consent: whether it may be learned from.

        Raises:
            NotFound: an answer.
            StoreError: they cannot be ranked, or not like this.
        """
        counts = {len(shown), len(ranks), len(shown if acceptable is None else acceptable)}
        if len(counts) > 1 or not all(math.isfinite(rank) and rank >= 1 for rank in ranks):
            raise StoreError(f"ranks {list(ranks)} for {len(shown)} answers", hint="a number from 1 for each answer")
        verdict: dict[str, Any] = {"ranks": [float(rank) for rank in ranks]}
        if acceptable is not None:
            verdict["acceptable"] = [bool(one) for one in acceptable]
        return self._add(owner, "ranking", shown, verdict, reason, consent)

    def press(
        self,
        owner: str,
        answer: str,
        shown: Sequence[Piece],
        presses: Sequence[tuple[float, float]],
        *,
        consent: bool,
        replaces: str = "",
    ) -> str:
        """Keys pressed while an answer was shown; returns the judgement's id, "" where nothing was pressed.

        Args:
            owner: whose answer it is.
            answer: its id.
            shown: its pieces, as in `Judgement`.
            presses: (second, value); none takes back what there was.
            consent: whether it may be learned from.
            replaces: the judgement whose place it takes.

        Raises:
            NotFound: the answer.
            StoreError: it is no finished answer, or these are no presses.
        """
        times = [second for begin, until, _ in shown for second in (begin, until)]
        is_right = all(map(math.isfinite, times)) and all(map(math.isfinite, (x for press in presses for x in press)))
        if not is_right or any(value not in (1, -1) for _, value in presses):
            raise StoreError("presses that are none", hint="(second, value), the value 1 or -1")
        if not presses:
            if replaces:
                self.withdraw(owner, replaces)
            return ""
        verdict = {"shown": [list(piece) for piece in shown], "presses": [list(press) for press in presses]}
        return self._add(owner, "presses", [answer], verdict, "", consent, replaces).id

    def presses(self, owner: str, model: str | None = None) -> list[Judgement]:
        """An owner's presses, on answers of one model or of all, oldest first."""
        table = JUDGEMENTS.c
        mine = (table.owner == need_owner(owner), table.kind == "presses")
        with self.database.reading() as connection:
            rows = connection.execute(select(JUDGEMENTS).where(*mine).order_by(table.number))
            found = [_judgement(row) for row in rows]
        return [one for one in found if model in (None, one.answers[0].model)]

    def forget_presses(self, owner: str, model: str) -> int:
        """Delete an owner's presses on the answers of a model; returns how many answers they were on."""
        gone = [one.id for one in self.presses(owner, model)]
        with self.database.writing() as connection:
            for at in range(0, len(gone), BATCH):
                connection.execute(delete(JUDGEMENTS).where(JUDGEMENTS.c.id.in_(gone[at : at + BATCH])))
        return len(gone)

    def of(self, owner: str, conversation: str | None = None) -> list[Judgement]:
        """An owner's judgements, in one conversation or in all, oldest first. Raises NotFound."""
        query = select(JUDGEMENTS).where(JUDGEMENTS.c.owner == need_owner(owner)).order_by(JUDGEMENTS.c.number)
        with self.database.reading() as connection:
            if conversation is not None:
                own(connection, owner, conversation)
                query = query.where(JUDGEMENTS.c.conversation == conversation)
            return [_judgement(row) for row in connection.execute(query)]

    def left_behind(self, owner: str) -> Iterator[Judgement]:
        """An owner's judgements whose conversation was deleted, oldest first; no transaction is open meanwhile."""
        table, at = JUDGEMENTS.c, 0
        mine = (table.owner == need_owner(owner), table.conversation.is_(None))
        query = select(JUDGEMENTS).where(*mine).order_by(table.number).limit(BATCH)
        while True:
            with self.database.reading() as connection:
                page = connection.execute(query.where(table.number > at)).all()
            if not page:
                return
            yield from map(_judgement, page)
            at = page[-1].number

    def withdraw(self, owner: str, judgement: str) -> None:
        """Take a judgement back: it is deleted. Raises NotFound."""
        with self.database.writing() as connection:
            mine = (JUDGEMENTS.c.id == judgement, JUDGEMENTS.c.owner == need_owner(owner))
            if not connection.execute(delete(JUDGEMENTS).where(*mine)).rowcount:
                raise NotFound(f"there is no judgement {judgement!r}")

    def everybodys(self, kind: str | None = None) -> Iterator[Judgement]:
        """All judgements of all owners, or those of one kind, oldest first: for whoever runs the service.

        A route of the API gives away no more than sums of them.
        """
        query = select(JUDGEMENTS).order_by(JUDGEMENTS.c.number)
        if kind is not None:
            query = query.where(JUDGEMENTS.c.kind == kind)
        with self.database.reading() as connection:
            for row in connection.execution_options(yield_per=BATCH).execute(query):
                yield _judgement(row)

    def state(self) -> tuple[int, int]:
        """A mark that changes whenever a judgement comes or goes: how many there are, and the number of the last."""
        query = select(func.count(), func.coalesce(func.max(JUDGEMENTS.c.number), 0))
        with self.database.reading() as connection:
            count, last = connection.execute(query.select_from(JUDGEMENTS)).one()
        return int(count), int(last)

    def _add(
        self,
        owner: str,
        kind: str,
        shown: Sequence[str],
        verdict: dict[str, Any],
        reason: str,
        consent: bool,
        replaces: str = "",
    ) -> Judgement:
        with self.database.writing() as connection:
            found = add(connection, owner, kind, shown, verdict, reason, consent)
            if replaces:
                mine = (JUDGEMENTS.c.id == replaces, JUDGEMENTS.c.owner == owner)
                connection.execute(delete(JUDGEMENTS).where(*mine))
            return found


def comparison(shown: Sequence[str], best: str) -> dict[str, Any]:
    """What a comparison says: the best of the answers shown, or "tie", or "none". Raises StoreError for anything else."""
    if best not in (*shown, "tie", "none"):
        raise StoreError(f"{best!r} is none of the answers shown", hint='one of their ids, "tie" or "none"')
    is_decided = best in shown
    verdict: dict[str, Any] = {"choice": shown.index(best) if is_decided else best}
    verdict["ranks"] = [1.0 if not is_decided or answer == best else 2.0 for answer in shown]
    if best == "none":
        verdict["acceptable"] = [False] * len(shown)
    return verdict


def add(
    connection: Connection,
    owner: str,
    kind: str,
    shown: Sequence[str],
    verdict: dict[str, Any],
    reason: str,
    consent: bool,
) -> Judgement:
    """Note a judgement within a transaction: who wants to do more in the same one comes here. Raises NotFound, StoreError."""
    least = 2 if "ranks" in verdict else 1
    if not least <= len(shown) <= MOST_ANSWERS or len(set(shown)) < len(shown):
        raise StoreError(f"{len(shown)} answers to judge, some of them maybe the same", hint="2 to 16 different ones")
    if len(reason) > MAX_REASON:
        raise StoreError(f"a reason of {len(reason)} characters", hint=f"at most {MAX_REASON}")
    found = [own_message(connection, owner, answer, for_change=True) for answer in shown]
    prompt = _prompt(connection, found)
    answers = [Answer(o.id, o.record(), o.model, o.parameters, o.finish_reason) for o in found]
    row = {
        "id": new_id("judgement"),
        "owner": owner,
        "conversation": found[0].conversation,
        "kind": kind,
        "prompt": prompt and prompt.to_json(),
        "answers": [answer.to_json() for answer in answers],
        "verdict": verdict,
        "reason": reason,
        "consent": consent,
        "created": time.time(),
    }
    return _judgement(connection.execute(insert(JUDGEMENTS).values(row).returning(JUDGEMENTS)).one())


def _prompt(connection: Connection, answers: Sequence[StoredMessage]) -> Conversation | None:
    """What stood above the answers when they were made. Raises StoreError where they did not stand in one place."""
    first = answers[0]
    for answer in answers:
        if answer.role != "assistant":
            raise StoreError(f"message {answer.id!r} is no answer", hint="what the assistant wrote is judged")
        need_whole(answer)
        if (answer.conversation, answer.parent) != (first.conversation, first.parent):
            raise StoreError("the answers are not to the same message", hint="compare siblings: answers in one place")
        if answer.system != first.system or answer.parameters.get("tools") != first.parameters.get("tools"):
            hint = "answer anew, so that all are made under the same system prompt and tools"
            raise StoreError("the answers were made under different system prompts or tools", hint=hint)
    above = path_to(messages_of(connection, first.conversation), first.parent)
    system = (Message("system", first.system),) if first.system else ()
    messages = system + tuple(one.record() for one in above)
    return Conversation(messages, tuple(first.parameters.get("tools") or ())) if messages else None


def _judgement(row: Row[Any]) -> Judgement:
    verdict: dict[str, Any] = {name: _frozen(value) for name, value in row.verdict.items()}
    return Judgement(
        id=row.id,
        owner=row.owner,
        conversation=row.conversation,
        kind=row.kind,
        prompt=row.prompt and Conversation.from_json(row.prompt),
        answers=tuple(Answer.from_json(answer) for answer in row.answers),
        reason=row.reason,
        consent=row.consent,
        created=row.created,
        **verdict,
    )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
