"""Which row comes when: row k of a run is a pure function of k and the seed, and so is every batch.

The arithmetic is `lyceum.corpus.mixture`: parts by weight, every row of a part once an epoch, in a keyed order. What
follows from it: a run is resumed by one integer, and rows a ... b are the same ones whether one rank takes them, or
four ranks a quarter each.

    stream = Stream(shards.parts, {"docs": 1.0, "code": 1.0}, seed)
    batch = token_batch(shards, stream, start=step * rows_per_step, count=rows_per_step)

Not here: what is in a row (`lyceum.batches.shards`), and conversations (`lyceum.batches.pack`).

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyceum.batches.infill import Infill
from lyceum.batches.pack import TokenBatch
from lyceum.batches.shards import Shards
from lyceum.corpus.mixture import Mixture


class Stream:
    """An endless stream of rows from weighted parts, addressed by row number.

    Args:
        rows: part -> number of its rows, such as `Shards.parts`.
        weights: part -> its weight in the mixture, on any scale; a part that is not named never comes.
        seed: another seed, another order.

    Raises:
        DataError: no part has a weight, or one with a weight has no rows.
    """

    def __init__(self, rows: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        self._mixture = Mixture(rows, weights, seed)

    def at(self, k: int) -> tuple[str, int]:
        """The part and the row in it that come as number k, counted from 0."""
        place = self._mixture.at(k)
        return place.source, place.index

    def epochs(self, n: int) -> dict[str, float]:
        """How many times the first n rows go through each part."""
        return self._mixture.epochs(n)


def token_batch(shards: Shards, stream: Stream, start: int, count: int, infill: Infill | None = None) -> TokenBatch:
    """Rows start ... start + count - 1 of the stream; every token but a row's first is a target of weight 1.

    Args:
        shards: the rows.
        stream: their order, over the parts of `shards`.
        start: the first row's number. A rank asks for its own piece of a step's rows.
        count: rows, at least 1.
        infill: rewrites the rows, so that some documents have their middle last.

    Returns:
        A batch of `count` rows of ``shards.row_tokens + 1`` tokens; there are pads only at the end of rows that `infill`
        has made shorter.
    """
    places = [stream.at(k) for k in range(start, start + count)]
    rows = [shards.row(*place) for place in places]
    if infill is not None:
        rows = [infill.row(row, place[0], start + i) for i, (row, place) in enumerate(zip(rows, places, strict=True))]
    tokens_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
    weights_BT = torch.ones(tokens_BT.shape, dtype=torch.float32)
    weights_BT[:, 0] = 0.0
    lengths_B = torch.full((count,), tokens_BT.shape[1], dtype=torch.int64)
    if infill is not None:
        is_real_BT = tokens_BT != infill.tokenizer.pad_id
        weights_BT, lengths_B = weights_BT * is_real_BT, is_real_BT.sum(1)
    return TokenBatch(tokens_BT, weights_BT, lengths_B, tuple(f"{part} row {index}" for part, index in places))
