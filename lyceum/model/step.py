"""A step of decoding as one function of tensors: what can be compiled or recorded whole, with nothing of Python left in it.

Why: a step of a model of a few million parameters is some two hundred short operators, and calling them takes longer than what
they compute. Compiled or recorded they are one call. `lyceum.engine.compiled` has it compiled for a CPU, in a process of its
own, `lyceum.engine.graphs` records it on a GPU; both decide whether it is used.

    names, tensors = zip(*packed.tensors().items())            # a `lyceum.model.packed.PackedDecoder`
    logits_BV = Step(packed.spec, names)(now_2B, seen_S, memory, tensors)

now_2B: of each row its token, and how many tokens its slot holds. seen_S: 0, 1, ... up to the longest row's new token.
memory: of each layer the slots (2, rows, K, time, E) of `lyceum.engine.cache`, where the new keys and values are written.
is_real_B: rows that are not only there to fill up, and write; without it all are.

Shapes: B rows that decode, S positions that may be seen, D width, H heads, K key/value heads, G heads that share one, E head
width, F ffn width, V vocabulary.
What it is not: for prompts, nor for weights that a CPU keeps in 16 bits. With weights in bf16 norms and rotary positions are
worked out in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.spec import ModelSpec

# a few rows times a matrix in MKL's packed order; what torch calls itself would fix the number of rows when compiled
FEW_OPERATOR = "lyceum::few"
_few = torch.library.Library("lyceum", "DEF")
_few.define("few(Tensor x, Tensor packed, Tensor weight) -> Tensor")
_few.impl(
    "few",
    lambda x, packed, weight: torch.ops.mkl._mkl_linear(x, packed, weight, None, len(x)),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(FEW_OPERATOR, lambda x, packed, weight: x.new_empty(x.shape[0], weight.shape[0]), lib=_few)


class Step(nn.Module):
    """The step of a model of this shape; it holds no weights, they come in the order of `names`."""

    def __init__(self, spec: ModelSpec, names: tuple[str, ...]) -> None:
        super().__init__()
        self.spec, self.names = spec, names

    def forward(
        self,
        now_2B: Tensor,
        seen_S: Tensor,
        memory: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        *,
        is_real_B: Tensor | None = None,
    ) -> Tensor:
        """The logits (B, V) of each row's next token; row b's keys and values go to slot b."""
        at, spec = dict(zip(self.names, tensors, strict=True)), self.spec
        tokens_B, starts_B = now_2B.unbind(0)
        x_BD, table = at["embed"][tokens_B], None
        if spec.positions == "learned":
            x_BD = x_BD + at["positions"][starts_B]
        else:
            table = at["turns"][starts_B]
        hidden_BS = seen_S > starts_B.unsqueeze(1)
        mask_BS = torch.zeros_like(hidden_BS, dtype=x_BD.dtype).masked_fill(hidden_BS, float("-inf"))
        for number, slots in enumerate(memory):
            layer = {name.partition(".")[2]: tensor for name, tensor in at.items() if name.startswith(f"{number}.")}
            q_BHE, kv_B2KE = self._projected(self._normed(x_BD, layer, "before"), layer, table)
            mixed = _attended(q_BHE, kv_B2KE, starts_B, mask_BS, slots, is_real_B)
            x_BD = x_BD + _times(mixed, layer, "out")
            up_BF = _times(self._normed(x_BD, layer, "between"), layer, "up")
            x_BD = x_BD + _times(self._activated(up_BF), layer, "down")
        return _times(self._normed(x_BD, at, "last"), at, "output")

    def _normed(self, x_BD: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
        # gains of RMSNorm are in the matrix that follows, but for the last, after which the model's own output layer stands
        eps = self.spec.norm_eps
        if self.spec.norm == "layer":
            return F.layer_norm(x_BD, x_BD.shape[-1:], layer[name], layer[f"{name}.bias"], eps)
        x_BD = (x_BD / _length(x_BD, eps)).type_as(x_BD)
        return x_BD * layer[name] if name in layer else x_BD

    def _projected(self, x_BD: Tensor, layer: dict[str, Tensor], table: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries, and keys and values of every row's new token; normed and turned."""
        spec = self.spec
        heads = _times(x_BD, layer, "qkv").unflatten(-1, (-1, spec.head_width))
        qk, v_BKE = heads.split((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if "head_gains" in layer:
            qk = qk / _length(qk, spec.norm_eps) * layer["head_gains"]
        if table is not None:
            (a, b), (cos, sin) = qk.unflatten(-1, (-1, 2)).unbind(-1), table.unsqueeze(1).unbind(-1)
            qk = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        q_BHE, k_BKE = qk.type_as(v_BKE).split((spec.num_heads, spec.num_kv_heads), dim=1)
        return q_BHE, torch.stack((k_BKE, v_BKE), dim=1)

    def _activated(self, up_BF: Tensor) -> Tensor:
        if self.spec.ffn == "gelu":
            return F.gelu(up_BF, approximate="tanh")
        gate_BF, up_BF = up_BF.chunk(2, dim=-1)
        return F.silu(gate_BF) * up_BF


def _length(x: Tensor, eps: float) -> Tensor:
    """sqrt(|x|^2 + eps * width) over the last dimension, in fp32: what the packed matrices and gains expect."""
    return (x.float().square().sum(-1, keepdim=True) + eps * x.shape[-1]).sqrt()


def _times(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    few = layer.get(f"{name}.few")
    product = x @ layer[name].t() if few is None else torch.ops.lyceum.few(x, few, layer[name])
    return product + layer[f"{name}.bias"] if f"{name}.bias" in layer else product


def _attended(
    q_BHE: Tensor, kv_B2KE: Tensor, starts_B: Tensor, mask_BS: Tensor, slots: Tensor, is_real_B: Tensor | None
) -> Tensor:
    """Store keys and values; mix the values that each row may look at, (B, H * E)."""
    num_rows, num_seen = mask_BS.shape
    torch._check(num_rows <= slots.shape[1])
    torch._check(num_seen <= slots.shape[3])
    rows_B = torch.arange(num_rows, device=slots.device)
    if is_real_B is not None:  # the others' slots may be somebody's: what was there is written back
        kv_B2KE = torch.where(is_real_B[:, None, None, None], kv_B2KE, slots[:, rows_B, :, starts_B])
    slots[:, rows_B, :, starts_B] = kv_B2KE
    k_BKSE, v_BKSE = slots[:, :num_rows, :, :num_seen].unbind(0)
    q_BKGE = q_BHE.unflatten(1, (slots.shape[2], -1))
    mixed = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, mask_BS[:, None, None])
    return mixed.flatten(1)
