"""The decoder against transformers' classes: the same weights give the same logits and the same gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lyceum.errors import UsageError
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder


def oracle(spec: ModelSpec) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if spec.qk_norm else (LlamaConfig, LlamaForCausalLM)
    return model_class(
        config_class(
            vocab_size=spec.vocab_size,
            hidden_size=spec.width,
            intermediate_size=spec.ffn_width,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_width,
            max_position_embeddings=spec.context_length,
            rms_norm_eps=spec.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
            tie_word_embeddings=spec.tied,
        )
    )


@pytest.fixture
def tokens():
    return torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("both_forms")
def test_logits_and_gradients_are_those_of_transformers(tiny_spec, random_decoder, tokens, qk_norm, tied):
    ours = random_decoder(tiny_spec(qk_norm=qk_norm, tied=tied, norm_eps=1e-3)).double()
    theirs = oracle(ours.spec).double()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])  # tied: transformers lists the shared weight twice
    our_logits, their_logits = ours.logits(ours(tokens)), theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-5)  # transformers rotates in fp32
    grad = torch.randn(our_logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    our_logits.backward(grad)
    their_logits.backward(grad)
    their_gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        largest = their_gradients[name].abs().max().item()
        torch.testing.assert_close(weight.grad, their_gradients[name], rtol=1e-4, atol=1e-4 * largest, msg=name)


def test_plain_form_of_every_layer_gives_the_same_logits_and_gradients(tiny_spec, random_decoder, tokens, monkeypatch):
    results = []
    for smallest in (0, math.inf):
        monkeypatch.setattr("lyceum.model.layers.MIN_NUMBERS", smallest)
        decoder = random_decoder(tiny_spec()).double()
        logits = decoder.logits(decoder(tokens))
        logits.square().mean().backward()
        results.append([logits, *(weight.grad for weight in decoder.parameters())])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


def test_plain_form_runs_in_bfloat16(tiny_spec, random_decoder, tokens):
    decoder = random_decoder(tiny_spec())
    exact = decoder(tokens)
    rounded = decoder.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_weights_are_a_function_of_the_seed(tiny_spec):
    first, same, other = (Decoder(tiny_spec(), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for (name, weight), again, different in zip(
        first.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, again)
        assert "norm" in name or not torch.equal(weight, different)


def test_fresh_weights_have_gpt2s_deviations():
    spec, _ = ModelSpec.from_depth(4, vocab_size=2048)
    decoder = Decoder(spec, torch.Generator().manual_seed(0))
    for name, weight in decoder.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:  # 0.02 / sqrt(8) = 0.00707 where the stream is written to
            expected = 0.00707 if "o_proj" in name or "down_proj" in name else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.02), name


def test_fresh_model_predicts_nearly_uniformly():
    spec, _ = ModelSpec.from_depth(4, vocab_size=2048)
    decoder = Decoder(spec, torch.Generator().manual_seed(0))
    tokens = torch.randint(2048, (2, 65), generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(
        decoder.logits(decoder(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert abs(loss.item() - 7.62) < 0.1  # ln 2048 = 7.625


def test_a_row_longer_than_the_context_is_an_error_with_both_lengths(tiny_spec):
    with pytest.raises(UsageError, match="33 tokens does not fit the model's context of 32"):
        Decoder(tiny_spec())(torch.zeros(1, 33, dtype=torch.long))


def test_a_deep_copy_shares_nothing_and_computes_the_same(tiny_spec, random_decoder, tokens):
    decoder = random_decoder(tiny_spec())
    before = decoder(tokens).detach()
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.zero_()
    assert torch.equal(twin(tokens), before)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.usefixtures("both_forms")
def test_hidden_states_at_some_positions_are_those_of_all_with_their_gradients(
    tiny_spec, random_decoder, tokens, qk_norm
):
    at = torch.tensor([0, 7, 19, 20, 58, 7])  # of 3 x 20, one of them twice
    grad = torch.randn(6, tiny_spec().width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for picks in (True, False):
        decoder = random_decoder(tiny_spec(qk_norm=qk_norm)).double()
        hidden = decoder(tokens, at_N=at) if picks else decoder(tokens).flatten(0, 1)[at]
        hidden.backward(grad)
        results.append([hidden, *(weight.grad for weight in decoder.parameters())])
    for some, all_ in zip(*results, strict=True):
        torch.testing.assert_close(some, all_, rtol=1e-9, atol=1e-12)


def test_the_last_layer_leaves_out_what_nobody_asks_for(tiny_spec, random_decoder, tokens):
    decoder = random_decoder(tiny_spec())
    rows = []
    for layer in decoder.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, out: rows.append(out.numel() // out.shape[-1]))
    decoder(tokens, at_N=torch.tensor([3, 4]))
    assert rows == [60] * (len(rows) - 1) + [2]
