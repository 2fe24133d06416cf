"""Rankings and prompts into batches: all responses to one prompt stand in the same batch.

The pairs of a ranking are correlated: spread over batches they are several passes over the same prompt, and the reward
model overfits at once (Ouyang et al. 2022, section 3.5). So one prompt with its K responses is one batch element, each
response one row and one forward pass: the prompt, the reply's ids as they would have been generated, its end token. The
score is read at the last real token.

    batches = ranking_batches(read_rankings(path), chat, micro_tokens, seed=epoch)
    prompts = read_prompts(path, chat, context_length - max_response_tokens)

Not here: the losses (`lyceum.train.policy`), and which rank gets which batch.

Shapes: B responses of the whole batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyceum.batches.pack import bucket_groups, pad
from lyceum.corpus.records import Ranking, read_conversations
from lyceum.errors import DataError
from lyceum.log import log
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedRanking:
    """One ranking as ids: a row for each response, its rank, what else is known of it, and its name for a person."""

    rows: list[list[int]]
    ranks: tuple[float, ...]
    probabilities: tuple[float, ...] | None
    meta: dict[str, Any]
    name: str = ""

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


@dataclass(frozen=True)
class EncodedRankings:
    """What `encode_rankings` kept, and how many it left out: without any order, or with a row that is too long."""

    rankings: list[EncodedRanking]
    num_tied: int
    num_too_long: int


@dataclass(frozen=True)
class RankingBatch:
    """The responses to one or more prompts.

    Args:
        tokens_BT: prompt + response + end of turn, padded on the right.
        lengths_B: real tokens of each row; the score stands at ``lengths_B - 1``.
        group_B: which of the batch's prompts a row belongs to, counted from 0, in order.
        ranks_B: 1 is best, ties allowed.
        probabilities_B: the probability that a response is the best of its group; NaN where its ranking has none, and
            None if no ranking of the batch has any.
        meta: of each prompt's ranking.
        names: of each prompt's ranking, for a person who wants to look at it.
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    group_B: Tensor
    ranks_B: Tensor
    probabilities_B: Tensor | None
    meta: list[dict[str, Any]]
    names: tuple[str, ...] = ()

    @property
    def num_groups(self) -> int:
        """Prompts."""
        return len(self.meta)

    @property
    def num_tokens(self) -> int:
        """Real tokens, pads not counted."""
        return int(self.lengths_B.sum())

    def described(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The rows for a person: `row`, the ranking and which of its responses, `rank`, 1 being best, and `text`; none if the
        rankings have no names."""
        found: list[dict[str, Any]] = []
        groups, lengths = self.group_B.tolist() if self.names else [], self.lengths_B.tolist()
        for row, (group, length, rank) in enumerate(zip(groups, lengths, self.ranks_B.tolist(), strict=False)):
            name = f"{self.names[group]}, response {row - groups.index(group) + 1}"
            text = tokenizer.decode(self.tokens_BT[row, :length].tolist(), keep_special=True)
            found.append({"row": name, "rank": rank, "text": text})
        return found

    def halves(self) -> list[RankingBatch]:
        """The first and the second half of the prompts, each as wide as its longest row; one prompt stays whole."""
        middle = self.num_groups // 2
        if not middle:
            return [self]
        row = int((self.group_B < middle).sum())
        return [self._part(slice(0, row), slice(0, middle)), self._part(slice(row, None), slice(middle, None))]

    def _part(self, rows: slice, groups: slice) -> RankingBatch:
        width = int(self.lengths_B[rows].max())
        return RankingBatch(
            self.tokens_BT[rows, :width],
            self.lengths_B[rows],
            self.group_B[rows] - (groups.start or 0),
            self.ranks_B[rows],
            None if self.probabilities_B is None else self.probabilities_B[rows],
            self.meta[groups],
            self.names[groups],
        )


def encode_rankings(
    rankings: Iterable[Ranking], chat: ChatFormat, context_length: int | None = None
) -> EncodedRankings:
    """Rankings as ids; one whose ranks all tie says nothing, one with a row beyond the context is not cut: both go.

    Args:
        rankings: read once; their names count them, from 1.
        chat: the chat format.
        context_length: the longest row that fits, in tokens; None: any.

    Raises:
        DataError: nothing is left.
    """
    kept: list[EncodedRanking] = []
    num_tied = num_too_long = 0
    for number, ranking in enumerate(rankings, start=1):
        if len(set(ranking.ranks)) < 2:
            num_tied += 1
            continue
        prompt = chat.prompt(ranking.prompt)
        rows = [prompt + chat.reply(response).ids for response in ranking.responses]
        name = f"ranking {number} of rankings"
        encoded = EncodedRanking(rows, ranking.ranks, ranking.probabilities, ranking.meta, name)
        if context_length is not None and encoded.width > context_length:
            num_too_long += 1
        else:
            kept.append(encoded)
    num_all = len(kept) + num_tied + num_too_long
    if num_tied or num_too_long:
        log.warning(f"of {num_all} rankings {num_tied} are all ties, {num_too_long} too long for the context: left out")
    if not kept:
        raise DataError(
            f"none of {num_all} rankings can be learned from: {num_tied} are all ties, "
            f"{num_too_long} have a response beyond the context of {context_length} tokens",
            hint="rank more answers, or raise model.context_length",
        )
    return EncodedRankings(kept, num_tied, num_too_long)


def ranking_batches(
    rankings: Iterable[Ranking] | EncodedRankings,
    chat: ChatFormat,
    max_tokens: int,
    seed: int,
    context_length: int | None = None,
) -> list[RankingBatch]:
    """Batches of rankings with rows of similar length, in an order that the seed decides; each ranking once.

    Args:
        rankings: the rankings, or what `encode_rankings` made of them (to encode once for many epochs).
        chat: the chat format.
        max_tokens: tokens of one batch, pads included.
        seed: of the order; another one for each epoch.
        context_length: longer rows are left out, with their rankings.

    Raises:
        DataError: nothing is left.
        ConfigError: the responses to one prompt alone need more than `max_tokens`.
    """
    if not isinstance(rankings, EncodedRankings):
        rankings = encode_rankings(rankings, chat, context_length)
    encoded = rankings.rankings
    widths, sizes = [ranking.width for ranking in encoded], [len(ranking.rows) for ranking in encoded]
    groups = bucket_groups(widths, sizes, max_tokens, seed)
    return [_ranking_batch([encoded[number] for number in group], chat.tokenizer.pad_id) for group in groups]


def _ranking_batch(rankings: Sequence[EncodedRanking], pad_id: int) -> RankingBatch:
    tokens_BT, lengths_B = pad([row for ranking in rankings for row in ranking.rows], pad_id)
    sizes = torch.tensor([len(ranking.rows) for ranking in rankings])
    probabilities_B = None
    if any(ranking.probabilities is not None for ranking in rankings):
        unknown = float("nan")
        probabilities_B = torch.tensor(
            [p for ranking in rankings for p in ranking.probabilities or [unknown] * len(ranking.rows)]
        )
    return RankingBatch(
        tokens_BT,
        lengths_B,
        torch.repeat_interleave(torch.arange(len(rankings)), sizes),
        torch.tensor([rank for ranking in rankings for rank in ranking.ranks], dtype=torch.float32),
        probabilities_B,
        [ranking.meta for ranking in rankings],
        tuple(ranking.name for ranking in rankings),
    )


@dataclass(frozen=True)
class Prompts:
    """Prompts for rollouts: their ids, which end where the reply begins, and what their records say.

    `num_too_long` were left out: a prompt is never cut.
    """

    ids: list[list[int]]
    meta: list[dict[str, Any]]
    num_too_long: int = 0


def read_prompts(path: Path | str, chat: ChatFormat, max_tokens: int) -> Prompts:
    """The prompts of a file of conversations, each asking for the assistant's next message.

    Args:
        path: conversations.
        chat: the chat format.
        max_tokens: the longest prompt that fits: the context without the reply.

    Raises:
        DataError: the file cannot be read, or no prompt fits.
    """
    kept: list[tuple[list[int], dict[str, Any]]] = []
    num_too_long = shortest = 0
    for conversation in read_conversations(path):
        ids = chat.prompt(conversation)
        shortest = min(shortest or len(ids), len(ids))
        if len(ids) <= max_tokens:
            kept.append((ids, conversation.meta))
        else:
            num_too_long += 1
    if not kept:
        found = f"the shortest of {num_too_long} has {shortest}" if num_too_long else "the file is empty"
        raise DataError(
            f"no prompt of at most {max_tokens} tokens: {found}",
            file=path,
            hint="raise model.context_length, or lower the length of the replies",
        )
    if num_too_long:
        log.warning(f"{num_too_long} prompts are longer than {max_tokens} tokens and left out")
    return Prompts([ids for ids, _ in kept], [meta for _, meta in kept], num_too_long)
