"""From a request's fields to the engine's parameters, which chat, completions and edits share."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lyceum.engine.sampling import SamplingParams, mix_seed
from lyceum.engine.schema import grammar_of
from lyceum.errors import LyceumError
from lyceum.serve.models import Served
from lyceum.serve.protocol import Sampled
from lyceum.serve.refusals import Refusal
from lyceum.tokens.tokenizer import ABSENT

SCHEMA_S = 1.0  # of reading a JSON schema; the engine's thread will need as long again


def params_of(
    request: Sampled, served: Served, *, max_tokens: int, stop_ids: Sequence[int] | None = None, **more: Any
) -> SamplingParams:
    """The parameters of a request that may ask for several replies.

    max_tokens: the longest reply. stop_ids: what ends it, if not what ends any reply of the model. more: parameters that
    only one kind of request has; `logit_bias` is added to its own. Raises Refusal or UsageError for what cannot be sampled with.
    """
    bias = {**read_bias(request.logit_bias or {}, served), **more.pop("logit_bias", {})}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        min_tokens=request.min_tokens or 0,
        logit_bias=bias,
        stop_ids=stops_of(served) if stop_ids is None else tuple(stop_ids),
        stop_strings=request.stops,
        seed=secrets.randbits(62) if request.seed is None else request.seed,
        n=request.n or 1,
        **more,
    )


def stops_of(served: Served) -> tuple[int, ...]:
    """The tokens that end any reply of a model."""
    tokenizer = served.tokenizer
    return tuple(dict.fromkeys(token for token in (*tokenizer.stop_ids, tokenizer.end_id) if token != ABSENT))


def each_prompt(params: SamplingParams, num_prompts: int, is_seeded: bool) -> list[list[SamplingParams]]:
    """The parameters of each reply to each prompt.

    With a seed of its own a request gives each prompt what it would give it alone; without one, prompts share no noise.
    """
    each = params.each()
    if is_seeded or num_prompts == 1:
        return [each] * num_prompts
    return [[replace(one, seed=mix_seed(one.seed, number)) for one in each] for number in range(num_prompts)]


def read_bias(bias: Mapping[str, float], served: Served) -> dict[int, float]:
    """`logit_bias` as the engine takes it. Raises Refusal for what is no token."""
    found = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < served.engine.vocab_size):
            raise Refusal(
                400,
                f"{name[:20]!r} is no token id of this model, which has {served.engine.vocab_size}.",
                param="logit_bias",
            )
        found[int(name)] = value
    return found


async def checked(schema: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """A JSON schema that the engine can follow, in time. Raises Refusal for another."""
    try:
        seconds = await asyncio.to_thread(_read_seconds, json.dumps(schema))
    except LyceumError as error:
        raise Refusal(400, f"{error.message} ({error.hint})", param=param, code="invalid_schema") from None
    if seconds > SCHEMA_S:
        raise Refusal(400, "This schema takes too long to read: make it smaller.", param=param, code="invalid_schema")
    return schema


@lru_cache(maxsize=256)
def _read_seconds(schema: str) -> float:
    start = time.thread_time()
    grammar_of(json.loads(schema))
    return time.thread_time() - start


def rebased(schema: Any, at: str) -> Any:
    """A schema that will stand at the path `at` of another: its references begin there."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [rebased(one, at) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for word, inner in schema.items():
        if word == "$ref" and isinstance(inner, str) and inner.startswith("#"):
            found[word] = "#" + at + inner[1:]
        else:
            found[word] = inner if word in ("const", "enum", "default", "examples") else rebased(inner, at)
    return found
