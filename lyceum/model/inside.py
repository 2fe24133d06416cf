"""Looking inside a model while it reads: who attends to whom, and what each layer would say next.

    seen = look(model, ids, num_top=5)
    seen.attention_LHTT[2, 0, 9]        # layer 3, head 1: the weights with which token 9 looks at tokens 0 to 9
    seen.top_ids_LTP[0, 9]              # what the embedding alone would say after token 9; the last row is what the model says

One forward pass of the plain module, with hooks that only look. The logit lens (nostalgebraist 2020) reads each layer's
hidden state as if it were the last: final norm, then the output layer. The last row is therefore the model's own prediction.
Early layers keep what they know in directions of their own, so what the lens shows of them is a lower bound (Belrose et al.
2023, who tune a lens).

Attention says where values were taken from, not what for: a weight is no explanation (Jain and Wallace 2019).

Shapes: L layers (of the lens: L + 1, the embedding first), H heads, T time, D width, V vocabulary, P places in a top list.
What it is not: fast, or for long texts: attention is kept whole. `most_tokens` says how long a text may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyceum.errors import UsageError
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder, DecoderLayer

MOST_TOKENS = 128
LEAST_TOKENS = 16
MOST_WEIGHTS = 1 << 21  # of attention, all heads together
MOST_OPERATIONS = 1e11  # of the lens: about a second on a laptop


@dataclass(frozen=True)
class Inside:
    """What was seen. next_logprobs_LT: of the token that really follows, by each layer (L + 1, T - 1); natural logarithms."""

    attention_LHTT: Tensor
    top_ids_LTP: Tensor
    top_logprobs_LTP: Tensor
    next_logprobs_LT: Tensor


def most_tokens(spec: ModelSpec) -> int:
    """Tokens that are looked at in one go: attention grows with their square, the lens with layers x vocabulary."""
    by_weights = int((MOST_WEIGHTS / (spec.num_layers * spec.num_heads)) ** 0.5)
    by_operations = int(MOST_OPERATIONS / (2 * spec.vocab_size * spec.width * (spec.num_layers + 1)))
    return min(spec.context_length, MOST_TOKENS, max(LEAST_TOKENS, min(by_weights, by_operations)))


@torch.inference_mode()
def look(model: Decoder, ids: Sequence[int], *, num_top: int = 5) -> Inside:
    """Read a text and look on.

    Args:
        model: a plain decoder; it is left as it was.
        ids: at least one token, at most `most_tokens(model.spec)`.
        num_top: places of each top list.

    Raises:
        UsageError: no tokens, or too many.
    """
    most = most_tokens(model.spec)
    if not 0 < len(ids) <= most:
        raise UsageError(f"{len(ids)} tokens cannot be looked into", hint=f"from 1 to {most} with this model")
    attention: list[Tensor] = []
    streams: list[Tensor] = []

    def before_attention(module: Any, given: tuple[Any, ...]) -> None:
        attention.append(module.weights(given[0], given[1])[0])

    def before_layer(module: Any, given: tuple[Any, ...]) -> None:
        streams.append(given[0][0])

    with ExitStack() as hooks:
        for block in model.model.layers:
            assert isinstance(block, DecoderLayer)
            hooks.callback(block.register_forward_pre_hook(before_layer).remove)
            hooks.callback(block.self_attn.register_forward_pre_hook(before_attention).remove)
        hooks.callback(model.model.norm.register_forward_pre_hook(before_layer).remove)
        tokens_T = torch.tensor(ids, device=model.output_weight.device)
        model(tokens_T[None])
    tops, follows = [], []
    for stream_TD in streams:  # one layer's logits at a time: they are the large part
        logprobs_TV = model.logits(model.model.norm(stream_TD)).float().log_softmax(dim=-1)
        tops.append(logprobs_TV.topk(min(num_top, logprobs_TV.shape[1]), dim=-1))
        follows.append(logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0])
    return Inside(
        torch.stack(attention).float().cpu(),
        torch.stack([top.indices for top in tops]).cpu(),
        torch.stack([top.values for top in tops]).cpu(),
        torch.stack(follows).cpu(),
    )
