"""Oracles: pairs and labels written out by hand, rows as the reward model's, and what must hold for any rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lyceum.batches import preferences
from lyceum.batches.pack import bucket_groups
from lyceum.batches.pairs import ranking_batches
from lyceum.batches.preferences import Judged, collate, decided_pairs, encode_rankings, encode_ratings, ratings_of
from lyceum.corpus.records import Conversation, Message, Ranking, Rating
from lyceum.errors import ConfigError, DataError
from lyceum.tokens.chat import ChatFormat


def prompt(text: str) -> Conversation:
    return Conversation((Message("user", text),))


def ranking(ranks: Sequence[float], answers: Sequence[str] = (), question: str = "items?", **more: Any) -> Ranking:
    texts = answers or [f"len {number}" for number in range(len(ranks))]
    return Ranking(prompt(question), tuple(Message("assistant", text) for text in texts), tuple(ranks), **more)


def test_pairs_by_hand() -> None:
    assert decided_pairs(ranking([2, 1, 3])) == [(0, 2, 1.0), (1, 0, 1.0), (1, 2, 1.0)]
    assert decided_pairs(ranking([1, 2, 2, 3, 3])) != decided_pairs(ranking([1, 2, 2, 3, 3]), "best_worst")
    assert decided_pairs(ranking([1, 2, 2, 3, 3]), "best_worst") == [(0, 3, 1.0), (0, 4, 1.0)]
    assert decided_pairs(ranking([2, 2])) == []
    soft = ranking([1, 2, 3], probabilities=(0.6, 0.2, 0.2))
    assert decided_pairs(soft) == [(0, 1, pytest.approx(0.75)), (0, 2, pytest.approx(0.75)), (1, 2, 0.5)]
    assert decided_pairs(ranking([1, 2, 3], probabilities=(1.0, 0.0, 0.0)))[2] == (1, 2, 1.0)  # nothing is known


def test_good_and_bad_by_hand() -> None:
    def values(given: Ranking, pairs: str = "all") -> list[float | None]:
        return [None if rating is None else rating.value for rating in ratings_of([given], pairs)]

    assert values(ranking([1, 2])) == [1, 0]
    assert values(ranking([3, 1, 2])) == [0, 1, None]
    assert values(ranking([1, 2, 3, 4])) == [1, 1, 0, 0]
    assert values(ranking([1, 2, 3, 4]), "best_worst") == [1, None, None, 0]
    assert values(ranking([2, 2])) == [None, None]
    assert values(ranking([1, 2], acceptable=(False, False))) == [0, 0]


def test_rows_are_those_of_the_reward_model_and_responses_begin_after_the_prompt(chat: ChatFormat) -> None:
    given = ranking([1, 2, 3], ["the number of items", "items", ""])
    (judged,) = encode_rankings([given], chat, 99).judged
    (theirs,) = ranking_batches([given], chat, 999, seed=0)
    batch = collate([judged], chat.tokenizer.pad_id)
    assert torch.equal(batch.tokens_BT, theirs.tokens_BT) and torch.equal(batch.lengths_B, theirs.lengths_B)
    assert batch.starts_B.tolist() == [len(chat.prompt(given.prompt))] * 3
    assert judged.responses[2] == [chat.tokenizer.turn_end_id]  # an empty response says "say nothing"
    assert batch.best_B.tolist() == [True, False, False]
    assert batch.sides.weight_P.tolist() == pytest.approx([1 / 3] * 3)


def test_a_batch_of_several_prompts_and_its_halves() -> None:
    one = Judged([2], [[3, 1], [4, 1]], ((1, 0, 0.9),), (1,), name="ranking 1", reference=(-1.0, -2.0))
    two = Judged([2, 5, 6], [[3, 1], [4, 4, 1], [1]], ((0, 1, 1.0), (0, 2, 1.0)), (0,), reference=(-3.0, -4.0, -5.0))
    batch = collate([one, two], 0)
    assert batch.sides.better_P.tolist() == [1, 2, 2] and batch.sides.worse_P.tolist() == [0, 3, 4]
    assert batch.sides.weight_P.tolist() == [1, 0.5, 0.5] and batch.sides.probability_P.tolist() == [0.9, 1, 1]
    assert batch.starts_B.tolist() == [1, 1, 3, 3, 3] and batch.lengths_B.tolist() == [3, 3, 5, 6, 4]
    assert batch.reference_B.tolist() == [-1, -2, -3, -4, -5] and batch.best_B.tolist() == [0, 1, 1, 0, 0]
    halves = batch.halves()
    assert [half.judged for half in halves] == [(one,), (two,)]
    assert halves[0].tokens_BT.shape == (2, 3) and len(halves[0].halves()) == 1
    singles = collate([Judged([2], [[3, 1]], best=(0,)), Judged([2], [[4, 1]])], 0)
    assert (singles.sides.better_P.tolist(), singles.sides.worse_P.tolist()) == ([0], [1])


def test_what_is_left_out_is_counted_by_reason(chat: ChatFormat) -> None:
    rows = [
        ranking([1, 2]),
        ranking([1, 1]),
        ranking([1, 2], ["same", "same"]),
        ranking([1, 2, 3], ["same", "same", "other"]),
        ranking([1, 2], ["len " * 99, "no"]),
    ]
    found = encode_rankings(rows, chat, 60)
    assert [one.name for one in found.judged] == ["ranking 1", "ranking 4"]
    assert found.left_out == {"all_ties": 1, "equal_texts": 1, "pairs_of_equal_texts": 2, "too_long": 1}
    assert found.judged[1].pairs == ((0, 2, 1.0), (1, 2, 1.0))
    with pytest.raises(DataError, match=r"none of 1 rankings can be learned from: 1 all ties(.|\n)*hint: "):
        encode_rankings(rows[1:2], chat, 60)
    rated = [None, *(Rating(prompt("items?"), Message("assistant", text), 4) for text in ("", "len", "len " * 99))]
    kept = encode_ratings(rated, chat, 60, good_from=5)
    assert (kept.left_out, kept.num_empty) == ({"too_long": 1, "unlabelled": 1}, 1)
    assert [one.best for one in kept.judged] == [(), ()]


def test_strangers_come_from_other_prompts_fit_and_stay(chat: ChatFormat) -> None:
    rng = np.random.default_rng(0)
    judged = [Judged([9, n % 5], [rng.integers(2, 9, rng.integers(1, 9)).tolist()]) for n in range(40)]
    found = preferences.add_strangers(judged, 8, seed=3)
    assert found == preferences.add_strangers(judged, 8, seed=3) != preferences.add_strangers(judged, 8, seed=4)
    for one in found:
        givers = [other for other in judged if other.responses[0] == one.stranger]
        assert givers and any(other.prompt != one.prompt for other in givers) and len(one.stranger) <= 6
        assert one.rows()[-1] == one.prompt + one.stranger
    assert not any(one.stranger for one in preferences.add_strangers(judged[:1] * 3, 8, seed=3))


def test_a_prompt_is_on_one_side_of_the_split() -> None:
    judged = [Judged([9, n % 50], [[n]]) for n in range(400)]
    train, valid = preferences.split_by_prompt(judged, 0.3, seed=1)
    assert len(train) + len(valid) == 400 and 0.1 < len(valid) / 400 < 0.5
    assert not {one.prompt[1] for one in train} & {one.prompt[1] for one in valid}
    assert preferences.split_by_prompt(judged, 0.0, seed=1) == (judged, [])


def test_groups_hold_every_item_once_and_never_too_much() -> None:
    rng = np.random.default_rng(0)
    widths, sizes = rng.integers(1, 30, 80).tolist(), rng.integers(1, 6, 80).tolist()
    groups = bucket_groups(widths, sizes, 160, seed=2)
    assert sorted(item for group in groups for item in group) == list(range(80))
    assert all(max(widths[i] for i in group) * sum(sizes[i] for i in group) <= 160 for group in groups)
    assert groups == bucket_groups(widths, sizes, 160, seed=2) != bucket_groups(widths, sizes, 160, seed=3)
    with pytest.raises(ConfigError, match="tokens must be in one micro-batch"):
        bucket_groups([30], [6], 160, seed=2)
