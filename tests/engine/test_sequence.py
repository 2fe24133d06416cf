from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Draw, Sequence, StopStrings


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


def watched(params: SamplingParams, limit: int = 10) -> Sequence:
    return Sequence(0, [1, 2], params, limit)


def test_stop_tokens_stop_unless_they_are_forced() -> None:
    plain, forced = watched(SamplingParams(stop_ids=(5, 6))), watched(SamplingParams(stop_ids=(5,), forced=(5,)))
    stopped = plain.append(6, -1.0, [])
    assert stopped is not None and (stopped.finish, stopped.stop, stopped.ids) == ("stop", 6, [6])
    assert forced.append(5, -1.0, []) is None
    stopped = forced.append(5, -1.0, [])
    assert stopped is not None and (stopped.ids, stopped.num_forced) == ([5, 5], 1)


def test_the_limit_says_whether_the_request_or_the_context_set_it() -> None:
    short, full = watched(SamplingParams(2), 2), watched(SamplingParams(9), 2)
    for one, finish in ((short, "length"), (full, "context")):
        assert one.append(7, 0.0, []) is None
        ended = one.append(8, 0.0, [])
        assert ended is not None and (ended.finish, ended.ids) == (finish, [7, 8])


def test_a_sequence_knows_what_the_model_has_not_seen() -> None:
    one = watched(SamplingParams())
    assert (one.num_left, one.num_promised) == (2, 12)
    one.num_cached = 2
    one.append(9, 0.0, [])
    assert (one.num_left, one.reply) == (1, [9])


def test_only_bare_greedy_requests_are_drawn_by_the_most_probable_token_alone() -> None:
    assert watched(SamplingParams(5, temperature=0.0, stop_ids=(3,), seed=4)).is_argmax
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.0, logprobs=True),
        SamplingParams(temperature=0.0, forced=(1,)),
    ):
        assert not watched(params).is_argmax


def test_a_draw_is_the_samplers_row_by_row() -> None:
    logits_BV = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    params = (SamplingParams(seed=-1, top_k=4), SamplingParams(temperature=0.0, forced=(7,)), SamplingParams(seed=3))
    sequences = [watched(p) for p in params]
    tokens, logprobs, *_ = Draw(sequences, torch.device("cpu"))(logits_BV)
    assert tokens[1] == 7
    for row, one in enumerate(sequences):
        alone = Draw([one], torch.device("cpu"))(logits_BV[row : row + 1])
        assert (tokens[row], logprobs[row]) == (alone[0][0], pytest.approx(alone[1][0], abs=1e-6))
