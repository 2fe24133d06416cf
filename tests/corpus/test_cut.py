"""Pieces of long texts: joined they are the text, they end where words end, and a stream is cut like the whole."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lyceum.corpus.cut import cut, cut_stream

TEXT = st.text(st.sampled_from("ab7é我。，, .\n\r-_'\u0301🦙"), max_size=300)


def test_cuts_by_hand() -> None:
    assert list(cut("one two, three", 9)) == ["one two", ", three"]
    assert list(cut("one two, three", 100)) == ["one two, three"]
    assert list(cut("", 5)) == [""]
    assert list(cut("我想学习。我想吃饭。", 5)) == ["我想学习", "。我想吃饭", "。"]
    assert list(cut("abcdefghij", 4)) == ["abcd", "efgh", "ij"]  # no word ends: cut at the full length
    assert list(cut("      x y", 4)) == ["    ", "  x", " y"]


@given(text=TEXT, most=st.integers(1, 40))
def test_pieces_joined_are_the_text_and_none_is_longer_or_empty(text: str, most: int) -> None:
    pieces = list(cut(text, most))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= most for piece in pieces) or pieces == [""]


@given(text=TEXT, most=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_stream_is_cut_like_the_whole_text_however_it_arrives(text: str, most: int, seed: int) -> None:
    draw, chunks, at = random.Random(seed), [], 0
    while at < len(text):
        size = draw.randint(1, 60)
        chunks.append(text[at : at + size])
        at += size
    assert list(cut_stream(chunks, most)) == [piece for piece in cut(text, most) if piece]


def test_the_last_end_of_a_word_is_found_far_from_the_pieces_end() -> None:
    text = "word " + "x" * 20_000
    assert list(cut(text, 10_000)) == ["word", " " + "x" * 9_999, "x" * 10_000, "x"]
