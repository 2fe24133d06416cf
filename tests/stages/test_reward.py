"""The reward model: equations by hand, normalisation, ensembles, odd input, and that it learns a noisy rule while a control
does not."""

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
from safetensors.torch import load_file

from lyceum.batches.pairs import EncodedRanking, EncodedRankings, encode_rankings, ranking_batches
from lyceum.config import Recipe
from lyceum.corpus.records import Conversation, Message, Ranking, read_rankings, write_records
from lyceum.engine.sampling import mix_seed
from lyceum.errors import CheckpointError, DataError, RunError
from lyceum.evals import agreement
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.ensemble import Ensemble
from lyceum.model.heads import ScoreModel
from lyceum.model.lineage import read_model
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.run import StageFolder, Work
from lyceum.stages import reward
from lyceum.stages.rewards import checked
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


def test_soft_labels_become_pair_probabilities() -> None:
    rankings = [
        EncodedRanking([[2, 1], [3, 1]], (1, 2), (0.6, 0.2), {}),
        EncodedRanking([[2, 1], [3, 1]], (1, 2), None, {}),
    ]
    (batch,) = ranking_batches(EncodedRankings(rankings, 0, 0), CHAT, 100, 0)
    pairs = policy.ranking_pairs(batch.ranks_B, batch.group_B)
    probability = reward.pair_probabilities(batch, pairs)
    assert probability is not None and sorted(probability.tolist()) == pytest.approx([0.75, 1.0])


def test_a_tie_is_no_pair_or_one_that_either_wins_by_half() -> None:
    given = [
        EncodedRanking([[2, 1], [3, 1], [4, 1]], (1, 1, 2), None, {}),
        EncodedRanking([[5, 1], [6, 1]], (1, 1), (0.8, 0.2), {}),  # a soft label says more than the tie
    ]
    (batch,) = ranking_batches(EncodedRankings(given, 0, 0), CHAT, 100, 0)
    for ties, expected in (("drop", [1.0, 1.0]), ("half", [0.5, 0.8, 1.0, 1.0])):
        stage = InMemory(reward.RewardConfig(ties=ties), given, [])
        pairs = stage.pairs(batch)
        probability = reward.pair_probabilities(batch, pairs)
        assert probability is not None and sorted(probability.tolist()) == pytest.approx(expected)
        assert sum(pairs.weight_P.tolist()) == pytest.approx(pairs.num_groups)
    decided = EncodedRankings([replace(given[0], ranks=(1, 2, 3))], 0, 0)
    (batch,) = ranking_batches(decided, CHAT, 100, 0)
    assert reward.pair_probabilities(batch, stage.pairs(batch)) is None  # no soft label and no tie: nothing to weigh


def test_margins_are_of_all_pairs_and_of_a_ranking() -> None:
    rows = [[2, 1], [3, 1]]
    given = [EncodedRanking(rows, (1, 2), None, {"margin": 1.5}), EncodedRanking(rows, (2, 1), None, {})]
    stage = InMemory(reward.RewardConfig(margin=0.25, batch_prompts=2), given, [])
    stage.start(work_in(Path("unused")))
    (step,) = list(stage.steps(0))
    total = sum(float(stage.loss(batch)[0]["ranking"].total.detach()) for batch in step.micro_batches)
    first, second = reward.score_responses(stage.model, rows)
    expected = math.log1p(math.exp(-(first - second - 1.75))) + math.log1p(math.exp(-(second - first - 0.25)))
    assert total == pytest.approx(expected, rel=1e-5)


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


# ---------------------------------------------------------------- what cannot be learned from, or scored


def test_what_cannot_be_scored_is_none_and_costs_its_neighbours_nothing() -> None:
    judge = reward.RewardModel(score_model(), 0.25, None)
    prompts = [[2, 3]] * 3 + [[2] * 60]
    responses = [[4, END], [], [4, 5], [6] * 5]  # ends; has no token; has no end; is beyond the context of 64
    scores = judge.score(prompts, responses)
    alone = [float(judge.model(torch.tensor([row]))[0, -1].detach()) - 0.25 for row in ([2, 3, 4, END], [2, 3, 4, 5])]
    assert scores[1] is None and scores[3] is None
    assert [scores[0], scores[2]] == pytest.approx(alone, abs=1e-6)
    assert judge.score(prompts[1:2], responses[1:2]) == [None] and judge.score([], []) == []
    with torch.no_grad():
        judge.model.score.weight.fill_(float("nan"))
    assert checked(judge.score(prompts[:1], responses[:1]), 1) == [None]  # a broken model scores nothing


def test_a_reward_model_that_reads_other_ids_is_refused(tmp_path: Path) -> None:
    ours, other = (Tokenizer.train([text * 20], 280) for text in ("what is it? yes no ", "quite another language "))
    spec = replace(SPEC, vocab_size=280)
    save_checkpoint(tmp_path / "ours", ScoreModel(Decoder(spec)), ours)
    save_checkpoint(tmp_path / "mute", ScoreModel(Decoder(spec)))
    assert reward.RewardModel.load(tmp_path / "ours", reads=ours).centre == 0.0
    with pytest.raises(CheckpointError, match="another tokenizer") as caught:
        reward.RewardModel.load(tmp_path / "ours", reads=other)
    assert "own tokenizer" in caught.value.hint
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        reward.RewardModel.load(tmp_path / "mute", reads=ours)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_file_of_nothing_but_ties_is_an_error_that_names_it(school: Path, tmp_path: Path, part: str) -> None:
    for name in ("train", "valid"):
        ranks = (1.0, 1.0) if name == part else (1.0, 2.0)
        write_records(tmp_path / "rankings" / f"{name}.jsonl", [ranking(ranks)] * 3)
    work = work_in(tmp_path / "reward", {"policy": school / "sft", "rankings": tmp_path / "rankings"})
    with pytest.raises(DataError, match=rf"{part}\.jsonl: none of 3 rankings(.|\n)*3 are all ties"):
        reward.run(reward.RewardConfig(), work)
    if part == "train":  # where a tie says something, it is enough
        report = reward.run(reward.RewardConfig(ties="half"), work)
        assert report["rankings"]["train"]["kept"] == 3 and report["rankings"]["train"]["all_ties"] == 0


def test_nothing_to_learn_from_is_said(school: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no rankings section") as caught:
        reward.run(reward.RewardConfig(), work_in(tmp_path / "reward", {"policy": school / "sft"}))
    assert "data" in caught.value.hint


# ---------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model's folder, and rankings beside it."""
    folder = tmp_path_factory.mktemp("school")
    tokenizer = Tokenizer.train(["what is it? yes no maybe it is so " * 20], 280)
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size)
    save_checkpoint(folder / "sft" / "checkpoint", Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    for part, count in (("train", 12), ("valid", 5)):
        rows = [ranking((1, 2), "yes " * (n % 3 + 1), f"what {part} {n}?") for n in range(count)]
        write_records(folder / "rankings" / f"{part}.jsonl", rows)
    return folder


def ranking(
    ranks: tuple[float, float], answer: str = "yes", question: str = "what is it?", other: str = "no", **meta: Any
) -> Ranking:
    replies = (Message("assistant", answer), Message("assistant", other))
    return Ranking(Conversation((Message("user", question),)), replies, ranks, origin="rule", meta=meta)


def school_work(school: Path, folder: Path, seed: int = 0) -> Work:
    return work_in(folder, {"policy": school / "sft", "rankings": school / "rankings"}, seed)


def test_stage_reads_files_and_reports_what_it_left_out(school: Path, tmp_path: Path) -> None:
    odd = [ranking((1, 1))] * 2 + [ranking((1, 2), "yes " * 90), ranking((1, 2), "no"), ranking((1, 2), "")]
    write_records(tmp_path / "rankings" / "train.jsonl", [ranking((1, 2))] * 5 + odd)
    write_records(tmp_path / "rankings" / "valid.jsonl", [ranking((1, 2))])
    work = work_in(tmp_path / "reward", {"policy": school / "sft", "rankings": tmp_path / "rankings"})
    result = reward.run(reward.RewardConfig(epochs=2), work)
    assert result["rankings"]["train"] == {
        "kept": 6, "all_ties": 2, "too_long": 1, "equal_texts": 1, "empty_responses": 1,
    }  # fmt: skip
    assert sum(result["rankings"]["train"][key] for key in ("kept", "all_ties", "too_long", "equal_texts")) == 10
    assert result["accuracy_noisy"] == 1.0 and "length_baseline" in result and "%" in result["line"]
    loaded = reward.RewardModel.load(tmp_path / "reward" / "checkpoint")
    info = json.loads((tmp_path / "reward" / "checkpoint" / "lyceum.json").read_text())
    assert info["stage"] == "reward" and info["reward_centre"] == loaded.centre
    assert read_model(tmp_path / "reward" / "checkpoint").parent == school / "sft" / "checkpoint"
    assert info["learned_from"] == [{"kind": "rankings", "count": 6, "source": "rankings", "origins": {"rule": 6}}]
    assert info["tokenizer"] == loaded.tokenizer.fingerprint


def test_files_of_ones_own_are_split_by_prompt_and_by_annotator(school: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what is {n}?", "chosen": "yes", "rejected": "no", "annotator": f"person {n % 4}"}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_records(tmp_path / "more.jsonl", [ranking((1, 2), question=f"is it {n}?") for n in range(20)])
    config = reward.RewardConfig(
        data=(str(tmp_path / "pairs.jsonl"), str(tmp_path / "more.jsonl")), valid_share=0.2, stranger_share=0.25
    )
    report = reward.run(config, work_in(tmp_path / "reward", {"policy": school / "sft"}))
    parts = report["rankings"]
    assert parts["train"]["kept"] + parts["valid"]["kept"] == 60
    assert {name: group["pairs"] for name, group in report["by_annotators"].items()}["held_out"] == 10
    assert 10 < parts["valid"]["kept"] < 30
    stage = reward.Reward(config)
    stage.start(work_in(tmp_path / "again", {"policy": school / "sft"}))
    names = {one.name for one in (*stage.train.rankings, *stage.valid.rankings)}
    assert names == {f"ranking {n} of pairs.jsonl" for n in range(1, 41)} | {
        f"ranking {n} of more.jsonl" for n in range(1, 21)
    }


def test_a_micro_batch_tells_which_rankings_are_in_it() -> None:
    tokenizer = Tokenizer.train([], 267)
    chat, rng = ChatFormat(tokenizer), np.random.default_rng(0)
    given = []
    for number in range(12):
        replies = tuple(Message("assistant", f"{number}" * rng.integers(1, 9) + mark) for mark in "abc")
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


# ---------------------------------------------------------------- ensembles

TRIO = reward.RewardConfig(members=3, aggregate="min", batch_prompts=4)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_member_is_what_it_would_be_alone_and_the_score_is_made_of_theirs(school: Path, tmp_path: Path) -> None:
    report = reward.run(TRIO, school_work(school, tmp_path / "trio"))
    folder = tmp_path / "trio" / "checkpoint"
    seed = mix_seed(0, 2)
    alone = reward.run(replace(TRIO, members=1), school_work(school, tmp_path / "alone", seed))
    own = tensors(tmp_path / "alone" / "checkpoint")
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors(folder / "member-2").items())
    assert report["members"][1]["accuracy_noisy"] == alone["accuracy_noisy"]
    assert not torch.equal(tensors(folder)["score.weight"], own["score.weight"])
    assert report["tokens"] == 3 * alone["tokens"] and report["line"].startswith("3 members, min: ")

    judge = reward.RewardModel.load(folder)
    assert [*judge.modules()] == ["reward", "reward_2", "reward_3"]
    chat = ChatFormat(judge.tokenizer)
    rows = encode_rankings(read_rankings(school / "rankings" / "valid.jsonl"), chat).rankings
    flat = [row for one in rows for row in one.rows]
    scores = torch.tensor(judge.score([row[:3] for row in flat], [row[3:] for row in flat]), dtype=torch.float64)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    singles = []
    for number, place in enumerate(("member-2", "member-3", "."), 2):
        one = reward.RewardModel.load(folder / place)
        one = replace(one, others=[], ensemble=Ensemble()) if place == "." else one
        singles.append(one.score([row[:3] for row in flat], [row[3:] for row in flat]))
        assert number <= 4 and np.mean(singles[-1]) == pytest.approx(0.0, abs=1e-5)  # each is normalised by itself
    least = torch.tensor(singles, dtype=torch.float64).amin(0)
    torch.testing.assert_close(scores, (least - least.mean()) / least.std(unbiased=False), atol=1e-4, rtol=0)
    # the report's margins are those of the combined score, in units of training
    margins = [float(scores[i] - scores[i + 1]) for i in range(0, len(flat), 2)]
    assert report["accuracy_noisy"] == np.mean([margin > 0 for margin in margins])


def test_an_ensemble_that_was_stopped_goes_on_with_the_member_at_hand(
    school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = reward.run(TRIO, school_work(school, tmp_path / "straight"))
    real, trained = reward.run_stage, []

    def stops(stage: reward.Reward, work: Work) -> dict[str, Any]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(work.folder.path.name)
        return real(stage, work)

    monkeypatch.setattr(reward, "run_stage", stops)
    with pytest.raises(KeyboardInterrupt):
        reward.run(TRIO, school_work(school, tmp_path / "stopped"))
    monkeypatch.setattr(reward, "run_stage", real)
    again = reward.run(TRIO, school_work(school, tmp_path / "stopped"))
    assert trained == ["stopped", "member-2"]
    for name in ("accuracy_noisy", "reward_scale", "ensemble", "disagreement", "margins"):
        assert again[name] == straight[name]
    for place in (".", "member-2", "member-3"):
        one, other = (tensors(tmp_path / run / "checkpoint" / place) for run in ("straight", "stopped"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class OnePolicy(InMemory):
    """Members begin from the same policy, each with a head of its own, as they do from a checkpoint."""

    def start(self, work: Work) -> None:
        decoder = Decoder(SPEC, torch.Generator().manual_seed(99))
        head = torch.Generator().manual_seed(self.init_seed)
        self.begin(ScoreModel(decoder, head), *self.given, CHAT, seed=work.seed)


@pytest.mark.slow
def test_members_disagree_on_what_training_never_showed(tmp_path: Path) -> None:
    """Trained on tokens 10 to 20; asked about responses of these, of these again (the control), and of tokens 21 to 31."""
    unknown, again = [], []
    for seed in range(5):
        given, valid = (rule_pairs(n, seed + n, flipped=0.1, tokens=(10, 21)) for n in (1600, 50))
        members = []
        for number in range(4):
            folder = tmp_path / f"{seed} {number}"
            train(OnePolicy(LEARNING, given, valid, number), folder, number)
            members.append(reward.RewardModel.load(folder / "checkpoint"))

        def spread(tokens: tuple[int, int], draw: int, members: list[reward.RewardModel] = members) -> float:
            rows = [row for one in rule_pairs(100, draw, flipped=0.0, tokens=tokens) for row in one.rows]
            scores = [one.score([row[:1] for row in rows], [row[1:] for row in rows]) for one in members]
            return float(np.std(np.array(scores, dtype=float), axis=0).mean())

        inside = spread((10, 21), 1000)
        unknown.append(spread((21, 32), 3000) / inside)
        again.append(spread((10, 21), 2000) / inside)
    print(f"spread among members, as a multiple: unknown tokens {unknown}, known ones again {again}")
    assert np.mean(unknown) > 1.3 and min(unknown) > 1.1
    assert np.mean(again) == pytest.approx(1.0, abs=0.15)


# ---------------------------------------------------------------- learning


LEARNING = reward.RewardConfig(epochs=1, batch_prompts=32, lr=3e-3, micro_tokens=4096)


def rule_pairs(count: int, seed: int, *, flipped: float, tokens: tuple[int, int] = (10, 32)) -> list[EncodedRanking]:
    """Pairs of which one response has GOOD somewhere; exactly the stated share is ranked the wrong way round."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(count) < flipped * count
    made = []
    for i in range(count):
        prompt = rng.integers(*tokens, 3).tolist()
        good, bad = (rng.integers(*tokens, rng.integers(3, 7)).tolist() for _ in range(2))
        good[rng.integers(len(good))] = GOOD
        ranks = (2.0, 1.0) if wrong[i] else (1.0, 2.0)
        made.append(EncodedRanking([prompt + good + [END], prompt + bad + [END]], ranks, None, {"clean_ranks": [1, 2]}))
    return made


def learn(folder: Path, seed: int, *, flipped: float, pairs: int) -> dict[str, Any]:
    data = rule_pairs(pairs, 10 + seed, flipped=flipped)
    return train(InMemory(LEARNING, data, rule_pairs(600, 1000 + seed, flipped=0.1), seed), folder, seed)


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


def graded_rankings(count: int, responses: int, seed: int, noise: float) -> list[EncodedRanking]:
    """Rankings by how often GOOD stands in a response, as seen by somebody whose eye adds normal noise."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(10, 32, 3).tolist()
        numbers = rng.permutation(responses)
        rows = []
        for number in numbers:
            response = rng.integers(10, 32, 8)
            response[rng.permutation(8)[:number]] = GOOD
            rows.append([*prompt, *response.tolist(), END])
        seen = numbers + noise * rng.normal(size=responses)
        made.append(EncodedRanking(rows, tuple((np.argsort(np.argsort(-seen)) + 1.0).tolist()), None, {}))
    return made


@pytest.mark.slow
def test_k_wise_is_not_worse_than_shuffled_pairs_and_reads_a_fraction_of_the_rows(tmp_path: Path) -> None:
    """Two epochs over the same rankings of six, K-wise and as pairs that are shuffled over the whole set."""
    losses: dict[str, list[float]] = {"k-wise": [], "pairs": []}
    rows: dict[str, int] = {}
    for seed in range(5):
        given, valid = graded_rankings(60, 6, seed, 1.0), graded_rankings(100, 6, 100 + seed, 1.0)
        pairs = [
            EncodedRanking([one.rows[i], one.rows[j]], (1.0, 2.0), None, {})
            for one in given
            for i, j in agreement.decided(one.ranks)
        ]
        # a step holds as many pairs either way: 4 prompts of 15 pairs, or 60 pairs
        for name, data, size in (("k-wise", given, 4), ("pairs", pairs, 60)):
            config = replace(LEARNING, epochs=2, batch_prompts=size)
            stage = InMemory(config, data, valid, seed)
            stage.start(work_in(tmp_path / f"{name} {seed}"))
            rows[name] = sum(len(batch.lengths_B) for step in stage.steps(0) for batch in step.micro_batches)
            result = train(stage, tmp_path / f"{name} {seed}", seed)
            losses[name].append(result["final"]["valid/loss"])
    print({name: [round(loss, 4) for loss in values] for name, values in losses.items()}, rows)
    assert rows["k-wise"] * 5 == rows["pairs"] == 2 * 60 * 15 * 2
    assert np.mean(losses["k-wise"]) <= np.mean(losses["pairs"]) + 0.005
    assert max(losses["k-wise"]) < math.log(2) - 0.1  # and it has learned: a judge that knows nothing has log 2
