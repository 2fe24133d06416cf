"""One order from many: ranked pairs (Tideman 1987, "Independence of clones as a criterion for voting rules").

    ranked_pairs([{"a": 1, "b": 2}, {"b": 1, "a": 2}, {"a": 1, "b": 2}])        # {"a": 1.0, "b": 2.0}

Every two items are set against each other: who is placed above the other by more people wins, and by how many more is its
margin. The wins are locked in from the largest margin down, but none that would close a circle with those locked before.

    margin(a, b)    people who place a above b, less those who place b above a; ties say nothing

**Ties.** Wins of the same margin are locked at once, and those of them that lie on a circle with one another and with what is
locked are all left out: so no order of the input decides anything, and where nothing tells two items apart they share a place.
(Tideman breaks such ties by lot, which is no answer for a reader who runs it twice.) An item's place follows from how many stand
below it less how many stand above, along any chain of locked wins: turned round, all opinions give the same order turned round.

A Condorcet winner, who beats every other item, is always first alone. Open-Assistant's consensus is of this kind (Köpf et al.
2023). Nothing here knows a model; what it is not: a model of how strong items are, which votes of many items need.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, groupby
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def margins(opinions: Sequence[Mapping[T, float]]) -> dict[tuple[T, T], int]:
    """(winner, loser) -> margin, of every two items that more people order one way than the other.

    Args:
        opinions: of each person item -> rank, 1 is best, equal ranks are ties; an item may be missing.
    """
    found: dict[tuple[T, T], int] = {}
    for a, b in combinations(items_of(opinions), 2):
        ranks = [(one[a], one[b]) for one in opinions if a in one and b in one]
        margin = sum((left < right) - (left > right) for left, right in ranks)
        if margin:
            found[(a, b) if margin > 0 else (b, a)] = abs(margin)
    return found


def items_of(opinions: Iterable[Mapping[T, float]]) -> list[T]:
    """All items, in the order in which they are first named."""
    return list(dict.fromkeys(item for one in opinions for item in one))


def locked(wins: Mapping[tuple[T, T], int]) -> set[tuple[T, T]]:
    """The wins that stand: from the largest margin down, without circles."""
    found: set[tuple[T, T]] = set()
    falling = sorted(wins, key=lambda pair: -wins[pair])
    for _, group in groupby(falling, key=lambda pair: wins[pair]):
        new = set(group)
        both = found | new
        below = {item: _below(item, both) for item in {loser for _, loser in new}}
        found |= {(winner, loser) for winner, loser in new if winner not in below[loser]}
    return found


def _below(top: T, wins: set[tuple[T, T]]) -> set[T]:
    """What can be reached from an item along wins."""
    found: set[T] = set()
    waiting = [top]
    while waiting:
        at = waiting.pop()
        new = {loser for winner, loser in wins if winner == at} - found
        found |= new
        waiting += new
    return found


def ranked_pairs(opinions: Sequence[Mapping[T, float]]) -> dict[T, float]:
    """Item -> its rank among all: 1 is best; items that nothing tells apart share one, and the ranks behind them are skipped."""
    items = items_of(opinions)
    stands = locked(margins(opinions))
    below = {item: _below(item, stands) for item in items}
    score = {item: len(below[item]) - sum(item in others for others in below.values()) for item in items}
    return {item: 1.0 + sum(score[other] > score[item] for other in items) for item in items}
