"""Answers drawn from a model, and what a reward model says of them: for the table of a run and for the comparison of two.

    written = write_answers(engine, chat, prompts, 64)
    scores = Judge(folder, max_batch=64).score([prompt + one.ids for prompt, one in zip(prompts, written)])

What it is not: a measure (`lyceum.evals.tutor_table`, `lyceum.evals.compare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lyceum.engine import sides
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.model.ensemble import load_members
from lyceum.tokens.chat import ChatFormat


@dataclass(frozen=True)
class Written:
    """A model's answer to a prompt: its ids, as text, and whether it came to its own end."""

    ids: list[int]
    text: str
    ended: bool


def write_answers(
    engine: Engine,
    chat: ChatFormat,
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Written]:
    """An answer to each prompt, in their order; seeds: of the noise, one for each prompt (needed above temperature 0)."""
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, stop_ids=chat.stop_ids, seed=seed)
        for seed in (seeds or [0] * len(prompts))
    ]
    found = sides.generate(engine, prompts, params)
    return [Written(list(one.ids), chat.parse(one.ids).content, one.finish == "stop") for one in found]


class Judge:
    """The reward model over whole rows of ids: the normalised score at the last token."""

    def __init__(self, folder: Path, max_batch: int) -> None:
        members, self.ensemble = load_members(folder)
        self.members = [
            (Engine(one.model.decoder, max_batch=max_batch), one.model.score.weight.detach()[0], one.centre)
            for one in members
        ]

    def score(self, rows: Sequence[list[int]]) -> list[float]:
        """One number for each row."""
        each = [
            [float(weight @ vector) - centre for vector in engine.encode(list(rows), at="last")]
            for engine, weight, centre in self.members
        ]
        return self.ensemble.combine(torch.tensor(each, dtype=torch.float64)).tolist()
