from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.engine import schema as schema_module
from lyceum.engine.grammar import MAX_STACKS, Grammar
from lyceum.engine.pattern import MAX_LENGTH
from lyceum.engine.schema import SUPPORTED, grammar_of
from lyceum.errors import UsageError

NAMES = [
    "anything", "any object", "string", "number", "integer", "share", "cold", "bounded", "from", "enum", "typed enum",
    "array", "empty array", "map", "closed", "person", "people", "optional", "tree", "any of", "one of", "all of one",
]  # fmt: skip


ANYTHING = grammar_of({})


def reads(grammar: Grammar, text: bytes) -> bool:
    state = grammar.start
    for byte in text:
        state = grammar.step(state, byte)
    return grammar.is_complete(state)


def drawn(grammar: Grammar, rng: random.Random, most: int = 300) -> bytes | None:
    """A string of random allowed bytes, ended where it may; None if it grows too long."""
    state, text = grammar.start, bytearray()
    while len(text) < most:
        if grammar.is_complete(state) and rng.random() < 0.3:
            return bytes(text)
        grammar.step(state, 0)
        allowed = [byte for byte in range(256) if grammar.next[state, byte]]
        if not allowed:
            assert grammar.is_complete(state), "a dead end that is no whole value"
            return bytes(text)
        if rng.random() < 0.5:  # structure is a few bytes among many; without this most strings never end
            allowed = [byte for byte in allowed if byte in b'"}],:'] or allowed
        text.append(rng.choice(allowed))
        state = grammar.step(state, text[-1])
    return None


def test_the_schemas_here_are_all(schemas: dict[str, Any]) -> None:
    assert list(schemas) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_fits(name: str, schemas: dict[str, Any], fits: Callable) -> None:
    grammar, rng = grammar_of(schemas[name]), random.Random(0)
    texts = [text for _ in range(200) if (text := drawn(grammar, rng)) is not None]
    assert len(texts) > 50
    for text in texts:
        value = json.loads(text, parse_constant=pytest.fail)
        assert fits(value, schemas[name]), text
        assert "\ud800" not in json.dumps(value, ensure_ascii=False) and json.dumps(value).isascii()


def test_the_checker_of_these_tests_can_say_no(schemas: dict[str, Any], fits: Callable) -> None:
    wrong = {
        "string": "", "number": True, "integer": 0.5, "share": 1.01, "cold": -4, "bounded": -13, "from": 1998,
        "enum": "blue", "typed enum": 1, "array": [True], "empty array": [1], "map": {"a": -1}, "closed": {"a": 1},
        "person": {"name": "x"}, "optional": {"a": None}, "tree": {"left": {"left": 3}}, "any of": ["x"],
        "one of": {"kind": "line"}, "all of one": False, "any object": [], "people": [{}],
    }  # fmt: skip
    assert [name for name, value in wrong.items() if fits(value, schemas[name])] == []


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("integer", ["0", "-1", "123456789012345"], ["01", "-0", "1.0", "+1", "1e3", "1234567890123456", ""]),
        ("number", ["0", "-0.5", "1e-7", "12.50E+10"], ["1.", ".5", "1e", "1e999", "00", "NaN", "Infinity"]),
        ("bounded", ["-12", "-1", "0", "9", "10", "207"], ["-13", "208", "210", "1000", "-0", "00"]),
        ("share", ["0", "1", "0.25", "1.0", "1.000"], ["1.1", "-0.1", "2", "1e-1", ".5"]),
        ("cold", ["-5", "-5.0", "-273", "-272.99", "-20"], ["-4.9", "-273.1", "5", "0"]),
        ("from", ["1999", "2000", "20000", "999999999999999"], ["1998", "999", "-2000", "02000"]),
        ("string", ['"a"', '"我🦙é"', '"\\n\\u00e9\\ud83e\\udd99"', '"\\\\\\""'], ['""', '"abcdef"', '"\n"', '"\\ud83e"',
                   '"\\x"', "'a'", '"a', '"a" ']),
        ("any object", ["{}", "{ }", '{"a":{"b":[1,"x"]}}', '{"a": 1,\n  "b": null\n}'], ["[]", "{,}", '{"a":1,}',
                       '{a:1}', '{"a" :1}', '{"a":1}}', " {}"]),
        ("array", ["[true,false]", "[ true, true, true\n]"], ["[true]", "[]", "[true,true,true,true,true]", "[1,2]"]),
        ("optional", ['{"c":null}', '{"a":null,"c":null,"d":null}'], ['{"a":null}', '{"c":null,"a":null}', "{}",
                     '{"c":null,"c":null}', '{"c":null,"e":1}']),
        ("closed", ["{}", "{ }"], ['{"a":1}']),
        ("enum", ['"red"', '"green\\n"', "3", "2.5", "null", '{"a":[1,"é"]}'], ["red", "2.50", '"blue"', "true"]),
        ("typed enum", ['"x"', '"我"'], ["1"]),
        ("tree", ['{"left":{"left":{"v":true}},"v":false}', "{}"], ['{"left":1}']),
        ("one of", ['{"kind":"dot"}', '{"kind":"line","to":3}', "null"], ['{"kind":"line"}', '{"kind":"dot","to":3}']),
    ],
)  # fmt: skip
def test_what_is_taken_and_what_is_not(
    name: str, taken: list[str], refused: list[str], schemas: dict[str, Any]
) -> None:
    grammar = grammar_of(schemas[name])
    assert [text for text in taken if not reads(grammar, text.encode())] == []
    assert [text for text in refused if reads(grammar, text.encode())] == []


@given(st.integers(0, 2000), st.integers(0, 2000), st.booleans())
def test_bounds_of_integers_are_exact(a: int, b: int, is_negative: bool) -> None:
    low, high = min(a, b), max(a, b)
    if is_negative:
        low, high = -high, low
    grammar = grammar_of({"type": "integer", "minimum": low, "maximum": high})
    near = {low - 1, low, low + 1, high - 1, high, high + 1, 0, 1, -1, (low + high) // 2, 10 * high + 1}
    assert all(reads(grammar, str(number).encode()) == (low <= number <= high) for number in near)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**14), 10**14) | st.text(st.characters(codec="utf-8"), max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('abé"\\\n', max_size=3), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_anything_takes_what_pythons_json_writes(value: Any, indent: int | None, ensure_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii).encode()
    assert reads(ANYTHING, text)


@pytest.mark.parametrize(
    "word",
    ["minProperties", "maxProperties", "patternProperties", "propertyNames", "dependentRequired", "if", "not",
     "uniqueItems", "contains", "prefixItems", "unevaluatedProperties", "multipleOf", "format", "nullable", "colour"],
)  # fmt: skip
def test_an_unsupported_keyword_is_named_with_what_is_supported(word: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {word: 1}}}}
    with pytest.raises(UsageError, match=f"#/properties/a/items uses '{word}'") as caught:
        grammar_of(schema)
    assert all(known in caught.value.hint for known in SUPPORTED)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, "no type"),
        ({"type": []}, "names no type"),
        ({"type": 3}, "names no type"),
        (False, "fits nothing"),
        (5, "no schema"),
        ({"enum": []}, "holds no value"),
        ({"type": "string", "enum": [1]}, "holds no value"),
        ({"enum": "ab"}, "no list"),
        ({"enum": [1], "minimum": 0}, "beside 'enum'"),
        ({"$ref": "#/$defs/a", "type": "string"}, "beside"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": ["x"]}, "leads out"),
        ({"$ref": "https://json-schema.org/x"}, "leads out"),
        ({"anyOf": []}, "no list"),
        ({"anyOf": [{"type": "null"}], "oneOf": []}, "beside"),
        ({"allOf": [{}, {}]}, "1 is supported"),
        ({"properties": {"a": {}}, "required": ["b"]}, "not in its properties"),
        ({"properties": {"a": {}}, "required": "a"}, "malformed"),
        ({"type": "object", "properties": []}, "malformed"),
        ({"minItems": -1}, "no count"),
        ({"minItems": True}, "no count"),
        ({"minLength": 3, "maxLength": 2}, "above"),
        ({"minLength": 3, "pattern": "a"}, "length beside"),
        ({"type": "number", "minimum": 0.5}, "not supported here"),
        ({"type": "number", "exclusiveMinimum": 0}, "not supported here"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no number"),
        ({"type": "integer", "minimum": 10**15}, "no number"),
        ({"$ref": "#"}, "no finite JSON"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite JSON"),
        ({"x": {1, 2}}, "not JSON"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": "x" * 70_000}, "bytes"),
        ({"const": "\ud800"}, "not JSON"),
        ({"enum": list(range(1001))}, "1001 values"),
        ({"anyOf": [{}] * 101}, "101 choices"),
    ],
)
def test_a_schema_that_means_nothing_is_refused_with_a_hint(schema: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        grammar_of(schema)
    assert caught.value.hint


def test_a_schema_nested_too_deep_is_refused_not_a_crash() -> None:
    deep: Any = {"type": "null"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UsageError, match="more than 64 deep"):
        grammar_of(deep)
    chain = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(100)}
    with pytest.raises(UsageError, match="more than 64 deep"):
        grammar_of({"$ref": "#/$defs/d0", "$defs": chain | {"d100": {"type": "null"}}})


def test_choices_that_multiply_are_refused_not_compared_for_ever() -> None:
    doubled = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(20)}
    schema = {"oneOf": [{"$ref": "#/$defs/d0"}, {"type": "null"}], "$defs": doubled | {"d20": {"type": "string"}}}
    with pytest.raises(UsageError, match="could fit both"):
        grammar_of(schema)
    grammar_of({**schema, "oneOf": [{"$ref": "#/$defs/d15"}, {"type": "null"}]})  # 32 ways: looked through


def test_a_way_without_end_is_left_out_where_there_is_another() -> None:
    endless = {"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}, "required": ["a"]}
    grammar = grammar_of({"anyOf": [{"$ref": "#/$defs/e"}, {"type": "null"}], "$defs": {"e": endless}})
    assert reads(grammar, b"null") and grammar.step(grammar.start, ord("{")) == 0


@pytest.mark.parametrize(
    ("choices", "is_taken"),
    [
        ([{"type": "string"}, {"type": "null"}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": ["integer", "null"]}, {"type": "string"}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"enum": ["a", "b"]}, {"enum": ["b", "c"]}], False),
        ([{"enum": ["a", "b"]}, {"enum": ["c"]}, {"type": "integer"}], True),
        ([{"const": "a"}, {"type": "string"}], False),
        ([{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}], False),
        ([{"properties": {"k": {"const": 1}}}, {"type": "string"}], False),  # a string fits the first as well
        ([{"anyOf": [{"type": "null"}, {"type": "string"}]}, {"type": "integer"}], True),
        ([{"anyOf": [{"type": "null"}, {"type": "string"}]}, {"type": "null"}], False),
        ([{"$ref": "#/$defs/s"}, {"type": "null"}], True),
        ([{"$ref": "#/$defs/s"}, {"const": "x"}], False),
    ],
)
def test_one_of_is_taken_where_a_value_can_fit_only_one(choices: list, is_taken: bool) -> None:
    schema = {"oneOf": choices, "$defs": {"s": {"type": "string"}}}
    if is_taken:
        grammar_of(schema)
    else:
        with pytest.raises(UsageError, match="could fit both"):
            grammar_of(schema)


@settings(max_examples=50)
@given(st.data())
def test_any_json_for_a_schema_is_read_or_refused_never_a_crash(data: st.DataObject) -> None:
    words = st.sampled_from([*SUPPORTED, "$defs", "a"])
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["#", "#/$defs/a", "string", "a", "object", "("]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=10,
    )  # fmt: skip
    try:
        grammar = grammar_of(data.draw(st.dictionaries(words, values, max_size=4)))
    except UsageError as refused:
        assert refused.message
    else:
        assert grammar.is_complete(grammar.start) is False and drawn(grammar, random.Random(0), 50) != b""


def test_limits_are_those_of_the_documentation() -> None:
    sizes = (schema_module.MAX_SIZE, schema_module.MAX_DEPTH, schema_module.MAX_VALUES, schema_module.MAX_CHOICES)
    assert sizes == (65536, 64, 1000, 100) and schema_module.MAX_DIGITS == 15 and MAX_LENGTH == 500
    assert schema_module.MAX_VALUES < MAX_STACKS
