"""From what came of labelling to what the stages read: rankings, ratings, conversations, labels, for `lyceum.serve.feedback`.

    gathered = gather(Labels(database), voices="consensus")

| what people did | becomes |
|---|---|
| several ranked the same answers | one ranking, their consensus (`voices="consensus"`); or each one's (`voices="each"`) |
| scores from 1 to 7 | ratings from 0 to 1: the mean of all, or each one's |
| a finished tree | a conversation through the best answers, unless most found none of them acceptable |
| an answer that a person wrote, of a set that was ranked | a conversation that ends in it |
| labels | a conversation that ends in what was labelled, with the shares in `meta` |

Left out, and counted: what was given without consent, or holds a text that was (`no_consent`); what stands in a tree that
was halted (`halted`); orders that are all ties (`all_ties`). Questions whose answer is known are no feedback, and appear nowhere.

What it is not: judgements of the chat page, nor files (`lyceum.serve.feedback`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from lyceum.corpus.records import Conversation, Message, Ranking, Rating
from lyceum.serve.label.queue import Grown, Labels
from lyceum.serve.label.rules import FLAGS, SCALE
from lyceum.serve.label.tree import UNFINISHED, Node, Order, Task, conversation, order_of, path_to, ranks_of

VOICES = ("consensus", "each")
STATES = (*UNFINISHED, "finished", "low_grade", "halted")
CONSENSUS = "consensus"  # the annotator of what several people say together


@dataclass
class Gathered:
    """What can be learned from; num: tasks that were judgements; left_out: how many by reason."""

    rankings: list[Ranking] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    labels: list[Conversation] = field(default_factory=list)
    num: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def gather(labels: Labels, voices: str = CONSENSUS) -> Gathered:
    """All that came of labelling, oldest tree first. voices: one of VOICES."""
    found = Gathered()
    with labels.database.reading() as connection:
        for page in labels.pages(connection, STATES):
            for grown in page:
                if not grown[0].is_gold:
                    _Picker(found, grown, voices).all()
    return found


class _Picker:
    """What one tree gives."""

    def __init__(self, found: Gathered, grown: Grown, voices: str):
        self.found, self.voices = found, voices
        self.tree, nodes, tasks = grown
        self.nodes = {node.id: node for node in nodes}
        self.done = [task for task in tasks if task.state == "done" and task.kind in ("rank", "label")]

    def all(self) -> None:
        self.found.num += len(self.done)
        if self.tree.state == "halted":
            self.found.left_out["halted"] += len(self.done)
            return
        given = [task for task in self.done if task.consent]
        self.found.left_out["no_consent"] += len(self.done) - len(given)
        orders = []
        for node in dict.fromkeys(task.node for task in given if task.node is not None):
            here = [task for task in given if task.node == node]
            texts = {id for task in here for id in task.shown}
            if not all(one.consent for one in (*self.path(node), *(self.nodes[id] for id in texts))):
                self.found.left_out["no_consent"] += len(here)
                continue
            if order := order_of([task for task in here if task.kind == "rank"]):
                orders.append(order)
                self.rankings(order)
                self.ratings(order)
            if said := [task for task in here if task.kind == "label"]:
                self.found.labels.append(self.labelled(node, said))
        self.conversations(orders)

    def path(self, leaf: str | None) -> list[Node]:
        return path_to(self.nodes, leaf)

    def prompt(self, node: str) -> Conversation:
        return conversation(self.tree, self.path(node))

    def message(self, answer: str) -> Message:
        return Message("assistant", self.nodes[answer].content)

    def meta(self, kind: str, annotator: str, at: float, **more: Any) -> dict[str, Any]:
        time = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
        about = {"source": "labelling", "kind": kind, "annotator": annotator, "time": time, "consent": True}
        return {**about, "tree": self.tree.id, "use": self.tree.use, "language": self.tree.language, **more}

    def about(self, answer: str, **more: Any) -> dict[str, Any]:
        node = self.nodes[answer]
        return {"model": node.model or "person", "parameters": node.parameters, "author": node.author, **more}

    def voiced(self, order: Order) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, float], Sequence[Task]]]:
        """(annotator, answers, their ranks, the tasks behind them): of all together, or of each."""
        if self.voices == CONSENSUS:
            yield CONSENSUS, order.shown, order.ranks, order.tasks
        else:
            for task in order.tasks:
                yield task.labeller, task.shown, ranks_of(task), [task]

    def rankings(self, order: Order) -> None:
        for annotator, shown, ranks, tasks in self.voiced(order):
            values = tuple(ranks[answer] for answer in shown)
            if len(set(values)) == 1:
                self.found.left_out["all_ties"] += len(tasks)
                continue
            none = [task.result["none_acceptable"] for task in tasks]
            acceptable = (False,) * len(shown) if sum(none) * 2 > len(none) else None
            sides = {answer: side for side, answer in enumerate(shown)} if len(tasks) == 1 else {}
            responses = [self.about(answer, **_side(sides, answer), **_said(answer, tasks)) for answer in shown]
            last = max(task.finished for task in tasks)
            meta = self.meta("label_ranking", annotator, last, annotators=len(tasks), responses=responses)
            said = tuple(self.message(answer) for answer in shown)
            self.found.rankings.append(Ranking(self.prompt(order.node), said, values, acceptable=acceptable, meta=meta))

    def ratings(self, order: Order) -> None:
        for annotator, shown, _, tasks in self.voiced(order):
            for answer in shown:
                said = _said(answer, tasks)
                if said["score"] is not None:
                    value = (said["score"] - SCALE[0]) / (SCALE[1] - SCALE[0])
                    last = max(task.finished for task in tasks)
                    meta = self.meta("label_score", annotator, last, responses=[self.about(answer, **said)])
                    self.found.ratings.append(Rating(self.prompt(order.node), self.message(answer), value, meta=meta))

    def labelled(self, node: str, tasks: Sequence[Task]) -> Conversation:
        results = [task.result for task in tasks]
        scores = [result["quality"] for result in results if result["quality"] is not None]
        shares: dict[str, Any] = {
            name: fmean(result[name] for result in results) for name in ("spam", "wrong_language")
        }
        shares |= {name: fmean(name in result["flags"] for result in results) for name in FLAGS}
        shares["quality"] = fmean(scores) if scores else None
        uses = Counter(result["use"] for result in results if "use" in result)
        people = sorted({task.labeller for task in tasks})
        more = {"labels": shares, "uses": dict(uses), "annotators": people, "responses": [self.about(node)]}
        last = max(task.finished for task in tasks)
        return conversation(self.tree, self.path(node), self.meta("labels", CONSENSUS, last, **more))

    def conversations(self, orders: Sequence[Order]) -> None:
        """The best answers to the end of a finished tree; and what people wrote where it was ranked."""
        if not orders:
            return
        best = {order.best for order in orders if order.is_any_acceptable}
        written = {a for order in orders if order.is_any_acceptable for a in order.shown if self.nodes[a].author}
        leaves = written - best
        if self.tree.state == "finished":
            ends = [order.best for order in orders if order.best in best]
            leaves |= set(ends[-1:])
        leaves |= {answer for answer in written & best if not any(self.is_above(answer, leaf) for leaf in leaves)}
        for leaf in sorted(leaves, key=lambda id: list(self.nodes).index(id)):
            meta = self.meta("labelled", CONSENSUS, self.tree.updated, responses=[self.about(leaf)])
            self.found.conversations.append(conversation(self.tree, self.path(leaf), meta))

    def is_above(self, upper: str, leaf: str) -> bool:
        return any(node.id == upper for node in self.path(leaf))


def _side(sides: Mapping[str, int], answer: str) -> dict[str, int]:
    return {"side": sides[answer]} if sides else {}


def _said(answer: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """The mean score of an answer, None where nobody gave one; and the share of people who raised each flag."""
    results = [(task.result, task.shown.index(answer)) for task in tasks]
    scores = [result["scores"][at] for result, at in results if result["scores"][at] is not None]
    flags = Counter(flag for result, at in results for flag in result["flags"][at])
    return {"score": fmean(scores) if scores else None, "flags": {n: c / len(tasks) for n, c in flags.items()}}
