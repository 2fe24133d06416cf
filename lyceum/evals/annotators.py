"""How far people who judge the same things agree: with one another, with answers that are known, and which of them take no care.

    between(opinions)            share of pairs that two people order alike, with its interval
    people(opinions, gold)       of each person the same against the others' majority and against gold, and a verdict
    krippendorff_alpha(units)    agreement beyond chance on labels, with missing values

**Agreement on rankings** is counted in pairs of answers that both people decide: the share they order alike. A coin has 1/2;
InstructGPT's labellers had 72.6 % (Ouyang et al. 2022, 3.4). Ties decide nothing; how often a person ties is shown apart. A
person is set against the majority of all *others* who ranked the same answers, so that nobody confirms himself.

**Careless** is who is near a coin and not near the others: the whole interval of the agreement lies below the middle between
1/2 and the median person; or, on questions whose answer is known, below the middle between 1/2 and 1. The second finds them
where most people are careless, and where they have agreed on something. Under `LEAST` rankings nothing is said. Beside it stands
how often the answer that was shown first is put first: shown in an order by lot, an honest share is 1/2.

**Alpha** is Krippendorff's (Computing Krippendorff's alpha-reliability, 2011): 1 - observed / expected disagreement over all
pairs of values of one unit; 1 is perfect, 0 is chance. Below 0.667 he draws no conclusions.

Intervals are 95 % bootstrap intervals over the things judged. What it is not: a reason to distrust a single judgement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from lyceum.evals.metrics import Shares, decided, interval

LEAST = 8  # rankings of a person before anything is said of them
GOLD_LEAST = 0.75  # the middle between a coin and knowing


@dataclass(frozen=True)
class Opinion:
    """One person's ranking of one thing's answers.

    item: what was ranked. ranks: answer -> its rank, 1 is best, equal ranks are ties. shown: the answers as they stood on the
    screen.
    """

    annotator: str
    item: str
    ranks: Mapping[str, float]
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Person:
    """What is to be said of one person.

    others, gold, as_shown: agreement with the others' majority, with known answers, with the order on the screen, each as (share,
    low, high); num_others, num_gold: rankings that the first two are from. ties: share of pairs that were tied. verdict: "" is
    nothing, "few" (too few to say), or "careless".
    """

    annotator: str
    num_rankings: int
    others: tuple[float, float, float]
    num_others: int
    gold: tuple[float, float, float]
    num_gold: int
    as_shown: tuple[float, float, float]
    ties: float
    verdict: str = ""

    def to_json(self) -> dict[str, Any]:
        """It as JSON; what no pair tells is null."""
        row = dict(vars(self))
        for name in ("others", "gold", "as_shown"):
            row[name] = None if row[name][0] != row[name][0] else list(row[name])
        return row


def pairs_of(ranks: Mapping[str, float]) -> set[tuple[str, str]]:
    """(better, worse) of every two answers that the ranks decide."""
    names = list(ranks)
    return {(names[i], names[j]) for i, j in decided([ranks[name] for name in names])}


def alike(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[int, int]:
    """How many pairs two people order alike, of those that both decide."""
    mine, other = pairs_of(ours), pairs_of(theirs)
    right = len(mine & other)
    return right, right + len(mine & {(worse, better) for better, worse in other})


def majority(opinions: Sequence[Opinion]) -> dict[tuple[str, str], int]:
    """(better, worse) -> by how many more people, of every pair that more order one way than the other."""
    votes = Counter(pair for one in opinions for pair in pairs_of(one.ranks))
    return {pair: most for pair, num in votes.items() if (most := num - votes[pair[1], pair[0]]) > 0}


def between(opinions: Iterable[Opinion]) -> tuple[float, float, float]:
    """Share of pairs that two people who ranked the same answers order alike, of those that both decide, with its interval."""
    counts = [
        [alike(a.ranks, b.ranks) for a, b in combinations(group, 2) if a.annotator != b.annotator]
        for group in by_item(opinions).values()
    ]
    return interval(_shares([(sum(r for r, _ in each), sum(n for _, n in each)) for each in counts]))


def people(opinions: Sequence[Opinion], gold: Mapping[str, Mapping[str, float]] | None = None) -> list[Person]:
    """What is to be said of each person, the least agreeing first.

    Args:
        opinions: of everybody, those of gold items too.
        gold: item -> answer -> its known rank.
    """
    known = gold or {}
    groups = by_item(one for one in opinions if one.item not in known)
    found = []
    for name in dict.fromkeys(one.annotator for one in opinions):
        mine = [one for one in opinions if one.annotator == name]
        others = []
        for one in mine:
            if one.item not in known:
                most = majority([other for other in groups[one.item] if other.annotator != name])
                right = len(pairs_of(one.ranks) & most.keys())
                wrong = len({(worse, better) for better, worse in pairs_of(one.ranks)} & most.keys())
                others.append((right, right + wrong))
        sure = [alike(one.ranks, known[one.item]) for one in mine if one.item in known]
        place = [alike(one.ranks, {answer: at for at, answer in enumerate(one.shown)}) for one in mine if one.shown]
        num_pairs = sum(len(one.ranks) * (len(one.ranks) - 1) // 2 for one in mine)
        ties = 1 - sum(len(pairs_of(one.ranks)) for one in mine) / max(num_pairs, 1)
        shares = [interval(_shares(counts)) for counts in (others, sure, place)]
        counts = (sum(n > 0 for _, n in others), sum(n > 0 for _, n in sure))
        found.append(Person(name, len(mine), shares[0], counts[0], shares[1], counts[1], shares[2], ties))
    return _judged(found)


def _judged(found: Sequence[Person]) -> list[Person]:
    """The verdicts, and the order: the least agreeing first, those of whom nothing is known last."""
    usual = [one.others[0] for one in found if one.num_others >= LEAST]
    bar = (0.5 + median(usual)) / 2 if usual else 0.0

    def verdict(one: Person) -> str:
        if one.num_rankings < LEAST:
            return "few"
        disagrees = one.num_others >= LEAST and one.others[2] < bar
        is_careless = disagrees or (one.num_gold >= LEAST and one.gold[2] < GOLD_LEAST)
        return "careless" if is_careless else ""

    judged = [Person(**{**vars(one), "verdict": verdict(one)}) for one in found]
    return sorted(judged, key=lambda one: (one.num_others == 0, one.others[0] if one.num_others else 0.0))


def by_item(opinions: Iterable[Opinion]) -> dict[str, list[Opinion]]:
    """The opinions on each thing."""
    groups: dict[str, list[Opinion]] = {}
    for one in opinions:
        groups.setdefault(one.item, []).append(one)
    return groups


def _shares(counts: Sequence[tuple[int, int]]) -> Shares:
    """(right, pairs) of each item that has pairs, as the interval takes them."""
    kept = [one for one in counts if one[1]]
    return np.array([float(right) for right, _ in kept]), np.array([float(pairs) for _, pairs in kept])


# ---------------------------------------------------------------- labels

Distance = Callable[[Any, Any, "Counter[Any]"], float]


def nominal(a: Hashable, b: Hashable, counts: Counter[Any]) -> float:
    """Squared distance of values that are names."""
    return float(a != b)


def on_interval(a: float, b: float, counts: Counter[Any]) -> float:
    """Squared distance of numbers on a scale of equal steps."""
    return float((a - b) ** 2)


def ordinal(a: float, b: float, counts: Counter[Any]) -> float:
    """Squared distance of places in an order: the values that stand between the two, half of each end's."""
    low, high = min(a, b), max(a, b)
    between = sum(num for value, num in counts.items() if low <= value <= high)
    return float((between - (counts[low] + counts[high]) / 2) ** 2)


def krippendorff_alpha(units: Iterable[Sequence[Any]], distance: Distance = nominal) -> float:
    """Krippendorff's alpha: 1 is perfect agreement, 0 is what chance gives, below it is worse than chance.

    Args:
        units: of each thing judged the values it was given, missing ones left out; a single value is paired with nothing.
        distance: between two values; `nominal`, `ordinal`, `on_interval`.

    Returns:
        NaN where no unit has two values; where all values are the same there is nothing to agree on, NaN too.
    """
    paired = [list(values) for values in units if len(values) > 1]
    counts = Counter(value for values in paired for value in values)
    total = sum(counts.values())
    expected = sum(counts[a] * counts[b] * distance(a, b, counts) for a in counts for b in counts if a != b) / max(
        total - 1, 1
    )
    if not expected:
        return float("nan")
    observed = sum(
        distance(a, b, counts) * 2 / (len(values) - 1) for values in paired for a, b in combinations(values, 2)
    )
    return 1 - observed / expected
