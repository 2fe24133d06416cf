"""The open book: what is taught can be told from the page, what is asked is new, and what is graded can be counted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.records import Conversation, Message, ToolCall, write_records
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.session import Session
from lyceum.errors import DataError
from lyceum.evals.tasks import open_book, tutor
from lyceum.evals.tasks.open_book import NO_ENTRY, Answer, ask, questions, summarise
from lyceum.evals.tasks.tutor import Question
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer
from lyceum.tools import lookup
from lyceum.tools.lookup import SCHEMA, Lookup

REAL = [f"mod{i}.sub{i % 5}.func{i}_{'abcdefg'[i % 7]}" for i in range(80)]


def fact(number: int, summary: str = "", package: str = "stdlib") -> ObjectFact:
    summary = summary or f"Do the thing number {number} to x."
    return ObjectFact(f"other.f{number}", "function", "other", "(x)", ("x",), "", summary, "", 1, package)


OTHERS = [fact(i) for i in range(40)]


@pytest.fixture(scope="module")
def taught() -> list[Conversation]:
    return list(open_book.conversations(OTHERS, REAL, 300, seed=1))


@pytest.fixture(scope="module")
def chat(taught: list[Conversation]) -> ChatFormat:
    return ChatFormat(Tokenizer.train([message.content for one in taught for message in one.messages], 400))


def asked_name(conversation: Conversation) -> str:
    return lookup.asked_name(conversation.messages[1].tool_calls[0].arguments) or ""


# -- what is taught ----------------------------------------------------------------------------------------------------


def test_a_conversation_is_question_call_result_and_the_result_again(taught: list[Conversation]) -> None:
    sentences = {one.summary for one in OTHERS}
    words = {word for sentence in sentences for word in sentence.split()}
    for one in taught:
        user, call, result, answer = one.messages
        assert [m.role for m in one.messages] == ["user", "assistant", "tool", "assistant"]
        name = asked_name(one)
        assert name in user.content and call.tool_calls[0].name == "lookup" and not call.content
        if result.content == f"no entry for {name}":
            assert answer.content == NO_ENTRY
        else:
            assert answer.content == result.content
            assert set(result.content.split()) <= words
    misses = [one for one in taught if one.messages[-1].content == NO_ENTRY]
    assert 0.06 < len(misses) / len(taught) < 0.19
    as_they_are = [one for one in taught if one.messages[-1].content in sentences]
    assert 0.3 < len(as_they_are) / len(taught) < 0.65


def test_calls_and_answers_are_learned_and_results_and_the_schema_are_not(
    chat: ChatFormat, taught: list[Conversation]
) -> None:
    for one in taught[:20]:
        rendered = chat.render(one)
        pairs = zip(rendered.ids, rendered.weights, strict=True)
        learned = chat.tokenizer.decode((token for token, weight in pairs if weight == 1.0), keep_special=True)
        call = json.dumps({"name": "lookup", "arguments": {"name": " " + asked_name(one)}})
        assert learned == f"<tool_call>{call}</tool_call><|im_end|>{one.messages[-1].content}<|im_end|>"
        given = chat.tokenizer.decode(token for token, w in zip(rendered.ids, rendered.weights, strict=True) if w == 0)
        assert json.dumps(SCHEMA) in given and one.messages[2].content in given


def test_what_is_taught_is_what_a_session_would_have_seen(chat: ChatFormat, taught: list[Conversation]) -> None:
    for one in taught[:50]:
        user, call, result, answer = one.messages
        reply = chat.reply(call).ids
        assert chat.parse(reply) == call  # the call is read back as it was written
        prompt = chat.prompt(Conversation((user,), one.tools))
        again = chat.continue_prompt([*prompt, *reply], [result]) + chat.reply(answer).ids
        assert again == chat.render(one).ids[: len(again)]
        assert chat.prompt(Conversation((Message("system", ""), user), one.tools)) == prompt


def test_taught_names_are_new_and_meaningless_and_of_the_training_split(taught: list[Conversation]) -> None:
    names = [asked_name(one) for one in taught]
    assert len(set(names)) == len(names) and not set(names) & set(REAL)
    assert all("." in name and tutor.split_of(name) == "train" for name in names)
    parts = {part for name in REAL for part in name.split(".")}
    mixed = [name for name in names if parts & set(name.split("."))]
    assert 0.35 < len(mixed) / len(names) < 0.65
    held_out = tutor.Names.divide([], REAL, seed=1, made_up=2000).classes
    assert not set(names) & {name for cell in held_out.values() for name in cell["held_out"]}


def test_no_held_out_phrasing_is_taught(taught: list[Conversation]) -> None:
    held_out = tutor.TEMPLATES["does"]["held_out"]
    for one in taught:
        said = one.messages[0].content.rstrip("?.").lower()
        assert said not in {t.format(name=asked_name(one)).rstrip("?.").lower() for t in held_out}


def test_the_same_seed_teaches_the_same_and_another_seed_other_names(taught: list[Conversation]) -> None:
    assert list(open_book.conversations(OTHERS, REAL, 300, seed=1)) == taught
    other = {asked_name(one) for one in open_book.conversations(OTHERS, REAL, 300, seed=2)}
    assert len(other & {asked_name(one) for one in taught}) < 10


def test_a_lesson_has_as_many_as_asked_and_some_that_need_no_call() -> None:
    def said(cell: str, text: str) -> Conversation:
        return Conversation((Message("user", text), Message("assistant", "yes")), meta={"cell": cell})

    rest = [said("small_talk", f"hello {i}") for i in range(30)] + [said("studied", "What does len do?")] * 30
    made = open_book.lesson(OTHERS, REAL, rest, 100, seed=1)
    free = [one for one in made if len(one.messages) == 2]
    assert len(made) == 100 and len(free) == 8
    assert all(one.tools == (SCHEMA,) and one.meta["cell"] == "open_book" for one in made)
    assert all("hello" in one.messages[0].content for one in free)


def test_long_sentences_are_not_copied_and_none_at_all_is_an_error() -> None:
    long = fact(1, " ".join(["word"] * 26))
    made = open_book.conversations([long, fact(2)], REAL, 40, seed=1)
    assert {fact(2).summary, NO_ENTRY} < {one.messages[-1].content for one in made}
    assert not any("word" in one.messages[-1].content for one in made)
    with pytest.raises(DataError, match="no sentences to copy"):
        list(open_book.conversations([long], REAL, 1, seed=1))


def test_the_name_is_cut_into_the_same_tokens_in_the_question_and_in_the_call(
    chat: ChatFormat, taught: list[Conversation]
) -> None:
    encode = chat.tokenizer.encode
    inside = [one for one in taught if " " + asked_name(one) in one.messages[0].content]
    assert len(inside) > 0.8 * len(taught)
    for one in inside:
        name = " ".join(map(str, encode(" " + asked_name(one))))
        for text in (one.messages[0].content, one.messages[1].tool_calls[0].arguments):
            assert name in " ".join(map(str, encode(text)))
    quoted = [encode(asked_name(one)) == encode(" " + asked_name(one)) for one in inside]
    assert not any(quoted)  # the control: without its space a name is cut otherwise


def test_questions_as_typed_keep_the_name() -> None:
    chance = random.Random(0)
    typed = {open_book.as_typed("What does Ab.cD? do?", "Ab.cD?", chance) for _ in range(200)}
    assert typed == {f"{w}hat does Ab.cD? do{mark}" for w in "Ww" for mark in ("", "?")}


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_held_out_questions_are_about_the_book_and_nothing_seen() -> None:
    book = Lookup.of_packages(["statistics"])
    all_of_it = questions(book, 1000)
    assert len(all_of_it) > 15 and len({q.reference for q in all_of_it}) == len(all_of_it)
    for q in all_of_it:
        assert q.name in q.text and q.name.startswith("statistics.") and q.reference == book.find(q.name)
        assert q.template in tutor.TEMPLATES["does"]["held_out"] and q.cell == "open_book"
    seen = all_of_it[0].reference
    assert seen.lower() not in {q.reference.lower() for q in questions(book, 1000, seen=[seen.upper()])}
    assert questions(book, 5) == all_of_it[:5]


# -- asking and grading ------------------------------------------------------------------------------------------------

BOOK = Lookup.of_mapping({"a.b": "Do it now.", "c.d": "Stop it."})
FIRST = Question("What is a.b good for?", "open_book", "does", "Do it now.", name="a.b")


class Script(nn.Module):
    """A model that says what was written for each prompt, whatever runs beside it."""

    def __init__(self, chat: ChatFormat, replies: dict[str, str], context_length: int = 300) -> None:
        super().__init__()
        self.chat, self.replies = chat, replies
        self.spec = SimpleNamespace(vocab_size=chat.tokenizer.vocab_size, context_length=context_length)

    def generate(self, prompts: list[list[int]], params: Any) -> list[SimpleNamespace]:
        told = [self.chat.tokenizer.decode(prompt, keep_special=True) for prompt in prompts]
        replies = [next(reply for key, reply in self.replies.items() if text.endswith(key)) for text in told]
        assert all(len(prompt) <= self.spec.context_length for prompt in prompts)
        return [SimpleNamespace(ids=self.ids(reply)) for reply in replies]

    def ids(self, reply: str) -> list[int]:
        """Ids of a reply in which the marks of a call are special tokens."""
        tokenizer = self.chat.tokenizer
        pieces: list[int] = []
        for number, part in enumerate(reply.replace("</tool_call>", "<tool_call>").split("<tool_call>")):
            if number:
                pieces.append(tokenizer.tool_call_start_id if number % 2 else tokenizer.tool_call_end_id)
            pieces += tokenizer.encode(part)
        return [*pieces, tokenizer.turn_end_id]

    @property
    def context_length(self) -> int:
        return self.spec.context_length


def call(name: str, tool: str = "lookup") -> str:
    return f'<tool_call>{{"name": "{tool}", "arguments": {{"name": "{name}"}}}}</tool_call>'


def after(text: str, tool: bool = False) -> str:
    said = f"tool\n<tool_response>{text}</tool_response>" if tool else f"user\n{text}"
    return f"<|im_start|>{said}<|im_end|>\n<|im_start|>assistant\n"


def asked(chat: ChatFormat, replies: dict[str, str], wanted: list[Question], context_length: int = 300) -> list[Answer]:
    script = Script(chat, replies, context_length)
    return ask(script, chat, wanted, BOOK, SamplingParams(stop_ids=chat.stop_ids))  # type: ignore[arg-type]


def test_every_question_is_asked_called_and_answered(chat: ChatFormat) -> None:
    def question(name: str, reference: str = "Do it now.") -> Question:
        return Question(f"Say {name} to me.", "open_book", "does", reference, name=name)

    replies = {
        after("Say a.b to me."): call("a.b"),
        after("Do it now.", tool=True): "Do it now.",
        after("Say c.d to me."): call("c.d"),
        after("Stop it.", tool=True): "Stop it now.",
        after("Say e.f to me."): call("e.g"),  # another name
        after("no entry for e.g", tool=True): NO_ENTRY,
        after("Say g.h to me."): "Do it now.",  # no call
        after("Say i.j to me."): '<tool_call>{"name": "lookup"</tool_call>',  # no JSON
        after("Say k.l to me."): call("k.l", tool="search"),
        after("error: there is no tool 'search'", tool=True): "",
    }
    wanted = [question("a.b"), question("c.d", "Stop it."), *map(question, ("e.f", "g.h", "i.j", "k.l"))]
    answers = asked(chat, replies, wanted)
    assert [a.called for a in answers] == [True, True, True, False, True, True]
    assert [a.valid for a in answers] == [True, True, False, False, False, False]
    assert [a.text for a in answers[:4]] == ["Do it now.", "Stop it now.", NO_ENTRY, "Do it now."]
    assert [a.exact for a in answers] == [True, False, False, True, False, False]
    row = summarise(answers)
    assert row["call_rate"] == pytest.approx(5 / 6) and row["n"]["call_rate"] == 6
    assert row["valid_calls"] == pytest.approx(2 / 5) and row["n"]["valid_calls"] == 5
    assert row["copied"] == pytest.approx(1 / 2) and row["n"]["copied"] == 2
    assert row["exact"] == pytest.approx(2 / 6)
    # word F1: 1, "stop it now" for "stop it" 2*2/(3+2) = 0.8, no word shared but none: 0, 1, the broken call, nothing
    broken = answers[4].f1
    assert row["f1_unseen"] == pytest.approx((1 + 0.8 + 0 + 1 + broken + 0) / 6) and broken < 0.2
    low, high = row["intervals"]["exact"]
    assert 0 <= low < row["exact"] < high <= 1


def test_measures_over_nothing_are_none_and_not_nan(chat: ChatFormat) -> None:
    row = summarise(asked(chat, {after(FIRST.text): "Do it now."}, [FIRST]))
    assert row["call_rate"] == 0.0 and row["valid_calls"] is None and row["copied"] is None
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_result_that_leaves_no_room_in_the_context_has_no_answer(chat: ChatFormat) -> None:
    prompt = chat.prompt(Conversation((Message("user", FIRST.text),), (SCHEMA,)))
    answers = asked(chat, {after(FIRST.text): call("a.b")}, [FIRST], len(prompt) + 1)
    assert answers[0].valid and answers[0].text == "" and not answers[0].exact


class Parrot(nn.Module):
    """Looks at its whole context through a real engine: calls the name it was asked for, then repeats the result."""

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__()
        self.chat = chat
        self.spec = SimpleNamespace(vocab_size=chat.tokenizer.vocab_size, context_length=400)
        self.read: list[int] = []
        self.said: Iterator[int] = iter(())

    def forward(self, tokens_BT: Tensor, *, cache: Any = None) -> Tensor:
        self.read += tokens_BT[0].tolist()
        return torch.zeros(*tokens_BT.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        text = self.chat.tokenizer.decode(self.read, keep_special=True)
        if text.endswith("<|im_start|>assistant\n"):
            last = text.split("<|im_start|>")[-2]
            if last.startswith("tool"):
                reply = Message("assistant", last.split("<tool_response>")[1].split("</tool_response>")[0])
            else:
                name = next(word for word in last.split() if "." in word[:-1])
                reply = Message("assistant", "", (ToolCall("call_0", "lookup", lookup.arguments(name)),))
            self.said = iter(self.chat.reply(reply).ids)
        return nn.functional.one_hot(torch.tensor([next(self.said)]), self.spec.vocab_size).float()


def test_a_session_lets_a_model_look_a_name_up(chat: ChatFormat) -> None:
    session = Session(
        Engine(Parrot(chat)),
        chat,
        tools={lookup.NAME: BOOK},
        params=SamplingParams(max_tokens=80, temperature=0.0),
        start=Conversation((Message("system", ""),), (SCHEMA,)),
    )
    assert session.say("What does a.b do?").content == "Do it now."
    session.reset()
    session.engine.model.read.clear()
    assert "".join(session.stream("And x.y please")) == "no entry for x.y"
    assert [m.role for m in session.messages] == ["system", "user", "assistant", "tool", "assistant"]


# -- the eval section's part -------------------------------------------------------------------------------------------


def folders(path: Path, taught: int, package: str) -> dict[str, Path]:
    write_records(path / "objects.jsonl", [fact(1, package=package)])
    write_records(path / "others.jsonl", [fact(2, package=package)])
    (path / "report.json").write_text(json.dumps({"conversations": {"open_book": taught} if taught else {}}))
    return {"lessons": path, "corpus": path}


class Silent(Script):
    """Never calls."""

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__(chat, {"assistant\n": "No."})


def test_the_report_is_about_the_last_model_and_packages_it_has_not_read(chat: ChatFormat, tmp_path: Path) -> None:
    engines: dict[str, Any] = {"sft": Silent(chat), "ppo": Silent(chat)}
    params = SamplingParams(stop_ids=chat.stop_ids)
    packages = ("json", "statistics", "no_such_package")
    row = open_book.report(engines, chat, params, packages=packages, count=7, **folders(tmp_path, 5, "json"))
    assert row is not None
    assert row["packages"] == ["statistics"] and row["model"] == "ppo" and row["taught"] == 5
    assert row["n"]["call_rate"] == row["sft"]["n"]["call_rate"] == 7 and row["call_rate"] == 0.0
    assert json.loads(json.dumps(row)) == row


def test_there_is_no_report_without_a_lesson_or_a_package(chat: ChatFormat, tmp_path: Path) -> None:
    def report(taught: int, package: str) -> Any:
        given = folders(tmp_path, taught, package)
        return open_book.report({}, chat, SamplingParams(), packages=("json",), count=7, **given)

    assert report(0, "stdlib") is None
    assert report(5, "json") is None


def test_a_corpus_without_the_file_of_others_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        open_book.read_facts(tmp_path / "others.jsonl")
    assert "corpus" in caught.value.hint
