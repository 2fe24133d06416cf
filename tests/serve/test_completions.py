"""Completions: echo and log-probabilities as evaluations read them, several prompts, insert, the best of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.model.transformer import Decoder
from lyceum.tokens.infill import infill_prompt
from lyceum.tokens.tokenizer import Tokenizer


def test_every_form_of_a_prompt_is_continued(start: Callable, chain: Callable, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the x")
    server = start(m=chain("yz", after=ids[-1]))
    for prompt, num in (("the x", 1), (["the x", "x"], 2), (ids, 1), ([ids, ids], 2)):
        found = server.post("/v1/completions", {"model": "m", "prompt": prompt}).json
        assert [choice["text"] for choice in found["choices"]] == ["yz"] * num
        assert [choice["index"] for choice in found["choices"]] == list(range(num))
        assert found["object"] == "text_completion" and found["choices"][0]["finish_reason"] == "stop"


def test_an_empty_prompt_begins_as_documents_do(start: Callable, chain: Callable, tokenizer: Tokenizer) -> None:
    client = start(m=chain("ab", after=tokenizer.end_id)).openai()
    assert client.completions.create(model="m", prompt="").choices[0].text == "ab"
    assert client.completions.create(model="m", prompt="").usage.prompt_tokens == 1


def test_sixteen_tokens_are_made_where_none_are_asked_for(
    start: Callable, chain: Callable, tokenizer: Tokenizer
) -> None:
    letters = "abcdefghijklmnopqrs"
    ids = [tokenizer.token_bytes.index(letter.encode()) for letter in letters]
    client = start(m=chain(ids[1:], after=ids[0])).openai()
    assert client.completions.create(model="m", prompt=[ids[0]]).choices[0].text == letters[1:17]


def test_echo_gives_the_prompts_own_logprobs(start: Callable, decoder: Decoder, tokenizer: Tokenizer) -> None:
    client = start(m=decoder).openai()
    rows = [tokenizer.encode("the reply to — the question"), tokenizer.encode("library")]
    found = client.completions.create(
        model="m", prompt=rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for row, choice in zip(rows, found.choices, strict=True):
        said = choice.logprobs
        assert len(said.tokens) == len(row) + 1 and said.token_logprobs[0] is None and said.top_logprobs[0] is None
        assert said.token_logprobs[1:-1] == pytest.approx(Engine(decoder).score([row])[0], abs=1e-4)
        is_greedy = [scores.ranks for scores in Engine(decoder).scores([row])][0]
        for number in range(1, len(row)):  # the harness's own test of greedy, exactly
            top, token = said.top_logprobs[number], said.token_logprobs[number]
            assert (token == max(top.values())) == (is_greedy[number - 1] == 0)
            assert top[said.tokens[number]] == token
        assert choice.text.startswith(tokenizer.decode(row))
        assert said.text_offset[0] == 0 and sorted(said.text_offset) == said.text_offset


def test_a_token_that_stops_is_counted_like_any_other(start: Callable, chain: Callable, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the x")
    client = start(m=chain()).openai()  # its first token is the end
    choice = client.completions.create(model="m", prompt=ids, max_tokens=1, logprobs=1, echo=True).choices[0]
    assert choice.finish_reason == "stop" and choice.text == "the x"
    assert choice.logprobs.tokens[len(ids) :] == ["<|im_end|>"]


def test_a_prompt_that_leaves_no_room_is_refused(start: Callable, chain: Callable, tokenizer: Tokenizer) -> None:
    client = start(m=chain("ab", context_length=8)).openai()
    row = tokenizer.encode("x y z u")[:7]
    assert client.completions.create(model="m", prompt=row, max_tokens=5).usage.total_tokens <= 8
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", prompt=[*row, row[0]], max_tokens=1)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"
    assert client.completions.create(model="m", prompt=[*row, row[0]], max_tokens=0, echo=True).choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt="word " * 10**5)


def test_streams_are_the_whole_in_pieces(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    ask: dict[str, Any] = {
        "model": "m", "prompt": ["the reply", "library"], "n": 2, "seed": 5, "max_tokens": 9, "logprobs": 2, "echo": True,
    }  # fmt: skip
    whole = client.completions.create(**ask)
    texts, tokens, logprobs, places = {}, {}, {}, {}
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **ask):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.logprobs:
                tokens[choice.index] = tokens.get(choice.index, []) + choice.logprobs.tokens
                logprobs[choice.index] = logprobs.get(choice.index, []) + choice.logprobs.token_logprobs
                places[choice.index] = places.get(choice.index, []) + choice.logprobs.text_offset
        usage = chunk.usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        assert texts[choice.index] == choice.text and tokens[choice.index] == choice.logprobs.tokens
        assert places[choice.index] == choice.logprobs.text_offset
        assert logprobs[choice.index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_the_best_of_several_has_the_highest_mean_logprob(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    ask: dict[str, Any] = {"model": "m", "prompt": "the", "seed": 3, "max_tokens": 6, "logprobs": 0}
    each = client.completions.create(n=5, **ask).choices
    mean = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in each}
    best = client.completions.create(n=2, best_of=5, **ask)
    assert [choice.text for choice in best.choices] == sorted(mean, key=lambda text: -mean[text])[:2]
    assert best.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in each)


def test_insert_asks_for_the_middle_where_it_was_learned(
    start: Callable, chain: Callable, tokenizer: Tokenizer
) -> None:
    asked = infill_prompt("the ", " library", tokenizer)
    server = start(m=chain("mid", after=asked[-1]), can_insert=True)
    found = server.openai().completions.create(model="m", prompt="the ", suffix=" library")
    assert found.choices[0].text == "mid" and found.usage.prompt_tokens == len(asked)
    server = start(m=chain("mid"))
    with pytest.raises(openai.BadRequestError, match="not trained") as refused:
        server.openai().completions.create(model="m", prompt="the ", suffix=" library")
    assert refused.value.param == "suffix" and refused.value.code == "unsupported_parameter"


def test_token_bias_decides(start: Callable, decoder: Decoder, tokenizer: Tokenizer) -> None:
    client = start(m=decoder).openai()
    (x,) = tokenizer.encode("x")
    found = client.completions.create(model="m", prompt="the", max_tokens=4, logit_bias={str(x): 100}, temperature=0)
    assert found.choices[0].text == "xxxx"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="m", prompt="the", logit_bias={"99999": 1})


def test_parameters_reach_the_engine(start: Callable, decoder: Decoder, tokenizer: Tokenizer) -> None:
    server = start(m=decoder)
    asked = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.2, "min_tokens": 2, "seed": 11, "max_tokens": 7,
    }  # fmt: skip
    row = tokenizer.encode("the library")
    stops = (*tokenizer.stop_ids,)
    (output,) = Engine(decoder).generate([row], SamplingParams(stop_ids=stops, **asked))
    found = server.post("/v1/completions", {"model": "m", "prompt": row, "logprobs": 0, **asked}).json
    assert found["usage"]["completion_tokens"] == len(output.ids)
    assert found["choices"][0]["text"] == tokenizer.decode(output.ids)
