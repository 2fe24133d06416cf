"""Causal self-attention with grouped key/value heads: the only place that chooses an attention kernel.

Why: rows that train are right-padded and plainly causal, so they need no mask; a dense mask costs the full square on
a CPU. While generating, keys and values come back from a cache, and the cache knows what may be seen: it says so.

Shapes: B batch, T time (of the new tokens), N tokens of several sequences, one behind the other, D width, H heads,
K key/value heads, E head width, S positions that may be seen.
What it is not: it owns no cache and never moves a cache's position; `lyceum.engine` does both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.layers import FastLinears, FastNormRotate, RMSNorm, is_fast, linear, paired, rotate
from lyceum.model.spec import ModelSpec


@dataclass(frozen=True)
class Reach:
    """What `num_rows` x `num_new` of the tokens in a pass look at: keys and values (rows, K, S, E).

    mask: is added to the scores, (rows, 1, T, S), or None. is_causal: the new tokens are all there is (S == T).
    """

    num_rows: int
    num_new: int
    k_BKSE: Tensor
    v_BKSE: Tensor
    mask: Tensor | None = None
    is_causal: bool = False


class KeyValueCache(Protocol):
    """What attention asks of a cache; the engine supplies one.

    With a cache the tokens of a pass are one row of N: those of several sequences, one behind the other.
    is_kept: later passes see what this one stores.
    """

    is_kept: bool

    def positions(self, num_new: int) -> Tensor:
        """Return the absolute positions (1, N) of the tokens that this forward pass brings."""

    def append(self, layer: int, kv_N2KE: Tensor) -> Iterable[Reach]:
        """Store the new tokens' keys and values; return what the tokens may look at, piece by piece, in their order."""


def attend(q_NHE: Tensor, reaches: Iterable[Reach]) -> Tensor:
    """Mix the values that each token may look at, (N, H * E).

    One query a row is the case of decoding: the heads that share keys stand as rows of one product then, which on a CPU
    is four times as fast as repeating the keys for 4 heads (and equals it where nothing is shared).
    """
    start, mixed = 0, []
    for reach in reaches:
        end = start + reach.num_rows * reach.num_new
        q, start = q_NHE if end - start == len(q_NHE) else q_NHE[start:end], end
        if reach.num_new == 1:
            q_BKGE = q.view(len(q), reach.k_BKSE.shape[1], -1, q.shape[-1])
            mixed.append(F.scaled_dot_product_attention(q_BKGE, reach.k_BKSE, reach.v_BKSE, reach.mask).flatten(1))
            continue
        q_BHTE = q.unflatten(0, (reach.num_rows, reach.num_new)).transpose(1, 2)
        is_grouped = q_BHTE.shape[1] != reach.k_BKSE.shape[1]
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BHTE, reach.k_BKSE, reach.v_BKSE, reach.mask, is_causal=reach.is_causal, enable_gqa=is_grouped
        )
        mixed.append(mixed_BHTE.transpose(1, 2).flatten(2).flatten(0, 1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); rotary positions and an RMSNorm on queries and keys where asked.

    Source: Vaswani et al. 2017, equation 1; QK-norm: Henry et al. 2020, with RMSNorm as in Qwen3.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_width = spec.head_width
        heads_width, kv_width = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
        self.is_grouped = spec.num_kv_heads != spec.num_heads
        self.q_proj = linear("q_proj", spec, spec.width, heads_width)
        self.k_proj = linear("k_proj", spec, spec.width, kv_width)
        self.v_proj = linear("v_proj", spec, spec.width, kv_width)
        self.o_proj = linear("o_proj", spec, heads_width, spec.width)
        self.q_norm = RMSNorm(spec.head_width, spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_width, spec.norm_eps) if spec.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        table: Tensor | None,
        layer: int,
        cache: KeyValueCache | None = None,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each row; `layer` is this layer's number.

        `table` is the rotary table at the tokens' positions; None where these were added to the embedding. With `at_N` only
        what these positions of (B, T) get is returned, (N, D).
        """
        if table is not None and (cache is None or not cache.is_kept) and is_fast(x_BTD, *self._linears()):
            q_BTHE, k_BTKE, v_BTKE = self._fast_project(x_BTD, table)
        else:
            q_BTHE, k_BTKE, v_BTKE = self._project(x_BTD, table)
        if cache is not None:
            kv_N2KE = torch.stack((k_BTKE[0], v_BTKE[0]), dim=1)
            mixed = attend(q_BTHE[0], cache.append(layer, kv_N2KE)).unsqueeze(0)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
            mixed_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.is_grouped)
            mixed = mixed_BHTE.transpose(1, 2).flatten(2)
        return self.o_proj(mixed if at_N is None else mixed.flatten(0, 1).index_select(0, at_N))

    def weights(self, x_BTD: Tensor, table: Tensor | None) -> Tensor:
        """Who looks at whom: how much of each token's value each later one takes, (B, H, T, T), rows that sum to 1.

        It is what the kernel works with and does not give back, computed openly: for looking, not for training.
        """
        q_BTHE, k_BTKE, _ = self._project(x_BTD, table)
        k_BTHE = k_BTKE.repeat_interleave(q_BTHE.shape[2] // k_BTKE.shape[2], dim=2)
        scores_BHTT = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) / self.head_width**0.5
        is_later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=x_BTD.device).triu(1)
        return scores_BHTT.masked_fill(is_later_TT, float("-inf")).softmax(dim=-1)

    def _linears(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _project(self, x_BTD: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, T, H or K, E), the first two normed and turned."""
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_width)) for project in self._linears())
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)

    def _fast_project(self, x_BTD: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_project` with query and key heads `paired`; never for keys that are kept, which must all have one order."""
        weights = (self._paired(self.q_proj.weight), self._paired(self.k_proj.weight), self.v_proj.weight)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in FastLinears.apply(x_BTD, *weights))
        return self._norm_rotate(q, self.q_norm, table), self._norm_rotate(k, self.k_norm, table), v

    def _paired(self, weight: Tensor) -> Tensor:
        return paired(weight, self.head_width)

    def _norm_rotate(self, x_BTHE: Tensor, norm: RMSNorm | nn.Identity, table: Tensor) -> Tensor:
        if isinstance(norm, RMSNorm):
            return FastNormRotate.apply(x_BTHE, self._paired(norm.weight), table, norm.eps)
        return FastNormRotate.apply(x_BTHE, None, table, 0.0)
