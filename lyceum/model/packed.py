"""A decoder packed for decoding: the same numbers from fewer and larger products, in a copy of the weights.

Why: to train, every matrix stands alone (Muon treats each by itself). To decode a few tokens is bound by reading the
weights and by the number of operators, so here q, k and v are one matrix, gate and up are another, the gains of RMSNorm
are multiplied into them, and rotary pairs stand side by side, which makes turning all heads one product of complex
numbers. `bench/engine.py` measures what it brings.

    packed = PackedDecoder(model)                 # where `can_pack(model)`
    hidden_BTD = packed(tokens_1N, cache=cache)   # as model(tokens_1N, cache=cache), to the last bits
    packed.update(model)                          # the weights have changed: the copy is refreshed in place

What is not packed (embedding, output layer, o_proj, down_proj) is the model's own memory.
Shapes: N tokens of several sequences, D width, H heads, K key/value heads, E head width, F ffn width.
What it is not: it cannot be trained, and scores and hidden vectors of whole rows are the model's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.attention import KeyValueCache, attend
from lyceum.model.layers import paired, rotary_table
from lyceum.model.transformer import Decoder


def can_pack(model: nn.Module) -> bool:
    """Whether the weights can be read off: a decoder without adapters, of which this process holds every weight whole."""
    if type(model) is not Decoder:
        return False
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    return all(type(it) is nn.Linear and type(it.weight) is nn.Parameter for it in linears)


@dataclass
class Layer:
    """One layer's weights; the gains before qkv and up are in those matrices, unless the norm is not RMSNorm."""

    qkv: Tensor
    qkv_bias: Tensor | None
    head_gains: Tensor | None  # (H + K, E): of q_norm and k_norm
    out: Tensor
    out_bias: Tensor | None
    up: Tensor  # gate and up, or up alone
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class PackedDecoder:
    """What the engine runs in place of `model`; raises nothing of its own."""

    def __init__(self, model: Decoder) -> None:
        self._layers: list[Layer] = []
        self.update(model)

    @torch.no_grad()
    def update(self, model: Decoder) -> None:
        """Copy the model's weights, into the memory of the old ones where the shapes are the same."""
        self.model, self.spec = model, model.spec
        spec, embedding = model.spec, model.model.embed_tokens.weight
        self._eps = torch.tensor(spec.norm_eps, dtype=embedding.dtype, device=embedding.device)
        old, self._layers = self._layers, []
        for number, block in enumerate(model.model.layers):
            layer = _packed(block, spec.positions == "rotary", spec.head_width)
            self._layers.append(_into(old[number], layer) if number < len(old) else layer)

    def __call__(self, tokens_BT: Tensor, *, cache: KeyValueCache) -> Tensor:
        """Return the hidden states (1, N, D) after the final norm of one row of new tokens."""
        trunk: Any = self.model.model
        spec = self.spec
        tokens_N, positions_N = tokens_BT[0], cache.positions(tokens_BT.shape[1])[0]
        x_ND, table = F.embedding(tokens_N, trunk.embed_tokens.weight), None
        if spec.positions == "learned":
            x_ND = x_ND + F.embedding(positions_N, trunk.embed_positions.weight)
        else:
            dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
            shape = (spec.context_length, spec.head_width, spec.rope_theta)
            table = rotary_table(*shape, dtype, x_ND.device, spec.rope_scaling)[positions_N].unsqueeze(1)
        for number, (block, layer) in enumerate(zip(trunk.layers, self._layers, strict=True)):
            x_ND = x_ND + self._attention(self._norm(x_ND, block.input_layernorm), layer, table, number, cache)
            x_ND = x_ND + self._ffn(self._norm(x_ND, block.post_attention_layernorm), layer)
        hidden_ND = self._norm(x_ND, trunk.norm)
        if not isinstance(trunk.norm, nn.LayerNorm):
            hidden_ND *= trunk.norm.weight
        return hidden_ND.unsqueeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of every next token for hidden states (..., D)."""
        return self.model.logits(hidden)

    def _attention(self, x_ND: Tensor, layer: Layer, table: Tensor | None, number: int, cache: KeyValueCache) -> Tensor:
        spec = self.spec
        num_turned = spec.num_heads + spec.num_kv_heads
        qkv = F.linear(x_ND, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, spec.head_width))
        qk = qkv[:, :num_turned]
        if layer.head_gains is not None:
            qk.mul_(self._rstd(qk)).mul_(layer.head_gains)
        if table is not None:
            pairs = qk if qk.dtype == table.dtype.to_real() else qk.to(table.dtype.to_real())
            torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(table)
            if pairs is not qk:
                qk.copy_(pairs)
        kv_N2KE = qkv[:, spec.num_heads :].unflatten(1, (2, -1))
        return F.linear(attend(qkv[:, : spec.num_heads], cache.append(number, kv_N2KE)), layer.out, layer.out_bias)

    def _ffn(self, x_ND: Tensor, layer: Layer) -> Tensor:
        up = F.linear(x_ND, layer.up, layer.up_bias)
        if self.spec.ffn == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            up = F.silu(gate).mul_(up)
        else:
            up = F.gelu(up, approximate="tanh")
        return F.linear(up, layer.down, layer.down_bias)

    def _norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if isinstance(norm, nn.LayerNorm) else x * self._rstd(x)

    def _rstd(self, x: Tensor) -> Tensor:
        # half the time of F.rms_norm, which is several operators on a CPU
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _packed(block: Any, is_rotary: bool, head_width: int) -> Layer:
    attention, ffn = block.self_attn, block.mlp
    linears: tuple[nn.Linear, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)

    def turned(weight: Tensor) -> Tensor:
        return paired(weight, head_width) if is_rotary else weight

    def gained(weight: Tensor, norm: Any) -> Tensor:
        return weight if isinstance(norm, nn.LayerNorm) else weight * norm.weight

    def joined(parts: list[tuple[nn.Linear, bool]]) -> Tensor | None:
        if all(linear.bias is None for linear, _ in parts):
            return None
        zeros = [linear.weight.new_zeros(linear.out_features) for linear, _ in parts]
        biases = [zero if linear.bias is None else linear.bias for (linear, _), zero in zip(parts, zeros, strict=True)]
        return torch.cat([turned(b) if is_turned else b for b, (_, is_turned) in zip(biases, parts, strict=True)])

    gains = None
    if not isinstance(attention.q_norm, nn.Identity):
        q, k = turned(attention.q_norm.weight), turned(attention.k_norm.weight)
        num_heads, num_kv_heads = (linear.out_features // head_width for linear in linears[:2])
        gains = torch.cat((q.expand(num_heads, -1), k.expand(num_kv_heads, -1)))
    qkv = torch.cat([turned(linears[0].weight), turned(linears[1].weight), linears[2].weight])
    ups = (ffn.gate_proj, ffn.up_proj) if hasattr(ffn, "gate_proj") else (ffn.up_proj,)
    return Layer(
        qkv=gained(qkv, block.input_layernorm),
        qkv_bias=joined(list(zip(linears, (True, True, False), strict=True))),
        head_gains=gains,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        up=gained(torch.cat([linear.weight for linear in ups]), block.post_attention_layernorm),
        up_bias=joined([(linear, False) for linear in ups]),
        down=ffn.down_proj.weight,
        down_bias=ffn.down_proj.bias,
    )


def _into(old: Layer, new: Layer) -> Layer:
    """`new` in the memory of `old`, where it is a copy and fits."""
    for field in fields(Layer):
        before, after = getattr(old, field.name), getattr(new, field.name)
        is_copy = field.name in ("qkv", "qkv_bias", "head_gains", "up", "up_bias")
        if is_copy and before is not None and after is not None and before.shape == after.shape:
            if (before.dtype, before.device) == (after.dtype, after.device):
                setattr(new, field.name, before.copy_(after))
    return new
