"""A toy for the on-policy stages: a small policy in memory, a function as reward, and an optimum that can be enumerated.

Imported by the tests beside it (`conftest.py` makes that possible), also where one of them runs as a rank of its own.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import lyceum
from lyceum.batches.pack import TokenBatch
from lyceum.batches.pairs import Prompts
from lyceum.config import Recipe
from lyceum.log import read_metrics
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import grpo, ppo, tamer
from lyceum.stages.algorithms import OnPolicyConfig
from lyceum.stages.onpolicy import OnPolicy
from lyceum.stages.rollouts import Rollout
from lyceum.train.loop import TIMINGS, run_stage
from lyceum.train.losses import next_token_loss

SPEC = ModelSpec(14, 1, 32, 2, 2, 16, 64, 32, tied=False)
NUM_WORDS, MARK, STOP = 12, 12, 0  # tokens 0 ... 11 are words; a prompt is the mark and a word
SMALL = ppo.PPOConfig(
    iterations=2, prompts_per_iteration=12, epochs=2, minibatches=2, max_response_tokens=6, lr=2e-3, critic_lr=3e-3,
    warmup=0.0, engine_batch=12, save_every=1,
)  # fmt: skip

Score = Callable[..., list[float | None]]


def small_policy(seed: int = 0) -> Decoder:
    model = Decoder(SPEC, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a reference that prefers something
        model.output_weight.mul_(8)
        model.model.embed_tokens.weight.mul_(10)
    return model


def text_rows(start: int, count: int) -> TokenBatch:
    """Rows of a language: the next word is 3 w + 1 mod 12, nine times in ten."""
    rows = []
    for k in range(start, start + count):
        rng = np.random.default_rng([77, k])
        row = [int(rng.integers(NUM_WORDS))]
        while len(row) < 17:
            row.append((3 * row[-1] + 1) % NUM_WORDS if rng.random() < 0.9 else int(rng.integers(NUM_WORDS)))
        rows.append(row)
    weights = torch.ones(count, 17)
    weights[:, 0] = 0
    return TokenBatch(torch.tensor(rows), weights, torch.full((count,), 17))


def count_word(prompts: Sequence[Any], responses: Sequence[Sequence[int]], meta: Sequence[Any]) -> list[float | None]:
    return [sum(token == 5 for token in response) / 4 for response in responses]


class InMemory(OnPolicy):
    """An on-policy stage in memory: a small policy, twelve prompts, a function as reward."""

    def __init__(
        self, config: Any, reward: Score = count_word, *, model: Decoder | None = None, text: Any = None,
        stop_ids: tuple[int, ...] = (STOP,), num_prompts: int = NUM_WORDS, prompts: Prompts | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, reward)
        self.model, self.given_text, self.stops = model or small_policy(), text, stop_ids
        words = range(num_prompts)
        self.given = prompts or Prompts([[MARK, word] for word in words], [{"word": word} for word in words])

    def start(self, work: Work) -> None:
        model = copy.deepcopy(self.model)
        self.begin(model, self.given, seed=work.seed, text=self.given_text, stop_ids=self.stops, pad_id=13)

    def save(self, folder: Path, snapshot: str = "") -> None:
        return None


class Toy(InMemory, ppo.PPO):
    """PPO in memory."""


class GroupToy(InMemory, grpo.GRPO):
    """The methods without a critic, in memory."""


class TamerToy(InMemory, tamer.TamerPPO):
    """TAMER+RL in memory."""

    def __init__(
        self, config: tamer.TamerConfig, *given: Any, trainer: tamer.Trainer | None = None, **named: Any
    ) -> None:
        super().__init__(config, *given, **named)
        self.trainer = trainer or tamer.SimulatedTrainer(likes_fives)


def likes_fives(prompt: Any, response: Sequence[int]) -> list[float]:
    """What a simulated trainer of the toy thinks of each token."""
    return [1.0 if token == 5 else -1.0 if token in (3, 7) else 0.0 for token in response]


def work_in(folder: Path, seed: int = 0, inputs: dict[str, Path] | None = None) -> Work:
    return Work(StageFolder(folder), inputs or {}, seed, Recipe("test", seed, {}, (), folder / "recipe.toml"))


def train(stage: OnPolicy, folder: Path, seed: int = 0) -> dict[str, Any]:
    return run_stage(stage, work_in(folder, seed))


def begun(config: ppo.PPOConfig = SMALL, **given: Any) -> Toy:
    stage = Toy(config, **given)
    stage.start(work_in(Path("unused")))
    return stage


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder / "metrics.jsonl")]


def weights(stage: OnPolicy) -> list[torch.Tensor]:
    return [p.detach().clone() for trained in stage.trained.values() for p in trained.module.parameters()]


def widened(part: Rollout, columns: int) -> Rollout:
    def pad(value: torch.Tensor) -> torch.Tensor:
        fill = 13 if value.dtype == torch.long else 0
        return F.pad(value, (0, columns), value=fill) if value.dim() == 2 else value

    return Rollout(**{name: pad(value) for name, value in vars(part).items()})


NUM_ASKED = 3  # prompts of the toy whose optimum is known


def word_table(seed: int) -> torch.Tensor:
    """A reward for every prompt and every reply of two tokens."""
    return torch.randn(NUM_ASKED, 14, 14, generator=torch.Generator().manual_seed(100 + seed))


def reply_logprobs(model: Decoder) -> torch.Tensor:
    """log pi(y1, y2 | prompt) of all prompts and replies, by enumeration."""
    found = []
    with torch.no_grad():
        for word in range(NUM_ASKED):
            rows = torch.tensor([[MARK, word, first] for first in range(14)])
            logp = torch.log_softmax(model.logits(model(rows)), -1)
            found.append(logp[:1, 1].T + logp[:, 2])
    return torch.stack(found)


PPO_ON_TABLE = ppo.PPOConfig(
    iterations=40, prompts_per_iteration=192, epochs=2, minibatches=2, max_response_tokens=2, kl_beta=0.5,
    missing_end="keep", lr=4e-3, critic_lr=4e-3, warmup=0.0, decay=0.7, log_every=1000, save_every=0,
    engine_batch=192, micro_tokens=4096,
)  # fmt: skip
GRPO_ON_TABLE = grpo.GRPOConfig(
    iterations=80, prompts_per_iteration=24, group_size=8, max_response_tokens=2, kl_beta=0.5, lr=6e-3, warmup=0.0,
    decay=0.7, log_every=1000, save_every=0, engine_batch=192, micro_tokens=4096,
)  # fmt: skip


def share_of_the_optimum(
    folder: Path, seed: int, config: OnPolicyConfig = PPO_ON_TABLE, *, shuffled: bool = False, **changed: Any
) -> tuple[float, float]:
    """Trains on `word_table`; returns (J - J_ref) / (J* - J_ref), and the total variation to the optimum.

    J = E[r] - beta KL(pi || pi_ref) is largest at pi* = pi_ref exp(r / beta) / Z, known here by enumeration.
    """
    table, beta, calls = word_table(seed), config.kl_beta, iter(range(10**6))

    def reward(prompts: Any, responses: Any, meta: Any) -> list[float | None]:
        scores = [float(table[m["word"], a, b]) for m, (a, b) in zip(meta, responses, strict=True)]
        if shuffled:
            order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(next(calls)))
            scores = [scores[i] for i in order]
        return list(scores)

    make = Toy if isinstance(config, ppo.PPOConfig) else GroupToy
    stage = make(replace(config, **changed), reward, model=small_policy(seed), stop_ids=(), num_prompts=NUM_ASKED)
    train(stage, folder, seed)
    reference, trained = reply_logprobs(stage.reference), reply_logprobs(stage.policy)
    best = torch.log_softmax((reference + table / beta).flatten(1), 1).view_as(reference)

    def objective(logp: torch.Tensor) -> float:
        return float((logp.exp() * (table - beta * (logp - reference))).sum((1, 2)).mean())

    start, end, top = (objective(logp) for logp in (reference, trained, best))
    return (end - start) / (top - start), float((trained.exp() - best.exp()).abs().sum((1, 2)).mean() / 2)


def in_two_ranks(script: str, *words: str) -> None:
    """Runs `script` as two ranks under torchrun's environment, and asserts that both end well; words[0] is a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lyceum.__file__).parents[1]), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    said = Path(words[0]).with_name("said")
    with open(said, "w") as out:
        command = [sys.executable, script, *words]
        ranks = [subprocess.Popen(command, env={**env, "RANK": rank}, stdout=out, stderr=out) for rank in "01"]
        try:
            codes = [process.wait(timeout=400) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    assert codes == [0, 0], said.read_text()


def language_loss(model: Decoder) -> float:
    batch = text_rows(10**6, 128)
    with torch.no_grad():
        total, count, _ = next_token_loss(model, batch.tokens_BT, batch.weights_BT)
    return float(total) / count


def pretrained(seed: int) -> Decoder:
    model = Decoder(replace(SPEC, tied=True), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        batch = text_rows(10**5 * seed + 16 * step, 16)
        total, count, _ = next_token_loss(model, batch.tokens_BT, batch.weights_BT)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model
