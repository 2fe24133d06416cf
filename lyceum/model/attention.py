"""Causal self-attention with grouped key/value heads: the only place that chooses an attention kernel.

Why: rows that train are right-padded and plainly causal, so they need no mask; a dense mask costs the full square on
a CPU. While generating, keys and values come back from a cache, and the cache knows what may be seen: it says so.

Shapes: B batch, T time (of the new tokens), D width, H heads, K key/value heads, E head width, S cached positions.
What it is not: it owns no cache and never moves a cache's position; `lyceum.engine` does both.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.layers import FastLinears, FastNormRotate, RMSNorm, is_fast, linear, paired, rotate
from lyceum.model.spec import ModelSpec


class KeyValueCache(Protocol):
    """What attention asks of a cache; the engine supplies one."""

    def positions(self, num_new: int) -> Tensor:
        """Return the absolute positions (B, T) of the `num_new` tokens that this forward pass brings."""

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Store the new tokens' keys and values and return all that they may look at.

        Returns keys and values (B, K, S, E), a mask that broadcasts to (B, H, T, S) or None, and `is_causal`: True
        only when the new tokens are all there is (S == T) and the mask is None.
        """


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

    def forward(self, x_BTD: Tensor, table: Tensor | None, layer: int, cache: KeyValueCache | None = None) -> Tensor:
        """Mix the tokens of each row; `layer` is this layer's number.

        `table` is the rotary table at the tokens' positions; None where these were added to the embedding.
        """
        if table is not None and cache is None and is_fast(x_BTD, *self._linears()):
            q_BTHE, k_BTKE, v_BTKE = self._fast_project(x_BTD, table)
        else:
            q_BTHE, k_BTKE, v_BTKE = self._project(x_BTD, table)
        q_BHTE, k_BKTE, v_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        mask, is_causal = None, True
        if cache is not None:
            k_BKTE, v_BKTE, mask, is_causal = cache.append(layer, k_BKTE, v_BKTE)
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=is_causal, enable_gqa=self.is_grouped
        )
        return self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))

    def _linears(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _project(self, x_BTD: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, T, H or K, E), the first two normed and turned."""
        q, k, v = (project(x_BTD).unflatten(-1, (-1, self.head_width)) for project in self._linears())
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)

    def _fast_project(self, x_BTD: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_project` with query and key heads `paired`; never for a cache, whose keys must all have one order."""
        weights = (self._paired(self.q_proj.weight), self._paired(self.k_proj.weight), self.v_proj.weight)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in FastLinears.apply(x_BTD, *weights))
        return self._norm_rotate(q, self.q_norm, table), self._norm_rotate(k, self.k_norm, table), v

    def _paired(self, weight: Tensor) -> Tensor:
        return paired(weight, self.head_width)

    def _norm_rotate(self, x_BTHE: Tensor, norm: RMSNorm | nn.Identity, table: Tensor) -> Tensor:
        if isinstance(norm, RMSNorm):
            return FastNormRotate.apply(x_BTHE, self._paired(norm.weight), table, norm.eps)
        return FastNormRotate.apply(x_BTHE, None, table, 0.0)
