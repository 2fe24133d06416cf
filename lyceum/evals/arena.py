"""Strengths of models from blind votes between two answers: Bradley-Terry, with intervals, ties and style control.

    table = table_of([Vote("sft", "ppo", "right", group="chat 7"), ...])
    table.standings[0].model, table.standings[0].points, table.standings[0].low, table.standings[0].high

**The model** (Bradley and Terry 1952). Model i has a strength s_i, and P(i is preferred to j) = 1 / (1 + exp(s_j - s_i)).
Strengths are those of maximum likelihood; a tie, and "both bad", count as half a win for each side, as in Chatbot Arena
(Chiang et al. 2024). They are shown on Elo's scale, 400 / ln 10 points a unit, so that three wins to one are 400 log10(3) =
190.85 points between two models. Only differences mean anything: the mean of the models that can be compared is put at 1000.

**When there is no maximum.** A strength is finite only if every model has, by a chain of wins, beaten every other (Ford
1957): a model that never lost would be infinitely strong. There, and only there, each model gets half a win and half a loss
against an imagined model of average strength (the penalty of Mease 2003, with a logistic curve and half its weight). Its
order comes from the votes, its distance from the penalty; so the table says so (`is_exact`), and an undefeated model's
interval is open above.

**Models that never met**, not even through others, stand in groups of their own and are not compared.

**Intervals** are percentile bootstrap intervals over groups of votes, since votes of one conversation, or one person, hang
together. Under `LEAST_GROUPS` groups there are none: such an interval would be too short (Cameron et al. 2008).

**Style control** (Li et al. 2024, "Does style matter?"): length and the numbers of headings, list items and bold words of the
two answers join the regression, each as (left - right) / (left + right). What they explain is no longer the models' strength.
Deviations: length counts characters, since tokens differ between our models; differences are scaled and not centred, so that
nothing depends on which answer stood left; each effect has the penalty above, so that style that was never voted against
stays finite.

What it is not: who voted, or where votes are kept (`lyceum.serve.arena`). Votes are of the people who came and the prompts
they wrote; order does not matter, as it does for Elo's own updates.

Shapes: V votes (equal ones together), R rounds of the bootstrap, M models, F features of style, P = M + F.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["left", "right", "tie", "neither"]
Array = NDArray[np.float64]

VERDICTS: tuple[Verdict, ...] = ("left", "right", "tie", "neither")
SCORE = {"left": 1.0, "right": 0.0, "tie": 0.5, "neither": 0.5}  # of the left answer
POINTS = 400 / math.log(10)  # of Elo's scale for a unit of strength
CENTRE = 1000.0
PENALTY = 0.5  # wins, and as many losses, against an imagined model of average strength
LEAST_GROUPS = 10  # of votes, for an interval
LONGEST_STEP = 3.0  # of Newton's method, in units of strength
MAX_STEPS = 200
STYLE = ("length", "headings", "lists", "bold")
LONG = 500  # characters from which on a prompt is long
_CODE_BLOCK = re.compile(r"^```.*?(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
_LIST_ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)]) ", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|__(?=\S)[^_\n]+(?<=\S)__")
_CODE = re.compile(r"`|\b\w+\.\w+|\w\(|\b(?:def|class|import|return) ")
_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")


@dataclass(frozen=True)
class Vote:
    """One person's word on two answers to one prompt.

    left, right: the models, as they stood. group: what hangs together, such as the conversation. style: what `style_of` says
    of the two answers. kinds: of what kinds the prompt is.
    """

    left: str
    right: str
    verdict: Verdict
    group: str = ""
    style: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,) * len(STYLE), (0.0,) * len(STYLE))
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Standing:
    """A model in the table.

    points, low, high: its strength on Elo's scale, and the ends of its 95 % interval: NaN where there are too few votes for
    one, infinite where the votes give no bound. group: models of different groups cannot be compared. place: 1 + how many
    models of its group are surely better, their intervals wholly above. score: share of its votes that it won, ties for half.
    """

    model: str
    points: float
    low: float
    high: float
    group: int
    place: int
    num_votes: int
    score: float
    is_exact: bool  # of maximum likelihood; else the distance rests on the penalty


@dataclass(frozen=True)
class Effect:
    """What a feature of style is worth: points for a usual difference in it (its root mean square), with the interval."""

    name: str
    points: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Standings, the best first within each group, the largest group first (of as many models, the one with more votes)."""

    standings: tuple[Standing, ...] = ()
    effects: tuple[Effect, ...] = ()
    num_votes: int = 0
    num_groups_of_votes: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """It as JSON, in which what is not a finite number is null; `is_open` says which ends have no bound."""
        rows = []
        for one in self.standings:
            is_open = [end for end, value in (("low", one.low), ("high", one.high)) if math.isinf(value)]
            rows.append({**_finite(asdict(one)), "is_open": is_open})
        told = {"standings": rows, "effects": [_finite(asdict(one)) for one in self.effects]}
        return {
            **told,
            "num_votes": self.num_votes,
            "groups_of_votes": self.num_groups_of_votes,
            "verdicts": self.verdicts,
        }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def table_of(votes: Sequence[Vote], *, controls_style: bool = False, rounds: int = 200, seed: int = 0) -> Table:
    """The table of all models that were voted on.

    Args:
        votes: in any order; one of a model against itself says nothing, and is left out.
        controls_style: let length and markdown explain what they can.
        rounds: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        An empty table of no votes.
    """
    votes = [vote for vote in votes if vote.left != vote.right]
    if not votes:
        return Table()
    models = sorted({name for vote in votes for name in (vote.left, vote.right)})
    left_V, right_V = (np.array([models.index(getattr(vote, side)) for vote in votes]) for side in ("left", "right"))
    features_VP = np.zeros((len(votes), len(models)))
    features_VP[np.arange(len(votes)), left_V] = 1.0
    features_VP[np.arange(len(votes)), right_V] = -1.0
    names: list[str] = []
    if controls_style:
        style_VF, names = _style(votes)
        features_VP = np.hstack([features_VP, style_VF])
    scores_V = np.array([SCORE[vote.verdict] for vote in votes])
    groups = {name: number for number, name in enumerate(dict.fromkeys(vote.group for vote in votes))}
    counts_RG = _draws(len(groups), rounds if len(groups) >= LEAST_GROUPS else 0, seed)
    weights_RV = counts_RG[:, [groups[vote.group] for vote in votes]]
    part_M = _parts(len(models), left_V, right_V)
    strengths_RP, is_exact_M = _fit(features_VP, scores_V, weights_RV, part_M)
    won_M, num_M = np.zeros(len(models)), np.zeros(len(models), dtype=int)
    for sides_V, share_V in ((left_V, scores_V), (right_V, 1 - scores_V)):
        np.add.at(won_M, sides_V, share_V)
        np.add.at(num_M, sides_V, 1)
    ends_P = _ends(strengths_RP)
    points_M = POINTS * strengths_RP[0, : len(models)] + CENTRE
    low_M, high_M = (POINTS * ends_P[end, : len(models)] + CENTRE for end in (0, 1))
    low_M[won_M == 0], high_M[won_M == num_M] = -np.inf, np.inf
    sizes, num_votes = Counter(part_M.tolist()), Counter(part_M[left_V].tolist())
    order = sorted(sizes, key=lambda part: (-sizes[part], -num_votes[part], part))
    standings = [
        Standing(
            name, float(points_M[m]), float(low_M[m]), float(high_M[m]), order.index(int(part_M[m])) + 1,
            1 + int(np.sum((part_M == part_M[m]) & (low_M > high_M[m]))),
            int(num_M[m]), float(won_M[m] / num_M[m]), bool(is_exact_M[m]),
        )
        for m, name in enumerate(models)
    ]  # fmt: skip
    worth = POINTS * np.vstack([strengths_RP[:1], ends_P])[:, len(models) :]
    return Table(
        tuple(sorted(standings, key=lambda one: (one.group, -one.points, one.model))),
        tuple(Effect(name, *map(float, worth[:, f])) for f, name in enumerate(names)),
        len(votes),
        len(groups),
        {verdict: sum(vote.verdict == verdict for vote in votes) for verdict in VERDICTS},
    )


# -- what texts are like -----------------------------------------------------------------------------------------------


def style_of(text: str) -> tuple[float, ...]:
    """How an answer looks, in STYLE's order: characters, headings, list items, bold words; in code blocks only characters."""
    prose = _CODE_BLOCK.sub("", text)
    return (float(len(text)), *(float(len(mark.findall(prose))) for mark in (_HEADING, _LIST_ITEM, _BOLD)))


def facets(prompt: str, num_turns: int) -> frozenset[str]:
    """What a prompt shows by itself: "turns" (not the first of its conversation), "code", "chinese", "long"."""
    letters = sum(character.isalpha() for character in prompt)
    found = {
        "turns": num_turns > 1,
        "code": bool(_CODE.search(prompt)),
        "chinese": len(_HAN.findall(prompt)) > 0.3 * letters,
        "long": len(prompt) > LONG,
    }
    return frozenset(name for name, is_so in found.items() if is_so)


def by_kind(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    """Votes by kind of prompt, the most frequent kind first; a prompt may be of several."""
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        for kind in sorted(vote.kinds):
            found.setdefault(kind, []).append(vote)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _style(votes: Sequence[Vote]) -> tuple[Array, list[str]]:
    """Differences of style (V, F) over their root mean square, and the names of those that differ at all."""
    left_VF, right_VF = (np.array([vote.style[side] for vote in votes], dtype=np.float64) for side in (0, 1))
    total_VF = left_VF + right_VF
    difference_VF = np.divide(left_VF - right_VF, total_VF, out=np.zeros_like(total_VF), where=total_VF > 0)
    size_F = np.sqrt(np.mean(difference_VF**2, axis=0))
    used = np.flatnonzero(size_F > 0)
    return difference_VF[:, used] / size_F[used], [STYLE[f] for f in used]


# -- the fit -----------------------------------------------------------------------------------------------------------


def _draws(num_groups: int, rounds: int, seed: int) -> Array:
    """How often each group is drawn in each round (1 + R, G); once in the first, which is the estimate itself."""
    drawn = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=rounds)
    return np.vstack([np.ones((1, num_groups)), drawn.astype(np.float64)])


def _parts(num_models: int, left_V: NDArray[Any], right_V: NDArray[Any]) -> NDArray[np.int64]:
    """For each model the smallest number of those it can be compared with, through whatever chain of votes."""
    part_M = np.arange(num_models)
    while True:
        least_V = np.minimum(part_M[left_V], part_M[right_V])
        before = part_M.copy()
        np.minimum.at(part_M, left_V, least_V)
        np.minimum.at(part_M, right_V, least_V)
        if np.array_equal(before, part_M):
            return part_M


def _fit(
    features_VP: Array, scores_V: Array, weights_RV: Array, part_M: NDArray[np.int64]
) -> tuple[Array, NDArray[np.bool_]]:
    """Strengths and effects in every round (R, P), each part of the models around 0; and which models' are exact in the first.

    Newton's method on the cross-entropy of soft labels, which is convex, for all rounds at once.
    """
    rows, place_V = np.unique(np.column_stack([features_VP, scores_V]), axis=0, return_inverse=True)
    weight_RV = np.zeros((len(rows), len(weights_RV)))
    np.add.at(weight_RV, place_V.ravel(), weights_RV.T)
    weight_RV, x_VP, y_V = weight_RV.T, rows[:, :-1], rows[:, -1]
    num_models, num_all = len(part_M), x_VP.shape[1]
    same_MM = part_M[:, None] == part_M[None, :]
    is_exact_RM = _is_bounded(x_VP[:, :num_models], y_V, weight_RV, same_MM)
    penalty_RP = np.full((len(weight_RV), num_all), PENALTY)
    penalty_RP[:, :num_models] *= ~is_exact_RM
    gauge_RPP = np.zeros(
        (len(weight_RV), num_all, num_all)
    )  # where nothing else holds a part of the models in its place
    gauge_RPP[:, :num_models, :num_models] = same_MM * is_exact_RM[:, :, None]
    products_VPP = (x_VP[:, :, None] * x_VP[:, None, :]).reshape(len(x_VP), -1)
    found_RP = np.zeros((len(weight_RV), num_all))
    for _ in range(MAX_STEPS):
        chance_RV = _sigmoid(found_RP @ x_VP.T)
        slope_RP = (weight_RV * (chance_RV - y_V)) @ x_VP + penalty_RP * np.tanh(found_RP / 2)
        curve_RPP = ((weight_RV * chance_RV * (1 - chance_RV)) @ products_VPP).reshape(gauge_RPP.shape) + gauge_RPP
        curve_RPP[:, range(num_all), range(num_all)] += penalty_RP * (1 - np.tanh(found_RP / 2) ** 2) / 2
        step_RP = np.linalg.solve(curve_RPP, slope_RP[..., None])[..., 0]
        longest_R1 = np.abs(step_RP).max(axis=1, keepdims=True)
        found_RP -= step_RP * np.minimum(1.0, LONGEST_STEP / np.maximum(longest_R1, 1e-300))
        if longest_R1.max() < 1e-9:
            break
    else:
        raise ArithmeticError("Newton's method did not settle")  # a convex function with a finite minimum: our mistake
    for part in np.unique(part_M):
        inside = np.flatnonzero(part_M == part)
        found_RP[:, inside] -= found_RP[:, inside].mean(axis=1, keepdims=True)
    return found_RP, is_exact_RM[0]


def _is_bounded(x_VM: Array, y_V: Array, weight_RV: Array, same_MM: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the part of each model has finite strengths in each round (R, M): chains of wins lead from all to all."""
    num_models = x_VM.shape[1]
    left_V, right_V = x_VM.argmax(axis=1), x_VM.argmin(axis=1)
    reach_RMM = np.zeros((len(weight_RV), num_models, num_models), dtype=bool)
    for v in range(len(x_VM)):
        is_there_R = weight_RV[:, v] > 0
        reach_RMM[:, left_V[v], right_V[v]] |= is_there_R & (y_V[v] > 0)
        reach_RMM[:, right_V[v], left_V[v]] |= is_there_R & (y_V[v] < 1)
    reach_RMM[:, range(num_models), range(num_models)] = True
    for _ in range(max(1, num_models.bit_length())):  # twice as long chains each time
        as_numbers = reach_RMM.astype(np.float32)
        reach_RMM = as_numbers @ as_numbers > 0
    from_RM = (reach_RMM | ~same_MM).all(axis=2)
    return ~((~from_RM).astype(np.float32) @ same_MM.astype(np.float32) > 0)


def _ends(strengths_RP: Array) -> Array:
    """The ends of the 95 % interval (2, P) over the rounds after the first; NaN where there are none."""
    if len(strengths_RP) == 1:
        return np.full((2, strengths_RP.shape[1]), np.nan)
    return np.asarray(np.quantile(strengths_RP[1:], [0.025, 0.975], axis=0))


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
