"""How well a reward model's scores agree with people's rankings, and with what else they could be mistaken for.

`judge` gives the figures of a reward section's report: the share of held-out pairs in the order of the ranks, whole and
by how far those who ranked agreed; whether sigmoid(margin) is a probability one can believe; and, beside all that, how
far one would come by length alone. Intervals are 95 % bootstrap intervals over prompts: pairs of one prompt share its
responses, so prompts are drawn, not pairs (Efron & Tibshirani 1993, chapter 13).

Nothing here knows a model or a tokenizer. What it is not: a judgement of the rankings, or of responses unlike those.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lyceum.batches.pairs import EncodedRanking
from lyceum.corpus.records import content_id
from lyceum.corpus.rows import json_line
from lyceum.evals.metrics import Shares, decided, interval
from lyceum.model.ensemble import Ensemble
from lyceum.run import write_lines

CALIBRATION_BINS = 10
MARGIN_EDGE, MARGIN_BINS = 5.0, 20  # of the histogram; what lies beyond is counted in its last bin
ANNOTATORS = ("known", "held_out")
NORMAL = ("reward_scale", "reward_centre")

# how far opinions on a pair agree -> what that means
CLASSES = {
    "unanimous": "all who judged the pair order it alike",
    "strong_majority": "at least three quarters of them do",
    "weak_majority": "more than half of them do",
    "split": "as many order it one way as the other",
    "one_opinion": "one judged it",
    "as_clean": "ranked as before noise was added",
    "against_clean": "ranked against what it was before noise was added",
}


@dataclass(frozen=True)
class Scored:
    """One ranking and what a reward model says of its responses.

    Args:
        ranks: 1 is best, ties allowed.
        scores: of each response, in the units of training: sigmoid of a difference is a probability.
        lengths: of each response, in tokens.
        prompt: the same for rankings of one prompt; "" stands for a prompt of its own.
        responses: the same for responses of the same text; () where nobody else ranked them.
        probabilities: that a response is the best of them (soft labels), as in the ranking.
        clean_ranks: before noise was added; () if not known.
        is_stranger: ranked by somebody of whom training saw nothing.
    """

    ranks: tuple[float, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    prompt: str = ""
    responses: tuple[str, ...] = ()
    probabilities: tuple[float, ...] | None = None
    clean_ranks: tuple[float, ...] = ()
    is_stranger: bool = False


def scored_rankings(rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]]) -> list[Scored]:
    """Rankings with the scores of their responses."""
    return [
        Scored(
            ranks=ranking.ranks,
            scores=tuple(values),
            lengths=tuple(len(row) - ranking.num_prompt for row in ranking.rows),
            prompt=content_id(str(ranking.rows[0][: ranking.num_prompt])) if ranking.num_prompt else "",
            responses=tuple(content_id(str(row)) for row in ranking.rows) if ranking.num_prompt else (),
            probabilities=ranking.probabilities,
            clean_ranks=tuple(ranking.meta.get("clean_ranks") or ()),
            is_stranger=bool(ranking.meta.get("is_stranger")),
        )
        for ranking, values in zip(rankings, scores, strict=True)
    ]


def write_scored(path: Path, parts: Mapping[str, Sequence[Scored]]) -> None:
    """Scored rankings as JSONL, each with the name of its part."""
    write_lines(path, (json_line({"part": part} | asdict(one)) for part, ones in parts.items() for one in ones))


def read_scored(path: Path) -> dict[str, list[Scored]]:
    """What `write_scored` wrote."""
    found: dict[str, list[Scored]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        part = row.pop("part")
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        found.setdefault(part, []).append(Scored(**row))
    return found


# ---------------------------------------------------------------- pairs


def differences(values: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """values[better] - values[worse] for every pair that the ranks decide."""
    return [values[i] - values[j] for i, j in decided(ranks)]


def opinions(scored: Sequence[Scored]) -> list[list[tuple[str, float]]]:
    """Of each ranking's decided pairs, in order: its class, and how right the given order is to those who judged it.

    The share that agrees with the given order is the soft label where the ranking has one, the clean ranks' word (1 or
    0) where it has those, and otherwise that of all rankings here of the same two responses to the same prompt. The
    second number is what knowing the majority would earn: 1 with it, 0 against it, a half where there is none, NaN where
    nobody else judged the pair.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for one in scored:
        votes.update(_names(one, *pair) for pair in decided(one.ranks) if one.responses)
    return [[_opinion(one, i, j, votes) for i, j in decided(one.ranks)] for one in scored]


def _names(one: Scored, i: int, j: int) -> tuple[str, str]:
    return one.responses[i], one.responses[j]


def _opinion(one: Scored, i: int, j: int, votes: Mapping[tuple[str, str], int]) -> tuple[str, float]:
    if one.clean_ranks:
        difference = one.clean_ranks[j] - one.clean_ranks[i]
        return "as_clean" if difference >= 0 else "against_clean", 0.5 + 0.5 * float(np.sign(difference))
    if one.probabilities and one.probabilities[i] + one.probabilities[j]:
        share = one.probabilities[i] / (one.probabilities[i] + one.probabilities[j])
    elif one.responses:
        with_it, against_it = votes[_names(one, i, j)], votes[_names(one, j, i)]
        if with_it + against_it == 1:
            return "one_opinion", float("nan")
        share = with_it / (with_it + against_it)
    else:
        return "one_opinion", float("nan")
    most = max(share, 1 - share)
    name = "unanimous" if most == 1 else "strong_majority" if most >= 0.75 else "weak_majority"
    return name if most > 0.5 else "split", 0.5 + 0.5 * float(np.sign(share - 0.5))


# ---------------------------------------------------------------- shares and their intervals


def counted(by_prompt: Sequence[Sequence[float]]) -> Shares:
    """Of each prompt the pairs with a positive difference (an exact 0 counts half), and all."""
    right = [float(sum((d > 0) + 0.5 * (d == 0) for d in ds)) for ds in by_prompt]
    return np.array(right), np.array([float(len(ds)) for ds in by_prompt])


def accuracy(by_prompt: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Share of pairs with a positive difference (an exact 0 counts half), with its interval."""
    return interval(counted(by_prompt))


# ---------------------------------------------------------------- calibration and length


def calibration(margins: Sequence[float], bins: int = CALIBRATION_BINS) -> list[dict[str, float]]:
    """The calibration curve: of each bin of stated confidence that has pairs, its mean, the share right, and how many.

    The confidence of a preference is that of the response it favours, sigmoid(|margin|); bins are equal from 0.5 to 1.
    """
    margin = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    parts = [which == b for b in range(bins) if (which == b).any()]
    return [
        {"stated": float(confidence[part].mean()), "right": float(right[part].mean()), "pairs": int(part.sum())}
        for part in parts
    ]


def calibration_error(curve: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error: the mean over pairs of how far their bin is off (Guo et al. 2017, eq. 3)."""
    total = sum(point["pairs"] for point in curve)
    return sum(point["pairs"] * abs(point["right"] - point["stated"]) for point in curve) / max(total, 1)


def length_correlation(scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]]) -> float:
    """Pearson correlation of score and length within rankings (their own means taken off); 0 if either is constant."""
    x = np.concatenate([np.asarray(v, dtype=np.float64) - np.mean(v) for v in lengths])
    y = np.concatenate([np.asarray(v, dtype=np.float64) - np.mean(v) for v in scores])
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 1e-12 else 0.0


# ---------------------------------------------------------------- all of it


def judge(scored: Sequence[Scored]) -> dict[str, Any]:
    """The figures of a report; what each means stands in docs/stages/reward.md.

    The length baseline is the better of "longer" and "shorter" on these very pairs, so it is rather too good than too bad.
    """
    prompts = _by_prompt(scored)
    ours, longer = _shares(prompts, "scores"), _shares(prompts, "lengths")
    prefers_longer = bool(longer[0].sum() >= longer[1].sum() / 2)
    lengths = longer if prefers_longer else _shares(prompts, "lengths", sign=-1.0)
    margins = [margin for one in scored for margin in differences(one.scores, one.ranks)]
    inside = np.clip(margins, -MARGIN_EDGE + 1e-6, MARGIN_EDGE - 1e-6)
    counts, edges = np.histogram(inside, bins=MARGIN_BINS, range=(-MARGIN_EDGE, MARGIN_EDGE))
    curve = calibration(margins)
    found: dict[str, Any] = {
        **_stated("accuracy_noisy", interval(ours)),
        **_stated("length_baseline", interval(lengths)),
        **_stated("above_length", interval(ours, lengths)),
        "baseline_prefers": "longer" if prefers_longer else "shorter",
        "length_correlation": length_correlation([one.scores for one in scored], [one.lengths for one in scored]),
        "calibration_error": calibration_error(curve),
        "calibration": curve,
        "margins": {"edges": edges.tolist(), "counts": counts.tolist()},
        "pairs": len(margins),
        "prompts": len(prompts),
        "by_agreement": by_agreement(scored),
    }
    if any(one.is_stranger for one in scored):
        parts = {name: [one for one in scored if one.is_stranger == (name == "held_out")] for name in ANNOTATORS}
        found["by_annotators"] = {name: _share(_by_prompt(part)) for name, part in parts.items()}
    if known := _by_prompt([one for one in scored if one.clean_ranks]):
        by_length = interval(_shares(known, "lengths", "clean_ranks"))[0]
        found |= {
            **_stated("accuracy_clean", interval(_shares(known, "scores", "clean_ranks"))),
            "length_baseline_clean": max(by_length, 1 - by_length),
            "noisy_ceiling": interval(_shares(known, "clean_ranks", sign=-1.0))[0],
        }
    return found


def judge_members(
    said: Sequence[Mapping[str, Sequence[Scored]]],
    reports: Sequence[Mapping[str, Any]],
    wanted: Ensemble,
    stated: str,
    judged: str,
) -> tuple[Ensemble, dict[str, Any]]:
    """How several members' scores become one normalised score, and the figures of that one.

    Args:
        said: of each member, part -> the same rankings with its scores.
        reports: of each member; `reward_scale` and `reward_centre` say how its scores are normalised.
        wanted: the ensemble, not yet normalised.
        stated: the part on whose responses the combined score gets mean 0 and deviation 1.
        judged: the part it is judged by.
    """
    scale_M, centre_M = (np.array([report[key] for report in reports])[:, None] for key in NORMAL)

    def normalised(part: str) -> NDArray[np.float64]:
        score_MR = np.array([[score for one in member[part] for score in one.scores] for member in said])
        return score_MR / scale_M - centre_M

    ensemble = wanted.normalised_on(torch.from_numpy(normalised(stated)))
    units = ensemble.scale * float(scale_M.mean())  # as near to the units of training as several models have them
    rest = iter((ensemble.combine(torch.from_numpy(normalised(judged))) * units).tolist())
    scored = [replace(one, scores=tuple(next(rest) for _ in one.scores)) for one in said[0][judged]]
    own = ("accuracy_noisy", "accuracy_noisy_interval", "accuracy_clean", "calibration_error", *NORMAL)
    return ensemble, {
        **judge(scored),
        "reward_scale": units,
        "reward_centre": 0.0,
        "ensemble": asdict(ensemble),
        "members": [{key: report[key] for key in own if key in report} for report in reports],
        "disagreement": disagreement(scored, normalised(judged)),
    }


def by_agreement(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Class of agreement -> accuracy with its interval, pairs, and the ceiling: what knowing the majority would reach."""
    margins: dict[str, dict[str, list[float]]] = {}
    known: dict[str, list[float]] = {}
    for number, (one, judged) in enumerate(zip(scored, opinions(scored), strict=True)):
        for margin, (name, right) in zip(differences(one.scores, one.ranks), judged, strict=True):
            prompt = one.prompt or f"ranking {number}"
            margins.setdefault(name, {}).setdefault(prompt, []).append(margin)
            known.setdefault(name, []).append(right)
    return {
        name: {
            "meaning": CLASSES[name],
            **_stated("accuracy", accuracy([*margins[name].values()])),
            "pairs": len(known[name]),
            "prompts": len(margins[name]),
            "ceiling": float(np.mean(known[name])),
        }
        for name in CLASSES
        if name in margins
    }


def disagreement(scored: Sequence[Scored], score_MR: NDArray[np.float64]) -> dict[str, float]:
    """How far the members of an ensemble differ: the mean over responses, and over pairs ordered rightly and wrongly.

    Args:
        scored: the rankings with their combined scores.
        score_MR: each member's normalised score of each of their responses, in that order.

    Returns:
        `scores`: mean standard deviation of a response's scores; `right`, `wrong`: of a pair's margin, among the pairs that
        the ensemble orders as ranked and the others. An ensemble that knows what it does not know differs more on the latter.
    """
    spread: dict[str, list[float]] = {"right": [], "wrong": []}
    first = 0
    for one in scored:
        for i, j in decided(one.ranks):
            margin_M = score_MR[:, first + i] - score_MR[:, first + j]
            spread["right" if one.scores[i] > one.scores[j] else "wrong"].append(float(margin_M.std()))
        first += len(one.ranks)
    return {"scores": float(score_MR.std(0).mean()), **{name: float(np.mean(s)) for name, s in spread.items() if s}}


def _by_prompt(scored: Sequence[Scored]) -> list[list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for number, one in enumerate(scored):
        groups.setdefault(one.prompt or f"ranking {number}", []).append(one)
    return [*groups.values()]


def _shares(prompts: Sequence[Sequence[Scored]], values: str, ranks: str = "ranks", sign: float = 1.0) -> Shares:
    """How often a judge by these values, the larger the better (sign -1: the smaller), orders as these ranks do."""
    return counted(
        [
            [sign * d for one in group for d in differences(getattr(one, values), getattr(one, ranks))]
            for group in prompts
        ]
    )


def _stated(name: str, share: tuple[float, float, float]) -> dict[str, Any]:
    return {name: share[0], f"{name}_interval": [share[1], share[2]]}


def _share(prompts: Sequence[Sequence[Scored]]) -> dict[str, Any]:
    shares = _shares(prompts, "scores")
    pairs = shares[1]
    return {**_stated("accuracy", interval(shares)), "pairs": int(pairs.sum()), "prompts": int((pairs > 0).sum())}
