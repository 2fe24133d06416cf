"""Chat completions as the official client sees them, and the shape of every chunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.model.transformer import Decoder
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer

TEXT = "naïve—我🦙!"  # no byte twice
ASK = [{"role": "user", "content": "hi"}]


def test_a_reply_is_what_the_model_says(start: Callable, chain: Callable) -> None:
    client = start(m=chain(TEXT)).openai()
    found = client.chat.completions.create(model="m", messages=ASK)
    (choice,) = found.choices
    assert choice.message.content == TEXT and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and found.object == "chat.completion" and found.id.startswith("chatcmpl-")
    assert found.usage.completion_tokens == len(TEXT.encode()) + 1
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found._request_id.startswith("req_")


def test_a_stream_has_the_shape_that_clients_rely_on(start: Callable, chain: Callable, read_events: Callable) -> None:
    server = start(m=chain(TEXT))
    body = {"model": "m", "messages": ASK, "stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.isascii()
    *chunks, usage, done = read_events(answer.text)
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, usage]}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[0]["content"] == "" and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    assert [delta["content"] for delta in deltas[1:-1]] == list(TEXT)  # whole characters, each as soon as it is certain


def test_without_being_asked_a_stream_says_no_usage(start: Callable, chain: Callable, read_events: Callable) -> None:
    answer = start(m=chain("ab")).post("/v1/chat/completions", {"model": "m", "messages": ASK, "stream": True})
    assert all(chunk["choices"] and "usage" not in chunk for chunk in read_events(answer.text)[:-1])


def test_text_with_other_line_ends_survives_any_reader_of_events(start: Callable, chain: Callable) -> None:
    text = "a\u2028b\x85c"
    client = start(m=chain(text)).openai()
    with client.chat.completions.stream(model="m", messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == text


def test_stop_strings_end_a_reply_and_are_not_shown(start: Callable, chain: Callable) -> None:
    client = start(m=chain("abc, de")).openai()
    for stop, text in ((", d", "abc"), (["z", ", "], "abc"), (["zz", "zzz"], "abc, de")):
        found = client.chat.completions.create(model="m", messages=ASK, stop=stop)
        assert found.choices[0].message.content == text and found.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(model="m", messages=ASK, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_bound_a_reply(start: Callable, chain: Callable, name: str) -> None:
    client = start(m=chain("abcdef")).openai()
    found = client.chat.completions.create(model="m", messages=ASK, **{name: 3})
    assert found.choices[0].message.content == "abc" and found.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="m", messages=ASK, max_tokens=3, max_completion_tokens=3)


def test_the_context_ends_a_reply_and_is_no_error(start: Callable, chain: Callable, tokenizer: Tokenizer) -> None:
    model = chain("ab")
    a, b = (token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes[token] in (b"a", b"b"))
    model.says([a], b)  # for ever
    model.spec.context_length = 32
    client = start(m=model).openai()
    found = client.chat.completions.create(model="m", messages=ASK, max_tokens=10**6)
    assert found.choices[0].finish_reason == "length" and found.usage.total_tokens == 32


def test_several_replies_have_their_own_noise_and_a_seed_repeats_them(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    ask: dict[str, Any] = {"model": "m", "messages": ASK, "n": 3, "max_tokens": 12}
    first, second = (client.chat.completions.create(seed=7, **ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    shown = ["", "", ""]
    for chunk in client.chat.completions.create(seed=7, stream=True, **ask):
        shown[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert shown == texts
    others = [client.chat.completions.create(**{**ask, "n": 1}).choices[0].message.content for _ in range(4)]
    assert len(set(others)) > 1  # without a seed every request has another


def test_logprobs_are_the_engines_whole_or_streamed(start: Callable, decoder: Decoder, chat: ChatFormat) -> None:
    server = start(m=decoder)
    ask: dict[str, Any] = {
        "model": "m", "messages": ASK, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    found = server.openai().chat.completions.create(**ask).choices[0].logprobs.content
    prompt = chat.prompt(Conversation((Message("user", "hi"),)))
    params = SamplingParams(8, temperature=0.0, logprobs=True, top_logprobs=3, stop_ids=chat.stop_ids)
    (output,) = Engine(decoder).generate([prompt], params)
    assert [token.logprob for token in found] == pytest.approx(output.logprobs[: len(found)], abs=1e-4)
    assert len(found) == len(output.ids) - (output.finish == "stop")
    for token in found:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob
        assert token.token.startswith("bytes:") or token.token.encode() == bytes(token.bytes) or not token.bytes
    streamed = []
    for chunk in server.openai().chat.completions.create(stream=True, **ask):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [one.token for one in streamed] == [one.token for one in found]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in found], abs=1e-4)


def test_the_next_turn_finds_what_was_read(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    messages: list[Any] = [{"role": "user", "content": "a question that is long enough to be remembered"}]
    first = client.chat.completions.create(model="m", messages=messages, max_tokens=3)
    messages += [first.choices[0].message, {"role": "user", "content": "more"}]  # the client's own object goes back
    second = client.chat.completions.create(model="m", messages=messages, max_tokens=3)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


# -- tools -------------------------------------------------------------------------------------------------------------

LOOKUP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


def calling(chain: Callable, chat: ChatFormat, text: str, *calls: tuple[str, str]) -> Any:
    """A model that recites a message with calls, token by token, wherever a token is there twice."""
    ids = chat.reply(Message("assistant", text, tuple(ToolCall("", *call) for call in calls))).ids
    model = chain()

    class Recite(type(model)):  # type: ignore[misc]
        def logits(self, hidden: Any) -> Any:
            import torch

            number = min(self.num_said, len(ids) - 1)
            self.num_said += 1
            wanted = torch.tensor([ids[number]] * hidden.reshape(-1, 1).shape[0])
            return 50.0 * torch.nn.functional.one_hot(wanted, len(self.next)).float()

    model.__class__ = Recite
    model.num_said = 0
    return model


def test_calls_come_whole_and_streamed_in_the_same_shape(start: Callable, chain: Callable, chat: ChatFormat) -> None:
    calls = (("look", '{"n": 1}'), ("look", '{"n": 22}'))
    client = start(m=calling(chain, chat, "wait", *calls)).openai()
    choice = client.chat.completions.create(model="m", messages=ASK, tools=[LOOKUP]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "wait"
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == list(calls)
    assert len({call.id for call in choice.message.tool_calls}) == 2

    client = start(m=calling(chain, chat, "wait", *calls)).openai()
    with client.chat.completions.stream(model="m", messages=ASK, tools=[LOOKUP]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.content == "wait" and [call.function.arguments for call in message.tool_calls] == [
        c[1] for c in calls
    ]
    assert "tool_calls.function.arguments.done" in kinds


def test_every_piece_of_a_call_has_its_index(
    start: Callable, chain: Callable, chat: ChatFormat, read_events: Callable
) -> None:
    server = start(m=calling(chain, chat, "", ("look", "{}"), ("look", '{"n": 2}')))
    body = {"model": "m", "messages": ASK, "tools": [LOOKUP], "stream": True}
    chunks = read_events(server.post("/v1/chat/completions", body).text)[:-1]
    pieces = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [piece["index"] for piece in pieces] == [0, 1]
    assert all(piece["id"].startswith("call_") and piece["type"] == "function" for piece in pieces)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_at_a_time_ends_with_the_first(start: Callable, chain: Callable, chat: ChatFormat) -> None:
    client = start(m=calling(chain, chat, "", ("look", "{}"), ("look", '{"n": 2}'))).openai()
    found = client.chat.completions.create(model="m", messages=ASK, tools=[LOOKUP], parallel_tool_calls=False)
    assert len(found.choices[0].message.tool_calls) == 1 and found.choices[0].message.content is None


@pytest.mark.parametrize(
    ("choice", "finish"), [("required", "tool_calls"), ({"type": "function", "function": {"name": "find"}}, "stop")]
)
def test_a_demanded_call_comes_from_any_model(start: Callable, decoder: Decoder, choice: Any, finish: str) -> None:
    parameters = {
        "type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"],
        "$defs": {"n": {"type": "integer", "minimum": 3, "maximum": 5}},
    }  # fmt: skip
    find = {"type": "function", "function": {"name": "find", "parameters": parameters, "strict": True}}
    client = start(m=decoder).openai()
    ask: dict[str, Any] = {"model": "m", "messages": ASK, "tools": [find], "tool_choice": choice, "max_tokens": 300}
    found = client.chat.completions.create(seed=1, **ask).choices[0]
    (call,) = found.message.tool_calls
    assert call.function.name == "find" and json.loads(call.function.arguments)["n"] in (3, 4, 5)
    assert found.finish_reason == finish
    with client.chat.completions.stream(seed=1, **ask) as stream:
        again = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert again.function.arguments == call.function.arguments


def test_among_several_tools_one_is_called(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    other = {"type": "function", "function": {"name": "other"}}
    tools: list[Any] = [LOOKUP, other]
    found = client.chat.completions.create(
        model="m", messages=ASK, tools=tools, tool_choice="required", max_tokens=300, seed=3
    )
    assert found.choices[0].message.tool_calls[0].function.name in ("look", "other")


def test_with_none_a_model_that_wants_to_call_does_not(
    start: Callable, chain: Callable, chat: ChatFormat, tokenizer: Tokenizer
) -> None:
    def model() -> Any:
        made = chain([tokenizer.tool_call_start_id])
        made.says([tokenizer.turn_end_id], tokenizer.tool_call_start_id)
        return made

    ask: dict[str, Any] = {"model": "m", "messages": ASK, "tools": [LOOKUP], "logprobs": True, "max_tokens": 1}
    client = start(m=model()).openai()
    wanted = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [token.token for token in wanted] == ["<tool_call>"]
    other = client.chat.completions.create(tool_choice="none", **ask).choices[0].logprobs.content
    assert "<tool_call>" not in [token.token for token in other]


def test_results_go_back_and_a_stranger_is_refused(start: Callable, chain: Callable, chat: ChatFormat) -> None:
    server = start(m=calling(chain, chat, "", ("look", '{"n": 1}')))
    client = server.openai()
    first = client.chat.completions.create(model="m", messages=ASK, tools=[LOOKUP]).choices[0].message
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "7"}
    assert client.chat.completions.create(model="m", messages=[*ASK, first, result], tools=[LOOKUP]).choices
    with pytest.raises(openai.BadRequestError, match="preceding"):
        client.chat.completions.create(model="m", messages=[*ASK, {**result, "tool_call_id": "call_x"}])


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_a_reply_fits_the_schema_that_was_asked_for(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    schema = {
        "type": "object", "properties": {"on": {"type": "boolean"}, "n": {"enum": [1, 2]}}, "required": ["on", "n"],
    }  # fmt: skip
    shape: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="m", messages=ASK, response_format=shape, max_tokens=100, seed=seed
        ).choices[0]
        assert found.finish_reason == "stop" and set(json.loads(found.message.content)) == {"on", "n"}


def test_any_object_is_an_object(start: Callable, chain: Callable) -> None:
    client = start(m=chain('{"a":1}'.replace('"a"', '"a"'))).openai()
    found = client.chat.completions.create(
        model="m", messages=ASK, response_format={"type": "json_object"}, max_tokens=9
    )
    assert found.choices[0].message.content.lstrip().startswith("{")


def test_a_schema_that_is_not_followed_is_refused(start: Callable, decoder: Decoder) -> None:
    client = start(m=decoder).openai()
    shape: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "string", "format": "date"}}}
    with pytest.raises(openai.BadRequestError, match="format") as refused:
        client.chat.completions.create(model="m", messages=ASK, response_format=shape)
    assert refused.value.param == "response_format"


# -- edits -------------------------------------------------------------------------------------------------------------


def test_an_edit_is_a_conversation(start: Callable, chain: Callable) -> None:
    server = start(m=chain("fixed"))
    found = server.post("/v1/edits", {"model": "m", "input": "fxied", "instruction": "Fix it", "n": 2}).json
    assert found["object"] == "edit" and [choice["text"] for choice in found["choices"]] == ["fixed", "fixed"]
    assert found["usage"]["completion_tokens"] == 12


# -- silence -----------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_silent_shows_that_it_lives(
    start: Callable, chain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyceum.serve.app.PING_S", 0.02)
    model = chain("ab")
    model.pause_s = 0.15
    server = start(m=model)
    text = server.post("/v1/chat/completions", {"model": "m", "messages": ASK, "stream": True}).text
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")
    stream = server.openai().chat.completions.create(model="m", messages=ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab"


def test_a_stream_is_watched_and_goes_before_what_is_not(
    start: Callable, chain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(m=chain("ab"))
    engine, seen = server.service.models["m"].engine, []
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda *a, **k: seen.append(k["is_background"]) or add(*a, **k))
    ask = {"model": "m", "messages": ASK}
    for change in ({"stream": True}, {}, {"service_tier": "default"}, {"service_tier": "flex", "stream": True}):
        answer = server.post("/v1/chat/completions", {**ask, **change})
        assert answer.status == 200
    assert seen == [False, True, False, True]
    assert '"service_tier":"flex"' in answer.text
