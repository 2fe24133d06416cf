"""Twenty simulated labellers of three qualities at the real queue: the dashboard finds the careless ones, and reward models that
learn from the consensus beat those that learn from as many raw rankings, on clean held-out ones.

An answer is a row of tokens; how often it holds one of them is how good it is. A labeller of quality a orders two neighbouring
answers rightly with about that probability; the careless ones draw their order by lot. Who ranks what is the queue's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sqlalchemy", reason="needs the extra lyceum[serve]")

from lyceum.batches.pairs import EncodedRanking, EncodedRankings
from lyceum.config import Recipe
from lyceum.corpus.records import Ranking
from lyceum.evals.agreement import accuracy, differences
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.serve.feedback import read
from lyceum.serve.label.board import board
from lyceum.serve.label.office import Office
from lyceum.serve.label.queue import Labels
from lyceum.serve.label.rules import Rules
from lyceum.serve.store import Store
from lyceum.stages import reward

pytestmark = pytest.mark.slow
SPEC = ModelSpec(32, 1, 32, 2, 2, 16, 64, 64)
CHAT: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=0))
GOOD, END, LENGTH, ANSWERS = 7, 1, 12, 6
NOISE = {"good": 0.5, "fair": 1.5, "careless": float("inf")}  # deviation, where neighbours are 1 apart
PEOPLE = {f"{quality}-{n}": quality for quality, num in (("good", 7), ("fair", 7), ("careless", 6)) for n in range(num)}
TREES, RANKINGS, HELD_OUT, EPOCHS = 90, 5, 60, 8
SEEDS = range(3)


def answers(rng: np.random.Generator) -> list[list[int]]:
    """Answers that hold the good token once, twice, ..., among others."""
    rows = []
    for place in range(ANSWERS):
        row = rng.integers(8, 32, LENGTH)
        row[rng.choice(LENGTH, 1 + place, replace=False)] = GOOD
        rows.append(row.tolist())
    return rows


def text(row: Sequence[int]) -> str:
    return " ".join(map(str, row))


def worth(said: str) -> int:
    return said.split().count(str(GOOD))


def labelled(place: Path, seed: int) -> Store:
    """A store in which twenty people have ranked what the queue gave them."""
    rng = np.random.default_rng(seed)
    store = Store.open(place)
    office = Office(Labels(store.database, chance=random.Random(seed)))
    office.set_rules("boss", Rules(rankings=RANKINGS, gold_share=0.1, reviews=1))
    for as_what, num in (("rankings", TREES), ("gold_rankings", 6)):
        rows = []
        for number in range(num):
            rows_R = [{"role": "assistant", "content": text(row)} for row in answers(rng)]
            prompt = {"messages": [{"role": "user", "content": f"{2 + number % 5} {2 + number // 5 % 5}"}]}
            rows.append({"prompt": prompt, "responses": rows_R, "ranks": [*range(ANSWERS, 0, -1)]})
        office.bring(rows, as_what)
    waiting = list(PEOPLE)
    while waiting:
        for who in rng.permutation(waiting).tolist():
            task = office.labels.next(who, ("rank",))
            if task is None:
                waiting.remove(who)
                continue
            _, nodes = office.labels.seen(task)
            value = np.array([float(worth(nodes[id].content)) for id in task.shown])
            noise = NOISE[PEOPLE[who]]
            value = rng.normal(size=len(value)) if np.isinf(noise) else value + noise * rng.normal(size=len(value))
            ranks = ((-value).argsort().argsort() + 1.0).tolist()
            office.labels.submit(who, task.id, {"ranks": ranks}, consent=True)
    return store


def encoded(ranking: Ranking) -> EncodedRanking:
    """A ranking of texts that are lists of token ids, as the stage reads it."""
    prompt = [int(word) for word in ranking.prompt.messages[-1].content.split()]
    rows = [prompt + [int(word) for word in said.content.split()] + [END] for said in ranking.responses]
    return EncodedRanking(rows, ranking.ranks, None, {})


class InMemory(reward.Reward):
    """The stage over rankings in memory."""

    def __init__(self, config: reward.RewardConfig, train: list[EncodedRanking], seed: int) -> None:
        super().__init__(config)
        self.train, self.init_seed = train, seed

    def start(self, work: Work) -> None:
        generator = torch.Generator().manual_seed(self.init_seed)
        model = ScoreModel(Decoder(SPEC, generator), generator)
        self.begin(model, EncodedRankings(self.train, 0, 0), EncodedRankings([], 0, 0), CHAT, seed=work.seed)


def clean_accuracy(rankings: list[EncodedRanking], folder: Path, seed: int, epochs: int) -> float:
    """Share of clean held-out pairs in the right order, of a reward model that has read these rankings."""
    stage = InMemory(reward.RewardConfig(batch_prompts=6, epochs=epochs, lr=3e-3, log_every=1000), rankings, seed)
    work = Work(StageFolder(folder), {}, seed, Recipe("test", seed, {}, (), folder / "recipe.toml"))
    reward.run_stage(stage, work)
    rng = np.random.default_rng(1000 + seed)
    margins = []
    for _ in range(HELD_OUT):
        rows = answers(rng)
        scores = reward.score_responses(stage.model, [[3, 4, *row, END] for row in rows])
        margins.append(differences(scores, [float(rank) for rank in range(ANSWERS, 0, -1)]))
    return accuracy(margins)[0]


def test_the_dashboard_finds_the_careless_and_consensus_beats_raw_labels(tmp_path: Path) -> None:
    """As many rankings to learn from each time: the consensus on each set of answers, or what one of its five rankers said.

    All five of them, five times as many rows, are no worse than the consensus: noise by lot averages out in the model, too.
    """
    found: dict[str, list[float]] = {"consensus": [], "one": [], "all": [], "control": []}
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        folder.mkdir()
        store = labelled(folder / "store.sqlite", seed)
        told = board(Labels(store.database), {})["people"]
        careless = {one["annotator"] for one in told if one["verdict"] == "careless"}
        assert careless == {who for who, quality in PEOPLE.items() if quality == "careless"}, seed
        store.close()
        voices = {voice: read(folder / "store.sqlite", voices=voice).rankings for voice in ("consensus", "each")}
        rng = np.random.default_rng(seed)
        one = {ranking.meta["tree"]: ranking for ranking in rng.permutation(np.array(voices["each"], dtype=object))}
        data = {"consensus": voices["consensus"], "one": [*one.values()], "all": voices["each"]}
        rows = {name: [encoded(ranking) for ranking in rankings] for name, rankings in data.items()}
        rows["control"] = [replace(row, ranks=tuple(rng.permutation(row.ranks).tolist())) for row in rows["consensus"]]
        assert len(rows["one"]) == TREES >= len(rows["consensus"])
        for name, rankings in rows.items():
            epochs = EPOCHS if name != "all" else 1 + EPOCHS // RANKINGS
            found[name].append(clean_accuracy(rankings, folder / name, seed, epochs))
    means = {name: round(float(np.mean(values)), 3) for name, values in found.items()}
    gains = [ours - theirs for ours, theirs in zip(found["consensus"], found["one"], strict=True)]
    assert min(gains) > 0.02 and means["consensus"] > 0.9, found
    assert 0.35 < means["control"] < 0.65 and means["all"] > means["consensus"] - 0.02, found
