"""Responses as the official client sees them: events in their order, conversations that the server keeps, owners."""

from __future__ import annotations

import json
import time
import typing
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import response_create_params
from pydantic import BaseModel
from sqlalchemy import update

from lyceum.errors import NotFound, StoreError
from lyceum.model.transformer import Decoder
from lyceum.serve.responses import kept
from lyceum.serve.responses.items import as_items, as_messages
from lyceum.serve.responses.protocol import CountRequest, ResponseRequest
from lyceum.serve.responses.tables import RESPONSES
from lyceum.serve.store import Store
from lyceum.tokens.chat import ChatFormat
from tests.serve.test_chat import calling

ALICE, BOB = "a" * 40, "b" * 40
TEXT = "naïve—我🦙!"  # no byte twice
LOOK: dict[str, Any] = {
    "type": "function", "name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}  # fmt: skip
DATE: dict[str, Any] = {"schema": {"type": "string", "format": "date"}}  # which the engine does not follow
Make = Callable[..., Any]


def bearer(key: str = ALICE) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: Any, body: Any = None, path: str = "", method: str = "POST", key: str = ALICE) -> Any:
    return server.ask(method, f"/v1/responses{path}", body, bearer(key))


@pytest.fixture
def endless(chain: Make) -> Any:
    """A model that goes on for ever, a millisecond a step."""
    model = chain("ab", context_length=100_000)
    a, b = (model.tokenizer.token_bytes.index(letter) for letter in (b"a", b"b"))
    model.says([a], b)
    model.pause_s = 0.001
    return model


# -- one response ------------------------------------------------------------------------------------------------------


def test_a_response_is_what_the_model_says(keep: Make, chain: Make) -> None:
    client = keep(m=chain(TEXT)).openai(ALICE)
    found = client.responses.create(model="m", input="hi", instructions="Be brief.", metadata={"for": "a test"})
    assert found.output_text == TEXT and found.status == "completed" and found.error is None
    (item,) = found.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert found.id.startswith("resp_") and item.id.startswith("msg_") and found.object == "response"
    assert found.metadata == {"for": "a test"} and found.instructions == "Be brief." and found.store is True
    assert found.usage.output_tokens == len(TEXT.encode()) + 1
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert client.responses.retrieve(found.id).to_dict() == found.to_dict()


def test_it_is_the_text_of_a_chat_with_the_same_seed(keep: Make, decoder: Decoder) -> None:
    client = keep(m=decoder).openai(ALICE)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    for seed in (7, 8):
        chat = client.chat.completions.create(model="m", messages=messages, seed=seed, max_tokens=12, top_p=0.9)
        more: Any = {"max_output_tokens": 12, "top_p": 0.9, "extra_body": {"seed": seed}}
        found = client.responses.create(model="m", instructions="Be brief.", input="hi", **more)
        assert found.output_text == chat.choices[0].message.content != ""
        assert found.usage.input_tokens == chat.usage.prompt_tokens
        assert found.usage.output_tokens == chat.usage.completion_tokens
        stream = client.responses.create(model="m", instructions="Be brief.", input="hi", stream=True, **more)
        assert "".join(one.delta for one in stream if one.type == "response.output_text.delta") == found.output_text
    assert client.responses.create(
        model="m", input=messages, max_output_tokens=12, top_p=0.9, extra_body={"seed": 8}
    ).output_text == found.output_text  # fmt: skip


def test_the_events_of_a_text_come_in_their_order(keep: Make, chain: Make, read_events: Make) -> None:
    server = keep(m=chain(TEXT))
    answer = ask(server, {"model": "m", "input": "hi", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.isascii()
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    told = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {one['type']}" for one in told]  # named, and no [DONE] at the end
    assert [one["sequence_number"] for one in told] == [*range(len(told))]
    assert [one["type"].removeprefix("response.") for one in told] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * len(TEXT),
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [one["delta"] for one in told if "delta" in one] == list(TEXT)  # whole characters
    body = told[-1]["response"]
    (item,) = body["output"]
    assert {one["item_id"] for one in told if "item_id" in one} == {item["id"]} == {told[2]["item"]["id"]}
    assert {one.get("output_index", 0) for one in told} == {0} and told[-2]["item"] == item
    assert told[-4]["text"] == told[-3]["part"]["text"] == item["content"][0]["text"] == TEXT
    assert (told[0]["response"]["status"], body["status"]) == ("in_progress", "completed")
    assert ask(server, method="GET", path=f"/{body['id']}").json == body


def test_a_whole_response_is_what_its_events_add_up_to(keep: Make, decoder: Decoder) -> None:
    client = keep(m=decoder).openai(ALICE)
    more: Any = {"model": "m", "input": "hi", "max_output_tokens": 9, "extra_body": {"seed": 3}}
    whole = client.responses.create(**more)
    *_, last = client.responses.create(stream=True, **more)
    plain: list[Any] = [whole.to_dict(), last.response.to_dict()]
    for one in plain:
        for item in (one, *one["output"]):
            del item["id"]
        del one["created_at"], one["completed_at"], one["usage"]["input_tokens_details"]
    assert plain[0] == plain[1]


def test_a_reply_that_is_cut_is_incomplete(keep: Make, chain: Make) -> None:
    client = keep(m=chain("abcdef")).openai(ALICE)
    found = client.responses.create(model="m", input="hi", max_output_tokens=3)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output_text == "abc" and found.output[0].status == "incomplete"
    stream = client.responses.create(model="m", input="hi", max_output_tokens=3, stream=True)
    *_, item, last = stream
    assert last.type == "response.incomplete" and item.item.status == "incomplete"
    assert client.responses.retrieve(last.response.id).status == "incomplete"


def test_a_reply_without_a_text_is_an_empty_message(keep: Make, chain: Make) -> None:
    client = keep(m=chain("")).openai(ALICE)
    assert client.responses.create(model="m", input="hi").output[0].content[0].text == ""
    with client.responses.stream(model="m", input="hi") as stream:
        assert stream.get_final_response().output[0].content[0].text == ""


def test_a_reply_fits_the_schema_and_is_parsed(keep: Make, decoder: Decoder) -> None:
    class Light(BaseModel):
        on: bool
        n: typing.Literal[1, 2]

    client = keep(m=decoder).openai(ALICE)
    for seed in range(2):
        found = client.responses.parse(model="m", input="hi", text_format=Light, extra_body={"seed": seed})
        assert isinstance(found.output_parsed, Light)
    assert found.text.format.type == "json_schema"
    with client.responses.stream(model="m", input="hi", text_format=Light, extra_body={"seed": 1}) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed
    shape: Any = {"format": {"type": "json_object"}}
    found = client.responses.create(model="m", input="hi", text=shape, max_output_tokens=2)
    assert found.output_text.lstrip().startswith("{")


def test_log_probabilities_are_the_chats(keep: Make, decoder: Decoder) -> None:
    client = keep(m=decoder).openai(ALICE)
    chat = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=2,
    ).choices[0]  # fmt: skip
    include: Any = ["message.output_text.logprobs"]
    more: Any = {"model": "m", "input": "hi", "max_output_tokens": 6, "temperature": 0, "include": include}
    found = client.responses.create(top_logprobs=2, **more).output[0].content[0].logprobs
    assert [one.token for one in found] == [one.token for one in chat.logprobs.content]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in chat.logprobs.content], abs=1e-4)
    assert all(len(one.top_logprobs) == 2 for one in found)
    told = [one for one in client.responses.create(stream=True, **more) if one.type == "response.output_text.delta"]
    assert [one.token for event in told for one in event.logprobs] == [one.token for one in found]


# -- functions ---------------------------------------------------------------------------------------------------------


def test_calls_go_to_the_client_and_their_results_come_back(keep: Make, chain: Make, chat: ChatFormat) -> None:
    calls = (("look", '{"n": 1}'), ("look", '{"n": 22}'))
    client = keep(m=calling(chain, chat, "wait", *calls)).openai(ALICE)
    tools: Any = [LOOK]
    first = client.responses.create(model="m", input="hi", tools=tools)
    message, *made = first.output
    assert message.content[0].text == "wait" and message.status == "completed"
    assert [(one.type, one.name, one.arguments) for one in made] == [("function_call", *call) for call in calls]
    results: Any = [{"type": "function_call_output", "call_id": one.call_id, "output": "7"} for one in made]

    server = keep(m=chain("ok"))
    client = server.openai(ALICE)
    second = client.responses.create(model="m", input=results, previous_response_id=first.id, tools=tools)
    assert second.output_text == "ok" and second.previous_response_id == first.id
    # statelessly, with the client's own objects, and as a chat: the prompt is the same
    again = client.responses.create(
        model="m", input=[{"role": "user", "content": "hi"}, *first.output, *results], tools=tools, store=False
    )
    told = [{"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in made]
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    messages.append({"role": "assistant", "content": "wait", "tool_calls": told})
    messages += [{"role": "tool", "tool_call_id": one.call_id, "content": "7"} for one in made]
    functions: Any = [{"type": "function", "function": {name: LOOK[name] for name in ("name", "parameters")}}]
    whole = client.chat.completions.create(model="m", messages=messages, tools=functions)
    assert second.usage.input_tokens == again.usage.input_tokens == whole.usage.prompt_tokens
    count = client.responses.input_tokens.count(model="m", input=results, previous_response_id=first.id, tools=tools)
    assert count.input_tokens == second.usage.input_tokens

    for wrong, words in (([], "No tool output found"), ([*results, {**results[0], "call_id": "x"}], "No tool call")):
        with pytest.raises(openai.BadRequestError, match=words):
            client.responses.create(
                model="m", input=[{"role": "user", "content": "?"}, *wrong], previous_response_id=first.id, tools=tools
            )


def test_the_events_of_a_call_come_in_their_order(keep: Make, chain: Make, chat: ChatFormat) -> None:
    server = keep(m=calling(chain, chat, "a", ("look", '{"n": 1}'), ("look", "{}")))
    with server.openai(ALICE).responses.stream(model="m", input="hi", tools=typing.cast(Any, [LOOK])) as stream:
        told = list(stream)
        final = stream.get_final_response()
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert [one.type.removeprefix("response.") for one in told] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", *call, *call, "completed",
    ]  # fmt: skip
    assert [one.output_index for one in told if hasattr(one, "output_index")] == [0] * 6 + [1] * 4 + [2] * 4
    assert [one.sequence_number for one in told] == [*range(len(told))]
    assert [one.arguments for one in final.output[1:]] == ['{"n": 1}', "{}"]


def test_a_demanded_call_comes_from_any_model(keep: Make, decoder: Decoder) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [3, 4]}}, "required": ["n"]}
    find: Any = {"type": "function", "name": "find", "parameters": schema, "strict": True}
    client = keep(m=decoder).openai(ALICE)
    for choice in ("required", {"type": "function", "name": "find"}):
        found = client.responses.create(
            model="m", input="hi", tools=[find], tool_choice=typing.cast(Any, choice), max_output_tokens=300
        )
        (call,) = found.output
        assert call.name == "find" and json.loads(call.arguments)["n"] in (3, 4) and found.status == "completed"


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_and_instructions_do_not(keep: Make, decoder: Decoder) -> None:
    client = keep(m=decoder).openai(ALICE)
    more: Any = {"model": "m", "max_output_tokens": 4, "extra_body": {"seed": 1}}
    first = client.responses.create(input="a question that is long enough", instructions="Say what you think.", **more)
    second = client.responses.create(input="more", previous_response_id=first.id, **more)
    said: list[Any] = [{"role": "user", "content": "a question that is long enough"}]
    said += [{"role": "assistant", "content": first.output_text}, {"role": "user", "content": "more"}]
    chat = client.chat.completions.create(model="m", messages=said, max_tokens=4, seed=1)
    assert second.usage.input_tokens == chat.usage.prompt_tokens  # no instructions in it
    assert second.output_text == chat.choices[0].message.content
    third = client.responses.create(input="again", previous_response_id=second.id, **more)
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.input_tokens  # what was read is remembered

    items = client.responses.input_items.list(third.id, order="asc").data
    texts = [item.content[0].text for item in items]
    assert texts == [said[0]["content"], first.output_text, "more", second.output_text, "again"]
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant", "user"]
    newest_first = list(client.responses.input_items.list(third.id, limit=2))  # the client asks for page after page
    assert [item.id for item in newest_first] == [item.id for item in reversed(items)]

    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(input="x", previous_response_id=first.id, **more)
    assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="was deleted"):
        client.responses.create(input="x", previous_response_id=third.id, **more)


def test_what_is_not_to_be_kept_is_not(keep: Make, chain: Make) -> None:
    server = keep(m=chain("ab"))
    client = server.openai(ALICE)
    found = client.responses.create(model="m", input="hi", store=False)
    assert found.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="m", input="more", previous_response_id=found.id)


def test_another_persons_response_is_not_there(keep: Make, chain: Make) -> None:
    server = keep(m=chain("ab"))
    id = ask(server, {"model": "m", "input": "a secret"}).json["id"]
    for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        hers, nobodys = (ask(server, {}, f"/{one}{path}", method, BOB) for one in (id, "resp_x"))
        assert hers.status == nobodys.status == 404 and hers.text.replace(id, "resp_x") == nobodys.text
    answer = ask(server, {"model": "m", "input": "x", "previous_response_id": id}, key=BOB)
    assert answer.status == 400 and answer.json["error"]["code"] == "previous_response_not_found"
    assert ask(server, method="GET", path=f"/{id}").status == 200  # and hers it is, still


def test_with_an_account_its_responses_go(keep: Make, chain: Make, endless: Any) -> None:
    server = keep(m=chain("ab"), endless=endless)
    id = ask(server, {"model": "m", "input": "xylophones"}).json["id"]
    his = ask(server, {"model": "m", "input": "x"}, key=BOB).json["id"]
    running = ask(server, {"model": "endless", "input": "x", "background": True}).json["id"]
    told = server.ask("GET", "/api/account/export", None, bearer()).json["responses"]
    assert [one["input"][0]["content"][0]["text"] for one in told if one["id"] == id] == ["xylophones"]
    assert his not in [one["id"] for one in told]
    server.ask("DELETE", "/api/account", None, bearer())
    assert server.idle() and not [*server.store.responses.every("alice")]
    assert {ask(server, method="GET", path=f"/{one}").status for one in (id, running)} == {404}
    assert ask(server, method="GET", path=f"/{his}", key=BOB).status == 200


def test_a_stream_that_is_left_is_given_up_and_not_kept(keep: Make, endless: Any) -> None:
    server = keep(m=endless)
    before = [one["id"] for one in server.store.responses.every("alice")]
    stream = server.openai(ALICE).responses.create(model="m", input="hi", stream=True)
    while next(stream).type != "response.output_text.delta":
        pass
    stream.close()
    assert server.idle() and [one["id"] for one in server.store.responses.every("alice")] == before


def test_what_fails_says_so_whole_streamed_and_in_the_background(keep: Make, endless: Any) -> None:
    server = keep(m=endless)
    client = server.openai(ALICE)
    stream = client.responses.create(model="m", input="hi", stream=True)
    while next(stream).type != "response.output_text.delta":
        pass
    begun = client.responses.create(model="m", input="hi", background=True)
    endless.error = RuntimeError("a secret path")
    *_, item, last = stream
    assert item.item.status == "incomplete" and last.type == "response.failed"
    assert last.response.error.code == "server_error" and last.response.output == [item.item]
    assert client.responses.retrieve(last.response.id).status == "failed"
    found = wait_for(client, begun.id)
    assert found.status == "failed" and "secret" not in found.error.message
    answer = ask(server, {"model": "m", "input": "hi"})
    assert answer.status == 500 and "secret" not in answer.text
    endless.error = None
    assert client.responses.create(model="m", input="hi", max_output_tokens=2).output_text == "ab"


# -- in the background -------------------------------------------------------------------------------------------------


def wait_for(client: openai.OpenAI, id: str, within_s: float = 10.0) -> Any:
    end = time.monotonic() + within_s
    while (found := client.responses.retrieve(id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


def test_a_response_in_the_background_is_asked_for_until_it_is_there(keep: Make, chain: Make) -> None:
    model = chain(TEXT)
    model.pause_s = 0.005
    client = keep(m=model).openai(ALICE)
    begun = client.responses.create(model="m", input="hi", background=True)
    assert begun.status == "in_progress" and begun.output == [] and begun.background is True
    with pytest.raises(openai.BadRequestError, match="not finished"):
        client.responses.create(model="m", input="x", previous_response_id=begun.id)
    found = wait_for(client, begun.id)
    assert (found.status, found.output_text) == ("completed", TEXT)
    assert client.responses.cancel(begun.id).to_dict() == found.to_dict()  # it has ended: nothing is to be cancelled
    more = client.responses.create(model="m", input="x", previous_response_id=begun.id)
    assert more.status == "completed"


def test_a_response_in_the_background_can_be_cancelled_and_deleted(keep: Make, endless: Any) -> None:
    server = keep(m=endless)
    client = server.openai(ALICE)
    first, second = (client.responses.create(model="m", input="hi", background=True).id for _ in range(2))
    assert client.responses.cancel(first).status == client.responses.cancel(first).status == "cancelled"
    assert client.responses.retrieve(first).status == "cancelled"
    client.responses.delete(second)
    assert server.idle() and not server.desk.running
    whole = client.responses.create(model="m", input="hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(whole.id)


def test_a_response_whose_writer_is_gone_reads_as_failed(store: Store) -> None:
    body = {"id": "resp_1", "status": "in_progress", "previous_response_id": None, "output": []}
    store.responses.keep("alice", body, [])
    assert store.responses.get("alice", "resp_1")["status"] == "in_progress"
    late = time.time() - kept.LEASE_S - 1
    with store.database.writing() as connection:
        connection.execute(update(RESPONSES).values(updated=late))
    found = store.responses.get("alice", "resp_1")
    assert (found["status"], found["error"]) == ("failed", kept.LOST)
    store.responses.live(["resp_1"])
    assert store.responses.get("alice", "resp_1")["status"] == "in_progress"
    assert store.responses.finish("alice", {**body, "status": "completed"})
    assert not store.responses.finish("alice", {**body, "status": "cancelled"})  # what has ended stays as it is


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_walked_for_its_owner_and_says_where_it_is_broken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = store.responses
    for number in range(5):
        previous = f"r{number - 1}" if number else None
        body = {"id": f"r{number}", "status": "completed", "previous_response_id": previous}
        responses.keep("alice", {**body, "output": [{"id": f"out{number}"}]}, [{"id": f"in{number}"}])
    found = [item["id"] for item in responses.history("alice", "r2")]
    assert found == ["in0", "out0", "in1", "out1", "in2", "out2"]
    assert [item["id"] for item in responses.history("alice", "r2", with_output=False)] == found[:-1]
    with pytest.raises(NotFound):
        responses.history("bob", "r2")
    monkeypatch.setattr(kept, "MAX_TURNS", 3)
    with pytest.raises(StoreError, match="more than 3"):
        responses.history("alice", "r4")
    responses.delete("alice", "r1")
    with pytest.raises(StoreError, match="'r1'.*was deleted"):
        responses.history("alice", "r3")
    with store.database.writing() as connection:
        old = time.time() - kept.KEEP_S - 1
        connection.execute(update(RESPONSES).where(RESPONSES.c.id == "r4").values(created=old))
    assert responses.sweep() == 1 and [one["id"] for one in responses.every("alice")] == ["r0", "r2", "r3"]
    store.forget("alice")
    assert [*responses.every("alice")] == []


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_items_of_one_turn_are_one_message() -> None:
    call = {"type": "function_call", "name": "look", "arguments": "{}"}
    wish = ResponseRequest.model_validate(
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]},
                {"type": "message", "role": "assistant", "content": "wait", "id": "msg_1"},
                {**call, "call_id": "1"},
                {**call, "call_id": "2", "id": "msg_1"},
                {"type": "function_call_output", "call_id": "2", "output": "two"},
                {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "one"}]},
                {**call, "call_id": "3"},
                {"type": "function_call_output", "call_id": "3", "output": "three"},
                {"role": "developer", "content": "now"},
            ],
        }
    )
    items = as_items(wish)
    assert items[1]["id"] == "msg_1" and len({item["id"] for item in items}) == len(items)
    assert as_items(wish, items)[1]["id"] != "msg_1"  # another of the conversation has it
    found = as_messages("Be brief.", items)
    assert [(one.role, one.text, [call.id for call in one.tool_calls or ()]) for one in found] == [
        ("system", "Be brief.", []), ("user", "hi", []), ("assistant", "wait", ["1", "2"]), ("tool", "two", []),
        ("tool", "one", []), ("assistant", "", ["3"]), ("tool", "three", []), ("developer", "now", []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": None}, "input", None),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "unknown_parameter"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing_required_parameter"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.reasoning", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.item_reference", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content.input_image", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.web_search", "unsupported_parameter"),
        ({"tools": [LOOK, LOOK]}, "tools", None),
        ({"tools": [{**LOOK, "strict": True}]}, "strict", "unsupported_parameter"),
        ({"tools": [LOOK], "tool_choice": {"type": "mcp"}}, "tool_choice.mcp", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": [LOOK], "text": {"format": {"type": "json_object"}}}, "text.format", "unsupported_parameter"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
        ({"text": {"format": {**DATE, "type": "json_schema", "name": "x"}}}, "text.format", "invalid_schema"),
        ({"text": {"verbosity": "low"}}, "verbosity", "unsupported_parameter"),
        ({"include": ["nonsense"]}, "include[0]", "invalid_value"),
        ({"tools": [LOOK], "top_logprobs": 1}, "include", "unsupported_parameter"),
        ({"background": True, "store": False}, "background", None),
        ({"background": True, "stream": True}, "background", "unsupported_parameter"),
        ({"stream_options": {}}, "stream_options", None),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"max_tool_calls": 3}, "max_tool_calls", "unsupported_parameter"),
        ({"prompt": {"id": "x"}}, "prompt", "unsupported_parameter"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"max_tokens": 3}, "max_tokens", "unknown_parameter"),
        ({"input": "x" * 100_000}, "input", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_named(keep: Make, chain: Make, change: dict, param: str, code: str | None) -> None:
    answer = ask(keep(m=chain("ab")), {"model": "m", "input": "hi", **change})
    assert answer.status == 400, answer.text
    error = answer.json["error"]
    assert error["param"] == param and code in (None, error["code"]), error


def test_what_asks_for_nothing_is_no_error(keep: Make, chain: Make) -> None:
    harmless = {
        "background": False, "include": ["reasoning.encrypted_content"], "truncation": "disabled", "service_tier": "auto",
        "reasoning": {"effort": None}, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": [],
        "parallel_tool_calls": True, "user": "u", "max_tool_calls": None, "tool_choice": "auto", "stream": False,
    }  # fmt: skip
    answer = ask(keep(m=chain("ab")), {"model": "m", "input": "hi", **harmless})
    assert answer.status == 200, answer.text


def test_the_specifications_fields_are_all_known() -> None:
    """Every field of both requests of the official client, of the version that is pinned."""
    from openai.types.responses import input_token_count_params

    for params, kind in (
        (response_create_params.ResponseCreateParamsBase, ResponseRequest),
        (input_token_count_params.InputTokenCountParams, CountRequest),
    ):
        names = set(typing.get_type_hints(params))
        assert len(names) > 8 and not names - set(kind.model_fields) - set(kind.NOT_FOLLOWED)


def test_queries_that_mean_nothing_here_are_refused(keep: Make, chain: Make) -> None:
    server = keep(m=chain("ab"))
    id = ask(server, {"model": "m", "input": "hi"}).json["id"]
    for path, param in (
        (f"/{id}?stream=true", "stream"), (f"/{id}?starting_after=3", "starting_after"), (f"/{id}?x=1", "x"),
        (f"/{id}?include[]=reasoning.encrypted_content", "include"), (f"/{id}/input_items?limit=0", "limit"),
        (f"/{id}/input_items?limit=1e9", "limit"), (f"/{id}/input_items?order=up", "order"),
        (f"/{id}/input_items?after=x", "after"), (f"/{id}/input_items?include[]=x", "include[]"),
    ):  # fmt: skip
        answer = ask(server, method="GET", path=path)
        assert (answer.status, answer.json["error"]["param"]) == (400, param), answer.text
    assert ask(server, method="GET", path=f"/{id}?include[]=message.output_text.logprobs").status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "role", "x"]), inner),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(sorted(ResponseRequest.model_fields)), JSON, max_size=4)


def test_no_body_breaks_the_route(keep: Make, chain: Make) -> None:
    server = keep(m=chain("ab"))

    @settings(max_examples=15, deadline=None)
    @given(BODIES, st.sampled_from(["", "/input_tokens"]))
    def send(body: dict, path: str) -> None:
        answer = ask(server, {"model": "m", "input": "hi", **body}, path)
        assert answer.status in (200, 400, 404), answer.text

    send()
    assert server.idle()
