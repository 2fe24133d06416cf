"""Open book: what does X do, of objects the model never saw, with a tool that knows; can it ask, and repeat what it is told?

One conversation: the tool's schema in the system turn, a question, the assistant's call of `lookup`, the result (never
learned: its loss weight is 0), and an answer that is the result word for word. Training pairs *scrambled* names (invented
syllables, and parts of real names put together anew) with sentences of real objects that the lesson does not study, at
random, and half of the sentences have some words exchanged: there is nothing to remember and little to guess, so what is
learned is to copy, the name into the call and the result into the answer. Some results are "no entry", answered by one
honest sentence; and in some conversations the tool is there but of no use.

The measure is taken on objects of a package the model never saw (`numpy`), in held-out phrasings:

    call_rate      questions to which the model calls a tool
    valid_calls    of those calls, such as parse and ask the tool for exactly the name in question
    f1_unseen      word F1 of the final answer against what the package's documentation says, over all questions
    exact          final answers that are that sentence, character by character, over all questions
    copied         of the valid calls, answers that repeat the result exactly

Training conversations are written by `lyceum lessons` (setting `open_book`), the measure is taken by `lyceum eval`. It is not
a test of choosing between tools or of calling twice: one tool, one call.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.pipeline import SHORT_WORDS
from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.errors import DataError
from lyceum.evals.metrics import mean_interval, token_f1
from lyceum.evals.tasks import tutor
from lyceum.evals.tasks.tutor import Question
from lyceum.log import log
from lyceum.tools import lookup
from lyceum.tools.lookup import Lookup

if TYPE_CHECKING:
    from lyceum.engine.engine import Engine
    from lyceum.engine.sampling import SamplingParams
    from lyceum.tokens.chat import ChatFormat

CELL = "open_book"
NO_ENTRY = "I found no entry for that name, so I will not guess."
NO_ENTRY_SHARE = 0.12  # of the training conversations: the name is not there
NO_CALL_SHARE = 0.08  # of the training conversations: the tool is there, and the question is another one
IN_A_SENTENCE_SHARE = 0.5  # of the looked-up names stand in a piece of the documentation, not in a phrasing
OTHER_WORDS_SHARE = 0.5  # of the results have words exchanged
NUM_SHOWN = 5  # questions that stand in the report with their answers: the first, unchosen

# --- training conversations ------------------------------------------------------------------------------------------


def scrambled_names(count: int, real: Iterable[str], seed: int) -> list[str]:
    """Dotted names that mean nothing: half of invented syllables, half of parts of real names put together anew.

    Some of those parts are themselves cut from two: a model copies only such pieces well as it has copied before. All are
    of the split `train` by the name's own hash, so that none is a held-out name of the tutor's lesson; none is real.

    Args:
        real: real dotted names, whose parts are used.
    """
    known = set(real)
    chance = random.Random(f"{seed} scrambled")
    invented = tutor.made_up_names(max(2 * count, 50), known, seed + 7919)  # another seed than the closed book's
    parts = sorted({part for name in known for part in name.split(".")})
    found: dict[str, None] = {}
    while len(found) < count:
        words = invented if not parts or len(found) % 2 == 0 else parts
        chosen = [chance.choice(words) for _ in range(chance.choice((1, 2, 2, 3)))]
        if words is parts:
            chosen = [_cut(word, chance.choice(parts), chance) if chance.random() < 0.4 else word for word in chosen]
        name = chance.choice("._..").join(chosen)
        if "." in name and name.count(".") < 4 and name not in known and tutor.split_of(name) == "train":
            found[name] = None
    return list(found)


def _cut(first: str, second: str, chance: random.Random) -> str:
    return first[: chance.randint(1, len(first))] + second[chance.randrange(len(second)) :]


def conversations(others: Sequence[ObjectFact], real: Iterable[str], count: int, seed: int) -> Iterator[Conversation]:
    """Conversations to learn the open book from, every one about another scrambled name.

    Args:
        others: facts whose sentences are the results: real objects that are not studied.
        real: real dotted names, whose parts are used for the scrambled ones.

    Raises:
        DataError: `others` has no short sentence.
    """
    sentences = sorted({fact.summary for fact in others if is_short(fact.summary)})
    if not sentences:
        raise DataError(
            "the open book has no sentences to copy", hint="name corpus packages with more objects than are studied"
        )
    chance = random.Random(f"{seed} open book")
    for name in scrambled_names(count, real, seed):
        asked = as_typed(_question(name, sentences, chance), name, chance)
        is_there = chance.random() >= NO_ENTRY_SHARE
        result = chance.choice(sentences) if is_there else lookup.no_entry(name)
        if is_there and chance.random() < OTHER_WORDS_SHARE:
            result = with_other_words(result, sentences, chance)
        yield conversation(asked, name, result, result if is_there else NO_ENTRY)


def _question(name: str, sentences: Sequence[str], chance: random.Random) -> str:
    """A training phrasing; or a piece of a sentence with the name in place of a word, so that it is known by its look.

    From phrasings alone a model learns where names stand in *them*: in a new one it begins or ends at the wrong word.
    """
    if chance.random() < IN_A_SENTENCE_SHARE:
        words = chance.choice(sentences).rstrip(".").split()
        place = chance.randrange(len(words))
        return " ".join([*words[max(0, place - 4) : place], name, *words[place + 1 : place + 5]]) + chance.choice("?.")
    template = chance.choice(tutor.TEMPLATES["does"]["train"])
    return tutor.phrase(template, name, kind=chance.choice(("function", "method", "class")))


def with_other_words(sentence: str, sentences: Sequence[str], chance: random.Random) -> str:
    """The sentence with a third of its words, at least one, taken from other sentences: it can be copied, not guessed."""
    words = sentence.split()
    for place in chance.sample(range(len(words)), -(-len(words) // 3)):
        words[place] = chance.choice(chance.choice(sentences).split())
    return " ".join(words)


def conversation(asked: str, name: str, result: str, answer: str) -> Conversation:
    """One whole open-book conversation."""
    call = ToolCall("call_0", lookup.NAME, lookup.arguments(name))
    messages = (
        Message("user", asked),
        Message("assistant", "", (call,)),
        Message("tool", result, tool_call_id=call.id),
        Message("assistant", answer),
    )
    return Conversation(messages, (lookup.SCHEMA,), {"cell": CELL, "kind": "does"})


def with_tool(conversation: Conversation) -> Conversation:
    """A conversation that needs no tool, with the tool offered."""
    return replace(conversation, tools=(lookup.SCHEMA,), meta={"cell": CELL, "kind": "no_call"})


def lesson(
    others: Sequence[ObjectFact], real: Iterable[str], rest: Sequence[Conversation], count: int, seed: int
) -> list[Conversation]:
    """The open-book part of a lesson: `count` conversations; those without a call are drawn from `rest`.

    Args:
        rest: the lesson's other conversations; those about names (studied or unknown) are not used.
    """
    about_names = {"studied", *tutor.UNKNOWN_CELLS}
    free = [one for one in rest if one.meta["cell"] not in about_names]
    num_free = min(round(count * NO_CALL_SHARE), len(free))
    chosen = random.Random(f"{seed} no call").sample(free, num_free)
    return [*conversations(others, real, count - num_free, seed), *map(with_tool, chosen)]


def as_typed(text: str, name: str, chance: random.Random) -> str:
    """The same question as people type it: now and then in lower case or without its mark, the name as it is."""
    roll = chance.random()
    if roll < 0.3:
        text = text.rstrip("?.")
    if 0.15 < roll < 0.45 and not text.startswith(name):
        text = text[:1].lower() + text[1:]
    return text


def is_short(sentence: str) -> bool:
    return len(sentence.split()) <= SHORT_WORDS


# --- held-out questions ----------------------------------------------------------------------------------------------


def questions(book: Lookup, count: int, *, seen: Iterable[str] = (), seed: int = 0) -> list[Question]:
    """At most `count` questions about names in the book, in held-out phrasings; no two have the same answer.

    Args:
        book: whose names are asked about.
        seen: sentences that were in training; objects with one of them are left out.
    """
    chance = random.Random(f"{seed} open book questions")
    names = sorted(book.names)
    chance.shuffle(names)
    used = {sentence.lower() for sentence in seen}
    found: list[Question] = []
    for name in names:
        if len(found) == count:
            break
        sentence = book.find(name) if "." in name else None
        if sentence is None or not is_short(sentence) or sentence.lower() in used:
            continue
        used.add(sentence.lower())
        template = chance.choice(tutor.TEMPLATES["does"]["held_out"])
        text = tutor.phrase(template, name)
        found.append(Question(text, CELL, "does", sentence, name=name, template=template))
    return found


# --- asking and grading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one model did with one question: whether it called, whether the call was right, what it was told, and said."""

    question: Question
    called: bool
    valid: bool
    result: str
    text: str

    @property
    def f1(self) -> float:
        return token_f1(self.text, self.question.reference)

    @property
    def exact(self) -> bool:
        return self.text.strip() == self.question.reference

    @property
    def copied(self) -> bool:
        return self.text.strip() == self.result


def ask(
    engine: Engine, chat: ChatFormat, questions: Sequence[Question], book: Lookup, params: SamplingParams
) -> list[Answer]:
    """Ask all questions at once, in two passes: the first reply; then, for those that called, the answer to the result.

    Calls in the second reply are not run: its text is the answer. So is the first reply's where nothing was called.
    """
    prompts = [chat.prompt(Conversation((Message("user", q.text),), (lookup.SCHEMA,))) for q in questions]
    first = engine.generate(prompts, params)
    replies = [chat.parse(output.ids) for output in first]
    results = [[Message("tool", run(call, book), tool_call_id=call.id) for call in r.tool_calls] for r in replies]
    going_on = {
        number: chat.continue_prompt([*prompts[number], *first[number].ids], given)
        for number, given in enumerate(results)
        if given
    }
    going_on = {number: prompt for number, prompt in going_on.items() if len(prompt) < engine.context_length}
    second = dict(zip(going_on, engine.generate(list(going_on.values()), params), strict=True))
    start = chat.tokenizer.tool_call_start_id
    answers = []
    for number, (question, reply, given) in enumerate(zip(questions, replies, results, strict=True)):
        text = reply.content if not given else ""  # a result that leaves no room in the context has no answer
        if number in second:
            text = chat.parse(second[number].ids).content
        called = start in first[number].ids
        answers.append(Answer(question, called, is_valid(reply, question), given[0].content if given else "", text))
    return answers


def run(call: ToolCall, book: Lookup) -> str:
    """The result of a call, as a session gives it."""
    return book(call.arguments) if call.name == lookup.NAME else f"error: there is no tool {call.name!r}"


def is_valid(reply: Message, question: Question) -> bool:
    """Whether a reply is one call that asks the tool for exactly the name in question."""
    return [(call.name, lookup.asked_name(call.arguments)) for call in reply.tool_calls] == [
        (lookup.NAME, question.name)
    ]


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """Every measure's mean, its 95 % interval under `intervals`, and the number of answers it is over under `n`."""
    values = {
        "call_rate": [float(a.called) for a in answers],
        "valid_calls": [float(a.valid) for a in answers if a.called],
        "f1_unseen": [a.f1 for a in answers],
        "exact": [float(a.exact) for a in answers],
        "copied": [float(a.copied) for a in answers if a.valid],
    }
    row: dict[str, Any] = {"intervals": {}, "n": {}}
    for name, numbers in values.items():
        mean, low, high = mean_interval(numbers)
        row[name] = mean if numbers else None
        row["intervals"][name], row["n"][name] = ([low, high] if numbers else None), len(numbers)
    return row


# --- the eval section's part -----------------------------------------------------------------------------------------


def report(
    engines: Mapping[str, Engine],
    chat: ChatFormat,
    params: SamplingParams,
    *,
    lessons: Path,
    corpus: Path,
    packages: Sequence[str],
    count: int,
) -> dict[str, Any] | None:
    """The open-book part of the table: the measures of the last engine, and each other's under its name.

    Args:
        engines: model name -> engine; the last is the one the report is about.
        lessons, corpus: the sections' folders.
        packages: whose objects are asked about; those that are not installed, or in the corpus, are left out.
        count: questions, over all packages.

    Returns:
        None, with a line that says why, if the lesson taught no open book or no package is left.
    """
    taught = json.loads((lessons / "report.json").read_text(encoding="utf-8")).get("conversations", {}).get(CELL, 0)
    if not taught:
        log.info("eval: no open book: the lesson has none (lessons.open_book)")
        return None
    seen = [fact for name in ("objects", "others") for fact in read_facts(corpus / f"{name}.jsonl")]
    books = _unseen_books(packages, {fact.package for fact in seen})
    asked: list[tuple[Lookup, list[Question]]] = []
    for left, book in zip(range(len(books), 0, -1), books.values(), strict=True):
        wanted = (count - sum(len(some) for _, some in asked)) // left
        asked.append((book, questions(book, wanted, seen=[fact.summary for fact in seen])))
    if not any(some for _, some in asked):
        log.info("eval: no open book: there is no package that the model has not seen (eval.open_book_packages)")
        return None
    rows, shown = {}, []
    for model, engine in engines.items():
        answers = [answer for book, some in asked for answer in ask(engine, chat, some, book, params)]
        rows[model], shown = summarise(answers), [_shown(answer) for answer in answers[:NUM_SHOWN]]
    last = list(engines)[-1]
    others = {model: row for model, row in rows.items() if model != last}
    return {"model": last, "packages": list(books), "taught": taught, **rows[last], **others, "examples": shown}


def _shown(answer: Answer) -> dict[str, str]:
    asked = answer.question
    return {"question": asked.text, "told": answer.result, "answer": answer.text, "reference": asked.reference}


def _unseen_books(packages: Sequence[str], seen: set[str]) -> dict[str, Lookup]:
    books = {}
    for package in dict.fromkeys(packages):
        if package in seen:
            log.info(f"eval: open book without {package}: the model has read it")
            continue
        try:
            books[package] = Lookup.of_packages([package])
        except DataError as error:
            log.info(f"eval: open book without {package}: {error.message}")
    return books


def read_facts(path: Path) -> list[ObjectFact]:
    """The facts of a corpus section's file.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(
            "the corpus section wrote no such file", file=path, hint="delete the corpus folder and run again"
        )
    with open(path, encoding="utf-8") as file:
        return [ObjectFact.from_json(json.loads(line)) for line in file]
