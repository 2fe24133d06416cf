"""A decoder packed for decoding: the same numbers from fewer and larger products, in a copy of the weights.

Why: to train, every matrix stands alone (Muon treats each by itself). To decode a few tokens is bound by reading the
weights and by the number of operators, so here q, k and v are one matrix, gate and up are another, the gains of RMSNorm
are multiplied into them, and rotary pairs stand side by side, which makes turning all heads one product of complex
numbers. What a layer writes, and the views of it, are made once and used by all layers (`Space`). `bench/engine.py`
measures what it brings.

    packed = PackedDecoder(model)                 # where `can_pack(model)`
    hidden_BTD = packed(tokens_1N, cache=cache)   # as model(tokens_1N, cache=cache), to the last bits
    packed.update(model)                          # the weights have changed: the copy is refreshed in place

What is not packed (embedding, output layer, o_proj, down_proj) is the model's own memory.
Shapes: N tokens of several sequences, D width, H heads, K key/value heads, E head width, F ffn width.
What it is not: it cannot be trained, and scores and hidden vectors of whole rows are the model's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.model.attention import KeyValueCache, attend
from lyceum.model.layers import paired, rotary_table
from lyceum.model.product import Product
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

KEPT_TOKENS = 64  # of a pass whose space is kept for the next of as many tokens

Weights = dict[str, tuple[Any, Tensor | None]]  # name in Layer -> the matrix and its bias


def can_pack(model: nn.Module) -> bool:
    """Whether the weights can be read off: a decoder without adapters, of which this process holds every weight whole."""
    if type(model) is not Decoder:
        return False
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    return all(type(it) is nn.Linear and type(it.weight) is nn.Parameter for it in linears)


def rounded(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The model with its weights in `dtype`; the old ones stay as they are."""
    with torch.device("meta"):
        found = Decoder(model.spec)
    weights = {name: weight.detach().to(dtype) for name, weight in model.state_dict().items()}
    found.load_state_dict(weights, assign=True)
    return found


@dataclass
class Layer:
    """One layer's matrices; the gains before qkv and up are in those, unless the norm is not RMSNorm."""

    qkv: Product
    head_gains: Tensor | None  # (H + K, E): of q_norm and k_norm
    out: Product
    up: Product  # gate and up, or up alone
    down: Product


class PackedDecoder:
    """What the engine runs in place of `model`.

    half: on a CPU few tokens see the weights of large matrices rounded to fp16; elsewhere all tokens see a second copy, in bf16.
    Raises UsageError where that is not possible.
    """

    def __init__(self, model: Decoder, *, half: bool = False) -> None:
        self.half = half
        self._layers: list[Layer] = []
        self._output: Product | None = None
        self.update(model)

    @torch.no_grad()
    def update(self, model: Decoder) -> None:
        """Copy the model's weights, into the memory of the old ones where the shapes are the same."""
        if self.half and model.output_weight.device.type != "cpu":
            model = rounded(model, torch.bfloat16)
        self.model, self.spec = model, model.spec
        spec, norm = model.spec, model.model.norm
        # RMSNorm(x) = x / sqrt(|x|^2 + eps D) * sqrt(D) * gain: the last two are multiplied into what follows
        like = model.model.embed_tokens.weight
        self._eps, self._head_eps = (
            like.new_tensor(spec.norm_eps * num).sqrt() for num in (spec.width, spec.head_width)
        )
        self._final_gain = None if isinstance(norm, nn.LayerNorm) else norm.weight * spec.width**0.5
        self._spaces: dict[int, Space] = {}
        old, self._layers = self._layers, []
        for number, block in enumerate(model.model.layers):
            weights = _packed(block, spec.positions == "rotary", spec.head_width)
            self._layers.append(self._refreshed(old[number] if number < len(old) else None, weights))
        self._output = self._renewed(self._output, model.output_weight, None)

    def __call__(self, tokens_BT: Tensor, *, cache: KeyValueCache) -> Tensor:
        """Return the hidden states (1, N, D) after the final norm of one row of new tokens."""
        trunk: Any = self.model.model
        spec = self.spec
        tokens_N, positions_N = tokens_BT[0], cache.positions(tokens_BT.shape[1])[0]
        x_ND, table = F.embedding(tokens_N, trunk.embed_tokens.weight), None
        if spec.positions == "learned":
            x_ND += F.embedding(positions_N, trunk.embed_positions.weight)
        else:
            dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
            shape = (spec.context_length, spec.head_width, spec.rope_theta)
            table = rotary_table(*shape, dtype, x_ND.device, spec.rope_scaling)[positions_N].unsqueeze(1)
        space = self._space(x_ND)
        for number, (block, layer) in enumerate(zip(trunk.layers, self._layers, strict=True)):
            layer.qkv.into(space.qkv, self._norm(x_ND, block.input_layernorm))
            if layer.head_gains is not None:
                space.qk.div_(_length(space.qk, self._head_eps)).mul_(layer.head_gains)
            if table is not None:
                space.turn(table)
            layer.out.onto(x_ND, attend(space.q_NHE, cache.append(number, space.kv_N2KE)))
            layer.up.into(space.up, self._norm(x_ND, block.post_attention_layernorm))
            layer.down.onto(x_ND, space.activated())
        hidden_ND = self._norm(x_ND, trunk.norm)
        if self._final_gain is not None:
            hidden_ND *= self._final_gain
        return hidden_ND.unsqueeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of every next token for hidden states (..., D)."""
        assert self._output is not None
        hidden_ND = hidden.flatten(0, -2)
        logits_NV = hidden_ND.new_empty(len(hidden_ND), len(self._output.weight))
        self._output.into(logits_NV, hidden_ND)
        return logits_NV.view(*hidden.shape[:-1], -1)

    def tensors(self, *, few: bool) -> dict[str, Tensor]:
        """All that a pass reads, by name, as `lyceum.model.step.Step` expects it; nothing is copied.

        few: with the matrices as they are kept for few rows.
        """
        trunk: Any = self.model.model
        assert self._output is not None and not self._output.half
        found: dict[str, Tensor | None] = {"embed": trunk.embed_tokens.weight}
        if self.spec.positions == "learned":
            found["positions"] = trunk.embed_positions.weight
        else:
            shape = (self.spec.context_length, self.spec.head_width, self.spec.rope_theta)
            table = rotary_table(*shape, torch.float32, self._eps.device, self.spec.rope_scaling)
            found["turns"] = torch.view_as_real(table)
        products = {"output": self._output}
        for number, (block, layer) in enumerate(zip(trunk.layers, self._layers, strict=True)):
            products |= {f"{number}.{name}": getattr(layer, name) for name in ("qkv", "out", "up", "down")}
            found[f"{number}.head_gains"] = layer.head_gains
            found |= _layer_norm(f"{number}.before", block.input_layernorm)
            found |= _layer_norm(f"{number}.between", block.post_attention_layernorm)
        found |= _layer_norm("last", trunk.norm) or {"last": self._final_gain}
        for name, product in products.items():
            found |= {name: product.weight, f"{name}.bias": product.bias, f"{name}.few": product.few if few else None}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    def _refreshed(self, old: Layer | None, weights: Weights) -> Layer:
        """A layer of these weights; those that are copies are written into the old ones' memory, if they fit."""

        def product(name: str) -> Product:
            return self._renewed(getattr(old, name, None), *weights[name], is_copy=name in ("qkv", "up"))

        return Layer(product("qkv"), weights["head_gains"][0], product("out"), product("up"), product("down"))

    def _renewed(self, old: Product | None, weight: Tensor, bias: Tensor | None, *, is_copy: bool = False) -> Product:
        if old is None:
            return Product(weight, bias, half=self.half and weight.device.type == "cpu")
        before = old.weight
        if is_copy and (before.shape, before.dtype, before.device) == (weight.shape, weight.dtype, weight.device):
            weight = before.copy_(weight)
        old.update(weight, bias)
        return old

    def _norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if isinstance(norm, nn.LayerNorm) else x / _length(x, self._eps)

    def _space(self, like_ND: Tensor) -> Space:
        num = len(like_ND)
        if num > KEPT_TOKENS:
            return Space(self.spec, num, like_ND)
        if num not in self._spaces:
            self._spaces[num] = Space(self.spec, num, like_ND)
        return self._spaces[num]


class Space:
    """What the layers write to, one after the other, and the views of it that operators take: made once, not in each layer."""

    def __init__(self, spec: ModelSpec, num_tokens: int, like: Tensor) -> None:
        num_turned, self._is_gated = spec.num_heads + spec.num_kv_heads, spec.ffn == "swiglu"
        with torch.inference_mode(False):  # or it could not be written to outside of it
            self.qkv = like.new_empty(num_tokens, (num_turned + spec.num_kv_heads) * spec.head_width)
            self.up = like.new_empty(num_tokens, (1 + self._is_gated) * spec.ffn_width)
        heads = self.qkv.view(num_tokens, -1, spec.head_width)
        self.q_NHE, self.qk = heads[:, : spec.num_heads], heads[:, :num_turned]
        self.kv_N2KE = heads[:, spec.num_heads :].unflatten(1, (2, -1))
        self._pairs = None
        if like.dtype in (torch.float32, torch.float64):
            self._pairs = torch.view_as_complex(self.qk.unflatten(-1, (-1, 2)))
        self._gate, self._up = self.up.chunk(2, dim=-1) if self._is_gated else (self.up, self.up)

    def turn(self, table: Tensor) -> None:
        """Turn queries and keys by the angles of their positions."""
        if self._pairs is not None:
            self._pairs.mul_(table)
        else:
            pairs = torch.view_as_complex(self.qk.to(table.dtype.to_real()).unflatten(-1, (-1, 2)))
            self.qk.copy_(torch.view_as_real(pairs.mul_(table)).flatten(-2))

    def activated(self) -> Tensor:
        """What the feed-forward multiplies with its last matrix, (N, F)."""
        return F.silu(self._gate).mul_(self._up) if self._is_gated else F.gelu(self._up, approximate="tanh")


def _layer_norm(name: str, norm: nn.Module) -> dict[str, Tensor | None]:
    return {name: norm.weight, f"{name}.bias": norm.bias} if isinstance(norm, nn.LayerNorm) else {}


def _length(x: Tensor, eps: Tensor) -> Tensor:
    """sqrt(|x|^2 + eps^2) over the last dimension: two operators, where F.rms_norm is several on a CPU."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(eps)


def _packed(block: Any, is_rotary: bool, head_width: int) -> Weights:
    attention, ffn = block.self_attn, block.mlp
    linears: tuple[nn.Linear, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)

    def turned(weight: Tensor) -> Tensor:
        return paired(weight, head_width) if is_rotary else weight

    def gained(weight: Tensor, norm: Any) -> Tensor:
        return weight if isinstance(norm, nn.LayerNorm) else weight * (norm.weight * weight.shape[1] ** 0.5)

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
        gains = torch.cat((q.expand(num_heads, -1), k.expand(num_kv_heads, -1))) * head_width**0.5
    qkv = torch.cat([turned(linears[0].weight), turned(linears[1].weight), linears[2].weight])
    ups = (ffn.gate_proj, ffn.up_proj) if hasattr(ffn, "gate_proj") else (ffn.up_proj,)
    return {
        "qkv": (gained(qkv, block.input_layernorm), joined(list(zip(linears, (True, True, False), strict=True)))),
        "head_gains": (gains, None),
        "out": (attention.o_proj.weight, attention.o_proj.bias),
        "up": (
            gained(torch.cat([linear.weight for linear in ups]), block.post_attention_layernorm),
            joined([(linear, False) for linear in ups]),
        ),
        "down": (ffn.down_proj.weight, ffn.down_proj.bias),
    }
