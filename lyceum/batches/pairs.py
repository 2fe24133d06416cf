"""Rankings and prompts into batches: all responses to one prompt stand in the same batch.

The pairs of a ranking are correlated: spread over batches they are several passes over the same prompt, and the reward
model overfits at once (Ouyang et al. 2022, section 3.5). So one prompt with its K responses is one batch element, each
response one row and one forward pass: the prompt, the reply's ids as they would have been generated, its end token. The
score is read at the last real token.

    kept, held, _ = split_rankings(read_files([path]), 0.1, 0.0, seed)      # where a file is not split yet
    batches = ranking_batches(kept, chat, micro_tokens, seed=epoch)
    prompts = read_prompts(path, chat, context_length - max_response_tokens)

What cannot be learned from is left out and counted, nothing is cut: rankings without any order, with a row beyond the
context, or whose ordered responses are all the same text. An empty response is the end token alone: it is kept, and counted.

Not here: the losses (`lyceum.train.policy`), and which rank gets which batch.

Shapes: B responses of the whole batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyceum.batches.pack import bucket_groups, pad
from lyceum.corpus.records import Ranking, content_id, read_conversations, read_rankings
from lyceum.errors import DataError
from lyceum.log import log
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedRanking:
    """One ranking as ids: a row for each response, its rank, what else is known of it, its name for a person, how many
    tokens of each row are the prompt (0: not known), and who ranked: human, model or rule."""

    rows: list[list[int]]
    ranks: tuple[float, ...]
    probabilities: tuple[float, ...] | None
    meta: dict[str, Any]
    name: str = ""
    num_prompt: int = 0
    origin: str = "human"

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))

    @property
    def margin(self) -> float:
        """By how much a better response of it has to win, as the ranking itself says; 0 where it says nothing."""
        return float(self.meta.get("margin") or 0.0)


@dataclass(frozen=True)
class EncodedRankings:
    """What `encode_rankings` kept, and how many it left out: without any order, with a row that is too long, or with the
    same text for all responses that differ in rank; and how many of the kept responses are empty."""

    rankings: list[EncodedRanking]
    num_tied: int
    num_too_long: int
    num_equal: int = 0
    num_empty: int = 0

    def counts(self) -> dict[str, int]:
        """For a report."""
        left_out = {"all_ties": self.num_tied, "too_long": self.num_too_long, "equal_texts": self.num_equal}
        return {"kept": len(self.rankings), **left_out, "empty_responses": self.num_empty}


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


def read_files(paths: Sequence[Path | str]) -> list[Ranking]:
    """The rankings of several files, each named by its file and its number in it (`meta.row`).

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    return [
        replace(ranking, meta={**ranking.meta, "row": f"ranking {number} of {Path(path).name}"})
        for path in paths
        for number, ranking in enumerate(read_rankings(path), start=1)
    ]


def split_rankings(
    rankings: Sequence[Ranking], valid_share: float, stranger_share: float, seed: int
) -> tuple[list[Ranking], list[Ranking], int]:
    """Training and validation part: by prompt, and by annotator where rankings name one (`meta.annotator`).

    Conversations that the user opens with the same words are one prompt, whatever else is said. A share of the annotators are
    strangers to training (held-out labelers, Ouyang et al. 2022, section 3.5): all they ranked is for validation, with
    `meta.is_stranger`, and so is a prompt that only they ranked. What they ranked of a prompt that others ranked for
    training is left out, as else that prompt would be on both sides.

    Args:
        valid_share: share of the other prompts kept for validation.
        stranger_share: share of the annotators.

    Returns:
        The two parts, and how many rankings of strangers were left out.
    """

    def number(name: str) -> int:
        return int(content_id(f"{seed} {name}")[:8], 16)

    def opening(ranking: Ranking) -> str:
        messages = ranking.prompt.messages
        return next((message.content for message in messages if message.role == "user"), messages[-1].content)

    annotators = {str(ranking.meta["annotator"]) for ranking in rankings if ranking.meta.get("annotator") is not None}
    strangers = set(sorted(annotators, key=number)[: round(stranger_share * len(annotators))])
    openings = [opening(ranking) for ranking in rankings]
    theirs = [str(ranking.meta.get("annotator")) in strangers for ranking in rankings]
    known = {name for name, is_theirs in zip(openings, theirs, strict=True) if not is_theirs}
    train: list[Ranking] = []
    valid: list[Ranking] = []
    num_left_out = 0
    for ranking, name, is_theirs in zip(rankings, openings, theirs, strict=True):
        for_valid = name not in known or number(name) < valid_share * 16**8
        if is_theirs and not for_valid:
            num_left_out += 1
        elif is_theirs:
            valid.append(replace(ranking, meta={**ranking.meta, "is_stranger": True}))
        else:
            (valid if for_valid else train).append(ranking)
    return train, valid, num_left_out


def encode_rankings(
    rankings: Iterable[Ranking],
    chat: ChatFormat,
    context_length: int | None = None,
    *,
    ties: bool = False,
    path: Path | str | None = None,
) -> EncodedRankings:
    """Rankings as ids; one whose ranks all tie says nothing, one with a row beyond the context is not cut: both go.

    Args:
        rankings: read once; their names count them, from 1, unless `meta.row` names them.
        chat: the chat format.
        context_length: the longest row that fits, in tokens; None: any.
        ties: whether a tie is something to learn from.
        path: of the file they are from, for errors.

    Raises:
        DataError: nothing is left, or a margin is no number of at least 0.
    """
    kept: list[EncodedRanking] = []
    num_tied = num_too_long = num_equal = num_empty = num_all = 0
    for num_all, ranking in enumerate(rankings, start=1):
        name = str(ranking.meta.get("row") or f"ranking {num_all} of rankings")
        if len(set(ranking.ranks)) < 2 and not ties:
            num_tied += 1
            continue
        prompt = chat.prompt(ranking.prompt)
        replies = [chat.reply(response).ids for response in ranking.responses]
        rows = [prompt + reply for reply in replies]
        more = ranking.meta, name, len(prompt), ranking.origin
        encoded = EncodedRanking(rows, ranking.ranks, ranking.probabilities, *more)
        _check_margin(ranking.meta.get("margin"), name, path)
        if context_length is not None and encoded.width > context_length:
            num_too_long += 1
        elif _says_nothing(replies, ranking.ranks, ties):
            num_equal += 1
        else:
            kept.append(encoded)
            num_empty += sum(len(reply) == 1 for reply in replies)
    said = f"{num_tied} are all ties, {num_too_long} have a response beyond the context of {context_length} tokens"
    said += f", {num_equal} differ in nothing but their ranks"
    if not kept:
        raise DataError(
            f"none of {num_all} rankings can be learned from: {said}",
            file=path,
            hint="rank more answers, or raise model.context_length",
        )
    if len(kept) < num_all:
        log.warning(f"of {num_all} rankings {said}: left out")
    if num_empty:
        log.warning(f"{num_empty} responses are empty: kept, as the end token alone")
    return EncodedRankings(kept, num_tied, num_too_long, num_equal, num_empty)


def _says_nothing(replies: Sequence[list[int]], ranks: Sequence[float], ties: bool) -> bool:
    """Whether all responses between which there is something to learn are the same: their gradient is exactly 0."""
    pairs = ((i, j) for i in range(len(ranks)) for j in range(i) if ties or ranks[i] != ranks[j])
    return all(replies[i] == replies[j] for i, j in pairs)


def _check_margin(margin: Any, name: str, path: Path | str | None) -> None:
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool) and math.isfinite(margin)
    if margin is not None and not (is_number and margin >= 0):
        raise DataError(f"{name} has the margin {margin!r}", file=path, hint="a margin is a number of at least 0")


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
