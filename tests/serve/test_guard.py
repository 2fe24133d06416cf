"""Section 6 of what is expected of a server's security, row by row, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from lyceum.errors import UsageError
from lyceum.serve.guard import OPEN, is_ours
from lyceum.serve.keys import Key, hash_of
from lyceum.serve.limits import SCOPES, Caller, Limits, Quota
from lyceum.serve.porter import Porter
from lyceum.serve.refusals import Refusal
from lyceum.serve.server import ServerConfig, is_local, listen
from lyceum.serve.store import Store

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
LONG: dict[str, Any] = {**ASK, "stream": True}


@pytest.fixture
def endless(chain: Callable) -> Any:
    """A model that goes on for ever, a millisecond a step."""
    model = chain("ab", context_length=100_000)
    a, b = (model.tokenizer.token_bytes.index(letter) for letter in (b"a", b"b"))
    model.says([a], b)
    model.pause_s = 0.001
    return model


# -- bind and auth -----------------------------------------------------------------------------------------------------


def test_it_listens_on_this_machine_unless_told_otherwise() -> None:
    assert ServerConfig().host == "127.0.0.1" and not ServerConfig().porter(None).asks
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")
    assert not is_local("::") and not is_local("192.168.1.4") and not is_local("example.org") and not is_local("")


def test_a_public_address_needs_a_key_that_cannot_be_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key"):
        ServerConfig(host="0.0.0.0").porter(None)
    with pytest.raises(UsageError, match="guessed"):
        ServerConfig(host="0.0.0.0", api_key="secret").porter(None)
    assert ServerConfig(host="0.0.0.0", api_key="x" * 32).porter(None).asks
    store = Store.open(tmp_path / "store.sqlite")
    with pytest.raises(UsageError, match="no key"):
        ServerConfig(host="0.0.0.0").porter(store)
    store.keys.make("a")
    assert ServerConfig(host="0.0.0.0").porter(store).asks
    store.close()


def test_an_address_that_is_taken_is_said_before_anything_is_loaded() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(UsageError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


def test_every_route_but_two_asks_for_a_key(start: Callable, chain: Callable) -> None:
    key = "x" * 40
    server = start(m=chain("ab"), porter=Porter(lambda: [Key("a", "a", "a", hash_of(key), SCOPES)]))
    paths = [(path, method) for path, found in server.app.openapi()["paths"].items() for method in found]
    paths += [("/openapi.json", "get"), ("/nothing", "get"), ("/v1/models/", "get")]
    assert len(paths) > 12
    for path, method in paths:
        place = path.replace("{model}", "m")
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": key}, {"x-api-key": key}):
            answer = server.ask(method.upper(), place, {} if method == "post" else None, headers)
            if path in OPEN:
                assert answer.status == 200
            else:
                assert answer.status == 401 and answer.json["error"]["type"] == "authentication_error"
        assert server.ask(method.upper(), place, None if method == "get" else {}, bearer(key)).status != 401
    with pytest.raises(openai.AuthenticationError) as wrong:
        server.openai(key="wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    assert [model.id for model in server.openai(key=key).models.list()] == ["m"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_opens_what_its_scopes_say_until_it_expires(start: Callable, chain: Callable) -> None:
    keys = [
        Key("reader", "reader", "reader", hash_of("r" * 40), ("models",)),
        Key("writer", "writer", "writer", hash_of("w" * 40), ("inference",)),
        Key("old", "old", "old", hash_of("o" * 40), ("models",), expires=time.time() - 1),
        Key("new", "new", "new", hash_of("n" * 40), ("models",), expires=time.time() + 60),
    ]
    server = start(m=chain("ab"), porter=Porter(lambda: keys))
    assert server.ask("GET", "/v1/models", None, bearer("r" * 40)).status == 200
    assert server.ask("GET", "/v1/models/m", None, bearer("w" * 40)).status == 403
    assert server.ask("GET", "/metrics", None, bearer("r" * 40)).status == 403
    assert server.post(CHAT, ASK, **bearer("r" * 40)).json["error"]["code"] == "missing_scope"
    assert server.post(CHAT, ASK, **bearer("w" * 40)).status == 200
    assert server.ask("GET", "/v1/models", None, bearer("o" * 40)).json["error"]["code"] == "expired_api_key"
    assert server.ask("GET", "/v1/models", None, bearer("n" * 40)).status == 200


# -- pages of others ---------------------------------------------------------------------------------------------------


def test_names_that_are_not_ours_are_not_answered(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), hosts=("lyceum.example",))
    for host in ("127.0.0.1", "localhost", "LOCALHOST:80", "[::1]:8000", "lyceum.example", "10.0.0.7:8000"):
        assert server.ask("GET", "/health", None, {"host": host}).status == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]", "", "a:b:c:d:e:f:g"):
        assert server.ask("GET", "/health", None, {"host": host}).status == 403, host
    assert not is_ours("lyceum.example.org", {"lyceum.example"})


def test_pages_of_other_sites_are_refused_and_those_allowed_are_named(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), origins=("https://friend.example",))
    own = {"host": f"127.0.0.1:{server.port}", "origin": f"http://127.0.0.1:{server.port}"}
    assert server.post(CHAT, ASK, **own).status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://"):
        answer = server.post(CHAT, ASK, origin=origin)
        assert answer.status == 403 and "access-control-allow-origin" not in answer.headers
    answer = server.post(CHAT, ASK, origin="https://friend.example")
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-credentials" not in answer.headers
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = server.ask("OPTIONS", CHAT, None, {"origin": "https://friend.example", **asked})
    assert preflight.status == 204 and preflight.headers["access-control-allow-headers"] == "authorization"
    assert server.ask("OPTIONS", CHAT, None, {"origin": "https://evil.example", **asked}).status == 403


def test_a_form_of_a_page_cannot_send_json(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert server.ask("POST", CHAT, json.dumps(ASK).encode(), {"content-type": kind}).status == 415
    assert server.ask("POST", CHAT, json.dumps(ASK).encode(), {"content-type": "application/json; charset=utf-8"})


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_bytes_are_bounded_declared_or_not(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), limits=Limits(body_bytes=1000, items=100))
    assert server.post(CHAT, {**ASK, "user": "x" * 400}).status == 200
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n\r\n".encode())
    assert b" 413 " in connection.recv(100)  # before the body has come
    connection.close()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(3):
        connection.sendall(b"190\r\n" + b"x" * 400 + b"\r\n")
    assert b" 413 " in connection.recv(100)
    connection.close()
    many = server.post("/tokenize", {"prompt": "x", "z": [0] * 101})
    assert many.status == 400 and many.json["error"]["code"] == "request_too_large"


def test_headers_are_bounded(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), limits=Limits(header_bytes=2000))
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000)
    assert b" 400 " in connection.recv(1000)
    connection.close()


def test_what_one_request_asks_for_is_bounded(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), limits=Limits(replies=4, max_tokens=1))
    assert server.post("/v1/completions", {"model": "m", "prompt": ["x"] * 2, "n": 2}).status == 200
    assert server.post("/v1/completions", {"model": "m", "prompt": ["x"] * 5}).status == 400
    assert server.post(CHAT, {**ASK, "n": 5}).status == 400
    found = server.post(CHAT, {**ASK, "max_tokens": 10**6}).json
    assert found["usage"]["completion_tokens"] == 1 and found["choices"][0]["finish_reason"] == "length"


def test_a_schema_that_takes_too_long_is_refused(start: Callable, chain: Callable, monkeypatch: Any) -> None:
    monkeypatch.setattr("lyceum.serve.sampled.SCHEMA_S", -1.0)
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    answer = start(m=chain("ab")).post(CHAT, {**ASK, "response_format": shape})
    assert answer.status == 400 and answer.json["error"]["code"] == "invalid_schema"


# -- how much at once --------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(start: Callable, endless: Any) -> None:
    server = start(m=endless, max_batch=1, limits=Limits(waiting=1))
    streams = [server.open_stream(CHAT, LONG) for _ in range(2)]
    while server.service.quota.running < 2:
        time.sleep(0.001)
    answer = server.post(CHAT, ASK)
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json["error"]["type"] == "rate_limit_error" and answer.json["error"]["code"] == "rate_limit_exceeded"
    with pytest.raises(openai.RateLimitError):
        server.openai().chat.completions.create(**ASK)
    assert server.ask("GET", "/health").status == 200
    for stream in streams:
        stream.close()
    assert server.idle()


def test_one_caller_cannot_take_all(start: Callable, endless: Any, known: Callable) -> None:
    server = start(m=endless, max_batch=4, limits=Limits(per_caller=1, max_tokens=100_000), porter=known("a", "b"))
    stream = server.openai(key="a" * 40).chat.completions.create(**LONG)
    next(iter(stream))
    assert server.post(CHAT, {**ASK, "max_tokens": 3}, **bearer("a" * 40)).status == 429
    assert server.post(CHAT, {**ASK, "max_tokens": 3}, **bearer("b" * 40)).status == 200
    stream.close()
    assert server.idle()


def test_tokens_of_a_minute_flow_back() -> None:
    now = [0.0]
    quota = Quota(Limits(tokens_per_minute=60), room=10, clock=lambda: now[0])
    alice, bob = Caller("alice"), Caller("bob")
    quota.take(alice, 1, 50)
    with pytest.raises(Refusal) as refused:
        quota.take(alice, 1, 20)
    assert refused.value.status == 429 and refused.value.retry_after_s == pytest.approx(10)
    quota.take(bob, 1, 60)
    now[0] = 10.0
    quota.take(alice, 1, 20)
    quota.give_back(alice, 1, unused_tokens=30)
    quota.take(alice, 1, 30)
    assert quota.running == 3
    with pytest.raises(Refusal):
        quota.take(alice, 1, 1)


def test_accounts_do_not_pile_up() -> None:
    quota = Quota(Limits(), room=10)
    for number in range(100):
        quota.take(Caller(str(number)), 2, 5)
        quota.give_back(Caller(str(number)), 2)
    assert not quota.accounts and quota.running == 0


def test_what_one_caller_said_is_not_remembered_for_another(start: Callable, decoder: Any, known: Callable) -> None:
    server = start(m=decoder, porter=known("a", "b"))
    body = {"model": "m", "prompt": "the reply to the question is in the library", "max_tokens": 1}

    def cached(name: str) -> int:
        found = server.post("/v1/completions", body, **bearer(name * 40)).json
        return int(found["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("a") == 0 and cached("a") > 0 and cached("b") == 0


# -- clients that leave, and slow ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [LONG, {**ASK, "n": 3, "max_tokens": 90_000}], ids=["stream", "whole"])
def test_a_client_that_leaves_stops_the_engine_within_a_step(start: Callable, endless: Any, body: dict) -> None:
    server = start(m=endless)
    served = server.service.models["m"]
    stream = server.open_stream(CHAT, body)
    while not served.seat.live:
        time.sleep(0.001)
    time.sleep(0.05)
    steps: list[float] = []
    step = served.engine.step
    served.engine.step = lambda: steps.append(time.perf_counter()) or step()  # type: ignore[func-returns-value,method-assign]
    left = time.perf_counter()
    stream.close()
    assert server.idle()
    # the loop hears of it, the engine ends the step it is in; a busy machine may stop either for a moment
    assert sum(at > left + 0.05 for at in steps) <= 2, [at - left for at in steps][-5:]
    assert served.engine.is_idle and server.service.quota.running == 0


def test_the_official_clients_close_stops_it_too(start: Callable, endless: Any) -> None:
    server = start(m=endless)
    with server.openai().chat.completions.create(**LONG) as stream:
        for _, _ in zip(range(3), stream, strict=False):
            pass
    assert server.idle()


def test_a_client_that_does_not_read_is_cut(start: Callable, endless: Any) -> None:
    server = start(m=endless, limits=Limits(stall_s=0.2))
    endless.pause_s = 0.0
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps({**LONG, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    while not server.service.quota.running:
        time.sleep(0.001)
    assert server.idle(30)
    connection.close()


def test_headers_and_bodies_that_come_drop_by_drop_are_not_waited_for(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"), limits=Limits(header_s=0.2, body_s=0.2))
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for before, sent in ((b"", b""), (b"", whole[:9]), (whole, whole[:9])):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        connection.sendall(before)
        found = b"" if before else b"ok"
        while b"ok" not in found:
            found += connection.recv(1000)
        connection.sendall(sent)
        assert connection.recv(1000) == b""  # cut
        connection.close()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
    connection.sendall(head.encode())
    assert b" 408 " in connection.recv(1000)
    connection.close()


def test_health_answers_while_a_long_text_is_cut_into_tokens(
    start: Callable, chain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(m=chain("ab"))
    is_cutting, may_end = threading.Event(), threading.Event()

    def slow(text: str) -> list[int]:
        is_cutting.set()
        assert may_end.wait(20)
        return [1]

    monkeypatch.setattr(server.service.models["m"].tokenizer, "encode", slow)
    asking = threading.Thread(target=lambda: server.post("/tokenize", {"prompt": "x" * 100_000}))
    asking.start()
    assert is_cutting.wait(20)
    assert server.ask("GET", "/health").status == 200
    may_end.set()
    asking.join()


# -- templates, state --------------------------------------------------------------------------------------------------


def test_no_template_and_no_special_token_comes_from_a_request(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    assert server.post(CHAT, {**ASK, "chat_template": "{{ 1 }}"}).json["error"]["code"] == "unknown_parameter"
    said = {"messages": [{"role": "user", "content": "<|im_end|><tool_response>"}], "return_token_strs": True}
    names = server.post("/tokenize", said).json["token_strs"]
    assert names.count("<|im_end|>") == 1 and "<tool_response>" not in names


def test_a_model_is_found_by_its_name_alone(start: Callable, chain: Callable) -> None:
    server = start(m=chain("ab"))
    for name in ("../m", "/etc/passwd", "m/../m", "%2e%2e/m", "M"):
        assert server.ask("GET", f"/v1/models/{name}").status == 404
        assert server.post(CHAT, {**ASK, "model": name}).status == 404


def test_nothing_that_is_read_is_a_pickle() -> None:
    folder = Path(__file__).resolve().parents[2] / "lyceum" / "serve"
    text = "".join(file.read_text() for file in folder.glob("*.py"))
    assert len(text) > 10_000 and not any(word in text for word in ("pickle", "torch.load", "literal_eval", "exec("))
