"""Three toys that the PPO family must learn on five seeds, while with rewards shuffled inside the batch it does not.

count      say one word as often as possible; the policy begins with no preference
reverse    say the two words of the prompt in reverse; the policy begins as one that imitated careless examples
walks      go by one-way roads so that the goal is passed as often as can be; the policy begins as one that imitated walks at
           random (trlX's random walks, but that nobody stays at the goal: where no choice is left there is no KL to pay, so
           shuffled rewards lead there too)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
# task -> how far the mean reward must rise, nats that the KL may reach (of 4 words out of 14: at most 10.6), and how far the
# reward may rise by noise alone, which makes a policy surer: who imitated walks then takes fewer roads that are none
MARGINS = {"count": (0.25, 9.0, 0.1), "reverse": (0.1, 3.0, 0.1), "walks": (0.3, 8.0, 0.25)}
GOAL, STEPS = 0, 6  # of a walk
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


@cache
def roads(seed: int) -> tuple[tuple[int, ...], ...]:
    """From each of twelve places three one-way roads, by which the goal can be reached from everywhere."""
    chance = random.Random(seed)
    while True:
        others = [[to for to in range(NUM_WORDS) if to != place] for place in range(NUM_WORDS)]
        found = tuple(tuple(chance.sample(places, 3)) for places in others)
        if min(most_visits(found, STEPS)) > 0:
            return found


def most_visits(ways: Sequence[Sequence[int]], steps: int) -> list[int]:
    """How often a walk of so many steps can come to the goal, from each place."""
    best = [0] * len(ways)
    for _ in range(steps):
        best = [max((to == GOAL) + best[to] for to in each) for each in ways]
    return best


def visits(ways: Sequence[Sequence[int]]) -> Callable[..., list[float | None]]:
    """How often the goal was visited, of how often it could have been; 0 where there is no such road."""

    def judge(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], meta: Any) -> list[float | None]:
        found: list[float | None] = []
        for (*_, start), reply in zip(prompts, responses, strict=True):
            legs = zip([start, *reply], reply, strict=False)
            is_walk = all(here < len(ways) and to in ways[here] for here, to in legs)
            found.append(list(reply).count(GOAL) / most_visits(ways, len(reply))[start] if is_walk else 0.0)
        return found

    return judge


def test_walks_are_scored_by_hand() -> None:
    ways = [[1, 2], [0, 2], [1, 3], [2, 1]]
    assert most_visits(ways, 3) == [1, 2, 1, 1] and most_visits(ways, 4) == [2, 2, 2, 2]  # from 1: 0, 1, 0
    replies = {(1, 0, 1, 0): 1.0, (1, 0, 2, 1): 0.5, (2, 1, 0): 1.0, (2, 3, 1): 0.0, (0, 1, 0): 0.0, (1, 13, 0): 0.0}
    found = visits(ways)([[MARK, 3]] * len(replies), list(replies), None)
    assert found == pytest.approx(list(replies.values()))


@cache
def wanderer(seed: int) -> Decoder:
    """A policy that imitated walks which take any road at each place."""
    chance = random.Random(seed)
    model = Decoder(SPEC, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 160)
        rows = []
        for _ in range(48):
            row = [MARK, chance.randrange(NUM_WORDS)]
            while len(row) < STEPS + 2:
                row.append(chance.choice(roads(seed)[row[-1]]))
            rows.append(row)
        tokens_BT = torch.tensor(rows)
        weights_BT = torch.ones(len(rows), STEPS + 2)
        weights_BT[:, :2] = 0
        total, count, _ = next_token_loss(model, tokens_BT, weights_BT)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model


def learned(folder: Path, task: str, config: OnPolicyConfig, seed: int, *, shuffled: bool = False) -> tuple[float, ...]:
    """The mean reward of the first iteration and of the last three, and their KL in nats a reply."""
    judges: dict[str, Any] = {"count": count_fives, "reverse": reversal, "walks": visits(roads(seed))}
    judge, turn = judges[task], iter(range(10**6))

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        scores = judge(prompts, responses, meta)
        if shuffled:
            order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(next(turn)))
            scores = [scores[i] for i in order]
        return scores

    begins: dict[str, tuple[Any, Callable[[int], Decoder], int]] = {  # prompts, policy, length
        "count": ([[MARK, word] for word in range(NUM_WORDS)], even, 4),
        "reverse": ([[MARK, *pair] for pair in PAIRS], careless, 2),
        "walks": ([[MARK, place] for place in range(NUM_WORDS)], wanderer, STEPS),
    }
    prompts, policy, length = begins[task]
    make = Toy if isinstance(config, PPOConfig) else GroupToy
    asked, config = Prompts(prompts, [{}] * len(prompts)), replace(config, max_response_tokens=length)
    if task == "walks":  # at a higher rate noise alone carries a policy so far that its reward changes, up or down
        config = replace(config, lr=4e-3, iterations=11)
    stage = make(config, reward, model=policy(seed), stop_ids=(), prompts=asked)
    train(stage, folder, seed)
    first, *rest = lines(folder)
    scores, kls = ([line[name] for line in rest[-3:]] for name in ("objective/scores", "objective/kl"))
    return first["objective/scores"], sum(scores) / 3, sum(kls) / 3


def even(seed: int) -> Decoder:
    return Decoder(SPEC, torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("task", MARGINS)
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
    rise, bound, noise = MARGINS[task]
    assert after > before + rise and after > control + 0.25 and control < start + noise and 0 < kl < bound
