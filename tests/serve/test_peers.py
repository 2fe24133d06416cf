"""LangChain's ChatOpenAI and lm-evaluation-harness, as they are, against a server.

`make test-slow` installs them: lm_eval without its dependencies, which its tasks need and its models for an API do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.transformer import Decoder
from lyceum.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # their warnings are theirs

PAIRS = [("the reply", " to the question"), ("in the library", " is"), ("", "the naïve — question")]


@pytest.fixture
def harness(start: Callable, decoder: Decoder) -> Callable[..., Any]:
    """A model of lm-evaluation-harness that asks our server."""
    kinds = pytest.importorskip("lm_eval.models.openai_completions", reason="lm_eval is not installed")
    server = start(m=decoder)
    paths = {"LocalCompletionsAPI": "/v1/completions", "LocalChatCompletion": "/v1/chat/completions"}

    def make(name: str, **settings: Any) -> Any:
        return getattr(kinds, name)(model="m", base_url=server.url + paths[name], **settings)

    return make


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one, request_type="x", doc={}) for one in arguments]


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_lm_evals_log_likelihoods_are_the_engines(
    harness: Callable, decoder: Decoder, tokenizer: Tokenizer, tmp_path: Path, backend: str
) -> None:
    save_checkpoint(tmp_path / "m", decoder, tokenizer)
    settings = {"tokenizer": str(tmp_path / "m")} if backend == "huggingface" else {}
    model = harness("LocalCompletionsAPI", tokenizer_backend=backend, max_length=256, batch_size=2, **settings)
    found = model.loglikelihood(requests(*PAIRS))
    engine = Engine(decoder)
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        before = tokenizer.encode(context) or [model.prefix_token_id]
        row = [*before, *tokenizer.encode(continuation)]
        (scores,) = engine.scores([row])
        assert logprob == pytest.approx(sum(scores.logprobs[len(before) - 1 :]), abs=1e-4)
        assert is_greedy == (max(scores.ranks[len(before) - 1 :]) == 0)


def test_lm_evals_greedy_judgement_follows_the_model(harness: Callable, decoder: Decoder, tokenizer: Tokenizer) -> None:
    row = tokenizer.encode("the reply")
    (output,) = Engine(decoder).generate([row], SamplingParams(3, temperature=0.0))
    model = harness("LocalCompletionsAPI", tokenizer_backend="remote", max_length=256)
    key = ("", "")
    rows = [(key, row, output.ids), (key, row, [*output.ids[:-1], (output.ids[-1] + 1) % 300])]
    found = model._loglikelihood_tokens(rows)
    assert [is_greedy for _, is_greedy in found] == [True, False]


@pytest.mark.parametrize("name", ["LocalCompletionsAPI", "LocalChatCompletion"])
def test_lm_evals_generations_are_the_engines(
    harness: Callable, decoder: Decoder, tokenizer: Tokenizer, name: str
) -> None:
    model = harness(name, tokenizer_backend="remote" if name == "LocalCompletionsAPI" else None, max_length=256)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    if name == "LocalChatCompletion":
        import json

        from lm_eval.models.api_models import JsonChatStr

        asked: Any = JsonChatStr(json.dumps([{"role": "user", "content": "hi"}]))
        assert len(model.generate_until(requests((asked, settings)))) == 1
        return
    (text,) = model.generate_until(requests(("the reply", settings)))
    params = SamplingParams(12, temperature=0.0, stop_ids=tokenizer.stop_ids, stop_strings=("\n\n",))
    (output,) = Engine(decoder, token_bytes=tokenizer.token_bytes).generate([tokenizer.encode("the reply")], params)
    whole = b"".join(tokenizer.token_bytes[token] for token in output.ids)[: output.text_bytes]
    assert text == whole.decode("utf-8", "replace")


def test_langchain_talks_streams_and_calls(start: Callable, chain: Callable, decoder: Decoder) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    server = start(m=chain("naïve—!"), r=decoder)

    def make(model: str, **settings: Any) -> Any:
        return langchain.ChatOpenAI(model=model, base_url=server.url + "/v1", api_key="any", max_retries=0, **settings)

    found = make("m", max_tokens=50).invoke("hi")  # it sends max_completion_tokens
    assert found.content == "naïve—!" and found.usage_metadata["output_tokens"] == len("naïve—!".encode()) + 1
    assert found.response_metadata["finish_reason"] == "stop"
    assert "".join(piece.content for piece in make("m", stream_usage=True).stream("hi")) == "naïve—!"

    schema = {
        "title": "Answer", "description": "An answer.", "type": "object", "required": ["n"],
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}, "additionalProperties": False,
    }  # fmt: skip
    for method in ("json_schema", "function_calling"):
        model = make("r", max_tokens=300, seed=1).with_structured_output(schema, method=method)
        assert model.invoke("hi")["n"] in (1, 2, 3)
