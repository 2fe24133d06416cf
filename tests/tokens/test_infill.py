"""Oracles: streams written out by hand, and the text itself, which must come back from every arrangement."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyceum.errors import DataError
from lyceum.tokens.infill import arrange, cut, infill_prompt, parse_infill
from lyceum.tokens.tokenizer import Tokenizer

PIECES = [
    "", "x", "é", "e\u0301", "\u0301", "🦙", "👩\u200d👩\u200d👧", "🇨🇳", "我想学习", "\r\n", "\n", "\r", "\t  ", " ",
    "def f(a, b):\n    return a + b\n", "don't", "1314", "\x00", "\ufeff", "\ufffd", "\U0010ffff",
    *Tokenizer.SPECIALS,
]  # fmt: skip


def arranged(text: str, tokenizer: Tokenizer, draw: random.Random, *, prefix_late: bool) -> list[int]:
    return arrange(*map(tokenizer.encode, cut(text, draw.random)), tokenizer, prefix_late=prefix_late)


def check_it_comes_back(text: str, tokenizer: Tokenizer, draw: random.Random) -> None:
    for prefix_late in (False, True):
        ids = arranged(text, tokenizer, draw, prefix_late=prefix_late)
        prefix, middle, suffix = parse_infill(ids, tokenizer)
        assert prefix + middle + suffix == text and not (prefix_late and prefix)
        specials = [number for number in ids if number in tokenizer.special_ids.values()]
        marks = [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id, tokenizer.end_id]
        assert specials == marks and ids[-1] == tokenizer.end_id  # and none from the text, whatever it spells


def test_three_thousand_documents_come_back_from_both_arrangements(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for text in PIECES:
        check_it_comes_back(text, tokenizer, draw)
    for _ in range(3000):
        check_it_comes_back("".join(draw.choices(PIECES, k=draw.randrange(12))), tokenizer, draw)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(text=st.text(), seed=st.integers(0, 1 << 32))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str, seed: int) -> None:
    check_it_comes_back(text, tokenizer, random.Random(seed))


def test_the_two_arrangements_by_hand(tokenizer: Tokenizer) -> None:
    pre, suf, mid = tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id
    assert arrange([91, 92], [93], [94], tokenizer, prefix_late=False) == [
        pre, 91, 92, suf, 94, mid, 93, tokenizer.end_id,
    ]  # fmt: skip
    assert arrange([91, 92], [93], [94], tokenizer, prefix_late=True) == [
        pre, suf, 94, mid, 91, 92, 93, tokenizer.end_id,
    ]  # fmt: skip


def test_cuts_are_made_where_the_draws_say() -> None:
    for first, second, expected in [
        (0.25, 0.75, ("a", "bc", "")), (0.75, 0.25, ("a", "bc", "")), (0.0, 0.999, ("", "abc", "")),
        (0.5, 0.5, ("ab", "", "c")),
    ]:  # fmt: skip  # three characters have four places: [0, 1/4), [1/4, 1/2), ...
        assert cut("abc", iter([first, second]).__next__) == expected


def test_each_part_is_a_third_of_the_text_on_average() -> None:
    draw = random.Random(2).random
    sizes = [[len(part) for part in cut("🦙" * 300, draw)] for _ in range(4000)]
    for part in zip(*sizes, strict=True):
        assert sum(part) / len(part) == pytest.approx(100, abs=5)  # a part's spread is 71: 4.5 standard errors


def test_the_prompt_is_psm_up_to_the_middle_and_what_is_generated_is_parsed(tokenizer: Tokenizer) -> None:
    prompt = infill_prompt("<|fim_middle|> é", "return 🦙\n", tokenizer)
    whole = arrange(
        tokenizer.encode("<|fim_middle|> é"), [], tokenizer.encode("return 🦙\n"), tokenizer, prefix_late=False
    )
    assert prompt == [tokenizer.end_id, *whole[:-1]] and prompt[-1] == tokenizer.fim_middle_id
    for ending in ([], [tokenizer.end_id]):
        reply = [*tokenizer.encode("= 1\n"), *ending]
        assert parse_infill([*prompt, *reply], tokenizer) == ("<|fim_middle|> é", "= 1\n", "return 🦙\n")


def test_what_is_no_text_with_a_hole_is_refused(tokenizer: Tokenizer) -> None:
    ids = infill_prompt("a", "b", tokenizer)
    for broken in ([], ids[:-1], [*ids, tokenizer.fim_middle_id], ids[::-1]):
        with pytest.raises(DataError, match=r"its marks are (.|\n)*hint: "):
            parse_infill(broken, tokenizer)
