"""Preferences into batches: rankings as pairs, ratings as good and bad responses, each prompt beside its responses.

All responses to one prompt stand in the same batch, each one row and one forward pass, however many pairs are made of
them; so nine ranked answers cost nine rows, not seventy-two. A response is its ids as they would have been generated,
its end token included; so an empty one is the end token alone, which says "say nothing" and is kept, and counted.

    found = encode_rankings(read_rankings(path), chat, context_length)      # or encode_ratings(read_ratings(path), ...)
    batch = collate(found.judged[:8], tokenizer.pad_id)

What cannot be learned from is left out, counted by reason and logged: rankings without any order (`all_ties`), rows beyond
the context (`too_long`: a ranking goes as a whole, nothing is cut), pairs whose two texts are the same (`equal_texts`:
their gradient is exactly zero), responses without a label (`unlabelled`).

Not here: the losses (`lyceum.train.preference`), and the reward model's batches (`lyceum.batches.pairs`).

Shapes: B responses of the whole batch, T time, P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyceum.batches.pack import pad
from lyceum.corpus.records import Ranking, Rating, content_id
from lyceum.errors import DataError
from lyceum.log import log
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer

STRANGER_TRIES = 64  # prompts whose response is tried behind another prompt before none is taken
PAIRS = ("all", "best_worst")

# ---------------------------------------------------------------- records as ids


@dataclass(frozen=True)
class Judged:
    """One prompt and its judged responses, as ids.

    Args:
        prompt: ends where the response begins.
        responses: each with its end token.
        pairs: (better, worse, probability that the better one really is), by the responses' numbers.
        best: the responses that none is better than; of one rated response (0,) if it is good, () if it is bad.
        stranger: the response to another prompt, read behind this one only to measure how far the policy has moved.
        reference: the reference's log-probability of each response, and last of the stranger if there is one.
        name: where it is from, for a person. origin: who judged: human, model or rule.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: tuple[tuple[int, int, float], ...] = ()
    best: tuple[int, ...] = ()
    stranger: list[int] = field(default_factory=list)
    reference: tuple[float, ...] = ()
    name: str = ""
    origin: str = "human"

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def num_tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(self.prompt) + len(response) for response in self.responses)

    def rows(self) -> list[list[int]]:
        """Prompt and response, for every response and for the stranger."""
        return [self.prompt + response for response in (*self.responses, *([self.stranger] if self.stranger else []))]


@dataclass(frozen=True)
class Encoded:
    """What there is to learn from, what was left out by reason, and how many of the kept responses are empty."""

    judged: list[Judged]
    left_out: dict[str, int] = field(default_factory=dict)
    num_empty: int = 0


def encode_rankings(rankings: Iterable[Ranking], chat: ChatFormat, context_length: int, pairs: str = "all") -> Encoded:
    """Rankings as prompts with pairs of responses.

    Args:
        rankings: read once.
        chat: the chat format.
        context_length: the longest row that fits, in tokens.
        pairs: ``all`` that the ranks decide, or only those of a best and a worst response.

    Raises:
        DataError: nothing is left.
    """
    kept: list[Judged] = []
    left_out: Counter[str] = Counter()
    num_all = 0
    for num_all, ranking in enumerate(rankings, 1):
        decided = decided_pairs(ranking, pairs)
        found = Judged(
            chat.prompt(ranking.prompt),
            [chat.reply(response).ids for response in ranking.responses],
            best=tuple(i for i, rank in enumerate(ranking.ranks) if rank == min(ranking.ranks)),
            name=f"ranking {num_all}",
            origin=ranking.origin,
        )
        differing = tuple(pair for pair in decided if found.responses[pair[0]] != found.responses[pair[1]])
        left_out["pairs_of_equal_texts"] += len(decided) - len(differing)
        if not decided:
            left_out["all_ties"] += 1
        elif found.width > context_length:
            left_out["too_long"] += 1
        elif not differing:
            left_out["equal_texts"] += 1
        else:
            kept.append(replace(found, pairs=differing))
    return _encoded(kept, left_out, num_all, "rankings", context_length)


def encode_ratings(
    ratings: Iterable[Rating | None], chat: ChatFormat, context_length: int, good_from: float = 0.5
) -> Encoded:
    """Single ratings as good and bad responses; None stands for a response without a label.

    Args:
        good_from: a rating of at least this is good.

    Raises:
        DataError: nothing is left.
    """
    kept: list[Judged] = []
    left_out: Counter[str] = Counter()
    num_all = 0
    for num_all, rating in enumerate(ratings, 1):
        if rating is None:
            left_out["unlabelled"] += 1
            continue
        best = (0,) if rating.value >= good_from else ()
        ids = chat.reply(rating.response).ids
        name = f"response {num_all}"
        found = Judged(chat.prompt(rating.prompt), [ids], best=best, name=name, origin=rating.origin)
        if found.width > context_length:
            left_out["too_long"] += 1
        else:
            kept.append(found)
    return _encoded(kept, left_out, num_all, "rated responses", context_length)


def _encoded(kept: list[Judged], left_out: Counter[str], num_all: int, noun: str, context_length: int) -> Encoded:
    reasons = {reason: count for reason, count in sorted(left_out.items()) if count}
    said = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items())
    if not kept:
        raise DataError(
            f"none of {num_all} {noun} can be learned from: {said or 'there are none'} (context {context_length} tokens)",
            hint="rank answers that differ, or raise model.context_length",
        )
    num_empty = sum(len(response) == 1 for judged in kept for response in judged.responses)
    if said:
        log.warning(f"of {num_all} {noun} left out: {said}")
    if num_empty:
        log.warning(f"{num_empty} responses are empty: kept, as the end token alone")
    return Encoded(kept, reasons, num_empty)


def decided_pairs(ranking: Ranking, pairs: str = "all") -> list[tuple[int, int, float]]:
    """(better, worse, probability) of every pair that the ranks decide, or of best and worst ones; ties make none.

    The probability is p_better / (p_better + p_worse) where the ranking says how probable it is that a response is the
    best (Luce 1959), else 1.
    """
    assert pairs in PAIRS
    ranks, probabilities = ranking.ranks, ranking.probabilities
    first, last = min(ranks), max(ranks)
    found = []
    for i, j in ((i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]):
        if pairs == "all" or (ranks[i] == first and ranks[j] == last):
            both = probabilities[i] + probabilities[j] if probabilities else 0.0
            found.append((i, j, probabilities[i] / both if probabilities and both else 1.0))
    return found


def ratings_of(rankings: Iterable[Ranking], pairs: str = "all") -> Iterator[Rating | None]:
    """Each response of rankings as a rating: 1 for good, 0 for bad, None for neither.

    Where a ranking says which responses are acceptable, that is it. Else a response is good if its rank is better than
    the mean rank of its prompt, bad if it is worse (``best_worst``: only the best and the worst ones). Of a pair the
    chosen one is good and the rejected one bad, as in Ethayarajh et al. 2024.
    """
    for ranking in rankings:
        ranks = ranking.ranks
        middle, first, last = sum(ranks) / len(ranks), min(ranks), max(ranks)
        for number, (response, rank) in enumerate(zip(ranking.responses, ranks, strict=True)):
            if ranking.acceptable is not None:
                value: float | None = float(ranking.acceptable[number])
            elif rank == middle or (pairs == "best_worst" and rank not in (first, last)):
                value = None
            else:
                value = float(rank < middle)
            yield None if value is None else Rating(ranking.prompt, response, value, origin=ranking.origin)


def add_strangers(judged: Sequence[Judged], context_length: int, seed: int) -> list[Judged]:
    """Gives every prompt the response to another prompt, where one fits behind it; a function of the seed.

    Who gets whose does not change while training, so that the reference's log-probability of it is computed once.
    """
    order = np.random.default_rng(seed).permutation(len(judged)).tolist()
    found = list(judged)
    for place, number in enumerate(order):
        own = judged[number]
        for step in range(1, min(len(order), STRANGER_TRIES + 1)):
            other = judged[order[(place + step) % len(order)]]
            if other.prompt != own.prompt and len(own.prompt) + len(other.responses[0]) <= context_length:
                found[number] = replace(own, stranger=other.responses[0])
                break
    missing = sum(not one.stranger for one in found)
    if missing:
        log.warning(f"{missing} of {len(found)} responses have no other prompt's response that fits: not in the KL")
    return found


def split_by_prompt(judged: Sequence[Judged], valid_share: float, seed: int) -> tuple[list[Judged], list[Judged]]:
    """Training and validation part; all that is judged of one prompt goes to the same side, whatever else there is."""

    def is_valid(one: Judged) -> bool:
        return int(content_id(f"{seed} {one.prompt}")[:8], 16) < valid_share * 16**8

    return [one for one in judged if not is_valid(one)], [one for one in judged if is_valid(one)]


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Sides:
    """Which rows of a batch were preferred to which.

    Of pairs: row better_P[p] to row worse_P[p], with probability_P that it really is better; the weights of a prompt's
    pairs add up to 1. Of single ratings: better_P are the good rows, worse_P the bad ones, and the rest is empty.
    """

    better_P: Tensor
    worse_P: Tensor
    weight_P: Tensor
    probability_P: Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """One or more prompts with their responses.

    Args:
        judged: what it was made of, in order.
        tokens_BT: prompt + response, padded on the right.
        starts_B, lengths_B: where the response begins; real tokens of the row.
        sides: who was preferred.
        best_B: True for rows that none of their prompt is better than.
        reference_B: the reference's log-probability of the response, float64; 0 where none was computed.
        pad_id: for its halves.
    """

    judged: tuple[Judged, ...]
    tokens_BT: Tensor
    starts_B: Tensor
    lengths_B: Tensor
    sides: Sides
    best_B: Tensor
    reference_B: Tensor
    pad_id: int

    @property
    def group_B(self) -> Tensor:
        """Which of the prompts each row answers."""
        return torch.repeat_interleave(torch.tensor([len(one.responses) for one in self.judged]))

    def halves(self) -> list[PreferenceBatch]:
        """The first and the second half of the prompts, each as wide as its longest row; one prompt stays whole."""
        middle = len(self.judged) // 2
        parts = (self.judged[:middle], self.judged[middle:]) if middle else (self.judged,)
        return [collate(part, self.pad_id) for part in parts]

    def strangers(self) -> PreferenceBatch | None:
        """The prompts with their strangers' responses, unjudged; None if there are none."""
        rows = [Judged(one.prompt, [one.stranger], reference=one.reference[-1:]) for one in self.judged if one.stranger]
        return collate(rows, self.pad_id) if rows else None

    def described(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The rows for a person: `row`, where it is from, and `text`."""
        return [
            {"row": f"{one.name}, response {number}", "text": tokenizer.decode(one.prompt + ids, keep_special=True)}
            for one in self.judged
            for number, ids in enumerate(one.responses, 1)
        ]


def collate(judged: Sequence[Judged], pad_id: int) -> PreferenceBatch:
    """Stack prompts with their responses into one batch, as wide as the longest row."""
    assert judged
    rows = [one.prompt + response for one in judged for response in one.responses]
    tokens_BT, lengths_B = pad(rows, pad_id)
    sizes = torch.tensor([len(one.responses) for one in judged])
    first = (sizes.cumsum(0) - sizes).tolist()
    pairs = [
        (start + i, start + j, 1.0 / len(one.pairs), probability)
        for start, one in zip(first, judged, strict=True)
        for i, j, probability in one.pairs
    ]
    best_B = torch.zeros(len(rows), dtype=torch.bool)
    best = [start + i for start, one in zip(first, judged, strict=True) for i in one.best]
    best_B[torch.tensor(best, dtype=torch.long)] = True
    if pairs:
        better, worse, weight, probability = zip(*pairs, strict=True)
        sides = Sides(torch.tensor(better), torch.tensor(worse), _double(weight), _double(probability))
    else:
        sides = Sides(best_B.nonzero().flatten(), (~best_B).nonzero().flatten(), _double(()), _double(()))
    known = [one.reference[: len(one.responses)] or (0.0,) * len(one.responses) for one in judged]
    return PreferenceBatch(
        judged=tuple(judged),
        tokens_BT=tokens_BT,
        starts_B=torch.repeat_interleave(torch.tensor([len(one.prompt) for one in judged]), sizes),
        lengths_B=lengths_B,
        sides=sides,
        best_B=best_B,
        reference_B=_double([value for values in known for value in values]),
        pad_id=pad_id,
    )


def _double(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def asked(judged: Iterable[Judged], count: int) -> list[Judged]:
    """The first `count` with prompts that differ."""
    distinct: dict[tuple[int, ...], Judged] = {}
    for one in judged:
        if len(distinct) == count:
            break
        distinct.setdefault(tuple(one.prompt), one)
    return list(distinct.values())
