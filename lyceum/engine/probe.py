"""Which of several ways to do the same work is fastest: each is taken in turn, on work that has to be done anyway.

    probe = Probe([usual, other])
    way = probe.choose()          # do the work so, then
    probe.note(seconds)

The first way is the usual one; another is chosen where its median is below MARGIN of the usual one's. All are tried again
every AGAIN turns, since a machine has quiet and busy hours. What it is not: for work whose result may not depend on the
clock. Ways round differently in the last bits, so training never probes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Generic, TypeVar

W = TypeVar("W")

TURNS = 9  # of each way, one after the other, of which the first is not counted: it finds cold caches
MARGIN = 0.95  # of the usual way's time, which another must stay below
AGAIN = 4000  # turns: a token is some milliseconds, so a trial every ten seconds, of which it takes a hundredth


class Probe(Generic[W]):
    """A choice among `ways`, the first of them the usual one."""

    def __init__(self, ways: Sequence[W]) -> None:
        self._ways = list(ways)
        self._times: list[list[float]] = [[] for _ in self._ways]
        self._best = self._turn = 0

    def choose(self) -> W:
        """The way to go this time."""
        return self._ways[self._now]

    def note(self, seconds: float) -> None:
        """So long did the last one take."""
        if self._turn < len(self._ways) * TURNS:
            self._times[self._now].append(seconds)
        self._turn += 1
        if self._turn == len(self._ways) * TURNS:
            medians = [statistics.median(times[1:]) for times in self._times]
            fastest = min(range(len(medians)), key=medians.__getitem__)
            self._best = fastest if medians[fastest] < MARGIN * medians[0] else 0
        elif self._turn >= AGAIN:
            self._times, self._turn = [[] for _ in self._ways], 0

    @property
    def _now(self) -> int:
        is_trying = self._turn < len(self._ways) * TURNS
        return self._turn % len(self._ways) if is_trying else self._best
