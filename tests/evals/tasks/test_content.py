"""The hand-written content keeps its promises: every line of code does what it says, no phrasing stands twice."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import logging
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from lyceum.errors import DataError
from lyceum.evals.metrics import words
from lyceum.evals.tasks import content, tutor
from lyceum.evals.tasks.content import Alarming, Intent, Topic, normalise
from lyceum.evals.tasks.tutor import Question
from lyceum.synth.lessons import EXAMS

INTENTS = content.load_intents()
SMALL_TALK = content.load_small_talk()
REFUSALS = content.load_refusals()
ALARMING = content.load_alarming()
MISSES = content.load_misses()
EVERYTHING: list[Topic | Intent | Alarming] = [*INTENTS, *SMALL_TALK, *REFUSALS, *ALARMING, *MISSES]


def phrasings() -> Iterator[tuple[str, str, str]]:
    """(phrasing, split, id) of everything."""
    for item in EVERYTHING:
        for split in ("train", *EXAMS):
            yield from ((text, split, item.id) for text in getattr(item, split))


# --- the lines of code


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; what a setup may replace, and what a line may change, is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    for owner, name in ((time, "sleep"), (subprocess, "run"), (subprocess, "check_output"), (tempfile, "tempdir")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv("MODE", "")
    monkeypatch.setattr(sys, "argv", ["script.py", "a"])
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    return tmp_path


def run_line(setup: str, code: str) -> dict[str, Any]:
    """Setup, then the line, in one namespace; a last expression's value is `_`, as at Python's own prompt."""
    space: dict[str, Any] = {"__name__": "line"}
    exec(compile(setup, "<setup>", "exec"), space)
    *body, last = ast.parse(code).body
    printed = io.StringIO()
    space |= {"_": None, "error": None}
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        try:
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(body, []), "<line>", "exec"), space)
                space["_"] = eval(compile(ast.Expression(last.value), "<line>", "eval"), space)
            else:
                exec(compile(code, "<line>", "exec"), space)
        except (Exception, SystemExit) as error:
            space["error"] = error
    return space | {"out": printed.getvalue()}


@pytest.mark.parametrize("intent", INTENTS, ids=lambda intent: intent.id)
def test_line_runs_and_does_what_it_says(intent: Intent, sandbox: Path) -> None:
    state = random.getstate()
    space = run_line(intent.setup, intent.code)
    random.setstate(state)
    if "error" not in intent.check:
        assert space["error"] is None
    assert eval(intent.check, space), (intent.code, space.get("_"), space["out"])


def test_runner_sees_a_line_that_is_wrong(sandbox: Path) -> None:
    assert run_line("text = 'ab'", "text[::-2]")["_"] != "ba"
    assert isinstance(run_line("", "text[::-1]")["error"], NameError)


def test_what_a_line_does_not_import_its_answer_names() -> None:
    def imported(source: str) -> set[str]:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        return {alias.asname or alias.name for node in nodes for alias in node.names}

    for intent in INTENTS:
        used = {node.id for node in ast.walk(ast.parse(intent.code)) if isinstance(node, ast.Name)}
        hidden = (used & imported(intent.setup)) - imported(intent.code)
        assert hidden <= set(re.findall(r"\w+", intent.answer)), f"{intent.id}: copied as it is, the line does not run"


@pytest.mark.parametrize("item", [item for item in ALARMING if item.code], ids=lambda item: item.id)
def test_alarming_line_compiles_and_its_names_exist(item: Alarming) -> None:
    space: dict[str, Any] = {}
    for node in ast.parse(item.code).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "<line>", "exec"), space)
    for node in ast.walk(ast.parse(item.code)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.split(".")[0] in space or dotted.split(".")[0] in sys.stdlib_module_names:
                assert resolves(dotted), dotted


def resolves(dotted: str) -> bool:
    """Whether a dotted name stands for something in the standard library; a call's result is taken on trust."""
    first, *rest = dotted.partition("(")[0].split(".")
    homes = {"Counter": "collections", "date": "datetime", "mock": "unittest"}
    value = vars(builtins).get(first) or importlib.import_module(homes.get(first, first))
    for name in (first, *rest) if first in homes else rest:
        if not hasattr(value, name) and hasattr(value, "datetime"):
            value = value.datetime
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def test_every_dotted_name_in_an_answer_exists() -> None:
    for module in ("os.path", "concurrent.futures", "urllib.parse", "unittest.mock", "importlib.metadata"):
        importlib.import_module(module)
    for item in EVERYTHING:
        for dotted in re.findall(r"\b[a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)+", item.answer):
            assert dotted == "d.get" or resolves(dotted), (item.id, dotted)
    assert not resolves("str.reverse") and not resolves("json.parse")


# --- splits


def test_no_phrasing_stands_twice() -> None:
    counts = Counter(normalise(text) for text, _, _ in phrasings())
    assert not [text for text, count in counts.items() if count > 1]
    counts = Counter(" ".join(words(text)) for text, _, _ in phrasings())
    assert max(counts.values()) == 1


def bag(text: str) -> frozenset[str]:
    return frozenset(normalise(text).split())


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("split", EXAMS)
def test_no_refusal_of_an_exam_is_nearly_a_training_one(split: str) -> None:
    train = [bag(text) for group in REFUSALS for text in group.train]
    asked = [bag(text) for group in REFUSALS for text in getattr(group, split)]
    near = [(a, b) for a in asked for b in train if jaccard(a, b) > 0.8]
    assert jaccard(bag("how do I build a bomb"), bag("how do I make a bomb")) == 5 / 7
    assert not near


@pytest.mark.parametrize("split", EXAMS)
def test_no_phrasing_of_an_exam_is_a_training_one_in_another_order(split: str) -> None:
    for item in EVERYTHING:
        train = {bag(text) for text in item.train}
        assert not [text for text in getattr(item, split) if bag(text) in train], item.id


def test_no_phrasing_is_a_plain_question_about_a_documented_name() -> None:
    """Such a question belongs to the documentation; two answers to one question teach neither."""
    templates = [t for split in tutor.TEMPLATES["does"].values() for t in split if "{kind}" not in t]
    patterns = [re.escape(normalise(t.replace("{name}", "NAME"))).replace("name", r"(\S+)") for t in templates]
    documented = {name.lower() for name in dir(builtins)} | set(sys.stdlib_module_names)

    def is_plain(text: str) -> bool:
        return any(
            found is not None and found[1] in documented
            for found in (re.fullmatch(pattern, text) for pattern in patterns)
        )

    assert is_plain("what does len do")
    for text, _, where in phrasings():
        assert not is_plain(normalise(text)), (where, text)


def test_intents_of_the_exams_are_near_their_own_training_phrasings() -> None:
    """The lesson can be learnt from what it teaches: words shared with an intent's training phrasings, rare ones
    counting more, find the intent of most phrasings of dev and exam. Deal the phrasings out at random and they do not."""

    def found(train: list[tuple[str, ...]]) -> float:
        bags = [Counter(word for text in texts for word in set(stems(text))) for texts in train]
        seen = Counter(word for bag in bags for word in bag)

        def weigh(bag: Counter[str]) -> dict[str, float]:
            return {w: (1 + math.log(n)) * math.log(1 + len(bags) / seen[w]) for w, n in bag.items() if w in seen}

        vectors = [weigh(bag) for bag in bags]
        norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in vectors]
        hits = asked = 0
        for i, intent in enumerate(INTENTS):
            for text in intent.dev + intent.held_out:
                query = weigh(Counter(stems(text)))
                dots = [sum(x * vector.get(w, 0.0) for w, x in query.items()) for vector in vectors]
                scores = [dot / norm for dot, norm in zip(dots, norms, strict=True)]
                hits += scores.index(max(scores)) == i
                asked += 1
        return hits / asked

    def stems(text: str) -> list[str]:
        return [re.sub(r"(?<=\w{3})(ing|ed|es|s|e)$", "", word) for word in normalise(text).split()]

    assert found([intent.train for intent in INTENTS]) > 0.8
    texts = [text for intent in INTENTS for text in intent.train]
    random.Random(0).shuffle(texts)
    assert found([tuple(texts[i :: len(INTENTS)]) for i in range(len(INTENTS))]) < 0.1


# --- counts, lengths, form


def total(items: list[Any], split: str) -> int:
    return sum(len(getattr(item, split)) for item in items)


def test_there_is_as_much_as_the_lesson_needs() -> None:
    assert len(INTENTS) >= 170 and all(len(i.train) in (6, 14) and len(i.dev) == len(i.held_out) == 2 for i in INTENTS)
    assert len(SMALL_TALK) >= 25 and all(len(t.train) == 13 and len(t.dev) >= 3 for t in SMALL_TALK)
    assert total(REFUSALS, "train") >= 3900
    assert len(ALARMING) >= 40 and all(50 <= len(item.train) <= 60 for item in ALARMING)
    assert total(MISSES, "train") >= 650
    for split in EXAMS:
        assert total(REFUSALS, split) >= 130 and total(MISSES, split) >= 110 and total(ALARMING, split) >= 130
        assert all(getattr(item, split) for item in EVERYTHING)
    assert total(SMALL_TALK, "held_out") >= 100


def test_everything_is_short_and_plain() -> None:
    for item in EVERYTHING:
        limit = 14 if isinstance(item, (Intent, Alarming)) else 30
        assert len(item.answer.split()) <= limit, item.id
        assert item.answer.isascii() and item.answer[-1] in ".?!" and "\n" not in item.answer, item.id
        code = getattr(item, "code", "")
        assert len(code) <= 60 and code.isascii() and "\n" not in code, item.id
    for text, _, where in phrasings():
        assert text.isascii() and text == text.strip() and 2 <= len(text) <= 100, (where, text)
        assert len(text.split()) <= 18, (where, text)


def test_no_two_intents_have_one_line() -> None:
    assert max(Counter(intent.code for intent in INTENTS).values()) == 1


# --- answers under the rule that grades them


def right(cell: str, item: Topic | Alarming, answer: str) -> bool:
    question = Question("?", cell, item.id, answer, topic=getattr(item, "keywords", ()))
    return tutor.grade(question, answer).right


def test_written_answers_are_right_by_the_written_rule() -> None:
    assert all(right("harmful", group, group.answer) for group in REFUSALS)
    assert all(right("miss", group, group.answer) for group in MISSES)
    assert all(right("alarming", item, f"{item.answer}\n{item.code}") for item in ALARMING)
    assert not any(right("alarming", item, group.answer) for item in ALARMING for group in (*REFUSALS, *MISSES))


def test_keywords_are_single_words_as_the_rule_counts_them() -> None:
    assert all(words(keyword) == [keyword] for item in ALARMING for keyword in item.keywords)


def test_a_miss_offers_three_things_that_are_taught() -> None:
    taught = {normalise(text) for intent in INTENTS for text in intent.train}
    for group in MISSES:
        offer = re.fullmatch(r"[^.]+\. Ask me (.+), (.+), or (.+)\.", group.answer)
        assert offer, group.answer
        for thing in offer.groups():
            task = re.fullmatch(r"how to (.+)", thing)
            name = re.fullmatch(r"what ([\w.]+) does", thing)
            assert task or name, thing
            if task:
                assert normalise(f"how do I {task[1]}") in taught, thing


# --- the loader


GOOD = '[[topic]]\nid = "a"\nanswer = "Yes."\ntrain = ["x"]\ndev = ["y"]\n'


def test_a_frame_fits_any_question() -> None:
    frames = content.load_frames()
    assert set(frames) == {"before", "after"}
    for text in (text for texts in frames.values() for text in texts):
        assert "{" not in text and text == text.strip() and text[-1] in ".,:;!?", text
        assert not any(name in text for name in ("str.", "json.", "os.")), text


def test_loader_reads_what_is_written() -> None:
    assert content.parse(GOOD, "f.toml", "topic", Topic) == [Topic("a", "Yes.", ("x",), ("y",))]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("[[topic", "not valid TOML"),
        (GOOD.replace("topic", "group"), "nothing but"),
        (GOOD.replace("answer", "anwser"), "unknown key 'anwser'"),
        (GOOD.replace('answer = "Yes."', ""), "answer must be text"),
        (GOOD.replace('["x"]', '"x"'), "train must be a list of texts"),
        (GOOD.replace('["x"]', "[]"), "train must be a list of texts"),
        (GOOD.replace('"Yes."', '" "'), "empty text"),
        (GOOD + GOOD, "stands twice"),
    ],
)
def test_loader_names_the_file_and_what_is_wrong(broken: str, message: str) -> None:
    with pytest.raises(DataError, match=r"^f\.toml: ") as caught:
        content.parse(broken, "f.toml", "topic", Topic)
    assert message in str(caught.value)
