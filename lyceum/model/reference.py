"""The reference: the policy as it was when training began, for as little memory as that takes.

Why one function: what is trained decides how much of a second model is needed, and nothing else has to know. Whatever
the policy keeps frozen is shared; only what will move is copied.

    a copy               everything is trained: a whole second model
    a shared trunk       `train_top_layers` froze the lower layers: both stand on them, the upper ones are copied
    disabled adapters    low-rank adapters are trained: the base is shared, and the reference has no adapters at all

    train_top_layers(policy, 2); reference = reference_of(policy); ...train policy...

The answer is a Decoder like any other: losses, the engine and checkpoints take it as it is. Source: the shared trunk is
trlX's "hydra" model; the base below adapters as a reference, TRL's.
What it is not: log-probabilities kept on disk, for training that never samples.
"""

from __future__ import annotations

import copy

import torch

from lyceum.errors import ConfigError
from lyceum.model.lora import LoraLinear
from lyceum.model.transformer import Decoder


def train_top_layers(policy: Decoder, num_layers: int) -> None:
    """Freeze all but the last `num_layers` layers, the norm after them and an output layer of its own, in place.

    A tied output is the embedding and stays frozen with it. Raises ConfigError where that would train nothing new:
    fewer than one layer, or more than there are.
    """
    there = policy.spec.num_layers
    if not 1 <= num_layers <= there:
        raise ConfigError(
            f"{num_layers} trained layers of a model that has {there}", hint=f"choose from 1 to {there}, or 0 for all"
        )
    policy.requires_grad_(False)
    for layer in policy.model.layers[there - num_layers :]:
        layer.requires_grad_(True)
    policy.model.norm.requires_grad_(True)
    if policy.lm_head is not None:
        policy.lm_head.requires_grad_(True)


def reference_of(policy: Decoder) -> Decoder:
    """A frozen model that gives what `policy` gives now, and will go on giving it while the policy is trained.

    Parameters that ask for no gradient are the policy's own; adapters that add nothing yet are left out.
    """
    shared = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    reference = copy.deepcopy(policy, memo=dict(shared))
    for name, module in list(reference.named_modules()):
        if isinstance(module, LoraLinear) and not torch.any(module.lora_B.weight):
            reference.set_submodule(name, module.without_adapter())
    return reference.requires_grad_(False).eval()
