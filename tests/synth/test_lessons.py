"""The lesson keeps its promises: splits that do not meet, shares as set, and the same lesson from the same seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lyceum.config import build
from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.records import Message
from lyceum.errors import DataError
from lyceum.evals.metrics import words
from lyceum.evals.tasks import tutor
from lyceum.synth.lessons import EXAMS, Lesson, LessonsConfig, restyle


def facts(count: int) -> list[ObjectFact]:
    return [
        ObjectFact(
            name=f"mod{i % 7}.func{i}",
            kind="function",
            module=f"mod{i % 7}",
            signature="(x)",
            parameters=("x",),
            returns="",
            summary=f"Do the thing number {i} to x.",
            doc="",
            uses=1,
            package="stdlib",
        )  # fmt: skip
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    settings = {"practice": 400, "held_out": 40, "unstudied": 60, "near_miss": 40, "made_up": 40}
    return Lesson(
        facts(60), [f"other{i}.thing{i}" for i in range(400)], build(LessonsConfig, settings, "lessons"), seed=3
    )


def normalised(text: str) -> str:
    return " ".join(words(text))


@pytest.mark.parametrize("split", EXAMS)
def test_no_question_of_an_exam_stands_in_training_or_practice(lesson: Lesson, split: str) -> None:
    exam = {normalised(q.text) for q in lesson.exam(split)}
    asked = {normalised(m.content) for c in lesson.train() for m in c.messages if m.role == "user"}
    asked |= {normalised(q.text) for q in lesson.practice()}
    assert not exam & asked


@pytest.mark.parametrize("split", EXAMS)
def test_no_template_of_an_exam_is_used_in_training_or_practice(lesson: Lesson, split: str) -> None:
    held_out = {q.template for q in lesson.exam(split) if q.template}
    assert held_out
    assert not held_out & {q.template for q in lesson.practice()}


def test_the_two_exams_share_no_question_template_or_unknown_name(lesson: Lesson) -> None:
    dev, held_out = lesson.exam("dev"), lesson.exam("held_out")
    for what in (
        lambda q: normalised(q.text),
        lambda q: q.template or None,
        lambda q: q.name if q.cell in tutor.UNKNOWN_CELLS else None,
    ):
        assert not ({what(q) for q in dev} & {what(q) for q in held_out}) - {None}


@pytest.mark.parametrize("split", EXAMS)
def test_no_unknown_name_is_shared_between_splits(lesson: Lesson, split: str) -> None:
    held_out = {q.name for q in lesson.exam(split) if q.cell in tutor.UNKNOWN_CELLS}
    practised = {q.name for q in lesson.practice() if q.cell in tutor.UNKNOWN_CELLS}
    assert held_out and practised and not held_out & practised
    taught = " ".join(m.content for c in lesson.train() for m in c.messages if m.role == "user").lower().split()
    stripped = {word.strip("?.,!:") for word in taught}
    assert not {name.lower() for name in held_out | practised} & stripped


def test_every_cell_has_held_out_questions(lesson: Lesson) -> None:
    assert {q.cell for q in lesson.exam("held_out")} == set(tutor.CELLS)


def test_graceful_misses_have_their_share(lesson: Lesson) -> None:
    cells = [c.meta["cell"] for c in lesson.train()]
    assert cells.count("miss") / len(cells) == pytest.approx(lesson.config.miss_share, abs=0.005)


def test_every_conversation_ends_with_an_answer_and_every_prompt_with_a_question(lesson: Lesson) -> None:
    assert all(c.messages[-1].role == "assistant" and c.messages[-1].content for c in lesson.train())
    assert all(q.text and q.reference for q in [*lesson.practice(), *lesson.exam("held_out")])


def test_reference_answers_of_practice_prompts_are_right_by_the_rule(lesson: Lesson) -> None:
    wrong = [
        q
        for q in lesson.practice() + lesson.exam("held_out")
        if not tutor.grade(q, q.reference).right and q.cell != "small_talk"
    ]
    assert not wrong


def test_a_share_of_practice_prompts_comes_second_after_an_answered_question(lesson: Lesson) -> None:
    practice = lesson.practice()
    alone = list(lesson.prompts(practice))
    assert [c.messages for c in alone] == [(Message("user", q.text),) for q in practice]
    mixed = Lesson(lesson.objects, lesson.unstudied, replace(lesson.config, practice_follow_up_share=0.5), lesson.seed)
    prompts = list(mixed.prompts(practice))
    assert list(mixed.prompts(practice)) == prompts
    second = [c for c in prompts if len(c.messages) > 1]
    assert len(second) / len(prompts) == pytest.approx(0.5, abs=0.08)
    summaries = {fact.name: fact.summary for fact in lesson.objects}
    pointing = []
    for prompt, question in zip(prompts, practice, strict=True):
        asked = tutor.Question.from_meta(prompt.meta)
        assert (asked.reference, asked.cell, asked.name) == (question.reference, question.cell, question.name)
        assert prompt.messages[-1] == Message("user", asked.text)
        if len(prompt.messages) > 1:
            assert [m.role for m in prompt.messages] == ["user", "assistant", "user"]
            assert prompt.messages[1].content in summaries.values()
        if len(prompt.messages) > 1 and asked.cell == "studied" and asked.kind in ("takes", "module"):
            pointing.append(asked.text)
            assert prompt.messages[1].content == summaries[asked.name] and asked.name not in asked.text
    assert pointing
    untaught = {normalised(q.text) for split in EXAMS for q in lesson.exam(split)}
    assert not untaught & {normalised(m.content) for c in prompts for m in c.messages}


def test_the_same_seed_makes_the_same_lesson_and_another_seed_another(lesson: Lesson) -> None:
    def made(seed: int) -> Lesson:
        return Lesson(lesson.objects, [f"other{i}.thing{i}" for i in range(400)], lesson.config, seed)

    assert made(3).train() == lesson.train()
    assert made(3).exam("held_out") == lesson.exam("held_out")
    assert made(4).train() != lesson.train()
    assert made(4).exam("held_out") == lesson.exam("held_out")  # so that seeds can be compared question by question


def test_the_open_book_is_added_to_the_lesson_and_changes_nothing_else(lesson: Lesson) -> None:
    unstudied = [f"other{i}.thing{i}" for i in range(400)]
    settings = {name: getattr(lesson.config, name) for name in lesson.config.__dataclass_fields__}
    config = build(LessonsConfig, settings | {"open_book": 50}, "lessons")
    train = Lesson(lesson.objects, unstudied, config, 3, facts(90)[60:]).train()
    added = [c for c in train if c.meta["cell"] == "open_book"]
    rest = [c for c in train if c.meta["cell"] != "open_book"]
    assert len(added) == 50 and all(c.tools for c in added) and not any(c.tools for c in rest)
    assert sorted(map(repr, rest)) == sorted(map(repr, lesson.train()))


def test_restyled_questions_keep_the_name() -> None:
    chance = random.Random(0)
    for _ in range(300):
        text = restyle("What does json.dumps do?", chance, "json.dumps")
        assert "json.dumps" in text and "\n" not in text


def test_a_lesson_without_objects_is_refused() -> None:
    with pytest.raises(DataError, match="no studied objects"):
        Lesson([], [], LessonsConfig(), 0)
