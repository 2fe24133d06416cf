"""Judgements: whole in themselves, of finished answers in one place, nobody else's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lyceum.corpus.records import Message
from lyceum.errors import NotFound, StoreError
from lyceum.serve.judgements import MAX_REASON, MOST_ANSWERS
from lyceum.serve.store import Store


@pytest.fixture
def answers(store: Store) -> list[str]:
    """Two answers to one question of alice's."""
    chat = store.new("alice", system="Be brief.")
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    return [store.say("alice", chat.id, asked.id, "assistant", text, model="demo").id for text in ("5", "4")]


def test_a_judgement_outlives_edits_and_deletions_of_what_was_judged(store: Store, answers: list[str]) -> None:
    judged = store.judgements.compare("alice", answers, answers[1], reason="right", consent=True)
    asked = store.thread("alice", judged.conversation or "").messages[0]
    store.rewrite("alice", answers[0], "something else")
    store.rewrite("alice", asked.id, "another question")
    store.change("alice", judged.conversation or "", system="Be long.")
    store.delete_message("alice", answers[1])
    assert store.judgements.of("alice") == [judged] == list(store.judgements.everybodys())
    assert judged.prompt is not None
    assert judged.prompt.messages == (Message("system", "Be brief."), Message("user", "2 + 2?"))
    assert [answer.said.content for answer in judged.answers] == ["5", "4"]
    assert (judged.choice, judged.ranks, judged.kind) == (1, (2.0, 1.0), "comparison")


def test_deleting_a_conversation_deletes_its_judgements_but_those_left_on_purpose(
    store: Store, answers: list[str]
) -> None:
    judge, conversation = store.judgements, store.latest("alice")[0].id
    given = judge.rate("alice", answers[0], good=False, consent=True)
    judge.rate("alice", answers[1], good=True, consent=False)
    store.delete("alice", conversation, keep_judgements=True)
    (kept,) = judge.of("alice")
    assert (kept.id, kept.conversation, kept.answers) == (given.id, None, given.answers)

    chat = store.new("alice")
    judge.rate("alice", store.say("alice", chat.id, None, "assistant", "Hello").id, good=True, consent=True)
    store.delete("alice", chat.id)
    assert judge.of("alice") == [kept]


def test_only_finished_answers_in_one_place_are_judged(store: Store, answers: list[str]) -> None:
    judge, chat = store.judgements, store.latest("alice")[0].id
    asked = store.thread("alice", chat).messages[0].id
    with pytest.raises(StoreError, match="is no answer"):
        judge.rate("alice", asked, good=True, consent=True)
    draft = store.answer("alice", chat, asked, model="demo")
    with pytest.raises(StoreError, match="still being written"):
        judge.rate("alice", draft.message, good=True, consent=True)
    draft.finish()
    store.change("alice", chat, system="Be long.")
    other = store.say("alice", chat, asked, "assistant", "four")
    with pytest.raises(StoreError, match="different system prompts"):
        judge.compare("alice", [answers[0], other.id], other.id, consent=True)
    below = store.say("alice", chat, other.id, "user", "sure?")
    elsewhere = store.say("alice", chat, below.id, "assistant", "sure")
    with pytest.raises(StoreError, match="not to the same message"):
        judge.compare("alice", [answers[0], elsewhere.id], "tie", consent=True)
    assert judge.of("alice") == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda judge, a, b: judge.compare("alice", [a, a], a, consent=True),
        lambda judge, a, b: judge.compare("alice", [a], a, consent=True),
        lambda judge, a, b: judge.compare("alice", [], "tie", consent=True),
        lambda judge, a, b: judge.compare("alice", [a, b], "both", consent=True),
        lambda judge, a, b: judge.compare("alice", [a] * (MOST_ANSWERS + 1), a, consent=True),
        lambda judge, a, b: judge.rank("alice", [a, b], [1], consent=True),
        lambda judge, a, b: judge.rank("alice", [a, b], [1, math.nan], consent=True),
        lambda judge, a, b: judge.rank("alice", [a, b], [1, math.inf], consent=True),
        lambda judge, a, b: judge.rank("alice", [a, b], [0, 1], consent=True),
        lambda judge, a, b: judge.rank("alice", [a, b], [1, 2], acceptable=[True], consent=True),
        lambda judge, a, b: judge.correct("alice", a, " \n", consent=True),
        lambda judge, a, b: judge.rate("alice", a, good=True, reason="x" * (MAX_REASON + 1), consent=True),
    ],
)
def test_a_judgement_that_makes_no_sense_is_refused(
    store: Store, answers: list[str], wrong: Callable[..., object]
) -> None:
    with pytest.raises(StoreError) as said:
        wrong(store.judgements, *answers)
    assert not isinstance(said.value, NotFound) and store.judgements.of("alice") == []


def test_nobody_judges_or_sees_or_withdraws_anothers(store: Store, answers: list[str]) -> None:
    judge, conversation = store.judgements, store.latest("alice")[0].id
    judged = judge.rate("alice", answers[0], good=False, consent=True)
    for attempt in (
        lambda: judge.rate("bob", answers[0], good=True, consent=True),
        lambda: judge.correct("bob", answers[0], "x", consent=True),
        lambda: judge.compare("bob", answers, "tie", consent=True),
        lambda: judge.rank("bob", answers, [1, 2], consent=True),
        lambda: judge.of("bob", conversation),
        lambda: judge.withdraw("bob", judged.id),
    ):
        with pytest.raises(NotFound):
            attempt()
    assert judge.of("bob") == [] and judge.of("alice", conversation) == [judged]
    judge.withdraw("alice", judged.id)
    assert judge.of("alice") == []


def test_tools_are_part_of_the_prompt_that_was_judged(store: Store) -> None:
    tools = [{"type": "function", "function": {"name": "lookup"}}]
    chat = store.new("alice")
    asked = store.say("alice", chat.id, None, "user", "len?")
    answer = store.say("alice", chat.id, asked.id, "assistant", "A length.", parameters={"tools": tools})
    judged = store.judgements.rate("alice", answer.id, good=True, consent=True)
    assert judged.prompt is not None and judged.prompt.tools == tuple(tools)
