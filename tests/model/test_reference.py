"""The reference stays what the policy was, and shares with it whatever is not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lyceum.errors import ConfigError
from lyceum.model.lora import LoraLinear, adapt
from lyceum.model.reference import reference_of, train_top_layers
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

SPEC = ModelSpec(20, 3, 16, 2, 2, 8, 24, 16, tied=False)
WAYS: dict[str, Callable[[Decoder], None]] = {
    "copy": lambda policy: None,
    "trunk": lambda policy: train_top_layers(policy, 1),
    "adapters": lambda policy: adapt(policy, rank=2, alpha=4.0),
}
TOKENS = torch.arange(12).view(2, 6)


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS))


def moved(policy: Decoder) -> None:
    """One step of gradient descent on what is trained."""
    torch.nn.functional.cross_entropy(policy.logits(policy(TOKENS)).flatten(0, 1), TOKENS.flatten()).backward()
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                assert weight.grad is not None
                weight.sub_(weight.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_reference_is_the_policy_at_first_and_stays_when_the_policy_moves(way: str, tied: bool) -> None:
    policy = Decoder(replace(SPEC, tied=tied), torch.Generator().manual_seed(0))
    WAYS[way](policy)
    reference, before = reference_of(policy), logits(policy)
    torch.testing.assert_close(logits(reference), before)
    for _ in range(2):  # the first step moves only B of an adapter
        moved(policy)
    assert (logits(policy) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(reference), before)
    assert not any(weight.requires_grad for weight in reference.parameters())


@pytest.mark.parametrize(
    ("way", "own"),
    [
        ("copy", "everything"),
        ("trunk", ["model.layers.2.", "model.norm.", "lm_head."]),
        ("adapters", []),
    ],
)
def test_only_what_is_trained_is_held_twice(way: str, own: list[str] | str) -> None:
    policy = Decoder(SPEC, torch.Generator().manual_seed(0))
    WAYS[way](policy)
    reference = reference_of(policy)
    shared = {id(weight) for weight in policy.parameters()}
    held = [name for name, weight in reference.named_parameters() if id(weight) not in shared]
    names = [name for name, _ in reference.named_parameters()]
    assert held == (names if own == "everything" else [n for n in names if n.startswith(tuple(own))])
    assert not any(isinstance(module, LoraLinear) for module in reference.modules())


def test_adapters_that_say_something_already_are_part_of_the_reference() -> None:
    policy = Decoder(SPEC, torch.Generator().manual_seed(0))
    adapt(policy, rank=2, alpha=4.0)
    moved(policy)
    before, reference = logits(policy), reference_of(policy)
    torch.testing.assert_close(logits(reference), before)
    moved(policy)
    torch.testing.assert_close(logits(reference), before)


@pytest.mark.parametrize("number", [0, 4])
def test_layers_that_are_not_there_are_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"{number} trained layers of a model that has 3"):
        train_top_layers(Decoder(SPEC), number)
