"""Tiny models with every weight random, so that no gain of 1 and no small matrix hides a mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder


@pytest.fixture
def tiny_spec() -> Callable[..., ModelSpec]:
    """Make a spec of two layers, four heads that share two key/value heads, 64 wide, and any changes to it."""

    def make(**changes: object) -> ModelSpec:
        spec = ModelSpec(96, 2, 64, 4, 2, head_width=16, ffn_width=128, context_length=32, rope_theta=5000.0)
        return dataclasses.replace(spec, **changes)

    return make


@pytest.fixture
def random_decoder() -> Callable[[ModelSpec], Decoder]:
    def make(spec: ModelSpec) -> Decoder:
        generator = torch.Generator().manual_seed(5)
        decoder = Decoder(spec, generator)
        with torch.no_grad():
            for weight in decoder.parameters():
                weight.add_(torch.empty_like(weight).normal_(0.0, 0.2, generator=generator))
        return decoder

    return make


@pytest.fixture(params=["fast", "plain"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test twice: with the hand-written forms, whatever the size, and with the plain ones."""
    monkeypatch.setattr("lyceum.model.layers.MIN_NUMBERS", 0 if request.param == "fast" else float("inf"))
