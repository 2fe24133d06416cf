# ruff: noqa: E501 (doc strings as they are)
from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest

from lyceum.corpus.docstrings import (
    clean_body,
    first_sentence,
    parameter_names,
    returns,
    shortened_body,
    split_signature,
    strip_markup,
    summary,
)

# Doc strings of CPython 3.11, copied here in full or cut at "[...]", with what a person would take from them.
# (last name, doc string, signature, summary, returns)
CPYTHON = [
    ("len", "Return the number of items in a container.", "", "Return the number of items in a container.",
     "the number of items in a container"),
    ("range", "range(stop) -> range object\nrange(start, stop[, step]) -> range object\n\nReturn an object that produces a "
     "sequence of integers from start (inclusive)\nto stop (exclusive) by step.  range(i, j) produces i, i+1, [...]",
     "(start, stop[, step])",
     "Return an object that produces a sequence of integers from start (inclusive) to stop (exclusive) by step.",
     "an object that produces a sequence of integers from start (inclusive) to stop (exclusive)"),
    ("find", "S.find(sub[, start[, end]]) -> int\n\nReturn the lowest index in S where substring sub is found,\nsuch that sub "
     "is contained within S[start:end].  Optional\narguments start and end are interpreted as in slice notation.",
     "(sub[, start[, end]])",
     "Return the lowest index in S where substring sub is found, such that sub is contained within S[start:end].",
     "the lowest index in S where substring sub is found"),
    ("pop", "D.pop(k[,d]) -> v, remove specified key and return the corresponding value.\n\nIf the key is not found, return "
     "the default if given; otherwise,\nraise a KeyError.", "(k[,d])",
     "Remove specified key and return the corresponding value.", "the corresponding value"),
    ("update", "D.update([E, ]**F) -> None.  Update D from dict/iterable E and F.\nIf E is present and has a .keys() method, "
     "then does:  for k in E: D[k] = E[k]", "([E, ]**F)", "Update D from dict/iterable E and F.", ""),
    ("items", "D.items() -> a set-like object providing a view on D's items", "()",
     "Return a set-like object providing a view on D's items.", "a set-like object providing a view on D's items"),
    ("zip", "zip(*iterables, strict=False) --> Yield tuples until an input is exhausted.\n\n   >>> list(zip('ab', range(2)))",
     "(*iterables, strict=False)", "Yield tuples until an input is exhausted.", ""),
    ("type", "type(object) -> the object's type\ntype(name, bases, dict, **kwds) -> a new type", "(object)",
     "Return the object's type.", "the object's type"),
    ("partial", "partial(func, *args, **keywords) - new function with partial application\n    of the given arguments and "
     "keywords.\n", "(func, *args, **keywords)",
     "New function with partial application of the given arguments and keywords.", ""),
    ("repeat", "repeat(object [,times]) -> create an iterator which returns the object\nfor the specified number of times.  "
     "If not specified, returns the object\nendlessly.", "(object [,times])",
     "Create an iterator which returns the object for the specified number of times.", ""),
    ("time", "time() -> floating point number\n\nReturn the current time in seconds since the Epoch.", "()",
     "Return the current time in seconds since the Epoch.", "the current time in seconds since the Epoch"),
    ("dumps", "Serialize ``obj`` to a JSON formatted ``str``.\n\n    If ``skipkeys`` is true then [...]", "",
     "Serialize obj to a JSON formatted str.", ""),
    ("match", "Try to apply the pattern at the start of the string, returning\n    a Match object, or None if no match was "
     "found.", "", "Try to apply the pattern at the start of the string, returning a Match object, or None if no match was "
     "found.", "a Match object, or None if no match was found"),
    ("reverse", "Reverse *IN PLACE*.", "", "Reverse IN PLACE.", ""),
    ("chr", "Return a Unicode string of one character with ordinal i; 0 <= i <= 0x10ffff.", "",
     "Return a Unicode string of one character with ordinal i.", "a Unicode string of one character with ordinal i"),
    ("pack", "pack(format, v1, v2, ...) -> bytes\n\nReturn a bytes object containing the values v1, v2, ... packed "
     "according\nto the format string format.  See help(struct) for more on format strings.", "(format, v1, v2, ...)",
     "Return a bytes object containing the values v1, v2, ... packed according to the format string format.", None),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "doc", "signature", "sentence", "phrase"), CPYTHON, ids=[row[0] for row in CPYTHON])
def test_doc_strings_of_cpython_become_plain_sentences(
    leaf: str, doc: str, signature: str, sentence: str, phrase: str | None
) -> None:
    parsed = split_signature(inspect.cleandoc(doc), (leaf,))
    found = summary(parsed.body, parsed.result)
    assert (parsed.signature, found) == (signature, sentence)
    if phrase is not None:
        assert returns(found, parsed.body, parsed.result) == phrase


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (math.sqrt, "Return the square root of x."),
        (list.append, "Append object to the end of the list."),
        (re.compile, "Compile a regular expression pattern, returning a Pattern object."),
        (str.join, "Concatenate any number of strings."),
    ],
)
def test_the_running_python_is_read_the_same_way(value: Any, sentence: str) -> None:
    parsed = split_signature(inspect.getdoc(value) or "", (value.__name__,))
    assert summary(parsed.body, parsed.result) == sentence


@pytest.mark.parametrize(
    "body",
    [
        "",
        "Counter.",
        ">>> f(3)\n4",
        "The following names are known:\n\n- a\n- b",
        "See the module's documentation for what this is about.",
        "Like open(), but for people who know what they want.",
        "Do not call this. It is here for historical reasons.",
        "Initialize self.  See help(type(self)) for accurate signature.",
        "Return x such that {x: y} holds for all of the many keys.",
        "word " * 26,
        "Open a file (or something like it.",
    ],
)
def test_doc_strings_without_a_plain_first_sentence_give_none(body: str) -> None:
    assert summary(body) == ""


def test_a_sentence_ends_where_a_reader_would_end_it() -> None:
    assert (
        first_sentence("Takes a name (e.g. a file, etc.) or none. Then more.")
        == "Takes a name (e.g. a file, etc.) or none."
    )
    assert first_sentence("Takes v1, v2, ... and\npacks them. Done.") == "Takes v1, v2, ... and packs them."
    assert first_sentence("First line\n:param x: no") == "First line"
    assert first_sentence("First line\n----------\nrest") == "First line"


def test_markup_goes_and_the_words_stay() -> None:
    text = "Use :func:`~os.walk`, ``x`` or `y'; *not* a*b*c nor *args and **kwargs. <https://x.org>"
    assert strip_markup(text) == "Use os.walk, x or y; not a*b*c nor *args and **kwargs."


def test_parameter_names_come_from_both_spellings() -> None:
    assert parameter_names("(obj, *, skipkeys=False, sep=', ', key=(1, 2), **kw)") == (
        "obj",
        "skipkeys",
        "sep",
        "key",
        "kw",
    )
    assert parameter_names("(x, [base=math.e])") == ("x", "base")
    assert parameter_names("(sub[, start[, end]])") == ("sub", "start", "end")
    assert parameter_names("()") == parameter_names("") == ()


def test_a_return_that_only_holds_in_one_case_is_not_told() -> None:
    assert returns("Test whether a path exists.", "Test whether a path exists.  Returns False for broken links") == ""


def test_bodies_lose_examples_and_are_bounded_at_sentences() -> None:
    body = "One two three. Four five.\n\n    >>> one\n    1\n\nSix seven."
    assert clean_body(body) == "One two three. Four five.\n\nSix seven."
    assert shortened_body("One two three. Four five.\n\nSix.", 6) == "One two three. Four five.\n\nSix."
    assert shortened_body("One two three. Four five.\n\nSix.", 4) == "One two three."
    assert shortened_body("One two three.", 2) == ""
