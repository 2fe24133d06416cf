from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.engine import constrain
from lyceum.engine.constrain import Forms, Trie
from lyceum.engine.engine import Engine
from lyceum.engine.grammar import Grammar
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.schema import grammar_of
from lyceum.errors import UsageError
from lyceum.model.spec import ModelSpec
from lyceum.model.transformer import Decoder

ALL_BYTES = [bytes([byte]) for byte in range(256)]
PIECES = [
    b'{"', b'":', b'", "', b'"}', b"}}", b'"}]', b"true", b"tr", b"ue,", b"12", b"-1", b"0.", b"\xe6\x88", b"\x91\xe6", b'\x91"',
    b"\xf0\x9f\xa6", b"  ", b"\n  ", b": [", b'"name":', b'a"', b"null", b"\\u", b"e9", b"kind", b"line",
]  # fmt: skip
VOCABULARY = [*ALL_BYTES, *PIECES, b""]  # the last is a special token, the end of a turn
END = len(VOCABULARY) - 1


def brute_force(grammar: Grammar, state: int, token_bytes: list[bytes]) -> list[bool]:
    allowed = []
    for text in token_bytes:
        after = state
        for byte in text:
            after = grammar.step(after, byte)
        allowed.append(bool(text) and after != 0)
    return allowed


@given(st.lists(st.binary(max_size=4), max_size=30), st.integers(0, 5))
def test_a_trie_finds_the_tokens_that_a_grammar_can_read(token_bytes: list[bytes], length: int) -> None:
    grammar = Grammar()
    evens = grammar.byte(range(0, 256, 2))
    grammar.begin(grammar.seq(grammar.repeat(evens, 0, length), grammar.repeat(grammar.byte(range(9)), 0, None)))
    allowed = Trie(token_bytes).allowed(grammar, grammar.start)
    assert allowed.tolist() == brute_force(grammar, grammar.start, token_bytes)


@settings(max_examples=30)
@given(st.data())
def test_masks_equal_brute_force_along_any_reply(schemas: dict[str, Any], data: st.DataObject) -> None:
    schema = schemas[data.draw(st.sampled_from(sorted(schemas)))]
    other = grammar_of(schema)
    constraint, state = Forms(VOCABULARY).constraint(schema, [END]), other.start
    for _ in range(12):
        expected = brute_force(other, state, VOCABULARY)
        expected[END] = other.is_complete(state)
        assert (~constraint.forbidden()).tolist() == expected
        assert constraint.is_complete == expected[END]
        tokens = [token for token in range(END) if expected[token]]
        if not tokens:
            assert expected[END]
            return
        pieces = [token for token in tokens if token >= 256]
        token = data.draw(st.sampled_from(pieces if pieces and data.draw(st.booleans()) else tokens))
        constraint.feed(token)
        for byte in VOCABULARY[token]:
            state = other.step(state, byte)


def test_every_step_of_every_schema_can_go_on(schemas: dict[str, Any], fits: Callable) -> None:
    rng, forms = random.Random(0), Forms(VOCABULARY)
    num_ended = 0
    for name, schema in schemas.items():
        for _ in range(10):
            constraint, ids = forms.constraint(schema, [END]), []
            while len(ids) < 60 and END not in ids:
                allowed = (~constraint.forbidden()).nonzero().flatten().tolist()
                assert allowed, (name, ids)
                ids.append(END if END in allowed and rng.random() < 0.5 else rng.choice(allowed))
                constraint.feed(ids[-1])
            if ids[-1] == END:
                num_ended += 1
                assert fits(json.loads(b"".join(VOCABULARY[token] for token in ids)), schema)
    assert num_ended > 100


def test_a_stop_token_may_come_when_the_value_is_complete_and_only_then() -> None:
    brace = VOCABULARY.index(b"}}")
    constraint = Forms(VOCABULARY).constraint({"type": "object"}, [END, ord(" "), 10**9])
    for letter, is_complete in [("{", False), ("}", True)]:
        assert bool(constraint.forbidden()[ord(" ")])  # a blank could stand in the object, but here it would end it
        constraint.feed(ord(letter))
        assert constraint.is_complete == is_complete
        assert bool(constraint.forbidden()[END]) != is_complete
    assert constraint.forbidden().sum() == len(VOCABULARY) - 2 and bool(constraint.forbidden()[brace])
    constraint.feed(END)
    assert constraint.is_complete


def test_requests_with_one_schema_share_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    allowed = Trie.allowed

    def counted(self: Trie, grammar: Grammar, state: int) -> np.ndarray:
        walks.append(state)
        return allowed(self, grammar, state)

    monkeypatch.setattr(Trie, "allowed", counted)
    forms = Forms(VOCABULARY)
    for _ in range(3):
        constraint = forms.constraint({"type": "string"}, [END])
        for letter in '"abcdefgh':
            constraint.forbidden()
            constraint.feed(ord(letter))
    assert len(walks) == 2  # before the string, and anywhere inside it


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "MAX_FORMS", 2)
    monkeypatch.setattr(constrain, "MAX_MASKS", 3)
    monkeypatch.setattr(constrain, "MAX_STATES", 10)
    forms = Forms(VOCABULARY)
    for most in range(20, 25):
        constraint = forms.constraint({"type": "string", "maxLength": most}, [END])
        for letter in '"' + "a" * 19:
            assert not constraint.forbidden()[ord(letter)]
            constraint.feed(ord(letter))
    assert len(forms._forms) == 2 and all(len(form._masks) == 3 for form in forms._forms.values())
    again = forms.constraint({"type": "string", "maxLength": 24}, [END])
    assert again._form.grammar is not constraint._form.grammar and again._form.grammar.num_states < 5
    assert not constraint.forbidden()[ord("a")]  # the one that runs keeps its own


def test_a_vocabulary_that_cannot_say_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="byte") as caught:
        Forms([b"a", b""]).constraint({}, [1])
    assert caught.value.hint
    with pytest.raises(UsageError, match="stop token") as caught:
        Forms(VOCABULARY).constraint({}, [10**9])
    assert caught.value.hint


# -- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def babbler() -> Decoder:
    """A random model over the vocabulary, with three rows of logits that no token has."""
    spec = ModelSpec(
        vocab_size=len(VOCABULARY) + 3,
        num_layers=1,
        width=64,
        num_heads=2,
        num_kv_heads=1,
        head_width=16,
        ffn_width=64,
        context_length=80,
    )
    return Decoder(spec, torch.Generator().manual_seed(0))


def test_every_reply_of_a_random_model_fits_its_schema_among_others_that_have_none(
    babbler: Decoder, schemas: dict[str, Any], fits: Callable
) -> None:
    ends = {ord(letter): 4.0 for letter in '"}],'} | {END: 4.0}  # or most strings would outlast max_tokens
    wanted = [(name, seed) for name in (*schemas, None) for seed in range(8)]
    params = [
        SamplingParams(
            max_tokens=60,
            temperature=0.0 if seed == 0 else 1.0,
            seed=seed,
            stop_ids=(END,),
            json_schema=None if name is None else schemas[name],
            logit_bias=ends,
            presence_penalty=1.0 if seed % 2 else 0.0,
            top_p=0.95 if seed % 3 == 0 else 1.0,
        )
        for name, seed in wanted
    ]
    engine = Engine(babbler, max_batch=32, token_bytes=VOCABULARY)
    outputs = engine.generate([[seed + 1] for _, seed in wanted], params)
    num_whole, num_free = 0, 0
    for (name, _), output in zip(wanted, outputs, strict=True):
        text = b"".join(VOCABULARY[token] for token in output.ids if token < len(VOCABULARY))
        if name is None:
            num_free += any(byte not in b'{}[]",:' for byte in text)
        elif output.finish == "stop":
            num_whole += 1
            assert output.ids[-1] == END and output.is_biased
            assert fits(json.loads(text), schemas[name]), (name, text)
        else:  # cut by its length: the beginning of something that fits
            grammar = grammar_of(schemas[name])
            state = grammar.start
            for byte in text:
                state = grammar.step(state, byte)
            assert output.finish == "length" and state > 0
    assert num_whole > 0.6 * 8 * len(schemas) and num_free > 3  # the free ones write anything


def test_without_a_schema_the_same_model_writes_no_json(babbler: Decoder) -> None:  # the control
    engine = Engine(babbler, token_bytes=VOCABULARY)
    for output in engine.generate([[1]] * 20, [SamplingParams(40, seed=seed, stop_ids=(END,)) for seed in range(20)]):
        with pytest.raises(ValueError):
            json.loads(b"".join(VOCABULARY[token] for token in output.ids if token < len(VOCABULARY)))


def test_a_constrained_reply_is_the_same_alone_and_in_a_crowd(babbler: Decoder, schemas: dict[str, Any]) -> None:
    params = [
        SamplingParams(30, seed=seed, stop_ids=(END,), json_schema=schema)
        for seed, schema in enumerate(schemas.values())
    ]
    engine = Engine(babbler, max_batch=8, token_bytes=VOCABULARY)
    crowd = engine.generate([[5, 6]] * len(params), params)
    alone = [Engine(babbler, token_bytes=VOCABULARY).generate([[5, 6]], [one])[0] for one in params]
    assert [output.ids for output in crowd] == [output.ids for output in alone]


def test_a_schema_without_token_bytes_or_stop_token_is_refused(babbler: Decoder) -> None:
    with pytest.raises(UsageError, match="bytes of every token"):
        Engine(babbler).add([1], SamplingParams(json_schema={}, stop_ids=(END,)))
    with pytest.raises(UsageError, match="stop token"):
        Engine(babbler, token_bytes=VOCABULARY).add([1], SamplingParams(json_schema={}))
    with pytest.raises(UsageError, match="'colour'"):
        Engine(babbler, token_bytes=VOCABULARY).add([1], SamplingParams(json_schema={"colour": 1}, stop_ids=(END,)))
