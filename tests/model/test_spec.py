from __future__ import annotations

import pytest

from lyceum.config import build
from lyceum.errors import ConfigError
from lyceum.model.spec import ModelConfig, ModelSpec
from lyceum.model.transformer import Decoder


def test_depth_four_gives_the_shape_of_the_demo():
    spec, notes = ModelSpec.from_depth(4, vocab_size=2048)
    assert spec == ModelSpec(
        vocab_size=2048,
        num_layers=4,
        width=128,
        num_heads=4,
        num_kv_heads=4,
        head_width=32,
        ffn_width=384,
        context_length=256,
    )
    assert [note.split(".")[0] for note in notes] == ["1", "2", "3", "4", "5", "6", "7"]
    assert notes[1].startswith("2. width = 128: ")


@pytest.mark.parametrize(("depth", "gpt3_width"), [(12, 768), (24, 2048), (96, 12288)])
def test_derived_widths_stay_within_a_tenth_of_gpt3s_table(depth, gpt3_width):
    spec, _ = ModelSpec.from_depth(depth, vocab_size=50257)
    assert abs(spec.width / gpt3_width - 1) < 0.1


@pytest.mark.parametrize("depth", range(1, 40))
def test_every_derived_width_is_a_multiple_of_64_and_fills_its_heads(depth):
    spec, _ = ModelSpec.from_depth(depth, vocab_size=512)
    assert spec.width % 64 == 0 and spec.ffn_width % 64 == 0
    assert spec.num_heads * spec.head_width == spec.width


def test_an_override_replaces_its_step_and_later_steps_follow_it():
    spec, notes = ModelSpec.from_depth(4, vocab_size=2048, width=256, num_heads=4, tied=False)
    assert (spec.width, spec.head_width, spec.ffn_width, spec.tied) == (256, 64, 704, False)
    assert notes[1] == "2. width = 256: given in the recipe"


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"num_kv_heads": 3}, "4 heads cannot share 3", "divisors of 4"),
        ({"head_width": 15}, "head_width is 15", "even"),
        ({"num_layers": 0}, "num_layers is 0", "above zero"),
        ({"context_length": -1}, "context_length is -1", "above zero"),
        ({"norm": "batch"}, "norm is 'batch'", "rms or layer"),
        ({"biases": ("qkv",)}, "no linear layer qkv", "q_proj"),
        ({"biases": ("gate_proj",), "ffn": "gelu"}, "no linear layer gate_proj", "up_proj"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused_with_a_hint(tiny_spec, changes, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_spec(**changes)
    assert hint in caught.value.hint


GPT2_WORDS = {"norm": "layer", "positions": "learned", "ffn": "gelu", "qk_norm": False}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", [{}, {"qk_norm": False}, {"biases": ("k_proj", "down_proj")}, GPT2_WORDS])
def test_counted_parameters_are_the_models_parameters(tiny_spec, tied, words):
    spec = tiny_spec(tied=tied, **words)
    counts = spec.num_parameters()
    weights = dict(Decoder(spec).named_parameters())
    assert counts["total"] == sum(weight.numel() for weight in weights.values())
    assert counts["norms"] == sum(weight.numel() for name, weight in weights.items() if "norm" in name)
    assert counts["matrices"] == sum(weight.numel() for name, weight in weights.items() if "_proj.weight" in name)
    assert counts["biases"] == sum(weight.numel() for name, weight in weights.items() if "_proj.bias" in name)


def test_flops_of_a_token_by_hand():
    # one layer, width 64, two heads of 32, ffn 64, vocabulary 100: q, k, v, o are 64x64 each, gate, up, down too:
    # 7 * 4096 = 28,672 weights, and 6,400 of the output layer. Attention over 10 tokens: 6 * 1 * 2 * 32 * 10 = 3,840.
    spec = ModelSpec(100, 1, 64, 2, 2, 32, 64, context_length=10)
    assert spec.flops_per_token() == 6 * (28672 + 6400) + 3840
    assert spec.flops_per_token(20) == 6 * (28672 + 6400) + 2 * 3840


def test_recipe_table_becomes_a_spec():
    config = build(ModelConfig, {"depth": 2, "heads": 4, "kv_heads": 2, "tied": False, "rope_theta": 5000}, "[model]")
    spec, notes = config.derive(512)
    assert (spec.num_layers, spec.width, spec.num_heads, spec.num_kv_heads, spec.head_width) == (2, 64, 4, 2, 16)
    assert (spec.tied, spec.rope_theta, spec.vocab_size) == (False, 5000.0, 512)
    assert config.spec(512) == spec and len(notes) == 7


@pytest.mark.parametrize("name", ["width", "ffn_width"])
def test_recipe_width_that_other_runtimes_refuse_is_an_error_that_names_the_next_one(name):
    with pytest.raises(ConfigError, match=f"{name} = 100") as caught:
        ModelConfig(**{name: 100}).spec(512)
    assert "use 128" in caught.value.hint
