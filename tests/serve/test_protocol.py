"""What is refused and how it is said: status, type, param, code; and that nothing that was sent can hurt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.errors import ResourceError, UsageError
from lyceum.serve.limits import Limits
from lyceum.serve.protocol import REQUESTS, ChatRequest
from lyceum.serve.refusals import MAX_MESSAGE, Refusal, of_error

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
NOT_FINITE = json.dumps(ASK)[:-1].encode() + b', "temperature": 1e999}'


def refused(server: Any, path: str, body: Any, **headers: str) -> dict[str, Any]:
    answer = server.post(path, body, **headers)
    assert answer.status == 400, answer.text
    assert set(answer.json) == {"error"} and set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["type"] == "invalid_request_error"
    return answer.json["error"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"top_logprobs": 5}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "unknown_parameter"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(start: Callable, chain: Callable, change: dict, param: str, code: str | None) -> None:
    error = refused(start(m=chain("ab")), CHAT, {**ASK, **change})
    assert (error["param"], error["code"]) == (param, code), error


def test_a_misspelt_field_is_told_its_neighbour(start: Callable, chain: Callable) -> None:
    assert "did you mean 'temperature'?" in refused(start(m=chain("ab")), CHAT, {**ASK, "temprature": 1})["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"verbosity": "low"}, "verbosity"),
        ({"moderation": {}}, "moderation"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "strict"),
    ],
)
def test_what_is_known_and_not_followed_is_never_dropped(
    start: Callable, chain: Callable, change: dict, param: str
) -> None:
    error = refused(start(m=chain("ab")), CHAT, {**ASK, **change})
    assert (error["param"], error["code"]) == (param, "unsupported_parameter"), error


def test_what_asks_for_nothing_is_no_error(start: Callable, chain: Callable) -> None:
    harmless = {
        "store": False, "metadata": None, "reasoning_effort": "none", "modalities": ["text"], "functions": [],
        "service_tier": "default", "parallel_tool_calls": True, "user": "u", "tool_choice": "none", "stop": None,
        "response_format": {"type": "text"}, "temperature": None, "tools": None, "stream_options": None, "n": None,
    }  # fmt: skip
    assert start(m=chain("ab")).post(CHAT, {**ASK, **harmless}).status == 200


def test_content_in_parts_is_one_text(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    said = server.post(CHAT, {"model": "m", "messages": [{"role": "user", "content": parts}]}).json
    assert said["usage"] == server.post(CHAT, ASK).json["usage"]


def test_the_specifications_fields_are_all_known() -> None:
    """Every field of the chat request of the official client, of the version that is pinned."""
    import typing

    from openai.types.chat import completion_create_params

    names = set(typing.get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    unknown = names - set(ChatRequest.model_fields) - set(ChatRequest.NOT_FOLLOWED)
    assert len(names) > 30 and not unknown


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "parse"), (b"{", "parse"), (b"[1]", "object"), (b'"x"', "object"), (b"\xff\xfe", "parse"),
        (b'{"a": NaN}', "parse"), (NOT_FINITE, "temperature"), (b'{"model": "\\ud800"}', "parse"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "parse"), (b"[" * 10**6, "parse"),
        (b'{"model": "m", "seed": ' + b"9" * 10**5 + b"}", ""),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_is_told_so_in_few_words(
    start: Callable, chain: Callable, body: bytes, words: str
) -> None:
    error = refused(start(m=chain("ab")), CHAT, body)
    assert words in error["message"] and len(error["message"]) <= MAX_MESSAGE


def test_a_short_body_makes_no_long_answer(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    many = {**ASK, "messages": [{"x" * 10**4: 1}] * 2000, "y" * 10**5: 2}
    assert len(server.post(CHAT, many).text) < 2000
    assert len(server.post(CHAT, {**ASK, "model": "z" * 200}).text) < 2000
    assert "\\u001b" not in server.post(CHAT, {**ASK, "\x1b[31m": 2}).text


def test_errors_are_those_of_the_client(start: Callable, chain: Callable) -> None:
    client = start(m=chain("ab")).openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**ASK, "model": "n"})
    assert missing.value.code == "model_not_found" and missing.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft:x:y::z")
    with pytest.raises(openai.NotFoundError):
        client.files.list()


def test_an_error_of_ours_is_a_500_that_tells_nothing_and_is_not_tried_again(
    start: Callable, chain: Callable, capsys: pytest.CaptureFixture
) -> None:
    model = chain("ab")
    server = start(m=model)
    model.error = RuntimeError("a secret path")
    answer = server.post(CHAT, ASK)
    assert answer.status == 500 and answer.json["error"]["type"] == "server_error" and "secret" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    text = server.post(CHAT, {**ASK, "stream": True}).text
    assert json.loads(text.split("data: ")[-1])["error"]["code"] == "internal_error"  # after the 200: an event
    with pytest.raises(openai.APIError, match="had an error"):
        list(server.openai().chat.completions.create(stream=True, **ASK))
    model.error = None
    assert server.post(CHAT, ASK).json["choices"][0]["message"]["content"] == "ab"  # and it goes on


def test_errors_of_the_rooms_below_have_their_status() -> None:
    assert of_error(UsageError("no", hint="yes")).status == 400
    assert of_error(ResourceError("full")).status == 503 and of_error(ResourceError("full")).headers["retry-after"]
    assert of_error(KeyError("x")).status == 500
    assert Refusal(429, "busy", retry_after_s=1.5).headers == {"retry-after": "2", "retry-after-ms": "1500"}


def test_every_request_is_described(start: Callable, chain: Callable) -> None:
    described = start(m=chain("ab")).ask("GET", "/openapi.json").json
    assert {kind.__name__ for kind in REQUESTS} <= set(described["components"]["schemas"])
    text = json.dumps(described)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in described["components"]["schemas"], name


# -- anything ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({name for kind in REQUESTS for name in kind.model_fields})
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)
PATHS = [CHAT, "/v1/completions", "/v1/edits", "/v1/embeddings", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", PATHS)
def test_no_body_breaks_a_route(start: Callable, chain: Callable, path: str) -> None:
    server = start(m=chain("ab"))

    @settings(max_examples=15)
    @given(BODIES, st.booleans())
    def ask(body: dict, is_named: bool) -> None:
        answer = server.post(path, {**body, **({"model": "m"} if is_named else {})})
        assert answer.status in (200, 400, 404), answer.text
        if answer.status != 200:
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}

    ask()
    assert server.idle()


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_bytes_break_a_route(start: Callable, chain: Callable, path: str) -> None:
    server = start(m=chain("ab"), limits=Limits(body_bytes=2000))
    right = {"model": "m", "messages": ASK["messages"], "prompt": "x", "tokens": [1], "input": "x", "instruction": "y"}

    @settings(max_examples=80)
    @given(st.binary(max_size=200) | BODIES.map(lambda body: json.dumps({**right, **body}).encode()))
    def ask(body: bytes) -> None:
        answer = server.post(path, body)
        assert answer.status in (200, 400, 404, 413), answer.text

    ask()
    assert server.idle()


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(start: Callable, chain: Callable) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    server = start(m=chain("ab"), limits=Limits(max_tokens=8))
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")

    for operation in schema.get_all_operations():
        found = operation.ok()
        test = settings(max_examples=25, deadline=None, derandomize=True)(
            given(case=found.as_strategy())(lambda case: _holds(case, server.url))
        )
        test()
    assert server.idle()


def _holds(case: Any, url: str) -> None:
    answer = case.call(base_url=url, timeout=20)
    assert answer.status_code < 500, (case.path, answer.text)
