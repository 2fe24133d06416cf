"""Models small enough to check the engine against: a real decoder, one with fixed logits, and one that recites.

And JSON schemas, with a checker of their own: no package that validates JSON is needed for the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

VOCAB = 97


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """Two layers, grouped heads, logits far from flat."""
    spec = ModelSpec(
        vocab_size=VOCAB,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=64,
        context_length=48,
    )
    return sharpened(Decoder(spec, torch.Generator().manual_seed(0)))


@pytest.fixture
def other_decoder(decoder: Decoder) -> Decoder:
    return sharpened(Decoder(decoder.spec, torch.Generator().manual_seed(1)))


def sharpened(decoder: Decoder) -> Decoder:
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:
                weight *= 5
    return decoder


class FixedLogits(nn.Module):
    """The same logits after every token, whatever it was."""

    def __init__(self, logits_V: Tensor, context_length: int = 1000):
        super().__init__()
        self.logits_V = logits_V
        self.spec = SimpleNamespace(vocab_size=len(logits_V), context_length=context_length)

    def forward(self, tokens_BT: Tensor, *, cache: object = None) -> Tensor:
        return torch.zeros(*tokens_BT.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.logits_V.expand(*hidden.shape[:-1], -1)


class Reciter(FixedLogits):
    """Says the ids it is given, one a step; `prompts` notes what it was asked. For one sequence at a time, greedy."""

    def __init__(self, vocab_size: int, context_length: int = 1000):
        super().__init__(torch.zeros(vocab_size), context_length)
        self.script: list[int] = []
        self.num_steps = 0

    def logits(self, hidden: Tensor) -> Tensor:
        self.num_steps += 1
        return nn.functional.one_hot(torch.tensor([self.script.pop(0)]), self.spec.vocab_size).float()


@pytest.fixture
def fixed_logits() -> Callable[..., FixedLogits]:
    return FixedLogits


@pytest.fixture
def reciter() -> Callable[..., Reciter]:
    return Reciter


def fits_schema(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a JSON value fits a schema: the keywords that the engine supports, as the specification defines them."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_type = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "number": is_number,
        "integer": is_number and value == int(value),
        "boolean": isinstance(value, bool),
        "null": value is None,
    }
    types = schema.get("type", list(is_type))

    def same(a: Any, b: Any) -> bool:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)

    checks = [any(is_type[kind] for kind in ([types] if isinstance(types, str) else types))]
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].split("/")[1:]:
            target = target[int(step)] if isinstance(target, list) else target[step]
        checks.append(fits_schema(value, target, root))
    for word, wanted in (("allOf", all), ("anyOf", any), ("oneOf", lambda each: sum(each) == 1)):
        if word in schema:
            checks.append(wanted([fits_schema(value, one, root) for one in schema[word]]))
    if "enum" in schema:
        checks.append(any(same(value, one) for one in schema["enum"]))
    if "const" in schema:
        checks.append(same(value, schema["const"]))
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks.append(set(schema.get("required", [])) <= set(value))
        checks += [fits_schema(value[name], properties.get(name, extra), root) for name in value]
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        checks += [fits_schema(item, schema.get("items", True), root) for item in value]
    if isinstance(value, str):
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if is_number:
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
        checks.append("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        checks.append("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    return all(checks)


@pytest.fixture(scope="session")
def fits() -> Callable[..., bool]:
    return fits_schema


@pytest.fixture(scope="session")
def schemas() -> dict[str, Any]:
    """A schema for each thing that is supported, and some as people write them."""
    person = {
        "type": "object",
        "title": "Person",
        "properties": {
            "name": {"type": "string", "maxLength": 12, "description": "full name"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "mail": {"type": ["string", "null"], "pattern": "^[a-z]{1,8}@[a-z]{1,5}\\.(com|org)$"},
        },
        "required": ["name", "mail"],
        "additionalProperties": False,
    }
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "v": {"type": "boolean"}}}
    shape = {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "dot"}}, "required": ["kind"]},
            {
                "type": "object",
                "properties": {"kind": {"const": "line"}, "to": {"type": "integer"}},
                "required": ["to", "kind"],
            },
            {"type": "null"},
        ]
    }
    return {
        "anything": {},
        "any object": {"type": "object"},
        "string": {"type": "string", "minLength": 1, "maxLength": 5},
        "number": {"type": "number"},
        "integer": {"type": "integer"},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "cold": {"type": "number", "minimum": -273, "maximum": -5},
        "bounded": {"type": "integer", "exclusiveMinimum": -13, "exclusiveMaximum": 208},
        "from": {"type": "integer", "minimum": 1999},
        "enum": {"enum": ["red", "green\n", 3, 2.5, None, {"a": [1, "é"]}]},
        "typed enum": {"type": "string", "enum": ["x", 1, "我"]},
        "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        "empty array": {"type": "array", "maxItems": 0},
        "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
        "closed": {"type": "object", "additionalProperties": False},
        "person": person,
        "people": {"type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2, "$defs": {"p": person}},
        "optional": {"properties": {name: {"type": "null"} for name in "abcd"}, "required": ["c"]},
        "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": tree}},
        "any of": {"anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "array", "items": {"$ref": "#"}}]},
        "one of": shape,
        "all of one": {"allOf": [{"const": True}]},
    }
