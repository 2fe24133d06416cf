"""Measures that every evaluation shares: word overlap of two texts, shares with bootstrap intervals, best-of-n's KL.

Nothing here knows a benchmark or a model; inputs are texts and numbers. Intervals are percentile bootstrap intervals over
prompts (Efron & Tibshirani 1993, chapter 13): they say how far a figure would move with other prompts of the same kind, not
with another training run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Shares = tuple[NDArray[np.float64], NDArray[np.float64]]  # of each prompt: pairs that are right, pairs

_WORD = re.compile(r"[A-Za-z0-9_]+")


def words(text: str) -> list[str]:
    """Lower-case words of a text: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall of `answer` against `reference` (SQuAD's F1, Rajpurkar et al. 2016, 6.1).

    Articles are kept. Two empty texts agree (1.0); an empty one against a non-empty one scores 0.
    """
    said, wanted = Counter(words(answer)), Counter(words(reference))
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((said & wanted).values())
    if not shared:
        return 0.0
    precision, recall = shared / sum(said.values()), shared / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


def mean_interval(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval: (mean, low, high); three NaN for no values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return (float("nan"),) * 3
    draws = np.random.default_rng(seed).integers(0, array.size, (samples, array.size))
    low, high = np.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def seeds_interval(
    by_seed: Sequence[Mapping[str, float]], *, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over several training runs with a 95 % bootstrap interval over prompts and runs.

    `by_seed[s][prompt]` is the value of one prompt under run s. Each replicate draws runs with replacement and prompts with
    replacement; the same drawn prompts are read in every drawn run, so the pairing of prompts is kept. Pass differences
    (B minus A per prompt) to compare two models.
    """
    prompts = sorted(set.intersection(*(set(values) for values in by_seed)))
    table = np.array([[values[prompt] for prompt in prompts] for values in by_seed], dtype=np.float64)
    if table.size == 0:
        return (float("nan"),) * 3
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        runs = random.integers(0, table.shape[0], table.shape[0])
        columns = random.integers(0, table.shape[1], table.shape[1])
        means[i] = table[np.ix_(runs, columns)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)


def decided(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) of every pair that the ranks decide; ties make none."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def interval(shares: Shares, other: Shares | None = None, *, samples: int = 1000) -> tuple[float, float, float]:
    """Share of right pairs, less that of another judge of the same pairs if one is given, with its bootstrap interval.

    Returns:
        (share, low, high); NaN without any pair.
    """
    (right, pairs), wrong = shares, other[0] if other is not None else np.zeros_like(shares[0])
    if pairs.sum() == 0:
        return (float("nan"),) * 3
    draws = np.random.default_rng(0).integers(0, len(pairs), (samples, len(pairs)))
    drawn = (right - wrong)[draws].sum(1) / np.maximum(pairs[draws].sum(1), 1.0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float((right - wrong).sum() / pairs.sum()), float(low), float(high)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling from its base, in nats: log n - (n - 1) / n, an upper bound when scores can tie.

    Source: Stiennon et al. 2020; Beirami et al. 2024 on when it is a bound.
    """
    assert n >= 1
    return math.log(n) - (n - 1) / n
