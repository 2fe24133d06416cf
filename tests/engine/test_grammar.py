from __future__ import annotations

import random
import re
from itertools import product

import pytest

from lyceum.engine.grammar import MAX_STACKS, Grammar, Part


def reads(grammar: Grammar, text: bytes) -> bool | None:
    """True: a whole string; False: the beginning of one; None: neither."""
    state = grammar.start
    for byte in text:
        state = grammar.step(state, byte)
    return grammar.is_complete(state) if state else None


def build(grammar: Grammar, tree: tuple) -> tuple[Part, str]:
    """A random tree as a part of the grammar, and as a regular expression of Python's."""
    kind, *inner = tree
    if kind == "byte":
        return grammar.byte(inner[0].encode()), f"[{inner[0]}]"
    built = [build(grammar, one) for one in inner[0]]
    parts, texts = [part for part, _ in built], [text for _, text in built]
    if kind == "seq":
        return grammar.seq(*parts), f"(?:{''.join(texts)})"
    if kind == "alt":
        return grammar.alt(*parts), f"(?:{'|'.join(texts)})"
    least, most = inner[1:]
    return grammar.repeat(parts[0], least, most), f"(?:{texts[0]}){{{least},{'' if most is None else most}}}"


def random_tree(rng: random.Random, depth: int) -> tuple:
    kind = rng.choice(["byte", "byte", "seq", "alt", "repeat"]) if depth else "byte"
    if kind == "byte":
        return kind, rng.choice(["a", "b", "ab"])
    if kind == "repeat":
        least = rng.randrange(3)
        return kind, [random_tree(rng, depth - 1)], least, rng.choice([None, least + rng.randrange(3)])
    return kind, [random_tree(rng, depth - 1) for _ in range(rng.randrange(1 if kind == "alt" else 0, 4))]


@pytest.mark.parametrize("seed", range(60))
def test_a_grammar_reads_what_the_same_regular_expression_matches(seed: int) -> None:
    grammar = Grammar()
    part, text = build(grammar, random_tree(random.Random(seed), 3))
    grammar.begin(part)
    strings = ["".join(letters) for length in range(7) for letters in product("ab", repeat=length)]
    whole = {string for string in strings if re.fullmatch(text, string)}
    for string in strings:
        assert (reads(grammar, string.encode()) is True) == (string in whole), (text, string)
        if any(other.startswith(string) for other in whole):
            assert reads(grammar, string.encode()) is not None


def nested(grammar: Grammar) -> Part:
    rule = grammar.rule()
    grammar.define(rule, grammar.seq(grammar.text("("), grammar.repeat(rule, 0, None), grammar.text(")")))
    return rule


def test_rules_nest_as_deep_as_one_likes() -> None:
    grammar = Grammar()
    assert grammar.begin(nested(grammar))
    assert reads(grammar, b"(" * 500 + b")" * 500) is True
    assert reads(grammar, b"(" * 500 + b")" * 499) is False
    assert reads(grammar, b"(()())") is True and reads(grammar, b"())") is None


def test_what_can_never_end_is_not_gone_into() -> None:
    grammar = Grammar()
    endless = grammar.rule()
    grammar.define(endless, grammar.seq(grammar.text("x"), endless))
    assert grammar.begin(grammar.alt(endless, grammar.text("y")))
    assert reads(grammar, b"x") is None and reads(grammar, b"y") is True
    other = Grammar()
    itself = other.rule()
    other.define(itself, itself)
    assert not other.begin(itself)


def test_a_rule_that_is_itself_or_something_else_is_that() -> None:
    grammar = Grammar()
    rule = grammar.rule()
    grammar.define(rule, grammar.alt(rule, grammar.text("a"), grammar.seq()))
    assert grammar.begin(rule)
    assert reads(grammar, b"") is True and reads(grammar, b"a") is True and reads(grammar, b"aa") is None


def test_large_counts_cost_nothing_until_they_are_reached() -> None:
    grammar = Grammar()
    grammar.begin(grammar.repeat(grammar.byte(b"a"), 5, 10**9))
    assert reads(grammar, b"aaaa") is False and reads(grammar, b"a" * 100) is True
    assert grammar.num_states < 110


def test_too_many_ways_to_go_on_allow_less_never_more() -> None:
    grammar = Grammar()
    words = [f"a{number:05}" for number in range(MAX_STACKS + 500)]
    grammar.begin(grammar.alt(*map(grammar.text, words)))
    taken = [word for word in words if reads(grammar, word.encode())]
    assert len(taken) == MAX_STACKS and reads(grammar, b"a99999") is None
