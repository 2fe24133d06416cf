"""The packed copy against the model it was made from: every family, every way tokens come."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lyceum.engine.cache import Cache, Stretch
from lyceum.model import product as product_module
from lyceum.model.heads import ScoreModel
from lyceum.model.lora import adapt
from lyceum.model.packed import PackedDecoder, can_pack, rounded
from lyceum.model.product import can_halve
from lyceum.model.transformer import Decoder

LLAMA = {"qk_norm": False}
FAMILIES = {
    "qwen3": {},
    "grouped": {"num_kv_heads": 2},
    "llama": LLAMA,
    "qwen2": {**LLAMA, "num_kv_heads": 2, "biases": ("q_proj", "k_proj", "v_proj")},
    "one bias": {"biases": ("k_proj", "up_proj")},
    "gpt2": {
        **LLAMA,
        "norm": "layer",
        "positions": "learned",
        "ffn": "gelu",
        "biases": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    },
}


def by_pieces(run, tokens_T, pieces):
    """Hidden states of one sequence that comes by pieces, beside another that decodes."""
    cache, start, parts = Cache(2, torch.device("cpu")), 0, []
    for number, piece in enumerate(tokens_T.split(pieces)):
        mate = torch.tensor([number + 1])
        window = cache.window([number], [Stretch(1, start, len(piece))])
        parts.append(run(torch.cat((mate, piece)).unsqueeze(0), cache=window)[0, 1:])
        start += len(piece)
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_the_model_itself(tiny_spec, random_decoder, family):
    decoder = random_decoder(tiny_spec(**FAMILIES[family]))
    with torch.no_grad():
        for weight in decoder.parameters():  # gains and biases too
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    tokens_T = torch.randint(96, (12,), generator=torch.Generator().manual_seed(1))
    packed = PackedDecoder(decoder)
    with torch.inference_mode():
        whole = decoder(tokens_T.unsqueeze(0))[0]
        for pieces in ([12], [5, 1, 6], [1] * 12):
            for run in (decoder, packed):
                torch.testing.assert_close(by_pieces(run, tokens_T, pieces), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.logits(whole), decoder.logits(whole))


def test_an_update_uses_the_new_weights_in_the_old_memory(tiny_spec, random_decoder):
    decoder = random_decoder(tiny_spec())
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    packed = PackedDecoder(decoder)
    before = [layer.up.weight.data_ptr() for layer in packed._layers]
    packed.update(other)
    assert [layer.up.weight.data_ptr() for layer in packed._layers] == before
    tokens_T = torch.arange(9)
    with torch.inference_mode():
        whole = other(tokens_T.unsqueeze(0))[0]
        torch.testing.assert_close(by_pieces(packed, tokens_T, [9]), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not can_halve(torch.ones(1, 1)), reason="torch was built without FBGEMM")
def test_weights_in_16_bits_are_the_rounded_weights(tiny_spec, random_decoder, monkeypatch):
    monkeypatch.setattr(product_module, "MIN_HALVED", 0)
    decoder = random_decoder(tiny_spec(num_kv_heads=2))
    halved, by_hand = PackedDecoder(decoder, half=True), PackedDecoder(decoder)
    for layer in by_hand._layers:
        for product in (layer.qkv, layer.out, layer.up, layer.down):
            product.update(product.weight.detach().half().float(), None)
    by_hand._output.update(decoder.output_weight.detach().half().float(), None)
    tokens_T = torch.randint(96, (12,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden, wanted = (by_pieces(run, tokens_T, [1] * 12) for run in (halved, by_hand))
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(halved.logits(hidden), by_hand.logits(wanted), rtol=1e-4, atol=1e-5)
        exact = PackedDecoder(decoder)
        away = (halved.logits(hidden) - exact.logits(by_pieces(exact, tokens_T, [1] * 12))).abs().max()
        assert 0 < away < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16_are_near_the_models_own_which_stay(tiny_spec, random_decoder, family):
    decoder = random_decoder(tiny_spec(**FAMILIES[family]))
    before = copy.deepcopy(decoder.state_dict())
    near = rounded(decoder, torch.bfloat16)
    assert near.state_dict().keys() == before.keys() and near.spec == decoder.spec
    for name, weight in near.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(decoder.state_dict()[name], before[name])
        assert torch.equal(weight, before[name].bfloat16())
    tokens_T = torch.randint(96, (12,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden, wanted = (by_pieces(PackedDecoder(it), tokens_T, [1] * 12).float() for it in (near, decoder))
    away = (hidden - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert 1e-4 < away.max() < 0.05


def test_what_cannot_be_read_off_is_not_packed(tiny_spec, random_decoder):
    decoder = random_decoder(tiny_spec())
    assert can_pack(decoder)
    assert not can_pack(ScoreModel(copy.deepcopy(decoder))) and not can_pack(nn.Linear(2, 2))

    class Wrapped(Decoder):
        pass

    assert not can_pack(Wrapped(decoder.spec))
    adapt(decoder, rank=2, alpha=4.0)
    assert not can_pack(decoder)
