"""Rows that begin alike: what they share goes through the model once, and what each has of its own behind it.

Why: the responses to one prompt (a ranking, a pair, a group of replies) are rows with the same beginning. Read as rows,
a prompt is computed as often as it has responses; nine ranked responses as long as their prompt are 18 parts, of which
10 differ. Here each beginning is one row of a pass and each end another, which sees its own beginning's keys and values.
Gradients flow through both, so it is the same mathematics, up to rounding.

    branches = Branches.of(tokens_BT, lengths_B, group_B)            # None where nothing is gained
    hidden_ND = read(model, tokens_BT, at_N, branches)               # as model(tokens_BT, at_N=at_N)

Shapes: B rows, T positions of the longest, G beginnings, P positions of the longest beginning, S of the longest end, N
positions picked out of (B, T), M tokens of the pass, D width, K key/value heads, E head width.
What it is not: a cache; nothing outlives the pass, and `lyceum.engine` shares prompts by its own means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lyceum.model.attention import Reach

MIN_SAVED = 0.1  # of the tokens: below that the copies and the mask eat what is saved


class Branches:
    """The tokens of one pass, and what each may look at: `lyceum.model.attention.KeyValueCache`.

    Args:
        tokens_BT: right-padded rows. lengths_B: their real tokens.
        starts_B: where a row's own part begins, before its end; up to there all rows of its group have the same tokens.
        group_B: a number for each group.
    """

    is_kept = False

    def __init__(self, tokens_BT: Tensor, lengths_B: Tensor, starts_B: Tensor, group_B: Tensor) -> None:
        device, (num_rows, width) = tokens_BT.device, tokens_BT.shape
        _, owner_B = group_B.unique(return_inverse=True)
        num_groups = int(owner_B.max()) + 1
        first_G = torch.empty(num_groups, dtype=torch.long, device=device)
        first_G[owner_B] = torch.arange(num_rows, device=device)  # any row of a group has its beginning
        shared, own = int(starts_B.max()), int((lengths_B - starts_B).max())
        own_BS = torch.minimum(starts_B[:, None] + torch.arange(own, device=device), lengths_B[:, None] - 1)
        shared_GP = torch.arange(shared, device=device).expand(num_groups, shared)
        parts = tokens_BT[first_G, :shared], tokens_BT.gather(1, own_BS)
        self.tokens_1M = torch.cat([part.flatten() for part in parts])[None]
        self._positions_1M = torch.cat((shared_GP.flatten(), own_BS.flatten()))[None]
        self._width, self._starts_B, self._owner_B = width, starts_B, owner_B
        self._num_rows, self._num_groups, self._shared, self._own = num_rows, num_groups, shared, own
        self._masks: dict[torch.dtype, Tensor] = {}

    @classmethod
    def of(cls, tokens_BT: Tensor, lengths_B: Tensor, group_B: Tensor) -> Branches | None:
        """The branches of right-padded rows, or None where the rows of a group share too little."""
        starts_B = beginnings(tokens_BT, lengths_B, group_B)
        num_groups, shared = int(group_B.unique().numel()), int(starts_B.max())
        num_tokens = num_groups * shared + len(tokens_BT) * int((lengths_B - starts_B).max())
        if shared == 0 or num_tokens > (1 - MIN_SAVED) * tokens_BT.numel():
            return None
        return cls(tokens_BT, lengths_B, starts_B, group_B)

    def at(self, at_N: Tensor) -> Tensor:
        """Where in the pass the positions b T + t of the rows are."""
        row_N, place_N = at_N // self._width, at_N % self._width
        start_N = self._starts_B[row_N]
        own_N = self._num_groups * self._shared + row_N * self._own + place_N - start_N
        return torch.where(place_N < start_N, self._owner_B[row_N] * self._shared + place_N, own_N)

    def positions(self, num_new: int) -> Tensor:
        """Positions (1, M) of the tokens in their rows."""
        return self._positions_1M

    def append(self, layer: int, kv_N2KE: Tensor) -> Iterator[Reach]:
        """First the beginnings, each causal; then the ends, which also see their beginning."""
        num_shared = self._num_groups * self._shared
        k_GKPE, v_GKPE = _rows(kv_N2KE[:num_shared], self._num_groups)
        yield Reach(self._num_groups, self._shared, k_GKPE, v_GKPE, None, True)
        pairs = zip((k_GKPE, v_GKPE), _rows(kv_N2KE[num_shared:], self._num_rows), strict=True)
        k, v = (torch.cat((before.index_select(0, self._owner_B), own), dim=2) for before, own in pairs)
        yield Reach(self._num_rows, self._own, k, v, self._mask(kv_N2KE))

    def _mask(self, like: Tensor) -> Tensor:
        """(B or 1, 1, S, P + S): 0 on a row's beginning and on its own tokens so far, minus infinity elsewhere."""
        if like.dtype not in self._masks:
            before = torch.arange(self._shared, device=like.device) >= self._starts_B[:, None]
            if not bool(before.any()):
                before = before[:1]  # beginnings of one length: one mask for all rows
            own = torch.ones(self._own, self._own, dtype=torch.bool, device=like.device).triu_(1)
            hidden = torch.cat((before[:, None].expand(-1, self._own, -1), own.expand(len(before), -1, -1)), dim=2)
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._masks[like.dtype] = mask[:, None].expand(self._num_rows, -1, -1, -1)
        return self._masks[like.dtype]


def beginnings(tokens_BT: Tensor, lengths_B: Tensor, group_B: Tensor) -> Tensor:
    """How many tokens each row has in common with all others of its group, never its last; if it has no others, some."""
    _, owner_B = group_B.unique(return_inverse=True)
    first_G = torch.empty(int(owner_B.max()) + 1, dtype=torch.long, device=tokens_BT.device)
    first_G[owner_B] = torch.arange(len(tokens_BT), device=tokens_BT.device)
    same_BT = tokens_BT == tokens_BT[first_G[owner_B]]
    common_B = torch.minimum(same_BT.long().cumprod(1).sum(1), lengths_B - 1)
    least_G = torch.full_like(first_G, tokens_BT.shape[1]).scatter_reduce(0, owner_B, common_B, "amin")
    is_alone_G = torch.zeros_like(first_G).index_add(0, owner_B, torch.ones_like(owner_B)) == 1
    longest = least_G.masked_fill(is_alone_G, 0).max()  # a row alone would share nearly all of itself with nobody
    return least_G.clamp(max=longest)[owner_B]


def _rows(kv_M2KE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values of rows that stand one behind the other, each (rows, K, time, E)."""
    k, v = kv_M2KE.unflatten(0, (num_rows, -1)).unbind(2)
    return k.transpose(1, 2), v.transpose(1, 2)


def read(model: Any, tokens_BT: Tensor, at_N: Tensor, branches: Branches | None) -> Tensor:
    """What `model(tokens_BT, at_N=at_N)` gives; with branches the shared beginnings are computed once."""
    if branches is None:
        return model(tokens_BT, at_N=at_N)
    return model(branches.tokens_1M, cache=branches, at_N=branches.at(at_N))
