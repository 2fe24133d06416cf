"""``lyceum arena``: how models stand by the blind votes in a store.

    lyceum arena runs/demo                  all votes; then by kind of prompt
    lyceum arena runs/demo --style          with length and markdown of the answers controlled
    lyceum arena runs/demo --kind code      votes on one kind of prompt
    lyceum arena runs/demo --json           one JSON value

It only opens the store and shows what comes of it: votes are read by `lyceum.serve.arena.battles`, the table is worked out by
`lyceum.evals.arena`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from lyceum.cli.feedback import store_packages
from lyceum.errors import DataError, UsageError, did_you_mean
from lyceum.evals.arena import LEAST_GROUPS, Table, Vote, by_kind, table_of
from lyceum.log import aligned


def arena(place: str, *, kind: str = "", controls_style: bool = False, as_json: bool = False) -> str:
    """The table of a run's or a store's votes, for a person or as JSON.

    Raises:
        UsageError: the packages of the service are not installed, or there is no such kind.
        StoreError: no store is there.
        DataError: nobody has voted.
    """
    votes = read_votes(place)
    kinds = by_kind(votes)
    if not votes:
        raise DataError(f"nobody has voted in the arena of {place}", hint="serve two models, and open /arena")
    if kind and kind not in kinds:
        raise UsageError(f"there is no vote on a prompt of the kind {kind!r}", hint=did_you_mean(kind, kinds))
    table = table_of(kinds[kind] if kind else votes, controls_style=controls_style)
    of_kinds = {} if kind else {name: table_of(some, controls_style=controls_style) for name, some in kinds.items()}
    if as_json:
        told = table.to_json() | {"kinds": {name: one.to_json() for name, one in of_kinds.items()}}
        return json.dumps(told, ensure_ascii=False)
    lines = table_lines(table)
    for name, one in of_kinds.items():
        lines += ["", f"prompts of the kind {name}", *table_lines(one)]
    return "\n".join(lines)


def read_votes(place: str) -> list[Vote]:
    """The blind votes in a store. Raises UsageError, StoreError."""
    with store_packages():
        from lyceum.serve.arena.battles import votes_of
        from lyceum.serve.database import Database
        from lyceum.serve.judgements import Judgements
    database = Database.open(place, must_exist=True)
    try:
        return votes_of(Judgements(database).everybodys("comparison"))
    finally:
        database.close()


def table_lines(table: Table) -> list[str]:
    """A table as lines: the standings, then what they rest on."""
    rows: list[Sequence[str]] = [["model", "place", "points", "95 % interval", "votes", "score"]]
    for one in table.standings:
        points = f"{one.points:.0f}" + ("" if one.is_exact else "*")
        rows.append(
            [one.model, str(one.place), points, interval(one.low, one.high), str(one.num_votes), f"{one.score:.2f}"]
        )
    lines: list[str] = []
    drawn = aligned(rows, [False, True, True, True, True, True])
    for number, one in enumerate(table.standings):
        if number and one.group != table.standings[number - 1].group:
            lines.append("never compared with those above:")
        lines.append(drawn[number + 1])
    lines.insert(0, drawn[0])
    for effect in table.effects:
        lines.append(
            f"{effect.name}: {effect.points:+.0f} points for a usual difference, {interval(effect.low, effect.high)}"
        )
    said = ", ".join(f"{count} {verdict}" for verdict, count in table.verdicts.items())
    lines.append(f"{table.num_votes} votes ({said}) in {table.num_groups_of_votes} conversations or persons")
    if table.num_groups_of_votes < LEAST_GROUPS:
        lines.append(f"no intervals under {LEAST_GROUPS} of these")
    if not all(one.is_exact for one in table.standings):
        lines.append("* some never lost, or never won: their order comes from the votes, the distance from a penalty")
    return lines


def interval(low: float, high: float) -> str:
    """The ends of an interval, for a person."""
    if math.isnan(low) and math.isnan(high):
        return "-"
    return f"{'open' if math.isinf(low) else f'{low:.0f}'} to {'open' if math.isinf(high) else f'{high:.0f}'}"
