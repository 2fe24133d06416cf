"""What people ask the demo's tutor and what it should say, written by hand: TOML files and their readers.

The files are data for two rooms: `synth/lessons.py` teaches the `train` phrasings; the table of `evals` asks the
`held_out` ones, which stand apart in `exam.toml`. Whoever tunes a recipe looks at the `dev` ones only. No phrasing stands
in two places, whatever its case and marks (`tests/evals/tasks/test_content.py` says so, and runs every line of code). To
read one: `load_intents()[0].answer`. Not here: what is said about documented objects, which is made from their
documentation (`tutor.py`); only the templates of such questions are.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from lyceum.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Topic:
    """Requests that all get one answer: a topic of small talk, a group of refusals, or a group of graceful misses."""

    id: str
    answer: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intent:
    """A *how do I*: a sentence and a line of Python, which people see as two lines.

    `setup` is Python that runs before the line and is never shown; `check` is an expression that holds after it, where
    `_` is the line's value, `out` what it printed and `error` what it raised.
    """

    id: str
    answer: str
    code: str
    setup: str
    check: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alarming:
    """A harmless topic that sounds alarming; `code` may be empty, and an answer on topic uses one of `keywords`."""

    id: str
    answer: str
    code: str
    keywords: tuple[str, ...]
    train: tuple[str, ...]
    dev: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Templates:
    """Ways to ask one kind of question (`id`) about a documented object, with {name}, {leaf}, {kind} and {summary}."""

    id: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """What people say around any question: `id` is "before" or "after"."""

    id: str
    texts: tuple[str, ...]


Asked = TypeVar("Asked", Topic, Intent, Alarming, Templates)  # what the exam asks, too
Item = TypeVar("Item", Topic, Intent, Alarming, Templates, Frame)
_MAY_BE_EMPTY = {"code": (Alarming,), "setup": (Intent,)}


def load_intents() -> list[Intent]:
    """All *how do I* intents, the everyday core first."""
    return list(_read("intents.toml", "intent", Intent))


def load_small_talk() -> list[Topic]:
    """Greetings, who are you, thanks and the like."""
    return list(_read("small_talk.toml", "topic", Topic))


def load_refusals() -> list[Topic]:
    """Harmful requests by group of harm; those of dev and exam are new ones."""
    return list(_read("refusals.toml", "group", Topic))


def load_alarming() -> list[Alarming]:
    """Harmless requests that sound alarming, by topic."""
    return list(_read("alarming.toml", "topic", Alarming))


def load_misses() -> list[Topic]:
    """Requests outside the lesson; those of dev and exam are new ones."""
    return list(_read("misses.toml", "group", Topic))


def load_templates() -> list[Templates]:
    """Ways to ask about a documented object, by kind of question."""
    return list(_read("templates.toml", "kind", Templates))


@cache
def load_frames() -> dict[str, tuple[str, ...]]:
    """What people say "before" a question and "after" it."""
    return {frame.id: frame.texts for frame in parse(_text("frames.toml"), "frames.toml", "frame", Frame)}


def normalise(text: str) -> str:
    """A phrasing without case and marks: lower-case runs of letters and digits, one space between."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


@cache
def _read(name: str, key: str, kind: type[Asked]) -> tuple[Asked, ...]:
    exam = tomllib.loads(_text("exam.toml"))[name.removesuffix(".toml")]
    return tuple(replace(item, held_out=tuple(exam[item.id])) for item in parse(_text(name), name, key, kind))


def _text(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def parse(text: str, name: str, key: str, kind: type[Item]) -> list[Item]:
    """The items of one file's text, each checked.

    Args:
        text: TOML that holds one array of tables.
        name: the file's name, for messages.
        key: the array's name.
        kind: the dataclass of one item.

    Raises:
        DataError: not TOML, another key, or a value that is missing, empty or of another type; ids that repeat.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"not valid TOML: {error}", file=name) from None
    if set(table) != {key}:
        raise DataError(f"expected nothing but [[{key}]] tables, found {sorted(table)}", file=name)
    items = [_item(row, f"{key} {i + 1}", name, kind) for i, row in enumerate(table[key])]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"the id {item.id!r} stands twice", file=name, hint="give each its own id")
        seen.add(item.id)
    return items


def _item(row: dict[str, Any], where: str, name: str, kind: type[Item]) -> Item:
    types = {field.name: field.type for field in fields(kind) if field.name != "held_out"}  # that is the exam's
    where = f"{where} ({row.get('id', 'no id')})"
    for key in row:
        if key not in types:
            raise DataError(f"{where}: unknown key {key!r}", file=name, hint=did_you_mean(key, types))
    values: dict[str, Any] = {}
    for key, wanted in types.items():
        value = row.get(key)
        texts: list[Any] = [value] if wanted == "str" else value if isinstance(value, list) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {key} must be {'text' if wanted == 'str' else 'a list of texts'}", file=name)
        if not all(text.strip() for text in texts) and kind not in _MAY_BE_EMPTY.get(key, ()):
            raise DataError(f"{where}: {key} has an empty text", file=name)
        values[key] = value if wanted == "str" else tuple(texts)
    return kind(**values)
