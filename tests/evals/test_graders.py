"""Graders against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lyceum.errors import ConfigError
from lyceum.evals.graders import bleu, check_formula, evaluate, fill, fuzzy_match, gleu, grade, rouge, rouge_l
from lyceum.evals.verify import VERIFIERS

ITEM = {"answer": "Paris", "parts": [{"name": "Seine"}], "year": 1789}


def check(operation: str, reference: str = "{{ item.answer }}") -> dict[str, Any]:
    found = {"type": "string_check", "name": "c", "input": "{{ sample.output_text }}"}
    return {**found, "operation": operation, "reference": reference}


@pytest.mark.parametrize(
    ("operation", "said", "score"),
    [
        ("eq", "Paris", 1.0), ("eq", "paris", 0.0), ("ne", "Rome", 1.0), ("ne", "Paris", 0.0),
        ("like", "It is Paris.", 1.0), ("like", "It is paris.", 0.0), ("ilike", "it is PARIS", 1.0), ("ilike", "Rome", 0.0),
    ],
)  # fmt: skip
def test_texts_are_checked(operation: str, said: str, score: float) -> None:
    assert grade(check(operation), said, ITEM) == score


def test_templates_name_the_sample_and_the_item() -> None:
    assert fill("{{sample.output_text}}! {{ item.parts.0.name }} {{item.year}}", "Oh", ITEM) == "Oh! Seine 1789"
    assert fill("{{ sample.output_json.a.1 }}", '{"a": [1, {"b": "é"}]}', ITEM) == '{"b": "é"}'
    assert fill("{{ item.parts }}", "", ITEM) == '[{"name": "Seine"}]'
    assert grade(check("eq", "{{ item.nothing }}"), "x", ITEM) is None  # a row without the field is no wrong answer
    assert grade(check("eq", "{{ item.parts.7 }}"), "x", ITEM) is None
    assert grade({**check("eq"), "input": "{{ sample.output_json.a }}"}, "no json", ITEM) is None
    assert grade(check("eq", "{{ item.answer }}"), "{{ item.answer }}", ITEM) == 0.0  # what is said is no template


def test_texts_are_compared() -> None:
    # kitten, sitting: the longest common subsequence is "ittn", 4 of 6 + 7 letters
    assert fuzzy_match("kitten", "sitting") == pytest.approx(2 * 4 / 13)
    assert fuzzy_match("", "") == 1.0 and fuzzy_match("a", "") == 0.0
    said, wanted = "the cat sat on the mat", "the cat is on the mat"
    assert rouge(said, wanted, 1) == pytest.approx(5 / 6)  # the, cat, on, the, mat
    assert rouge(said, wanted, 2) == pytest.approx(3 / 5)  # the cat, on the, the mat
    assert rouge_l(said, wanted) == pytest.approx(5 / 6)
    assert rouge("a b", "a b", 3) == 1.0 and rouge("a b", "c d", 1) == 0.0
    # precisions 5/6, (3+1)/(5+1), (1+1)/(4+1), (0+1)/(3+1); as long as the reference: no penalty
    assert bleu(said, wanted) == pytest.approx((5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert bleu("the cat", "the cat sat down") == pytest.approx(math.exp(1 - 4 / 2) * 1.0)
    assert gleu(said, wanted) == pytest.approx((5 + 3 + 1 + 0) / (6 + 5 + 4 + 3))
    grader = {"type": "text_similarity", "name": "s", "input": "{{ sample.output_text }}", "reference": wanted}
    assert grade({**grader, "evaluation_metric": "gleu"}, said, {}) == pytest.approx(9 / 18)


def test_a_judge_is_asked_and_its_number_kept_within_the_range() -> None:
    heard: list[Sequence[Mapping[str, str]]] = []

    def judge(grader: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
        heard.append(messages)
        return str(messages[-1]["content"])

    asked = [
        {"role": "system", "content": "Rate {{ item.answer }}"},
        {"role": "user", "content": "{{ sample.output_text }}"},
    ]
    grader = {"type": "score_model", "name": "j", "model": "m", "input": asked, "range": [0, 10]}
    assert [grade(grader, said, ITEM, judge) for said in ("7", "I say 7.5!", "99", "-3", "none")] == [
        7,
        7.5,
        10,
        0,
        None,
    ]
    assert [grade(grader, said, ITEM, judge) for said in (".5", "1e-2", "about 3.")] == [0.5, 0.01, 3.0]
    assert heard[0][0] == {"role": "system", "content": "Rate Paris"}


def test_several_graders_make_one_score_by_a_formula() -> None:
    graders = {"right": check("ilike"), "short": check("ne", "x")}
    grader = {"type": "multi", "name": "m", "graders": graders, "calculate_output": "0.75 * right + min(short, 0.25)"}
    assert (
        grade(grader, "paris", ITEM) == 1.0 and grade(grader, "x", ITEM) == 0.0 and grade(grader, "Rome", ITEM) == 0.25
    )
    assert grade({**grader, "calculate_output": "right / (short - 1)"}, "paris", ITEM) is None  # no division by 0
    assert evaluate("2 ^ 3 - sqrt(a) + abs(-1)", {"a": 16.0}) == 5.0


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "a.b", "a[0]", "(lambda: 1)()", "b", "a if a else 1", "min()", "sqrt(1, 2)", "", "a; a", "'a'"]
    + ["(" * 300 + "a" + ")" * 300, "-" * 500 + "a", "a" * 2000],
)
def test_a_formula_is_arithmetic_and_nothing_else(formula: str) -> None:
    with pytest.raises(ConfigError, match="is no formula"):
        check_formula(formula, ["a"])


def test_a_formula_cannot_run_away() -> None:
    for formula in ("9 ** 9 ** 9 ** 9", "exp(exp(exp(9)))", "a / 0", "log(0)"):
        grader = {"type": "multi", "name": "m", "graders": {"a": check("eq")}, "calculate_output": formula}
        assert grade(grader, "x", ITEM) is None


def test_as_a_verifier_it_reads_the_prompts_meta() -> None:
    assert VERIFIERS["grader"]("?", "Paris", {"grader": check("eq"), "item": ITEM}, "") == 1.0
    assert VERIFIERS["grader"]("?", "Paris", {}, "") is None
