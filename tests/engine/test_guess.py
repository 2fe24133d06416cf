"""Guessing changes no token: only how many passes they take."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lyceum.engine import guess as guess_module
from lyceum.engine.engine import Engine
from lyceum.engine.guess import MOST, REST, SAME, Guesser
from lyceum.engine.sampling import SamplingParams
from lyceum.model.transformer import Decoder

VOCAB = 97


def test_what_followed_last_is_guessed() -> None:
    tokens = [1, 2, 3, 10, 11, 12, 1, 2, 3, 20, 21, 1, 2, 3]
    guesser = Guesser()
    assert guesser.guess(tokens[:6], 9) == [] and guesser.guess(tokens[:9], 2) == [10, 11]
    assert guesser.guess(tokens, 9) == [20, 21, 1]
    guesser.learn(3, 3, len(tokens))
    assert guesser.guess(tokens, 9) == [20, 21, 1, 2, 3, 20, 21]
    assert guesser.guess([*tokens, 4], 9) == [] and (MOST, SAME) == (7, 3)
    assert Guesser().guess([8, 8, 8, 8], 9) == [8, 8, 8]


def test_guessing_that_does_not_pay_rests_longer_each_time() -> None:
    guesser, tokens, rests = Guesser(), [1, 2, 3, 1, 2, 3], []
    num_resting = 0
    while len(rests) < 3:
        guess = guesser.guess(tokens, 9)
        if guess:
            if num_resting:
                rests.append(num_resting)
            num_resting = 0
            guesser.learn(len(guess), 0, len(tokens) + 1)  # never right, though what follows repeats
        else:
            num_resting += 1
        tokens.append(tokens[-3])
    assert rests == [REST, 2 * REST, 4 * REST]


class Crowd:
    """A model whose replies repeat what stands in the prompt; counts its passes."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, **settings: object):
        self.engine = Engine(decoder, checks=True, **settings)  # type: ignore[arg-type]
        self.num_passes = 0
        run = self.engine._runner

        def noted(tokens_BT: Tensor, **more: object) -> Tensor:
            self.num_passes += 1
            return run(tokens_BT, **more)

        noted.logits = run.logits  # type: ignore[attr-defined]
        monkeypatch.setattr(self.engine, "_runner", noted)

    def replies(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple]:
        self.num_passes = 0
        outputs = self.engine.generate(prompts, params)
        return [(one.ids, one.finish, one.stop) for one in outputs]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("together", [1, 3])
def test_guessed_replies_are_those_drawn_one_by_one(
    decoder: Decoder, temperature: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guess_module, "SAME", 1)  # of random tokens many single ones come again
    monkeypatch.setattr(guess_module, "PATIENCE", 1e9)
    draw = random.Random(0)
    plain, guessing = (Crowd(decoder, monkeypatch, guess=guess, max_batch=together) for guess in (False, True))
    for seed, forced in enumerate([(), (), (5, 6, 5, 6)]):
        prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(2, 9))] * 2 for _ in range(together)]
        params = [
            SamplingParams(25, temperature=temperature, seed=seed, stop_ids=(draw.randrange(VOCAB),), forced=forced)
            for _ in prompts
        ]
        assert guessing.replies(prompts, params) == plain.replies(prompts, params)


def test_a_reply_that_repeats_itself_takes_fewer_passes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(35, temperature=0.0)]
    plain, guessing = (Crowd(decoder, monkeypatch, guess=guess) for guess in (False, True))
    prompts = [[[number, number + 1]] for number in range(8)]
    taken = [0, 0]
    for prompt in prompts:
        assert guessing.replies(prompt, params) == plain.replies(prompt, params)
        taken[0], taken[1] = taken[0] + guessing.num_passes, taken[1] + plain.num_passes
    assert taken[1] == 8 * 35 and taken[0] < 0.8 * taken[1]


def test_sampled_replies_keep_the_exact_distribution(fixed_logits: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess_module, "SAME", 1)
    monkeypatch.setattr(guess_module, "PATIENCE", 1e9)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    engine = Engine(fixed_logits(probabilities.log()), guess=True)
    ids = [id for seed in range(4) for id in engine.generate([[0]], SamplingParams(400, seed=seed))[0].ids]
    counts = torch.bincount(torch.tensor(ids), minlength=3)
    chi2 = float(((counts - 1600 * probabilities) ** 2 / (1600 * probabilities)).sum())
    assert chi2 < 13.8  # 2 degrees of freedom: p = .001


def test_what_shapes_the_next_token_is_not_guessed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(decoder, monkeypatch, guess=True)
    for settings in ({"frequency_penalty": 0.1}, {"logit_bias": {3: 1.0}}):
        crowd.replies([[1, 2, 3] * 4], [SamplingParams(20, temperature=0.0, **settings)])
        assert crowd.num_passes == 20
