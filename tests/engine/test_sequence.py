from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Batch, Sequence, StopStrings


def found(strings: list[str], pieces: list[bytes]) -> tuple[str, int] | None:
    watch = StopStrings(strings, pieces)
    return next((match for token in range(len(pieces)) if (match := watch.feed(token)) is not None), None)


def test_a_stop_string_is_found_across_tokens() -> None:
    assert found(["Question:"], [b"4.\n", b"Ques", b"tion", b": What"]) == ("Question:", 3)


def test_a_stop_string_is_found_when_tokens_cut_through_its_characters() -> None:
    # "é" is c3 a9, "。" is e3 80 82: the borders lie inside both
    assert found(["é。"], [b"caf\xc3", b"\xa9\xe3", b"\x80\x82 more"]) == ("é。", 3)


def test_the_first_stop_string_wins_not_the_first_in_the_list() -> None:
    assert found(["late", "soon"], [b"so", b"on and late"]) == ("soon", 0)
    assert found(["bc", "abc"], [b"xabc"]) == ("abc", 1)  # complete at once: the longer


def test_a_stop_string_does_not_begin_in_forced_tokens() -> None:
    watch = StopStrings(["ab"], [b"a", b"b"])
    watch.skip(0)
    assert watch.feed(1) is None
    assert watch.feed(0) is None
    assert watch.feed(1) == ("ab", 2)


@given(st.binary(max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_match_does_not_depend_on_where_tokens_are_cut(
    noise: bytes, strings: list[str], data: st.DataObject
) -> None:
    text = noise + data.draw(st.text("abé", max_size=12)).encode() + noise
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)] or [b""]
    assert found(strings, pieces) == found(strings, [text[i : i + 1] for i in range(len(text))] or [b""])


def test_rows_keep_their_state_when_they_move_and_when_the_batch_widens() -> None:
    batch = Batch(3, torch.device("cpu"))
    short = SamplingParams(seed=-1, stop_ids=(5,), forced=(7, 8))
    batch.write(0, [Sequence(0, [1], SamplingParams(), 4), Sequence(1, [2, 3], short, 4)])
    batch.append(torch.tensor([9, 7]), torch.tensor([-1.0, -2.0]))
    batch.write(2, [Sequence(2, [4], SamplingParams(stop_ids=(1, 2, 3, 4, 5, 6)), 500)])  # wider in both ways
    batch.move([0], [1])
    assert batch.reply(0) == [7] and batch.logprobs(0) == [-2.0]
    assert batch.planned(2).tolist() == [8, 8]
    assert batch.seed_B[0] == -1 and batch.position_B[0] == 3 and batch.stop_BS[0, 0] == 5


def test_stop_tokens_stop_unless_they_are_forced() -> None:
    batch = Batch(2, torch.device("cpu"))
    params = SamplingParams(stop_ids=(5, 6))
    batch.write(0, [Sequence(0, [1], params, 2), Sequence(1, [1], SamplingParams(stop_ids=(5,), forced=(5,)), 2)])
    is_stop_B, is_full_B = batch.append(torch.tensor([6, 5]), torch.zeros(2))
    assert is_stop_B.tolist() == [True, False] and is_full_B.tolist() == [False, False]
    is_stop_B, is_full_B = batch.append(torch.tensor([0, 5]), torch.zeros(2))
    assert is_stop_B.tolist() == [False, True] and is_full_B.tolist() == [True, True]
