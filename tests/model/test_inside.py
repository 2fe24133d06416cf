"""What is seen inside equals a computation by hand, and the last row of the lens is the model itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lyceum.errors import UsageError
from lyceum.model.inside import LEAST_TOKENS, MOST_TOKENS, look, most_tokens
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

IDS = [5, 17, 3, 90, 17]


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions by their definition: pair (i, i + E/2) turns by position * theta^(-2i/E)."""
    half = len(x) // 2
    a, b = x[:half], x[half:]
    angle = position * theta ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))


def by_hand(model: Decoder, ids: list[int]) -> tuple[Tensor, list[list[Tensor]]]:
    """Attention (L, H, T, T), and the stream before the first layer and after each, one token and one head at a time."""
    spec, weights = model.spec, dict(model.named_parameters())
    stream = [weights["model.embed_tokens.weight"][token] for token in ids]
    streams, attention = [stream], torch.zeros(spec.num_layers, spec.num_heads, len(ids), len(ids), dtype=torch.float64)
    width = spec.head_width
    for layer in range(spec.num_layers):
        w = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
        read = [normed(x, w["input_layernorm.weight"], spec.norm_eps) for x in stream]
        mixed = []
        for t in range(len(ids)):
            heads = []
            for head in range(spec.num_heads):
                shared = head // (spec.num_heads // spec.num_kv_heads)
                mine, theirs = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
                query = normed(
                    w["self_attn.q_proj.weight"][mine] @ read[t], w["self_attn.q_norm.weight"], spec.norm_eps
                )
                query = turned(query, t, spec.rope_theta)
                scores = []
                for s in range(t + 1):
                    key = normed(
                        w["self_attn.k_proj.weight"][theirs] @ read[s], w["self_attn.k_norm.weight"], spec.norm_eps
                    )
                    scores.append(math.exp(float(query @ turned(key, s, spec.rope_theta)) / math.sqrt(width)))
                share = [score / sum(scores) for score in scores]
                attention[layer, head, t, : t + 1] = torch.tensor(share, dtype=torch.float64)
                values = [w["self_attn.v_proj.weight"][theirs] @ read[s] for s in range(t + 1)]
                heads.append(sum(p * v for p, v in zip(share, values, strict=True)))
            mixed.append(w["self_attn.o_proj.weight"] @ torch.cat(heads))
        stream = [x + m for x, m in zip(stream, mixed, strict=True)]
        after = []
        for x in stream:
            y = normed(x, w["post_attention_layernorm.weight"], spec.norm_eps)
            gate = w["mlp.gate_proj.weight"] @ y
            after.append(x + w["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ y)))
        stream = after
        streams.append(stream)
    return attention, streams


@torch.no_grad()
def test_attention_and_lens_equal_a_computation_by_hand(
    tiny_spec: Callable[..., ModelSpec], random_decoder: Callable[..., Decoder]
) -> None:
    model = random_decoder(tiny_spec()).double()
    seen = look(model, IDS, num_top=96)
    attention, streams = by_hand(model, IDS)
    torch.testing.assert_close(seen.attention_LHTT, attention.float(), rtol=0, atol=1e-6)
    gain, output = model.model.norm.weight, model.output_weight
    for layer, stream in enumerate(streams):
        for t, x in enumerate(stream):
            logprobs_V = (output @ normed(x, gain, model.spec.norm_eps)).log_softmax(0)
            found_V = torch.empty(96).scatter(0, seen.top_ids_LTP[layer, t], seen.top_logprobs_LTP[layer, t])
            torch.testing.assert_close(found_V, logprobs_V.float(), rtol=0, atol=2e-5)
            if t + 1 < len(IDS):
                assert float(seen.next_logprobs_LT[layer, t]) == pytest.approx(float(logprobs_V[IDS[t + 1]]), abs=2e-5)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"num_kv_heads": 4, "qk_norm": False}])
def test_the_last_row_of_the_lens_is_what_the_model_says(
    tiny_spec: Callable[..., ModelSpec], random_decoder: Callable[..., Decoder], changes: dict[str, object]
) -> None:
    model = random_decoder(tiny_spec(**changes))
    seen = look(model, IDS)
    with torch.inference_mode():
        real_TV = model.logits(model(torch.tensor([IDS])))[0].log_softmax(-1)
    torch.testing.assert_close(seen.top_logprobs_LTP[-1], real_TV.topk(5).values, rtol=0, atol=1e-5)
    assert torch.equal(seen.top_ids_LTP[-1], real_TV.topk(5).indices)
    assert seen.attention_LHTT.shape == (2, 4, 5, 5) and seen.top_ids_LTP.shape == (3, 5, 5)
    assert seen.next_logprobs_LT.shape == (3, 4)


@torch.no_grad()
def test_a_model_that_looks_at_all_alike_and_writes_nothing_shows_just_that(
    tiny_spec: Callable[..., ModelSpec], random_decoder: Callable[..., Decoder]
) -> None:
    model = random_decoder(tiny_spec())
    for block in model.model.layers:
        for weight in (block.self_attn.q_proj.weight, block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.zero_()
    seen = look(model, IDS)
    even_TT = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]  # a third each for the third token, and so on
    assert torch.allclose(seen.attention_LHTT, even_TT.expand(2, 4, 5, 5))
    assert torch.equal(seen.top_ids_LTP[0], seen.top_ids_LTP[2])  # no layer wrote anything: all would say the same


@pytest.mark.parametrize("family", [{}, {"positions": "learned", "norm": "layer", "ffn": "gelu", "qk_norm": False}])
def test_what_heads_look_at_times_their_values_is_what_attention_gives(
    tiny_spec: Callable[..., ModelSpec], random_decoder: Callable[..., Decoder], family: dict[str, object]
) -> None:
    model = random_decoder(tiny_spec(**family))
    attention = model.model.layers[0].self_attn
    x_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    table = None if family else model._rotary_table(x_BTD)[:7]
    with torch.no_grad():
        v_BTHE = attention.v_proj(x_BTD).unflatten(-1, (-1, 16)).repeat_interleave(2, dim=2)
        mixed = torch.einsum("bhts,bshe->bthe", attention.weights(x_BTD, table), v_BTHE).flatten(2)
        torch.testing.assert_close(attention.o_proj(mixed), attention(x_BTD, table, 0), rtol=1e-4, atol=1e-5)
    assert look(model, IDS).attention_LHTT.sum(-1) == pytest.approx(torch.ones(2, 4, 5), abs=1e-5)


def test_looking_leaves_the_model_as_it_was(
    tiny_spec: Callable[..., ModelSpec], random_decoder: Callable[..., Decoder]
) -> None:
    model = random_decoder(tiny_spec())
    look(model, IDS)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert look(model, [3]).next_logprobs_LT.shape == (3, 0)
    for wrong in ([], [1] * 33):
        with pytest.raises(UsageError, match="cannot be looked into"):
            look(model, wrong)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_how_long_a_text_may_be_follows_from_the_work() -> None:
    small = ModelSpec(2048, 4, 256, 4, 2, head_width=64, ffn_width=704, context_length=1024)
    assert most_tokens(small) == MOST_TOKENS
    assert most_tokens(dataclasses.replace(small, context_length=20)) == 20
    wide = dataclasses.replace(small, vocab_size=152_000, width=1024, num_layers=28)
    assert most_tokens(wide) == LEAST_TOKENS  # 9 billion operations a token
    many = dataclasses.replace(small, num_layers=48, num_heads=25, num_kv_heads=25)
    assert most_tokens(many) == int((2**21 / 1200) ** 0.5) == 41
