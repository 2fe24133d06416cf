"""Two toys that the PPO family must learn on five seeds, while with rewards shuffled inside the batch it does not.

count      say one word as often as possible; the policy begins with no preference
reverse    say the two words of the prompt in reverse; the policy begins as one that imitated careless examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy_toy import MARK, NUM_WORDS, SPEC, GroupToy, Toy, lines, train

from lyceum.batches.pairs import Prompts
from lyceum.model.transformer import Decoder
from lyceum.stages.algorithms import OnPolicyConfig
from lyceum.stages.grpo import GRPOConfig
from lyceum.stages.ppo import PPOConfig
from lyceum.train.losses import next_token_loss

SHARED: dict[str, Any] = {
    "warmup": 0.0, "decay": 0.5, "log_every": 1, "save_every": 0, "engine_batch": 48, "micro_tokens": 4096,
    "kl_beta": 0.1, "missing_end": "keep", "iterations": 14,
}  # fmt: skip
PPO = PPOConfig(prompts_per_iteration=48, epochs=2, minibatches=1, lr=8e-3, critic_lr=8e-3, **SHARED)
METHODS: dict[str, OnPolicyConfig] = {
    "ppo": PPO,
    **{
        name: GRPOConfig(algorithm=name, prompts_per_iteration=6, group_size=8, lr=1e-2, **SHARED)
        for name in ("grpo", "rloo", "reinforce++")
    },
}
# task -> how far the mean reward must rise, and nats that the KL may reach (of 4 words out of 14: at most 10.6)
MARGINS = {"count": (0.25, 9.0), "reverse": (0.1, 3.0)}
PAIRS = list(permutations(range(NUM_WORDS), 2))


def count_fives(prompts: Any, responses: Sequence[Sequence[int]], meta: Any) -> list[float | None]:
    return [sum(token == 5 for token in response) / len(response) for response in responses]


def reversal(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], meta: Any) -> list[float | None]:
    """The share of places that are right."""
    pairs = zip(prompts, responses, strict=True)
    return [sum(a == b for a, b in zip(prompt[:0:-1], response, strict=True)) / 2 for prompt, response in pairs]


@cache
def careless(seed: int) -> Decoder:
    """A policy that imitated reversals of which every second word was drawn by lot."""
    chance = torch.Generator().manual_seed(seed)
    model = Decoder(SPEC, chance)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        asked_B2 = torch.tensor(PAIRS)[torch.randint(len(PAIRS), (64,), generator=chance)]
        lot_B2 = torch.randint(NUM_WORDS, (64, 2), generator=chance)
        said_B2 = torch.where(torch.rand(64, 2, generator=chance) < 0.5, asked_B2.flip(1), lot_B2)
        tokens_BT = torch.cat([torch.full((64, 1), MARK), asked_B2, said_B2], 1)
        weights_BT = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]).expand(64, 5)
        total, count, _ = next_token_loss(model, tokens_BT, weights_BT)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model


def learned(folder: Path, task: str, config: OnPolicyConfig, seed: int, *, shuffled: bool = False) -> tuple[float, ...]:
    """The mean reward of the first iteration and of the last three, and their KL in nats a reply."""
    judge, turn = {"count": count_fives, "reverse": reversal}[task], iter(range(10**6))

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        scores = judge(prompts, responses, meta)
        if shuffled:
            order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(next(turn)))
            scores = [scores[i] for i in order]
        return scores

    length = 4 if task == "count" else 2
    if task == "count":
        asked, model = Prompts([[MARK, word] for word in range(NUM_WORDS)], [{}] * NUM_WORDS), even(seed)
    else:
        asked, model = Prompts([[MARK, *pair] for pair in PAIRS], [{}] * len(PAIRS)), careless(seed)
    make = Toy if isinstance(config, PPOConfig) else GroupToy
    stage = make(replace(config, max_response_tokens=length), reward, model=model, stop_ids=(), prompts=asked)
    train(stage, folder, seed)
    first, *rest = lines(folder)
    scores, kls = ([line[name] for line in rest[-3:]] for name in ("objective/scores", "objective/kl"))
    return first["objective/scores"], sum(scores) / 3, sum(kls) / 3


def even(seed: int) -> Decoder:
    return Decoder(SPEC, torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["count", "reverse"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_every_method_learns_and_shuffled_rewards_teach_nothing(
    task: str, method: str, seed: int, tmp_path: Path
) -> None:
    before, after, kl = learned(tmp_path / "true", task, METHODS[method], seed)
    start, control, _ = learned(tmp_path / "control", task, METHODS[method], seed, shuffled=True)
    print(
        f"{task}, {method}, seed {seed}: {before:.2f} to {after:.2f} at KL {kl:.2f}; control {start:.2f} to {control:.2f}"
    )
    rise, bound = MARGINS[task]
    assert after > before + rise and after > control + 0.25 and control < start + 0.1 and 0 < kl < bound
