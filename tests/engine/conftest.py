"""Models small enough to check the engine against: a real decoder, one with fixed logits, and one that recites."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

VOCAB = 97


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """Two layers, grouped heads, logits far from flat."""
    spec = ModelSpec(
        vocab_size=VOCAB,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=64,
        context_length=48,
    )
    return sharpened(Decoder(spec, torch.Generator().manual_seed(0)))


@pytest.fixture
def other_decoder(decoder: Decoder) -> Decoder:
    return sharpened(Decoder(decoder.spec, torch.Generator().manual_seed(1)))


def sharpened(decoder: Decoder) -> Decoder:
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:
                weight *= 5
    return decoder


class FixedLogits(nn.Module):
    """The same logits after every token, whatever it was."""

    def __init__(self, logits_V: Tensor, context_length: int = 1000):
        super().__init__()
        self.logits_V = logits_V
        self.spec = SimpleNamespace(vocab_size=len(logits_V), context_length=context_length)

    def forward(self, tokens_BT: Tensor, *, cache: object = None) -> Tensor:
        return torch.zeros(*tokens_BT.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.logits_V.expand(*hidden.shape[:-1], -1)


class Reciter(FixedLogits):
    """Says the ids it is given, one a step; `prompts` notes what it was asked. For one sequence at a time, greedy."""

    def __init__(self, vocab_size: int, context_length: int = 1000):
        super().__init__(torch.zeros(vocab_size), context_length)
        self.script: list[int] = []
        self.num_steps = 0

    def logits(self, hidden: Tensor) -> Tensor:
        self.num_steps += 1
        return nn.functional.one_hot(torch.tensor([self.script.pop(0)]), self.spec.vocab_size).float()


@pytest.fixture
def fixed_logits() -> Callable[..., FixedLogits]:
    return FixedLogits


@pytest.fixture
def reciter() -> Callable[..., Reciter]:
    return Reciter
