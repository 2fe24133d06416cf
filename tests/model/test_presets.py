"""Published shapes: their counts are the published ones and those of transformers' own classes."""

from __future__ import annotations

import pytest
import torch
import transformers

from lyceum.config import build
from lyceum.errors import ConfigError
from lyceum.model.hub import family_of
from lyceum.model.presets import INFERRED, SHAPES, Shape, buildable, find_shape
from lyceum.model.spec import ModelConfig

PUBLISHED = {  # the released weights' own counts; GPT-3 was never released
    "gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
}
PAPER = {  # table 2.1 of Brown et al. 2020, in millions
    "gpt3-small": 125,
    "gpt3-medium": 350,
    "gpt3-large": 760,
    "gpt3-xl": 1_300,
    "gpt3-2.7b": 2_700,
    "gpt3-6.7b": 6_700,
    "gpt3-13b": 13_000,
    "gpt3-175b": 175_000,
}


def oracle(shape: Shape) -> torch.nn.Module:
    """The class of transformers with these numbers, without memory for its weights."""
    if shape.family in ("gpt1", "gpt2"):
        cls = transformers.OpenAIGPTConfig if shape.family == "gpt1" else transformers.GPT2Config
        config = cls(
            vocab_size=shape.vocab_size,
            n_positions=shape.context_length,
            n_embd=shape.width,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
        )
    else:
        cls = transformers.LlamaConfig if shape.family == "llama" else transformers.Qwen3Config
        config = cls(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.ffn_width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_width,
            max_position_embeddings=shape.context_length,
            tie_word_embeddings=shape.tied,
        )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_the_published_one(name: str) -> None:
    assert SHAPES[name].num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize(
    "name", ["gpt", "gpt2", "gpt3-xl", "gpt3-13b", "qwen3-0.6b", "qwen3-8b", "llama3.2-1b", "llama2-7b"]
)
def test_the_count_is_that_of_transformers_class(name: str) -> None:
    assert SHAPES[name].num_parameters() == sum(p.numel() for p in oracle(SHAPES[name]).parameters())


@pytest.mark.parametrize("name", PAPER)
def test_gpt3s_counts_are_within_two_hundredths_of_the_tables_round_ones(name: str) -> None:
    assert SHAPES[name].num_parameters() / 1e6 == pytest.approx(PAPER[name], rel=0.02)


def test_every_shape_is_checked_against_a_number_and_its_heads_fill_it() -> None:
    assert set(SHAPES) == set(PUBLISHED) | set(PAPER)
    for name, shape in SHAPES.items():
        assert shape.num_heads % shape.num_kv_heads == 0
        if shape.family != "qwen3":
            assert shape.num_heads * shape.head_width == shape.width, name


def test_the_apis_names_have_the_widths_of_its_embeddings() -> None:
    assert [find_shape(name).width for name in INFERRED] == [1024, 2048, 4096, 12288]


def test_a_preset_in_a_recipe_makes_its_shape_with_the_recipes_vocabulary() -> None:
    spec, notes = build(ModelConfig, {"preset": "Qwen3-0.6B", "context_length": 512}, "[model]").derive(2048)
    assert (spec.num_layers, spec.width, spec.head_width, spec.tied, spec.rope_theta) == (28, 1024, 128, True, 1e6)
    assert (spec.vocab_size, spec.context_length, spec.qk_norm) == (2048, 512, True)
    assert spec.num_parameters()["total"] == PUBLISHED["qwen3-0.6b"] - (151936 - 2048) * 1024
    assert "3. width = 1024: preset Qwen3-0.6B" in notes
    untied = ModelConfig(preset="llama2-7b").spec(32000)
    gpt2 = ModelConfig(preset="gpt2").spec(50257)
    assert family_of(gpt2) == "gpt2" and gpt2.num_parameters()["total"] == PUBLISHED["gpt2"]
    assert not untied.tied and not untied.qk_norm and untied.num_parameters()["total"] == PUBLISHED["llama2-7b"]


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ({"preset": "qwen3-0.8b"}, "no preset 'qwen3-0.8b'", "qwen3-0.6b"),
        ({"preset": "gpt"}, "GPT-1 has its norms after", ", ".join(buildable())),
        ({"preset": "qwen3-4b", "depth": 8, "heads": 4}, "depth = 8 is given too", "leave out depth, heads"),
    ],
)
def test_a_preset_that_cannot_be_made_is_an_error_with_a_hint(table: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(ModelConfig, table, "[model]").derive(2048)
    assert hint in caught.value.hint
