"""The reward model: equations by hand, normalisation, and that it learns a noisy rule while a control does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lyceum.batches.pairs import EncodedRanking, EncodedRankings, encode_rankings, ranking_batches
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, Ranking, write_records
from lyceum.errors import CheckpointError
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.heads import ScoreModel
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import reward
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.train import policy

SPEC = ModelSpec(32, 1, 32, 2, 2, 16, 64, 64)
CHAT: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=0))
GOOD, END = 7, 1


def score_model(seed: int = 0) -> ScoreModel:
    generator = torch.Generator().manual_seed(seed)
    return ScoreModel(Decoder(SPEC, generator), generator)


def random_rankings(count: int, responses: int, seed: int = 0) -> list[EncodedRanking]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = rng.integers(2, 32, rng.integers(1, 5)).tolist()
        rows = [prompt + rng.integers(2, 32, rng.integers(1, 7)).tolist() + [END] for _ in range(responses)]
        made.append(EncodedRanking(rows, tuple((rng.permutation(responses) + 1.0).tolist()), None, {}))
    return made


class InMemory(reward.Reward):
    """The stage over rankings in memory."""

    def __init__(
        self, config: reward.RewardConfig, train: list[EncodedRanking], valid: list[EncodedRanking], seed: int = 0
    ) -> None:
        super().__init__(config)
        self.given = EncodedRankings(train, 0, 0), EncodedRankings(valid, 0, 0)
        self.init_seed = seed

    def start(self, work: Work) -> None:
        self.begin(score_model(self.init_seed), *self.given, CHAT, seed=work.seed)


def work_in(folder: Path, inputs: dict[str, Path] | None = None, seed: int = 0) -> Work:
    return Work(StageFolder(folder), inputs or {}, seed, Recipe("test", seed, {}, (), folder / "recipe.toml"))


def train(stage: reward.Reward, folder: Path, seed: int = 0) -> dict[str, Any]:
    return reward.run_stage(stage, work_in(folder, seed=seed))


# ---------------------------------------------------------------- equations


def test_differences_accuracy_and_calibration_by_hand() -> None:
    # ranks 1, 2, 2: the first beats both, the tie makes no pair
    assert reward.differences([3.0, 1.0, 5.0], [1, 2, 2]) == [2.0, -2.0]
    assert reward.accuracy([[2.0, -2.0], [1.0], [0.0]])[0] == (1 + 1 + 0.5) / 4
    # all four say 0.75 (margin log 3); three are right: no error. Two right: an error of a quarter.
    odds = math.log(3)
    assert reward.calibration_error([odds, odds, odds, -odds]) == pytest.approx(0.0)
    assert reward.calibration_error([odds, odds, -odds, -odds]) == pytest.approx(0.25)
    assert reward.length_correlation([[1.0, 2.0], [7.0, 5.0]], [[3, 5], [9, 5]]) == pytest.approx(1.0)


def test_accuracy_interval_draws_prompts_not_pairs() -> None:
    # 40 prompts of 6 pairs, each wholly right or wholly wrong: as uncertain as 40 coins, not as 240
    by_prompt = [[1.0] * 6 if i % 2 else [-1.0] * 6 for i in range(40)]
    value, low, high = reward.accuracy(by_prompt)
    assert value == 0.5
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)


def test_soft_labels_become_pair_probabilities() -> None:
    rankings = [
        EncodedRanking([[2, 1], [3, 1]], (1, 2), (0.6, 0.2), {}),
        EncodedRanking([[2, 1], [3, 1]], (1, 2), None, {}),
    ]
    (batch,) = ranking_batches(EncodedRankings(rankings, 0, 0), CHAT, 100, 0)
    pairs = policy.ranking_pairs(batch.ranks_B, batch.group_B)
    probability = reward.pair_probabilities(batch, pairs)
    assert probability is not None and sorted(probability.tolist()) == pytest.approx([0.75, 1.0])


def test_judge_reports_noisy_and_clean_accuracy_beside_length_and_ceiling() -> None:
    rows = [[2] * 2, [2] * 3, [2] * 4]  # the longer one is better by the clean order; every second order is reversed
    rankings = [
        EncodedRanking(rows, (1, 2, 3) if i % 2 else (3, 2, 1), None, {"clean_ranks": [3, 2, 1]}) for i in range(4)
    ]
    found = reward.judge([[0.0, 1.0, 2.0]] * 4, rankings)
    assert (found["accuracy_clean"], found["accuracy_noisy"], found["noisy_ceiling"]) == (1.0, 0.5, 0.5)
    assert (found["length_baseline"], found["length_baseline_clean"]) == (0.5, 1.0)
    assert found["length_correlation"] == pytest.approx(1.0)
    assert sum(found["margins"]["counts"]) == found["pairs"] == 12


# ---------------------------------------------------------------- scores and loss


def test_score_is_that_of_the_last_real_token_whatever_the_batch() -> None:
    model = score_model()
    rows = [row for ranking in random_rankings(6, 3) for row in ranking.rows]
    alone = [model(torch.tensor([row]))[0, -1].item() for row in rows]
    for micro_tokens in (1, 30, 10_000):
        assert reward.score_responses(model, rows, micro_tokens=micro_tokens) == pytest.approx(alone, abs=1e-5)
    assert reward.score_responses(model, rows, 0.5) == pytest.approx([s - 0.5 for s in alone], abs=1e-5)


def test_loss_is_the_k_wise_loss_with_one_forward_per_response(monkeypatch: pytest.MonkeyPatch) -> None:
    rankings = random_rankings(3, 4)
    stage = InMemory(reward.RewardConfig(batch_prompts=3), rankings, [])
    stage.start(work_in(Path("unused")))
    seen: list[int] = []
    stage.model.decoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))  # ends of responses
    (step,) = list(stage.steps(0))
    total = sum(float(stage.loss(batch)[0]["ranking"].total.detach()) for batch in step.micro_batches)
    prompts = sum(stage.counts(batch)["ranking"] for batch in step.micro_batches)
    assert sum(seen) == 12 and prompts == 3
    expected = 0.0
    for ranking in rankings:
        margins = reward.differences(reward.score_responses(stage.model, ranking.rows), ranking.ranks)
        assert len(margins) == 6
        expected += sum(math.log1p(math.exp(-margin)) for margin in margins) / 6
    assert total == pytest.approx(expected, rel=1e-5)


def test_another_cut_into_micro_batches_gives_the_same_training(tmp_path: Path) -> None:
    rankings = random_rankings(12, 3)
    losses = []
    for micro_tokens in (40, 4000):
        config = reward.RewardConfig(batch_prompts=6, epochs=2, log_every=1, micro_tokens=micro_tokens, centring=0.01)
        train(InMemory(config, rankings, []), tmp_path / str(micro_tokens))
        lines = (tmp_path / str(micro_tokens) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4


# ---------------------------------------------------------------- normalisation


def test_saved_model_has_mean_zero_and_deviation_one_and_keeps_every_preference(tmp_path: Path) -> None:
    rankings, valid = random_rankings(8, 3), random_rankings(10, 3, seed=1)
    stage = InMemory(reward.RewardConfig(batch_prompts=4), rankings, valid)
    result = train(stage, tmp_path)
    loaded = reward.RewardModel.load(tmp_path / "checkpoint")
    rows = [row for ranking in valid for row in ranking.rows]
    scores = np.array(loaded.score([row[:1] for row in rows], [row[1:] for row in rows], [{}] * len(rows)), dtype=float)
    assert abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5
    raw = np.array(reward.score_responses(stage.model, rows))  # the weights in training were not touched
    assert (np.argsort(raw) == np.argsort(scores)).all()
    np.testing.assert_allclose((scores + loaded.centre) * result["reward_scale"], raw, atol=1e-5)
    assert result["normalised_on"] == "rankings/valid.jsonl, 30 responses"


def test_language_model_is_refused_as_a_reward_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Decoder(SPEC))
    with pytest.raises(CheckpointError, match="not a reward model"):
        reward.RewardModel.load(tmp_path)


# ---------------------------------------------------------------- from files


def test_stage_reads_files_and_reports_what_it_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["what is it? yes no maybe it is so " * 20], 280)
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "sft" / "checkpoint", Decoder(spec), tokenizer)

    def ranking(ranks: tuple[float, float], answer: str = "yes") -> Ranking:
        prompt = Conversation((Message("user", "what is it?"),))
        return Ranking(prompt, (Message("assistant", answer), Message("assistant", "no")), ranks, origin="rule")

    rows = [ranking((1, 2))] * 5 + [ranking((1, 1))] * 2 + [ranking((1, 2), "yes " * 90)]
    write_records(tmp_path / "rankings" / "train.jsonl", rows)
    write_records(tmp_path / "rankings" / "valid.jsonl", [ranking((1, 2))])
    work = work_in(tmp_path / "reward", {"policy": tmp_path / "sft", "rankings": tmp_path / "rankings"})
    result = reward.run(reward.RewardConfig(epochs=2), work)
    assert result["rankings"]["train"] == {"kept": 5, "all_ties": 2, "too_long": 1}
    assert result["accuracy_noisy"] == 1.0 and "length_baseline" in result and "%" in result["line"]
    loaded = reward.RewardModel.load(tmp_path / "reward" / "checkpoint")
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    info = json.loads((tmp_path / "reward" / "checkpoint" / "lyceum.json").read_text())
    assert info["parent"] == "sft/checkpoint" and info["stage"] == "reward" and info["reward_centre"] == loaded.centre


def test_a_micro_batch_tells_which_rankings_are_in_it() -> None:
    tokenizer = Tokenizer.train([], 267)
    chat, rng = ChatFormat(tokenizer), np.random.default_rng(0)
    given = []
    for number in range(12):
        replies = tuple(Message("assistant", f"{number}" * rng.integers(1, 9)) for _ in range(3))
        ranks = (1.0, 1.0, 1.0) if number % 4 == 1 else tuple((rng.permutation(3) + 1.0).tolist())
        given.append(Ranking(Conversation((Message("user", f"{number}?"),)), replies, ranks, origin="rule"))
    stage = reward.Reward(reward.RewardConfig(batch_prompts=4, micro_tokens=200))
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size)
    stage.begin(ScoreModel(Decoder(spec)), encode_rankings(given, chat), EncodedRankings([], 0, 0), chat, seed=0)
    batches = [half for step in stage.steps(0) for batch in step.micro_batches for half in stage.halves(batch)]
    described = [row for batch in batches for row in stage.describe(batch)]
    assert len({row["row"] for row in described}) == len(described) == 9 * 3
    for row in described:
        words = row["row"].replace(",", "").split()  # ranking 3 of rankings, response 2; both counted from 1
        ranking, response = given[int(words[1]) - 1], int(words[-1]) - 1
        ids = [*chat.prompt(ranking.prompt), *chat.reply(ranking.responses[response]).ids]
        assert row["text"] == tokenizer.decode(ids, keep_special=True) and row["rank"] == ranking.ranks[response]


# ---------------------------------------------------------------- learning


def rule_pairs(count: int, seed: int, *, flipped: float) -> list[EncodedRanking]:
    """Pairs of which one response has GOOD somewhere; exactly the stated share is ranked the wrong way round."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(count) < flipped * count
    made = []
    for i in range(count):
        prompt = rng.integers(10, 32, 3).tolist()
        good, bad = (rng.integers(10, 32, rng.integers(3, 7)).tolist() for _ in range(2))
        good[rng.integers(len(good))] = GOOD
        ranks = (2.0, 1.0) if wrong[i] else (1.0, 2.0)
        made.append(EncodedRanking([prompt + good + [END], prompt + bad + [END]], ranks, None, {"clean_ranks": [1, 2]}))
    return made


def learn(folder: Path, seed: int, *, flipped: float, pairs: int) -> dict[str, Any]:
    config = reward.RewardConfig(epochs=1, batch_prompts=32, lr=3e-3, micro_tokens=4096)
    data = rule_pairs(pairs, 10 + seed, flipped=flipped)
    return train(InMemory(config, data, rule_pairs(600, 1000 + seed, flipped=0.1), seed), folder, seed)


def test_noisy_rule_is_learned(tmp_path: Path) -> None:
    found = learn(tmp_path, 0, flipped=0.1, pairs=1600)
    assert found["accuracy_clean"] > 0.95 and found["length_baseline_clean"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noisy_rule_is_learned_and_calibrated_and_shuffled_labels_are_not(tmp_path: Path, seed: int) -> None:
    found = learn(tmp_path / "rule", seed, flipped=0.1, pairs=8000)
    assert found["noisy_ceiling"] == pytest.approx(0.9)
    assert found["accuracy_noisy"] >= 0.9 - 0.03 and found["calibration_error"] < 0.05
    control = learn(tmp_path / "control", seed, flipped=0.5, pairs=8000)
    assert (
        abs(control["accuracy_clean"] - 0.5) < 0.25
    )  # one learned direction decides most pairs: 0.45 to 0.71 over six seeds
