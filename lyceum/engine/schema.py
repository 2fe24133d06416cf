"""JSON schemas as grammars of bytes: a reply drawn under one is JSON that fits it.

    grammar = grammar_of({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]})

Understood is a bounded part of JSON Schema (draft 2020-12; Wright et al. 2022); docs/engine.md has the table. Every
other keyword is refused by name: a wish that was silently dropped would be a reply that does not fit. What is written
always fits the schema, but not everything that fits is written: properties come in the order in which the schema lists
them and, where it lists any, no others; numbers have at most 15 digits before the point, 15 behind it and a two-digit
exponent, so that every reader gets the same number; between the marks of an object or array stands nothing, a space, or
a line break with up to 32 blanks.

`oneOf` is taken where its choices exclude each other for a visible reason (types, constants, a required property whose
constants differ); elsewhere a value could fit two. A reply cut by its length is cut JSON, and finishes with "length".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lyceum.engine.grammar import NEVER, Grammar, Part
from lyceum.engine.pattern import Pattern
from lyceum.errors import UsageError, did_you_mean

MAX_SIZE = 64 * 1024  # bytes of a schema
MAX_DEPTH = 64  # levels of schemas inside schemas, references followed
MAX_VALUES = 1000  # of an enum; fewer than the ways to go on that a state keeps
MAX_CHOICES = 100  # of anyOf and oneOf
MAX_COMPARED = 10_000  # pairs of schemas, to see whether the choices of oneOf exclude each other
MAX_DIGITS = 15  # before the point and behind it: such a number survives double precision

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KEYWORDS = {  # of each type
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
WHOLE = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")  # one of these says all, beside it a type at most
NOTES = (
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment", "$defs", "definitions",
)  # fmt: skip
SUPPORTED = ("type", *WHOLE, *(word for words in KEYWORDS.values() for word in words))

Schema = Mapping[str, Any] | bool
_HEX, _DIGIT = b"0123456789abcdefABCDEF", b"0123456789"


def grammar_of(schema: Schema) -> Grammar:
    """The grammar of the JSON that fits a schema.

    Raises:
        UsageError: it uses what is not supported, is too large, means nothing, or nothing finite fits it.
    """
    return _Reader(schema).grammar


class _Reader:
    """One schema on its way to a grammar; `at` is always the path of a schema inside it, as in `#/properties/age`."""

    def __init__(self, schema: Schema):
        try:
            size = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the schema is not JSON: {error}", hint="give a JSON schema as a dict") from None
        if size > MAX_SIZE:
            raise UsageError(
                f"the schema has {size} bytes, at most {MAX_SIZE} are read", hint="share parts by $defs and $ref"
            )
        self._root = schema
        self._rules: dict[str, Part] = {}
        self._num_compared = 0
        self.grammar = g = Grammar()
        blanks = g.seq(g.text("\n"), g.repeat(g.byte(b" \t"), 0, 32))
        self._space = g.alt(g.empty, g.text(" "), blanks)
        self._digits = g.repeat(g.byte(_DIGIT), 1, MAX_DIGITS)
        self._beyond = _beyond_ascii(g)
        plain = g.byte(byte for byte in range(0x20, 0x80) if byte not in b'"\\')
        self._character = g.alt(plain, self._beyond, _escaped(g))
        self._anything: Part | None = None
        root = self._value(schema, "#", 0)
        if not g.begin(root):
            raise UsageError(
                "no finite JSON fits the schema",
                hint="does a required property, or a $ref, always lead back to itself?",
            )

    # -- schemas ------------------------------------------------------------------------------------------------------

    def _value(self, schema: Any, at: str, depth: int) -> Part:
        if depth > MAX_DEPTH:
            raise UsageError(f"{at} is nested more than {MAX_DEPTH} deep", hint="flatten the schema")
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            what = "fits nothing" if schema is False else "is no schema"
            raise UsageError(f"{at} = {schema!r} {what}", hint='a schema is an object such as {"type": "string"}')
        for word in schema:
            if word not in SUPPORTED and word not in NOTES:
                raise UsageError(
                    f"{at} uses {word!r}, which is not supported",
                    hint=f"supported: {', '.join(SUPPORTED)}",
                )
        whole = [word for word in WHOLE if word in schema]
        if whole:
            return self._whole(schema, whole[0], at, depth)
        types = self._types(schema, at)
        if types is None:
            types = [kind for kind, words in KEYWORDS.items() if any(word in schema for word in words)]
        if not types:
            return self._any()
        return self.grammar.alt(*(self._typed(kind, schema, at, depth) for kind in types))

    def _types(self, schema: Mapping[str, Any], at: str) -> list[str] | None:
        named = schema.get("type")
        if named is None:
            return None
        types = [named] if isinstance(named, str) else named
        if not isinstance(types, Sequence) or not types:
            raise UsageError(f"{at}/type = {named!r} names no type", hint=f"types: {', '.join(TYPES)}")
        for kind in types:
            if kind not in TYPES:
                raise UsageError(f"{at}/type = {kind!r} is no type of JSON", hint=did_you_mean(str(kind), TYPES))
        return list(types)

    def _whole(self, schema: Mapping[str, Any], word: str, at: str, depth: int) -> Part:
        allowed = {word, "type"} if word in ("enum", "const") else {word}
        if beside := [other for other in schema if other in SUPPORTED and other not in allowed]:
            raise UsageError(
                f"{at} has {beside[0]!r} beside {word!r}, which is not supported",
                hint=f"put {beside[0]!r} into the schemas that {word!r} names",
            )
        inner = schema[word]
        if word in ("enum", "const"):
            return self._constants(inner if word == "enum" else [inner], self._types(schema, at), f"{at}/{word}")
        if word == "$ref":
            return self._reference(inner, at, depth)
        if not isinstance(inner, Sequence) or isinstance(inner, str) or not inner:
            raise UsageError(f"{at}/{word} = {inner!r} is no list of schemas", hint="give one or more")
        if len(inner) > MAX_CHOICES:
            raise UsageError(f"{at}/{word} has {len(inner)} choices, at most {MAX_CHOICES} are read", hint="merge some")
        if word == "allOf" and len(inner) > 1:
            raise UsageError(f"{at}/allOf has {len(inner)} schemas, 1 is supported", hint="merge them into one")
        parts = [self._value(one, f"{at}/{word}/{i}", depth + 1) for i, one in enumerate(inner)]
        for j, i in combinations(range(len(inner)), 2):
            if word == "oneOf" and not self._exclude(inner[j], inner[i], depth):
                raise UsageError(
                    f"{at}/oneOf: a value could fit both {j} and {i}",
                    hint="use anyOf, or tell them apart by type or by a required property with a const",
                )
        return self.grammar.alt(*parts)

    def _constants(self, values: Any, types: list[str] | None, at: str) -> Part:
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise UsageError(f"{at} = {values!r} is no list of values", hint="enum lists the values that fit")
        if len(values) > MAX_VALUES:
            raise UsageError(f"{at} has {len(values)} values, at most {MAX_VALUES} are read", hint="use a pattern")
        fitting = [value for value in values if types is None or any(_is_of(value, kind) for kind in types)]
        if not fitting:
            raise UsageError(f"{at} = {values!r} holds no value of type {types}", hint="nothing could be written")
        return self.grammar.alt(*(self.grammar.text(_written(value)) for value in fitting))

    def _reference(self, name: Any, at: str, depth: int) -> Part:
        if not isinstance(name, str) or name not in self._rules:
            target = self._target(name, at)
            self._rules[name] = self.grammar.rule()
            self.grammar.define(self._rules[name], self._value(target, name, depth + 1))
        return self._rules[name]

    def _target(self, name: Any, at: str) -> Any:
        here: Any = self._root
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise UsageError(f"{at}/$ref = {name!r} leads out of the schema", hint='a reference begins with "#/"')
        for step in name.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(here, list) and key.isdigit() and int(key) < len(here):
                here = here[int(key)]
            elif isinstance(here, Mapping) and key in here:
                here = here[key]
            else:
                raise UsageError(f"{at}/$ref = {name!r} leads nowhere", hint="is it spelled as it stands in $defs?")
        return here

    # -- what is written ----------------------------------------------------------------------------------------------

    def _typed(self, kind: str, schema: Mapping[str, Any], at: str, depth: int) -> Part:
        if kind == "object":
            return self._object(schema, at, depth)
        if kind == "array":
            return self._array(schema, at, depth)
        if kind == "string":
            return self._string(schema, at)
        if kind in ("number", "integer"):
            return self._number(schema, at, kind == "integer")
        words = ("true", "false") if kind == "boolean" else ("null",)
        return self.grammar.alt(*map(self.grammar.text, words))

    def _any(self) -> Part:
        if self._anything is None:
            self._anything = self.grammar.rule()
            kinds = ("object", "array", "string", "number", "boolean", "null")
            self.grammar.define(
                self._anything, self.grammar.alt(*(self._typed(kind, {"items": True}, "#", 0) for kind in kinds))
            )
        return self._anything

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> Part:
        g = self.grammar
        properties, required = schema.get("properties", {}), schema.get("required", [])
        is_list = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, Mapping) or not is_list:
            raise UsageError(f"{at}: properties or required is malformed", hint="an object, and a list of names")
        if unknown := [name for name in required if name not in properties]:
            raise UsageError(
                f"{at}/required names {unknown[0]!r}, which is not in its properties",
                hint=did_you_mean(str(unknown[0]), properties),
            )
        extra = schema.get("additionalProperties", True)
        if not properties:
            if extra is False:
                return g.seq(g.text("{"), self._space, g.text("}"))
            key = g.seq(g.text('"'), g.repeat(self._character, 0, None), g.text('"'))
            value = self._value(extra, f"{at}/additionalProperties", depth + 1)
            return self._listed("{", g.seq(key, g.text(":"), self._space, value), 0, None, "}")
        # from the last property to the first: what may follow when some were written before, and when none was
        after, first = g.empty, g.empty
        for name, inner in reversed(list(properties.items())):
            value = self._value(inner, f"{at}/properties/{name}", depth + 1)
            member = g.seq(self._space, g.text(_written(name) + ":"), self._space, value)
            first = g.seq(member, after) if name in required else g.alt(g.seq(member, after), first)
            later = g.seq(g.text(","), member, after)
            after = later if name in required else g.alt(later, after)
        return g.seq(g.text("{"), first, self._space, g.text("}"))

    def _array(self, schema: Mapping[str, Any], at: str, depth: int) -> Part:
        least, most = self._bounds(schema, "minItems", "maxItems", at)
        item = self._value(schema.get("items", True), f"{at}/items", depth + 1) if most != 0 else self.grammar.empty
        return self._listed("[", item, least, most, "]")

    def _listed(self, start: str, item: Part, least: int, most: int | None, end: str) -> Part:
        g = self.grammar
        item = g.seq(self._space, item)
        items = g.empty
        if most != 0:
            more = g.repeat(g.seq(g.text(","), item), max(0, least - 1), None if most is None else most - 1)
            items = g.seq(item, more)
        return g.seq(g.text(start), items if least else g.maybe(items), self._space, g.text(end))

    def _string(self, schema: Mapping[str, Any], at: str) -> Part:
        g = self.grammar
        least, most = self._bounds(schema, "minLength", "maxLength", at)
        if "pattern" in schema:
            if "minLength" in schema or "maxLength" in schema:
                raise UsageError(f"{at} has a length beside 'pattern', which is not supported", hint="use {m,n} in it")
            inside = Pattern(schema["pattern"], g, self._character, self._beyond, f"{at}/pattern").read()
        else:
            inside = g.repeat(self._character, least, most)
        return g.seq(g.text('"'), inside, g.text('"'))

    def _bounds(self, schema: Mapping[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for word, bound in ((low, least), (high, most)):
            if bound is not None and (not _is_of(bound, "integer") or not 0 <= bound < NEVER):
                raise UsageError(f"{at}/{word} = {bound!r} is no count", hint=f"{word} is a number from 0 on")
        if most is not None and least > most:
            raise UsageError(f"{at}: {low} = {least} is above {high} = {most}", hint="nothing could be written")
        return int(least), None if most is None else int(most)

    def _number(self, schema: Mapping[str, Any], at: str, is_integer: bool) -> Part:
        g = self.grammar
        low, high = self._limits(schema, at, is_integer)
        if low is None and high is None:
            whole = g.alt(g.text("0"), _above(g, MAX_DIGITS))
            if is_integer:
                return g.alt(whole, g.seq(g.text("-"), _above(g, MAX_DIGITS)))
            exponent = g.seq(g.byte(b"eE"), g.maybe(g.byte(b"+-")), g.repeat(g.byte(_DIGIT), 1, 2))
            fraction = g.seq(g.text("."), self._digits)
            return g.seq(g.maybe(g.text("-")), whole, g.maybe(fraction), g.maybe(exponent))
        most = 10**MAX_DIGITS - 1
        low, high = -most if low is None else max(low, -most), most if high is None else min(high, most)
        if low > high:
            raise UsageError(f"{at}: no number lies between the bounds", hint=f"with {MAX_DIGITS} digits at most")
        ways = []
        if high >= 0:
            ways.append(self._from_to(max(low, 0), high, is_integer))
        if low < 0:
            ways.append(g.seq(g.text("-"), self._from_to(max(-high, 1 if is_integer else 0), -low, is_integer)))
        return g.alt(*ways)

    def _limits(self, schema: Mapping[str, Any], at: str, is_integer: bool) -> tuple[int | None, int | None]:
        """The least and the greatest integer that fits, both inclusive; None where there is no bound."""
        found: list[list[int]] = [[], []]
        for word, side, is_exclusive in (
            ("minimum", 0, False), ("maximum", 1, False), ("exclusiveMinimum", 0, True), ("exclusiveMaximum", 1, True),
        ):  # fmt: skip
            if word not in schema:
                continue
            bound = schema[word]
            if not _is_of(bound, "integer") or (is_exclusive and not is_integer):
                raise UsageError(
                    f"{at}/{word} = {bound!r} is not supported here",
                    hint="bounds are whole numbers; exclusive ones are for the type integer only",
                )
            found[side].append(int(bound) + (0 if not is_exclusive else 1 if side == 0 else -1))
        return max(found[0], default=None), min(found[1], default=None)

    def _from_to(self, low: int, high: int, is_integer: bool) -> Part:
        """Numbers from low to high, 0 <= low <= high; with a fraction unless integer, no exponent."""
        g = self.grammar
        if is_integer:
            return _between(g, low, high)
        zeros = g.maybe(g.seq(g.text("."), g.repeat(g.byte(b"0"), 1, MAX_DIGITS)))
        ways = [g.seq(_between(g, high, high), zeros)]
        if low < high:
            ways.append(g.seq(_between(g, low, high - 1), g.maybe(g.seq(g.text("."), self._digits))))
        return g.alt(*ways)

    # -- oneOf --------------------------------------------------------------------------------------------------------

    def _exclude(self, a: Any, b: Any, depth: int) -> bool:
        """True if it can be seen that no value fits both."""
        a, b = self._resolved(a), self._resolved(b)
        self._num_compared += 1
        if self._num_compared > MAX_COMPARED or depth > MAX_DEPTH:
            return False
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        for one, other in ((a, b), (b, a)):
            for word in ("anyOf", "oneOf"):
                if word in one and isinstance(one[word], list):
                    return all(self._exclude(part, other, depth + 1) for part in one[word])
        values = [one.get("enum", [one["const"]] if "const" in one else None) for one in (a, b)]
        kinds = [_kinds(one, known) for one, known in zip((a, b), values, strict=True)]
        if not kinds[0] & kinds[1]:
            return True
        if all(isinstance(known, list) for known in values):
            return not any(_is_equal(x, y) for x in values[0] for y in values[1])
        if kinds[0] & kinds[1] != {"object"}:
            return False
        shared = [name for name in a.get("required", []) if name in b.get("required", [])]
        inner = [(a.get("properties", {}).get(name, True), b.get("properties", {}).get(name, True)) for name in shared]
        return any(self._exclude(x, y, depth + 1) for x, y in inner)

    def _resolved(self, schema: Any) -> Any:
        seen = set()
        while isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            schema = self._target(schema["$ref"], "#")
        return schema


# -- bytes of values ---------------------------------------------------------------------------------------------------


def _beyond_ascii(g: Grammar) -> Part:
    """One character of two to four bytes, in well-formed UTF-8 (RFC 3629, section 4)."""
    rest = g.byte(range(0x80, 0xC0))
    return g.alt(
        g.seq(g.byte(range(0xC2, 0xE0)), rest),
        g.seq(g.byte([0xE0]), g.byte(range(0xA0, 0xC0)), rest),
        g.seq(g.byte([*range(0xE1, 0xED), 0xEE, 0xEF]), rest, rest),
        g.seq(g.byte([0xED]), g.byte(range(0x80, 0xA0)), rest),
        g.seq(g.byte([0xF0]), g.byte(range(0x90, 0xC0)), rest, rest),
        g.seq(g.byte(range(0xF1, 0xF4)), rest, rest, rest),
        g.seq(g.byte([0xF4]), g.byte(range(0x80, 0x90)), rest, rest),
    )


def _escaped(g: Grammar) -> Part:
    """One character as an escape (RFC 8259, section 7); halves of surrogate pairs only as a pair."""
    any_hex, d = g.byte(_HEX), g.byte(b"dD")
    pair = g.seq(d, g.byte(b"89abAB"), any_hex, any_hex, g.text("\\u"), d, g.byte(b"cdefCDEF"), any_hex, any_hex)
    unit = g.alt(
        g.seq(g.byte(byte for byte in _HEX if byte not in b"dD"), any_hex, any_hex, any_hex),
        g.seq(d, g.byte(b"01234567"), any_hex, any_hex),
        pair,
    )
    return g.seq(g.text("\\"), g.alt(g.byte(b'"\\/bfnrt'), g.seq(g.text("u"), unit)))


def _above(g: Grammar, most: int) -> Part:
    """A whole number above 0, of up to so many digits."""
    return g.seq(g.byte(b"123456789"), g.repeat(g.byte(_DIGIT), 0, most - 1))


def _between(g: Grammar, low: int, high: int) -> Part:
    """Whole numbers from low to high, 0 <= low <= high, without leading zeros."""
    ways = []
    for num_digits in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (num_digits - 1) if num_digits > 1 else 0), min(high, 10**num_digits - 1)
        ways.append(_same_length(g, str(first), str(last)))
    return g.alt(*ways)


def _same_length(g: Grammar, low: str, high: str) -> Part:
    if set(low) <= {"0"} and set(high) <= {"9"}:
        return g.repeat(g.byte(_DIGIT), len(low), len(low))
    if low[0] == high[0]:
        return g.seq(g.text(low[0]), _same_length(g, low[1:], high[1:]))
    num = len(low) - 1
    ways = [
        g.seq(g.text(low[0]), _same_length(g, low[1:], "9" * num)),
        g.seq(g.text(high[0]), _same_length(g, "0" * num, high[1:])),
    ]
    if int(high[0]) - int(low[0]) > 1:
        middle = g.byte(range(ord(low[0]) + 1, ord(high[0])))
        ways.append(g.seq(middle, g.repeat(g.byte(_DIGIT), num, num)))
    return g.alt(*ways)


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type of JSON Schema, where 2.0 is an integer and true no number."""
    if kind in ("number", "integer"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == int(value))
    classes = {"object": Mapping, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, classes[kind])


def _kinds(schema: Mapping[str, Any], values: Any) -> set[str]:
    """Types, "integer" counted as "number", that a value which fits may have."""
    kinds = TYPES if "type" not in schema else [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    found = {kind if kind != "integer" else "number" for kind in kinds}
    if isinstance(values, list):
        found &= {kind for kind in found for value in values if _is_of(value, kind)}
    return found


def _is_equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)
