"""Verifiers against answers worked out by hand; what a rule cannot decide is None, never wrong."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from lyceum.errors import ConfigError
from lyceum.evals.verify import arithmetic, check_pattern, exact_answer, form, last_number, value_of

TAGS = r".*<answer>(.*)</answer>"


@pytest.mark.parametrize(
    ("response", "meta", "score"),
    [
        ("Paris", {"answer": "Paris"}, 1.0),
        ("  paris.\n", {"answer": "Paris"}, 1.0),
        ("**Paris**!", {"answer": ["Lutetia", "Paris"]}, 1.0),
        ("It is Paris", {"answer": "Paris"}, 0.0),  # exact: no more words than the answer
        ("7", {"answer": 7}, 1.0),
        ("", {"answer": "Paris"}, 0.0),
        ("Paris", {}, None),
    ],
)
def test_exact_answer(response: str, meta: dict[str, Any], score: float | None) -> None:
    assert exact_answer("Capital of France?", response, meta) == score


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        ("What is 3 * (4 + 5)?", "3 * 9 = 27", 1.0),
        ("What is 3 * (4 + 5)?", "27.", 1.0),
        ("What is 3 * (4 + 5)?", "It is 27, not 17", 0.0),  # the last number counts
        ("What is 3 * (4 + 5)?", "no idea", 0.0),
        ("Compute 7 - 12.", "7 - 12 = -5", 1.0),
        ("Compute 1000 × 2 ÷ 3", "666.6666667", 1.0),
        ("Compute 1000 × 2 ÷ 3", "2000/3", 1.0),
        ("Compute 1000 × 2 ÷ 3", "666.7", 0.0),
        ("Compute 2^10 + 1,", "1,025", 1.0),
        ("Compute 1 / 0", "0", None),
        ("How are you?", "42", None),
        ("There are 12 of them.", "12", None),  # a number is no sum
    ],
)
def test_arithmetic_in_the_prompt(prompt: str, response: str, score: float | None) -> None:
    assert arithmetic(prompt, response, {}) == score


def test_a_known_answer_comes_before_the_sum_in_the_prompt() -> None:
    assert arithmetic("What is 1 + 1 in binary?", "10", {"answer": "10"}) == 1.0


@pytest.mark.parametrize(
    ("response", "right", "shaped"),
    [
        ("I think so.\n<answer>8</answer>", 1.0, 1.0),
        ("<answer>9</answer>", 0.0, 1.0),
        ("8", 0.0, 0.0),  # right, but not in the form asked for
        ("<answer>8</answer> perhaps", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_with_a_pattern_only_an_answer_in_that_form_counts(response: str, right: float, shaped: float) -> None:
    assert arithmetic("3 + 5", response, {}, TAGS) == right
    assert exact_answer("3 + 5", response, {"answer": "8"}, TAGS) == right
    assert form("3 + 5", response, {}, TAGS) == form("3 + 5", response, {"format": TAGS}) == shaped
    assert form("3 + 5", response, {}) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", Fraction(2469, 2)),
        ("from 3 to -4", Fraction(-4)),
        ("5-2", Fraction(2)),
        ("a 3/4 share", Fraction(3, 4)),
        ("1/0", None),
        ("x2", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_no_sum_can_keep_the_machine_busy_or_run_code() -> None:
    assert value_of("9**9**9**9") is None and value_of("9 ^ 99999999") is None
    assert value_of("__import__('os').getcwd() + 1") is None
    assert value_of("(" * 3000 + "1+1" + ")" * 3000) is None


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        check_pattern("(")
