"""The dial: depth 4 gives what was measured, GPT-3's table is met, and what is given replaces its step."""

from __future__ import annotations

import pytest

from lyceum.model.presets import SHAPES
from lyceum.model.spec import ModelSpec
from lyceum.stages.pretrain import PretrainConfig
from lyceum.train.dial import turn


def at(depth: int, vocab_size: int = 2048) -> ModelSpec:
    return ModelSpec.from_depth(depth, vocab_size=vocab_size)[0]


def test_depth_four_gives_exactly_what_was_measured_there() -> None:
    dial, notes = turn(at(4))
    assert (dial.batch_tokens, dial.matrix_lr, dial.lr) == (2048, 0.03, 0.03)
    assert dial.tokens == 20 * at(4).num_parameters()["total"]
    defaults = PretrainConfig()
    assert (defaults.batch_tokens, defaults.matrix_lr, defaults.lr) == (2048, 0.03, 0.03)
    assert [note.split(" = ")[0] for note in notes] == [
        "1. tokens", "2. batch_tokens", "3. matrix_lr", "4. lr", "5. weight_decay",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("gpt3")])
def test_adamws_derived_rate_is_within_a_factor_of_two_of_gpt3s_table(name: str) -> None:
    shape = SHAPES[name]
    spec = ModelSpec(50257, shape.num_layers, shape.width, 1, 1, 64, 64, 2048)
    assert 0.5 < turn(spec, matrix_lr=0.0)[0].lr / shape.lr < 2.0


def test_from_a_laptop_to_a_rack_the_numbers_move_one_way_and_stay_sane() -> None:
    dials = [turn(at(depth, 32768))[0] for depth in (2, 4, 8, 12, 16, 24, 32)]
    for small, large in zip(dials, dials[1:], strict=False):
        assert large.tokens > small.tokens and large.batch_tokens >= small.batch_tokens
        assert large.lr < small.lr and large.num_steps > small.num_steps and large.weight_decay < small.weight_decay
    assert dials[-1].batch_tokens == 131_072 and 0.001 < dials[-1].lr < 0.002
    assert all(dial.batch_tokens.bit_count() == 1 and dial.weight_decay * dial.matrix_lr < 0.01 for dial in dials)


def test_weight_decay_forgets_the_same_share_whatever_the_length() -> None:
    # by hand: 2,048,000 tokens are 1,000 steps; 1 / (0.22 * 0.03 * 1000) = 0.1515
    assert turn(at(4), tokens=2_048_000, batch_tokens=2048)[0].weight_decay == pytest.approx(0.1515, rel=1e-3)
    for depth in (2, 12):
        dial, _ = turn(at(depth))
        assert dial.weight_decay * dial.matrix_lr * dial.num_steps == pytest.approx(1 / 0.22, rel=0.01)


def test_what_is_given_replaces_its_step_and_later_steps_follow() -> None:
    dial, notes = turn(at(8), tokens=80_000_000, lr=0.01, weight_decay=0.0)
    assert (dial.tokens, dial.batch_tokens, dial.lr, dial.weight_decay) == (80_000_000, 4096, 0.01, 0.0)
    assert notes[0] == "1. tokens = 80,000,000: given in the recipe" and "sqrt" in notes[1]


def test_a_recipe_asks_with_zero_and_otherwise_nothing_is_derived() -> None:
    config = PretrainConfig()
    assert config.derive(at(12)) == (config, [])
    derived, notes = PretrainConfig(lr=0.0, batch_tokens=0).derive(at(12))
    assert (derived.tokens, derived.batch_tokens, derived.weight_decay) == (4_000_000, 2048, 0.0)
    assert derived.lr == pytest.approx(0.03 * 128 / at(12).width, rel=1e-3) and len(notes) == 5
