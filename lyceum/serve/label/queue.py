"""The queue of the labelling page: tasks handed out, taken back, finished, skipped; trees moved on by what came of them.

    labels = Labels(database)
    task = labels.next("ann", kinds=("rank", "label"))          # the same one until it is done, skipped, or its time is over
    labels.submit("ann", task.id, {"ranks": [2, 1, 1, 4], ...}, consent=True)

Who asks gets one task at a time. Nobody gets what they wrote themselves, nor the same thing twice, nor what they skipped. A
task whose time is over goes to somebody else; who finishes it all the same is thanked, and their work counts. Answers to rank are
shown in an order by lot, which is kept with the task; who or what wrote them is kept from the page. Now and then a question
whose answer is known is handed out, in no way different from others.

All calls block, and one writes at a time (`Database.writing` on SQLite, a lock on PostgreSQL). Messages of
the trees are everybody's who has a task on them, and nobody else's.

What it is not: what is wanted for a tree (`lyceum.serve.label.tree`), imports and settings (`lyceum.serve.label.office`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from lyceum.errors import NotFound, StoreError
from lyceum.serve.database import Database
from lyceum.serve.label.results import checked
from lyceum.serve.label.rules import KINDS, MIX, REASONS, VARIANTS, WEIGHTS, Rules
from lyceum.serve.label.tables import NODES, SETTINGS, TASKS, TREES
from lyceum.serve.label.tree import UNFINISHED, Node, Task, Tree, Want, look
from lyceum.serve.tree import need_owner, new_id

PAGE = 16  # trees looked at together: the oldest are finished first
MAX_REASON = 2000  # characters
RULES = "rules"
ONE_AT_A_TIME = 7_118_902  # PostgreSQL's lock while the queue moves: any number that is always this one
Grown = tuple[Tree, list[Node], list[Task]]  # a tree, with all its messages and tasks


class Labels:
    """The labelling tables of a database. chance: what is drawn by lot; clock: seconds since 1970."""

    def __init__(self, database: Database, *, chance: random.Random | None = None, clock: Any = time.time):
        self.database = database
        self.chance: random.Random = chance or random.SystemRandom()
        self.clock = clock

    # ---------------------------------------------------------------------------- handing out

    def next(self, labeller: str, kinds: Sequence[str] = KINDS, language: str = "") -> Task | None:
        """The task of a labeller: the one under way, or a new one of these kinds; None where nothing is to be done.

        language: of trees and prompts; "" is any. Raises StoreError for no kinds, or unknown ones.
        """
        if not kinds or not set(kinds) <= set(KINDS):
            raise StoreError(f"there are no such kinds of tasks: {list(kinds)}", hint=", ".join(KINDS))
        with self.database.writing() as connection:
            rules = self.turn(connection)
            now = self.clock()
            over = (TASKS.c.state == "open", TASKS.c.expires < now)
            connection.execute(update(TASKS).where(*over).values(state="expired"))
            mine = (TASKS.c.labeller == need_owner(labeller), TASKS.c.state == "open")
            for kept in connection.execute(select(TASKS).where(*mine).order_by(TASKS.c.number)).all():
                task = as_task(kept)
                if task.kind in kinds and language in ("", task.about["language"]):
                    return task
                # they ask for others, maybe from another tab: it goes to somebody else, and counts all the same if it is done
                connection.execute(update(TASKS).where(TASKS.c.id == task.id).values(state="expired"))
            found = self._choose(connection, rules, labeller, kinds, language)
            if found is None:
                return None
            row: dict[str, Any] = {
                "id": new_id("task"),
                "labeller": labeller,
                "state": "open",
                "result": {},
                "reason": "",
                "consent": False,
            }
            row |= {"created": now, "expires": now + 60 * rules.minutes, "finished": 0.0, **found}
            return as_task(connection.execute(insert(TASKS).values(row).returning(TASKS)).one())

    def _choose(
        self, connection: Connection, rules: Rules, labeller: str, kinds: Sequence[str], language: str
    ) -> dict[str, Any] | None:
        """A task for somebody, as columns of its row."""
        if self.chance.random() < rules.gold_share:
            found = self._gold(connection, labeller, kinds, language)
            if found is not None:
                return found
        for page in self.pages(connection, UNFINISHED, language):
            open_to = [
                (tree, want)
                for tree, nodes, tasks in page
                for want in look(rules, tree, nodes, tasks).wants
                if want.kind in kinds and _may(labeller, want, tasks)
            ]
            if open_to:
                there = sorted({want.kind for _, want in open_to})
                kind = self.chance.choices(there, [WEIGHTS[kind] for kind in there])[0]
                tree, want = self.chance.choice([one for one in open_to if one[1].kind == kind])
                return self._handed(tree, kind, want.node, want.shown)
        return self._new_prompt(connection, rules, labeller, language) if "prompt" in kinds else None

    def _handed(self, tree: Tree, kind: str, node: str, shown: Sequence[str]) -> dict[str, Any]:
        order = list(shown)
        self.chance.shuffle(order)
        about = {"use": tree.use, "language": tree.language}
        return {
            "kind": kind, "tree": tree.id, "node": node, "shown": order, "about": about, "is_gold": tree.is_gold,
        }  # fmt: skip

    def _gold(
        self, connection: Connection, labeller: str, kinds: Sequence[str], language: str
    ) -> dict[str, Any] | None:
        """A question whose answer is known, which this person has not had."""
        had = select(TASKS.c.tree).where(TASKS.c.labeller == labeller, TASKS.c.is_gold)
        query = select(TREES).where(TREES.c.is_gold, TREES.c.state == "gold", TREES.c.id.not_in(had))
        rows = list(connection.execute(_in_language(query, language)))
        self.chance.shuffle(rows)
        for start in range(0, len(rows), PAGE):
            trees = {row.id: as_tree(row) for row in rows[start : start + PAGE]}
            questions = []
            for node in self.nodes_of(connection, trees):
                kind = "rank" if node.gold and "ranks" in node.gold else "label"
                if node.gold and kind in kinds:
                    questions.append((trees[node.tree], kind, node.id, list(node.gold.get("ranks", ()))))
            if questions:
                return self._handed(*self.chance.choice(questions))
        return None

    def _new_prompt(self, connection: Connection, rules: Rules, labeller: str, language: str) -> dict[str, Any] | None:
        """A prompt to write: of the use that is rarest against the mix, in one of the ways that can be asked for."""
        here = (TREES.c.state.in_(UNFINISHED), TREES.c.is_gold.is_(False))
        num_open = connection.execute(select(func.count()).select_from(TREES).where(*here)).scalar_one()
        asked = select(func.count()).where(TASKS.c.kind == "prompt", TASKS.c.state == "open")
        if num_open + connection.execute(asked).scalar_one() >= rules.trees:
            return None
        by_use = select(TREES.c.use, func.count()).where(TREES.c.is_gold.is_(False)).group_by(TREES.c.use)
        counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(by_use)}
        total = sum(counts.values()) + 1
        lack = {use: share / 100 - counts.get(use, 0) / total for use, share in MIX.items()}
        use = self.chance.choices(list(lack), [max(value, 0.001) for value in lack.values()])[0]
        chosen = language or self.chance.choice(rules.languages)
        others = (
            select(NODES.c.id)
            .join(TREES, TREES.c.id == NODES.c.tree)
            .where(TREES.c.use == use, TREES.c.language == chosen, TREES.c.is_gold.is_(False))
            .where(NODES.c.parent.is_(None), NODES.c.state.in_(("accepted", "given")), NODES.c.author != labeller)
        )
        models = connection.execute(others.order_by(NODES.c.number.desc()).limit(PAGE)).scalars().all()
        variant = self.chance.choice(VARIANTS if models else VARIANTS[:-1])
        about = {"variant": variant, "use": use, "language": chosen}
        shown = [self.chance.choice(models)] if variant == "after_user" else []
        return {"kind": "prompt", "tree": None, "node": None, "shown": shown, "about": about, "is_gold": False}

    # ---------------------------------------------------------------------------- what comes of it

    def submit(self, labeller: str, task: str, result: Mapping[str, Any], *, consent: bool) -> Task:
        """A task is done.

        Args:
            labeller: whose it must be.
            task: its id.
            result: what was written or said (`lyceum.serve.label.results`).
            consent: whether it may be learned from.

        Raises:
            NotFound: there is no such task of this labeller.
            StoreError: it is done already, or the result is none.
        """
        with self.database.writing() as connection:
            rules = self.turn(connection)
            mine = self._unfinished(connection, labeller, task)
            about = None if mine.node is None else self.node(connection, mine.node)
            found = checked(mine, result, about is not None and about.parent is None)
            now = self.clock()
            values: dict[str, Any] = {"state": "done", "result": found, "consent": consent, "finished": now}
            if mine.kind == "prompt":
                values["tree"] = self.plant(connection, found["use"], mine.about["language"], source="written")
                parameters: dict[str, Any] = {"variant": mine.about["variant"]}
                parameters |= {name: found[name] for name in ("instruction", "examples", "input") if name in found}
                node = {"content": found["text"], "author": labeller, "consent": consent, "parameters": parameters}
                values["node"] = self.add(connection, values["tree"], None, "user", **node)
            elif mine.kind in ("answer", "user"):
                assert mine.tree is not None
                role = "assistant" if mine.kind == "answer" else "user"
                node = {"content": found["text"], "author": labeller, "consent": consent}
                self.add(connection, mine.tree, mine.node, role, **node)
            done = connection.execute(update(TASKS).where(TASKS.c.id == task).values(values).returning(TASKS)).one()
            self.settle(connection, rules, done.tree)
            return as_task(done)

    def skip(self, labeller: str, task: str, reason: str, words: str = "") -> None:
        """A task is not done, for a reason (of `REASONS`), perhaps with words. It is not offered to this person again.

        Raises:
            NotFound: there is no such task of this labeller.
            StoreError: there is no such reason, or the task is done.
        """
        if reason not in REASONS or len(words) > MAX_REASON:
            raise StoreError(f"{reason[:40]!r} is no reason", hint=f"{', '.join(REASONS)}; words up to {MAX_REASON}")
        with self.database.writing() as connection:
            rules = self.turn(connection)
            mine = self._unfinished(connection, labeller, task)
            values = {"state": "skipped", "reason": f"{reason}: {words}" if words else reason, "finished": self.clock()}
            connection.execute(update(TASKS).where(TASKS.c.id == task).values(values))
            self.settle(connection, rules, mine.tree)

    def task(self, labeller: str, task: str) -> Task:
        """A labeller's task. Raises NotFound."""
        with self.database.reading() as connection:
            return self._own(connection, labeller, task)

    def seen(self, task: Task) -> tuple[Tree | None, dict[str, Node]]:
        """What a task shows: its tree, and by id all messages that may be looked at for it."""
        with self.database.reading() as connection:
            shown = {id: self.node(connection, id) for id in task.shown if task.tree is None}
            if task.tree is None:
                return None, shown
            row = connection.execute(select(TREES).where(TREES.c.id == task.tree)).one()
            return as_tree(row), {node.id: node for node in self.nodes_of(connection, [task.tree])}

    # ---------------------------------------------------------------------------- answers of models

    def to_draw(self, limit: int = 8) -> list[tuple[Tree, list[Node], Want]]:
        """Messages that want answers of the models, the oldest trees first, each with its tree's messages."""
        found: list[tuple[Tree, list[Node], Want]] = []
        with self.database.reading() as connection:
            rules = self.rules(connection)
            for page in self.pages(connection, ("growing",), ""):  # nobody else wants any
                for tree, nodes, tasks in page:
                    wants = look(rules, tree, nodes, tasks).wants
                    found += [(tree, nodes, want) for want in wants if want.kind == "draw"]
                if len(found) >= limit:
                    break
        return found[:limit]

    def drawn(self, node: str, num: int, answers: Sequence[tuple[str, str, Mapping[str, Any]]]) -> int:
        """Answers of models to a message: (text, model, parameters) each. num: how many were drawn for them.

        Empty ones, and those that say what one says already, are dropped. Returns how many were kept. Raises NotFound.
        """
        with self.database.writing() as connection:
            rules = self.turn(connection)
            about = self.node(connection, node)
            there = {one.content for one in self.nodes_of(connection, [about.tree]) if one.parent == node}
            kept = 0
            for text, model, parameters in answers:
                if text.strip() and text.strip() not in there:
                    there.add(text.strip())
                    made = {"content": text.strip(), "model": model, "parameters": dict(parameters), "consent": True}
                    self.add(connection, about.tree, node, "assistant", state="accepted", **made)
                    kept += 1
            connection.execute(update(NODES).where(NODES.c.id == node).values(drawn=NODES.c.drawn + num))
            self.settle(connection, rules, about.tree)
            return kept

    # ---------------------------------------------------------------------------- inside

    def plant(self, connection: Connection, use: str, language: str, *, source: str, **more: Any) -> str:
        """A new tree; returns its id."""
        now = self.clock()
        row = {
            "id": new_id("tree"),
            "state": "review",
            "is_gold": False,
            "use": use,
            "language": language,
            "system": "",
        }
        row |= {"source": source, "created": now, "updated": now, **more}
        connection.execute(insert(TREES).values(row))
        return str(row["id"])

    def add(self, connection: Connection, tree: str, parent: str | None, role: str, **given: Any) -> str:
        """A new message; returns its id."""
        row: dict[str, Any] = {
            "id": new_id("node"),
            "tree": tree,
            "parent": parent,
            "role": role,
            "author": "",
            "model": "",
        }
        row |= {"parameters": {}, "state": "review", "drawn": 0, "gold": None, "created": self.clock(), **given}
        connection.execute(insert(NODES).values(row))
        return str(row["id"])

    def settle(self, connection: Connection, rules: Rules, tree: str | None) -> None:
        """Bring a tree to the state that follows from what is there."""
        if tree is None:
            return
        row = connection.execute(select(TREES).where(TREES.c.id == tree)).one()
        before, nodes, tasks = self.grown(connection, [as_tree(row)])[0]
        found = look(rules, before, nodes, tasks)
        for id, state in found.judged.items():
            connection.execute(update(NODES).where(NODES.c.id == id).values(state=state))
        if found.state != before.state:
            values = {"state": found.state, "updated": self.clock()}
            connection.execute(update(TREES).where(TREES.c.id == tree).values(values))

    def pages(self, connection: Connection, states: Iterable[str], language: str = "") -> Iterator[list[Grown]]:
        """Trees in these states with all that is in them, oldest first, some at a time."""
        at = 0
        query = select(TREES).where(TREES.c.state.in_(tuple(states))).order_by(TREES.c.number).limit(PAGE)
        while rows := connection.execute(_in_language(query, language).where(TREES.c.number > at)).all():
            yield self.grown(connection, [as_tree(row) for row in rows])
            at = rows[-1].number

    def grown(self, connection: Connection, trees: Sequence[Tree]) -> list[Grown]:
        """Trees with their messages and tasks, oldest first."""
        found: dict[str, Grown] = {tree.id: (tree, [], []) for tree in trees}
        for node in self.nodes_of(connection, found):
            found[node.tree][1].append(node)
        for row in connection.execute(select(TASKS).where(TASKS.c.tree.in_(tuple(found))).order_by(TASKS.c.number)):
            found[row.tree][2].append(as_task(row))
        return list(found.values())

    def nodes_of(self, connection: Connection, trees: Iterable[str]) -> list[Node]:
        """All messages of these trees, oldest first."""
        query = select(NODES).where(NODES.c.tree.in_(tuple(trees))).order_by(NODES.c.number)
        return [as_node(row) for row in connection.execute(query)]

    def node(self, connection: Connection, id: str) -> Node:
        """One message. Raises NotFound."""
        row = connection.execute(select(NODES).where(NODES.c.id == id)).first()
        if row is None:
            raise NotFound(f"there is no message {id!r}")
        return as_node(row)

    def rules(self, connection: Connection) -> Rules:
        """The rules as they are now."""
        row = connection.execute(select(SETTINGS).where(SETTINGS.c.name == RULES)).first()
        return Rules() if row is None else Rules.from_json(row.value)

    def turn(self, connection: Connection) -> Rules:
        """The rules, when it is this transaction's turn to write: on PostgreSQL others wait for it here."""
        if not self.database.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})")
        return self.rules(connection)

    def _own(self, connection: Connection, labeller: str, task: str) -> Task:
        row = connection.execute(
            select(TASKS).where(TASKS.c.id == task, TASKS.c.labeller == need_owner(labeller))
        ).first()
        if row is None:
            raise NotFound(f"there is no task {task!r}")
        return as_task(row)

    def _unfinished(self, connection: Connection, labeller: str, task: str) -> Task:
        mine = self._own(connection, labeller, task)
        if mine.state in ("done", "skipped"):
            raise StoreError(f"the task is {mine.state} already", hint="ask for the next one")
        again = (
            TASKS.c.labeller == labeller,
            TASKS.c.kind == mine.kind,
            TASKS.c.node == mine.node,
            TASKS.c.state == "done",
        )
        if connection.execute(select(TASKS.c.id).where(*again).limit(1)).first():
            raise StoreError("the task was done when it was handed out again", hint="ask for the next one")
        return mine


def _may(labeller: str, want: Want, tasks: Sequence[Task]) -> bool:
    """Whether somebody may do what is wanted: not their own work, nothing twice, and not what enough others are at."""
    same = [task for task in tasks if (task.kind, task.node) == (want.kind, want.node)]
    if labeller in want.not_by or any(task.labeller == labeller and task.state != "expired" for task in same):
        return False
    return want.missing > sum(task.state == "open" for task in same)


def _in_language(query: Select[Any], language: str) -> Select[Any]:
    return query.where(TREES.c.language == language) if language else query


def as_tree(row: Row[Any]) -> Tree:
    """A row as a record."""
    return Tree(**{name: value for name, value in row._mapping.items() if name != "number"})


def as_node(row: Row[Any]) -> Node:
    """A row as a record."""
    return Node(**{name: value for name, value in row._mapping.items() if name != "number"})


def as_task(row: Row[Any]) -> Task:
    """A row as a record."""
    values = {name: value for name, value in row._mapping.items() if name != "number"}
    return replace(Task(**values), shown=tuple(row.shown))
