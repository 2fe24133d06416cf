"""Whole conversations into batches: drop or cut what is too long, group by length, pad.

A row holds one conversation, padded on the right: attention stays plainly causal with no mask, since nothing real comes
after a pad. Rows of similar length stand together, so that few pads are computed. Every conversation that fits is in
exactly one group of an epoch; another seed gives other groups in another order.

    fitted = fit(map(chat.render, conversations), context_length)
    for rows in bucket([len(row) for row in fitted.rendered], micro_tokens, seed=epoch):
        batch = collate([fitted.rendered[row] for row in rows], tokenizer.pad_id)

Not here: several conversations in one row (on a CPU the mask costs more than the pads), and pretraining rows, which are
cut from a stream of tokens (`lyceum.batches.shards`).

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyceum.errors import ConfigError, DataError
from lyceum.log import log
from lyceum.tokens.chat import Rendered
from lyceum.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows of tokens, and how much each counts in the loss.

    Args:
        tokens_BT: ids, padded on the right with the pad id.
        weights_BT: loss weight of each token *as a target*, predicted from those before it; column 0 and pads are 0.
        lengths_B: real tokens of each row.
        names: where each row is from, for a person who wants to look at it; may be empty.
        seeds: of each row's noise, where its embeddings get some; may be empty.
    """

    tokens_BT: Tensor
    weights_BT: Tensor
    lengths_B: Tensor
    names: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def num_targets(self) -> float:
        """The sum of all loss weights: what a sum of losses is divided by."""
        return float(self.weights_BT.sum(dtype=torch.float64))

    @property
    def num_tokens(self) -> int:
        """Real tokens, pads not counted."""
        return int(self.lengths_B.sum())

    def described(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The rows for a person: `row`, where it is from, and `text`; none if the rows have no names."""
        lengths = self.lengths_B.tolist() if self.names else []
        texts = [tokenizer.decode(self.tokens_BT[row, :n].tolist(), keep_special=True) for row, n in enumerate(lengths)]
        return [{"row": name, "text": text} for name, text in zip(self.names, texts, strict=True)]

    def halves(self) -> list[TokenBatch]:
        """The first and the second half of the rows, each as wide as its longest; one row stays whole."""
        middle = len(self.lengths_B) // 2
        parts = (slice(0, middle), slice(middle, None)) if middle else (slice(None),)
        widths = [int(self.lengths_B[part].max()) for part in parts]
        return [
            TokenBatch(
                self.tokens_BT[part, :width],
                self.weights_BT[part, :width],
                self.lengths_B[part],
                self.names[part],
                self.seeds[part],
            )
            for part, width in zip(parts, widths, strict=True)
        ]


@dataclass(frozen=True)
class Fitted:
    """What `fit` kept, and what it did to the rest.

    Args:
        rendered: conversations of at most the asked length, each with something to learn.
        kept: the number, in the order given, of each of them.
        num_dropped: conversations that were too long and left out.
        num_cut: conversations that were too long and lost their end.
        num_without_targets: conversations in which no token has a loss weight (or none is left after the cut).
    """

    rendered: list[Rendered]
    kept: list[int]
    num_dropped: int = 0
    num_cut: int = 0
    num_without_targets: int = 0


def fit(rendered: Iterable[Rendered], max_tokens: int, too_long: str = "drop") -> Fitted:
    """Keep what can be learned from in a context of `max_tokens`; what was left out is counted and logged.

    Args:
        rendered: conversations as ids and loss weights.
        max_tokens: tokens that fit, usually the model's context length.
        too_long: ``drop`` a conversation that is longer, or ``cut`` off what stands beyond.

    Raises:
        DataError: nothing is left.
    """
    assert too_long in ("drop", "cut")
    kept: list[Rendered] = []
    numbers: list[int] = []
    num_dropped = num_cut = num_without = num_all = 0
    shortest = 0
    for number, row in enumerate(rendered):
        num_all, shortest = number + 1, min(shortest or len(row), len(row))
        if len(row) > max_tokens and too_long == "drop":
            num_dropped += 1
            continue
        if len(row) > max_tokens:
            row, num_cut = Rendered(row.ids[:max_tokens], row.weights[:max_tokens]), num_cut + 1
        if any(row.weights[1:]):
            kept.append(row)
            numbers.append(number)
        else:
            num_without += 1
    if num_dropped or num_cut or num_without:
        log.warning(
            f"of {num_all} conversations {num_dropped} are longer than {max_tokens} tokens and left out, "
            f"{num_cut} cut, {num_without} left out because no token of theirs is learned"
        )
    if not kept:
        raise DataError(
            f"none of {num_all} conversations can be learned from: the shortest has {shortest} tokens, "
            f"the context {max_tokens}, and {num_without} have no loss weight",
            hint="raise model.context_length, shorten the conversations, or look whether they have assistant messages",
        )
    return Fitted(kept, numbers, num_dropped, num_cut, num_without)


def bucket(lengths: Sequence[int], max_tokens: int, seed: int) -> list[list[int]]:
    """Group rows of similar length, so that rows x longest row is at most `max_tokens` in each group.

    Args:
        lengths: tokens of each row.
        max_tokens: tokens of one padded group, pads included.
        seed: decides the order of the groups, and which of several equally long rows stand together.

    Returns:
        Row numbers; every row stands in exactly one group.

    Raises:
        ConfigError: one row alone is longer than `max_tokens`.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if not len(lengths_N):
        return []
    check_room(int(lengths_N.max()), max_tokens)
    generator = np.random.default_rng(seed)
    shuffled_N = generator.permutation(len(lengths_N))
    order_N = shuffled_N[np.argsort(-lengths_N[shuffled_N], kind="stable")]  # longest first, equals in random order
    groups, start = [], 0
    while start < len(order_N):
        stop = start + max_tokens // max(int(lengths_N[order_N[start]]), 1)
        groups.append(order_N[start:stop].tolist())
        start = stop
    return [groups[number] for number in generator.permutation(len(groups))]


def bucket_groups(widths: Sequence[int], sizes: Sequence[int], max_tokens: int, seed: int) -> list[list[int]]:
    """As `bucket`, where item i has sizes[i] rows of at most widths[i] tokens that must stand together.

    Raises:
        ConfigError: one item alone needs more than `max_tokens`.
    """
    check_room(max(width * size for width, size in zip(widths, sizes, strict=True)), max_tokens)
    generator = np.random.default_rng(seed)
    order = sorted(generator.permutation(len(widths)).tolist(), key=lambda number: -widths[number])
    groups: list[list[int]] = []
    room = 0  # rows that the last group, as wide as its first item, can still take
    for number in order:
        if sizes[number] > room:
            groups.append([])
            room = max_tokens // widths[number]
        groups[-1].append(number)
        room -= sizes[number]
    return [groups[number] for number in generator.permutation(len(groups))]


def bucket_alike(lengths: Sequence[int], groups: Sequence[int], max_tokens: int, seed: int) -> list[list[int]]:
    """As `bucket`, where the rows of one group stand together, as many as there is room for.

    Args:
        groups: the group of each row: which prompt it answers.

    Raises:
        ConfigError: one row alone is longer than `max_tokens`.
    """
    check_room(max(lengths, default=0), max_tokens)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    parts: list[list[int]] = []
    for rows in members.values():
        room = max_tokens // max(lengths[row] for row in rows)
        parts += [rows[start : start + room] for start in range(0, len(rows), room)]
    widths = [max(lengths[row] for row in part) for part in parts]
    found = bucket_groups(widths, [len(part) for part in parts], max_tokens, seed) if parts else []
    return [[row for part in group for row in parts[part]] for group in found]


def check_room(longest: int, max_tokens: int) -> None:
    """Refuse a micro-batch that is smaller than what must stand in one of them together."""
    if longest > max_tokens:
        raise ConfigError(
            f"{longest} tokens must be in one micro-batch, which has room for {max_tokens}",
            hint=f"set micro_tokens to {longest} or more, or model.context_length lower",
        )


def collate(
    rendered: Sequence[Rendered], pad_id: int, names: Iterable[str] = (), seeds: Iterable[int] = ()
) -> TokenBatch:
    """Stack conversations into one batch, as wide as the longest of them.

    Args:
        rendered: at least one conversation.
        pad_id: the id that fills the rest of a row; its loss weight is 0.
        names: where each is from.
        seeds: of each row's noise.
    """
    assert rendered
    tokens_BT, lengths_B = pad([row.ids for row in rendered], pad_id)
    weights_BT = torch.zeros(tokens_BT.shape, dtype=torch.float32)
    num_weights = int(lengths_B.sum())
    flat_N = np.fromiter(chain.from_iterable(row.weights for row in rendered), np.float32, num_weights)
    weights_BT[_is_real(lengths_B, tokens_BT.shape[1])] = torch.from_numpy(flat_N)
    weights_BT[:, 0] = 0.0  # nothing predicts the first token
    return TokenBatch(tokens_BT, weights_BT, lengths_B, tuple(names), tuple(seeds))


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on the right.

    Returns:
        tokens_BT and lengths_B.
    """
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = int(lengths_B.max())
    tokens_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    flat_N = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths_B.sum()))
    tokens_BT[_is_real(lengths_B, width)] = torch.from_numpy(flat_N)
    return tokens_BT, lengths_B


def _is_real(lengths_B: Tensor, width: int) -> Tensor:
    return torch.arange(width) < lengths_B[:, None]
