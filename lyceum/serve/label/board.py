"""The dashboard of the labelling page: how far people agree, with one another and with what is known, and who takes no care.

    board(labels, names)        # numbers as JSON; lyceum.evals.annotators says what they mean

What it is not: a verdict that anything follows from by itself. Whoever runs the service looks, and revokes a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sqlalchemy import select

from lyceum.evals.annotators import Opinion, between, krippendorff_alpha, nominal, ordinal, people
from lyceum.serve.label.queue import Labels, as_task
from lyceum.serve.label.rules import KINDS
from lyceum.serve.label.tables import NODES, TASKS
from lyceum.serve.label.tree import Task, ranks_of

ASKED = {"spam": nominal, "wrong_language": nominal, "quality": ordinal, "use": nominal}


def board(labels: Labels, names: Mapping[str, str]) -> dict[str, Any]:
    """All numbers. names: labeller -> what people call them."""
    with labels.database.reading() as connection:
        ended = TASKS.c.state.in_(("done", "skipped"))
        tasks = [as_task(row) for row in connection.execute(select(TASKS).where(ended).order_by(TASKS.c.number))]
        asked = {task.node for task in tasks if task.is_gold}
        rows = connection.execute(select(NODES.c.id, NODES.c.gold).where(NODES.c.id.in_(asked))).all()
    gold = {row.id: row.gold for row in rows if row.gold}
    ranked = [task for task in tasks if task.kind == "rank" and task.state == "done"]
    opinions = [Opinion(one.labeller, str(one.node), ranks_of(one), one.shown) for one in ranked]
    known = {id: value["ranks"] for id, value in gold.items() if "ranks" in value}
    judged = {one.annotator: one.to_json() for one in people(opinions, known)}
    told = []
    for labeller in dict.fromkeys([*judged, *(task.labeller for task in tasks)]):
        mine = [task for task in tasks if task.labeller == labeller]
        done = [task for task in mine if task.state == "done"]
        counts = Counter(task.kind for task in done)
        right = [won for task in done if (won := _right(task, gold)) is not None]
        row = judged.get(labeller) or {"annotator": labeller, "verdict": "few"}
        row |= {"name": names.get(labeller, labeller), "done": {kind: counts[kind] for kind in KINDS}}
        row |= {"skipped": len(mine) - len(done), "gold_labels": [sum(right), len(right)]}
        row["seconds"] = median(task.finished - task.created for task in done) if done else None
        told.append(row)
    agreed = between(opinion for opinion in opinions if opinion.item not in known)
    return {
        "people": told,
        "between": None if agreed[0] != agreed[0] else list(agreed),
        "alpha": alphas([task for task in tasks if task.kind == "label" and task.state == "done"]),
    }


def alphas(labelled: Sequence[Task]) -> dict[str, float | None]:
    """Krippendorff's alpha of each question of the labels; None where there is nothing to agree on."""
    found: dict[str, float | None] = {}
    for name, distance in ASKED.items():
        units: dict[str | None, list[Any]] = {}
        for task in labelled:
            value = task.result.get(name)
            if value is not None:
                units.setdefault(task.node, []).append(value)
        alpha = krippendorff_alpha(units.values(), distance)
        found[name] = None if alpha != alpha else alpha
    return found


def _right(task: Task, gold: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The share of known labels that somebody gave rightly; None where none is known."""
    known = gold.get(str(task.node), {}).get("labels") if task.kind == "label" else None
    known = {name: value for name, value in (known or {}).items() if task.result.get(name) is not None}
    if not known:
        return None
    return sum(task.result.get(name) == value for name, value in known.items()) / len(known)
