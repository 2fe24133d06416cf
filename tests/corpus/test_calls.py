from __future__ import annotations

import textwrap

import pytest

from lyceum.corpus.calls import METHOD_OWNERS, count_calls, public_name

KNOWN = {
    name: name
    for name in (
        "len open print dict.fromkeys json json.dumps json.JSONDecoder json.JSONDecoder.decode os os.path.join "
        "shop.core.sell functools.wraps str.join str.split list.append list.pop dict.get dict.pop set.add"
    ).split()
} | {"posixpath.join": "os.path.join", "json.decoder.JSONDecoder": "json.JSONDecoder", "shop.sell": "shop.core.sell"}


def counted(source: str, module: str = "shop.till", is_package: bool = False) -> dict[str, int]:
    calls = count_calls([(module, is_package, textwrap.dedent(source))], KNOWN)
    assert calls.broken == 0
    return dict(calls.sites)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import json\njson.dumps(1); json.dumps(2)", {"json.dumps": 2}),
        ("import json as j\nj.dumps(1)", {"json.dumps": 1}),
        ("from json import dumps as d\nd(1)", {"json.dumps": 1}),
        ("def f():\n    from json import dumps\n    dumps(1)", {"json.dumps": 1}),
        ("import os.path\nos.path.join('a')", {"os.path.join": 1}),
        ("from os import path\npath.join('a')", {"os.path.join": 1}),
        ("import posixpath\nposixpath.join('a')", {"os.path.join": 1}),
        ("from json.decoder import JSONDecoder\nJSONDecoder.decode(1)", {"json.JSONDecoder.decode": 1}),
        ("from .core import sell\nsell()", {"shop.core.sell": 1}),
        ("from . import core\ncore.sell()", {"shop.core.sell": 1}),
        ("from .. import shop\nshop.sell()", {}),
        ("from json import *\ndumps(1)", {"json.dumps": 1}),
        ("import functools\n@functools.wraps\ndef f(): pass", {"functools.wraps": 1}),
        ("import functools\n@functools.wraps(g)\ndef f(): pass", {"functools.wraps": 1}),
        ("import json\njson.dumps", {}),
        ("json.dumps(1)", {}),
    ],
)
def test_imports_are_followed(source: str, expected: dict[str, int]) -> None:
    assert counted(source) == expected


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert counted("from .core import sell\nsell()", "shop", True) == {"shop.core.sell": 1}
    assert counted("from ..core import sell\nsell()", "shop.sub.deep") == {"shop.core.sell": 1}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("len(print(1))", {"len": 1, "print": 1}),
        ("dict.fromkeys(x)", {"dict.fromkeys": 1}),
        ("def open(x): pass\nopen(1)", {}),
        ("len = 3\nlen(1)", {}),
        ("def f(len): return len(1)", {}),
        ("class A:\n    def open(self): return open(1)", {"open": 1}),
        ("for open in x: open(1)", {}),
    ],
)
def test_builtins_count_unless_the_file_binds_their_name(source: str, expected: dict[str, int]) -> None:
    assert counted(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("', '.join(x)", {"str.join": 1}),
        ("x = f()\nx.split()", {"str.split": 1}),
        ("def f(x): x.names.append(1)", {"list.append": 1}),
        ("import sys\nsys.path.append(1)", {"list.append": 1}),
        ("import json\njson.append(1)", {}),
        ("class A:\n    def f(self): self.append(1); super().append(2)", {}),
        ("def f(x): x.pop()", {}),
        ("x = []\nx.pop()", {"list.pop": 1}),
        ("x = {}\nx.pop(1)", {"dict.pop": 1}),
        ("x = None\nx = dict()\nx.pop(1)", {"dict.pop": 1}),
        ("x = []\nx = {}\nx.pop(1)", {}),
        ("f().get(1).add(2)", {"dict.get": 1, "set.add": 1}),
        ("''.join(x).split()", {"str.join": 1, "str.split": 1}),
    ],
)
def test_methods_go_to_the_one_builtin_type_that_owns_them(source: str, expected: dict[str, int]) -> None:
    assert counted(source) == expected


def test_the_owners_of_builtin_methods_are_folded() -> None:
    assert METHOD_OWNERS["join"] == ("str",)
    assert METHOD_OWNERS["decode"] == ("bytes",)
    assert METHOD_OWNERS["append"] == ("list",)
    assert METHOD_OWNERS["pop"] == ("list", "dict", "set")


def test_imports_and_files_are_counted_once_a_file_and_broken_files_are_skipped() -> None:
    sources = [
        ("a", False, "import json, os.path\njson.dumps(1)\njson.dumps(2)"),
        ("b", False, "from json import dumps\ndumps(1)"),
        ("c", False, "print 'old'"),
    ]
    calls = count_calls(sources, KNOWN)
    assert (calls.sites["json.dumps"], calls.files["json.dumps"], calls.imports["json"]) == (3, 2, 2)
    assert (calls.imports["os"], calls.broken) == (1, 1)


def test_a_method_is_found_through_an_alias_of_its_class() -> None:
    assert public_name("json.decoder.JSONDecoder.decode", KNOWN) == "json.JSONDecoder.decode"
    assert public_name("json.decoder.JSONDecoder.encode", KNOWN) == ""
