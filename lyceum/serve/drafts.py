"""Answers under way: their text is in memory, and in the store at most a second later.

    draft = store.answer("alice", conversation, parent, model="demo", parameters={...})
    for piece in pieces:
        draft.append(piece)                  # memory only: may be called from an event loop
    draft.finish("done", "stop", completion_tokens=17)

One thread, the saver, wakes every `SAVE_EVERY_S` while any draft is open and writes them all in one transaction, so that
sixty answers cost one write a second, not sixty. The write is not flushed (see `lyceum.serve.database`); `finish` is.

The same write says that the writer lives. Where it has not come for `LEASE_S`, the writer is gone: the message is read as
failed, with the finish reason "interrupted" and the text as it was saved, and `settle` makes that lasting. So no list of
processes is needed, and servers on several machines may share one PostgreSQL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, select, update

from lyceum.errors import LyceumError
from lyceum.log import log
from lyceum.serve import terms
from lyceum.serve.database import Database
from lyceum.serve.tables import CONVERSATIONS, MESSAGES

if TYPE_CHECKING:
    from lyceum.serve.store import StoredMessage

SAVE_EVERY_S = 0.9  # with the time of the write itself, text is at most a second old when it is safe
LEASE_S = 10.0  # a clock on another machine may be wrong by seconds
IS_STREAMING = MESSAGES.c.state == "streaming"
INTERRUPTED = "interrupted"  # the finish reason of an answer whose writer is gone


class Draft:
    """One answer under way. Made by the store; ended with `finish`, from whatever thread."""

    def __init__(self, saver: Saver, message: str, text: str, end: Callable[[Draft, dict[str, Any]], StoredMessage]):
        self.message = message  # its id
        self.is_lost = False  # its message was deleted, or taken for dead: nothing is saved any more
        self._saver = saver
        self._end = end
        self.num_saved = len(text)  # characters that are in the store
        self._parts = [text]

    @property
    def text(self) -> str:
        """All of it, so far."""
        num_parts = len(self._parts)
        whole = "".join(self._parts[:num_parts])
        self._parts[:num_parts] = [whole]  # so that it is joined once; what is appended meanwhile stands behind it
        return "".join(self._parts)

    def append(self, text: str) -> None:
        """Add to the text; the saver writes it within a second."""
        if text:
            self._parts.append(text)

    def finish(
        self,
        state: str = "done",
        finish_reason: str = "stop",
        *,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        tool_calls: list[dict[str, Any]] | None = None,
    ) -> StoredMessage:
        """Write the whole answer, for good, and how it ended.

        Args:
            state: done, stopped (by the person), or failed.
            finish_reason: as the API words it.
            prompt_tokens: tokens that were read.
            completion_tokens: tokens that were written.
            tool_calls: what the answer calls, in OpenAI's shape.

        Raises:
            NotFound: the message was deleted, or taken for dead, meanwhile.
        """
        self._saver.forget(self)
        told = {"state": state, "finish_reason": finish_reason, "tool_calls": tool_calls}
        return self._end(self, {**told, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})


class Saver:
    """The thread that writes drafts down. It starts with the first of them, and ends with `close`."""

    def __init__(self, database: Database, writer: str, save_every_s: float = SAVE_EVERY_S):
        self.database = database
        self.writer = writer
        self.save_every_s = save_every_s
        self._drafts: dict[str, Draft] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def follow(self, draft: Draft) -> None:
        """Save this draft from now on."""
        with self._changed:
            self._drafts[draft.message] = draft
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="answers' saver", daemon=True)
                self._thread.start()
            self._changed.notify()

    def forget(self, draft: Draft) -> None:
        """It has ended."""
        with self._changed:
            self._drafts.pop(draft.message, None)

    def close(self) -> None:
        """Write what is open once more and end the thread; drafts that were not finished read as interrupted later."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        is_well = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._drafts)
                if not self._is_closed:
                    self._changed.wait_for(lambda: self._is_closed, timeout=self.save_every_s)
                drafts, is_last = list(self._drafts.values()), self._is_closed
            try:
                self._save(drafts)
                is_well = True
            except (
                Exception
            ) as error:  # a full disk, a database that is away: it may come back, and finish() says it aloud
                if is_well:
                    first = error.message if isinstance(error, LyceumError) else str(error).splitlines()[0]
                    log.warning(f"answers under way are not being saved: {first}")
                is_well = False
            if is_last:
                return

    def _save(self, drafts: list[Draft]) -> None:
        if not drafts:
            return
        now, written, gone = time.time(), [], []
        with self.database.writing(durable=False) as connection:
            for draft in drafts:
                text = draft.text
                values: dict[str, Any] = {"updated": now}
                if len(text) != draft.num_saved:
                    values["content"] = text
                mine = (MESSAGES.c.id == draft.message, MESSAGES.c.writer == self.writer, IS_STREAMING)
                found = connection.execute(update(MESSAGES).where(*mine).values(values))
                written.append((draft, len(text)))
                gone += [draft] if found.rowcount == 0 else []
        for draft, num_saved in written:
            draft.num_saved = num_saved
        with self._changed:
            for draft in gone:  # one that ended in the meantime is not lost
                draft.is_lost = self._drafts.pop(draft.message, None) is not None


def settle(connection: Connection, *which: ColumnElement[bool]) -> int:
    """Make lasting that these answers, of those under way, were interrupted; returns how many."""
    columns = (MESSAGES.c.number, CONVERSATIONS.c.owner, MESSAGES.c.content)
    joined = MESSAGES.join(CONVERSATIONS, CONVERSATIONS.c.id == MESSAGES.c.conversation)
    rows = connection.execute(select(*columns).select_from(joined).where(IS_STREAMING, *which)).all()
    ended = {"state": "failed", "finish_reason": INTERRUPTED}
    for number, owner, content in rows:
        mine = (MESSAGES.c.number == number, IS_STREAMING, *which)  # it may have come back to life since
        if connection.execute(update(MESSAGES).where(*mine).values(ended)).rowcount:
            terms.add(connection, "messages", [(number, owner, content)])
    return len(rows)
