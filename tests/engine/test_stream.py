from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyceum.engine.stream import TextStream, offsets


def pieces_of(data: bytes, cuts: set[int]) -> list[bytes]:
    at = sorted({0, len(data)} | {cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip(at, at[1:], strict=False)]


def shown(tokens: list[bytes], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokens, stop_strings=stops)
    return [*(stream.feed([token]) for token in range(len(tokens))), stream.close()]


def cut_at_first_stop(data: bytes, stops: list[str]) -> tuple[bytes, str | None]:
    """By trying every end in turn: the first at which a stop string is complete; of several the longest."""
    for end in range(len(data) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if data[:end].endswith(stop.encode()):
                return data[: end - len(stop.encode())], stop
    return data, None


TEXTS = st.text("ab é我🦙\n", max_size=20)


@given(
    TEXTS, st.lists(st.text("ab é我🦙", min_size=1, max_size=4), max_size=3), st.sets(st.integers(0, 200)), st.data()
)
def test_all_pieces_are_the_text_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: set[int], data: st.DataObject
) -> None:
    if stops and data.draw(st.booleans()):
        text += data.draw(st.sampled_from(stops)) + data.draw(TEXTS)
    whole = text.encode()
    expected, stop = cut_at_first_stop(whole, stops)
    tokens = pieces_of(whole, cuts)
    stream = TextStream(tokens, stop_strings=stops)
    so_far, num_bytes = "", 0
    for token in range(len(tokens)):
        so_far += stream.feed([token])
        num_bytes += len(tokens[token])
        assert expected.decode().startswith(so_far)  # never past the stop, whatever comes
        if stream.stop is None:  # and as early as can be: what is missing may begin a stop, or is half a character
            missing = whole[len(so_far.encode()) : num_bytes]
            starts = [stop.encode()[:n] for stop in stops for n in range(1, len(stop.encode()))]
            held = max((len(start) for start in starts if whole[:num_bytes].endswith(start)), default=0)
            assert missing[: len(missing) - held].decode("utf-8", "ignore") == ""
    assert so_far + stream.close() == expected.decode() and stream.stop == stop


@given(st.binary(max_size=30), st.sets(st.integers(0, 100)))
def test_bytes_that_are_no_text_are_replaced_as_in_the_whole(data: bytes, cuts: set[int]) -> None:
    assert "".join(shown(pieces_of(data, cuts))) == data.decode("utf-8", "replace")


def test_chinese_and_emoji_come_out_whole_from_tokens_of_single_bytes() -> None:
    text = "我想🦙é"
    parts = shown([text.encode()[i : i + 1] for i in range(len(text.encode()))])
    assert parts == ["", "", "我", "", "", "想", "", "", "", "🦙", "", "é", ""]


@pytest.mark.parametrize(
    ("tokens", "stops", "parts", "stop"),
    [
        # known answers: a stop split across tokens; inside a multi-byte character; the earliest wins
        ([b"4.\n", b"Ques", b"tion", b": What"], ("Question:",), ["4.\n", "", "", ""], "Question:"),
        ([b"caf\xc3", b"\xa9\xe3\x80", b"\x82 more"], ("é。",), ["caf", "", ""], "é。"),
        ([b"so", b"on and late"], ("late", "soon"), ["", ""], "soon"),
        # held back, then shown after all; the longest end that may become a stop is what counts
        ([b"x<", b"<e", b"nd", b"?"], ("<end>",), ["x", "<", "", "<end?"], None),
        ([b"aab", b"aac"], ("aabaab",), ["", "aabaac"], None),
        # the second stop is complete while the first is still open
        ([b"ab", b"c"], ("abcd", "c"), ["", "ab"], "c"),
    ],
)
def test_known_answers(tokens: list[bytes], stops: tuple[str, ...], parts: list[str], stop: str | None) -> None:
    stream = TextStream(tokens, stop_strings=stops)
    assert [stream.feed([token]) for token in range(len(tokens))] == parts
    assert stream.stop == stop and stream.close() == ""


def test_what_was_held_back_comes_when_the_reply_ends() -> None:
    assert shown([b"x\nUs"], ("\nUser:",)) == ["x", "\nUs"]
    assert shown([b"x\xe6\x88"]) == ["x", "�"]
    assert shown([b"Us", b"er: y"], ("User:",)) == ["", "", ""]  # nothing after a stop


def test_where_nothing_may_stop_no_stop_string_begins() -> None:
    stream = TextStream([b"ab", b"c", b"abc"], stop_strings=("abc",))
    assert stream.feed([0], may_stop=False) == "ab" and stream.feed([1]) == "c" and stream.stop is None
    assert stream.feed([2]) == "" and stream.stop == "abc"


def test_nothing_is_shown_from_a_token_on_that_holds() -> None:
    stream = TextStream([b"a", b"b", b"c"], hold_at=(1,))
    assert stream.feed([0, 1, 2]) == "a" and stream.close() == ""


@given(TEXTS, st.sets(st.integers(0, 200)))
def test_offsets_count_the_whole_characters_before_a_token(text: str, cuts: set[int]) -> None:
    tokens = pieces_of(text.encode(), cuts)
    before = [b"".join(tokens[:n]) for n in range(len(tokens))]
    expected = [len(start.decode("utf-8", "ignore")) for start in before]  # a broken end is left out
    assert offsets(tokens, range(len(tokens))) == expected


def test_offsets_by_hand() -> None:
    assert offsets([b"na\xc3", b"\xafve", b" \xe6\x88\x91"], [0, 1, 2]) == [0, 2, 5]
