"""TAMER+RL: a simulated trainer, a biased sampler whose log-probabilities are learned from, and learning with its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_toy import SMALL, SPEC, TamerToy, Toy, likes_fives, lines, train, weights, work_in

from lyceum.corpus.records import Conversation, Message, write_records
from lyceum.corpus.watched import Watched
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.tamer import Delay, Press
from lyceum.errors import ConfigError, DataError, UsageError
from lyceum.model.checkpoint import load_checkpoint, save_checkpoint
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder
from lyceum.stages import tamer
from lyceum.stages.tamer import SimulatedTrainer, TamerConfig, biased, nobody, shown_at
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer

CONFIG = TamerConfig(**{**asdict(SMALL), "missing_end": "keep"})


def toy(config: TamerConfig = CONFIG, trainer: Any = None, **given: Any) -> TamerToy:
    return TamerToy(config, trainer=trainer, **given)


def begun(config: TamerConfig = CONFIG, **given: Any) -> TamerToy:
    stage = toy(config, **given)
    stage.start(work_in(Path("unused")))
    return stage


# ---------------------------------------------------------------- trainers


def test_a_simulated_trainer_presses_a_while_after_each_token_that_it_likes_or_not() -> None:
    trainer = SimulatedTrainer(likes_fives, tokens_per_s=4.0, delay=Delay(0.3, 0.8))
    (presses,) = trainer([[12, 1]], [[5, 1, 3, 5, 2]], [{}])
    assert [press.value for press in presses] == [1, -1, 1]
    for press, token in zip(presses, (0, 2, 3), strict=True):
        begin, end = shown_at(5, 4.0)[token]
        assert begin + 0.3 <= press.time_s <= end + 0.8
    assert trainer([[12, 1]], [[5, 1, 3, 5, 2]], [{}]) == [presses]
    assert replace(trainer, seed=1)([[12, 1]], [[5, 1, 3, 5, 2]], [{}]) != [presses]
    assert replace(trainer, attention=0.0)([[12, 1]], [[5, 5]], [{}]) == [[]] == nobody([[12]], [[5]], [{}])


# ---------------------------------------------------------------- what is drawn is what is learned from


@pytest.mark.parametrize("tied", [False, True])
def test_a_biased_decoder_shares_its_weights_and_adds_to_its_logits(tied: bool) -> None:
    spec = ModelSpec(14, 2, 32, 2, 2, 16, 64, 32, tied=tied)
    model = Decoder(spec, torch.Generator().manual_seed(0))
    addition = torch.randn(14, 32, generator=torch.Generator().manual_seed(1))
    other = biased(model, addition)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        hidden = model(tokens)
        torch.testing.assert_close(other(tokens), hidden, atol=0, rtol=0)
        torch.testing.assert_close(other.logits(hidden), model.logits(hidden) + hidden @ addition.T)
        assert other.model is model.model and (model.lm_head is None) == tied
        best = other.logits(hidden)[0, -1].argmax()
    (said,) = Engine(other, max_batch=1).generate([tokens[0].tolist()], SamplingParams(1, temperature=0.0))
    assert said.ids == [int(best)] != [int(model.logits(hidden)[0, -1].argmax())]


def test_log_probabilities_are_those_of_the_biased_policy_by_hand() -> None:
    stage = begun(replace(CONFIG, bias=2.0, bias_decay=0.5, temperature=0.7))
    stage.collect()  # the trainer's first look
    taught = stage.human.weight_AD.clone()
    assert taught.abs().max() > 0.01
    stage.iteration = 1
    stage.is_proven = False
    rollout, _ = stage.collect()  # raises if sampler and training graph disagree
    assert (rollout.sampled_BT - rollout.logp_old_BT).abs().max() < 1e-5
    for row, mask, logp, reference in zip(
        rollout.tokens_BT, rollout.mask_BT, rollout.logp_old_BT, rollout.logp_ref_BT, strict=True
    ):
        with torch.no_grad():
            hidden = stage.policy(row[None])[0]
            plain = stage.policy.logits(hidden)
            logits = plain + 2.0 * 0.5 * hidden @ taught.T
        for values, found in ((logits, logp), (plain, reference)):
            expected = torch.log_softmax(values[:-1] / 0.7, -1).gather(1, row[1:, None])[:, 0]
            torch.testing.assert_close(found[1:][mask[1:]], expected[mask[1:]], atol=1e-5, rtol=1e-5)
    assert stage.figures["objective/kl"] > 0.01 and stage.figures["tamer/bias"] == 1.0


def test_the_human_reward_stands_on_its_tokens_beside_the_score() -> None:
    stage = begun(
        replace(CONFIG, bias=0.0, dense_coef=0.5, gamma=0.0, kl_beta=0.0), trainer=SimulatedTrainer(likes_fives)
    )
    rollout, _ = stage.collect()
    assert (rollout.dense_BT == 0).all()  # nothing is known before the first look
    assert stage.figures["tamer/presses"] > 3
    stage.iteration = 1
    rollout, _ = stage.collect()
    phi = stage.policy(rollout.tokens_BT)[:, :-1]
    mask = rollout.mask_BT[:, 1:]
    # by then it has been taught again: what it said of the rollout was what it knew before
    assert rollout.dense_BT[rollout.mask_BT].abs().max() > 0
    stage.human.weight_AD.zero_()
    _, _ = stage.collect()
    stage.learn()
    values = stage.human.of(phi[mask], rollout.tokens_BT[:, 1:][mask])
    fives = rollout.tokens_BT[:, 1:][mask] == 5
    assert values[fives].mean() > values[~fives].mean() + 0.1


def test_without_weight_it_is_ppo_bit_for_bit(tmp_path: Path) -> None:
    plain = Toy(replace(SMALL, missing_end="keep"))
    train(plain, tmp_path / "plain")
    beside = toy(replace(CONFIG, bias=0.0, dense_coef=0.0))
    train(beside, tmp_path / "beside")
    for one, two in zip(weights(plain), weights(beside), strict=True):
        assert torch.equal(one, two)
    assert beside.human.weight_AD.abs().max() > 0  # it was watched all the same


def test_killed_and_resumed_run_equals_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    config, calls = replace(CONFIG, iterations=4), 0

    def failing(prompts: Any, responses: Any, meta: Any) -> list[list[Press]]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return SimulatedTrainer(likes_fives)(prompts, responses, meta)

    straight = toy(config)
    train(straight, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(toy(config, trainer=failing), tmp_path / "killed")
    resumed = toy(config, trainer=failing)
    train(resumed, tmp_path / "killed")
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert torch.equal(resumed.human.weight_AD, straight.human.weight_AD)
    for one, two in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(one, two)


def test_a_trainer_who_is_away_teaches_nothing_and_harms_nothing(tmp_path: Path) -> None:
    stage = toy(CONFIG, trainer=nobody)
    train(stage, tmp_path)
    assert (stage.human.weight_AD == 0).all() and lines(tmp_path)[-1]["tamer/presses"] == 0


# ---------------------------------------------------------------- from files

FILES = replace(CONFIG, iterations=2, prompts_per_iteration=12, max_response_tokens=8, minibatches=1)
WATCH = """
seen = []

def presses(prompts, shown, meta):
    seen.append((prompts, shown, meta))
    return [[(until + 0.5, 1.0) for _, until, text in reply if text] for reply in shown]

def likes(prompt, pieces):
    return [float(bool(text)) for text in pieces]

def mute(prompts, shown, meta):
    return []

def wrong(prompt, pieces):
    return [1.0]

def score(prompts, responses, meta):
    return [float(len(text)) for text in responses]
"""


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a run with rewards by a function has: sft and lessons."""
    folder = tmp_path_factory.mktemp("school")
    tokenizer = Tokenizer.train(["what is it? yes no maybe it is so, né " * 20], 280)
    spec = ModelSpec(tokenizer.vocab_size, 1, 32, 2, 2, 16, 64, 48, tied=False)
    save_checkpoint(folder / "sft" / "checkpoint", Decoder(spec, torch.Generator().manual_seed(0)), tokenizer)
    asked = [Conversation((Message("user", text),), meta={"n": n}) for n, text in enumerate(("what?", "is it?", "so"))]
    write_records(folder / "lessons" / "prompts.jsonl", asked)
    return folder


def from_files(school: Path, folder: Path, **changed: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "watch.py").write_text(WATCH)
    inputs = {"policy": school / "sft", "lessons": school / "lessons"}
    return tamer.run(replace(FILES, rewards={"watch.py:score": 1.0}, **changed), work_in(folder, inputs=inputs))


@pytest.mark.parametrize("who", [{"trainer": "watch.py:presses"}, {"likes": "watch.py:likes", "attention": 0.9}])
def test_a_recipes_trainer_watches_texts_and_teaches(who: dict[str, Any], school: Path, tmp_path: Path) -> None:
    report = from_files(school, tmp_path, **who)
    assert min(report["first_and_last_iteration"]["presses"]) > 0
    assert lines(tmp_path)[-1]["objective/dense_reward"] != 0 and lines(tmp_path)[0]["objective/dense_reward"] == 0
    assert load_checkpoint(tmp_path / "checkpoint").info["stage"] == "tamer"


def test_a_log_of_presses_teaches_before_the_first_iteration(school: Path, tmp_path: Path) -> None:
    prompt = Conversation((Message("user", "what?"),))
    log = tmp_path / "presses.jsonl"
    # by a delay from 0.2 to 0.8 the first press means 1.1 to 1.7 s, all of it " no", and the second 2.1 to 2.7 s, " yes"
    shown = ((0.0, 1.0, "yes"), (1.0, 2.0, " no"), (2.0, 3.0, " yes"))
    write_records(log, [Watched(prompt, shown, ((1.9, -1.0), (2.9, 1.0)))])
    chat = ChatFormat(load_checkpoint(school / "sft" / "checkpoint").tokenizer)
    (lesson,) = tamer.logged(log, chat, Delay(0.2, 0.8), 48)
    assert chat.tokenizer.decode(lesson.response) == "yes no yes" and lesson.prompt == chat.prompt(prompt)
    assert (lesson.labels[0], lesson.weights[0]) == (0.0, 0.0) and sum(lesson.weights) == pytest.approx(2.0)
    by_label = {
        label: sum(w for k, w in zip(lesson.labels, lesson.weights, strict=True) if k == label) for label in (-1, 1)
    }
    assert by_label == pytest.approx({-1: 1.0, 1: 1.0})
    report = from_files(school, tmp_path, presses=str(log))  # nobody else watches
    assert report["first_and_last_iteration"]["presses"] == [0, 0] and lines(tmp_path)[0]["objective/dense_reward"] != 0
    with pytest.raises(DataError, match="no watched reply"):
        (tmp_path / "empty.jsonl").write_text("")
        from_files(school, tmp_path / "again", presses=str(tmp_path / "empty.jsonl"))


def test_pieces_are_whole_characters_that_add_up_to_the_reply(school: Path) -> None:
    tokenizer = load_checkpoint(school / "sft" / "checkpoint").tokenizer
    chat = ChatFormat(tokenizer)
    ids = [*tokenizer.encode("yes néü"), chat.stop_ids[0]]
    assert len(tokenizer.encode("ü")) == 2  # a character of two tokens
    shown = tamer.pieces(ids, chat)
    assert "".join(shown) == "yes néü" and len(shown) == len(ids) and shown[-1] == ""
    assert "\ufffd" not in "".join(shown) and tamer.pieces([], chat) == []


def test_a_trainer_that_is_none_is_refused(school: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs somebody who watches"):
        from_files(school, tmp_path)
    with pytest.raises(ConfigError, match="has no function nobody"):
        from_files(school, tmp_path, trainer="watch.py:nobody")
    with pytest.raises(UsageError, match="did not give presses for each of 12 replies"):
        from_files(school, tmp_path, trainer="watch.py:mute")
    with pytest.raises(UsageError, match="did not give a number for each of"):
        from_files(school, tmp_path, likes="watch.py:wrong")
    with pytest.raises(ConfigError, match="leave one of the two out"):
        replace(CONFIG, trainer="a.py:b", likes="a.py:c")
    with pytest.raises(ConfigError, match="is what its trainer taught"):
        replace(CONFIG, dense="a.py:b")


# ---------------------------------------------------------------- learning


class Shuffled:
    """The same presses, but each reply gets those of another: the control."""

    def __init__(self, trainer: SimulatedTrainer) -> None:
        self.trainer, self.chance = trainer, np.random.default_rng(trainer.seed)

    def __call__(self, prompts: Any, responses: Any, meta: Any) -> list[list[Press]]:
        presses = self.trainer(prompts, responses, meta)
        all_presses = [press for row in presses for press in row]
        times = [press.time_s for press in all_presses]
        values = self.chance.permutation([press.value for press in all_presses])
        shuffled = iter([Press(time, float(value)) for time, value in zip(times, values, strict=True)])
        rows = [[next(shuffled) for _ in row] for row in presses]
        return [rows[i] for i in self.chance.permutation(len(rows))]


def even_policy(seed: int) -> Decoder:
    """A policy that likes no word much: every seed begins with the same small chance."""
    return Decoder(SPEC, torch.Generator().manual_seed(seed))


def three_fives(prompts: Any, responses: Sequence[Sequence[int]], meta: Any) -> list[float | None]:
    """A reward that is hardly ever met by chance: at least three of six words are a five."""
    return [float(sum(token == 5 for token in response) >= 3) for response in responses]


LEARNING = replace(
    CONFIG, iterations=14, prompts_per_iteration=48, lr=2e-3, critic_lr=3e-3, bias=0.0, dense_coef=0.3, kl_beta=0.02,
    engine_batch=48, tokens_per_s=1.5,
)  # fmt: skip
BIASING = replace(LEARNING, iterations=20, bias=6.0, bias_decay=0.85, dense_coef=0.0)


def reached(folder: Path, seed: int, config: TamerConfig, trainer: Any) -> float:
    """The mean reward of what the saved policy, without any bias, says."""
    stage = toy(config, trainer=trainer, reward=three_fives, model=even_policy(seed))
    train(stage, folder, seed)
    plain = Toy(replace(SMALL, prompts_per_iteration=192, missing_end="keep"), three_fives, model=stage.policy)
    plain.start(work_in(Path("unused"), seed))
    rollout, _ = plain.collect()
    return float(rollout.score_B.mean())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shaping", "biasing"])
@pytest.mark.parametrize("seed", range(5))
def test_either_way_a_trainer_teaches_and_a_shuffled_one_does_not(tmp_path: Path, seed: int, how: str) -> None:
    config = LEARNING if how == "shaping" else BIASING
    trainer = SimulatedTrainer(likes_fives, tokens_per_s=1.5, delay=Delay(0.3, 0.8), seed=seed)
    taught = reached(tmp_path / "taught", seed, config, trainer)
    control = reached(tmp_path / "control", seed, config, Shuffled(trainer))
    print(f"{how}, seed {seed}: reward {taught:.3f} with a trainer, {control:.3f} with a shuffled one")
    assert taught > 0.5 and control < 0.3
