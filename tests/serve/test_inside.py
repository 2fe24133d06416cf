"""Looking inside over HTTP: what is told equals what `lyceum.model.inside` sees; bounds on length, and the caller's quota."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.corpus.records import Conversation, Message
from lyceum.model.inside import look, most_tokens
from lyceum.serve.answers import token_name
from lyceum.serve.limits import Limits, Quota
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer

Make = Callable[..., Any]
TEXT = "the reply to 你好"


def test_what_is_told_is_what_was_seen(page: Make, decoder: Any, tokenizer: Tokenizer) -> None:
    server = page(models={"real": decoder})
    told = server.post("/api/inside", {"model": "real", "text": TEXT}).json
    ids = tokenizer.encode(TEXT)
    seen, num = look(decoder, ids), len(ids)
    assert told["tokens"] == [token_name(tokenizer, token) for token in ids] and (told["layers"], told["heads"]) == (
        2,
        4,
    )
    weights = torch.frombuffer(bytearray(base64.b64decode(told["attention"])), dtype=torch.uint8).float() / 255
    past = torch.ones(num, num, dtype=torch.bool).tril()
    assert weights.view(2, 4, -1).allclose(seen.attention_LHTT[:, :, past], atol=0.5 / 255 + 1e-6)
    for layer in range(3):
        for place in range(num):
            names = [name for name, _ in told["lens"][layer][place]]
            assert names == [token_name(tokenizer, int(token)) for token in seen.top_ids_LTP[layer, place]]
            chances = [math.exp(logprob) for logprob in seen.top_logprobs_LTP[layer, place].tolist()]
            assert [chance for _, chance in told["lens"][layer][place]] == pytest.approx(chances, abs=6e-5)
    assert torch.tensor(told["next_logprobs"]).allclose(seen.next_logprobs_LT, atol=6e-5)


def test_the_last_row_is_what_the_api_says_of_the_same_text(page: Make, decoder: Any) -> None:
    server = page(models={"real": decoder})
    told = server.post("/api/inside", {"model": "real", "text": TEXT}).json
    asked = {"model": "real", "prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 5, "temperature": 1}
    logprobs = server.post("/v1/completions", asked).json["choices"][0]["logprobs"]
    assert told["tokens"] == logprobs["tokens"][:-1]
    assert told["next_logprobs"][-1] == pytest.approx(logprobs["token_logprobs"][1:-1], abs=2e-3)


def test_a_question_is_read_in_the_chat_format(page: Make, decoder: Any, tokenizer: Tokenizer) -> None:
    told = page(models={"real": decoder}).post("/api/inside", {"model": "real", "text": "Why?", "as_chat": True}).json
    prompt = ChatFormat(tokenizer).prompt(Conversation((Message("user", "Why?"),)))
    assert told["tokens"] == [token_name(tokenizer, token) for token in prompt]


def test_what_is_too_long_or_no_plain_decoder_is_refused(page: Make, decoder: Any, tokenizer: Tokenizer) -> None:
    server = page(models={"real": decoder})
    most = most_tokens(decoder.spec)
    assert server.ask("GET", "/api/inside").json == {
        "models": [{"id": "real", "layers": 2, "heads": 4, "most_tokens": most, "chats": True}]
    }
    long = tokenizer.decode(tokenizer.encode("the library ") * most)
    refused = server.post("/api/inside", {"model": "real", "text": long})
    assert refused.status == 400 and refused.json["error"]["code"] == "text_too_long"
    for wrong in (
        {"model": "demo", "text": "x"},
        {"model": "real", "text": ""},
        {"model": "real", "text": "x", "layer": 1},
    ):
        assert server.post("/api/inside", wrong).status == 400
    assert server.post("/api/inside", {"model": "none", "text": "x"}).status == 404
    assert server.post("/api/inside", {"model": "real", "text": "x" * 100_000}).status == 400


def test_it_counts_towards_the_callers_tokens_and_gives_back_what_runs(page: Make, decoder: Any, known: Make) -> None:
    server = page(models={"real": decoder}, porter=known("alice"))
    server.service.quota = Quota(Limits(tokens_per_minute=10), room=8)
    key = {"Authorization": f"Bearer {'a' * 40}"}
    asked = {"model": "real", "text": "the library"}
    answers = [server.post("/api/inside", asked, **key).status for _ in range(12)]
    assert answers[0] == 200 and answers[-1] == 429 and server.service.quota.running == 0
    assert server.post("/api/inside", asked).status == 401
