"""One message tree: what state it is in, and what is wanted for it. Pure functions of its messages and of what people said.

    found = look(rules, tree, nodes, tasks)         # found.state, found.wants, found.judged

A tree grows a level at a time. Somebody's prompt is reviewed; then it gets its answers, some by people (reviewed, too), the
others drawn from the models; they are ranked; then somebody says, as the user, what follows the best one, and so on for as many
turns as the rules say.

| state | means |
|---|---|
| review | its prompt is being labelled |
| growing | answers are missing or under review; or what the user says next |
| ranking | the answers are being ranked |
| finished | ready for export |
| low_grade | its prompt was not accepted |
| halted | reported by several people, or stopped by who runs the service |
| gold | no tree but a question whose answer is known |

A message is `review`, `accepted` or `rejected`, or `given`: it came with an import as what stands above the task. Answers are
shown to rankers as they were when the first ranked them: the set does not change under them.

Open-Assistant's machine (Köpf et al. 2023, 2.2), reduced: no lottery of prompts, no scoring of whole trees; only the best
answer is gone on with. What it is not: who gets which task (`lyceum.serve.label.queue`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lyceum.corpus.records import Conversation, Message
from lyceum.evals.consensus import ranked_pairs
from lyceum.serve.label.rules import DRAWS, MOST_SHOWN, REPORTS, Rules

UNFINISHED = ("review", "growing", "ranking")
REPORTED = ("harmful", "personal_data")


@dataclass(frozen=True)
class Tree:
    """A tree without its messages. source: written, imported."""

    id: str
    state: str
    is_gold: bool
    use: str
    language: str
    system: str
    source: str
    created: float
    updated: float


@dataclass(frozen=True)
class Node:
    """A message of a tree. author: the labeller who wrote it, or ""; model: what drew it, or "". drawn: answers drawn below it.
    parameters: how it was drawn; `closed`: its answers came with it, and no more are wanted.

    gold: of a question whose answer is known, {"ranks": {answer: rank}} or {"labels": {...}}. consent: it may be learned from.
    """

    id: str
    tree: str
    parent: str | None
    role: str
    content: str
    author: str
    model: str
    parameters: dict[str, Any]
    state: str
    drawn: int
    gold: dict[str, Any] | None
    consent: bool
    created: float


@dataclass(frozen=True)
class Task:
    """What was handed to a labeller. node: what it is about; shown: the messages shown below it, in the order on the screen.

    about: use and language; of a prompt to write its variant, too. state: open, done, skipped, expired. result: as
    `lyceum.serve.label.results` has it. created, expires, finished: seconds since 1970.
    """

    id: str
    labeller: str
    kind: str
    tree: str | None
    node: str | None
    shown: tuple[str, ...]
    about: dict[str, Any]
    state: str
    result: dict[str, Any]
    reason: str
    consent: bool
    is_gold: bool
    created: float
    expires: float
    finished: float


@dataclass(frozen=True)
class Want:
    """Work on a tree: of how many people, and of whom not. kind: of a task, or "draw": so many answers of the models."""

    kind: str
    node: str
    missing: int
    shown: tuple[str, ...] = ()
    not_by: frozenset[str] = frozenset()


@dataclass
class Outlook:
    """What follows from what is there. judged: message -> accepted or rejected, where its reviews have decided that."""

    state: str
    wants: list[Want] = field(default_factory=list)
    judged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What people made of one set of answers: the consensus and each one's ranks, and whether most found none acceptable."""

    node: str
    shown: tuple[str, ...]
    ranks: dict[str, float]
    tasks: tuple[Task, ...]
    is_any_acceptable: bool

    @property
    def best(self) -> str:
        """The first of those that share the first place."""
        return min(self.shown, key=lambda answer: self.ranks[answer])


def done(tasks: Iterable[Task], kind: str, node: str) -> list[Task]:
    """The finished tasks of a kind on a message."""
    return [task for task in tasks if (task.kind, task.node, task.state) == (kind, node, "done")]


def ranks_of(task: Task) -> dict[str, float]:
    """Answer -> its rank, of a ranking that is done."""
    return dict(zip(task.shown, task.result["ranks"], strict=True))


def order_of(rankings: Sequence[Task]) -> Order | None:
    """The consensus of rankings of one set of answers; None of none. Those of another set than the first's are passed over."""
    if not rankings:
        return None
    first = rankings[0]
    same = tuple(task for task in rankings if set(task.shown) == set(first.shown))
    shown = tuple(sorted(first.shown))  # the same whoever ranked first
    none = sum(bool(task.result["none_acceptable"]) for task in same)
    assert first.node is not None
    return Order(first.node, shown, ranked_pairs([ranks_of(task) for task in same]), same, none * 2 <= len(same))


def verdict(rules: Rules, labels: Sequence[Task]) -> str:
    """What the reviews of a message come to: review while there are too few, then accepted or rejected.

    Score: 1 - share who call it spam - share who call it the wrong language (Open-Assistant's).
    """
    if len(labels) < rules.reviews:
        return "review"
    against = sum(task.result["spam"] + task.result["wrong_language"] for task in labels) / len(labels)
    return "accepted" if 1 - against > rules.accept else "rejected"


def look(rules: Rules, tree: Tree, nodes: Sequence[Node], tasks: Sequence[Task]) -> Outlook:
    """What state a tree is in, and what is wanted for it.

    Args:
        rules: how many people are asked.
        tree: it.
        nodes: its messages, oldest first; the first one is the prompt, or where a given conversation begins.
        tasks: all tasks on it.
    """
    if tree.is_gold or tree.state == "halted":
        return Outlook(tree.state)
    reporters = {task.labeller for task in tasks if task.state == "skipped" and task.reason.split(":")[0] in REPORTED}
    if len(reporters) >= REPORTS:
        return Outlook("halted")
    return _Look(rules, nodes, tasks).whole()


class _Look:
    """One look at a tree."""

    def __init__(self, rules: Rules, nodes: Sequence[Node], tasks: Sequence[Task]):
        self.rules, self.nodes, self.tasks = rules, nodes, tasks
        self.found = Outlook("growing")
        self.states: dict[str, str] = {}
        for node in nodes:
            state = node.state
            if state == "review":
                state = verdict(rules, done(tasks, "label", node.id))
                if state != "review":
                    self.found.judged[node.id] = state
            self.states[node.id] = state

    def below(self, parent: str, role: str, *states: str) -> list[Node]:
        return [n for n in self.nodes if n.parent == parent and n.role == role and self.states[n.id] in states]

    def review(self, nodes: Iterable[Node]) -> None:
        """Ask for the reviews that these messages lack."""
        for node in nodes:
            missing = self.rules.reviews - len(done(self.tasks, "label", node.id))
            self.found.wants.append(Want("label", node.id, missing, not_by=frozenset({node.author})))

    def whole(self) -> Outlook:
        at = self.nodes[0]
        if self.states[at.id] == "review":
            self.review([at])
            self.found.state = "review"
            return self.found
        if self.states[at.id] == "rejected":
            self.found.state = "low_grade"
            return self.found
        while given := [node for node in self.nodes if node.parent == at.id and self.states[node.id] == "given"]:
            at = given[0]
        for turn in range(self.rules.turns):
            order = self.level(at)
            if order is None:
                return self.found
            if turn == self.rules.turns - 1 or not order.is_any_acceptable:
                break
            following = self.next_user(order.best)
            if following is None:
                return self.found
            at = following
        self.found.state = "finished"
        return self.found

    def level(self, at: Node) -> Order | None:
        """The answers to one message: grown, then ranked. None while something is wanted."""
        rankings = done(self.tasks, "rank", at.id)
        answers = self.below(at.id, "assistant", "accepted")
        if not rankings and not at.parameters.get("closed") and self.grow(at, answers):
            return None
        shown = rankings[0].shown if rankings else tuple(node.id for node in answers[:MOST_SHOWN])
        order = order_of(rankings)
        num = 0 if order is None else len(order.tasks)
        if num < self.rules.rankings:
            authors = frozenset(node.author for node in answers if node.author)
            self.found.state = "ranking"
            self.found.wants.append(Want("rank", at.id, self.rules.rankings - num, shown, authors))
            return None
        return order

    def grow(self, at: Node, answers: Sequence[Node]) -> bool:
        """Ask for the answers that are missing; whether there is anything to wait for."""
        waiting = self.below(at.id, "assistant", "review")
        self.review(waiting)
        missing = self.rules.answers - len(answers) - len(waiting)
        by_people = [node for node in (*answers, *waiting) if not node.model]
        written = max(0, min(missing, self.rules.written - len(by_people)))
        to_draw = missing - written
        is_dry = at.drawn >= DRAWS * self.rules.answers
        if is_dry and len(answers) + len(waiting) + written < 2:  # nothing to compare: somebody must write it
            written = 2 - len(answers) - len(waiting)
        if written > 0:
            authors = frozenset(node.author for node in by_people if node.author)
            self.found.wants.append(Want("answer", at.id, written, not_by=authors))
        if to_draw > 0 and not is_dry:
            self.found.wants.append(Want("draw", at.id, to_draw))
        return bool(self.found.wants)

    def next_user(self, best: str) -> Node | None:
        """What the user says after the best answer; None while it is wanted or under review."""
        if accepted := self.below(best, "user", "accepted"):
            return accepted[0]
        waiting = self.below(best, "user", "review")
        self.review(waiting)
        if not waiting:
            author = next(node.author for node in self.nodes if node.id == best)
            self.found.wants.append(Want("user", best, 1, not_by=frozenset({author} - {""})))
        self.found.state = "growing"
        return None


def path_to(nodes: Mapping[str, Node], leaf: str | None) -> list[Node]:
    """From the first message down to one."""
    found: list[Node] = []
    while leaf is not None:
        found.append(nodes[leaf])
        leaf = nodes[leaf].parent
    return found[::-1]


def conversation(tree: Tree, path: Sequence[Node], meta: Mapping[str, Any] | None = None) -> Conversation:
    """A path as a record, under the tree's system prompt."""
    system = (Message("system", tree.system),) if tree.system else ()
    said = tuple(Message(node.role, node.content) for node in path)
    return Conversation(system + said, meta=dict(meta or {}))
