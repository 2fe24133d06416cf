"""Batches as the official client sees them: answers by custom_id, behind everybody, through restarts, each line once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.errors import NotFound, StoreError
from lyceum.serve.batch import kept, routes, work
from lyceum.serve.batch.kept import Result
from lyceum.serve.batch.tables import BATCHES
from lyceum.serve.models import Pooling
from lyceum.serve.store import Store

ALICE, BOB = "a" * 40, "b" * 40
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
OVER = ("completed", "failed", "expired", "cancelled")
Make = Callable[..., Any]


def row(id: Any, body: Any = None, url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": str(id), "method": "POST", "url": url, "body": body or BODY}


def upload(client: openai.OpenAI, rows: list[Any], purpose: Any = "batch") -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return client.files.create(file=("lines.jsonl", text.encode()), purpose=purpose).id


def begin(client: openai.OpenAI, rows: list[Any], endpoint: Any = CHAT, **more: Any) -> Any:
    return client.batches.create(input_file_id=upload(client, rows), endpoint=endpoint, completion_window="24h", **more)


def wait(client: openai.OpenAI, id: str, within_s: float = 20.0) -> Any:
    end = time.monotonic() + within_s
    while (found := client.batches.retrieve(id)).status not in OVER:
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def read(client: openai.OpenAI, file: str | None) -> list[Any]:
    return [] if file is None else [json.loads(line) for line in client.files.content(file).text.splitlines()]


@pytest.fixture
def endless(chain: Make) -> Any:
    """A model that goes on for ever, a millisecond a step."""
    model = chain("ab", context_length=100_000)
    a, b = (model.tokenizer.token_bytes.index(letter) for letter in (b"a", b"b"))
    model.says([a], b)
    model.pause_s = 0.001
    return model


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is not heard of for a fifth of a second is gone."""
    for module in (kept, work):
        monkeypatch.setattr(module, "LEASE_S", 0.2)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_lines_are_answered_by_their_ids_as_their_route_answers(keep: Make, decoder: Any) -> None:
    client = keep(m=decoder).openai(ALICE)
    bodies = [{**BODY, "seed": seed, "max_tokens": 5} for seed in range(12)]
    begun = begin(client, [row(f"line {n}", body) for n, body in enumerate(bodies)], metadata={"for": "a test"})
    assert begun.status == "validating" and begun.output_file_id is None and begun.metadata == {"for": "a test"}
    found = wait(client, begun.id)
    assert found.status == "completed" and found.error_file_id is None and found.errors is None
    assert (found.request_counts.total, found.request_counts.completed, found.request_counts.failed) == (12, 12, 0)
    assert found.created_at <= found.in_progress_at <= found.finalizing_at <= found.completed_at < found.expires_at
    told = read(client, found.output_file_id)
    assert [one["custom_id"] for one in told] == [f"line {n}" for n in range(12)]  # in the order of the file
    for one, body in zip(told, bodies, strict=True):
        alone = client.chat.completions.create(**body).choices[0].message.content
        assert one["response"]["body"]["choices"][0]["message"]["content"] == alone
        assert one["response"]["status_code"] == 200 and one["error"] is None
    used = [one["response"]["body"]["usage"] for one in told]
    assert found.usage.output_tokens == sum(one["completion_tokens"] for one in used)
    assert found.usage.total_tokens == sum(one["total_tokens"] for one in used)
    about = client.files.retrieve(found.output_file_id)
    assert about.purpose == "batch_output" and about.filename == f"{begun.id}_output.jsonl"
    assert [one.id for one in client.batches.list(limit=1).data] == [begun.id]


@pytest.mark.parametrize(
    ("url", "body", "answer"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 3}, lambda body: body["choices"][0]["text"]),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}, lambda body: body["output"][0]["content"]),
        ("/v1/embeddings", {"input": ["a", "b"]}, lambda body: [len(one["embedding"]) for one in body["data"]]),
    ],
)
def test_every_endpoint_that_is_followed_is(keep: Make, decoder: Any, url: str, body: Any, answer: Any) -> None:
    server = keep(m=decoder, pooling=Pooling("mean", True))
    client = server.openai(ALICE)
    body = {"model": "m", **body} | ({} if "embed" in url else {"seed": 5, "temperature": 0})
    found = wait(client, begin(client, [row(1, {**body}, url)], url).id)
    (one,) = read(client, found.output_file_id)
    alone = server.ask("POST", url, body, {"authorization": f"Bearer {ALICE}"}).json
    assert (
        answer(one["response"]["body"]) == answer(alone) and found.usage.total_tokens == alone["usage"]["total_tokens"]
    )


def test_what_a_route_would_refuse_is_in_the_file_of_errors(keep: Make, chain: Make) -> None:
    client = keep(m=chain("ab")).openai(ALICE)
    rows = [
        row("good"), row("stream", {**BODY, "stream": True}), row("model", {**BODY, "model": "n"}),
        row("hot", {**BODY, "temperature": 3}), row("also good"), row("empty", {"x": 1}),
    ]  # fmt: skip
    found = wait(client, begin(client, rows).id)
    assert found.status == "completed"
    assert (found.request_counts.completed, found.request_counts.failed) == (2, 4)
    assert [one["custom_id"] for one in read(client, found.output_file_id)] == ["good", "also good"]
    told = {one["custom_id"]: one["response"] for one in read(client, found.error_file_id)}
    assert {id: response["status_code"] for id, response in told.items()} == {
        "stream": 400, "model": 404, "hot": 400, "empty": 400,
    }  # fmt: skip
    assert told["hot"]["body"]["error"]["param"] == "temperature"


def test_lines_go_behind_everybody_and_only_a_few_at_once(
    keep: Make, chain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain("ab")
    model.pause_s = 0.002
    server = keep(m=model, max_batch=16)
    engine, seen = server.service.models["m"].engine, []
    add = engine.add

    def spy(*args: Any, **given: Any) -> int:
        seen.append((given["is_background"], given["key"], len(server.service.models["m"].seat.live)))
        return add(*args, **given)

    monkeypatch.setattr(engine, "add", spy)
    client = server.openai(ALICE)
    tiers = [{**BODY, "service_tier": tier} for tier in ("default", "priority", "auto", "flex")] * 8
    found = wait(client, begin(client, [row(n, body) for n, body in enumerate(tiers)]).id)
    assert found.request_counts.completed == 32
    assert {(is_background, key) for is_background, key, _ in seen} == {(True, "alice")}
    assert 1 < max(live for _, _, live in seen) + 1 <= work.AT_ONCE


def test_a_request_that_finds_no_room_is_asked_again(keep: Make, chain: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client, answered, asked = keep(m=chain("ab")).openai(ALICE), work.answered, []

    async def busy(*args: Any) -> Any:
        asked.append(args)
        return (429, {"error": {}}, 0.01) if len(asked) <= 3 else await answered(*args)

    monkeypatch.setattr(work, "answered", busy)
    found = wait(client, begin(client, [row(1)]).id)
    assert found.request_counts.completed == 1 and len(asked) == 4


# -- its end -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_cancelled_keeps_what_is_done(keep: Make, chain: Make, endless: Any) -> None:
    server = keep(m=chain("ab"), endless=endless)
    client = server.openai(ALICE)
    forever = {**BODY, "model": "endless"}
    begun = begin(client, [row("done")] + [row(n, forever) for n in range(20)])
    while client.batches.retrieve(begun.id).request_counts.completed < 1:
        time.sleep(0.005)
    assert client.batches.cancel(begun.id).status in ("cancelling", "cancelled")
    found = wait(client, begun.id)
    assert found.status == "cancelled" and found.cancelling_at <= found.cancelled_at
    assert [one["custom_id"] for one in read(client, found.output_file_id)] == ["done"]
    assert server.idle() and not server.work.running
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(begun.id)


def test_what_is_left_when_the_time_is_over_says_so(
    keep: Make, chain: Make, endless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "WINDOW_S", 3)
    server = keep(m=chain("ab"), endless=endless)
    client = server.openai(ALICE)
    rows = [row("done")] + [row(n, {**BODY, "model": "endless"}) for n in range(10)]
    found = wait(client, begin(client, rows).id)
    assert found.status == "expired" and found.expired_at >= found.expires_at
    assert (found.request_counts.completed, found.request_counts.failed) == (1, 10)
    told = read(client, found.error_file_id)
    assert [one["custom_id"] for one in told] == [str(n) for n in range(10)] and server.idle()
    assert all(one["error"]["code"] == "batch_expired" and one["response"] is None for one in told)


def test_another_persons_batch_is_not_there_nor_is_her_file(keep: Make, chain: Make) -> None:
    client, bob = (keep(m=chain("ab")).openai(key) for key in (ALICE, BOB))
    begun = begin(client, [row(1)])
    found = wait(client, begun.id)
    for ask in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(begun.id)
    assert begun.id not in [one.id for one in bob.batches.list()]
    with pytest.raises(openai.NotFoundError):
        bob.files.content(found.output_file_id)
    with pytest.raises(openai.BadRequestError) as refused:
        bob.batches.create(input_file_id=found.input_file_id, endpoint=CHAT, completion_window="24h")
    assert refused.value.code == "file_not_found"


def test_with_an_account_its_batches_go(keep: Make, endless: Any) -> None:
    server = keep(endless=endless)
    client = server.openai(ALICE)
    begun = begin(client, [row(n, {**BODY, "model": "endless"}) for n in range(3)])
    while not server.service.quota.running:
        time.sleep(0.005)
    assert server.ask("DELETE", "/api/account", None, {"authorization": f"Bearer {ALICE}"}).status == 200
    assert server.idle() and server.store.batches.listed("alice", limit=10) == ([], False)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(begun.id)


def test_what_is_no_batch_is_refused(keep: Make, chain: Make) -> None:
    client = keep(m=chain("ab")).openai(ALICE)
    good = upload(client, [row(1)])
    other = upload(client, [{"x": 1}], "user_data")
    ask: dict[str, Any] = {"input_file_id": good, "endpoint": CHAT, "completion_window": "24h"}
    for change, param, code in (
        ({"input_file_id": "file-x"}, "input_file_id", "file_not_found"),
        ({"input_file_id": other}, "input_file_id", "invalid_purpose"),
        ({"endpoint": "/v1/moderations"}, "endpoint", "unsupported_parameter"),
        ({"endpoint": "/v1/nothing"}, "endpoint", "invalid_value"),
        ({"completion_window": "1h"}, "completion_window", "invalid_value"),
        ({"metadata": {"k": "v" * 600}}, "metadata.k", "invalid_value"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**{**ask, **change})
        assert (refused.value.param, refused.value.code) == (param, code)
    found = wait(client, begin(client, [row(1), row(2)], "/v1/completions").id)
    assert found.status == "failed" and found.failed_at and found.output_file_id is None
    assert (found.errors.data[0].code, found.errors.data[0].line) == ("mismatched_url", 1)


@pytest.mark.slow
def test_a_file_that_could_not_be_written_is_written_once_later(
    keep: Make, chain: Make, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    server = keep(m=chain("ab"))
    client, add, failed = server.openai(ALICE), server.files.add, []

    def fails_first(owner: str, draft: Any, **more: Any) -> Any:
        if more["purpose"] == "batch_output" and not failed:
            failed.append(draft)
            raise RuntimeError("killed here")
        return add(owner, draft, **more)

    monkeypatch.setattr(server.files, "add", fails_first)
    found = wait(client, begin(client, [row(n) for n in range(3)]).id, within_s=60)
    assert failed and found.status == "completed" and found.request_counts.completed == 3
    names = [file.filename for file in client.files.list(purpose="batch_output")]
    assert names.count(f"{found.id}_output.jsonl") == 1 and len(read(client, found.output_file_id)) == 3


@pytest.mark.slow
def test_a_batch_whose_file_was_deleted_ends_and_keeps_what_is_done(
    keep: Make, chain: Make, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    server = keep(m=chain("ab"))
    client, answered = server.openai(ALICE), work.answered

    async def breaks_at_the_second(*args: Any) -> Any:
        if args[-1].get("user") == "second":
            raise RuntimeError("killed here")
        return await answered(*args)

    monkeypatch.setattr(work, "answered", breaks_at_the_second)
    monkeypatch.setattr(work, "AT_ONCE", 1)
    begun = begin(client, [row("first"), row("second", {**BODY, "user": "second"})])
    while client.batches.retrieve(begun.id).request_counts.completed < 1 or begun.id in server.work.running:
        time.sleep(0.005)
    client.files.delete(begun.input_file_id)
    found = wait(client, begun.id)
    assert found.status == "failed" and found.errors.data[0].code == "file_not_found"
    assert [one["custom_id"] for one in read(client, found.output_file_id)] == ["first"]


@pytest.mark.slow
def test_no_body_breaks_the_route(keep: Make, chain: Make) -> None:
    server = keep(m=chain("ab"))
    good = upload(server.openai(ALICE), [row(1)])
    right = {"input_file_id": good, "endpoint": CHAT, "completion_window": "24h"}
    values = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.dictionaries(st.text(), st.text())

    @settings(max_examples=40, deadline=None)
    @given(st.dictionaries(st.sampled_from(sorted(routes.BatchRequest.model_fields)), values, max_size=3))
    def send(body: dict[str, Any]) -> None:
        answer = server.ask("POST", "/v1/batches", {**right, **body}, {"authorization": f"Bearer {ALICE}"})
        assert answer.status in (200, 400, 404, 409), answer.text

    send()
    assert server.idle()


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_one_writer_and_a_line_one_result(store: Store) -> None:
    batches = store.batches

    def lease_passes() -> None:
        with store.database.writing() as connection:
            connection.execute(update(BATCHES).values(updated=time.time() - kept.LEASE_S - 1))

    counts = {"total": 3, "completed": 0, "failed": 0}
    body = {
        "id": "b1",
        "status": "in_progress",
        "request_counts": counts,
        "output_file_id": None,
        "error_file_id": None,
    }
    batches.add("alice", body, "one", most=1)
    with pytest.raises(StoreError, match="of 1"):
        batches.add("alice", {**body, "id": "b2"}, "one", most=1)
    batches.record("b1", [Result(1, {"n": 1}, False), Result(3, {"n": 3}, True)])
    batches.record("b1", [Result(1, {"n": "again"}, False), Result(2, {"n": 2}, False)])
    batches.record("b9", [Result(1, {}, False)])  # it was deleted: nothing
    assert batches.done("b1") == {1, 2, 3} and batches.done("b9") == set()
    assert [*batches.results("b1", has_failed=False)] == [{"n": 1}, {"n": 2}]
    assert batches.get("alice", "b1")["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert batches.claim("two") == [] and batches.alive("one", ["b1"]) == {"b1": "in_progress"}
    lease_passes()
    assert [(owner, found["id"]) for owner, found in batches.claim("two")] == [("alice", "b1")]
    assert (
        batches.change("b1", "one", status="finalizing") is None and batches.end("b1", "one", status="failed") is None
    )
    assert batches.alive("one", ["b1"]) == {} and batches.mine("b1", "one") is None
    changed = batches.change("b1", "two", status="finalizing", output_file_id="f")
    assert changed is not None and batches.get("alice", "b1")["output_file_id"] is None  # not before it is there
    assert batches.change("b1", "two", only_from=("in_progress",), status="x") is None
    with pytest.raises(StoreError, match="cannot be cancelled"):
        batches.cancel("alice", "b1")
    for owner, id in (("bob", "b1"), ("alice", "b9")):
        with pytest.raises(NotFound):
            batches.get(owner, id)
    batches.release("two")
    assert len(batches.claim("three")) == 1  # at once
    assert batches.end("b1", "three", status="completed", request_counts=counts) is not None
    assert batches.get("alice", "b1")["output_file_id"] == "f" and batches.done("b1") == set()
    lease_passes()
    assert batches.claim("four") == []
    for number in range(4):
        batches.add("alice", {**body, "id": f"c{number}"}, "one", most=9)
    page, has_more = batches.listed("alice", limit=2)
    assert [one["id"] for one in page] == ["c3", "c2"] and has_more
    page, has_more = batches.listed("alice", limit=9, after="c2")
    assert [one["id"] for one in page] == ["c1", "c0", "b1"] and not has_more
    store.forget("alice")
    assert batches.listed("alice", limit=9) == ([], False)


# -- killed servers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_servers_that_are_killed_lose_no_line_and_answer_none_twice(tmp_path: Path) -> None:
    """Kill -9 at random moments, five times; a control in the same run: the batch was under way when each was killed."""
    draw, num_lines = random.Random(7), 240
    command = [sys.executable, str(Path(__file__).with_name("batched.py")), str(tmp_path), "0.3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdin is not None and parent.stdout is not None
    done: list[int] = []

    def next_server() -> tuple[int, openai.OpenAI]:
        parent.stdin.write("\n")  # type: ignore[union-attr]
        parent.stdin.flush()  # type: ignore[union-attr]
        pid, port = json.loads(parent.stdout.readline())  # type: ignore[union-attr]
        return pid, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=60)

    try:
        pid, client = next_server()
        rows = [
            row(n, {"model": "demo", "messages": [{"role": "user", "content": f"number {n}, and so on"}]})
            for n in range(num_lines)
        ]
        begun = begin(client, rows)
        for _ in range(5):
            time.sleep(draw.uniform(0.3, 0.8))
            status = client.batches.retrieve(begun.id)
            done.append(status.request_counts.completed)
            os.kill(pid, signal.SIGKILL)
            client.close()
            pid, client = next_server()
        found = wait(client, begun.id, within_s=90)
        told = read(client, found.output_file_id)
        names = [file.filename for file in client.files.list(purpose="batch_output")]
        client.close()
        os.kill(pid, signal.SIGKILL)
    finally:
        parent.stdin.close()
        parent.wait(20)
        parent.stdout.close()
    assert found.status == "completed" and found.request_counts.completed == num_lines
    assert [one["custom_id"] for one in told] == [str(n) for n in range(num_lines)]
    said = [one["response"]["body"]["choices"][0]["message"]["content"] for one in told]
    assert said == [f"you said number {n}, and so on" for n in range(num_lines)]
    assert names == [f"{begun.id}_output.jsonl"]
    assert (
        done == sorted(done) and len({num for num in done if 0 < num < num_lines}) > 1
    )  # the control: it was under way
