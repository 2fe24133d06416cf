"""What the server costs a streamed token: HTTP, JSON, text and threads, beside the engine alone.

    python bench/serve.py [--streams 1 8] [--tokens 2000] [--rounds 5]
    python bench/serve.py --short       # seconds: does it run at all?

The model is a null one: it says the same token again whatever it is asked, so that what is left is the engine's own step and
what the server adds; with `--pace` it also sleeps so many milliseconds a step, as a model that computes would let others
work. A server process streams chat completions to a client in another process, which reads the events off a plain socket; in
turn with it the same requests run through the same engine alone. The overhead of a token is

    (time between the first and the last event / steps - time of the engine alone / steps) / streams

in milliseconds, the median of the rounds; the aim is 0.3 for one stream of the null model. (Times between single events would
flatter: several arrive together when the client is late.) Beside it the time to the first token.

What it is not: a measure of the engine (bench/engine.py), nor of clients; the client here parses nothing while it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

AIM_MS = 0.3
CHAT = "/v1/chat/completions"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream")
    parser.add_argument("--pace", type=float, nargs="+", default=[0.0, 2.0], help="milliseconds that the model sleeps")
    parser.add_argument("--rounds", type=int, default=5, help="turns of server and engine; the median counts")
    parser.add_argument("--busy", type=float, default=0.3, help="refuse to measure above this share of others' work")
    parser.add_argument("--short", action="store_true", help="few tokens, one round, on any machine")
    parser.add_argument("--server", type=float, default=-1.0, help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.short:
        options.tokens, options.rounds, options.busy = 200, 1, 2.0
    from lyceum import device

    device.prepare("bench")
    if options.server >= 0:
        run_server(options.tokens, max(options.streams), options.server)
        return 0
    busy = device.busy_share()
    if busy > options.busy:
        print(f"the machine is busy: others use {busy:.0%} of it; measured is on a quiet one", file=sys.stderr)
        return 1
    figures = measure(options)
    report(figures)
    return 0


def null_engine(max_tokens: int, max_batch: int, pace_ms: float) -> tuple[Any, Any]:
    """An engine whose model says one letter for ever, and its tokenizer."""
    import torch
    from torch import Tensor, nn

    from lyceum.engine.engine import Engine
    from lyceum.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["user\nassistant\nsystem\n" * 50], 300)
    row_V = torch.zeros(tokenizer.vocab_size)
    row_V[tokenizer.token_bytes.index(b"a")] = 50.0

    class Null(nn.Module):
        spec = SimpleNamespace(vocab_size=tokenizer.vocab_size, context_length=max_tokens + 64, width=1)

        def forward(self, tokens_BT: Tensor, *, cache: object = None) -> Tensor:
            if pace_ms:
                time.sleep(pace_ms / 1000)
            return torch.zeros(*tokens_BT.shape, 1)

        def logits(self, hidden: Tensor) -> Tensor:
            return row_V.expand(*hidden.shape[:-1], -1)

    return Engine(Null(), max_batch=max_batch, token_bytes=tokenizer.token_bytes), tokenizer


def run_server(max_tokens: int, max_batch: int, pace_ms: float) -> None:
    """Serve the null model on any port, said on the standard output."""
    from lyceum.serve.app import make_app
    from lyceum.serve.models import serve
    from lyceum.serve.server import Server, ServerConfig, listen, uvicorn_config
    from lyceum.serve.service import Service

    engine, tokenizer = null_engine(max_tokens, max_batch, pace_ms)
    service = Service([serve("null", engine, tokenizer, fingerprint="null")])
    config = ServerConfig(port=0)
    listening = listen(config.host, 0)
    port = listening.getsockname()[1]
    Server(uvicorn_config(make_app(service), config), str(port)).run(sockets=[listening])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, at every pace."""
    from lyceum import device

    rows = [row for pace_ms in options.pace for row in at_pace(pace_ms, options)]
    return {"rows": rows, "tokens": options.tokens, "rounds": options.rounds, "machine": device.facts()}


def at_pace(pace_ms: float, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each number of streams."""
    command = [sys.executable, os.path.abspath(__file__), "--server", str(pace_ms), "--tokens", str(options.tokens)]
    server = subprocess.Popen([*command, "--streams", *map(str, options.streams)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        engine, tokenizer = null_engine(options.tokens, max(options.streams), pace_ms)
        prompt = tokenizer.encode("user\nhi\nassistant\n")
        stream(port, 20)  # not counted: the first request imports and warms
        rows = []
        for num_streams in options.streams:
            turns = [
                (over_http(port, num_streams, options.tokens), alone(engine, prompt, num_streams, options.tokens))
                for _ in range(options.rounds)
            ]
            rows.append({"pace_ms": pace_ms, "streams": num_streams, **compared(turns)})
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    return rows


def compared(turns: list[tuple[list[list[float]], list[float]]]) -> dict[str, float]:
    """Of turns (times of the events of each stream, times of the engine's steps), in milliseconds: the median turn's."""

    def each(times: list[float]) -> float:
        return 1000 * (times[-1] - times[0]) / (len(times) - 1)

    found = []
    for streams, steps in turns:
        http_ms = statistics.median(each(times[1:]) for times in streams)
        engine_ms = each(steps)
        found.append(
            {
                "http_ms": http_ms,
                "engine_ms": engine_ms,
                "overhead_ms": (http_ms - engine_ms) / len(streams),
                "first_token_ms": 1000 * statistics.median(times[1] - times[0] for times in streams),
            }
        )
    return {name: round(statistics.median(turn[name] for turn in found), 4) for name in found[0]}


def alone(engine: Any, prompt: list[int], num_streams: int, num_tokens: int) -> list[float]:
    """When each step of the engine ended, without a server."""
    from lyceum.engine.sampling import SamplingParams

    for seed in range(num_streams):
        engine.add(prompt, SamplingParams(num_tokens, temperature=0.0, seed=seed))
    times = []
    while not engine.is_idle:
        engine.step()
        times.append(time.perf_counter())
    return times


def over_http(port: int, num_streams: int, num_tokens: int) -> list[list[float]]:
    """When the request went out and when each event came, of streams side by side."""
    found: list[list[float]] = [[] for _ in range(num_streams)]

    def one(number: int) -> None:
        found[number] = stream(port, num_tokens)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def stream(port: int, num_tokens: int) -> list[float]:
    """One streamed completion: the moment it was asked for, then of each event with text."""
    body = {
        "model": "null", "stream": True, "temperature": 0, "max_tokens": num_tokens,
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = [time.perf_counter()]
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    while True:
        part = connection.recv(65536)
        now = time.perf_counter()
        times += [now] * part.count(b'"content":"a"')
        if b"[DONE]" in part or not part:
            break
    connection.close()
    assert len(times) == num_tokens + 1, f"{len(times) - 1} events of {num_tokens} came one by one"
    return times


def report(figures: dict[str, Any]) -> None:
    print("| model sleeps, ms | streams | HTTP, ms a step | engine alone | overhead of a token | to the first token |")
    print("|---|---|---|---|---|---|")
    for row in figures["rows"]:
        values = (row[name] for name in ("http_ms", "engine_ms", "overhead_ms", "first_token_ms"))
        print(f"| {row['pace_ms']:g} | {row['streams']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    first = figures["rows"][0]
    print(
        f"the aim for {first['streams']} stream: {AIM_MS} ms; {'met' if first['overhead_ms'] <= AIM_MS else 'missed'}"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
