"""Oracles: rows written out by hand, and what must hold for any lengths (hypothesis)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyceum.batches.pack import bucket, bucket_alike, collate, fit
from lyceum.corpus.records import Conversation, Message
from lyceum.errors import ConfigError, DataError
from lyceum.tokens.chat import ChatFormat, Rendered

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 60), max_size=60)


def row(length: int, first: int = 1, weight: float = 1.0) -> Rendered:
    return Rendered(list(range(first, first + length)), [0.0] + [weight] * (length - 1))


# ------------------------------------------------------------------------------------------------- groups of an epoch


@UNHURRIED
@given(lengths=LENGTHS, max_tokens=st.integers(60, 300), seed=st.integers(0, 2**63))
def test_every_row_stands_in_exactly_one_group_and_no_group_is_too_large(
    lengths: list[int], max_tokens: int, seed: int
) -> None:
    groups = bucket(lengths, max_tokens, seed)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) * max(lengths[number] for number in group) <= max_tokens


def test_groups_worked_by_hand() -> None:
    # longest first: 100 // 50 = 2 rows (50, 30), then 100 // 30 = 3 rows (30, 10, 10), then what is left
    lengths = [10, 50, 10, 30, 10, 30]
    groups = bucket(lengths, 100, seed=3)
    assert sorted([lengths[number] for number in group] for group in groups) == [[10], [30, 10, 10], [50, 30]]


def test_seed_decides_groups_and_their_order() -> None:
    lengths = [7] * 40 + [9] * 40
    assert bucket(lengths, 63, seed=1) == bucket(lengths, 63, seed=1)
    first, second = bucket(lengths, 63, seed=1), bucket(lengths, 63, seed=2)
    assert first != second
    assert {frozenset(group) for group in first} != {frozenset(group) for group in second}


def test_similar_lengths_stand_together_so_that_pads_are_few() -> None:
    lengths = [8 + (n * 37) % 120 for n in range(10_000)]
    groups = bucket(lengths, 2048, seed=0)
    padded = sum(len(group) * max(lengths[number] for number in group) for group in groups)
    assert sum(lengths) / padded > 0.97  # in the order given it is 0.55


def test_no_rows_make_no_groups() -> None:
    assert bucket([], 10, seed=0) == []


def test_row_that_no_group_can_hold_is_an_error_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"300 tokens must be in one micro-batch(.|\n)*hint: set micro_tokens to 300"):
        bucket([10, 300], 256, seed=0)


# ------------------------------------------------------------------------------------------------- too long, or nothing


def test_too_long_is_dropped_or_cut_and_counted() -> None:
    rows = [row(3), row(9), row(5)]
    dropped = fit(rows, 5)
    assert (dropped.rendered, dropped.kept) == ([rows[0], rows[2]], [0, 2])
    assert (dropped.num_dropped, dropped.num_cut, dropped.num_without_targets) == (1, 0, 0)
    cut = fit(rows, 5, too_long="cut")
    assert cut.rendered[1] == Rendered([1, 2, 3, 4, 5], [0.0, 1.0, 1.0, 1.0, 1.0])
    assert (cut.kept, cut.num_dropped, cut.num_cut) == ([0, 1, 2], 0, 1)


def test_conversation_with_nothing_to_learn_is_left_out_and_counted() -> None:
    late = Rendered([1, 2, 3, 4], [0.0, 0.0, 0.0, 1.0])  # the cut takes its only target
    fitted = fit([row(3, weight=0.0), row(3), late, Rendered([1], [1.0])], 3, too_long="cut")
    assert (fitted.kept, fitted.num_without_targets, fitted.num_cut) == ([1], 3, 1)


@pytest.mark.parametrize("rows", [[row(9), row(7)], [row(4, weight=0.0)], []])
def test_nothing_that_fits_is_an_error_with_a_hint_not_an_empty_epoch(rows: list[Rendered]) -> None:
    with pytest.raises(DataError, match=rf"none of {len(rows)} conversations can be learned(.|\n)*hint: raise model"):
        fit(rows, 5)


# ---------------------------------------------------------------------------------------------------------------- batch


def test_batch_written_out_by_hand() -> None:
    batch = collate([Rendered([5, 6, 7], [0.0, 0.5, 1.0]), Rendered([8], [1.0])], pad_id=0)
    assert batch.tokens_BT.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.weights_BT.tolist() == [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]  # nothing predicts a first token
    assert batch.lengths_B.tolist() == [3, 1]
    assert (batch.num_targets, batch.num_tokens) == (1.5, 4)
    assert (batch.tokens_BT.dtype, batch.weights_BT.dtype) == (torch.int64, torch.float32)


@UNHURRIED
@given(lengths=LENGTHS.filter(bool))
def test_batch_holds_each_row_and_pads(lengths: list[int]) -> None:
    rows = [row(length, first=100 * number) for number, length in enumerate(lengths, 1)]
    batch = collate(rows, pad_id=7)
    for number, given_row in enumerate(rows):
        length = len(given_row)
        assert batch.tokens_BT[number, :length].tolist() == given_row.ids
        assert batch.weights_BT[number, :length].tolist() == given_row.weights
        assert (batch.tokens_BT[number, length:] == 7).all() and not batch.weights_BT[number, length:].any()
    assert batch.num_targets == sum(length - 1 for length in lengths)


def test_epoch_of_conversations_has_every_target_once(chat: ChatFormat) -> None:
    """The end of every reply is a target, and the pad is another token: what is not taught to end never ends."""
    tokenizer = chat.tokenizer
    talks = [
        Conversation((Message("user", "what? " * (n % 7)), Message("assistant", "len " * (n % 5)))) for n in range(200)
    ]
    fitted = fit(map(chat.render, talks), 64)
    ends = total = 0.0
    for group in bucket([len(rendered) for rendered in fitted.rendered], 256, seed=1):
        batch = collate([fitted.rendered[number] for number in group], tokenizer.pad_id)
        ends += float(batch.weights_BT[batch.tokens_BT == tokenizer.turn_end_id].sum())
        assert not batch.weights_BT[batch.tokens_BT == tokenizer.pad_id].any()
        total += batch.num_targets
    assert ends == 200
    assert total == sum(sum(chat.render(talk).weights) for talk in talks)


def test_halves_hold_the_rows_as_they_are_with_only_the_padding_they_need() -> None:
    rows = [Rendered([5, 6, 7, 8], [0.0, 1.0, 1.0, 0.5]), Rendered([5, 9], [0.0, 1.0]), Rendered([5], [0.0])]
    batch = collate(rows, 0)
    first, second = batch.halves()
    assert first.tokens_BT.tolist() == [[5, 6, 7, 8]] and first.weights_BT.tolist() == [[0.0, 1.0, 1.0, 0.5]]
    assert second.tokens_BT.tolist() == [[5, 9], [5, 0]] and second.lengths_B.tolist() == [2, 1]
    assert [half.tokens_BT.tolist() for half in first.halves()] == [first.tokens_BT.tolist()]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), max_size=40),
    st.integers(30, 120),
    st.integers(0, 3),
)
def test_rows_of_a_group_stand_together_as_far_as_there_is_room(
    rows: list[tuple[int, int]], max_tokens: int, seed: int
) -> None:
    lengths, owners = [length for length, _ in rows], [owner for _, owner in rows]
    found = bucket_alike(lengths, owners, max_tokens, seed)
    assert sorted(row for group in found for row in group) == list(range(len(rows)))
    assert all(len(group) * max(lengths[row] for row in group) <= max_tokens for group in found)
    for owner in set(owners):
        own = [row for row, other in enumerate(owners) if other == owner]
        if len(own) * max(lengths[row] for row in own) <= max_tokens:  # it has room in one group
            assert sum(bool(set(own) & set(group)) for group in found) == 1
    assert bucket_alike(lengths, owners, max_tokens, seed) == found
