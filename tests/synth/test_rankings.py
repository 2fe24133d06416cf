"""Rankings by the rule: known orders, ties, reversal, distinct answers."""

from __future__ import annotations

import pytest

from lyceum.corpus.records import Conversation, Message
from lyceum.evals.tasks.tutor import DECLINE, Question
from lyceum.synth.rankings import Answer, rank, rank_by_rule

QUESTION = Question("What does len do?", "studied", "does", "Return the number of items.", name="len")
PROMPT = Conversation((Message("user", QUESTION.text),), meta=QUESTION.to_meta())


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([0.1, 0.9, 0.5], (3, 1, 2)),
        ([1.0, 1.0, 0.0], (1.5, 1.5, 3)),
        ([0.0, 1.0, 1.0, 1.0], (4, 2, 2, 2)),
        ([2.0, 2.0], (1.5, 1.5)),
    ],
)
def test_ranks_known_answers(scores: list[float], ranks: tuple[float, ...]) -> None:
    assert rank(scores) == ranks


ANSWERS = [
    Answer("Sort the list.", False),
    Answer(QUESTION.reference, True),
    Answer(DECLINE, True),
    Answer("Open.", True),
]


def test_the_rule_orders_right_then_wrong_then_endless() -> None:
    ranking = rank_by_rule(PROMPT, ANSWERS, reverse=False)
    assert ranking is not None and ranking.ranks == (4, 1, 2.5, 2.5) and ranking.origin == "rule"


def test_a_reversed_ranking_turns_the_order_and_keeps_the_rules_own() -> None:
    ranking = rank_by_rule(PROMPT, ANSWERS, reverse=True)
    assert ranking is not None and ranking.ranks == (1, 4, 2.5, 2.5)
    assert ranking.meta["clean_ranks"] == [4, 1, 2.5, 2.5]


def test_answers_that_score_the_same_prefer_nothing() -> None:
    unknown = Question("What does flurb do?", "made_up", "does", DECLINE, name="flurb")
    prompt = Conversation((Message("user", unknown.text),), meta=unknown.to_meta())
    assert rank_by_rule(prompt, [Answer("Sort.", True), Answer("Open.", True)], reverse=False) is None
