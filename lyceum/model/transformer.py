"""The decoder: token ids in, hidden states out, logits by a separate call.

Why: one architecture, Qwen3's by default, with the parameter names of its Hugging Face class, so that what we train is
what `transformers`, vLLM and llama.cpp open. Its relatives (Llama, Qwen2, GPT-2) are the same decoder with other words in
the ModelSpec. Logits are apart, so that a loss can be computed in chunks of tokens and so that a reward head needs none.

Shapes: B batch, T time, N positions picked out of (B, T), D width, V vocabulary.
Run it: `Decoder(spec)(tokens_BT)`; `lyceum.model.checkpoint` saves and loads it.
What it is not: it returns no loss and knows no device, precision, shards or compiler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyceum.errors import UsageError
from lyceum.model.attention import Attention, KeyValueCache
from lyceum.model.layers import FFNS, NORMS, rotary_table
from lyceum.model.spec import ModelSpec


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): the pre-norm block of GPT-2."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = NORMS[spec.norm](spec.width, eps=spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = NORMS[spec.norm](spec.width, eps=spec.norm_eps)
        self.mlp = FFNS[spec.ffn](spec)

    def forward(
        self, x_BTD: Tensor, table: Tensor | None, layer: int, cache: KeyValueCache | None, at_N: Tensor | None = None
    ) -> Tensor:
        """The next hidden states; with `at_N` only those of these positions of (B, T), which alone go through the ffn."""
        mixed = self.self_attn(self.input_layernorm(x_BTD), table, layer, cache, at_N)
        x = (x_BTD if at_N is None else x_BTD.flatten(0, 1).index_select(0, at_N)) + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """What every head stands on; it has a name of its own because Hugging Face's parameters begin with `model.`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.width)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.context_length, spec.width)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = NORMS[spec.norm](spec.width, eps=spec.norm_eps)


class Decoder(nn.Module):
    """A decoder of a given shape.

    `generator` makes the weights a pure function of its seed (default: torch's global generator); it must be on the
    CPU, where the weights are drawn.
    """

    def __init__(self, spec: ModelSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.lm_head = None if spec.tied else nn.Linear(spec.width, spec.vocab_size, bias=False)
        self.initialize(generator)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        cache: KeyValueCache | None = None,
        noise_BTD: Tensor | None = None,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm.

        Rows are right-padded: what stands after a token never reaches it, so no mask is needed. With a cache there is
        one row: the new tokens of several sequences, one behind the other, each continuing what the cache holds of its
        own. Noise, if given, is added to the embeddings. With `at_N`, positions b T + t, only those hidden states (N, D) are
        returned, and the last layer computes no more than they need. Raises UsageError when a row is longer than the
        context.
        """
        num_new = tokens_BT.shape[1]
        if cache is None and num_new > self.spec.context_length:
            raise UsageError(
                f"a row of {num_new} tokens does not fit the model's context of {self.spec.context_length}",
                hint="cut the row, or raise context_length in [model] and train again.",
            )
        x_BTD = self.model.embed_tokens(tokens_BT)
        if noise_BTD is not None:
            x_BTD = x_BTD + noise_BTD
        at = slice(num_new) if cache is None else cache.positions(num_new)
        table = None
        if self.spec.positions == "learned":
            x_BTD = x_BTD + self.model.embed_positions.weight[at]
        else:
            table = self._rotary_table(x_BTD)[at]
        last = len(self.model.layers) - 1
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, table, layer, cache, at_N if layer == last else None)
        return self.model.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of every next token for hidden states (..., D)."""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, D) that turns hidden states into logits; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _rotary_table(self, x: Tensor) -> Tensor:
        spec, dtype = self.spec, torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = (spec.context_length, spec.head_width, spec.rope_theta)
        return rotary_table(*shape, dtype, x.device, spec.rope_scaling)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, in a fixed order.

        GPT-2's rule (Radford et al. 2019, section 2.3): N(0, 0.02), and N(0, 0.02/sqrt(2 * layers)) for the matrices
        that write to the residual stream; gains are 1, biases 0. A tied embedding is also the output layer, so it must
        be small.
        Tried and not better under Muon: 1/sqrt(fan-in) for the matrices that read the stream, with or without zeros
        for those that write to it (nanochat's choice).
        """
        residual_std = 0.02 / (2 * self.spec.num_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0.0, residual_std if writes else 0.02, generator=generator)
