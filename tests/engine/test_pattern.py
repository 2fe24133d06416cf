from __future__ import annotations

import json
import re
from functools import cache
from itertools import product

import pytest

from lyceum.engine.grammar import Grammar
from lyceum.engine.schema import grammar_of
from lyceum.errors import UsageError


@cache
def compiled(pattern: str) -> Grammar:
    return grammar_of({"type": "string", "pattern": pattern})


def reads(pattern: str, text: str) -> bool:
    """Whether the grammar of the pattern takes a string, written as JSON."""
    grammar = compiled(pattern)
    state = grammar.start
    for byte in json.dumps(text, ensure_ascii=False).encode():
        state = grammar.step(state, byte)
    return grammar.is_complete(state)


PATTERNS = [
    "^a$", "a", "^a", "a$", "^(a|b)*c$", "^(?:ab)+$", "^[ab]{2}$", "^[^a]{1,2}$", "^a{2,}$", "^\\d+$", "^\\w-\\w$",
    "^.\\.$", "^a?b?c?$", "^$", "", "^a|b$", "^(a|)b$", "^[a-c1-]+$", "^[\\d,]$", "^\\D$", "^(a(b|c){2})?$",
    "^((a|b)(1|,))*$", "^(a?b?)*c$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_takes_what_pythons_search_finds(pattern: str) -> None:
    for length in range(5):
        for letters in product("abc1-,." if length < 4 else "abc1", repeat=length):
            text = "".join(letters)
            assert reads(pattern, text) == bool(re.search(pattern.replace("$", r"\Z"), text)), text


def test_characters_that_json_must_escape_are_written_escaped() -> None:
    for text in ('"', "\\", "\n", "\t", "\x01", "/", "é", "我", "🦙"):
        assert reads(f"^{re.escape(text)}$" if text not in "\x01/é我🦙" else f"^{text}$", text)
        assert reads("^[^b]$", text)
    assert reads('^[\\n"]+$', '\n"\n') and not reads("^.$", "\n") and reads("^\\s$", "\t") and reads("^[é我]$", "我")
    assert not any(reads(f"^{shorthand}$", "我") for shorthand in ("\\w", "\\W", "\\d", "\\S", "[^\\s]"))


@pytest.mark.parametrize(
    "pattern",
    ["(?=a)", "(?<a>b)", "a**", "a+?", "*a", "(a", "a)", "[a", "\\b", "\\1", "a{", "a{2", "a{3,2}", "a{1001}", "[b-a]",
     "[a-\\d]", "[é-ü]", "[^é]", "a^b", "a$b", "(^a)", "(a?){3}", "\\u0041", "\\", 5, "a" * 501],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_pattern_and_a_hint(pattern: object) -> None:
    with pytest.raises(UsageError, match="#/pattern") as caught:
        grammar_of({"type": "string", "pattern": pattern})
    assert caught.value.hint and repr(pattern) in caught.value.message
