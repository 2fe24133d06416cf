"""What whoever runs the service does with the labelling page: rules, guidelines, imports, halting a tree; and what is deleted.

    office = Office(labels)
    office.bring([{"prompt": ..., "responses": [...], "ranks": [...]}], as_what="rankings", author="ann")

| imported as | what a row is | what becomes of it |
|---|---|---|
| rankings | any that `lyceum.corpus.records.read_rankings` reads, but for its ranks | its answers are ranked |
| conversations | any that `read_conversations` reads | the user's last turn is answered; an answer behind it is one |
| gold_rankings | as rankings | a question: the ranks are the known answer |
| gold_labels | a conversation with `labels` | a question: spam, wrong_language, quality, use of its last message are known |

A conversation that is imported stands as it is: it is not reviewed, and only what follows it is worked on. `use` and `language`
are read from a row's `meta`, else taken from the call.

What it is not: the queue itself (`lyceum.serve.label.queue`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from lyceum.corpus.records import Conversation, Message, records_of
from lyceum.errors import NotFound, StoreError
from lyceum.serve.label.guidelines import GUIDELINES
from lyceum.serve.label.queue import RULES, Labels
from lyceum.serve.label.rules import MIX, MOST_SHOWN, Rules
from lyceum.serve.label.tables import NODES, SETTINGS, TASKS, TREES
from lyceum.serve.label.tree import UNFINISHED

AS = ("rankings", "conversations", "gold_rankings", "gold_labels")
MOST_GUIDELINES = 50_000  # characters


@dataclass(frozen=True)
class Arrival:
    """A row as it was understood: what stands above, and the answers below it. ranks, labels: what is known of a question."""

    prompt: Conversation
    answers: tuple[Message, ...]
    ranks: tuple[float, ...] = ()
    labels: Mapping[str, Any] | None = None


def understood(row: Any, as_what: str) -> list[Arrival]:
    """What is in a row. Raises ValueError, which says why it is none."""
    if as_what in ("rankings", "gold_rankings"):
        found = [
            Arrival(one.prompt, one.responses, one.ranks if "gold" in as_what else ())
            for one in records_of(row, "ranking")
        ]
        for one in found:
            if len(one.answers) > MOST_SHOWN:
                raise ValueError(f"{len(one.answers)} answers, and {MOST_SHOWN} can be ranked at once")
            if one.ranks and len(set(one.ranks)) == 1:
                raise ValueError("all answers share a rank: nothing is known of them")
    elif as_what == "gold_labels":
        labels = row.get("labels") if isinstance(row, Mapping) else None
        if not isinstance(labels, Mapping) or not all(
            isinstance(labels.get(n), bool) for n in ("spam", "wrong_language")
        ):
            raise ValueError("'labels' needs 'spam' and 'wrong_language', true or false")
        rest = {name: value for name, value in row.items() if name != "labels"}
        found = [Arrival(one, (), labels=dict(labels)) for one in records_of(rest, "conversation")]
    else:
        found = []
        for one in records_of(row, "conversation"):
            cut = len(one.messages) - (one.messages[-1].role == "assistant")
            found.append(Arrival(Conversation(one.messages[:cut], one.tools, one.meta), one.messages[cut:]))
    for one in found:
        _check(one)
    return found


def _check(one: Arrival) -> None:
    if one.prompt.tools or any(message.tool_calls for message in (*one.prompt.messages, *one.answers)):
        raise ValueError("it holds calls of tools, which the page does not show")
    roles = [message.role for message in one.prompt.messages]
    said = roles[1:] if roles[0] == "system" else roles
    if not said or said != [("user", "assistant")[place % 2] for place in range(len(said))]:
        raise ValueError(f"user and assistant do not take turns: {roles}")
    if one.labels is None and said[-1] != "user":
        raise ValueError("there is nothing to answer: the user does not speak last")
    if not all(message.content.strip() for message in (*one.prompt.messages, *one.answers)):
        raise ValueError("a message is empty")


class Office:
    """Rules, guidelines, imports."""

    def __init__(self, labels: Labels):
        self.labels = labels
        self.database = labels.database

    def rules(self) -> Rules:
        """The rules as they are now."""
        with self.database.reading() as connection:
            return self.labels.rules(connection)

    def set_rules(self, author: str, rules: Rules) -> None:
        """Other rules, from now on: for the trees under way, too."""
        with self.database.writing() as connection:
            self.labels.turn(connection)
            self._set(connection, author, RULES, rules.to_json())
            for page in self.labels.pages(connection, UNFINISHED, ""):
                for tree, _, _ in page:
                    self.labels.settle(connection, rules, tree.id)

    def guidelines(self, language: str) -> str:
        """What people are told, as Markdown; English where the language has none of its own."""
        name = f"guidelines:{language}"
        with self.database.reading() as connection:
            row = connection.execute(select(SETTINGS).where(SETTINGS.c.name == name)).first()
        return str(row.value) if row is not None else GUIDELINES.get(language, GUIDELINES["en"])

    def set_guidelines(self, author: str, language: str, text: str) -> None:
        """Tell people something else; an empty text brings ours back. Raises StoreError for one that is too long."""
        if len(text) > MOST_GUIDELINES:
            raise StoreError(f"guidelines of {len(text)} characters", hint=f"at most {MOST_GUIDELINES}")
        with self.database.writing() as connection:
            if text.strip():
                self._set(connection, author, f"guidelines:{language}", text)
            else:
                connection.execute(delete(SETTINGS).where(SETTINGS.c.name == f"guidelines:{language}"))

    def _set(self, connection: Connection, author: str, name: str, value: Any) -> None:
        row = {"value": value, "author": author, "updated": self.labels.clock()}
        if not connection.execute(update(SETTINGS).where(SETTINGS.c.name == name).values(row)).rowcount:
            connection.execute(insert(SETTINGS).values(name=name, **row))

    def bring(self, rows: Sequence[Any], as_what: str, *, use: str = "other", language: str = "en") -> int:
        """Put rows into the queue, all or none; returns how many trees they became.

        Raises:
            StoreError: a row is none of what it shall be; the message says which, counted from 0.
        """
        if as_what not in AS or use not in MIX:
            raise StoreError(
                f"nothing is imported as {as_what!r} for {use!r}", hint=f"{', '.join(AS)}; {', '.join(MIX)}"
            )
        found: list[Arrival] = []
        for number, row in enumerate(rows):
            try:
                found += understood(row, as_what)
            except ValueError as error:
                raise StoreError(f"rows[{number}]: {error}", hint=f"imported as {as_what}") from None
        with self.database.writing() as connection:
            rules = self.labels.turn(connection)
            for one in found:
                self._plant(connection, rules, one, use, language)
        return len(found)

    def _plant(self, connection: Connection, rules: Rules, one: Arrival, use: str, language: str) -> None:
        messages = one.prompt.messages
        system = messages[0].content if messages[0].role == "system" else ""
        kind, spoken = one.prompt.meta.get("use"), one.prompt.meta.get("language")
        is_gold = bool(one.ranks) or one.labels is not None
        tree = self.labels.plant(
            connection,
            kind if kind in MIX else use,
            spoken if isinstance(spoken, str) and spoken else language,
            source="imported",
            system=system,
            is_gold=is_gold,
            state="gold" if is_gold else "growing",
        )
        parent = None
        closed = {"closed": True} if len(one.answers) > 1 else {}
        for place, message in enumerate(messages[1:] if system else messages, 1 + bool(system)):
            is_last = place == len(messages)
            more: dict[str, Any] = {"state": "given", "consent": True, "parameters": closed if is_last else {}}
            if is_last and one.labels is not None:
                more["gold"] = {"labels": one.labels}
            parent = self.labels.add(connection, tree, parent, message.role, content=message.content, **more)
        ranks = {}
        for place, answer in enumerate(one.answers):
            given = {"content": answer.content, "state": "accepted", "consent": True}
            id = self.labels.add(connection, tree, parent, "assistant", **given)
            ranks[id] = one.ranks[place] if one.ranks else 0.0
        if one.ranks:
            connection.execute(update(NODES).where(NODES.c.id == parent).values(gold={"ranks": ranks}))
        self.labels.settle(connection, rules, tree)

    def halt(self, tree: str) -> None:
        """Stop work on a tree, and keep it out of every export. Raises NotFound."""
        with self.database.writing() as connection:
            self.labels.turn(connection)
            if not connection.execute(update(TREES).where(TREES.c.id == tree).values(state="halted")).rowcount:
                raise NotFound(f"there is no tree {tree!r}")

    def counts(self) -> dict[str, Any]:
        """How many trees there are in each state, of each use and language, and questions whose answer is known."""

        def by(column: Any) -> dict[str, int]:
            query = select(column, func.count()).where(TREES.c.is_gold.is_(False)).group_by(column)
            return {row[0]: row[1] for row in connection.execute(query)}

        with self.database.reading() as connection:
            gold = connection.execute(select(func.count()).where(TREES.c.is_gold)).scalar_one()
            names = (("states", TREES.c.state), ("uses", TREES.c.use), ("languages", TREES.c.language))
            return {**{name: by(column) for name, column in names}, "gold": gold, "mix": MIX}

    def progress(self, labeller: str) -> dict[str, int]:
        """How many tasks of each kind somebody has done."""
        mine = (TASKS.c.labeller == labeller, TASKS.c.state == "done")
        with self.database.reading() as connection:
            rows = connection.execute(select(TASKS.c.kind, func.count()).where(*mine).group_by(TASKS.c.kind)).all()
        return {row[0]: row[1] for row in rows}


def forget(connection: Connection, labeller: str) -> None:
    """Delete, really, what somebody wrote and said on the labelling page; trees that hold their texts are halted."""
    connection.execute(delete(TASKS).where(TASKS.c.labeller == labeller))
    mine = select(NODES.c.tree).where(NODES.c.author == labeller)
    connection.execute(update(TREES).where(TREES.c.id.in_(mine)).values(state="halted"))
    gone = {"content": "", "parameters": {}, "author": "", "consent": False}
    connection.execute(update(NODES).where(NODES.c.author == labeller).values(gone))
