"""Replies in segments: where they are cut, what is drawn and chosen, and that a person who presses late is understood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.segments import Ends, Telling, mean_states, segment_states
from lyceum.engine.tamer import Delay, Lesson, Press, Taste
from lyceum.errors import UsageError
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

PROMPT = [1, 2, 3]
ENDS = Ends(frozenset({10, 20, 30}), most=4)


def told(engine: Engine, telling: Telling, taste: Taste | None = None) -> Telling:
    """A whole reply."""
    is_taught = taste is not None and taste.is_taught
    while not telling.is_over:
        outputs = engine.generate(*zip(*telling.wanted(is_taught), strict=True))
        telling.take(outputs, mean_states(engine, telling.rows(outputs)), taste)
    return telling


def telling(engine: Engine, params: SamplingParams, **given: object) -> Telling:
    return Telling(PROMPT, params, ENDS, engine.context_length, **given)  # type: ignore[arg-type]


# -- where it is cut ---------------------------------------------------------------------------------------------------


def test_segments_end_behind_marks_and_after_the_most_tokens() -> None:
    ends = Ends(frozenset({9}), most=3)
    assert ends.spans([1, 9, 1, 1, 1, 1, 9, 9, 2]) == [(0, 2), (2, 5), (5, 7), (7, 8), (8, 9)]
    assert ends.spans([]) == [] and Ends(most=2).spans([1, 2, 3, 4]) == [(0, 2), (2, 4)]
    with pytest.raises(UsageError, match="segments of 0 tokens"):
        Ends(most=0)


def test_the_ends_of_a_vocabulary_are_tokens_that_end_with_a_mark() -> None:
    pieces = [b"yes", b"no.", b", ", b".5", b"\n", "。".encode(), "是".encode(), b"", b":", b"\x82"]
    assert Ends.of(pieces).ids == {1, 2, 4, 5, 8}  # the last byte of a mark alone is none


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_nothing_taught_the_segments_add_up_to_the_plain_reply(decoder: Decoder, temperature: float) -> None:
    engine = Engine(decoder, max_batch=4, checks=True)
    for seed in range(5):
        params = SamplingParams(max_tokens=24, temperature=temperature, stop_ids=(7,), seed=seed)
        (plain,) = engine.generate([PROMPT], params)
        found = told(engine, telling(engine, params))
        assert found.reply == plain.ids and found.finish == plain.finish
        assert found.spans == ENDS.spans(plain.ids) and len(found.phi) == len(found.spans)


def test_it_ends_where_the_tokens_the_context_or_a_stop_string_end_it(decoder: Decoder) -> None:
    engine = Engine(decoder, max_batch=4)
    assert told(engine, telling(engine, SamplingParams(max_tokens=6))).finish == "length"
    full = told(engine, telling(engine, SamplingParams(max_tokens=500)))
    assert full.finish == "context" and len(PROMPT) + len(full.reply) == engine.context_length
    assert telling(engine, SamplingParams(max_tokens=0)).finish == "length"
    letters = [bytes([97 + token % 26]) for token in range(97)]
    said = "".join(letters[token].decode() for token in full.reply)
    stopped = told(
        engine, telling(engine, SamplingParams(max_tokens=500, stop_strings=(said[4:7],)), token_bytes=letters)
    )
    assert stopped.finish == "stop" and stopped.reply == full.reply[: len(stopped.reply)]
    assert said[4:7] in "".join(letters[token].decode() for token in stopped.reply)


def test_candidates_are_drawn_only_where_something_was_taught_and_something_is_drawn(decoder: Decoder) -> None:
    engine = Engine(decoder)
    drawn, greedy = SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, temperature=0.0)
    assert len(telling(engine, drawn, num_candidates=5).wanted(True)) == 5
    assert len(telling(engine, drawn, num_candidates=5).wanted(False)) == 1
    assert len(telling(engine, greedy, num_candidates=5).wanted(True)) == 1
    seeds = [params.seed for _, params in telling(engine, drawn, num_candidates=5).wanted(True)]
    assert seeds[0] == drawn.seed and len(set(seeds)) == 5


def test_what_cannot_be_told_in_segments_is_refused(decoder: Decoder) -> None:
    engine = Engine(decoder)
    for params in (SamplingParams(n=2), SamplingParams(forced=(1,)), SamplingParams(min_tokens=3)):
        with pytest.raises(UsageError, match="told in segments|candidates"):
            telling(engine, params)
    with pytest.raises(UsageError, match="0 candidates"):
        telling(engine, SamplingParams(), num_candidates=0)


def test_features_are_the_mean_hidden_vectors_of_the_segments_own_tokens(decoder: Decoder) -> None:
    engine = Engine(decoder)
    found = told(engine, telling(engine, SamplingParams(max_tokens=15, seed=3)))
    with torch.no_grad():
        hidden_TD = decoder(torch.tensor([[*PROMPT, *found.reply]]))[0]
    for (begin, end), phi_D in zip(found.spans, found.phi, strict=True):
        by_hand = hidden_TD[len(PROMPT) + begin : len(PROMPT) + end].mean(0)
        torch.testing.assert_close(phi_D, by_hand, atol=1e-4, rtol=1e-4)
    at_once = segment_states(engine, PROMPT, found.reply, found.spans)
    torch.testing.assert_close(at_once, torch.stack(found.phi), atol=1e-4, rtol=1e-4)


def test_the_candidate_that_would_be_liked_best_is_taken_and_the_first_of_equals(decoder: Decoder) -> None:
    engine = Engine(decoder)
    one = telling(engine, SamplingParams(max_tokens=8, seed=1), num_candidates=4)
    outputs = engine.generate(*zip(*one.wanted(), strict=True))
    phi_ND = torch.eye(4)
    taste = Taste([Lesson(phi_ND, torch.tensor([0.0, -1.0, 1.0, 0.0]), torch.ones(4))])
    assert one.take(outputs, phi_ND, taste) == outputs[2].ids and one.reply == outputs[2].ids
    other = telling(engine, SamplingParams(max_tokens=8, seed=1), num_candidates=4)
    assert other.take(outputs, torch.ones(4, 4), taste) == outputs[0].ids


# -- a person who presses late -----------------------------------------------------------------------------------------

NUM_TOKENS, LIKED, DISLIKED = 40, range(10), range(10, 20)
SECONDS = 0.4  # that a segment, here one token, is the newest on the screen
REPLY, MOST_REPLIES = 25, 30  # tokens of a reply; replies that anybody watches
GOAL, LAST = 0.8, 3  # share of liked tokens over so many replies in a row; by chance a quarter
MARGIN = 2  # times the keys that credit needs: so many do not suffice without it, nor where they are shuffled
NOW = Delay(0.0, 0.0)  # without credit: a press means what is shown at its moment


@dataclass
class Person:
    """Presses for what it likes and does not, 0.3 to 0.8 s after it was shown; shuffled: as often, at any time, either key."""

    seed: int
    is_shuffled: bool = False

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng([11, self.seed])

    def watch(self, reply: Sequence[int]) -> list[Press]:
        found = []
        for place, token in enumerate(reply):
            value = 1.0 if token in LIKED else -1.0 if token in DISLIKED else 0.0
            seen_s = (place + self.chance.uniform()) * SECONDS
            pressed_s = seen_s + self.chance.uniform(0.3, 0.8)
            if self.is_shuffled:
                pressed_s, value = (
                    self.chance.uniform(0, len(reply) * SECONDS),
                    value and self.chance.choice([-1.0, 1.0]),
                )
            if value:
                found.append(Press(float(pressed_s), float(value)))
        return found


def keys_until_taught(seed: int, delay: Delay, most_keys: int, *, is_shuffled: bool = False) -> tuple[int, bool]:
    """Keys pressed until the goal is reached or there are `most_keys`, and whether it is; through the engine, reply by reply."""
    spec = ModelSpec(NUM_TOKENS, 1, 32, 2, 2, 16, 64, 64, tied=False)
    engine = Engine(Decoder(spec, torch.Generator().manual_seed(seed)), max_batch=16)
    person, lessons, taste, num_keys, shares = Person(seed, is_shuffled), list[Lesson](), Taste(), 0, list[float]()
    for number in range(MOST_REPLIES):
        params = SamplingParams(max_tokens=REPLY, seed=1000 * seed + number)
        shown = told(engine, Telling([12, 1], params, Ends(most=1), engine.context_length, num_candidates=16), taste)
        shares.append(sum(token in LIKED for token in shown.reply) / REPLY)
        if number + 1 >= LAST and sum(shares[-LAST:]) >= GOAL * LAST:
            return num_keys, True
        if num_keys >= most_keys:
            break
        presses = person.watch(shown.reply)
        num_keys += len(presses)
        began_s = [SECONDS * place for place in range(REPLY)]
        lessons.append(Lesson.of(torch.stack(shown.phi), began_s, presses, delay))
        taste = Taste(lessons)
    return num_keys, False


@pytest.mark.slow
def test_a_late_person_teaches_in_fewer_keys_with_credit_and_shuffled_keys_teach_nothing() -> None:
    # stated before the run on these seeds: with credit the goal is reached on each of five within 200 keys; without it MARGIN
    # times the keys that credit needed do not suffice on any, nor does watching for 30 replies; shuffled keys likewise
    # (an earlier statement, and why it failed: dev/LOG.md)
    for seed in range(10, 15):
        keys, is_reached = keys_until_taught(seed, Delay(0.3, 0.8), 200)
        without, is_reached_without = keys_until_taught(seed, NOW, MARGIN * keys)
        shuffled, is_luck = keys_until_taught(seed, Delay(0.3, 0.8), MARGIN * keys, is_shuffled=True)
        print(f"seed {seed}: reached with {keys} keys; not with {without} without credit, nor with {shuffled} shuffled")
        assert is_reached and not is_reached_without and not is_luck
